"""Local rows of tensors that may be sharded over ranks (torch's DTensor, split by rows)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _is_a(kind: type, module: str, name: str) -> bool:
    """Whether a class is a class of torch or below it, without importing its module, which takes a second: before that, none is."""
    known = getattr(sys.modules.get(module), name, None)
    return known is not None and issubclass(kind, known)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks have different rows of the tensor."""
    return _is_a(type(tensor), "torch.distributed.tensor", "DTensor")


def unsplit_class(kind: type) -> type:
    """The class of a module, without what FSDP2 made of it."""
    return next(each for each in kind.__mro__ if not _is_a(each, "torch.distributed.fsdp", "FSDPModule"))


def local_part(tensor: Tensor) -> Tensor:
    """The rows of `tensor` on this rank, in shared memory with it; all rows of a plain tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like `like`, with the rows `part` on this rank; `part` itself if `like` is not sharded."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def first_row(tensor: Tensor) -> int:
    """Index of the first row on this rank; 0 of a plain tensor.

    Rows are split evenly; the last ranks may have fewer. Raises ValueError on any other sharding.
    """
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor import Shard

    if tensor.device_mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        raise ValueError(
            f"only tensors sharded by rows over a one-dimensional mesh are supported; got {tensor.placements}"
        )
    rows_each = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(rows_each * tensor.device_mesh.get_local_rank(), tensor.shape[0])


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows of `tensor`, detached; gathered from all ranks if it is sharded, and then all ranks must call this."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor.detach()
