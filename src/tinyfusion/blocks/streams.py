"""Streams: the arguments of a block that carry hidden states to the next block, and their order in its output.

A block of one stream maps x to x. A block of two streams, as in FLUX or Stable Diffusion 3, takes image and text tokens and
returns both, in the order of its class. All code that gates, skips, taps or replaces a block reads its `Streams`; arguments are
bound by the parameter names of `forward`, so models may call blocks by position or by keyword.

Shapes: B images along one axis of every tensor that is not shared by all images.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Streams:
    """The streams of a block class.

    names: parameters of `forward` that are streams; empty: its first parameter. returns: the streams in the order of the
    tuple that `forward` returns; empty: it returns the one stream as a tensor. A stream that is returned as None ends in that
    block. tapped: the stream for comparisons, the image's; None: the first of `names`. axes: {parameter: batch axis of its
    tensors}, None for tensors that all images share; the default is 0. Tensors inside of tuples, lists and dicts follow their
    parameter. Raises ValueError on a contradictory declaration.
    """

    names: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    tapped: str | None = None
    axes: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sorted(self.returns) != sorted(self.names) and (self.returns or len(self.names) > 1):
            raise ValueError(f"a block returns the streams it takes: takes {self.names}, returns {self.returns}")
        if self.tapped is not None and self.tapped not in self.names:
            raise ValueError(f"the tapped stream {self.tapped!r} is none of {self.names}")
        if shared := [name for name in self.names if self.axes.get(name, 0) is None]:
            raise ValueError(f"a stream has one state per image; {', '.join(shared)} cannot be shared")

    def call(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> BlockCall:
        """One call of `block`, its arguments by name. Raises TypeError if they do not fit its `forward`."""
        signature = _signature(type(block).forward)
        bound = signature.bind(block, *args, **kwargs)
        return BlockCall(self, bound, self.names or (list(signature.parameters)[1],))

    def split(self, output: Any) -> tuple[Tensor | None, ...]:
        """The streams in the output of a block, in the order of `names`. Raises TypeError on any other output."""
        if not self.returns:
            if not isinstance(output, Tensor):
                raise TypeError(f"the block returned a {type(output).__name__}; its declaration says one tensor")
            return (output,)
        if not isinstance(output, tuple | list) or len(output) != len(self.returns):
            raise TypeError(f"the block did not return the streams of its declaration, {', '.join(self.returns)}")
        by_name = dict(zip(self.returns, output, strict=True))
        return tuple(by_name[name] for name in self.names)

    def join(self, states: Sequence[Tensor | None]) -> Any:
        """The output of a block with these states, in the order of `names`."""
        if not self.returns:
            return states[0]
        by_name = dict(zip(self.names, states, strict=True))
        return tuple(by_name[name] for name in self.returns)

    def tap(self, output: Any) -> Tensor:
        """The tapped stream in the output of a block."""
        state = self.split(output)[self.names.index(self.tapped) if self.tapped is not None else 0]
        if state is None:
            raise ValueError(f"the stream {self.tapped or 'tapped'} ends in this block, which returns None for it")
        return state


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call of a block."""

    streams: Streams
    bound: inspect.BoundArguments  # the block itself is the first
    names: tuple[str, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.bound.args[1:]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.bound.kwargs

    @property
    def states(self) -> tuple[Tensor | None, ...]:
        return tuple(self.bound.arguments.get(name) for name in self.names)

    @property
    def tapped(self) -> Tensor:
        state = self.bound.arguments[self.streams.tapped or self.names[0]]
        assert isinstance(state, Tensor)
        return state

    @property
    def axes(self) -> tuple[int, ...]:
        """The batch axis of every stream."""
        return tuple(self.streams.axes.get(name, 0) or 0 for name in self.names)

    @property
    def num_images(self) -> int:
        return self.tapped.shape[self.streams.axes.get(self.streams.tapped or self.names[0], 0) or 0]

    def others(self) -> list[Tensor]:
        """Tensors among the arguments that are no streams."""
        return tensors_in([value for name, value in self._arguments.items() if name not in self.names])

    def of_each_image(self) -> list[Tensor]:
        """Tensors among the arguments that are not shared by all images, as tables of positions are."""
        return tensors_in(
            [value for name, value in self._arguments.items() if self.streams.axes.get(name, 0) is not None]
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BlockCall:
        """The call with `change` applied to every tensor among its arguments."""
        return self._changed({name: tree_map_only(Tensor, change, value) for name, value in self._arguments.items()})

    def of_images(self, rows: Tensor) -> BlockCall:
        """The call for the images `rows` alone. Raises ValueError on tensors with another number of images.

        Parameters, scalars and tensors of one row are shared by all images.
        """
        num = self.num_images
        changed = {}
        for name, value in self._arguments.items():
            if (axis := self.streams.axes.get(name, 0)) is not None:
                changed[name] = tree_map_only(Tensor, _rows_of(name, axis, rows, num), value)
        return self._changed(changed)

    @property
    def _arguments(self) -> dict[str, Any]:
        """Arguments by name, without the block itself."""
        return dict(list(self.bound.arguments.items())[1:])

    def _changed(self, values: Mapping[str, Any]) -> BlockCall:
        arguments = OrderedDict({**self.bound.arguments, **values})
        bound = inspect.BoundArguments(self.bound.signature, arguments)
        return BlockCall(self.streams, bound, self.names)


def _rows_of(name: str, axis: int, rows: Tensor, num: int) -> Callable[[Tensor], Tensor]:
    def pick(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) or tensor.ndim == 0 or tensor.shape[axis] == 1 != num:
            return tensor
        if tensor.shape[axis] != num:
            raise ValueError(
                f"the argument {name} of the block has {tensor.shape[axis]} rows along axis {axis} and the call {num} images: "
                "declare it as shared by all images (axis None), or name its axis"
            )
        return tensor.index_select(axis, rows)

    return pick


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in `value`, also inside of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def along(gate: Tensor, like: Tensor, axis: int) -> Tensor:
    """gate (B,) or (1,), shaped so that it multiplies the images of `like` along `axis`."""
    shape = [1] * like.ndim
    shape[axis] = len(gate)
    return gate.view(shape)


def mixed(gate: Tensor, output: Tensor | None, state: Tensor | None, axis: int = 0) -> Tensor | None:
    """`m * output + (1 - m) * state` per image, for any gate (B,), or (1,) for all images; None if the stream ends."""
    if output is None or state is None:
        return output
    m = along(gate, output, axis)
    return m * output + (1 - m) * state


@lru_cache(maxsize=256)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
