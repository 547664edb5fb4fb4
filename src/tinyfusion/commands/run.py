"""`run`: the whole job, stage by stage; each stage continues where it stopped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.commands.distill_steps import distill_steps
from tinyfusion.commands.dynamic import dynamic
from tinyfusion.commands.evaluate import check_count
from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.commands.run_transformer import run_transformer
from tinyfusion.commands.sample import sample
from tinyfusion.commands.stages import (
    announce_run,
    drawn_models,
    end_again,
    few_steps_said,
    further_models,
    run_outcome,
    say_unchecked,
    score_models,
    scores_file,
    stages_of,
    trained_models,
    trainings_of,
    whole_run,
    write_comparison,
)
from tinyfusion.config.loading import to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch
from tinyfusion.core.progress import say
from tinyfusion.core.records import section_of
from tinyfusion.core.rundir import RunDirectory, check_space, write_json
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.timing import interleaved, speedup
from tinyfusion.jobs.assemble import RunOptions, device_for, engine_for, open_teacher
from tinyfusion.jobs.diagnostics import checkpoint_steps, write_pictures
from tinyfusion.jobs.estimate import described, sampling_estimate
from tinyfusion.jobs.few_steps import check_few_steps
from tinyfusion.jobs.folding import check_routed, folded_by
from tinyfusion.jobs.origins import require_features
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.routing import check_dynamic
from tinyfusion.jobs.sampling_setup import (
    SPREAD_STEPS,
    autoencoder_for,
    check_sampling,
    image_shape_and_dtype,
    timed_model,
)
from tinyfusion.jobs.scoring import open_reference
from tinyfusion.jobs.transformer_sources import transformer_of
from tinyfusion.jobs.typed import check_read
from tinyfusion.jobs.verbs import Inputs, Work, known_inputs
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.context import list_groups
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.layout import gate_layout
from tinyfusion.report.load import FURTHER
from tinyfusion.training.engine import Engine

_FURTHER = {"dynamic": dynamic, "distill-steps": distill_steps}  # optional stages, by the verb that each is


def run(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Prune, recover, optionally train routers or distil steps; sample all models from the same seeds, evaluate, time, write the page."""
    stages = {name.partition(".")[0] for name in recipe.assigned}
    for verb in FURTHER:
        name = section_of(verb)
        if name in stages and verb not in further_models(recipe) and not stages & {"prune", "recover"}:
            raise UserError(
                f"recipe {recipe.name} is for the verb `{verb}`, it says nothing of pruning and recovery: tinyfusion {verb} --recipe "
                f"{recipe.name} --model {recipe.teacher or 'MODEL'}, or add those sections and --set {name}.in_run=true"
            )
    recipe = trainings_of(recipe)
    known = bool(recipe.data.prompts or recipe.data.name)
    if transformer := transformer_of(recipe.teacher, options.blocks, known):
        return run_transformer(recipe, options, transformer)
    if options.inputs is not None:
        raise UserError(
            f"--inputs is for transformers of diffusers, and {recipe.teacher} is a model of a family: leave it out"
        )
    engine = engine_for(recipe)
    teacher = open_teacher(recipe, options.num_heads, options.family, num_classes=options.num_classes)
    check_read("run", recipe, teacher)
    recipe = dataclasses.replace(recipe, typed={})  # no stage reads all of it
    remarks: list[str] = []
    recipe, teacher = known_inputs(recipe, teacher, [recipe.teacher], remarks, evaluated=True)
    recipe = dataclasses.replace(recipe, prune=gate_layout(teacher).spelled(recipe.prune))
    plain = {**to_plain(recipe), "teacher": recipe.teacher, "teacher_hash": teacher.hash()}
    folder = RunDirectory(options.out, engine.is_main)
    mode = engine.first(lambda: folder.check("run", plain, options.overwrite))
    if mode == "finished":
        end_again(folder, options.dry_run)
        return run_outcome(options.out)
    missing = _check(recipe, options, teacher, engine) if mode == "new" else None
    say(remarks)
    if options.dry_run:
        planned = _announce(recipe, teacher, engine, mode)
        return planned | say_unchecked("images and references of the evaluation", missing)
    with whole_run(folder, recipe, options, plain, teacher_seen_images=teacher.facts.seen_images):
        _perform(recipe, options, folder, teacher)
    return run_outcome(options.out) if folder.writes else {}


