"""Measure what every block of a model does: the record of `explain`, and images drawn without each block.

The record is described in docs/explain.md. Shapes: N noised images, L blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.conditioning.classes import LABELS
from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.explain.removal import losses_without, means_by, paired_mean, removal_evaluations
from tinyfusion.explain.similarity import block_outputs, cka_matrix, rows_for
from tinyfusion.explain.updates import STATISTICS, BlockUpdates, block_updates
from tinyfusion.jobs.assemble import batches_for, device_for, other_inputs
from tinyfusion.jobs.process_specs import objective_for, process_spec
from tinyfusion.jobs.sampling_setup import autoencoder_for, open_drawing
from tinyfusion.jobs.so_far import SoFar
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import NoiseAxis, NoisyBatch, Process
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.prune.mask_search import short
from tinyfusion.recover.align import blocks_of_ancestor
from tinyfusion.sample.drive import image_labels

LARGE_RATIO = 10.0  # a channel is large from this multiple of the median magnitude on
MASSIVE = 100.0, 1000.0  # magnitude and multiple of the median: arXiv 2402.17762, of language models
_LISTED_CHANNELS = 16
_LEAST_OF_CLASS = 8  # images, for numbers of their class alone


@dataclass(frozen=True)
class Measured:
    """A model and the noised images that its blocks are measured on: `passes` over the same images, each with other noise."""

    model: LoadedModel
    objective: Process
    passes: tuple[Calibration, ...]

    @cached_property
    def batches(self) -> list[NoisyBatch]:
        """The batches of all passes."""
        return [noisy for each in self.passes for noisy in each.batches]

    @cached_property
    def images(self) -> np.ndarray:
        """(N,) the image that every noised image was made of."""
        return np.tile(np.arange(self.passes[0].images), len(self.passes))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) their classes; None if the model is not conditioned on classes."""
        if any(LABELS not in noisy.condition.tensors for noisy in self.batches):
            return None
        return torch.cat([noisy.condition[LABELS] for noisy in self.batches]).cpu().numpy()

    @property
    def axis(self) -> NoiseAxis | None:
        """The quantity that orders them by noise."""
        return self.objective.noise_axis

    def bins(self, num: int) -> list[np.ndarray]:
        """(N,) masks of `num` equal intervals of the axis, from noise to data; none without an axis."""
        if self.axis is None:
            return []
        places = torch.cat([self.objective.noise_places(noisy) for noisy in self.batches]).cpu().double().numpy()
        passed = (self.axis.noisiest - places) / (self.axis.noisiest - self.axis.cleanest)
        number = np.clip((passed * num).astype(int), 0, num - 1)
        return [number == i for i in range(num)]

    def protocol(self, recipe: Recipe) -> str:
        """What the numbers depend on besides the model."""
        num, passes = self.passes[0].images, len(self.passes)
        return (
            f"{num:,} images of {recipe.data.name}, each noised {passes} times, noise levels stratified, labels kept, float32, "
            f"seed {recipe.seed}; standard errors over images"
        )


def measured_on(recipe: Recipe, model: LoadedModel) -> Measured:
    """The model and its noised images. Raises UserError where data and model do not fit."""
    settings, device = recipe.explain, device_for(recipe)
    plain = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, augment=0.0, flip=0.0))
    source, objective = batches_for(plain, model, device), objective_for(model, 0.0, recipe)
    model.module.to(device).eval()
    num = min(settings.images, len(source))
    seeds = (Randomness(recipe.seed).generator_seed(f"explain/{number}") for number in range(settings.passes))
    how = (objective, source, recipe.data.name, num, num, settings.batch_size)
    return Measured(model, objective, tuple(calibration_set(*how, seed) for seed in seeds))


class ExplainedSoFar:
    """Losses and drawn images so far of a run, which an interrupted one goes on from."""

    def __init__(self, run: RunDirectory) -> None:
        self._so_far = SoFar(run, ("losses", "drawn"))
        self.spent_s = self._so_far.spent  # by the processes before this one
        self.losses: np.ndarray | None = self._so_far.begun.get("losses")
        self.drawn: np.ndarray = self._so_far.begun.get("drawn", np.empty((0, 1), np.uint8))

    def keep_losses(self, losses: np.ndarray) -> None:
        """Of some more batches: (L + 1, columns so far)."""
        self.losses = losses
        self._keep()

    def keep_drawn(self, images: np.ndarray) -> None:
        """Of one more model: (models so far, n, H, W, C)."""
        self.drawn = images
        self._keep()

    def _keep(self) -> None:
        losses = self.losses
        assert losses is not None
        self._so_far.keep(losses.shape[1] + len(self.drawn), lambda: {"losses": losses, "drawn": self.drawn})

    def drop(self) -> None:
        """Remove what is saved: the record has all of it."""
        self._so_far.drop()


