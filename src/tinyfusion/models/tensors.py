"""Tensors from files: safetensors and torch files, whole or in shards, strictly and without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json
from tinyfusion.models.attach import build_with_routers
from tinyfusion.models.family import ModelFamily
from tinyfusion.models.loaded import make_trainable
from tinyfusion.models.routers import DynamicSettings

_WRAPPER = "module."
_NO_MODEL = "is not a model file, or it is truncated: wanted a torch file or .safetensors with a state dict"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file (truncated or foreign): {error}") from error


def read_pickle(path: Path) -> Any:
    """A torch file, without running code from it: only tensors, plain containers and argparse.Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own advice is to run the code; ours is not
        what = f"holds code or foreign objects ({found[1]}), which are never run" if found else _NO_MODEL
        raise UserError(f"{path} {what}") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError, TypeError, struct.error,
            zipfile.BadZipFile, UnicodeDecodeError, ImportError, OverflowError, AssertionError) as error:  # fmt: skip
        raise UserError(f"{path} {_NO_MODEL}") from error


def state_dict_in(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a flat state dict, or of a training checkpoint ("ema" or "model_ema", else "model"; that for raw weights).

    The `module.` that a wrapper for several processes puts before every name goes.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    for key in ("ema", "model_ema", "model") if weights == "ema" else ("model", "ema", "model_ema"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors or len(tensors) != len(content):
        odd = next((str(k) for k, v in content.items() if not isinstance(v, Tensor)), "nothing")
        raise UserError(f"{path} is no state dict of tensors (it holds {odd!r})")
    if all(name.startswith(_WRAPPER) for name in tensors):
        return {name.removeprefix(_WRAPPER): tensor for name, tensor in tensors.items()}
    return tensors


def read_shards(index: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """The tensors of all files that an index names (`{"weight_map": {tensor: file}}`), each read with `read`.

    Raises UserError where a file is missing or does not hold what the index says.
    """
    listed = read_json(index)
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} is damaged: wanted a weight_map of tensors to files")
    if odd := next((name for name in files.values() if Path(name).name != name), None):
        raise UserError(f"{index} names {odd!r}, which is no file beside it")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if not (index.parent / name).is_file():
            raise UserError(
                f"{index.parent / name} does not exist, and {index.name} names it: the folder is incomplete"
            )
        found = state_dict_in(read(index.parent / name), "raw", index.parent / name)
        wrong = sorted({key for key, file in files.items() if file == name} ^ set(found))
        if wrong:
            raise UserError(f"{index.parent / name} and {index.name} disagree about {wrong[0]}")
        tensors |= found
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError, `what` and the first few faults, unless `tensors` are floats of exactly these names and shapes."""
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults += [f"{name} is {_kind(tensor)}, wanted floats" for name, tensor in tensors.items() if not _is_plain(tensor)]
    _raise_faults(faults, what)


def _raise_faults(faults: list[str], what: str) -> None:
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(f"{what}: {'; '.join(faults[:3])}{more}")


def filled(
    family: ModelFamily, arch: Any, tensors: Mapping[str, Tensor], path: Path, routers: DynamicSettings | None = None
) -> nn.Module:
    """A module with exactly these values, float32 and in memory of its own, in eval mode; the first few faults are named."""
    with torch.device("meta"):
        module = build_with_routers(family, arch, routers)
    wanted, what = module.state_dict(), f"{path} does not hold this {family.name}"
    check_tensors(tensors, wanted, what)
    held = {name: tensors[name].detach().to(torch.float32, copy=True).contiguous() for name in wanted}
    _raise_faults(
        [f"{name} is not finite" for name, tensor in held.items() if not bool(torch.isfinite(tensor).all())], what
    )
    module.load_state_dict(held, assign=True)
    return make_trainable(module, family).eval()


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point numbers that are there, one by one: no integers, complex numbers, sparse, quantised or meta tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" ({tensor.layout})".replace("torch.", "")
    return f"{tensor.dtype}{layout}{' without values' if tensor.is_meta else ''}".removeprefix("torch.")
