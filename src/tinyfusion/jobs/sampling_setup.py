"""Set up sampling from a recipe: checks, autoencoder, sampler, labels, sub-networks, timed steps, and the protocol string."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tinyfusion.blocks.dynamics import TokenMode, total_macs
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.blocks.packed import can_pack, pack
from tinyfusion.blocks.packed_int8 import can_quantize
from tinyfusion.blocks.packed_int8 import quantize as quantize_layers
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.rng import Randomness
from tinyfusion.dynamic.subnetworks import KeepTables, SubNetworks, rehearsed, resolve
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.latent_facts import prompts_hash, with_settings
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.autoencoder import Autoencoder, open_autoencoder
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import SampleDraws, Sampler, image_labels, to_uint8
from tinyfusion.sample.drive import sample as draw_samples

_CHANNELS = 3  # of pictures that an autoencoder makes
SPREAD_STEPS = 10  # of a timed trajectory where steps differ, as those of a model with routers do


@dataclass(frozen=True)
class SkippedRun:
    """Decisions of a model's routers along a trajectory. tables: decided in float32, before any cast.

    calls: the times of the forward passes, in order; None where the sampler chooses its steps.
    """

    tables: KeepTables
    calls: tuple[float, ...] | None

    def on(self, model: LoadedModel, compiled: bool) -> SubNetworks:
        """The sub-networks of `model`, on its device and in its type."""
        assert model.dynamic is not None
        device = next(model.module.parameters()).device
        mode: TokenMode = "bucketed" if device.type == "cuda" else "gathered"
        return SubNetworks(model.dynamic, self.tables, mode, self.calls, forms=CompiledForwards() if compiled else None)


def skipped_run_for(model: LoadedModel, sampler: Sampler) -> SkippedRun | None:
    """Decisions of a dynamic model's routers at the timesteps of `sampler`, in float32; None without routers."""
    if model.dynamic is None:
        return None
    draws = SampleDraws(Randomness(0), 0, 1, torch.device("cpu"))
    with torch.no_grad():
        one = model.conditions.index(slice(1))
        times = rehearsed(model, lambda stand_in: sampler.trajectory(stand_in, one, draws))
    return SkippedRun(resolve(model.dynamic, sorted(set(times))), tuple(times) if sampler.fixed_steps else None)


