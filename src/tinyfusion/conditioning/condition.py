"""Condition: what a batch of images is conditioned on, as named tensors with one row per image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws

# condition of a batch -> keyword arguments of a model; what a family declares
ModelInputs = Callable[["Condition"], Mapping[str, Any]]
# (model, x, time as the network takes it, condition) -> output
ModelCall = Callable[[nn.Module, Tensor, Tensor, "Condition"], Tensor]


@dataclass(frozen=True, eq=False)
class Condition:
    """Named tensors (B, ...) with one row per image, and the null row, which means no condition.

    A table with one row per label is a condition too: `index(labels)` gives the condition of a batch.
    null_row: {name of every tensor: (1, ...)}; None: no condition can be dropped, and guidance is impossible.
    """

    tensors: Mapping[str, Tensor]
    null_row: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        sizes = {len(tensor) for tensor in self.tensors.values()}
        if len(sizes) != 1:
            raise ValueError(f"a condition has tensors of one number of rows; got {sorted(sizes)}")
        wanted = {name: (1, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        if self.null_row is not None and wanted != {name: tuple(row.shape) for name, row in self.null_row.items()}:
            raise ValueError("the null row of a condition has one row of every tensor, in its shape")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(iter(self.tensors.values())).device

    def each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with `change` applied to every tensor; the null row stays."""
        return dataclasses.replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})

    def index(self, rows: Tensor | slice) -> Condition:
        """The condition of these rows."""
        return self.each(lambda tensor: tensor[rows])

    def null(self) -> Condition:
        """The unconditional counterpart: the null row, repeated for every row. Raises UserError if there is none."""
        return self.each_with_null(lambda tensor, null: null.expand_as(tensor))

    def drop(self, draws: Draws, share: float, purpose: str = "label_drop") -> Condition:
        """The condition with the null row in place of each row with probability `share`. UserError if there is none."""
        if not share:
            return self
        dropped = torch.from_numpy(draws.uniform(purpose) < share).to(self.device)
        return self.each_with_null(
            lambda tensor, null: torch.where(dropped.view(-1, *[1] * (tensor.ndim - 1)), null, tensor)
        )

    def each_with_null(self, change: Callable[[Tensor, Tensor], Tensor]) -> Condition:
        """The condition with `change` applied to every tensor and its null row. Raises UserError where there is none."""
        if self.null_row is None:
            advice = "give one, or use guidance 1 and label_drop 0"
            raise UserError(f"the condition has no null row, which guidance and dropped labels need: {advice}")
        null = self.null_row
        return dataclasses.replace(self, tensors={n: change(tensor, null[n]) for n, tensor in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The condition, null row included, on a device and with its floating-point tensors in `dtype`; None changes nothing."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in tensors.items()}

        return Condition(moved(self.tensors), None if self.null_row is None else moved(self.null_row))


@dataclass(frozen=True)
class _Calling:
    """A call that equals every other with the same `inputs`, as objectives are compared by their fields."""

    inputs: ModelInputs

    def __call__(self, model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = model(x, t, **self.inputs(condition))
        return output


def calling(inputs: ModelInputs) -> ModelCall:
    """The call of a model that takes x and t by position, and what `inputs` makes of the condition by name."""
    return _Calling(inputs)


def concat(conditions: list[Condition]) -> Condition:
    """The rows of several conditions of one kind, one after another; the null row is that of the first."""
    first = conditions[0]
    if any(set(other.tensors) != set(first.tensors) for other in conditions):
        raise ValueError(f"wanted conditions of one kind; got {[sorted(each.tensors) for each in conditions]}")
    tensors = {name: torch.cat([each.tensors[name] for each in conditions]) for name in first.tensors}
    return dataclasses.replace(first, tensors=tensors)
