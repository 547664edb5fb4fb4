"""What stands in for the `forward` of a block: the same values, computed again in the backward pass, or compiled.

Both are put on from outside, for a while, on the block object alone; model files know nothing of them. What gates a block
(`blocks/skip.py`) stands before it and calls it for parts of a batch, so the two compose in any order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from tinyfusion.core.compiler import compiling
from tinyfusion.core.errors import UserError

RECOMPILE_LIMIT = 64  # variants of one block: with and without a graph, one image or several, per structure
Forward = Callable[..., Any]


class CompiledForwards:
    """The compiled forms of functions, such as the `forward` of blocks: one compilation for all blocks of a kind.

    Functions are copied first: torch keeps what it compiled with the code of a function, and so it is let go with this
    object and not shared with other models of the process.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._found: dict[tuple[Any, bool], Forward] = {}

    def of(self, function: Any, recomputed: bool) -> Forward:
        """`function` compiled as one graph; `recomputed`: what is inside of `function(block, x, ...)` is not kept for the backward pass."""
        key = function, recomputed
        if key not in self._found:
            whole = _recomputing(function) if recomputed else _copied(function)
            self._found[key] = torch.compile(whole, fullgraph=True, backend=self.backend)
        return self._found[key]


def _copied(function: Any) -> FunctionType:
    """The same function with a code object of its own."""
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _recomputing(function: Any) -> FunctionType:
    """`function(block, x, ...)` under a checkpoint. Inside of what is compiled: the compiler then plans what runs again.

    Around it, a call and its repetition could meet two variants (one batch size, any) that save different tensors.
    """

    def whole(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def part(*args: Any, **kwargs: Any) -> Any:
            return function(block, *args, **kwargs)

        return _checkpointed(part, *args, **kwargs)

    return _copied(whole)


def _checkpointed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """`forward`, of which only the arguments are kept. Models draw nothing, so there is no generator to put back."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@dataclass(frozen=True)
class BlockForward:
    """What stands in for the `forward` of a block: `plain`, its own bound method, recomputed or compiled."""

    name: str
    block: nn.Module
    plain: Any
    recomputed: bool = False
    compiled: CompiledForwards | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the block returns. Raises UserError where it cannot be compiled."""
        recomputed = self.recomputed and torch.is_grad_enabled()
        if self.compiled is None:
            return _checkpointed(self.plain, *args, **kwargs) if recomputed else self.plain(*args, **kwargs)
        with compiling(f"block {self.name}"):
            laid = tree_map_only(Tensor, _plainly_laid, (args, kwargs))
            return self.compiled.of(self.plain.__func__, recomputed)(self.block, *laid[0], **laid[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module has blocks that run as they are written."""
        return copy.deepcopy(self.plain, memo)


def _plainly_laid(value: Tensor) -> Tensor:
    """`value` in the only form that is compiled for: contiguous, and without a graph where none is recorded.

    Other strides and flags would each be compiled anew. And inductor's CPU code of torch 2.13 gives wrong gradients for a
    stream that lies channel by channel, as patches come out of a convolution.
    """
    return value.contiguous() if torch.is_grad_enabled() else value.detach().contiguous()


def changed(current: Any, name: str, block: nn.Module, **fields: Any) -> Any:
    """`current`, the `forward` of `block`, with `fields` of its `BlockForward` changed. What gates the block stays around it.

    Raises UserError where what should be compiled is no method of the block.
    """
    inner = getattr(current, "forward", None)
    if inner is not None and not isinstance(current, BlockForward):
        return replace(current, forward=changed(inner, name, block, **fields))
    if not isinstance(current, BlockForward):
        if "compiled" in fields and getattr(current, "__func__", None) is None:
            raise UserError(
                f"--compile: the forward of block {name} was replaced by {current!r}, which is no method of it"
            )
        current = BlockForward(name, block, current)
    return replace(current, **fields)


@contextmanager
def standing_in(block: nn.Module, forward: Forward) -> Iterator[None]:
    """Within the context `forward` is called where the one of `block` was. Contexts nest, and undo in reverse order."""
    attributes = vars(block)  # past nn.Module's own setter; instances win over their class
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


__all__ = ["RECOMPILE_LIMIT", "BlockForward", "CompiledForwards", "changed", "standing_in"]
