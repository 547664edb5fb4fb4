"""Training of routers: checks, objective, calibration to the budget when sampling, and the record of the units that run."""

from __future__ import annotations

import dataclasses
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.blocks.dynamics import BlockMasks, Deciding, model_ratio, total_macs
from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import DynamicSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.dynamic.train import TOLERANCE, DynamicObjective, Pass, calibrate, inference_ratio
from tinyfusion.jobs.assemble import batches_for, device_for
from tinyfusion.jobs.folding import fold_guidance, folds
from tinyfusion.jobs.process_specs import fitting_sampling, label_drop_of, objective_for, process_spec, sampler_of
from tinyfusion.jobs.sampling_setup import SkippedModel, skipped_run_for
from tinyfusion.jobs.training import Training
from tinyfusion.models.attach import attach, check_attachable, order_by_importance
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import SampleDraws, Sampler, image_labels, to_uint8
from tinyfusion.sample.drive import sample as draw_samples
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

_MOST_STEPS = 50  # of the trajectories on which a budget is measured
_IMAGES_SHARE, _FEWEST_IMAGES = 16, 8  # an image is measured at every step, so fewer do than of noised data
_CALIBRATIONS = 2
KEPT = "kept.json"
_NUM_IMAGES = 4
_NUM_TIMES = 8  # of the token maps
_SHOWN_CHANNELS = 3


def check_dynamic(recipe: Recipe, model: LoadedModel, source: str) -> None:
    """Raise UserError where the recipe decides on nothing, or the model, named `source`, cannot have such routers."""
    settings = recipe.dynamic
    if not (settings.width or settings.tokens or settings.depth):
        raise UserError("dynamic.width, dynamic.tokens and dynamic.depth are all off: nothing would be decided")
    if settings.finish_steps >= settings.training.made_steps:
        raise UserError(
            f"dynamic.finish_steps {settings.finish_steps} are the last of {settings.training.made_steps} steps, and leave none "
            "to train with noise: set fewer"
        )
    if model.facts.dynamic is not None:
        raise UserError(f"{source} has routers already: give the model that they were put on")
    check_attachable(model, router_settings(settings))
    if model.distilled_guidance and settings.auxiliary != "teacher":
        raise UserError(
            f"{source} has guidance folded in, so data are no target for it: set dynamic.auxiliary=teacher, and dynamic.guidance for a "
            "teacher without"
        )


def dynamic_training(recipe: Recipe, model: LoadedModel, teacher: LoadedModel | None, engine: Engine) -> Training:
    """The training of the model with routers. Changes and moves both models."""
    settings = recipe.dynamic
    source = batches_for(recipe, model, engine.device)
    alone = folds(settings) or (teacher or model).distilled_guidance
    # nothing is predicted without a label where guidance is folded in
    label_drop = 0.0 if alone else settings.training.label_drop
    inner = objective_for(model, label_drop, recipe)
    guidance = fold_guidance(recipe, settings, model, teacher, inner)
    if settings.order:
        order_by_importance(model)
    routed = attach(model, router_settings(settings), recipe.seed)
    engine.place(model.module.train(), list(model.stack))
    if teacher:
        engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    objective = DynamicObjective(
        inner=inner,
        dynamic=routed,
        target=settings.target,
        label_drop=label_drop_of(model, label_drop),
        ramp_steps=settings.ramp_steps,
        weight=settings.budget_weight,
        auxiliary=settings.auxiliary,
        auxiliary_steps=settings.auxiliary_steps,
        auxiliary_weight=settings.auxiliary_weight,
        teacher=(teacher.module, teacher.stack) if teacher else None,
        taught_alone=alone,
        guidance=guidance,
        finish_from=settings.training.made_steps - settings.finish_steps,
        strata=settings.strata,
        total=engine.total if engine.world > 1 else None,
    )
    state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings.training, model.stack)
    return Training("dynamic", recipe, settings.training, model, model.stack, state, objective, source, engine, teacher)


def router_settings(settings: DynamicSection) -> DynamicSettings:
    """The settings of routers in a recipe."""
    return DynamicSettings(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(DynamicSettings)})


