"""Sequences whose values are read on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """A sequence of `num` values that `get` makes on access."""

    def __init__(self, num: int, get: Callable[[int], T]) -> None:
        self.num, self.get = num, get

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.get(i) for i in range(self.num)[index]]
        return self.get(range(self.num)[index])
