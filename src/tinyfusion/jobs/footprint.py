"""What determines the memory of a training: sizes counted from shapes, activation sizes measured on one block.

One block of each kind runs forward and backward on one image and on two, and every tensor that is allocated and freed is
counted. The difference is what an image needs, the rest is what weights need (their casts). This is exact for any family,
type and attention kernel, because it is the code that will train; a formula would have to follow every line of every model. On a
CPU large blocks run with fake tensors, which have only sizes, so it takes seconds for blocks of any size. What is outside the
blocks (embedding, output, losses, compared features, gates) is measured in the same way, on the whole objective with blocks that
return their input. Memory inside kernels is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
from tinyfusion.training.loop import BatchSource, autocast
from tinyfusion.training.shards import local_part, unsplit_class

FLOAT_BYTES = 4
_FAKED = 2**23  # numbers in a block from which on operations on a CPU take longer than faking them
# of images outside the blocks, and twice as many: in pairs, which some gates compare; enough for masks to differ
_MOST_PAIRS = 4


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block; all but `casts` per image.

    retained: from its forward to its backward pass, with its output. transient: at most, in addition, during its backward
    pass. without_graph: at most, in a forward pass without a graph. casts: of its trained weights to autocast's type; of a
    teacher's block what its weights take while they are multiplied (a layer at a time).
    """

    retained: int
    output: int
    transient: int
    without_graph: int
    casts: int