def meet_budget(recipe: Recipe, student: LoadedModel) -> dict[str, Any]:
    """Shift the routers of `student` so that sampling meets the target; the ratio reached, and its protocol.

    Measured on the inputs of the network while images are drawn, because tokens are decided by content, and noised data
    differ from a sampler's. A shift changes the images a little, so they are drawn and measured twice.
    """
    settings, routed = recipe.dynamic, student.dynamic
    assert routed is not None
    section = process_spec(student).cheap(fitting_sampling(recipe.sample, student), _MOST_STEPS)
    sampler = sampler_of(section, student)
    images = max(settings.calibration_images // _IMAGES_SHARE, _FEWEST_IMAGES)
    student.module.to(device_for(recipe)).eval()
    passes = _drawn_passes(recipe, student, sampler, images)
    trained = reached = inference_ratio(routed, passes)
    offset = 0.0
    for _ in range(_CALIBRATIONS if settings.calibration_images else 0):
        shift, _ = calibrate(routed, settings.target, partial(inference_ratio, routed, passes))
        offset += shift
        passes = _drawn_passes(recipe, student, sampler, images)
        reached = inference_ratio(routed, passes)
    student.module.to("cpu")
    return {
        "target": settings.target,
        "ratio": reached,
        "trained_ratio": trained,
        "offset": offset,
        "tolerance": TOLERANCE,
        "calibration": {
            "images": images,
            "seed": recipe.seed,
            "protocol": f"all passes of {images} drawn images | {sampler.describe(student)} | float32",
        },
    }


@torch.no_grad()
def _drawn_passes(recipe: Recipe, student: LoadedModel, sampler: Sampler, images: int) -> list[Pass]:
    """Every forward pass of the network while images are drawn, as a function that runs it again."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    labels = image_labels(images, len(student.conditions), recipe.seed)
    skipped = SkippedModel(student, skipped_run_for(student, sampler))
    with (
        skipped.running(),
        student.module.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True),
    ):
        list(draw_samples(student, labels, sampler, recipe.seed, images))
    return [(len(args[0]), partial(student.module, *args, **kwargs)) for args, kwargs in given]


class _Recording(Deciding):
    """Decides as at inference, at full cost, and records the time and the masks of every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.passes: list[dict[int, BlockMasks]] = []

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """Begin a pass; `masks` is filled block by block."""
        super().begin(t, embedding)
        self.times.append(float(t[0]))
        self.passes.append(self.masks)


@torch.no_grad()
def dynamic_record(recipe: Recipe, model: LoadedModel) -> dict[str, Any]:
    """kept.json: heads, groups, tokens and blocks that ran at every time of the sampler, and which tokens of four images.

    The first four images of the recipe's sampling, or of the published one (`fitting_sampling`). Moves the model to the recipe's
    device.
    """
    routed = model.dynamic
    assert routed is not None
    sampler, device = sampler_of(fitting_sampling(recipe.sample, model), model), device_for(recipe)
    model.module.to(device).eval()
    labels = image_labels(
        _NUM_IMAGES, len(model.conditions), recipe.seed, recipe.sample.labels, recipe.sample.label_rule == "balanced"
    )
    draws, recording = SampleDraws(Randomness(recipe.seed), 0, _NUM_IMAGES, device), _Recording()
    with routed.using(recording):
        condition = model.conditions.index(torch.from_numpy(labels)).to(device)
        x = deque(sampler.trajectory(model, condition, draws), maxlen=1).pop()
    sizes, settings, depth = routed.sizes, routed.settings, len(model.stack)
    ratios = []
    for masks in recording.passes:
        rows = next(len(m) for m in (masks[0].heads, masks[0].tokens, masks[0].gate) if m is not None)
        ratios.append(model_ratio(masks, sizes, rows).mean())
    ratio, static = float(torch.stack(ratios).mean()), model.macs()
    first = {time: i for i, time in reversed(list(enumerate(recording.times)))}  # its first pass, of every time
    times = list(dict.fromkeys(recording.times))
    passes = [recording.passes[first[time]] for time in times]
    shares = {
        name: _shares(passes, name, depth)
        for name, wanted in (
            ("heads", settings.width), ("groups", settings.width), ("tokens", settings.tokens), ("gate", settings.depth)
        )
        if wanted
    }  # fmt: skip
    return {
        "protocol": f"{_NUM_IMAGES} images | {sampler.describe(model)} | float32 | seed {recipe.seed}",
        "times": [round(time, 6) for time in times],
        "num_units": sizes.num_heads,
        "shares": shares,
        "sub_networks": _different(passes),
        "ratio": ratio,
        "macs": total_macs(static, sizes, depth, ratio, settings.tokens),
        "static_macs": static,
        "maps": _token_maps(recording, x, labels, model) if settings.tokens else None,
    }


def _shares(passes: list[dict[int, BlockMasks]], name: str, depth: int) -> list[list[float]]:
    """Per block and time, the share of units, or of tokens of all images, that ran."""
    shares = [[getattr(masks[block], name).float().mean().item() for masks in passes] for block in range(depth)]
    return [[round(share, 4) for share in row] for row in shares]


def _different(passes: list[dict[int, BlockMasks]]) -> int:
    """Sub-networks that differ in heads, groups or blocks."""
    seen = set()
    for masks in passes:
        decided = [m[:1] for block in masks.values() for m in (block.heads, block.groups, block.gate) if m is not None]
        seen.add(torch.cat([m.flatten() for m in decided]).bool().cpu().numpy().tobytes() if decided else b"")
    return len(seen)


def _token_maps(recording: _Recording, x: Tensor, labels: np.ndarray, model: LoadedModel) -> dict[str, Any]:
    """Per image and at some passes, the percentage of blocks whose MLP processed each token; and the images."""
    chosen = sorted({round(i) for i in np.linspace(0, len(recording.passes) - 1, _NUM_TIMES)})
    side = model.arch.input_size // model.arch.patch_size
    percent = []
    for i in chosen:
        tokens = torch.stack([masks.tokens for masks in recording.passes[i].values() if masks.tokens is not None])
        seen = tokens[:, : len(labels)].float().mean(0)  # the conditional half comes first
        percent.append((100 * seen).round().int().cpu().view(len(labels), side, side))
    return {
        "times": [round(recording.times[i], 6) for i in chosen],
        "percent": torch.stack(percent, dim=1).tolist(),
        "labels": labels.tolist(),
        "space": "latents" if model.of_latents else "pixels",
        "images": _shown(x, not model.of_latents).tolist(),
    }


def _shown(x: Tensor, pixels: bool) -> np.ndarray:
    """(B, S, S, 1 or 3) uint8: pixels as they are; of latents the first channels, each spread over its own range."""
    channels = _SHOWN_CHANNELS if x.shape[1] >= _SHOWN_CHANNELS else 1
    x = x[:, :channels].float()
    if not pixels:
        low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        x = 2 * (x - low) / (high - low).clamp(min=1e-6) - 1
    return to_uint8(x)
