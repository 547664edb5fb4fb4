"""How the previews of a training are drawn: a family's model by its sampler, a transformer of diffusers by its pipeline."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.data.captions import read_prompts
from tinyfusion.data.latents import LATENTS
from tinyfusion.data.prompts import TEXTS, spread_texts
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.pipelines import pipeline_with, stored_type
from tinyfusion.jobs.process_specs import process_spec, sampler_of
from tinyfusion.jobs.prompt_drawing import PromptDrawing, open_prompt_drawing, pipeline_arguments, pipeline_protocol
from tinyfusion.jobs.sampling_setup import (
    autoencoder_for,
    check_sampling,
    image_shape_and_dtype,
    open_drawing,
    protocol,
)
from tinyfusion.jobs.text_encoding import takes_video
from tinyfusion.models.autoencoder import Autoencoder
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel

MOST_STEPS = 50  # denoising steps of a preview of a family's model


def preview_drawing(recipe: Recipe, model: LoadedModel) -> FamilyPreviews | PromptPreviews:
    """How previews of a model are drawn."""
    if isinstance(model, TransformerModel):
        return PromptPreviews(recipe, model)
    return FamilyPreviews(recipe, model)


def cheap_sampling(recipe: Recipe, model: LoadedModel, **changes: Any) -> SampleSection:
    """The recipe's sampling where it takes at most `MOST_STEPS` steps, else a quick plain one; float32, eager, decoded."""
    settings = dataclasses.replace(recipe.sample, dtype="float32", compile=False, decode=True)
    return dataclasses.replace(process_spec(model).cheap(settings, MOST_STEPS), **changes)


class FamilyPreviews:
    """Previews of a model of a family, by its sampler. said: the sampler, as printed."""

    def __init__(self, recipe: Recipe, model: LoadedModel) -> None:
        self.recipe, self.model = recipe, model
        self._autoencoder: Autoencoder | None = None  # of a model of latents, from the first preview on

    @property
    def said(self) -> str:
        """The sampler, as printed."""
        return sampler_of(cheap_sampling(self.recipe, self.model), self.model).describe(self.model)

    def check(self) -> tuple[int, int, int]:
        """The shape of an image. Raises UserError where none can be drawn."""
        sampling = self.grid_sampling()
        check_sampling(sampling, self.model)
        return image_shape_and_dtype(self.model, autoencoder_for(sampling, self.model))[0]

    @contextlib.contextmanager
    def opened(self, model: LoadedModel) -> Iterator[FamilyPreviews]:
        """Previews of other weights within the context; after it their memory is the training's."""
        self.model = model
        if self._autoencoder is None:
            self._autoencoder = autoencoder_for(cheap_sampling(self.recipe, model), model)
        try:
            yield self
        finally:
            if self._autoencoder is not None:
                self._autoencoder.module.to("cpu")

    def grid(self) -> np.ndarray:
        """uint8 images (N, H, W, C), classes in turn where all of them fit in. Raises UserError on values that are not finite."""
        return self._images(self.grid_sampling())

    def small_set(self) -> np.ndarray:
        """uint8 images (N, H, W, C) for a small FID. Raises UserError on values that are not finite."""
        return self._images(self._small_sampling())

    def protocol(self) -> str:
        """The sampling half of the protocol of the small FID."""
        recipe = dataclasses.replace(self.recipe, sample=self._small_sampling())
        return protocol(recipe, self.model, self._autoencoder)

    def grid_sampling(self) -> SampleSection:
        """As `cheap_sampling`, for a grid: classes in turn where all of them fit in."""
        num = self.recipe.watch.grid_images
        rule = {"label_rule": "balanced"} if len(self.model.conditions) <= num else {}
        return cheap_sampling(self.recipe, self.model, num_images=num, **rule)

    def _small_sampling(self) -> SampleSection:
        return cheap_sampling(self.recipe, self.model, num_images=self.recipe.watch.fid_images)

    def _images(self, settings: SampleSection) -> np.ndarray:
        recipe = dataclasses.replace(self.recipe, sample=settings)
        drawing = open_drawing(recipe, self.model, device_for(recipe), self._autoencoder)
        return np.concatenate(list(drawing.images(0, settings.num_images)))


class PromptPreviews:
    """Previews of a transformer of diffusers, by its pipeline: the prompts of `watch.prompts`, else captions of the latents, in turn.

    The pipeline is opened for every preview, and released after it: its text encoders may be larger than the transformer.
    """

    def __init__(self, recipe: Recipe, model: TransformerModel) -> None:
        self.recipe = recipe
        self.source = pipeline_with(model)
        self._drawing: PromptDrawing | None = None

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts. Raises UserError where there are none."""
        data, watch = self.recipe.data.name, self.recipe.watch
        if watch.prompts is not None:
            return read_prompts(Path(watch.prompts))
        latents = Path(data.removeprefix(LATENTS))
        if not data.startswith(LATENTS) or not (latents / TEXTS).is_file():
            raise UserError(
                f"previews draw prompts, and there are none in {data or '--inputs'}: give --set watch.prompts=FILE, a prompt a line, or "
                "set watch.grid_every_steps and watch.fid_every_steps to 0"
            )
        return spread_texts(latents, max(watch.grid_images, watch.fid_images if watch.fid_every_steps else 0))

    @property
    def said(self) -> str:
        """The pipeline, as printed."""
        return f"{self.source.kind.__name__}, {len(self.prompts)} prompts in turn"

    def check(self) -> tuple[int, int, int]:
        """The shape of an image; 64 x 64 stands for the default of the pipeline. Raises UserError where none can be drawn."""
        if takes_video(self.source.kind):
            raise UserError(
                f"previews are images, and a {self.source.kind.__name__} draws videos: set watch.grid_every_steps and "
                "watch.fid_every_steps to 0"
            )
        settings = self.recipe.pipeline
        pipeline_arguments(self.source, settings)
        _ = self.prompts
        return settings.height or 64, settings.width or 64, 3

    @contextlib.contextmanager
    def opened(self, model: LoadedModel) -> Iterator[PromptPreviews]:
        """Previews of other weights within the context."""
        assert isinstance(model, TransformerModel)
        self.source = pipeline_with(model)
        self._drawing = open_prompt_drawing(self.source, self.recipe, self.prompts, device_for(self.recipe))
        try:
            yield self
        finally:
            self._drawing = None

    def grid(self) -> np.ndarray:
        """uint8 images (N, H, W, 3). Raises UserError on values that are not finite."""
        return self._images(self.recipe.watch.grid_images)

    def small_set(self) -> np.ndarray:
        """uint8 images (N, H, W, 3) for a small FID. Raises UserError on values that are not finite."""
        return self._images(self.recipe.watch.fid_images)

    def protocol(self) -> str:
        """The sampling half of the protocol of the small FID."""
        digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        dtype = self.recipe.pipeline.dtype or stored_type(self.source)
        return pipeline_protocol(self.source, self.recipe, digest, self.recipe.watch.fid_images, dtype)

    def _images(self, num: int) -> np.ndarray:
        assert self._drawing is not None
        return np.concatenate(list(self._drawing.images(0, num)))
