"""Tensors that may lie in parts on several processes (torch's DTensor, split by rows), seen as what this process holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other rows of it."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The rows that this process holds, sharing memory with `tensor`; all of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_part(part: Tensor, like: Tensor) -> Tensor:
    """The tensor whose rows on this process are `part`, lying on the processes as `like` does; a plain one is `part`."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def first_row(tensor: Tensor) -> int:
    """Number of the first row that this process holds; 0 of a plain tensor.

    Rows are split evenly, the last processes may have less. Raises ValueError on another way of lying in parts.
    """
    if not isinstance(tensor, DTensor):
        return 0
    if tensor.device_mesh.ndim != 1 or tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"only tensors split by rows over one list of processes are known; got {tensor.placements}")
    rows_each = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(rows_each * tensor.device_mesh.get_local_rank(), tensor.shape[0])


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All rows, gathered from all processes (each must call); a plain tensor as it is. Detached."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
