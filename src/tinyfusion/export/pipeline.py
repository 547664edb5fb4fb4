"""Checks of the other components of a pipeline folder of diffusers: the autoencoder, and names of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyfusion.models.autoencoder import SCALE_OF_CLASS
from tinyfusion.models.loaded import LoadedModel


def unfit_autoencoder(config: Any, model: LoadedModel) -> str | None:
    """Why an autoencoder with this config.json does not go with the model; None where it does."""
    if not isinstance(config, Mapping) or config.get("_class_name") != "AutoencoderKL":
        kind = config.get("_class_name") if isinstance(config, Mapping) else None
        return f"it is {f'a {kind}' if kind else 'no model of diffusers'}, wanted an AutoencoderKL"
    channels, wanted = config.get("latent_channels", 4), model.arch.in_channels
    if channels != wanted:
        return f"its latents have {channels} channels, those of the model {wanted}"
    return model.facts.unlike("it scales latents by", "latent_scale", config.get("scaling_factor", SCALE_OF_CLASS))


def class_names(content: Any, num_classes: int) -> dict[int, str]:
    """The name of every class, from the contents of a file: a list, numbers to names, or a model_index.json with `id2label`.

    A pipeline takes "a, b" for two names of one class. Raises ValueError where not every class has exactly one entry.
    """
    if isinstance(content, Mapping) and "id2label" in content:
        content = content["id2label"]
    pairs = enumerate(content) if isinstance(content, list) else content.items() if isinstance(content, Mapping) else ()
    names = {str(number): name for number, name in pairs}
    wanted = [str(number) for number in range(num_classes)]
    if set(names) != set(wanted) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise ValueError(f"it names {len(names)} classes, wanted a name for each of 0 to {num_classes - 1}")
    return {int(number): names[number] for number in wanted}
