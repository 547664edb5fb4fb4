"""`train`: a model from nothing."""

from __future__ import annotations

import dataclasses
import sys

import torch

from tinyfusion.core.config import to_plain
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, objective_for, plain_recipe
from tinyfusion.jobs.training import drive
from tinyfusion.models.checkpoint import LoadedModel, new_model, save_model
from tinyfusion.training.loop import TrainState
from tinyfusion.training.optim import ParameterGroup


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def averaged(model: LoadedModel, state: TrainState) -> LoadedModel:
    """A copy of `model` with the moving average of its weights."""
    copy = model.copy()
    parameters = dict(copy.module.named_parameters())
    for name, value in state.ema.average.items():
        parameters[name].copy_(value)
    return copy


def train(recipe: Recipe, options: RunOptions) -> None:
    """Train a model; writes `model/` (averaged weights) and `model-raw/`."""
    plain = plain_recipe(recipe, "model", "data", "train")
    run = RunDirectory(options.out)
    mode = run.check("train", plain, options.overwrite)
    sizes = to_plain(recipe.model)
    model = new_model(sizes.pop("family"), sizes, Randomness(recipe.seed).generator_seed("initial-weights"))
    device = device_for(recipe)
    source = batches_for(recipe, model, device)
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return
    if options.dry_run:
        return
    run.begin("train", plain, options.overwrite)
    model.module.to(device).train()
    state = TrainState(model.module, [ParameterGroup(trainable(model.module), recipe.train.learning_rate)], recipe.train)
    seconds = drive(run, "train", state, objective_for(model, recipe.train.label_drop), source, recipe.train, recipe.seed)
    facts = dataclasses.replace(model.facts, license="Apache-2.0")
    save_model(dataclasses.replace(averaged(model, state), facts=facts), run.path / "model")
    save_model(dataclasses.replace(model, facts=facts), run.path / "model-raw")
    run.mark("done", seconds=seconds, seen_images=recipe.train.steps * recipe.train.batch_size)
