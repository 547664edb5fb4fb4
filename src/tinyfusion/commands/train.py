"""`train`: a model from nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from tinyfusion.config.loading import to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import Batches
from tinyfusion.jobs.assemble import (
    RunOptions,
    engine_for,
    open_batches,
    plain_recipe,
    sized,
    trained_on,
    training_plan,
)
from tinyfusion.jobs.estimate import announce, described, training_disk_bytes, training_estimate
from tinyfusion.jobs.origins import with_watched
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import PROCESS_SECTIONS, objective_for, process_spec
from tinyfusion.jobs.training import TrainedRun, Training, drive, save
from tinyfusion.models.checkpoint import new_model
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import decay_groups, trainable
from tinyfusion.training.state import TrainState


def train(recipe: Recipe, options: RunOptions) -> dict[str, Any] | None:
    """Train a model; writes `model/` (averaged weights) and `model-raw/`. What `--json` prints."""
    engine = engine_for(recipe)
    source = open_batches(recipe, engine.device, recipe.model.in_channels)
    recipe = sized(recipe, source)
    settings = recipe.train
    plain = plain_recipe(recipe, "model", "data", "train", *PROCESS_SECTIONS)
    run = TrainedRun("train", recipe, options, engine, plain)
    training = train_of(recipe, engine, source)
    check_previews(training.recipe, training.model)
    if run.settled(lambda: training_disk_bytes(training), settings):
        return None
    if options.dry_run:
        plan = {"model": described(training.model), **training_plan(recipe, settings, run.mode)}
        return announce("train", plan, training_estimate(training), engine.is_main)
    with run.writing() as folder:
        seconds = drive(training, folder, options.resume)
        seen = training.state.seen_images
        for name, model in (("model", training.averaged()), ("model-raw", training.raw())):
            facts = dataclasses.replace(model.facts, seen_images=seen)
            save(folder, dataclasses.replace(model, facts=facts), name)
        folder.mark("done", seconds=seconds, seen_images=seen)
    return {"seconds": seconds}


def train_of(recipe: Recipe, engine: Engine, source: Batches | None = None) -> Training:
    """A new model and what trains it; source: its data, where they are open. Raises UserError where the two do not fit."""
    if source is None:
        source = open_batches(recipe, engine.device, recipe.model.in_channels)
        recipe = sized(recipe, source)
    sizes = to_plain(recipe.model)
    model = new_model(sizes.pop("family"), sizes, Randomness(recipe.seed).generator_seed("initial-weights"))
    model.facts = dataclasses.replace(model.facts, process_settings=process_spec(model).kept(recipe))
    model = trained_on(model, source)
    recipe = with_watched(recipe, model, [])
    engine.place(model.module.train(), list(model.stack))
    state = TrainState(
        model.module, decay_groups(trainable(model.module), model.family.undecayed, recipe.train), recipe.train
    )
    objective = objective_for(model, recipe.train.label_drop, recipe)
    return Training("train", recipe, recipe.train, model, model.stack, state, objective, source, engine)
