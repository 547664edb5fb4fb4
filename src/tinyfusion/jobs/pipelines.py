"""Pipelines of diffusers: the class that a folder names, its transformers, and opening it with one of them replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tinyfusion.core.device import available_bytes
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.families.diffusers_classes.folder import (
    INDEX,
    TransformerFolder,
    component_folders,
    open_transformer,
)
from tinyfusion.families.diffusers_classes.rows import rows_with

# of diffusers, transformers and safetensors on folders and arguments that do not fit
REFUSALS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    NameError,
    RuntimeError,
    SafetensorError,
)


def pipeline_class(folder: Path) -> Any:
    """The class of diffusers that a pipeline folder names. Raises UserError on code of its own, which is never run."""
    import diffusers  # late: it takes seconds
    from diffusers import DiffusionPipeline, pipelines

    index = read_json_object(folder / INDEX)
    name = index.get("_class_name")
    parts = {
        part: value[0]
        for part, value in index.items()
        if isinstance(value, list) and len(value) == 2 and part[0] != "_"
    }
    own = [part for part, library in parts.items() if library not in (None, "diffusers", "transformers")]
    own = [part for part in own if not hasattr(pipelines, str(parts[part]))]
    # what transformers' Auto classes would offer to run
    own += [
        part
        for part in parts
        if any("auto_map" in read_json_object(file) for file in (folder / part).glob("*config.json"))
    ]
    if isinstance(name, list) or own:
        what = "a pipeline class" if isinstance(name, list) else f"a class for {own[0]}"
        raise UserError(
            f"{folder} brings {what} of its own, and code of a model is never run: wanted classes of diffusers"
        )
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise UserError(
            f"diffusers {diffusers.__version__} has no pipeline {name}, which {folder} names: a newer version may"
        )
    return kind


def transformer_in(pipeline: Path, component: str | None, blocks: Path | None) -> TransformerFolder:
    """The transformer of a pipeline folder. Raises UserError where it has none of that name, or several and none is named."""
    rows = rows_with(blocks)
    if not (pipeline / INDEX).is_file():
        raise UserError(f"{pipeline} is no pipeline of diffusers: wanted a folder with {INDEX}, or a hub id")
    folders = {folder.name: folder for folder in component_folders(pipeline, rows)}
    if not folders:
        raise UserError(f"{pipeline} has no transformer whose class has a row of blocks: give --blocks FILE")
    if component is None and len(folders) > 1:
        raise UserError(
            f"{pipeline} has {len(folders)} transformers: give --component {' or --component '.join(folders)}"
        )
    name = component or next(iter(folders))
    if name not in folders:
        raise UserError(f"{pipeline} has no transformer {name}: --component is {' or '.join(folders)}")
    return open_transformer(folders[name], rows)


def opened_pipeline(kind: Any, folder: Path, model: TransformerFolder, device: torch.device) -> Any:
    """The pipeline, its transformer mapped from its files in their own types, the other components in the transformer's type.

    On a device with less free memory than all weights take its components are there in turn.
    """
    module: Any = model.module()
    own = {"dtype": module.dtype, model.path.name: module}
    try:
        pipeline = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **own
        )
    except REFUSALS as error:
        raise UserError(f"diffusers does not open {folder} as a {kind.__name__}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    free = available_bytes(device) if device.type == "cuda" else None
    weights = sum(
        t.nbytes for part in pipeline.components.values() if isinstance(part, nn.Module) for t in part.parameters()
    )
    if free is not None and weights > 0.8 * free:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline
