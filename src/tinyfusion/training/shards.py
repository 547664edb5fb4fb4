"""Local rows of tensors that may be sharded over ranks (torch's DTensor, split by rows)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks have different rows of the tensor."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The rows of `tensor` on this rank, in shared memory with it; all rows of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_part(part: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded like `like`, with the rows `part` on this rank; `part` itself if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def first_row(tensor: Tensor) -> int:
    """Index of the first row on this rank; 0 of a plain tensor.

    Rows are split evenly; the last ranks may have fewer. Raises ValueError on any other sharding.
    """
    if not isinstance(tensor, DTensor):
        return 0
    if tensor.device_mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        raise ValueError(
            f"only tensors sharded by rows over a one-dimensional mesh are supported; got {tensor.placements}"
        )
    rows_each = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(rows_each * tensor.device_mesh.get_local_rank(), tensor.shape[0])


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows of `tensor`, detached; gathered from all ranks if it is sharded, and then all ranks must call this."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
