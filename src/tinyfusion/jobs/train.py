"""`train`: a model from nothing."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from tinyfusion.core.config import to_plain
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, check_space
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, objective_for, plain_recipe, training_plan
from tinyfusion.jobs.estimate import announce, described, training_disk_bytes, training_estimate
from tinyfusion.jobs.training import drive
from tinyfusion.models.checkpoint import LoadedModel, new_model, save_model
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState


def averaged(model: LoadedModel, state: TrainState) -> LoadedModel:
    """A copy of `model` with the moving average of its weights."""
    copy = model.copy()
    state.ema.copy_to(copy.module)
    return copy


def train(recipe: Recipe, options: RunOptions) -> dict[str, Any] | None:
    """Train a model; writes `model/` (averaged weights) and `model-raw/`. What `--json` prints."""
    settings = recipe.train
    plain = plain_recipe(recipe, "model", "data", "train")
    run = RunDirectory(options.out)
    mode = run.check("train", plain, options.overwrite)
    sizes = to_plain(recipe.model)
    model = new_model(sizes.pop("family"), sizes, Randomness(recipe.seed).generator_seed("initial-weights"))
    device = device_for(recipe)
    source = batches_for(recipe, model, device)
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return None
    model.module.to(device).train()
    objective = objective_for(model, settings.label_drop)
    state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings)
    if mode == "new":
        check_space(options.out, training_disk_bytes(model, state, settings))
    if options.dry_run:
        plan = {"model": described(model), **training_plan(recipe, settings, mode)}
        return announce("train", plan, training_estimate(model, state, objective, source, settings))
    with run.writing("train", plain, options.overwrite):
        seconds = drive(run, "train", state, objective, source, settings, recipe.seed)
        facts = dataclasses.replace(model.facts, seen_images=settings.made_images)
        save_model(dataclasses.replace(averaged(model, state), facts=facts), run.path / "model")
        save_model(dataclasses.replace(model, facts=facts), run.path / "model-raw")
        run.mark("done", seconds=seconds, seen_images=settings.made_images)
    return {"seconds": seconds}
