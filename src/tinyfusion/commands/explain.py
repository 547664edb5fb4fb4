"""`explain`: measure what every block of a model does, and write the record, the drawn images and a page."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from typing import Any

import numpy as np

from tinyfusion.commands.report import render_run
from tinyfusion.commands.stages import PAGE, end_again
from tinyfusion.config.loading import to_plain
from tinyfusion.config.recipe import PruneSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import RunDirectory, atomic_write, check_space, read_json, write_json, write_text
from tinyfusion.core.signals import Interrupted
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.jobs.assemble import RunOptions, device_for, open_teacher, plain_recipe, training_plan
from tinyfusion.jobs.criteria import CriterionWork, criterion_context
from tinyfusion.jobs.estimate import announce, described, sampling_estimate
from tinyfusion.jobs.explaining import (
    ExplainedSoFar,
    Measured,
    block_records,
    check_similar,
    drawing_settings,
    drawn_record,
    drawn_without,
    measured_on,
    similarity,
)
from tinyfusion.jobs.latent_facts import given_texts, open_stated
from tinyfusion.jobs.origins import making_run
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import autoencoder_for, check_sampling, protocol
from tinyfusion.jobs.transformer_sources import transformer_of
from tinyfusion.jobs.typed import check_read
from tinyfusion.jobs.verbs import known_inputs
from tinyfusion.models.loaded import LoadedModel

RECORD, DRAWN = "explain.json", "drawn.npz"


def explain(recipe: Recipe, options: RunOptions, source: str) -> dict[str, Any]:
    """Measure what every block of the model at `source` does; write `explain.json`, `drawn.npz` and `report.html`.

    Raises UserError on a model that is not measured block by block, and on data or a teacher that do not fit it.
    """
    remarks: list[str] = []
    _check_kind(recipe, options, source)
    model = open_stated(recipe, source, options.num_heads, options.family, options.num_classes)
    if model.dynamic is not None:
        raise UserError(
            f"{source} has routers, which run parts of its blocks, and explain measures whole blocks: give the model that it "
            "was made from"
        )
    check_read("explain", recipe, model)
    named = bool(recipe.data.name)
    recipe, model = known_inputs(recipe, model, [source], remarks)
    if not named and recipe.data.name == REAL_SETS[0]:
        held_out = dataclasses.replace(recipe.data, name=REAL_SETS[1])
        recipe, remarks = dataclasses.replace(recipe, data=held_out), [*remarks, f"measured on {REAL_SETS[1]}"]
    recipe, teacher = _teacher(recipe, options, source, model, remarks)
    if reason := _other_loss(model):
        remarks.append(f"warning: not measured is {reason}")
    draws = recipe.explain.drawn > 0 and (recipe.sample.decode or not model.of_latents)
    if draws:
        recipe = dataclasses.replace(recipe, sample=drawing_settings(recipe, model))
        check_sampling(recipe.sample, model)
    settings = {name: value for name, value in to_plain(recipe.explain).items() if name != "batch_size"}
    sections = ("data", "sample") if draws else ("data",)
    other = {} if teacher.hash() == model.hash() else {"teacher_hash": teacher.hash()}
    plain = plain_recipe(recipe, *sections, model=model.hash(), explained=settings, **other)
    folder = RunDirectory(options.out)
    mode = folder.check("explain", plain, options.overwrite)
    if mode == "finished":
        end_again(folder, options.dry_run)
        return _outcome(options)
    say(remarks)
    if draws:
        autoencoder_for(recipe.sample, model)  # raises before anything is measured
    measured = measured_on(recipe, model)
    if options.dry_run:
        return _announce(recipe, measured, teacher, draws, mode)
    check_space(options.out, (len(model.stack) + 1) * recipe.explain.drawn * 3 * model.facts.image_size**2)
    try:
        with folder.writing("explain", plain, options.overwrite):
            folder.mark("running", command=options.command, job={"model": source})
            began, so_far = time.perf_counter(), ExplainedSoFar(folder)
            record: dict[str, Any] = {"protocol": measured.protocol(recipe), "model": _facts(model, source)}
            record |= block_records(measured, recipe.explain.bins, so_far)
            record["similarity"] = similarity(measured, teacher, recipe.teacher or source)
            record["drawn"] = _draw(recipe, model, folder, so_far) if draws else None
            record["not_measured"] = _not_measured(record, measured, recipe)
            write_json(folder.path / RECORD, record)
            so_far.drop()
            folder.mark("done", seconds=so_far.spent_s + time.perf_counter() - began)
            write_text(folder.path / PAGE, render_run(folder.path))
    except Interrupted as stop:
        if any(folder.checkpoints.glob("step-*")):
            raise
        raise Interrupted(stop.signum, "no result was written, the same command begins anew") from None
    return _outcome(options)


def _check_kind(recipe: Recipe, options: RunOptions, source: str) -> None:
    if transformer_of(source, options.blocks, given_texts(recipe, options.family, options.blocks)):
        raise UserError(
            f"{source} is a transformer of diffusers, whose calls come from recordings: for the loss added by removing each of "
            "its blocks, `tinyfusion record` its pipeline, then `prune --criterion sensitivity --inputs RECORDED`; explain is for "
            "the model families"
        )


def _teacher(
    recipe: Recipe, options: RunOptions, source: str, model: LoadedModel, remarks: list[str]
) -> tuple[Recipe, LoadedModel]:
    """The model that the outputs of blocks are compared with: as named, else of the run that made the model, else itself."""
    if recipe.teacher:
        teacher = open_teacher(
            recipe, options.num_heads, options.family, on_data=False, num_classes=options.num_classes
        )
        check_similar(model, teacher, recipe.teacher)
        return recipe, teacher
    run = making_run(source)
    if run is not None and (recorded := run.teacher()) is not None:
        named = dataclasses.replace(recipe, teacher=recorded)
        with suppress(UserError):  # it may be elsewhere by now
            teacher = open_teacher(named, None, None, on_data=False)
            check_similar(model, teacher, recorded)
            remarks.append(f"teacher {recorded}, as in {run.path} (--teacher names another)")
            return named, teacher
        remarks.append(
            f"the teacher {recorded} of {run.path} cannot be opened: blocks are compared with each other (--teacher)"
        )
    return recipe, model


def _facts(model: LoadedModel, source: str) -> dict[str, Any]:
    return {"source": source, "hash": model.hash(), "lists": model.stack.depths(), "title": model.family.title}


def _draw(recipe: Recipe, model: LoadedModel, folder: RunDirectory, so_far: ExplainedSoFar) -> dict[str, Any]:
    """Draw and write the images. Returns their record."""
    images, labels = drawn_without(recipe, model, so_far)
    with atomic_write(folder.path / DRAWN) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images.reshape(-1, *images.shape[2:]), arr_1=np.tile(labels, len(images)))
    how = protocol(recipe, model, autoencoder_for(recipe.sample, model))
    return drawn_record(images, labels, how)


def _other_loss(model: LoadedModel) -> str | None:
    """Why the loss on data is not what the model learned; None where it is."""
    if model.facts.folded_guidance is None:
        return None
    return (
        f"what the model learned, as it predicts under guidance {model.facts.folded_guidance.scale:g} by itself, and the losses here "
        "compare that with data; updates, influence, similarity and drawn images are of its own outputs"
    )


def _not_measured(record: dict[str, Any], measured: Measured, recipe: Recipe) -> dict[str, str]:
    """What does not apply to the model or was left out, with the reason."""
    reasons = {}
    if reason := _other_loss(measured.model):
        reasons["learned_loss"] = reason
    if record["noise"] is None:
        reasons["by_noise"] = "the process of this model does not order its images by noise"
    if measured.labels is None:
        reasons["by_class"] = "the model is conditioned on texts, not on classes"
    elif not record["classes"]:
        reasons["by_class"] = (
            "no class has enough of the measured images: give --num-images, or a set with more of each"
        )
    if measured.model.family.mlp_norm is None:
        reasons["attention_share"] = "the family does not name the place between attention and MLP in its blocks"
    if record["drawn"] is None:
        off = recipe.explain.drawn == 0
        reasons["drawn"] = "no images were asked for" if off else "latents that are not decoded are no pictures"
    if any(value is None for row in record["similarity"]["matrix"] for value in row):
        reasons["similarity"] = "blocks of different lists have different tokens: such pairs are not compared"
    return reasons


def _announce(recipe: Recipe, measured: Measured, teacher: LoadedModel, draws: bool, mode: str) -> dict[str, Any]:
    """Print and return the plan of a dry run."""
    model, passes = measured.model, len(measured.passes)
    context = criterion_context(model, PruneSection(criterion="sensitivity"), 0, lambda: measured.passes[0])
    estimate = CriterionWork(context).estimate()
    estimate = dataclasses.replace(estimate, minutes=estimate.minutes * passes)
    plan = {"model": described(model), "teacher": described(teacher), "loss": measured.protocol(recipe)}
    if draws:
        num, settings = len(model.stack) + 1, recipe.sample
        plan["draws"] = f"{settings.num_images} images by the whole model and without each block"
        every = dataclasses.replace(settings, num_images=settings.num_images * num)
        estimate += sampling_estimate(model, every, sampler_of(settings, model), device_for(recipe))
    return announce("explain", {**plan, **training_plan(recipe, None, mode)}, estimate)


def _outcome(options: RunOptions) -> dict[str, Any]:
    """Print and return the main numbers of a finished record, for `--json`."""
    record = read_json(options.out / RECORD)
    added = [block["added_loss"]["mean"] for block in record["blocks"]]
    if not options.dry_run:
        ranked = sorted((v, b) for b, v in enumerate(added) if v is not None)
        listed = ", ".join(f"{block} ({value:.3g})" for value, block in ranked[:3])
        print(f"least loss added by removing block {listed}; whole model {record['loss']['mean']:.4g}")
    return {"report": str(options.out / PAGE), "added_loss": added, "most_like": record["similarity"]["most_like"]}
