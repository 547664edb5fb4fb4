"""What stands beside a transformer in a folder for `DiTPipeline` of diffusers: index, scheduler, autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyfusion.families.dit.model import DiTArch
from tinyfusion.models.loaded import ModelFacts, takes_latents

NULL_CLASS = 1000  # what DiTPipeline guides with, whatever the model
_SCALE_OF_CLASS = 0.18215  # of AutoencoderKL, where its configuration says nothing

MODEL_INDEX = {
    "_class_name": "DiTPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "transformer": ["diffusers", "DiTTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# the process that our models are trained with, in the words of DDIMScheduler; nothing is clipped, as latents have no range
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}


def unfit_pipeline(arch: DiTArch, facts: ModelFacts) -> str | None:
    """Why `DiTPipeline` cannot draw with a model of these sizes; None where it can."""
    if not takes_latents(arch, facts):
        return "it is a model of pixels, and DiTPipeline decodes latents (export without --pipeline)"
    if arch.num_classes != NULL_CLASS:
        return f"DiTPipeline guides with class {NULL_CLASS}, and its null class is {arch.num_classes} (export without --pipeline)"
    return _unfit_shift(facts.latent_shift)


def _unfit_shift(shift: float | None) -> str | None:
    return None if not shift else f"its latents are shifted by {shift:g}, which DiTPipeline does not undo"


def unfit_autoencoder(config: Any, arch: DiTArch, facts: ModelFacts) -> str | None:
    """Why an autoencoder with this config.json does not go with the model; None where it does."""
    if not isinstance(config, Mapping) or config.get("_class_name") != "AutoencoderKL":
        found = config.get("_class_name") if isinstance(config, Mapping) else None
        return f"it is {f'a {found}' if found else 'no model of diffusers'}, wanted an AutoencoderKL"
    channels = config.get("latent_channels", 4)
    if channels != arch.in_channels:
        return f"its latents have {channels} channels, those of the model {arch.in_channels}"
    scale = config.get("scaling_factor", _SCALE_OF_CLASS)
    return facts.unlike("it scales latents by", "latent_scale", scale) or _unfit_shift(config.get("shift_factor"))


def class_names(told: Any, num_classes: int) -> dict[int, str]:
    """The name of every class, from the contents of a file: a list, numbers to names, or a model_index.json with `id2label`.

    `DiTPipeline` takes "a, b" for two names of one class. Raises ValueError where not every class has exactly one entry.
    """
    if isinstance(told, Mapping) and "id2label" in told:
        told = told["id2label"]
    pairs = enumerate(told) if isinstance(told, list) else told.items() if isinstance(told, Mapping) else ()
    found = {str(number): name for number, name in pairs}
    wanted = [str(number) for number in range(num_classes)]
    if set(found) != set(wanted) or not all(isinstance(name, str) and name.strip() for name in found.values()):
        raise ValueError(f"it names {len(found)} classes, wanted a name for each of 0 to {num_classes - 1}")
    return {int(number): found[number] for number in wanted}
