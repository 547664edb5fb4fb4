"""Training of transformers of diffusers: their objective and batches, as their pipelines and published examples have them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tinyfusion.config.recipe import FlowSection, Recipe
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import Batches
from tinyfusion.data.buckets import BucketBatches
from tinyfusion.data.latents import LATENTS, LatentBatches
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.families.diffusers_classes.calls import check_latents
from tinyfusion.families.diffusers_classes.folder import new_transformer
from tinyfusion.families.diffusers_classes.rows import rows_with
from tinyfusion.families.diffusers_classes.schedules import gaussian_schedule, training_shift
from tinyfusion.jobs.transformer_sources import in_pipeline, pipeline_folder
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import Process
from tinyfusion.processes.flow import Flow, FlowObjective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.processes.time import TimeSampler

_SHIFTS = ("flow.shift", "flow.shift_type")


def new_transformer_model(recipe: Recipe, blocks: Path | None) -> TransformerModel:
    """A new transformer of diffusers: `model.family` is its class, `model.sizes` its config, the scheduler that of `pipeline.folder`.

    Raises UserError on sizes that do not fit.
    """
    rows, place = rows_with(blocks), recipe.pipeline.folder
    origin = None if place is None else (pipeline_folder(place), recipe.pipeline.component or "transformer")
    config = {"_class_name": recipe.model.family, **(recipe.model.sizes or {})}
    seed = Randomness(recipe.seed).generator_seed("initial-weights")
    return in_pipeline(new_transformer(config, rows, seed), origin, recipe.flow)


def transformer_objective(model: TransformerModel, label_drop: float, recipe: Recipe) -> Process:
    """The training objective of a model's class: flow, or noise or v-prediction on the schedule of its pipeline.

    The shift of a flow's noise levels is that of the pipeline's scheduler where it is static, as in the published examples, unless
    the recipe sets one. Raises UserError where it is not known how the class is called.
    """
    call = call_of(model.folder.config)
    if call.process == "gaussian":
        folder = model.own_pipeline(f"a {model.folder.class_name} is trained on the schedule of its pipeline")
        if not model.scheduler:
            raise UserError(f"{folder} has no scheduler/scheduler_config.json: the folder is incomplete")
        schedule, prediction = gaussian_schedule(model.scheduler)
        return GaussianObjective(label_drop, schedule, call=model.family.call, prediction=prediction)
    settings = _shifted(recipe, model)
    tokens = 1 if model.latent_shape is None else call.tokens(model.folder.config, model.latent_shape)
    with prefixed("flow", ValueError):
        flow = Flow("linear", "velocity", call.convention)
        times = dataclasses.replace(TimeSampler.of_section(settings, tokens), within=model.context.levels)
        return FlowObjective(label_drop, flow, settings.loss_weight, settings.train_eps, times, model.family.call)


def _shifted(recipe: Recipe, model: TransformerModel) -> FlowSection:
    """The section `flow`, with the shift of the pipeline's scheduler where the recipe sets none."""
    settings = recipe.flow
    if (settings.path, settings.prediction) != ("linear", "velocity"):
        raise UserError(
            f"flow.path={settings.path} and flow.prediction={settings.prediction}: a {model.folder.class_name} predicts the velocity of "
            "the linear path: leave both out"
        )
    if recipe.assigned & {*_SHIFTS} or not model.scheduler:
        return settings
    return dataclasses.replace(settings, shift=training_shift(model.scheduler))


def transformer_batches(recipe: Recipe, model: TransformerModel, source: Batches) -> Batches:
    """The batches of a data set for a model, with its texts. Raises UserError where they do not go together."""
    call, name = call_of(model.folder.config), recipe.data.name
    if not isinstance(source, LatentBatches | BucketBatches):
        raise UserError(
            f"a {model.folder.class_name} is trained on latents and encoded texts, and {name} are pictures: "
            f"`tinyfusion encode --data {name} --pipeline PIPELINE --out FOLDER`, then --data {LATENTS}FOLDER"
        )
    if model.prompts is None:
        raise UserError(
            f"{name} has no encoded texts, which a {model.folder.class_name} takes: encode captions with its pipeline, "
            "`tinyfusion encode --data PICTURES --pipeline PIPELINE --out FOLDER`, or give --set data.prompts=FILE"
        )
    if source.classes > len(model.prompts):
        raise UserError(
            f"{name} has {source.classes} texts, and its prompts are {len(model.prompts)}: encode both together"
        )
    for shape in source.shapes if isinstance(source, BucketBatches) else (source.shape,):
        check_latents(call, model.context, (1, *shape))
    model.latent_shape = tuple(source.shape)
    return source.conditioned_on(model.prompts)
