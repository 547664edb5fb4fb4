"""The prompts of a recipe's data: a file of encoded texts, which labels stand for in a model of texts."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyfusion.conditioning.texts import text_table
from tinyfusion.config.recipe import DataSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import sha256_of
from tinyfusion.data.latents import LATENTS
from tinyfusion.families.registry import family_named
from tinyfusion.families.tensor_checks import check_finite
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.tensors import read_safetensors

PROMPTS = "prompts.safetensors"  # in a folder of latents
_CHECKED_BYTES = 2**30  # files up to here are looked through for values that are not finite


def prompts_file(data: DataSection) -> Path | None:
    """The file of the data's prompts: as set, else the one in its folder of latents; None where there is none."""
    if data.prompts:
        return Path(data.prompts)
    path = Path(data.name.removeprefix(LATENTS)) / PROMPTS
    return path if data.name.startswith(LATENTS) and path.is_file() else None


def prompts_hash(data: DataSection) -> dict[str, Any]:
    """What "the same command" depends on of the data's prompts: the SHA-256 of their file, {} where there are none."""
    path = prompts_file(data)
    if path is None or not path.is_file():
        return {}
    state = path.stat()
    return {"prompts": _hash(path, state.st_size, state.st_mtime_ns)}


@lru_cache(maxsize=4)
def _hash(path: Path, _size: int, _changed_ns: int) -> str:
    return sha256_of(path)


def takes_prompts(recipe: Recipe) -> bool:
    """Whether the new model of a recipe is given the prompts of its data."""
    family = recipe.model.family
    return family is not None and family_named(family).texts is not None and prompts_file(recipe.data) is not None


def with_prompts_of(data: DataSection, model: LoadedModel) -> LoadedModel:
    """The model, whose labels stand for the prompts of its data, where there are such. Raises UserError on texts that it cannot take."""
    path = prompts_file(data)
    if path is None or (model.family.texts is None and not data.prompts):
        return model
    if model.family.texts is None:
        raise UserError(
            f"{path}: prompts are for models of texts, and one of family {model.family.name} takes classes: leave it out"
        )
    tensors = read_safetensors(path)
    if path.stat().st_size <= _CHECKED_BYTES:
        check_finite(tensors, str(path))
    try:
        return model.with_prompts(text_table(tensors))
    except ValueError as error:  # UserError among them
        raise UserError(f"{path}: {error}") from error
