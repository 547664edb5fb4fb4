"""Few steps of transformers of diffusers: what their pipeline will draw at, and the guidance that is folded in."""

from __future__ import annotations

import inspect
from typing import Any

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.data.batches import Batches
from tinyfusion.data.buckets import BucketBatches
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.families.diffusers_classes.few_steps import (
    Drawn,
    FewStepDrawing,
    StepPipeline,
    step_levels,
    step_pipeline,
)
from tinyfusion.families.diffusers_classes.folder import INDEX
from tinyfusion.jobs.pipelines import pipeline_class
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.noising import FewSteps, FlowNoising


def transformer_noising(model: TransformerModel) -> FlowNoising:
    """How a class that predicts velocities mixes latents and noise. Raises UserError on others."""
    call = call_of(model.folder.config)
    if call.process != "flow":
        raise UserError(
            f"few steps of transformers of diffusers are for flows, whose scheduler takes the steps' own noise levels; a "
            f"{model.folder.class_name} is a {call.process} one"
        )
    return FlowNoising(Flow("linear", "velocity", call.convention))


def pipeline_of_steps(model: TransformerModel) -> tuple[Any, StepPipeline]:
    """The class of a model's pipeline, and how that draws few steps. Raises UserError where it draws none."""
    name = model.folder.class_name
    folder = model.own_pipeline(f"a {name} of few steps draws at the noise levels of its pipeline")
    kind = pipeline_class(folder)
    row = step_pipeline(kind, read_json_object(folder / INDEX), model.scheduler)
    if model.arch.guided and not row.embeds:
        raise UserError(f"this {name} has guidance as an input, and a {kind.__name__} gives it none")
    return kind, row


def guidance_of_pipeline(recipe: Recipe, model: TransformerModel) -> float:
    """The scale, with 1 for none: of a network with guidance as an input what it is given; else that of the recipe or the pipeline.

    Raises UserError on a pipeline that draws no few steps, and on a scale that is set for a network that has its own.
    """
    kind, row = pipeline_of_steps(model)
    given, drawing = recipe.distill_steps.guidance, recipe.pipeline
    if model.arch.guided:
        if given is not None:
            raise UserError(
                f"distill_steps.guidance {given:g}: guidance is an input of this {model.folder.class_name}, and the student keeps it: "
                "set flow.guidance, which both networks are given"
            )
        return float(call_of(model.folder.config).resolved(model.context).guidance or 0.0)
    if given is not None or row.guidance is None:
        return 1.0 if given is None else given
    set_there = drawing.true_guidance if row.guidance == "true_cfg_scale" else drawing.guidance
    scale = inspect.signature(kind.__call__).parameters[row.guidance].default if set_there is None else set_there
    return max(1.0, 1.0 + float(scale) - row.off)


def step_drawing(recipe: Recipe, model: TransformerModel, guidance: float) -> FewStepDrawing:
    """How the pipeline will draw with the student of a recipe; the training data must be open where its shift depends on their size.

    guidance: that is folded in, or given to the network.
    """
    kind, row = pipeline_of_steps(model)
    settings, call = recipe.distill_steps, call_of(model.folder.config)
    shape = model.latent_shape
    if shape is None:
        raise UserError("the noise levels of a pipeline depend on the size of the latents: give --data")
    drawn = Drawn(shape, call.tokens(model.folder.config, shape), settings.num_steps)
    levels = step_levels(kind, model.scheduler, drawn)
    steps = FewSteps(settings.method, levels, guidance, _noises_anew(model))
    return FewStepDrawing.of(steps, row, model.arch.guided)


def _noises_anew(model: TransformerModel) -> bool:
    """Whether the scheduler of a model noises its prediction anew in every step."""
    return bool(model.scheduler.get("stochastic_sampling"))


def check_transformer_steps(recipe: Recipe, model: TransformerModel) -> None:
    """Raise UserError on settings by which a pipeline would not draw."""
    transformer_noising(model)
    kind, _ = pipeline_of_steps(model)
    settings, fresh = recipe.distill_steps, _noises_anew(model)
    if (settings.method == "matching" and settings.fresh_noise) != fresh:
        goes_on = "noises its prediction anew" if fresh else "goes on along its own prediction"
        instead = "method=matching with distill_steps.fresh_noise=true" if fresh else "fresh_noise=false"
        raise UserError(f"the scheduler of this {kind.__name__} {goes_on} in every step: set distill_steps.{instead}")
    if model.context.levels != (0.0, 1.0):
        raise UserError(
            f"a {kind.__name__} of two experts has no student of few steps: each is for some noise levels alone"
        )


def check_one_size(model: TransformerModel, source: Batches) -> None:
    """Raise UserError on data of several sizes where the noise levels depend on the size."""
    if isinstance(source, BucketBatches) and model.scheduler.get("use_dynamic_shifting"):
        raise UserError(
            f"the data have {len(source.shapes)} sizes, and the pipeline shifts its noise levels by the size: encode with one --size"
        )
