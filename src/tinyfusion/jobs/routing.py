"""Routers on a model as a training: its objective under a budget, and what a model must have to get them."""

from __future__ import annotations

import dataclasses

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import DynamicSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.dynamic.importance import order_by_importance
from tinyfusion.dynamic.train import DynamicObjective
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.process_specs import label_drop_of, objective_for
from tinyfusion.jobs.training import Training
from tinyfusion.models.attach import attach, check_attachable
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState


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


def router_settings(settings: DynamicSection) -> DynamicSettings:
    """What a recipe says of routers."""
    return DynamicSettings(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(DynamicSettings)})
