"""Training batches of recorded calls: the rows of several calls together, where their shapes and shared arguments are equal.

Which arguments have a row per image follows from the number of rows that a call returned: tensors and lists of that length do,
also within dicts, and everything else is shared; what a class has otherwise is its `RowLayout`. `jobs/recorded_training.py` runs
calls whole, their rows alone and rows of several calls together to check that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.buckets import BucketOrder
from tinyfusion.data.prompts import widened
from tinyfusion.data.recorded import Call, Outputs, RecordedInputs, digest_of

Path = tuple[str, ...]  # of an argument, through dicts


@dataclass(frozen=True)
class RowLayout:
    """How the arguments of a class hold its images, where length does not say it.

    axes: the axis of images of a tensor. texts: arguments (images, tokens, ...) that may be lengthened by zeros to one length, with
    the argument of their mask, which then says which tokens are real; None where another argument says it.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str | None] = field(default_factory=dict)


PLAIN = RowLayout()


@dataclass(frozen=True)
class RecordedBatch:
    """Calls as one batch. rows: arguments with a row per image, along axis 0 here; shared: the others; both by their path.

    outputs: what the recorded model returned.
    """

    rows: Mapping[Path, Any]
    shared: Mapping[Path, Any]
    outputs: Outputs
    step: int = 0
    gate_noise: tuple[Tensor, ...] = ()
    layout: RowLayout = PLAIN

    def __len__(self) -> int:
        return len(self.outputs[0])

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.outputs[0].device

    @property
    def call(self) -> Call:
        """The arguments of the model, by name."""
        call: Call = {}
        for path, value in {**self.shared, **self.rows}.items():
            inside = call
            for name in path[:-1]:
                inside = inside.setdefault(name, {})
            axis = self.layout.axes.get(path[0], 0) if path in self.rows else 0
            inside[path[-1]] = value.movedim(0, axis) if axis else value
        return call

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

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with `change` applied to every tensor of the call."""
        rows, shared = tree_map_only(Tensor, change, (self.rows, self.shared))
        return dataclasses.replace(self, rows=rows, shared=shared)

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        outputs = tuple(tensor.to(device) for tensor in self.outputs)
        return dataclasses.replace(self.changed(lambda tensor: tensor.to(device)), outputs=outputs)


def joined(batches: Sequence[RecordedBatch]) -> RecordedBatch:
    """Batches of one signature, one after another; texts that a layout names are lengthened to the longest."""
    batches = _lengthened(batches)
    first = batches[0]

    def together(name: Path) -> Any:
        values = [each.rows[name] for each in batches]
        return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]

    outputs = tuple(torch.cat(tensors) for tensors in zip(*(each.outputs for each in batches), strict=True))
    return dataclasses.replace(first, rows={name: together(name) for name in first.rows}, outputs=outputs)


def _lengthened(batches: Sequence[RecordedBatch]) -> Sequence[RecordedBatch]:
    """Batches whose texts have one length each: those of the longest, zeros after their own, and masks that say so."""
    for name, mask in batches[0].layout.texts.items():
        texts = [each.rows[name,] for each in batches if (name,) in each.rows]
        masks = [each.rows.get((mask,)) for each in batches] if mask is not None else []
        kinds = {each.dtype for each in masks if each is not None}
        if len({text.shape[1] for text in texts}) > 1 or (kinds and None in masks):
            length, kind = max(text.shape[1] for text in texts), next(iter(kinds), torch.bool)
            batches = [_padded(each, name, mask, length, kind) for each in batches]
    return batches


def _padded(batch: RecordedBatch, name: str, mask: str | None, length: int, kind: torch.dtype) -> RecordedBatch:
    text = batch.rows[name,]
    rows, shared = {**batch.rows, (name,): widened(text, length)}, dict(batch.shared)
    if mask is not None:
        known = rows.get((mask,))
        if known is None:  # all tokens are real
            known = text.new_ones(text.shape[:2], dtype=kind)
        rows[mask,] = widened(known, length)
        shared.pop((mask,), None)
    return dataclasses.replace(batch, rows=rows, shared=shared)


class RecordedBatches:
    """Source of (step, batch size, draws) -> `RecordedBatch`: single rows of recorded calls in exactly shuffled order.

    Rows of equal shapes and equal shared arguments are a bucket, and every batch is from one bucket. Only places of rows are in
    memory: calls are read when their step comes. dtype: of the tensors that had the type of the model. most_rows: of a call.
    one_by_one: whether rows are never run together. Raises UserError on a file without outputs.
    """

    one_by_one = False

    def __init__(
        self,
        inputs: RecordedInputs,
        dtype: torch.dtype,
        randomness: Randomness,
        device: torch.device,
        layout: RowLayout = PLAIN,
    ) -> None:
        if inputs.outputs is None:
            raise UserError(
                f"{inputs.path} has no outputs of the model, which training learns from: record it again with this version"
            )
        groups: dict[str, list[tuple[int, int]]] = {}
        self.most_rows = 1
        with progress("inputs", len(inputs.calls), "calls") as bar:
            for first, calls, outputs in inputs.chunks():
                digests: dict[int, str] = {}  # of tensors of this chunk, by identity
                for number, (call, of_call) in enumerate(zip(calls, outputs or (), strict=True), first):
                    self.most_rows = max(self.most_rows, len(of_call[0]))
                    for image in range(len(of_call[0])):
                        row = _row_of(call, of_call, image, layout)
                        groups.setdefault(_signature(row, digests), []).append((number, image))
                bar(first + len(calls))
        self.buckets = [np.array(places) for places in sorted(groups.values(), key=len, reverse=True)]
        self.inputs, self.dtype, self.layout = inputs, dtype, layout
        self.order = BucketOrder(np.array([len(bucket) for bucket in self.buckets], np.int64), randomness)
        self.randomness, self.device = randomness, device

    def __len__(self) -> int:
        return int(self.order.nums.sum())

    def row(self, bucket: int, place: int, dtype: torch.dtype | None = None) -> RecordedBatch:
        """A row of a bucket, on the CPU. dtype: instead of that of the source."""
        number, image = (int(value) for value in self.buckets[bucket][place])
        outputs = self.inputs.outputs
        assert outputs is not None
        row = _row_of(self.inputs.calls[number], outputs[number], image, self.layout)
        wanted = dtype or self.dtype
        return row.changed(lambda tensor: self.inputs.of_type(tensor, wanted))

    def rows(self, first: int, num: int) -> RecordedBatch:
        """Rows of the largest bucket, as recorded; it is repeated where it has fewer."""
        size = len(self.buckets[0])
        return joined([self.row(0, (first + i) % size) for i in range(num)]).to(self.device)

    def __call__(self, step: int, batch_size: int, draws: Draws) -> RecordedBatch:
        """The rows of `step`."""
        bucket, number = self.order.bucket_of(step, batch_size)
        size, first = len(self.buckets[bucket]), number * batch_size + draws.first
        places = range(first, first + draws.num)
        orders = {
            epoch: self.randomness.permutation(f"recorded/{bucket}", epoch, size)
            for epoch in {p // size for p in places}
        }
        return joined([self.row(bucket, int(orders[p // size][p % size])) for p in places]).to(self.device)


def _leaves(call: Mapping[str, Any], above: Path = ()) -> dict[Path, Any]:
    """The arguments by their path, those within dicts too."""
    leaves: dict[Path, Any] = {}
    for name, value in call.items():
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, (*above, name))
        else:
            leaves[*above, name] = value
    return leaves


def _row_of(call: Call, outputs: Outputs, image: int, layout: RowLayout) -> RecordedBatch:
    """One image of a call."""
    num = len(outputs[0])
    rows: dict[Path, Any] = {}
    shared: dict[Path, Any] = {}
    for path, value in _leaves(call).items():
        axis = layout.axes.get(path[0], 0)
        if isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == num:
            rows[path] = (value.movedim(axis, 0) if axis else value)[image : image + 1]
        elif isinstance(value, list) and len(value) == num:
            rows[path] = value[image : image + 1]
        else:
            shared[path] = value
    return RecordedBatch(rows, shared, tuple(t[image : image + 1] for t in outputs), layout=layout)


def _signature(row: RecordedBatch, digests: dict[int, str]) -> str:
    """What rows of one batch have in common: shapes and types per image, and values of what is shared."""
    texts = {(name,) for name in row.layout.texts}
    masks = {(name,) for name in row.layout.texts.values() if name is not None}

    def of(value: Any, shared: bool, free: int | None = None) -> str:
        if isinstance(value, Tensor):
            shape = [size for axis, size in enumerate(value.shape) if axis != free]
            form = f"{value.dtype}{shape}"
            return f"{form}{_digest(value, digests)}" if shared else form
        if isinstance(value, list | tuple):
            return "[" + ",".join(of(item, shared, free) for item in value) + "]"
        return repr(value)

    parts = []
    for path, value in sorted({**row.rows, **row.shared}.items()):
        if path in masks:
            continue  # goes with its text
        shared = path in row.shared
        # texts of any length: those that a layout lengthens, and matrices (tokens, channels) in lists of images
        lists = isinstance(value, list) and all(isinstance(each, Tensor) and each.ndim == 2 for each in value)
        free = None if shared else 1 if path in texts else 0 if lists else None
        parts.append(f"{'.'.join(path)}={of(value, shared, free)}")
    text = ";".join([*parts, *(str(tuple(t.shape)) for t in row.outputs)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(tensor: Tensor, digests: dict[int, str]) -> str:
    """A hash of its values; digests: of tensors that live as long, by identity."""
    if id(tensor) not in digests:
        digests[id(tensor)] = digest_of(tensor)
    return digests[id(tensor)]
