"""What memory a training follows from: sizes counted from shapes, and what activations need, measured on one block.

One block of each kind runs forward and backward on one image and on two, while every tensor that comes into being and goes
is counted. The difference is what an image needs, the rest is what weights need (their casts). That is exact for any
family, arithmetic and attention kernel, because it is the very code that will train, and takes about a second for a block
of a 675M model on a CPU; a formula would have to follow every line of every model. What lies around the blocks (embedding,
output, losses, features that are compared, gates) is measured in the same way, on the whole objective with blocks that
return their input. Memory that kernels take and give back inside is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyfusion.blocks.forwards import standing_in
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import BlockCall, Streams, tensors_in
from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.processes.base import Objective
from tinyfusion.training.loop import BatchSource
from tinyfusion.training.lora import cast_frozen_linears

FLOAT_BYTES = 4
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BlockBytes:
    """What one block needs, in bytes; all but `casts` per image.

    held: from its forward pass until its backward pass, with its output. passing: on top of that, at most, while its
    backward pass runs. without_graph: at once, in a forward pass without one. casts: of its trained weights to autocast's type.
    """

    held: int
    output: int
    passing: int
    without_graph: int
    casts: int


@dataclass(frozen=True)
class Measured:
    """The needs of every block, of the trained model and of the teacher, in one arithmetic.

    before, after: bytes per image around the blocks, held since the last of them began (embedding, features, gates), and made
    after it (output, losses).
    """

    blocks: tuple[BlockBytes, ...]
    teacher: tuple[BlockBytes, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Footprint:
    """Everything about a training that its memory follows from, but settings and processes. Bytes, where not said otherwise.

    trained: numbers in every trained tensor. frozen_linear: numbers in linear layers that do not train; frozen_rest: other
    frozen numbers. *_outside: of what is in no block; *_block: of the largest block. kept_share: of the images that run a
    block with a graph. features: blocks of the teacher whose outputs are compared. beside: another model on the device.
    """

    trained: tuple[int, ...]
    frozen_linear: int
    frozen_rest: int
    trained_block: int
    weights_block: int
    weights_outside: int
    teacher: int
    teacher_gathered: int
    beside: int
    batch: int
    kept_share: float
    features: int
    measured: Mapping[str, Measured]


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that came into being inside the context and are still there. Views count once, inputs not at all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += self._sizes[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def footprint_of(
    model: nn.Module,
    stack: BlockStack,
    parameters: Mapping[str, Tensor],
    objective: Objective,
    source: BatchSource,
    settings: TrainingSection,
    beside: Sequence[nn.Module] = (),
) -> Footprint:
    """Count and measure a training. Every process must call where models lie in parts; nothing that trains changes.

    model, stack: what trains, and its blocks. parameters: the trained ones, gates included. beside: other modules that stay
    in memory; they count where they lie on the same device. Measured in the arithmetic of `settings`, float32 and bfloat16.
    """
    device = next(iter(parameters.values())).device
    memory = objective.step_memory()
    teacher, teacher_stack = memory.teacher or (None, None)
    frozen_linear = sum(
        p.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear) and not any(p.requires_grad for p in m.parameters(recurse=False))
        for p in m.parameters(recurse=False)
    )
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    counted = {id(model), id(teacher)}
    others = [m for m in beside if id(m) not in counted and next(m.parameters()).device == device]
    blocks = list(stack)
    inside = [_numbers(block) for block in blocks]
    measured, batch = _measured(model, stack, objective, source, settings)
    return Footprint(
        trained=tuple(p.numel() for p in parameters.values()),
        frozen_linear=frozen_linear,
        frozen_rest=frozen - frozen_linear,
        trained_block=FLOAT_BYTES * max(_numbers(block, trained=True) for block in blocks),
        weights_block=FLOAT_BYTES * max(inside),
        weights_outside=FLOAT_BYTES * (_numbers(model) - sum(inside)),
        teacher=FLOAT_BYTES * _numbers(teacher) if teacher else 0,
        teacher_gathered=_gathered(teacher, list(teacher_stack)) if teacher and teacher_stack else 0,
        beside=sum(FLOAT_BYTES * _numbers(m) for m in others),
        batch=batch,
        kept_share=memory.graph_share,
        features=memory.features,
        measured=measured,
    )


def _numbers(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _gathered(teacher: nn.Module, blocks: list[nn.Module]) -> int:
    inside = [_numbers(block) for block in blocks]
    return FLOAT_BYTES * (_numbers(teacher) - sum(inside) + 2 * max(inside))


def _measured(
    model: nn.Module,
    stack: BlockStack,
    objective: Objective,
    source: BatchSource,
    settings: TrainingSection,
) -> tuple[dict[str, Measured], int]:
    """What blocks need by arithmetic, and the bytes of one image's batch."""
    memory = objective.step_memory()
    stacks = [stack, *([memory.teacher[1]] if memory.teacher else [])]
    sides = [list(stacked) for stacked in stacks] + [[]] * (2 - len(stacks))
    declared = [stacked.streams() for stacked in stacks] + [[]] * (2 - len(stacks))
    passes = memory.passes
    live: dict[int, tuple[int, int]] = {}
    size, calls = 0, list[list[Any]]()
    for images in (8, 16):  # even, because some gates compare images in pairs, and enough for masks to differ
        draws = Randomness(0).at(0, 0, images)
        noisy = objective.draw(source(0, images, draws), draws)
        held: list[Tensor] = []
        noisy.each(lambda value, held=held: (held.append(value), value)[1])
        size = sum(v.nbytes for v in held) // images
        with contextlib.ExitStack() as undo:
            meter = LiveBytes()
            asides = [
                [undo.enter_context(_aside(*block, meter)) for block in zip(side, streams, strict=True)]
                for side, streams in zip(sides, declared, strict=True)
            ]
            with meter, _autocast(held[0].device.type, settings.dtype):
                prediction = objective.predict(model, noisy)
            with meter:
                terms = objective.losses(model, noisy, prediction)
            del prediction  # as the loop does before the backward pass
            live[images] = asides[0][-1].live, meter.now
            calls = [[aside.call for aside in side] for side in asides]
            del terms
    before, rest = (max(b - a, 0) // 8 for a, b in zip(live[8], live[16], strict=True))
    found: dict[str, Measured] = {}
    wanted: tuple[str, ...] = (settings.dtype, "float32", "bfloat16")
    for dtype in dict.fromkeys(wanted):
        own, teachers = (
            _block_bytes(side, recorded, dtype, dtype == settings.dtype, trains=index == 0)
            for index, (side, recorded) in enumerate(zip(sides, calls, strict=True))
        )
        found[dtype] = Measured(own * passes, teachers, before * passes, max(rest - before, 0) * passes)
    return found, size


def _autocast(device: str, dtype: str) -> torch.autocast:
    wanted = _DTYPES[dtype]
    return torch.autocast(device, dtype=wanted, enabled=wanted is not None)


@dataclass
class _Aside:
    """What stands in for the `forward` of a block: its streams as they are. call: the first one. live: bytes at that call."""

    block: nn.Module
    streams: Streams
    meter: LiveBytes
    call: BlockCall | None = None
    live: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.streams.call(self.block, args, kwargs)
        if self.call is None:
            self.live = self.meter.now
            self.call = call.mapped(Tensor.detach)
        return self.streams.join(call.states)


@contextlib.contextmanager
def _aside(block: nn.Module, streams: Streams, meter: LiveBytes) -> Iterator[_Aside]:
    """Within the context `block` returns its streams as they are."""
    aside = _Aside(block, streams, meter)
    with standing_in(block, aside):
        yield aside


def _block_bytes(
    blocks: list[nn.Module], calls: list[BlockCall | None], dtype: str, as_recorded: bool, trains: bool
) -> tuple[BlockBytes, ...]:
    """The needs of every block; blocks of one class and the same shapes are measured once."""
    kinds = [(type(block), tuple((tuple(p.shape), p.requires_grad) for p in block.parameters())) for block in blocks]
    called = {kind: (block, call) for block, kind, call in zip(blocks, kinds, calls, strict=True) if call is not None}
    found = {kind: _one_block(block, call, dtype, as_recorded, trains) for kind, (block, call) in called.items()}
    return tuple(found[kind] for kind in kinds)


def _one_block(block: nn.Module, call: BlockCall, dtype: str, as_recorded: bool, trains: bool) -> BlockBytes:
    """Run a copy of `block` on one image and on two, forward and backward, and without a graph."""
    device = next(block.parameters()).device
    copy = _plain_copy(block)
    if trains and dtype != "float32":
        wanted = _DTYPES[dtype]
        assert wanted is not None
        cast_frozen_linears(copy, wanted)  # as the mask learner does; elsewhere every layer trains
    seen: list[tuple[int, int, int, int]] = []
    for images in (1, 2):
        rows = torch.zeros(images, dtype=torch.int64, device=device)
        part = call.of_images(rows)
        part = part if as_recorded else part.mapped(_as_float)
        with _autocast(device.type, dtype), torch.no_grad(), LiveBytes() as meter:
            outputs = tensors_in(copy(*part.args, **part.kwargs))
        without_graph, size = meter.peak, sum(output.nbytes for output in outputs)
        del outputs
        inputs = [value.requires_grad_() for value in tensors_in((part.args, part.kwargs)) if value.is_floating_point()]
        if not trains:
            seen.append((0, size, 0, without_graph))
            continue
        with _autocast(device.type, dtype), LiveBytes() as meter:
            outputs = tensors_in(copy(*part.args, **part.kwargs))
        held = meter.now
        with meter:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs], allow_unused=True)
        del outputs
        seen.append((held, size, meter.peak - held, without_graph))
    one, two = seen
    held, size, _, without_graph = (b - a for a, b in zip(one, two, strict=True))
    return BlockBytes(held, size, max(two[2] - one[2], 0), without_graph, max(one[0] - held, 0))


def _as_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _plain_copy(module: nn.Module) -> nn.Module:
    """The same layers with whole float32 weights of their own (values of no meaning), without hooks or a stand-in `forward`."""
    kind = type(module)
    copy: nn.Module = kind.__new__(kind)  # of a class that FSDP2 made for its module this gives the plain one
    attributes = {k: v for k, v in vars(module).items() if k not in ("forward", "_compiled_call_impl")}
    copy.__dict__.update({k: OrderedDict() if "_hooks" in k else v for k, v in attributes.items()})
    copy.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(torch.full(p.shape, 0.01, device=p.device), p.requires_grad)
        for name, p in module._parameters.items()
    }
    copy.__dict__["_modules"] = {k: None if m is None else _plain_copy(m) for k, m in module._modules.items()}
    return copy
