"""Replacements for the `forward` of a block that recompute it in the backward pass, or compile it: the same values.

They are set on the block object for the time of a context. The replacement that gates a block (`blocks/skip.py`) calls them
for some images of a batch, so the two compose in any order.
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
    """Compiled functions, such as the `forward` of blocks: one compilation for all blocks of a class.

    Functions are copied first: torch stores compilations with the code object of a function, and so they are freed with this
    object and not shared with other models of the process.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._compiled: dict[tuple[Any, bool], Forward] = {}

    def of(self, function: Any, recomputed: bool) -> Forward:
        """`function` compiled as one graph; `recomputed`: retain only the arguments of `function(block, x, ...)`."""
        key = function, recomputed
        if key not in self._compiled:
            whole = _recomputing(function) if recomputed else _copied(function)
            self._compiled[key] = torch.compile(whole, fullgraph=True, backend=self.backend)
        return self._compiled[key]


def _copied(function: Any) -> FunctionType:
    f = function
    copied = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    copied.__kwdefaults__ = f.__kwdefaults__
    return copied


def _recomputing(function: Any) -> FunctionType:
    """`function(block, x, ...)` under a checkpoint, to be compiled together: the compiler then plans the recomputation.

    With the checkpoint outside, a call and its repetition could be two variants (one batch size, any) that save other tensors.
    """

    def whole(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return function(block, *args, **kwargs)

        return _checkpointed(inner, *args, **kwargs)

    return _copied(whole)


def _checkpointed(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """`forward`, retaining its arguments alone. Models draw nothing, so no generator state is saved."""
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@dataclass(frozen=True)
class BlockForward:
    """Replaces the `forward` of a block: `plain`, its own bound method, recomputed or compiled."""

    name: str
    block: nn.Module
    plain: Any
    recomputed: bool = False
    compiled: CompiledForwards | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recomputed = self.recomputed and torch.is_grad_enabled()
        if self.compiled is None:
            return _checkpointed(self.plain, *args, **kwargs) if recomputed else self.plain(*args, **kwargs)
        with compiling(f"block {self.name}"):
            args, kwargs = tree_map_only(Tensor, _normalised, (args, kwargs))
            return self.compiled.of(self.plain.__func__, recomputed)(self.block, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.plain, memo)


def _normalised(value: Tensor) -> Tensor:
    """`value` in the only form that is compiled for: contiguous, and detached if no graph is recorded.

    Other strides and flags would each be compiled anew. And inductor's CPU code of torch 2.13 gives wrong gradients for a
    channels-first stream, as patches come out of a convolution.
    """
    return value.contiguous() if torch.is_grad_enabled() else value.detach().contiguous()


def changed(current: Any, name: str, block: nn.Module, **fields: Any) -> Any:
    """`current`, the `forward` of `block`, with `fields` of its `BlockForward` changed; gates stay around it.

    Raises UserError if a `forward` that should be compiled is no method of the block.
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
    """Within the context `forward` replaces the one of `block`. Contexts nest, and undo in reverse order."""
    attributes = vars(block)  # without nn.Module's setter; instance attributes have priority over the class
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