def block_records(measured: Measured, num_bins: int, so_far: ExplainedSoFar | None = None) -> dict[str, Any]:
    """The part of the record about the blocks: losses, updates, activations, by noise level and class."""
    model, batches, depth = measured.model, measured.batches, len(measured.model.stack)
    with progress("explain: loss without each block", removal_evaluations(depth) * len(batches), "blocks") as bar:
        kept = (so_far.losses, so_far.keep_losses) if so_far else ()
        losses = losses_without(model, measured.objective, batches, bar, *kept)
    with progress("explain: updates", len(batches), "batches") as bar:
        updates = block_updates(model, measured.objective, batches, bar)
    whole, without = losses[0], losses[1:]
    bins, classes = measured.bins(num_bins), _classes(measured)
    parts = [np.equal(measured.labels, label) for label in classes] if measured.labels is not None else []
    images, channels = measured.images, _channels(model, updates)
    blocks, lists = [], [name for name, own in model.stack.depths().items() for _ in range(own)]
    for block, (name, loss, update) in enumerate(zip(lists, without, updates, strict=True)):
        added = loss - whole
        record: dict[str, Any] = {"block": block, "list": name, "added_loss": _number(paired_mean(added, images))}
        record["added_loss"]["by_noise"] = [_number(each) for each in means_by(added, images, bins)]
        record["added_loss"]["by_class"] = [_number(each) for each in means_by(added, images, parts)]
        for statistic in STATISTICS:
            values = getattr(update, statistic)
            record[statistic] = {"mean": _mean(values), "by_noise": [_mean(values[part]) for part in bins]}
        blocks.append({**record, "activations": _activations(update, channels[name])})
    loss_record = {
        **_number(paired_mean(whole, images)),
        "by_noise": [_number(each) for each in means_by(whole, images, bins)],
        "by_class": [_number(each) for each in means_by(whole, images, parts)],
    }
    return {
        "noise": _edges(measured.axis, num_bins),
        "classes": classes,
        "channels": channels,
        "loss": loss_record,
        "blocks": blocks,
    }


def _number(value: tuple[float, float] | None) -> dict[str, Any]:
    """A mean with its standard error; null where there is none, or it is not finite."""
    mean, error = (float("nan"), float("nan")) if value is None else value
    return {"mean": short(mean), "error": short(error)}


def _mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return short(float(finite.mean())) if len(finite) else None


def _classes(measured: Measured) -> list[int]:
    """The classes with enough images; none of a model without classes."""
    if measured.labels is None:
        return []
    labels, counts = np.unique(measured.labels[: measured.passes[0].images], return_counts=True)
    return [int(label) for label, num in zip(labels, counts, strict=True) if num >= _LEAST_OF_CLASS]


def _edges(axis: NoiseAxis | None, num: int) -> dict[str, Any] | None:
    if axis is None:
        return None
    return {"name": axis.name, "edges": [short(v) for v in np.linspace(axis.noisiest, axis.cleanest, num + 1)]}


def _channels(model: LoadedModel, updates: Sequence[BlockUpdates]) -> dict[str, list[int]]:
    """Per list of blocks the channels with the largest ratio in any block, largest first."""
    chosen = {}
    for name, first in first_blocks(depths := model.stack.depths()).items():
        most = np.max([update.activations.ratio for update in updates[first : first + depths[name]]], axis=0)
        chosen[name] = [int(channel) for channel in np.argsort(-most, kind="stable")[:_LISTED_CHANNELS]]
    return chosen


def _activations(update: BlockUpdates, channels: Sequence[int]) -> dict[str, Any]:
    """Magnitudes of a block's output in the listed channels, as multiples of the median; which channels are large or massive."""
    own = update.activations
    massive = (own.largest >= MASSIVE[0]) & (own.ratio >= MASSIVE[1])
    return {
        "median": short(own.median),
        "largest": short(float(own.largest.max())),
        "ratios": [short(float(own.ratio[channel])) for channel in channels],
        "large": np.flatnonzero(own.ratio >= LARGE_RATIO).tolist(),
        "massive": np.flatnonzero(massive).tolist(),
    }