def _perform(recipe: Recipe, options: RunOptions, folder: RunDirectory, teacher: LoadedModel) -> None:
    """Every stage but the page."""
    out, stage = options.out, stages_of(folder)
    where = dataclasses.replace(options, overwrite=False)
    student = str(out / "recover" / "student")
    places = {"teacher": recipe.teacher, "pruned": str(out / "prune" / "student"), "student": student}
    models = {name: places[name] for name in trained_models(recipe)}
    if "pruned" in models:
        stage("prune", lambda: prune(recipe, dataclasses.replace(where, out=out / "prune")))
    cut = out / "prune" if "pruned" in models else ""
    stage("recover", lambda: recover(recipe, dataclasses.replace(where, out=out / "recover"), cut))
    for verb, model in further_models(recipe).items():
        models[model] = str(out / verb / "student")
        stage(verb, functools.partial(_FURTHER[verb], recipe, dataclasses.replace(where, out=out / verb), student))
    if not folder.writes:
        return
    stage("sample", lambda: _sample(recipe, options, models))
    stage("evaluate", lambda: score_models(recipe, out, list(models), list(models)[-1]))
    timed = {name: open_model(source) for name, source in models.items() if name in ("student", *FURTHER.values())}
    stage("speed", lambda: _speed(recipe, out, {"teacher": teacher, **timed}))

    def step_of(model: LoadedModel, num_images: int) -> Callable[[], object]:
        return timed_model(model, recipe.sample, num_images, device_for(recipe), seed=recipe.seed).run

    place = functools.partial(scores_file, out)
    stage("pictures", lambda: write_pictures(recipe, out, teacher, open_model(student), step_of, place))


def _trainings(recipe: Recipe, teacher: LoadedModel, engine: Engine) -> list[Callable[[], Work]]:
    """The work of each stage that trains, built when called, so that one at a time is in memory."""
    searches = recipe.recover.search_share is not None

    def inputs(role: str, taught: bool, whole: bool = False) -> Inputs:
        model = teacher.copy() if whole else _student(recipe, teacher)
        return Inputs(recipe, RunOptions(Path()), {role: model, "teacher": teacher.copy() if taught else None})

    def pruning() -> Work:
        return prune.work(Inputs(recipe, RunOptions(Path()), {"teacher": teacher}), engine)

    def recovery() -> Work:
        return recover.work(inputs("student", recipe.recover.method != "finetune", searches), engine)

    works: list[Callable[[], Work]] = [recovery] if searches else [pruning, recovery]
    if recipe.dynamic.in_run:
        works.append(lambda: dynamic.work(inputs("model", recipe.dynamic.auxiliary == "teacher"), engine))
    if recipe.distill_steps.in_run:
        works.append(lambda: distill_steps.work(inputs("model", True), engine))
    return works


def _check(recipe: Recipe, options: RunOptions, teacher: LoadedModel, engine: Engine) -> WouldFetch | None:
    """Raise UserError on whatever a stage would refuse. Returns the download that a dry run would need for the rest."""
    missing = None
    # a dry run builds the trainings to measure them
    for build in () if options.dry_run else _trainings(recipe, teacher, engine)[: len(trained_models(recipe)) - 1]:
        build()
    if recipe.dynamic.in_run:
        student = _student(recipe, teacher)
        check_dynamic(recipe, student, "the student")
        check_routed(recipe, student, teacher if recipe.dynamic.auxiliary == "teacher" else None)
    if recipe.distill_steps.in_run:
        check_few_steps(recipe, teacher.cut(_stand_in(recipe, teacher)), teacher)
    check_sampling(recipe.sample, teacher)
    try:
        check_previews(recipe, teacher)
        _check_evaluation(recipe, teacher)
    except WouldFetch as error:  # features, a reference or the autoencoder
        missing = error
    checkpoint_steps(recipe.recover.training, recipe.evaluate.checkpoints)
    images = (
        len(drawn_models(recipe)) * recipe.sample.num_images * teacher.arch.in_channels * teacher.arch.input_size**2
    )
    weights = 4 * num_parameters(teacher.module)
    check_space(options.out, 6 * (1 + len(further_models(recipe))) * weights + images)
    return missing


def _check_evaluation(recipe: Recipe, teacher: LoadedModel) -> None:
    """Raise UserError where the samples, or a reference, cannot be evaluated."""
    shape, dtype = image_shape_and_dtype(teacher, autoencoder_for(recipe.sample, teacher))
    if dtype != np.uint8:
        raise UserError("sample.decode=false keeps latents, and `run` scores pictures: leave it out")
    extractor = open_extractor(require_features(recipe, "images of the teacher", shape), str(device_for(recipe)))
    extractor.check(np.zeros((1, *shape), np.uint8), "images of the teacher")
    num_images = recipe.sample.num_images
    check_count(num_images, f"sample.num_images={num_images}", recipe.evaluate)
    for name in recipe.evaluate.references:
        check_count(len(open_reference(name, extractor, recipe.data)), f"reference {name}", recipe.evaluate)


