"""`dynamic`: routers on a model, trained with it under a budget, so that sampling runs only a part of it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import DynamicSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json, write_json
from tinyfusion.dynamic.calibrate import TOLERANCE, Pass, calibrate, inference_ratio
from tinyfusion.dynamic.importance import order_by_importance
from tinyfusion.dynamic.train import DynamicObjective
from tinyfusion.jobs.assemble import (
    RunOptions,
    batches_for,
    device_for,
    engine_for,
    open_teacher,
    plain_recipe,
    training_plan,
)
from tinyfusion.jobs.dynamic_record import KEPT, dynamic_record
from tinyfusion.jobs.estimate import announce, described, training_disk_bytes, training_estimate
from tinyfusion.jobs.latent_facts import open_stated, with_facts_of
from tinyfusion.jobs.origins import with_data, with_teacher
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import (
    PROCESS_SECTIONS,
    default_sampling,
    fits,
    label_drop_of,
    objective_for,
    process_spec,
    sampler_of,
)
from tinyfusion.jobs.skipped_model import SkippedModel, skipped_run_for
from tinyfusion.jobs.training import TrainedRun, Training, drive, save
from tinyfusion.models.attach import attach, check_attachable
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.sample.drive import Sampler, image_labels
from tinyfusion.sample.drive import sample as draw_samples
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

OUTCOME = "dynamic.json"  # of a run: what the routers reach, and the order of units that they decide on
_MOST_STEPS = 50  # of the trajectories on which a budget is measured
_IMAGES_SHARE, _FEWEST_IMAGES = 16, 8  # an image is measured at every step, so fewer do than of noised data
_CALIBRATIONS = 2


def dynamic(recipe: Recipe, options: RunOptions, source: str) -> dict[str, Any] | None:
    """Train routers and weights; writes `student/` (averaged weights), `student-raw/` and `dynamic.json`. What `--json` prints."""
    engine = engine_for(recipe)  # first: who fails after the processes have met is missed at once
    remarks: list[str] = []
    if recipe.dynamic.beside == "teacher":
        recipe, _ = with_teacher(recipe, source, "dynamic", remarks)
    model, teacher = opened(recipe, source, options.num_heads, options.family, options.num_classes)
    recipe = with_data(recipe, model, [source, *([recipe.teacher] if teacher else [])], remarks)
    model = with_facts_of(recipe, model)
    inputs = {"model": model.hash(), "teacher": teacher.hash() if teacher else None}
    plain = plain_recipe(recipe, "data", "dynamic", *PROCESS_SECTIONS, **inputs)
    plain["dynamic"].pop("in_run")  # who calls makes no difference
    run = TrainedRun("dynamic", recipe, options, engine, plain, remarks)
    intent = _intent(recipe, model, teacher, run.mode) if options.dry_run else {}
    training = dynamic_of(recipe, model, teacher, engine)
    check_previews(recipe, training.model)
    if run.settled(lambda: training_disk_bytes(training), training.settings):
        return {name: read_json(run.folder.path / OUTCOME)[name] for name in ("ratio", "target")}
    if options.dry_run:
        return announce("dynamic", intent, training_estimate(training), engine.is_main)
    with run.writing(model=source, teacher=recipe.teacher if teacher else None) as folder:
        seconds = drive(training, folder, options.resume)
        student, raw = training.averaged(), training.raw()
        reached = _meet_budget(recipe, student)
        if folder.writes:
            write_json(folder.path / OUTCOME, reached)
        save(folder, _recorded(student, reached), "student")
        save(folder, raw, "student-raw")
        if folder.writes:
            write_json(folder.path / KEPT, dynamic_record(recipe, student))
        folder.mark("done", seconds=seconds, seen_images=training.state.seen_images)
    return {"seconds": seconds, "ratio": reached["ratio"], "target": reached["target"]}


def opened(
    recipe: Recipe, source: str, num_heads: int | None, family: str | None, num_classes: int | None = None
) -> tuple[LoadedModel, LoadedModel | None]:
    """The model that is to get routers and, where it learns from one, the teacher. Raises UserError where it cannot."""
    model = open_stated(recipe, source, num_heads, family, num_classes)
    check_dynamic(recipe, model, source)
    if recipe.dynamic.beside != "teacher":
        return model, None
    teacher = open_teacher(recipe, num_heads, family, num_classes=num_classes)
    same = ("in_channels", "input_size", "num_classes")
    if teacher.family is not model.family or any(getattr(teacher.arch, n) != getattr(model.arch, n) for n in same):
        raise UserError(
            f"the teacher {recipe.teacher} does not take what {source} takes: wanted one of the same family, input and classes"
        )
    return model, teacher


def check_dynamic(recipe: Recipe, model: LoadedModel, source: str) -> None:
    """Raise UserError where the recipe decides on nothing, or the model, named `source`, cannot have such routers."""
    settings = recipe.dynamic
    if not (settings.width or settings.tokens or settings.depth):
        raise UserError("dynamic.width, dynamic.tokens and dynamic.depth are all off: nothing would be decided")
    if settings.finish_steps >= settings.training.made_steps:
        raise UserError(
            f"dynamic.finish_steps {settings.finish_steps} are the last of {settings.training.made_steps} steps, and leave none "
            "to train with noise: set fewer"
        )
    if model.facts.dynamic is not None:
        raise UserError(f"{source} has routers already: give the model that they were put on")
    check_attachable(model, router_settings(settings))


def dynamic_of(recipe: Recipe, model: LoadedModel, teacher: LoadedModel | None, engine: Engine) -> Training:
    """The model with routers, and what trains it. Changes and moves both models."""
    settings = recipe.dynamic
    source = batches_for(recipe, model, engine.device)
    inner = objective_for(model, settings.training.label_drop, recipe)
    if settings.order:
        order_by_importance(model)
    routed = attach(model, router_settings(settings), recipe.seed)
    engine.place(model.module.train(), list(model.stack))
    if teacher:
        engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    objective = DynamicObjective(
        inner=inner,
        dynamic=routed,
        target=settings.target,
        num_classes=model.arch.num_classes,
        label_drop=label_drop_of(model, settings.training.label_drop),
        ramp_steps=settings.ramp_steps,
        weight=settings.budget_weight,
        beside=settings.beside,
        beside_steps=settings.beside_steps,
        beside_weight=settings.beside_weight,
        teacher=teacher.module if teacher else None,
        finish_from=settings.training.made_steps - settings.finish_steps,
        strata=settings.strata,
        total=engine.total if engine.world > 1 else None,
    )
    state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings.training)
    return Training("dynamic", recipe, settings.training, model, model.stack, state, objective, source, engine, teacher)


def dynamic_alone(recipe: Recipe, model: LoadedModel, teacher: LoadedModel) -> Training:
    """The third step of a `run`, on this process. Give copies."""
    return dynamic_of(recipe, model, teacher if recipe.dynamic.beside == "teacher" else None, engine_for(recipe))


def router_settings(settings: DynamicSection) -> DynamicSettings:
    """What a recipe says of routers."""
    names = [field.name for field in dataclasses.fields(DynamicSettings)]
    return DynamicSettings(**{name: getattr(settings, name) for name in names})


# ------------------------------------------------------------------------------------------------------------- the budget


def _meet_budget(recipe: Recipe, student: LoadedModel) -> dict[str, Any]:
    """Shift the routers of `student` so that sampling meets the target; what is reached, and how that was measured.

    Measured on what the network is given while images are drawn, because tokens are decided by content and noised data are
    not quite what a sampler passes through. A shift changes the images a little, so they are drawn and measured twice.
    """
    settings, routed = recipe.dynamic, student.dynamic
    assert routed is not None
    sampler = _short_sampler(recipe, student)
    images = max(settings.calibration_images // _IMAGES_SHARE, _FEWEST_IMAGES)
    student.module.to(device_for(recipe)).eval()
    passes = _drawn_passes(recipe, student, sampler, images)
    trained = reached = inference_ratio(routed, passes)
    offset = 0.0
    for _ in range(_CALIBRATIONS if settings.calibration_images else 0):
        shift, _ = calibrate(routed, settings.target, partial(inference_ratio, routed, passes))
        offset += shift
        passes = _drawn_passes(recipe, student, sampler, images)
        reached = inference_ratio(routed, passes)
    student.module.to("cpu")
    return {
        "target": settings.target,
        "ratio": reached,
        "trained_ratio": trained,
        "offset": offset,
        "tolerance": TOLERANCE,
        "calibration": {
            "images": images,
            "seed": recipe.seed,
            "protocol": f"all passes of {images} drawn images | {sampler.describe(student)} | float32",
        },
    }


def _short_sampler(recipe: Recipe, student: LoadedModel) -> Sampler:
    """The recipe's way of sampling, or where it does not go with the model the published one; in at most so many steps."""
    section = recipe.sample if fits(recipe.sample, student) else default_sampling(student)
    return sampler_of(process_spec(student).cheap(section, _MOST_STEPS), student)


