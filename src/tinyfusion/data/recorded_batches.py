"""Training batches of recorded calls: the rows of several calls together, where their shapes and shared arguments are equal.

Which arguments have a row per image follows from the number of rows that a call returned: tensors and lists of that length do,
everything else is shared. `jobs/recorded_training.py` runs two calls together and alone to check that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.buckets import BucketOrder
from tinyfusion.data.recorded import Call, RecordedInputs, changed


@dataclass(frozen=True)
class RecordedBatch:
    """Calls as one batch. rows: arguments with a row per image; shared: the others; outputs: what the recorded model returned."""

    rows: Mapping[str, Any]
    shared: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    step: int = 0
    gate_noise: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.outputs[0])

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.outputs[0].device

    @property
    def call(self) -> Call:
        """The arguments of the model, by name."""
        return {**self.shared, **self.rows}

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with `change`, such as a selection of images, applied to what has a row per image."""

        def rowwise(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            chosen = change(torch.arange(len(value), device=self.device))  # a list with one entry per image
            return [value[int(i)] for i in chosen]

        return dataclasses.replace(
            self,
            rows={name: rowwise(value) for name, value in self.rows.items()},
            outputs=tuple(map(change, self.outputs)),
            gate_noise=tuple(map(change, self.gate_noise)),
        )

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""

        def moved(value: Any) -> Any:
            return changed(value, lambda tensor: tensor.to(device))

        outputs = tuple(tensor.to(device) for tensor in self.outputs)
        return dataclasses.replace(self, rows=moved(self.rows), shared=moved(self.shared), outputs=outputs)


def joined(batches: Sequence[RecordedBatch]) -> RecordedBatch:
    """Batches of one signature, one after another."""
    first = batches[0]

    def together(name: str) -> Any:
        values = [each.rows[name] for each in batches]
        return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]

    outputs = tuple(torch.cat(tensors) for tensors in zip(*(each.outputs for each in batches), strict=True))
    return dataclasses.replace(first, rows={name: together(name) for name in first.rows}, outputs=outputs)


class RecordedBatches:
    """Source of (step, batch size, draws) -> `RecordedBatch`: single rows of recorded calls in exactly shuffled order.

    Rows of equal shapes and equal shared arguments are a bucket, and every batch is from one bucket. Raises UserError on a file
    without outputs.
    """

    def __init__(
        self, inputs: RecordedInputs, dtype: torch.dtype, randomness: Randomness, device: torch.device
    ) -> None:
        if inputs.outputs is None:
            raise UserError(
                f"{inputs.path} has no outputs of the model, which training learns from: record it again with this version"
            )
        digests: dict[int, str] = {}
        groups: dict[str, list[RecordedBatch]] = {}
        for call, outputs in zip(inputs.for_dtype(dtype), inputs.outputs, strict=True):
            for row in _rows_of(call, outputs):
                groups.setdefault(_signature(row, digests), []).append(row)
        self.buckets = sorted(groups.values(), key=len, reverse=True)
        nums = np.array([len(bucket) for bucket in self.buckets], np.int64)
        self.order = BucketOrder(nums, randomness)
        self.randomness, self.device = randomness, device

    def __len__(self) -> int:
        return int(self.order.nums.sum())

    def rows(self, first: int, num: int) -> RecordedBatch:
        """Rows of the largest bucket, as recorded; it is repeated where it has fewer."""
        bucket = self.buckets[0]
        return joined([bucket[(first + i) % len(bucket)] for i in range(num)]).to(self.device)

    def __call__(self, step: int, batch_size: int, draws: Draws) -> RecordedBatch:
        """The rows of `step`."""
        bucket, number = self.order.bucket_of(step, batch_size)
        size, first = len(self.buckets[bucket]), number * batch_size + draws.first
        places = range(first, first + draws.num)
        orders = {
            epoch: self.randomness.permutation(f"recorded/{bucket}", epoch, size)
            for epoch in {p // size for p in places}
        }
        return joined([self.buckets[bucket][int(orders[p // size][p % size])] for p in places]).to(self.device)


def _rows_of(call: Call, outputs: tuple[Tensor, ...]) -> list[RecordedBatch]:
    """The images of a call, one each."""
    num = len(outputs[0])

    def per_image(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.ndim > 0 and len(value) == num
        return isinstance(value, list) and len(value) == num

    rowwise = {name: value for name, value in call.items() if per_image(value)}
    shared = {name: value for name, value in call.items() if name not in rowwise}
    return [
        RecordedBatch(
            {name: value[i : i + 1] for name, value in rowwise.items()}, shared, tuple(t[i : i + 1] for t in outputs)
        )
        for i in range(num)
    ]


def _signature(row: RecordedBatch, digests: dict[int, str]) -> str:
    """What rows of one batch have in common: shapes and types per image, and values of what is shared."""

    def of(value: Any, shared: bool) -> str:
        if isinstance(value, Tensor):
            form = f"{value.dtype}{tuple(value.shape)}"
            return f"{form}{_digest(value, digests)}" if shared else form
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{of(item, shared)}" for key, item in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(of(item, shared) for item in value) + "]"
        return repr(value) if shared else type(value).__name__

    parts = [f"{name}={of(value, False)}" for name, value in sorted(row.rows.items())]
    parts += [f"{name}={of(value, True)}" for name, value in sorted(row.shared.items())]
    return ";".join([*parts, *(str(tuple(t.shape)) for t in row.outputs)])


def _digest(tensor: Tensor, digests: dict[int, str]) -> str:
    """A hash of its values; digests: of tensors that live as long, by identity."""
    key = id(tensor)
    if key not in digests:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digests[key] = hashlib.sha256(content.data).hexdigest()[:16]
    return digests[key]
