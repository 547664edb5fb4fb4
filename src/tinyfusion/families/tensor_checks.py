"""Checks of tensors from files against a model: sizes, names, shapes, types and finite values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory


def check_sizes(sizes: Mapping[str, Any], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError on sizes of a configuration that go beyond its tensors: before anything of those sizes is built.

    sizes: by field; numbers of layers have "layers" or "depth" in their names, and lists of sizes count as many. The side of
    the images is compared elsewhere, as tensors need not say it.
    """
    longest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    for name, value in sizes.items():
        limit = len(tensors) if "layers" in name or "depth" in name else longest
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > len(tensors):
            raise UserError(f"{what} has {len(values)} {name}, and its weights are {len(tensors)} tensors")
        beyond = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and not v <= limit]
        if beyond and name not in ("input_size", "sample_size", "image_size"):
            raise UserError(f"{what} has {name} {beyond[0]}, which is beyond its weights")


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError unless `tensors` are floats with exactly the names and shapes of `wanted`.

    The message begins with `what` and lists the first few faults.
    """
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults += [f"{name} is {_kind(tensor)}, wanted floats" for name, tensor in tensors.items() if not _is_plain(tensor)]
    _raise_faults(faults, what)


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if values are infinite, NaN or missing. The message: `what`, and the first few names."""
    odd = [
        f"{name} is {_kind(t)}, wanted numbers" for name, t in tensors.items() if t.layout != torch.strided or t.is_meta
    ]
    _raise_faults(odd, what)
    _raise_faults([f"{name} is not finite" for name, t in tensors.items() if not bool(torch.isfinite(t).all())], what)


def _raise_faults(faults: list[str], what: str) -> None:
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(f"{what}: {'; '.join(faults[:3])}{more}")


def in_float32(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Copies in float32 of exactly the tensors of `wanted`, in its order. Raises UserError on faults of names, shapes and values."""
    check_tensors(tensors, wanted, what)
    check_memory(4 * sum(tensor.numel() for tensor in wanted.values()), f"{what.partition(' does')[0]} in float32")
    copies = {name: tensors[name].detach().to(torch.float32, copy=True).contiguous() for name in wanted}
    check_finite(copies, what)
    return copies


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point numbers that are there, one by one: no integers, complex numbers, sparse, quantised or meta tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" ({tensor.layout})".replace("torch.", "")
    return f"{tensor.dtype}{layout}{' without values' if tensor.is_meta else ''}".removeprefix("torch.")
