"""The compute budget of a model with routers, met and measured on what its network is given while images are drawn."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tinyfusion.config.recipe import Recipe
from tinyfusion.dynamic.calibrate import TOLERANCE, Pass, calibrate, inference_ratio
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.process_specs import default_sampling, fits, process_spec, sampler_of
from tinyfusion.jobs.skipped_model import SkippedModel, skipped_run_for
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import Sampler, image_labels
from tinyfusion.sample.drive import sample as draw_samples

_MOST_STEPS = 50  # of the trajectories on which a budget is measured
_IMAGES_SHARE, _FEWEST_IMAGES = 16, 8  # an image is measured at every step, so fewer do than of noised data
_CALIBRATIONS = 2


def meet_budget(recipe: Recipe, student: LoadedModel) -> dict[str, Any]:
    """Shift the routers of `student` so that sampling meets the target; what is reached, and how that was measured.

    Measured on what the network is given while images are drawn, because tokens are decided by content and noised data are
    not quite what a sampler passes through. A shift changes the images a little, so they are drawn and measured twice.
    """
    settings, routed = recipe.dynamic, student.dynamic
    assert routed is not None
    section = recipe.sample if fits(recipe.sample, student) else default_sampling(student)
    sampler = sampler_of(process_spec(student).cheap(section, _MOST_STEPS), student)
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
    """Every forward pass of the network while these images are drawn, with its inputs, to be run again."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    labels = image_labels(images, len(student.conditions), recipe.seed)
    skipped = SkippedModel(student, skipped_run_for(student, sampler))
    with skipped.running():
        hook = student.module.register_forward_pre_hook(
            lambda _module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        )
        try:
            list(draw_samples(student, labels, sampler, recipe.seed, images))
        finally:
            hook.remove()
    return [(len(args[0]), partial(student.module, *args, **kwargs)) for args, kwargs in given]
