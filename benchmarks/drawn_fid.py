"""FID of the images that a model draws as a recipe says, against the recipe's references; for benchmarks that compare models."""

from __future__ import annotations

import numpy as np
import torch

from tinyfusion.config.recipe import Recipe
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import Moments, feature_moments, frechet_distance
from tinyfusion.jobs.assemble import image_set
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import image_labels, sample, to_uint8


class DrawnFid:
    """FID of `images` images of a model, from the noise and labels of the recipe's seed; features and references are opened once."""

    def __init__(self, recipe: Recipe, images: int) -> None:
        self.recipe, self.images = recipe, images
        self.extractor = open_extractor(recipe.evaluate.features, "cpu")
        real = {
            name: to_uint8(torch.from_numpy(image_set(name, size=recipe.data.size).x))
            for name in recipe.evaluate.references
        }
        self.references = {name: self._moments(pixels) for name, pixels in real.items()}

    def _moments(self, pixels: np.ndarray) -> Moments:
        return feature_moments(self.extractor(pixels).pool)

    def of(self, model: LoadedModel) -> dict[str, float]:
        """{reference: FID}."""
        model.module.eval()
        settings, seed = self.recipe.sample, self.recipe.seed
        labels, sampler = image_labels(self.images, len(model.conditions), seed), sampler_of(settings, model)
        drawn = [to_uint8(part.x) for part in sample(model, labels, sampler, seed, settings.batch_size)]
        own = self._moments(np.concatenate(drawn))
        return {name: frechet_distance(*reference, *own) for name, reference in self.references.items()}
