"""What the sizes of several families share: their ranges, the depth in a state dict, and the sine-cosine position table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.core.reading import check_memory

_TABLE_BYTES = 24  # that a value of the position table takes while it is computed
# far beyond what can be run; of the grid: patches along a side
LARGEST_SIZE, LARGEST_DEPTH, LARGEST_GRID = 2**20, 2**12, 2**9


def check_ranges(arch: Any, *names: str) -> None:
    """ValueError on sizes of an arch that no model has, and on a side that is no whole number of patches. None is not checked.

    What is built of sizes in these ranges, without values, takes no time and no memory to speak of.
    """
    for name in names:
        value, largest = getattr(arch, name), LARGEST_DEPTH if "depth" in name else LARGEST_SIZE
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
        if value is not None and value > largest:
            raise ValueError(f"{name} must be at most {largest}; got {value}")
    grid, rest = divmod(arch.input_size, arch.patch_size)
    if rest:
        raise ValueError(f"input_size {arch.input_size} is not a multiple of patch_size {arch.patch_size}")
    if grid > LARGEST_GRID:
        raise ValueError(
            f"input_size {arch.input_size} has {grid} patches along a side; at most {LARGEST_GRID} can be run"
        )


def list_length(tensors: Mapping[str, Tensor], name: str) -> int:
    """Modules of the list `name` in a state dict. Raises ValueError where their numbers have gaps."""
    inside = {key.removeprefix(f"{name}.").split(".")[0] for key in tensors if key.startswith(f"{name}.")}
    numbers = {int(number) for number in inside if number.isdecimal() and len(number) < 20}
    if numbers != set(range(len(numbers))):
        missing = list(itertools.islice((i for i in itertools.count() if i not in numbers), 4))
        last = max(numbers)
        raise ValueError(
            f"{name.removesuffix('s')} numbers have gaps: {[i for i in missing if i < last]} missing of 0 to {last}"
        )
    return len(numbers)


def position_table(width: int, grid: int, scale: float = 1.0) -> Tensor:
    """(1, T, D) float32 sine-cosine table; token (r, c) has [E(c) | E(r)], E(v) = [sin(v w) | cos(v w)], float64 inside.

    scale: by which r and c are divided; 1 in most models.
    """
    check_memory(_TABLE_BYTES * width * grid * grid, f"a position table of {grid} x {grid} places")
    quarter = width // 4
    frequencies = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    rows, columns = (places / scale for places in np.divmod(np.arange(grid * grid), grid))

    def embed(positions: np.ndarray) -> np.ndarray:
        angles = positions[:, None] * frequencies[None, :]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    table = np.concatenate([embed(columns), embed(rows)], axis=1)
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)
