"""`train`: a model from nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tinyfusion.config.loading import to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, open_batches, sized, trained_on
from tinyfusion.jobs.driving import drive
from tinyfusion.jobs.latent_facts import takes_prompts, with_prompts_of
from tinyfusion.jobs.origins import with_watched
from tinyfusion.jobs.process_specs import objective_for, process_spec
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.transformer_sources import is_transformer_class
from tinyfusion.jobs.transformer_training import new_transformer_model
from tinyfusion.jobs.verbs import Inputs, TrainingVerb, save
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import decay_groups, trainable
from tinyfusion.training.state import TrainState


class Train(TrainingVerb[Training]):
    """Train a model from nothing; writes `model/` (averaged weights) and `model-raw/`."""

    name = "train"
    sections = ("model", "data", "train")

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """A new model, with missing sizes taken from its data."""
        if is_transformer_class(recipe.model.family, options.blocks):
            return self._open_transformer(recipe, options)
        batches = open_batches(recipe, device_for(recipe), recipe.model.in_channels)
        recipe = sized(recipe, batches)
        sizes = to_plain(recipe.model)
        if takes_prompts(recipe):
            sizes["num_classes"] = None  # it has no texts of its own
        model = new_model(sizes.pop("family"), sizes, Randomness(recipe.seed).generator_seed("initial-weights"))
        model = model.made_for(recipe.destination)
        model.facts = dataclasses.replace(model.facts, process_settings=process_spec(model).saved(recipe))
        model = with_prompts_of(recipe.data, trained_on(model, batches))
        batches.conditioned_on(model.conditions)
        return Inputs(with_watched(recipe, model, remarks), options, {"model": model}, batches=batches)

    def _open_transformer(self, recipe: Recipe, options: RunOptions) -> Inputs:
        """A new transformer of diffusers: its class and config are the recipe's, its data are latents and encoded texts."""
        model: LoadedModel = new_transformer_model(recipe, options.blocks)
        model = with_prompts_of(recipe.data, model)
        batches = batches_for(recipe, model, device_for(recipe))
        return Inputs(recipe, options, {"model": model}, batches=batches)

    def hashes(self, inputs: Inputs) -> dict[str, str | None]:
        """Empty: the result depends on no other model."""
        return {}

    def work(self, inputs: Inputs, engine: Engine) -> Training:
        """A training of all parameters of the model, ready to run."""
        recipe, model, settings = inputs.recipe, inputs.model("model"), inputs.recipe.train
        assert inputs.batches is not None
        engine.place(model.module.train(), list(model.stack))
        state = TrainState(
            model.module, decay_groups(trainable(model.module), model.family.undecayed, settings), settings, model.stack
        )
        objective = objective_for(model, settings.label_drop, recipe)
        return Training("train", recipe, settings, model, model.stack, state, objective, inputs.batches, engine)

    def perform(self, inputs: Inputs, work: Training, folder: RunDirectory) -> dict[str, Any]:
        """Train, and save averaged and raw weights."""
        seconds = drive(work, folder, inputs.options.resume)
        seen = work.state.seen_images
        for name, model in (("model", work.averaged()), ("model-raw", work.raw())):
            facts = dataclasses.replace(model.facts, seen_images=seen)
            save(folder, dataclasses.replace(model, facts=facts), name)
        folder.mark("done", seconds=seconds, seen_images=seen)
        return {"seconds": seconds}


train = Train()
