"""Gates of exactly 0 or 1 without the work that dense gating throws away.

Dense gating computes `m * block(x) + (1 - m) * x` for every image. Where m is 0 the block adds nothing, and all that its
graph would give back is one number per image: the gradient of m, <g, block(x) - x>, with g what arrives from above. So a
batch is split: kept images run with a graph, dropped ones without, or not at all where no gate wants a gradient. Values
and gradients are those of the dense form (TinyFusion, arXiv 2412.01199, section 3.2) up to rounding; the released code
is dense. Only block(x) - x is kept for the gates, not the two streams.

Shapes: B images, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.models.forwards import standing_in


def mixed(gate: Tensor, output: Tensor, x: Tensor) -> Tensor:
    """`m * output + (1 - m) * x` per image, for any gate (B,), or (1,) for all images alike."""
    m = gate.view(-1, *([1] * (output.ndim - 1)))
    return m * output + (1 - m) * x


@dataclass(frozen=True)
class GateColumn:
    """The gates of one block: m (B,), or (1,) for all images alike, and the numbers of the images it keeps and drops.

    binary: every value is exactly 0 or 1. Other columns are mixed densely.
    """

    gate: Tensor
    kept: Tensor
    dropped: Tensor
    binary: bool


def gate_columns(gates: Tensor) -> list[GateColumn]:
    """gates (B, L), one column per block. Values cross to the host once, not once per block."""
    values = gates.detach().cpu().T
    binary = ((values == 0) | (values == 1)).all(dim=1).tolist()
    num_kept = (values == 1).sum(dim=1).tolist()
    order = (values != 1).byte().argsort(dim=1, stable=True).to(gates.device)
    return [
        GateColumn(gate, rows[:num], rows[num:], exact)
        for gate, rows, num, exact in zip(gates.unbind(1), order, num_kept, binary, strict=True)
    ]


@dataclass(frozen=True)
class SkippingForward:
    """What stands in for the `forward` of a block while it is gated."""

    block: nn.Module
    forward: Callable[..., Tensor]
    column: GateColumn

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The mixed stream (B, T, D)."""
        column, num = self.column, len(x)
        if len(column.gate) not in (1, num):
            raise ValueError(f"the gates are for {len(column.gate)} images, the block got {num}")
        if not column.binary:
            return mixed(column.gate, self.forward(x, *args, **kwargs), x)
        watched = torch.is_grad_enabled() and column.gate.requires_grad
        if len(column.dropped) == 0:
            stream = full = self.forward(x, *args, **kwargs)
        else:
            # kept images first: autocast then holds casts of trained weights that have a graph
            stream = x if len(column.kept) == 0 else _placed(x, column.kept, self._on(column.kept, x, args, kwargs))
            full = self._with_dropped(stream.detach(), x, args, kwargs) if watched else stream
            if len(column.kept) == 0:
                stream = self._with_zero_gradients(stream, args, kwargs)
        stream = stream.to(torch.promote_types(column.gate.dtype, stream.dtype))  # of the product with the gate
        if not watched:
            return stream
        delta = full.detach() - x.detach()
        out: Tensor = _GateGradient.apply(stream, column.gate.expand(num), delta)  # type: ignore[no-untyped-call]
        return out

    def _with_dropped(self, stream: Tensor, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """`stream` with what the block would make of the images it drops; no graph."""
        with torch.no_grad():
            if len(self.column.kept) == 0:
                return self.forward(x, *args, **kwargs)
            return _placed(stream, self.column.dropped, self._on(self.column.dropped, x, args, kwargs))

    def _with_zero_gradients(self, stream: Tensor, args: Any, kwargs: Any) -> Tensor:
        """`stream`, giving weights and inputs of a block that nobody keeps gradients of 0 as dense gating does.

        None instead would make an optimiser with moments stand still where it should run out. The inputs are among them so
        that the graph has the same edges on every process: a model in parts gathers and reduces in the order of its graph.
        """
        if not torch.is_grad_enabled():
            return stream
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        reached = [tensor for tensor in (*self.block.parameters(), *inputs) if tensor.requires_grad]
        if not reached:
            return stream
        out: Tensor = _ZeroGradients.apply(stream, *reached)  # type: ignore[no-untyped-call]
        return out

    def _on(self, rows: Tensor, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """The block on the images `rows` of the batch alone."""
        num = len(x)
        return self.forward(x.index_select(0, rows), *of_images(args, rows, num), **of_images(kwargs, rows, num))


def _placed(stream: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`stream` with `values` at the images `rows`, in the type that holds both."""
    dtype = torch.promote_types(stream.dtype, values.dtype)
    return stream.to(dtype).index_copy(0, rows, values.to(dtype))


def of_images(value: Any, rows: Tensor, num: int) -> Any:
    """`value`, the arguments of a block for `num` images, for the images `rows` alone.

    Tensors whose first dimension is `num` are per image, also inside tuples, lists and dicts. Parameters are shared, and
    so is everything else: a table for all images has another first dimension (1, say), whatever the batch size.
    """
    if isinstance(value, Tensor):
        shared = isinstance(value, nn.Parameter) or value.ndim == 0 or len(value) != num
        return value if shared else value.index_select(0, rows)
    if isinstance(value, dict):
        return {name: of_images(part, rows, num) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [of_images(part, rows, num) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class _GateGradient(torch.autograd.Function):
    """The stream as it is. In the backward pass the gate of image n gets <g_n, delta_n>, delta = block(x) - x."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, gate: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(delta)
        ctx.gate_dtype = gate.dtype
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        upstream, (delta,) = gradients[0], ctx.saved_tensors
        inner = torch.linalg.vecdot(upstream.flatten(1), delta.to(upstream.dtype).flatten(1))
        return upstream, inner.to(ctx.gate_dtype), None


class _ZeroGradients(torch.autograd.Function):
    """The stream as it is. In the backward pass every other tensor gets zeros."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(weight) for weight in ctx.weights)


@contextmanager
def skipping(block: nn.Module, column: GateColumn) -> Iterator[None]:
    """Within the context `block` is gated by `column` and skips what it can. Hooks on it see the mixed stream.

    Contexts nest: the gates multiply. Hooks on parts of the block run once for the kept and once for the dropped images.
    """
    forward = _nested(vars(block).get("forward"), column) or SkippingForward(block, block.forward, column)
    with standing_in(block, forward):
        yield


def _nested(outer: Any, column: GateColumn) -> SkippingForward | None:
    """`column` inside an `outer` gating of the same block, which would not know a part of its batch."""
    if not isinstance(outer, SkippingForward):
        return None
    (product,) = gate_columns((outer.column.gate * column.gate).unsqueeze(1))
    return SkippingForward(outer.block, outer.forward, product)
