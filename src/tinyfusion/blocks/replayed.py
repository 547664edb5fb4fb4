"""Run a model repeatedly on the same inputs, each time without other blocks, and compute only what changes.

Up to the first block, in order of execution, that only one of two consecutive runs has, every block gets the same inputs, so its
cached output is used. This holds for any model: code between the blocks runs each time, lists may be called in any order, and
nothing is approximated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any, Self, TypeVar

from torch import nn

from tinyfusion.blocks.forwards import Forward, standing_in
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams, tensors_in

T = TypeVar("T")
_Key = tuple[int, int]  # global index of a block, number of its call within a run


class BlockReplay:
    """A context in which `run` calls a model on one and the same inputs with some of its blocks.

    A block that is left out passes its streams on. num_bytes: of outputs that are retained at most; those of the first blocks
    are. Runs whose left-out blocks come late, and differ late from those of the run before, therefore cost little.
    """

    def __init__(self, stack: BlockStack, num_bytes: int) -> None:
        self.stack = stack
        self.free_bytes = num_bytes
        self._retained: dict[_Key, tuple[Any, list[int]]] = {}  # outputs, and how often each tensor was written to
        self._kept: Collection[int] = ()  # blocks of this run
        self._former: Collection[int] | None = None  # blocks of the run before; None: there was none that ended
        self._ended: Collection[int] | None = None  # blocks of the last run that ended
        self._same = False  # whether this run equals the previous one so far
        self._calls: Counter[int] = Counter()
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        for index, (block, streams) in enumerate(zip(self.stack, self.stack.streams(), strict=True)):
            forward = partial(self._call, index, block, streams, block.forward)
            self._undo.enter_context(standing_in(block, forward))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def run(self, kept: Collection[int], model: Callable[[], T]) -> T:
        """The result of `model()` with only the blocks `kept`, by global index. Call without gradients."""
        self._kept, self._former, self._ended = kept, self._ended, None
        self._same = self._former is not None
        self._calls.clear()
        output = model()
        self._ended = kept
        return output

    def _call(self, index: int, block: nn.Module, streams: Streams, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        key = index, self._calls[index]
        self._calls[index] += 1
        self._same = self._same and (index in self._kept) == (index in (self._former or ()))
        if index not in self._kept:
            return streams.join(streams.call(block, args, kwargs).states)
        if self._same and key in self._retained:
            output, versions = self._retained[key]
            if versions == _versions(output):  # no model code has written into it since
                return output
        output = forward(*args, **kwargs)
        self._retain(key, output)
        return output

    def _retain(self, key: _Key, output: Any) -> None:
        former = self._retained.pop(key, None)
        self.free_bytes += _num_bytes(former[0]) if former else 0
        if (size := _num_bytes(output)) <= self.free_bytes:
            self._retained[key] = output, _versions(output)
            self.free_bytes -= size


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in tensors_in(output)]


def _num_bytes(output: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(output))