@dataclass(frozen=True)
class SkippedModel:
    """A model with its sub-networks. Enter `running` around every forward pass; `report` describes what ran."""

    model: LoadedModel
    skipping: SkippedRun | None
    compiled: bool = False

    @cached_property
    def sub_networks(self) -> SubNetworks | None:
        """Sliced weights, made once."""
        return None if self.skipping is None else self.skipping.on(self.model, self.compiled)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run sub-networks within the context; a model without routers runs as it is."""
        if self.sub_networks is None or self.model.dynamic is None:
            yield
            return
        with self.model.dynamic.using(self.sub_networks):
            yield
        self.sub_networks.check()

    def macs_run(self, static: float) -> float:
        """Multiply-accumulates of a forward pass of one image: `static`, or the mean over sub-networks so far."""
        routed, ran = self.model.dynamic, self.report()
        if routed is None or ran is None:
            return static
        depth, tokens = len(self.model.stack), routed.settings.tokens
        return total_macs(static, routed.sizes, depth, ran["macs_ratio"], tokens)

    def report(self) -> dict[str, Any] | None:
        """Units and ratio of multiply-accumulates that ran; None of a model without routers."""
        return None if self.sub_networks is None else self.sub_networks.report()


def labels_of(recipe: Recipe, model: LoadedModel) -> np.ndarray:
    """The label of every image."""
    s = recipe.sample
    return image_labels(s.num_images, len(model.conditions), recipe.seed, s.labels, s.label_rule == "balanced")


def protocol(recipe: Recipe, model: LoadedModel, autoencoder: Autoencoder | None = None) -> str:
    """The sampling half of the protocol string."""
    s = recipe.sample
    labels = "labels " + ("given" if s.labels else s.label_rule)
    if model.prompts is not None and (prompts := prompts_hash(recipe.data)):
        labels += f" of prompts {prompts['prompts'][:8]}"
    decoded = f" | vae {autoencoder.hash()[:8]}" if autoencoder else ""
    if autoencoder and (s.latent_scale, s.latent_shift) != (None, None):  # not those of its own configuration
        decoded += f" of latents at scale {autoencoder.scale:g} and shift {autoencoder.shift:g}"
    arithmetic = f"{s.dtype if s.quantize is None else s.quantize}{' compiled' if s.compile else ''}"
    how = sampler_of(s, model).describe(model)
    return f"{s.num_images} images | {how} | {labels}{decoded} | {arithmetic} | seed {recipe.seed}"


def check_sampling(settings: SampleSection, model: LoadedModel) -> None:
    """Raise UserError on settings that cannot work with the model. Opens no autoencoder."""
    known = len(model.conditions)
    if outside := [label for label in settings.labels if not 0 <= label < known]:
        what = "classes" if model.family.texts is None else "prompts"
        raise UserError(f"--labels {outside} out of range: the model knows {what} 0 to {known - 1}")
    sampler_of(settings, model)
    if not model.of_latents and settings.vae is not None:
        raise UserError(f"sample.vae {settings.vae} decodes latents, and this model draws pixels: leave it out")
    if not model.of_latents and not settings.decode:
        raise UserError("sample.decode=false keeps latents, and this model draws pixels: leave it out")
    if not settings.decode and settings.vae is not None:
        raise UserError("sample.vae decodes, and sample.decode=false does not: leave out one of the two")


def autoencoder_for(settings: SampleSection, model: LoadedModel) -> Autoencoder | None:
    """The autoencoder that decodes the model's latents; None where nothing is decoded.

    Raises UserError where there is none, or where it does not fit the model.
    """
    if not model.of_latents or not settings.decode:
        return None
    model = with_settings(model, settings)
    name, arch, facts = settings.vae or model.facts.vae, model.arch, model.facts
    if name is None:
        raise UserError(
            f"the model takes latents of {arch.in_channels} channels and does not say which autoencoder decodes them: give "
            "--vae (or --set sample.vae=), a folder or a hub id; --set sample.latent_scale= and sample.latent_shift= where "
            "it was trained with other numbers than that one's; or --set sample.decode=false for the latents themselves"
        )
    stated = {"scale": settings.latent_scale, "shift": settings.latent_shift}
    stated = {name: value for name, value in stated.items() if value is not None}
    autoencoder = dataclasses.replace(open_autoencoder(name), **stated)  # type: ignore[arg-type]  # both are numbers
    reason, pixels = None, autoencoder.factor * arch.input_size
    if autoencoder.channels != arch.in_channels:
        reason = f"its latents have {autoencoder.channels} channels, those of the model {arch.in_channels}"
    elif "image_size" not in model.doubtful and pixels != facts.image_size:
        reason = f"it decodes to {pixels} pixels, and the model's images have {facts.image_size}"
    reason = reason or facts.unlike("it scales latents by", "latent_scale", autoencoder.scale)
    reason = reason or facts.unlike("it shifts latents by", "latent_shift", autoencoder.shift)
    if reason:
        raise UserError(f"the autoencoder {name} does not go with the model: {reason}")
    return autoencoder


def check_quantized(model: LoadedModel, quantize: str | None, dtype: str, compiled: bool, device: torch.device) -> None:
    """Raise UserError where the blocks of a model cannot be quantized."""
    if quantize is None:
        return
    if dtype != "float32" or compiled:
        other = "--compile" if compiled else f"--dtype {dtype}"
        raise UserError(f"--quantize {quantize} has its own arithmetic: leave {other} away")
    if model.dynamic is not None:
        raise UserError(
            f"--quantize {quantize} is not for a model with routers, whose sub-networks slice weights: leave it away"
        )
    if not can_quantize(device):
        raise UserError(
            f"--quantize {quantize} needs a CPU and a torch with oneDNN, got {device}: --device cpu, or leave it away"
        )


def in_dtype(model: LoadedModel, dtype: str, device: torch.device, quantize: str | None = None) -> LoadedModel:
    """The model on the device, for inference; in a type other than float32, or quantized, a copy, packed where that helps."""
    if quantize is not None:
        placed = dataclasses.replace(model, module=copy.deepcopy(model.module).to(device).eval())
        quantize_layers(placed.stack)
        return placed
    if dtype == "float32":
        model.module.to(device).eval()
        return model
    kind = getattr(torch, dtype)
    placed = dataclasses.replace(model, module=copy.deepcopy(model.module).to(device, kind).eval())
    if can_pack(kind, device):
        # sub-networks slice the weights of blocks, and call their modulations as they are
        routed = placed.dynamic
        pack(placed.stack if routed is None else (b.get_submodule(routed.rules.modulation) for b in placed.stack))
    return placed


@dataclass(frozen=True)
class Drawing:
    """Sampling of images by index, ready to run. labels: of every image. dtype: of the images, uint8 or float32."""

    model: LoadedModel
    labels: np.ndarray
    sampler: Sampler
    seed: int
    settings: SampleSection
    autoencoder: Autoencoder | None
    dtype: np.dtype[np.generic]
    skipped: SkippedModel

    def images(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Images first .. last - 1 in batches (B, H, W, C). Raises UserError where a value is not finite."""
        with ExitStack() as around:
            around.enter_context(self.skipped.running())
            if self.settings.compile:
                around.enter_context(self.model.stack.compiled())
            sizes = (self.seed, self.settings.batch_size, first, last)
            for batch in draw_samples(self.model, self.labels, self.sampler, *sizes):
                x, bad = batch.x, f"values that are not finite from image {batch.first} on"
                if not bool(torch.isfinite(x).all()):
                    raise UserError(f"the model drew {bad}: it is broken or unrecovered")
                if self.autoencoder is not None:
                    pieces = x.split(self.settings.decode_batch_size)
                    x = torch.cat([self.autoencoder.decode(latents) for latents in pieces])
                    if not bool(torch.isfinite(x).all()):
                        raise UserError(f"the autoencoder decoded to {bad}")
                yield to_uint8(x) if self.dtype == np.uint8 else x.permute(0, 2, 3, 1).float().cpu().numpy()


