"""`run` of a transformer of diffusers: encode, prune, recover, distil steps, draw prompts, score, time, page; each stage continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyfusion.commands.distill_steps import distill_steps
from tinyfusion.commands.encode_captions import encode_captions
from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.commands.sample_prompts import draws_prompts
from tinyfusion.commands.stages import (
    announce_run,
    drawn_models,
    end_again,
    few_steps_said,
    run_outcome,
    say_unchecked,
    score_models,
    stages_of,
    trained_models,
    whole_run,
)
from tinyfusion.commands.transformer_job import TransformerJob, prompts_of, stand_in, transformer_job
from tinyfusion.commands.transformer_scores import (
    check_evaluation,
    check_number,
    draw_prompts,
    place_of,
    scores_said,
    time_steps,
)
from tinyfusion.commands.transformers import described_folder
from tinyfusion.config.loading import to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.fetching import WouldFetch
from tinyfusion.core.files import sha256_of
from tinyfusion.core.records import read_record
from tinyfusion.core.rundir import RunDirectory, check_space, write_json
from tinyfusion.data.latents import MANIFEST
from tinyfusion.data.prompts import TEXTS
from tinyfusion.data.recorded import read_recorded
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.jobs.assemble import RunOptions, engine_for, job_record, open_teacher
from tinyfusion.jobs.estimate import Estimate
from tinyfusion.jobs.few_steps import check_few_steps
from tinyfusion.jobs.pipelines import pipeline_of
from tinyfusion.jobs.prompt_drawing import pipeline_arguments
from tinyfusion.jobs.recorded_training import recorded_of
from tinyfusion.jobs.typed import check_read
from tinyfusion.jobs.verbs import Inputs, Work
from tinyfusion.training.engine import Engine


def run_transformer(recipe: Recipe, options: RunOptions, teacher: TransformerFolder) -> dict[str, Any]:
    """Encode pictures with captions (where the data are these), prune, recover, distil steps, draw, evaluate, time, write the page.

    Returns what `--json` prints. Raises UserError on whatever a stage would refuse, as far as it is known before.
    """
    engine = engine_for(recipe)
    check_read("run", recipe, teacher)
    recipe = dataclasses.replace(recipe, typed={})  # no stage reads all of it
    job = transformer_job(recipe, options, teacher)
    recipe = job.recipe
    plain: dict[str, Any] = {**to_plain(recipe), "teacher": recipe.teacher, "teacher_hash": teacher.hash}
    plain |= {"class": teacher.class_name, "encodes": job.encodes}
    plain |= {"inputs": read_recorded(options.inputs).fingerprint} if options.inputs is not None else {}
    plain |= {"prompts": sha256_of(Path(recipe.data.prompts))} if recipe.data.prompts else {}
    folder = RunDirectory(options.out, engine.is_main)
    mode = engine.first(lambda: folder.check("run", plain, options.overwrite))
    if mode == "finished":
        end_again(folder, options.dry_run)
        return run_outcome(options.out)
    missing = _check(job, engine) if mode == "new" or options.dry_run else None
    if options.dry_run:
        planned = _announce(job, engine, mode)
        return planned | say_unchecked("references and models of the evaluation", missing)
    about = job_record(job.trained, options, teacher=recipe.teacher, inputs=options.inputs)
    with whole_run(folder, recipe, options, plain, job=about):
        _perform(job, folder, engine)
    return run_outcome(options.out) if folder.writes else {}


def _perform(job: TransformerJob, folder: RunDirectory, engine: Engine) -> None:
    """Every stage but the page."""
    out, stage = job.options.out, stages_of(folder)
    where = dataclasses.replace(job.options, overwrite=False, resume=None)
    recorded = None if job.trained.data.name else where.inputs  # recovery prefers data
    # the same on every process
    records = engine.first(lambda: {name: read_record(out / name / "run.json") for name in ("prune", "recover")})
    done = {name: record is not None and record.get("state") == "done" for name, record in records.items()}
    if job.encodes and not done["recover"]:
        encoding = dataclasses.replace(where, out=out / "latents")
        stage("encode", lambda: encode_captions(job.recipe, encoding, job.recipe.data.name))
        engine.wait()  # for the manifest
    prompts = prompts_of(job)
    check_number(job.recipe, job.recipe.pipeline.num_images or len(prompts))
    if folder.writes:
        write_json(out / TEXTS, prompts)
    places = {"teacher": job.recipe.teacher, "pruned": str(out / "prune"), "student": str(out / "recover")}
    models = {name: places[name] for name in trained_models(job.recipe)}
    if "pruned" in models and not done["prune"]:
        _trainings(job, engine)["recover"]()  # raises what the recovery would refuse, before hours of learning masks
        stage("prune", lambda: prune(job.trained, dataclasses.replace(where, out=out / "prune")))
    if not done["recover"]:
        back = dataclasses.replace(where, out=out / "recover", inputs=recorded)
        stage("recover", lambda: recover(job.trained, back, places["pruned"] if "pruned" in models else ""))
    if job.recipe.distill_steps.in_run:
        models["few-steps"] = str(out / "distill-steps")
        fewer = dataclasses.replace(where, out=out / "distill-steps", inputs=None)
        stage("distill-steps", lambda: distill_steps(job.trained, fewer, places["student"]))
    if not folder.writes:
        return
    stage("sample", lambda: draw_prompts(job, models))
    stage("evaluate", lambda: score_models(job.scored, out, drawn_models(job.scored), "student", with_pairs=True))
    stage("speed", lambda: time_steps(job, models))


# --------------------------------------------------------------------------------------------------------------- checks


def _check(job: TransformerJob, engine: Engine) -> WouldFetch | None:
    """Raise UserError on whatever a stage would refuse. Returns the download that a dry run would need for the rest.

    The recovery is checked again once the latents exist.
    """
    recipe, missing = job.recipe, None
    if recipe.distill_steps.in_run:
        teacher = open_teacher(job.trained, None, None, blocks=job.options.blocks)
        check_few_steps(recipe, teacher.copy(), teacher)
    pipeline = pipeline_of(recipe.teacher, job.options.blocks, *place_of(job))
    pipeline_arguments(pipeline, recipe.pipeline)
    stand_in(job.teacher, recipe, job.options.inputs)
    if draws_prompts(recipe) or not job.encodes:
        prompts = prompts_of(job)
        check_number(recipe, recipe.pipeline.num_images or len(prompts))
    try:
        check_evaluation(job, pipeline)
    except WouldFetch as error:  # features, a reference or a CLIP model
        missing = error
    if not job.options.dry_run:  # which builds the trainings to measure them
        engine.first(lambda: check_space(job.options.out, 3 * job.teacher.num_bytes))
    return missing


def _trainings(job: TransformerJob, engine: Engine) -> dict[str, Callable[[], Work]]:
    """The work of each stage that trains by its name, built when called, so that one at a time is in memory; the latents must exist."""
    recipe, options = job.trained, dataclasses.replace(job.options, inputs=None)

    searches = recipe.recover.search_share is not None

    def opened() -> Any:
        return open_teacher(recipe, None, None, blocks=options.blocks)

    def pruning() -> Work:
        teacher = opened()
        recorded = recorded_of(job.options.inputs, teacher)
        return prune.work(Inputs(recipe, options, {"teacher": teacher}, recorded=recorded), engine)

    def recovery() -> Work:
        teacher = opened()
        recorded = None if recipe.data.name else recorded_of(job.options.inputs, teacher)
        student = teacher.copy() if searches else teacher.cut(stand_in(job.teacher, recipe, job.options.inputs))
        taught = recipe.recover.method != "finetune" and not (recorded and recipe.recover.method == "logits-kd")
        models = {"student": student, "teacher": teacher if taught else None}
        return recover.work(Inputs(recipe, options, models, recorded=recorded), engine)

    def few_steps() -> Work:
        teacher = opened()
        student = teacher.cut(stand_in(job.teacher, recipe, job.options.inputs))
        return distill_steps.work(Inputs(recipe, options, {"model": student, "teacher": teacher}), engine)

    works = {"prune": pruning} if recipe.prune.criterion == "learned" and not searches else {}
    return works | {"recover": recovery} | ({"distill-steps": few_steps} if recipe.distill_steps.in_run else {})


def _announce(job: TransformerJob, engine: Engine, mode: str) -> dict[str, Any]:
    """Print and return the plan of a dry run."""
    recipe, options, estimates = job.recipe, job.options, list[Estimate]()
    if job.encodes and not (job.latents / MANIFEST).is_file():
        where = dataclasses.replace(options, out=job.latents)
        made = encode_captions(recipe, where, recipe.data.name)["plan"]
        basis = "encoding alone; the trainings are measured once the latents exist"
        estimates.append(Estimate(made["minutes"], made["memory_gib"], made["disk_mib"], basis))
    else:
        estimates = [build().estimate() for build in _trainings(job, engine).values()]
    pruning, training, learned = recipe.prune, recipe.recover.training, recipe.prune.criterion == "learned"
    within = recipe.recover.search_steps
    searched = f"{within:,} steps of the recovery" if within else f"{pruning.training.steps:,} steps"
    num, encoder = recipe.pipeline.num_images, f", encoded by {recipe.encode.pipeline}" if job.encodes else ""
    plan = {
        "teacher": described_folder(job.teacher),
        "data": (recipe.data.name or str(options.inputs)) + encoder,
        "prune": f"learned {pruning.scheme}, {searched}" if learned else pruning.criterion,
        "recover": f"{recipe.recover.method}, {training.steps:,} steps of {training.batch_size} images",
        **few_steps_said(recipe),
        "sample": f"{f'{num:,} images' if num else 'an image per prompt'} by each of {', '.join(drawn_models(recipe))}",
        "evaluate": scores_said(job.scored),
    }
    return announce_run(recipe, plan, mode, estimates, engine.is_main)
