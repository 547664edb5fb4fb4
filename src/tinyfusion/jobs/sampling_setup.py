"""Set up sampling from a recipe: checks, autoencoder, sampler, labels, sub-networks, and the protocol string."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tinyfusion.blocks.dynamics import TokenMode
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.blocks.packed import can_pack, pack
from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.rng import Randomness
from tinyfusion.dynamic.macs import total_macs
from tinyfusion.dynamic.subnetworks import KeepTables, SubNetworks, rehearsed, resolve
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.latent_facts import prompts_hash, with_settings
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.attach import whole_layers
from tinyfusion.models.autoencoder import Autoencoder, open_autoencoder
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import SampleDraws, Sampler, image_labels, to_uint8
from tinyfusion.sample.drive import sample as draw_samples


@dataclass(frozen=True)
class SkippedRun:
    """What a sampler will ask of a model's routers of width and depth. tables: decided in float32, before any cast.

    calls: the times of the forward passes of a trajectory, in order; None where the sampler finds them as it goes.
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
    """What `sampler` will ask of `model`; None of a model without routers. Give the model in float32."""
    if model.dynamic is None:
        return None
    cpu = torch.device("cpu")
    draws = SampleDraws(Randomness(0), 0, 1, cpu)
    with torch.no_grad():
        one = model.conditions.index(slice(1))
        times = rehearsed(model, lambda stand_in: sampler.trajectory(stand_in, one, draws))
    return SkippedRun(resolve(model.dynamic, sorted(set(times))), tuple(times) if sampler.fixed_steps else None)


@dataclass(frozen=True)
class SkippedModel:
    """A model as it is sampled. Enter `running` around every forward pass; `report` says what ran."""

    model: LoadedModel
    skipping: SkippedRun | None
    compiled: bool = False

    @cached_property
    def sub_networks(self) -> SubNetworks | None:
        """Sliced weights, cut out once."""
        return None if self.skipping is None else self.skipping.on(self.model, self.compiled)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context a model with routers runs its sub-networks; another runs as it is."""
        if self.sub_networks is None or self.model.dynamic is None:
            yield
            return
        with self.model.dynamic.using(self.sub_networks):
            yield
        self.sub_networks.check()

    def macs_run(self, static: float) -> float:
        """Multiply-accumulates of a forward pass of one image: `static`, or what sub-networks ran of it on average so far."""
        routed, ran = self.model.dynamic, self.report()
        if routed is None or ran is None:
            return static
        depth, tokens = len(self.model.stack), routed.settings.tokens
        return total_macs(static, routed.sizes, depth, ran["macs_ratio"], tokens)

    def report(self) -> dict[str, Any] | None:
        """What was kept, and the ratio of multiply-accumulates that ran; None of a model without routers."""
        return None if self.sub_networks is None else self.sub_networks.report()


_CHANNELS = 3  # of pictures that an autoencoder makes


def labels_of(recipe: Recipe, model: LoadedModel) -> np.ndarray:
    """The label of every image."""
    settings = recipe.sample
    return image_labels(
        settings.num_images, len(model.conditions), recipe.seed, settings.labels, settings.label_rule == "balanced"
    )


def protocol(recipe: Recipe, model: LoadedModel, autoencoder: Autoencoder | None = None) -> str:
    """The sampling half of the protocol string."""
    s = recipe.sample
    labels = "labels " + ("given" if s.labels else s.label_rule)
    if model.prompts is not None and (prompts := prompts_hash(recipe.data)):
        labels += f" of prompts {prompts['prompts'][:8]}"
    decoded = f" | vae {autoencoder.hash()[:8]}" if autoencoder else ""
    if autoencoder and (s.latent_scale, s.latent_shift) != (None, None):  # not those of its own configuration
        decoded += f" of latents at scale {autoencoder.scale:g} and shift {autoencoder.shift:g}"
    arithmetic = f"{s.dtype}{' compiled' if s.compile else ''}"
    how = sampler_of(s, model).describe(model)
    return f"{s.num_images} images | {how} | {labels}{decoded} | {arithmetic} | seed {recipe.seed}"


def check_sampling(settings: SampleSection, model: LoadedModel) -> None:
    """UserError on settings that cannot work with the model. Opens no autoencoder."""
    if settings.num_images < 1 or settings.batch_size < 1:
        raise UserError(
            f"sample wants at least one image and a batch of at least one; got {settings.num_images} and {settings.batch_size}"
        )
    if settings.decode_batch_size < 1:
        raise UserError(f"sample.decode_batch_size is at least 1; got {settings.decode_batch_size}")
    known = len(model.conditions)
    outside = [label for label in settings.labels if not 0 <= label < known]
    if outside:
        what = "classes" if model.family.texts is None else "prompts"
        raise UserError(f"--labels {outside} out of range: the model knows {what} 0 to {known - 1}")
    sampler_of(settings, model)
    if not model.of_latents and settings.vae is not None:
        raise UserError(f"sample.vae {settings.vae} decodes latents, and this model draws pixels: leave it out")
    if not model.of_latents and not settings.decode:
        raise UserError("sample.decode=false keeps latents, and this model draws pixels: leave it out")
    if model.of_latents and not settings.decode and settings.vae is not None:
        raise UserError("sample.vae decodes, and sample.decode=false says not to: leave out one of the two")


def autoencoder_for(settings: SampleSection, model: LoadedModel) -> Autoencoder | None:
    """What decodes the model's latents; None where nothing is to be decoded.

    Raises UserError where none is known, none is there, or the one that is does not go with the model.
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
    autoencoder = open_autoencoder(name)
    autoencoder = dataclasses.replace(
        autoencoder,
        scale=autoencoder.scale if settings.latent_scale is None else settings.latent_scale,
        shift=autoencoder.shift if settings.latent_shift is None else settings.latent_shift,
    )
    reason = None
    if autoencoder.channels != arch.in_channels:
        reason = f"its latents have {autoencoder.channels} channels, those of the model {arch.in_channels}"
    elif "image_size" not in model.doubtful and autoencoder.factor * arch.input_size != facts.image_size:
        reason = f"it decodes to {autoencoder.factor * arch.input_size} pixels, and the model's images have {facts.image_size}"
    reason = reason or facts.unlike("it scales latents by", "latent_scale", autoencoder.scale)
    reason = reason or facts.unlike("it shifts latents by", "latent_shift", autoencoder.shift)
    if reason:
        raise UserError(f"the autoencoder {name} does not go with the model: {reason}")
    return autoencoder


