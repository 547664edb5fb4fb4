"""Replacements for the `forward` of a block that recompute it in the backward pass, or compile it: the same values.

They are set on the block object for the time of a context. The replacement that gates a block (`blocks/skip.py`) calls them
for some images of a batch, so the two compose in any order. `measured_gain` times and compares a step eager and compiled.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from tinyfusion.core.compiler import compiler_failure, compiling
from tinyfusion.core.device import synchronise
from tinyfusion.core.errors import UserError

RECOMPILE_LIMIT = 64  # variants of one block: with and without a graph, one image or several, per structure
Forward = Callable[..., Any]
Step = Callable[[], Sequence[Tensor]]  # returns the tensors that must agree: losses and gradients


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


# -------------------------------------------------------------------------------------------------------- gain of compiling


@dataclass(frozen=True)
class Gain:
    """Median milliseconds of both steps, seconds of compilation, and the difference of their results.

    apart: largest |compiled - eager| / |eager| of the returned tensors, in Euclidean norms.
    """

    eager_ms: float
    compiled_ms: float
    compile_s: float
    apart: float

    def require(self, tolerance: float = 1e-3) -> None:
        """Raise UserError if the compiled step is not faster, or differs by more than `tolerance`."""
        if not self.apart <= tolerance:
            raise UserError(
                f"compile changes the step here: losses and gradients are {self.apart:.1g} apart (relative), rounding allows "
                f"{tolerance:g}; leave --compile away"
            )
        if self.compiled_ms >= self.eager_ms:
            raise UserError(
                f"compile gains nothing here: {self.compiled_ms:,.4g} ms a step against {self.eager_ms:,.4g} ms without; "
                "leave --compile away"
            )


def measured_gain(eager: Step, compiled: Step, device: torch.device, repeats: int = 5) -> Gain:
    """Time both steps in turns, after a warm-up. Raises UserError if the compiler fails, also in a backward pass.

    A step is forward and backward on the same batch, and must not change weights and moments; torch's generators are
    restored. The number of calls does not depend on the measurement, so ranks that synchronise in a step stay together.
    """

    def seconds(step: Step) -> float:
        synchronise(device)
        began = time.perf_counter()
        step()
        synchronise(device)
        return time.perf_counter() - began

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        wanted = [value.detach().clone() for value in eager()]
        eager()
        try:
            began = time.perf_counter()
            apart = _apart(compiled(), wanted)
            compiled()
            synchronise(device)
            first_s = time.perf_counter() - began
            times = [(seconds(eager), seconds(compiled)) for _ in range(repeats)]
        except Exception as error:
            failure = compiler_failure(error, "the step")
            if failure is None:
                raise
            raise failure from error
    eager_s, compiled_s = (statistics.median(column) for column in zip(*times, strict=True))
    return Gain(1000 * eager_s, 1000 * compiled_s, max(0.0, first_s - 2 * compiled_s), apart)


def _apart(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative difference of two lists of tensors; NaN if one has NaN.

    Norms below 1e-6 of the largest count as that: zeros with rounding have no relative difference.
    """
    if not wanted:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(w.float()) for w in wanted])
    pairs = zip(values, wanted, strict=True)
    apart = torch.stack([torch.linalg.vector_norm((value.detach() - w).float()) for value, w in pairs])
    tiny = torch.finfo(torch.float32).tiny
    return float((apart / norms.clamp(min=1e-6 * float(norms.max()) + tiny)).max())
