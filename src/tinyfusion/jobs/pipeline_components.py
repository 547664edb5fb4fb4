"""Networks of a pipeline besides its transformer, opened strictly: libraries fill missing tensors with random numbers."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion.core.reading import read_json_object
from tinyfusion.families.diffusers_classes.folder import INDEX
from tinyfusion.models.autoencoder import check_loaded

_LIBRARIES = ("diffusers", "transformers")


def strict_components(
    pipeline: Path, known: Container[str], dtype_of: Callable[[str], torch.dtype]
) -> dict[str, nn.Module]:
    """The networks that a pipeline's index names by classes of diffusers and transformers, but for those in `known`.

    dtype_of: the type of a component.

    Weights are safetensors; nothing is fetched, and no code of the folder is run. Raises UserError where a tensor is missing or has
    another shape than its configuration says; what the libraries raise on other damage is passed on. Tensors that a class does not
    have are left out, as published text encoders bring some.
    """
    found: dict[str, nn.Module] = {}
    for name, value in read_json_object(pipeline / INDEX).items():
        if name in known or not isinstance(value, list) or len(value) != 2 or value[0] not in _LIBRARIES:
            continue
        kind = _network_class(*value)
        if kind is None or not (pipeline / name).is_dir():
            continue
        settings: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        settings["dtype" if value[0] == "transformers" else "torch_dtype"] = dtype_of(name)
        module, report = kind.from_pretrained(pipeline / name, **settings)
        faults = {what: report.get(what) for what in ("missing_keys", "mismatched_keys", "error_msgs")}
        check_loaded(faults, pipeline / name)
        found[name] = module.eval()
    return found


def _network_class(library: str, name: str) -> Any:
    """The class of a network of this name; None where it is none, such as a tokenizer or scheduler."""
    import diffusers  # late: with transformers it takes seconds
    import transformers

    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name, None)
    bases = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return kind if isinstance(kind, type) and issubclass(kind, bases) else None
