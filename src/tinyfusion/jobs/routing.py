"""Training of routers: checks, objective, and calibration to the budget when sampling."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import DynamicSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.dynamic.train import TOLERANCE, DynamicObjective, Pass, calibrate, inference_ratio
from tinyfusion.jobs.assemble import batches_for, device_for
from tinyfusion.jobs.process_specs import default_sampling, fits, label_drop_of, objective_for, process_spec, sampler_of
from tinyfusion.jobs.sampling_setup import SkippedModel, skipped_run_for
from tinyfusion.jobs.training import Training
from tinyfusion.models.attach import attach, check_attachable, order_by_importance
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import Sampler, image_labels
from tinyfusion.sample.drive import sample as draw_samples
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

_MOST_STEPS = 50  # of the trajectories on which a budget is measured
_IMAGES_SHARE, _FEWEST_IMAGES = 16, 8  # an image is measured at every step, so fewer do than of noised data
_CALIBRATIONS = 2


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


def dynamic_training(recipe: Recipe, model: LoadedModel, teacher: LoadedModel | None, engine: Engine) -> Training:
    """The training of the model with routers. Changes and moves both models."""
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
        label_drop=label_drop_of(model, settings.training.label_drop),
        ramp_steps=settings.ramp_steps,
        weight=settings.budget_weight,
        auxiliary=settings.beside,
        auxiliary_steps=settings.beside_steps,
        auxiliary_weight=settings.beside_weight,
        teacher=teacher.module if teacher else None,
        finish_from=settings.training.made_steps - settings.finish_steps,
        strata=settings.strata,
        total=engine.total if engine.world > 1 else None,
    )
    state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings.training)
    return Training("dynamic", recipe, settings.training, model, model.stack, state, objective, source, engine, teacher)


def router_settings(settings: DynamicSection) -> DynamicSettings:
    """The settings of routers in a recipe."""
    return DynamicSettings(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(DynamicSettings)})


def meet_budget(recipe: Recipe, student: LoadedModel) -> dict[str, Any]:
    """Shift the routers of `student` so that sampling meets the target; the ratio reached, and its protocol.

    Measured on the inputs of the network while images are drawn, because tokens are decided by content, and noised data
    differ from a sampler's. A shift changes the images a little, so they are drawn and measured twice.
    """
    settings, routed = recipe.dynamic, student.dynamic
    assert routed is not None
    section = recipe.sample if fits(recipe.sample, student) else default_sampling(student)
    sampler = sampler_of(process_spec(student).cheap(section, _MOST_STEPS), student)
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


@torch.no_grad()
def _drawn_passes(recipe: Recipe, student: LoadedModel, sampler: Sampler, images: int) -> list[Pass]:
    """Every forward pass of the network while images are drawn, as a function that runs it again."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    labels = image_labels(images, len(student.conditions), recipe.seed)
    skipped = SkippedModel(student, skipped_run_for(student, sampler))
    with (
        skipped.running(),
        student.module.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True),
    ):
        list(draw_samples(student, labels, sampler, recipe.seed, images))
    return [(len(args[0]), partial(student.module, *args, **kwargs)) for args, kwargs in given]