def _announce(recipe: Recipe, teacher: LoadedModel, engine: Engine, mode: str) -> dict[str, Any]:
    """Print and return the plan of a dry run."""
    pruning, recovery, drawn = recipe.prune, recipe.recover, drawn_models(recipe)
    routed = recipe.dynamic
    estimates = [build().estimate() for build in _trainings(recipe, teacher, engine)]
    drawing = sampling_estimate(teacher, recipe.sample, sampler_of(recipe.sample, teacher), device_for(recipe))
    steps = f"{routed.target:.0%} of the student's blocks, {routed.training.steps:,} steps"
    learned = f" {pruning.scheme}, {recovery.search_steps or pruning.training.steps:,} steps"
    learned += " of the recovery" if recovery.search_steps else ""
    plan = {
        "teacher": described(teacher),
        "prune": pruning.criterion + (learned if pruning.criterion == "learned" else ""),
        "recover": f"{recovery.method}, {recovery.training.steps:,} steps of {recovery.training.batch_size} images",
        **({"dynamic": steps} if routed.in_run else {}),
        **few_steps_said(recipe),
        "sample": f"{recipe.sample.num_images:,} images of each of {', '.join(drawn)}",
        "evaluate": f"against {', '.join(recipe.evaluate.references)}",
    }
    return announce_run(recipe, plan, mode, [*estimates, *[drawing] * len(drawn)], engine.is_main)


def _stand_in(recipe: Recipe, teacher: LoadedModel) -> PrunePlan:
    """A plan of the size that pruning will decide on; of criterion width, with all blocks."""
    settings, depths = recipe.prune, teacher.stack.depths()
    if settings.criterion == "indices":
        return by_indices(teacher, settings.keep, recipe.seed)
    if settings.criterion == "learned":
        return gate_layout(teacher).stand_in(settings)
    if settings.criterion == "width":
        kept = {name: list(range(depth)) for name, depth in depths.items()}
    else:
        kept = {name: list(range(group.keep)) for name, group in list_groups(teacher, settings).items()}
    return PrunePlan(kept=kept, depth=depths, criterion="stand-in")


def _student(recipe: Recipe, teacher: LoadedModel) -> LoadedModel:
    """A model like the recovered student."""
    model = teacher.cut(_stand_in(recipe, teacher))
    if (folded := folded_by(recipe, recipe.recover, model)) is not None:
        model.facts = dataclasses.replace(model.facts, folded_guidance=folded)
    return model


def _sample(recipe: Recipe, options: RunOptions, models: dict[str, str]) -> None:
    for name, source in models.items():
        heads, classes = (options.num_heads, options.num_classes) if name == "teacher" else (None, None)
        family = options.family or (recipe.teacher_family if name == "teacher" else None)
        where = RunOptions(options.out / "samples" / f"{name}.npz", num_heads=heads, family=family, num_classes=classes)
        sample(recipe, where, source, options.out / "samples" / f"{name}.png")
    write_comparison(options.out / "samples", list(models))


def _speed(recipe: Recipe, out: Path, models: dict[str, LoadedModel]) -> None:
    """Write speed.json: guided denoising steps of all models, interleaved; "speedup" is the student's.

    drawing_speedup: of a whole drawing, which differs where a model draws in fewer steps.
    """
    device, settings = device_for(recipe), recipe.speed
    routed = any(model.dynamic is not None for model in models.values())
    steps = max(settings.steps_per_repeat, SPREAD_STEPS) if routed else settings.steps_per_repeat
    how = (recipe.sample, settings.batch_size, device, steps, recipe.seed)
    sides = {name: timed_model(model, *how) for name, model in models.items()}
    times = interleaved({name: side.run for name, side in sides.items()}, settings.repeats, device, "speed")
    rows = {}
    for name, side in sides.items():
        (ratio, *spread), latency = speedup(times["teacher"], times[name]), times[name].per(side.steps)
        rows[name] = {
            "depth": len(side.model.stack),
            "num_parameters": side.num_parameters,
            "macs": side.macs * side.rows,  # of a step of one image, guidance included
            "latency_ms": latency.median_ms,
            "latency_ms_spread": [min(latency.measurements_ms), max(latency.measurements_ms)],
            "speedup": ratio,
            "speedup_spread": spread,
            "drawing_speedup": ratio * sides["teacher"].calls / side.calls,
        }
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    without = [name for name, side in sides.items() if side.rows < sides["teacher"].rows]
    few = f" ({', '.join(without)}: folded in)" if without else ""
    protocol = (
        f"{settings.repeats} interleaved trajectories of {steps} denoising steps, batch {settings.batch_size}, guidance "
        f"{recipe.sample.guidance:g}{few}, float32, {device.type}, {threads} threads; medians"
    )
    numbers = {"batch_size": settings.batch_size, "threads": threads, "dtype": "float32"}
    student = {name: rows["student"][name] for name in ("speedup", "speedup_spread")}
    write_json(out / "speed.json", {"protocol": protocol, **numbers, "models": rows, **student})