@dataclass(frozen=True)
class Measured:
    """Bytes of every block of the trained model and of the teacher, in one type.

    before, after: bytes per image outside the blocks, retained when the last of them begins (embedding, features, gates), and
    allocated after it (output, losses).
    """

    blocks: tuple[BlockBytes, ...]
    teacher: tuple[BlockBytes, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Footprint:
    """Everything about a training that determines its memory, except settings and processes. In bytes unless noted.

    trained: numbers in every trained tensor; item_bytes: of one of them, 4 where empty. matrices: places in `trained`, rows and
    columns of what Muon updates. frozen_linear: numbers in linear layers that do not train, in a type that autocast's may replace;
    frozen_rest: bytes of other frozen tensors over 4. What trained model and teacher share counts as the teacher's. gathered,
    teacher_gathered: weights and gradients that a process of FSDP2 has whole at a time. graph_share, features, passing: as in
    `StepMemory`. teacher: of its weights. also_resident: other models on the device. measured: by type. on_host: the device is the
    host itself. hosted: bytes of the teacher that would be on the host of another device.
    """

    trained: tuple[int, ...]
    frozen_linear: int
    frozen_rest: int
    gathered: int
    teacher: int
    teacher_gathered: int
    also_resident: int
    batch: int
    graph_share: float
    features: int
    measured: Mapping[str, Measured]
    item_bytes: tuple[int, ...] = ()
    matrices: tuple[tuple[int, int, int], ...] = ()
    hosted: int = 0
    on_host: bool = False
    passing: int = 0


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were allocated inside the context and not yet freed. Views count once, inputs not at all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self.now += self._sizes[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def footprint_of(
    model: nn.Module, stack: BlockStack, parameters: Mapping[str, Tensor], objective: Objective, source: BatchSource,
    settings: TrainingSection, also_resident: Sequence[nn.Module] = (), matrices: Collection[str] = (),
) -> Footprint:  # fmt: skip
    """Count and measure a training. Every process must call where models are sharded; nothing that trains changes.

    parameters: the trained ones, gates included. also_resident: other modules that stay in memory; they count where they are
    on the same device. matrices: names of the parameters that Muon updates. Measured in the type of `settings`, float32 and bfloat16.
    """
    device = next(iter(parameters.values())).device
    memory = objective.step_memory()
    teacher, teacher_stack = memory.teacher or (None, None)
    counted: set[Any] = set()
    of_teacher = _stored(teacher.parameters(), device, counted) if teacher else 0
    of_linears = [list(m.parameters(recurse=False)) for m in model.modules() if isinstance(m, nn.Linear)]
    plain = [p for own in of_linears if not any(p.requires_grad for p in own) for p in own if p.element_size() > 1]
    castable = {id(p): p for p in plain if _storage(p) not in counted}
    rest = [p for p in model.parameters() if not p.requires_grad and id(p) not in castable]
    frozen_rest = _stored(rest, device, counted)
    for parameter in (*castable.values(), *parameters.values()):
        counted.add(_storage(parameter))
    others = [m for m in also_resident if m is not model and m is not teacher]
    measured, batch = _measured(model, stack, objective, source, settings)
    return Footprint(
        trained=tuple(p.numel() for p in parameters.values()),
        frozen_linear=sum(p.numel() for p in castable.values()),
        frozen_rest=-(-frozen_rest // FLOAT_BYTES),
        gathered=_gathered(model, stack) + 2 * max(_bytes(block, trained=True) for block in stack),
        teacher=of_teacher,
        teacher_gathered=_gathered(teacher, teacher_stack) if teacher and teacher_stack else 0,
        also_resident=sum(_stored(m.parameters(), device, counted) for m in others),
        batch=batch,
        graph_share=memory.graph_share,
        features=memory.features,
        measured=measured,
        item_bytes=tuple(p.element_size() for p in parameters.values()),
        matrices=tuple((i, *p.shape) for i, (name, p) in enumerate(parameters.items()) if name in matrices),
        hosted=sum(p.nbytes for b in teacher_stack or () for p in b.parameters()) if memory.passing else 0,
        on_host=device.type == "cpu",
        passing=memory.passing,
    )


def _stored(tensors: Iterable[Tensor], device: torch.device, counted: set[Any]) -> int:
    """Bytes of tensors on `device` whose memory is not among `counted`, to which it is added. Of sharded tensors: all rows."""
    size = 0
    for tensor in tensors:
        if tensor.device.type == device.type and (key := _storage(tensor)) not in counted:
            counted.add(key)
            # of 4-bit weights, a float per block
            scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
            size += tensor.numel() * tensor.element_size() + (0 if scales is None else scales.nbytes)
    return size


def _storage(tensor: Tensor) -> Any:
    """A key of the memory of a tensor."""
    local = local_part(tensor.detach())
    return local.untyped_storage()._cdata, local.storage_offset()


def _bytes(module: nn.Module, trained: bool = False) -> int:
    return FLOAT_BYTES * sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _gathered(module: nn.Module, stack: BlockStack) -> int:
    """What is in no block stays whole from the forward pass on; one block is used while the next one comes."""
    inside = [_bytes(block) for block in stack]
    return _bytes(module) - sum(inside) + 2 * max(inside)


def _measured(
    model: nn.Module, stack: BlockStack, objective: Objective, source: BatchSource, settings: TrainingSection
) -> tuple[dict[str, Measured], int]:
    """Bytes of blocks by type, and of one image's batch."""
    memory = objective.step_memory()
    stacks = [stack, *([memory.teacher[1]] if memory.teacher else [])]
    live: dict[int, tuple[int, int]] = {}
    size, recorded = 0, list[list[_StandIn]]()
    one_by_one = getattr(source, "one_by_one", False)  # of calls that are not run together
    # no more than train at once, as far as there are so many
    few = 2 * max(1, min(_MOST_PAIRS, settings.batch_size // 4))
    for images in (1,) if one_by_one else (few, 2 * few):
        draws = Randomness(0).at(0, 0, images)
        noisy = objective.draw(source(0, images, draws), draws)
        tensors: list[Tensor] = []
        noisy.each(lambda value, tensors=tensors: (tensors.append(value), value)[1])
        size = sum(tensor.nbytes for tensor in tensors) // images
        with contextlib.ExitStack() as undo:
            meter = LiveBytes()
            recorded = [[_StandIn(b, s, meter) for b, s in zip(st, st.streams(), strict=True)] for st in stacks]
            for stand_in in (s for side in recorded for s in side):
                undo.enter_context(standing_in(stand_in.block, stand_in))
            with meter, autocast(tensors[0].device.type, settings.dtype):
                prediction = objective.predict(model, noisy)
            with meter:
                terms = objective.losses(model, noisy, prediction)
            del prediction  # as the loop does before the backward pass
            live[images] = recorded[0][-1].live, meter.now
            del terms
    if one_by_one:
        before, rest = live[1]
    else:
        before, rest = (max(b - a, 0) // few for a, b in zip(live[few], live[2 * few], strict=True))
    by_type: dict[str, Measured] = {}
    types: tuple[str, ...] = (settings.dtype, "float32", "bfloat16")
    types = types[:1] if settings.weights == "bfloat16" else types  # such weights multiply in no other
    for dtype in dict.fromkeys(types):
        as_recorded, passes = dtype == settings.dtype, memory.passes
        own, *teachers = (
            _block_bytes(s, dtype, as_recorded, trains=i == 0, rows=memory.teacher_rows if i else 1)
            for i, s in enumerate(recorded)
        )
        teacher = teachers[0] if teachers else ()
        by_type[dtype] = Measured(own * passes, teacher, before * passes, max(rest - before, 0) * passes)
    return by_type, size


def measured_stack(module: nn.Module, stack: BlockStack, run: Callable[[nn.Module], Any]) -> Measured:
    """Measure every block of a model on the meta device under bfloat16, with fake tensors; `run` calls it for one image.

    The model's parameters become fake ones. Attention and other kernels are those of a CPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # late: costs a second

    meter = LiveBytes()
    with FakeTensorMode(), contextlib.ExitStack() as undo, torch.device("cpu"):
        for part in module.modules():
            for name, own in list(part._parameters.items()):
                if own is not None:
                    fake = torch.empty(own.shape, dtype=own.dtype)
                    part._parameters[name] = nn.Parameter(fake, own.requires_grad)
            for values in (part._buffers, vars(part)):  # some classes have tables as plain attributes
                for name, value in list(values.items()):
                    if isinstance(value, Tensor):
                        values[name] = torch.empty(value.shape, dtype=value.dtype)
        recorded = [_StandIn(block, streams, meter) for block, streams in zip(stack, stack.streams(), strict=True)]
        for stand_in in recorded:
            undo.enter_context(standing_in(stand_in.block, stand_in))
        with meter, autocast("cpu", "bfloat16"):
            result = run(module)
        blocks = _block_bytes(recorded, "bfloat16", as_recorded=True, trains=True)
        before, end = recorded[-1].live, meter.now
        del result
    return Measured(blocks, (), before, max(end - before, 0))


@dataclass
class _StandIn:
    """A `forward` of a block that returns its streams. call: the first one. live: bytes at that call."""

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


def _block_bytes(
    recorded: list[_StandIn], dtype: str, as_recorded: bool, trains: bool, rows: int = 1
) -> tuple[BlockBytes, ...]:
    """Bytes of every block; blocks of one class and the same shapes are measured once. rows: of a block's batch per image."""

    def kind(block: nn.Module) -> tuple[Any, ...]:
        return type(block), tuple((tuple(p.shape), p.requires_grad) for p in block.parameters())

    called = {kind(s.block): (s.block, s.call) for s in recorded if s.call is not None}
    measured = {key: _one_block(block, call, dtype, as_recorded, trains, rows) for key, (block, call) in called.items()}
    return tuple(measured[kind(s.block)] for s in recorded)


def _one_block(
    block: nn.Module, call: BlockCall, dtype: str, as_recorded: bool, trains: bool, rows: int = 1
) -> BlockBytes:
    """Measure a block, a large one on a CPU with fake tensors: of the same sizes, without computing (and without memory)."""
    real = type(call.tapped) is Tensor  # else in a mode of fake tensors already
    if real and call.tapped.device.type == "cpu" and sum(p.numel() for p in block.parameters()) >= _FAKED:
        from torch._subclasses import fake_tensor  # late: costs a second

        mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        shaped_by_values = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException
        with contextlib.suppress(*shaped_by_values, fake_tensor.UnsupportedOperatorException), mode:
            return _run_block(block, call.mapped(mode.from_tensor), dtype, as_recorded, trains, rows)
    return _run_block(block, call, dtype, as_recorded, trains, rows)


def _run_block(block: nn.Module, call: BlockCall, dtype: str, as_recorded: bool, trains: bool, rows: int) -> BlockBytes:
    """Run a copy of `block` on one image and on two, forward and backward, and without a graph."""
    device = call.tapped.device  # where the weights are when it runs
    # frozen linear layers of trained models are cast, as the mask learner does; elsewhere every layer trains
    copy = _plain_copy(block, device, getattr(torch, dtype) if trains else torch.float32)
    taken: list[tuple[int, int, int, int]] = []
    for images in (rows, 2 * rows):
        one = call.of_images(torch.zeros(images, dtype=torch.int64, device=device))
        one = one if as_recorded else one.mapped(lambda value: value.float() if value.is_floating_point() else value)
        with autocast(device.type, dtype), torch.no_grad(), LiveBytes() as meter:
            outputs = tensors_in(copy(*one.args, **one.kwargs))
        without_graph, size = meter.peak, sum(output.nbytes for output in outputs)
        del outputs
        if not trains:
            taken.append((0, size, 0, without_graph))
            continue
        inputs = [value.requires_grad_() for value in one.of_each_image() if value.is_floating_point()]
        with autocast(device.type, dtype), LiveBytes() as meter:
            outputs = tensors_in(copy(*one.args, **one.kwargs))
        retained = meter.now
        with meter:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs], allow_unused=True)
        del outputs
        taken.append((retained, size, meter.peak - retained, without_graph))
    retained, size, transient, without_graph = (b - a for a, b in zip(*taken, strict=True))
    casts = taken[0][0] - retained if trains else taken[0][3] - without_graph
    return BlockBytes(retained, size, max(transient, 0), without_graph, max(casts, 0))


def _plain_copy(module: nn.Module, device: torch.device, of_linears: torch.dtype) -> nn.Module:
    """The same layers with weights of their own (values are arbitrary), without hooks or a stand-in `forward`.

    Weights are float32, those of frozen linear layers `of_linears`; trained ones in bfloat16 stay so. Packed layers become plain
    linear ones.
    """
    kind = type(module)
    own = [p for p in module._parameters.values() if p is not None]
    plain = isinstance(module, nn.Linear) and not any(p.requires_grad for p in own)
    if isinstance(module, nn.Linear) and module.weight.dtype == torch.uint8:
        sizes, biased = (module.in_features, module.out_features), module.bias is not None
        return nn.Linear(*sizes, biased, device=device, dtype=of_linears).requires_grad_(False)
    whole: Any = unsplit_class(kind)
    copy: nn.Module = whole.__new__(whole)
    attributes = {k: v for k, v in vars(module).items() if k not in ("forward", "_compiled_call_impl")}
    copy.__dict__.update({k: OrderedDict() if "_hooks" in k else v for k, v in attributes.items()})

    def of(p: nn.Parameter) -> nn.Parameter:
        low = p.requires_grad and p.dtype == torch.bfloat16
        dtype = torch.bfloat16 if low else of_linears if plain else torch.float32
        return nn.Parameter(torch.full(p.shape, 0.01, device=device, dtype=dtype), p.requires_grad)

    copy.__dict__["_parameters"] = {name: None if p is None else of(p) for name, p in module._parameters.items()}
    copy.__dict__["_modules"] = {
        k: None if m is None else _plain_copy(m, device, of_linears) for k, m in module._modules.items()
    }
    return copy