def open_drawing(
    recipe: Recipe, model: LoadedModel, device: torch.device, autoencoder: Autoencoder | None = None,
    labels: np.ndarray | None = None,
) -> Drawing:  # fmt: skip
    """Set up sampling on `device` by the recipe's section `sample`. labels: of every image; None: the recipe's."""
    settings = recipe.sample
    if settings.compile:
        check_compiler(device)
    if autoencoder is not None:
        autoencoder.module.to(device)
    _, dtype = image_shape_and_dtype(model, autoencoder)
    sampler = sampler_of(settings, model)
    skipping = skipped_run_for(model, sampler)  # before any cast
    check_quantized(model, settings.quantize, settings.dtype, settings.compile, device)
    placed = in_dtype(model, settings.dtype, device, settings.quantize)
    labels = labels_of(recipe, model) if labels is None else labels
    skipped = SkippedModel(placed, skipping, settings.compile)
    return Drawing(placed, labels, sampler, recipe.seed, settings, autoencoder, dtype, skipped)


def draw(recipe: Recipe, model: LoadedModel, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,), in memory. title: of the progress line."""
    settings = recipe.sample
    drawing = open_drawing(recipe, model, device_for(recipe), autoencoder_for(settings, model))
    images: list[np.ndarray] = []
    with progress(title, settings.num_images, "images") as bar:
        for batch in drawing.images(0, settings.num_images):
            images.append(batch)
            bar(sum(map(len, images)))
    return np.concatenate(images), drawing.labels


def image_shape_and_dtype(
    model: LoadedModel, autoencoder: Autoencoder | None
) -> tuple[tuple[int, int, int], np.dtype[np.generic]]:
    """(H, W, C) and type of an image: pixels are uint8, latents float32."""
    if autoencoder is not None:
        pixels = int(autoencoder.factor * model.arch.input_size)
        return (pixels, pixels, _CHANNELS), np.dtype(np.uint8)
    side, channels = int(model.arch.input_size), int(model.arch.in_channels)
    return (side, side, channels), np.dtype(np.float32 if model.of_latents else np.uint8)


@dataclass(frozen=True)
class TimedModel:
    """One call of `run` makes `steps` denoising steps of a batch, in sub-networks where the model has routers.

    rows: of the network's batch per image. static_macs: of a complete forward pass of one image. calls: steps of a whole drawing.
    """

    skipped: SkippedModel
    num_parameters: int
    static_macs: int
    rows: int
    steps: int
    run: Callable[[], object]
    calls: int

    @property
    def model(self) -> LoadedModel:
        """The model on its device, in the timed type."""
        return self.skipped.model

    @property
    def macs(self) -> float:
        """Multiply-accumulates of a forward pass of one image: of sub-networks the mean so far."""
        return self.skipped.macs_run(self.static_macs)


def timed_model(
    model: LoadedModel, settings: SampleSection, num_images: int, device: torch.device, steps: int | None = None,
    seed: int = 0, dtype: str = "float32", compiled: bool = False, quantize: str | None = None,
) -> TimedModel:  # fmt: skip
    """The model on `device`. steps: of a trajectory over all noise levels; None: one typical step, of a model without routers."""
    sampler = sampler_of(settings, model)
    short = sampler.of_steps(steps or 1)
    skipping = skipped_run_for(model, short)  # before any cast
    size, macs = num_parameters(model.module), model.macs()
    placed = in_dtype(model, dtype, device, quantize)
    skipped = SkippedModel(placed, skipping, compiled)
    table = model.conditions
    condition = table.index(torch.arange(num_images) % len(table)).to(device)
    draws = SampleDraws(Randomness(seed), 0, num_images, device)

    @torch.inference_mode()
    def trajectory() -> object:
        with skipped.running():
            return deque(short.trajectory(placed, condition, draws), maxlen=1).pop()

    if steps is None:
        one_step = torch.inference_mode()(sampler.one_step(placed, condition, draws))
        return TimedModel(skipped, size, macs, sampler.rows, 1, one_step, sampler.calls)
    return TimedModel(skipped, size, macs, sampler.rows, short.calls, trajectory, sampler.calls)