def similarity(measured: Measured, teacher: LoadedModel, source: str) -> dict[str, Any]:
    """The part of the record about the outputs of own blocks and those of a teacher, or of the model itself.

    source: the teacher as named. Raises UserError where the teacher takes other inputs.
    """
    model, objective = measured.model, measured.objective
    rows, itself = rows_for(model.arch.hidden_size), teacher.hash() == model.hash()
    with progress("explain: similarity of outputs", 2 - itself, "models") as bar:
        own = block_outputs(model, objective, measured.batches, rows)
        bar(1)
        device = next(model.module.parameters()).device
        teacher.module.to(device)
        others = own if itself else block_outputs(teacher, objective, measured.batches, rows)
        bar(2 - itself)
    matrix = cka_matrix(own, others)
    best = [None if np.isnan(row).all() else int(np.nanargmax(row)) for row in matrix]
    return {
        "with": "itself" if itself else "teacher",
        "source": source,
        "hash": teacher.hash(),
        "lists": teacher.stack.depths(),
        "rows": max(map(len, own)),
        "matrix": [[short(value) for value in row] for row in matrix.tolist()],
        "most_like": best,
        "origins": None if itself else blocks_of_ancestor(model.facts, teacher.hash()),
    }


def check_similar(model: LoadedModel, teacher: LoadedModel, source: str) -> None:
    """Raise UserError unless teacher and model take the same inputs."""
    if why := other_inputs(teacher, model, "patch_size"):
        raise UserError(
            f"--teacher {source} does not take the inputs of the model ({why}): give a model of family {model.family.name} with "
            "the same images and classes"
        )


# ---------------------------------------------------------------------------------------------------------- drawn images


def drawing_settings(recipe: Recipe, model: LoadedModel) -> SampleSection:
    """The settings of the drawn images: as sampling, with few steps, and one image per class or evenly spread classes."""
    settings, num = recipe.sample, recipe.explain.drawn
    if not model.null_class and "sample.guidance" not in recipe.assigned:
        settings = dataclasses.replace(settings, guidance=1.0)
    cheap = process_spec(model).cheap(settings, recipe.explain.most_steps)
    labels = settings.labels or tuple(int(i * len(model.conditions) // num) for i in range(num))
    return dataclasses.replace(cheap, num_images=num, labels=labels, compile=False)


def drawn_without(recipe: Recipe, model: LoadedModel, so_far: ExplainedSoFar) -> tuple[np.ndarray, np.ndarray]:
    """Images (L + 1, n, H, W, C) uint8 from the same noise by the whole model, then without block 0, 1, ..., and labels (n,).

    recipe: with `drawing_settings`. An image that is not finite is black.
    """
    settings, depth = recipe.sample, len(model.stack)
    labels = image_labels(settings.num_images, len(model.conditions), recipe.seed, settings.labels)
    drawing = open_drawing(recipe, model, device_for(recipe), autoencoder_for(settings, model), labels)
    gates = torch.ones(depth + 1, 1, depth, device=next(model.module.parameters()).device)
    gates[torch.arange(depth) + 1, 0, torch.arange(depth)] = 0.0
    images = list(so_far.drawn)
    with progress("explain: images without each block", depth + 1, "models", len(images)) as bar:
        for number, row in list(enumerate(gates))[len(images) :]:
            with torch.inference_mode(), drawing.model.stack.gated(row, dropped="skip"):
                try:
                    images.append(np.concatenate(list(drawing.images(0, len(labels)))))
                except UserError:  # values that are not finite
                    if number == 0:
                        raise
                    images.append(np.zeros_like(images[0]))
            so_far.keep_drawn(np.stack(images))
            bar(number + 1)
    return np.stack(images), labels


def drawn_record(images: np.ndarray, labels: np.ndarray, protocol: str) -> dict[str, Any]:
    """The part of the record about drawn images: mean absolute difference from the whole model's, as a share of the range."""
    difference = np.abs(images[1:].astype(np.float64) - images[0]).mean(axis=(2, 3, 4)) / 255
    return {
        "protocol": protocol,
        "labels": labels.tolist(),
        "difference": [short(float(row.mean())) for row in difference],
        "by_image": [[short(value) for value in row] for row in difference.tolist()],
    }