@torch.no_grad()
def _drawn_passes(recipe: Recipe, student: LoadedModel, sampler: Sampler, images: int) -> list[Pass]:
    """Every forward pass of the network while these images are drawn, with its inputs, to be made again."""
    given: list[tuple[Any, ...]] = []
    labels = image_labels(images, student.arch.num_classes, recipe.seed)
    skipped = SkippedModel(student, skipped_run_for(student, sampler))
    with skipped.running():
        hook = student.module.register_forward_pre_hook(lambda _module, inputs: given.append(inputs))
        try:
            list(draw_samples(student, labels, sampler, recipe.seed, images))
        finally:
            hook.remove()
    return [(len(inputs[0]), partial(student.module, *inputs)) for inputs in given]


def _recorded(student: LoadedModel, reached: dict[str, Any]) -> LoadedModel:
    """The model with what its routers reach among its facts."""
    known = {name: reached[name] for name in ("target", "ratio", "offset")}
    facts = dataclasses.replace(student.facts, dynamic={**(student.facts.dynamic or {}), **known})
    return dataclasses.replace(student, facts=facts)


def _intent(recipe: Recipe, model: LoadedModel, teacher: LoadedModel | None, mode: str) -> dict[str, str]:
    """What `--dry-run` says."""
    settings = recipe.dynamic
    decided = [name for name in ("width", "tokens", "depth") if getattr(settings, name)]
    return {
        "model": described(model),
        **({"teacher": described(teacher)} if teacher else {}),
        "decides on": f"{', '.join(decided)}, for {settings.target:.0%} of the multiply-accumulates of the blocks",
        **training_plan(recipe, settings.training, mode),
    }


__all__ = [
    "OUTCOME",
    "DynamicModel",
    "check_dynamic",
    "dynamic",
    "dynamic_alone",
    "dynamic_of",
    "opened",
    "router_settings",
]