# -------------------------------------------------------------------------------------------------------------- drawing


def in_dtype(model: LoadedModel, dtype: str, device: torch.device) -> LoadedModel:
    """The model on the device, frozen as it is; in a type other than float32 its weights are a copy, packed where that helps."""
    if dtype == "float32":
        model.module.to(device).eval()
        return model
    held_in = getattr(torch, dtype)
    placed = dataclasses.replace(model, module=copy.deepcopy(model.module).to(device, held_in).eval())
    if can_pack(held_in, device):
        pack(placed.stack if placed.dynamic is None else whole_layers(placed.dynamic))
    return placed


@dataclass(frozen=True)
class Drawing:
    """Everything that makes images by their index. shape: (H, W, C) of one, and `dtype` its type, uint8 or float32."""

    model: LoadedModel
    labels: np.ndarray
    sampler: Sampler
    seed: int
    batch_size: int
    compiled: bool
    decode_batch_size: int
    autoencoder: Autoencoder | None
    shape: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    skipped: SkippedModel

    def images(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Images first .. last - 1 in batches (B, H, W, C). Raises UserError where a value is not finite."""
        with ExitStack() as around:
            around.enter_context(self.skipped.running())
            if self.compiled:
                around.enter_context(self.model.stack.compiled())
            model, labels, sampler = self.model, self.labels, self.sampler
            for batch in draw_samples(model, labels, sampler, self.seed, self.batch_size, first, last):
                x = batch.x
                if not bool(torch.isfinite(x).all()):
                    raise UserError(
                        f"the model drew values that are not finite from image {batch.first} on: it is broken or unrecovered"
                    )
                if self.autoencoder is not None:
                    x = torch.cat([self.autoencoder.decode(latents) for latents in x.split(self.decode_batch_size)])
                    if not bool(torch.isfinite(x).all()):
                        raise UserError(
                            f"the autoencoder decoded to values that are not finite from image {batch.first} on"
                        )
                yield to_uint8(x) if self.dtype == np.uint8 else x.permute(0, 2, 3, 1).float().cpu().numpy()


def open_drawing(
    recipe: Recipe,
    model: LoadedModel,
    device: torch.device,
    autoencoder: Autoencoder | None = None,
    labels: np.ndarray | None = None,
) -> Drawing:
    """The drawing that the section `sample` describes, ready on `device`. labels: of every image, instead of the section's."""
    settings = recipe.sample
    if settings.compile:
        check_compiler(device)
    if autoencoder is not None:
        autoencoder.module.to(device)
    shape, dtype = image_shape_and_dtype(model, autoencoder)
    sampler = sampler_of(settings, model)
    skipping = skipped_run_for(model, sampler)
    placed = in_dtype(model, settings.dtype, device)
    return Drawing(
        model=placed,
        labels=labels_of(recipe, model) if labels is None else labels,
        sampler=sampler,
        seed=recipe.seed,
        batch_size=settings.batch_size,
        compiled=settings.compile,
        decode_batch_size=settings.decode_batch_size,
        autoencoder=autoencoder,
        shape=shape,
        dtype=dtype,
        skipped=SkippedModel(placed, skipping, settings.compile),
    )


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
    """(H, W, C) and type of one image as it is written: pixels are uint8, latents float32."""
    if autoencoder is not None:
        pixels = int(autoencoder.factor * model.arch.input_size)
        return (pixels, pixels, _CHANNELS), np.dtype(np.uint8)
    side, channels = int(model.arch.input_size), int(model.arch.in_channels)
    return (side, side, channels), np.dtype(np.float32 if model.of_latents else np.uint8)
