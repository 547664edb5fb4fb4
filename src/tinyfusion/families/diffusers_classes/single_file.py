"""One file in the names that ComfyUI and stable-diffusion.cpp read: renamed and concatenated byte ranges, and its metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from typing import Any, cast

from tinyfusion.config.loading import build
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import parse_toml
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.families.diffusers_classes.weights import Stored


@dataclass(frozen=True)
class SingleFile:
    """The names of one class; fields as in single_file.toml."""

    architecture: str
    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    others: bool = False
    warning: str = ""


@lru_cache(maxsize=1)
def single_files() -> Mapping[str, SingleFile]:
    """The table of names by class."""
    text = (resources.files(__package__) / "single_file.toml").read_text(encoding="utf-8")
    tables = parse_toml(text, "single_file.toml").items()
    return {name: cast(SingleFile, build(SingleFile, values, name)) for name, values in tables}


def single_file_of(model: TransformerFolder) -> SingleFile:
    """The names for a model. Raises UserError where its class has none in the table."""
    if model.class_name not in single_files():
        known = ", ".join(single_files())
        raise UserError(
            f"a {model.class_name} has no names of single files here, only {known} have: export --to diffusers"
        )
    return single_files()[model.class_name]


def single_file_weights(model: TransformerFolder) -> dict[str, Stored]:
    """The tensors of the file. Raises UserError where a tensor of the model has no name there."""
    names, weights = single_file_of(model), dict(model.weights)
    for module in names.swapped:
        pattern = f"{module.replace('.-1.', f'.{_last(model, module)}.')}.*"
        weights |= {
            name: stored.chunks([(1, 2), (0, 2)]) for name, stored in weights.items() if fnmatchcase(name, pattern)
        }
    written: dict[str, Stored] = {}
    for target, sources in names.modules.items():
        last = _last(model, sources[0])
        for index in range(last + 1) if "*" in target else [last]:
            for kind in ("", ".weight", ".bias"):
                own = [_of_block(source, index) + kind for source in sources]
                if own[0] in weights:
                    written[_of_block(target, index) + kind] = _joined([weights.pop(name) for name in own])
    if weights and not names.others:
        raise UserError(f"{next(iter(weights))} of {model.path} has no name in a single file of a {model.class_name}")
    return written | weights


def _last(model: TransformerFolder, module: str) -> int:
    """The last block of the list that a name with * or -1 is of; 0 where it is of none."""
    return model.depths.get(re.split(r"\.(?:\*|-1)\.", module)[0], 1) - 1


def _of_block(module: str, index: int) -> str:
    """A name with the index of a block in place of * or -1."""
    return module.replace(".*.", f".{index}.").replace(".-1.", f".{index}.")


def _joined(tensors: list[Stored]) -> Stored:
    """The concatenation along axis 0. Raises UserError where types differ."""
    first, *others = tensors
    if any((each.dtype, each.shape[1:]) != (first.dtype, first.shape[1:]) for each in others):
        raise UserError("tensors that a single file joins have several types: export --to diffusers keeps each")
    rows = sum(each.shape[0] for each in tensors)
    return Stored(first.dtype, (rows, *first.shape[1:]), tuple(part for each in tensors for part in each.ranges))


def single_file_metadata(model: TransformerFolder, title: str) -> dict[str, str]:
    """The metadata of the file's header: what readers look for, and our record."""
    counts = {each.count: model.depths[each.path] for each in model.row.lists if each.path in model.depths}
    record: dict[str, Any] = {**model.record, "class": model.class_name, "config": counts}
    stated = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": single_file_of(model).architecture,
        "modelspec.title": title,
        "modelspec.license": model.license,
        "modelspec.merged_from": model.parent,
        "tinyfusion": json.dumps(record),
    }
    return {name: value for name, value in stated.items() if value}
