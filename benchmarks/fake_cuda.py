"""CUDA without a GPU: tensors with a device, a shape and a type but no values, and streams that only keep order.

Within `fake_cuda` a CUDA build of torch accepts CUDA devices on any machine. Raised as errors are operations that mix
devices, and reads of a tensor on another stream, or on the host, before the work that makes it is known to be done.
Numbers that the code reads from a device are 1, tensors that are compared are equal, and the backward pass gives
gradients of 0. Threads of `core/ahead.py` are real, but one thread runs at a time. Memory of a tensor that is freed while
another stream uses it is not checked.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinyfusion.core import device
from tinyfusion.core.ahead import Ahead
from tinyfusion.dynamic.subnetworks import SubNetworks
from tinyfusion.training import loop
from tinyfusion.training.state import TrainState

aten = torch.ops.aten
_READS = (aten._local_scalar_dense.default, aten.item.default)
_MASKED = (aten.index.Tensor, aten.index_put_.default)
_COPIES = (aten._to_copy, aten.copy_, aten.to)


class Stream:
    """A queue of work in order: `position` counts it, `known` says up to where that of other queues is done before."""

    device = torch.device("cuda", 0)

    def __init__(self, _device: object = None) -> None:
        self.position = 0
        self.known: dict[Stream, int] = {}

    def __deepcopy__(self, _memo: object) -> Stream:
        return self  # a copied tensor is made where its original was

    def record_event(self) -> Event:
        """A mark after all work so far."""
        return Event({**self.known, self: self.position})

    def wait_event(self, event: Event) -> None:
        """Work from now on begins after the mark."""
        for stream, position in event.marks.items():
            self.known[stream] = max(position, self.known.get(stream, 0))


class Event:
    """A mark in the work of streams."""

    def __init__(self, marks: dict[Stream, int]) -> None:
        self.marks = marks


class Order:
    """Which work is done before which: the stream of every thread, the host, and who made each tensor."""

    def __init__(self) -> None:
        self.main, self.host, self.chosen = Stream(), Stream(), threading.local()
        self.streams = {self.main}

    @property
    def current(self) -> Stream:
        """The stream of this thread."""
        stream: Stream = getattr(self.chosen, "stream", self.main)
        return stream

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before = self.current
        self.chosen.stream = before if stream is None else stream
        self.streams.add(self.current)
        try:
            yield
        finally:
            self.chosen.stream = before

    def synchronise(self, *_device: object) -> None:
        """`torch.cuda.synchronize`: the host waits for all streams."""
        for stream in self.streams:
            self.host.wait_event(stream.record_event())

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation in its place. Raises RuntimeError where what it reads may not be there yet."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        on_device = any(tensor.device.type == "cuda" for tensor in given)
        reader = self.current if on_device else self.host
        for tensor in given:
            made: tuple[Stream, int] | None = getattr(tensor, "_made", None)
            if made is not None and made[0] in self.streams - {reader} and not self._is_done(made, reader):
                place = "the host" if reader is self.host else "another stream"
                raise RuntimeError(f"{func} reads on {place} a tensor that its stream may not have made yet")
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor)]
        places = {tensor.device.type for tensor in (*given, *outputs)}
        if "cuda" in places:
            self.current.position += 1
            for tensor in outputs:
                tensor._made = (self.current, self.current.position)  # type: ignore[attr-defined]
        if (
            getattr(func, "overloadpacket", None) in _COPIES
            and len(places) > 1
            and not _in_background(func, args, kwargs)
        ):
            self.host.wait_event(self.current.record_event())
        return result

    def _is_done(self, made: tuple[Stream, int], reader: Stream) -> bool:
        """Whether work is done before what `reader` begins now; what the host has waited for is done for all."""
        stream, position = made
        return max(reader.known.get(stream, 0), self.host.known.get(stream, 0)) >= position


def _in_background(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy is `non_blocking`, so that the host does not wait for it."""
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **(kwargs or {})}.get("non_blocking", False))


def _every_index(mask: Any) -> list[Any]:
    """Indices in place of a mask, as if all of its entries were true."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        return [mask]
    return [torch.zeros(mask.numel(), dtype=torch.int64, device=mask.device) for _ in range(mask.ndim)]


class StandIns(TorchDispatchMode):
    """Runs operations in their order, and gives the host numbers where tensors have none."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.equal.default:
            return True
        if func.namespace == "prim":  # asks for the device of a tensor
            return func(*args, **(kwargs or {}))
        if func in _READS:
            dtype = args[0].dtype
            self.order.run(lambda *_: None, args, kwargs)
            if args[0].device.type == "cuda":  # the host waits for the value
                self.order.host.wait_event(self.order.current.record_event())
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is aten.nonzero.default:
            self.order.run(lambda *_: None, args, kwargs)
            self.order.synchronise()
            return torch.stack(_every_index(args[0] != 0), 1)
        if func in _MASKED:
            self.order.run(lambda *_: None, args, kwargs)
            args = (args[0], [index for given in args[1] for index in _every_index(given)], *args[2:])
        return self.order.run(func, args, kwargs)


class SharedMode(FakeTensorMode):
    """A mode that a copied tensor shares with its original."""

    def __deepcopy__(self, _memo: object) -> SharedMode:
        return self


@cache
def fake_mode() -> SharedMode:
    """The mode of this process: the package caches tables on devices, and tensors of two modes do not mix."""
    return SharedMode(allow_non_fake_inputs=True)


class Replaced:
    """A module with other attributes."""

    def __init__(self, module: ModuleType, **attributes: Any) -> None:
        self._module = module
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Turns:
    """One thread at a time: fake tensors share state that threads must not change at once."""

    def __init__(self, order: Order) -> None:
        self.lock, self.order = threading.Lock(), order
        self.fake, self.stand_ins = fake_mode(), StandIns(order)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within the context this thread runs, on fake tensors."""
        with self.lock, self.fake, self.stand_ins:
            yield

    def waiting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which lets other threads run."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.lock.release()
            try:
                return call(*args, **kwargs)
            finally:
                self.lock.acquire()

        return run

    def running(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, on a thread that waits for its turn."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.taken():
                return call(*args, **kwargs)

        return run


@contextmanager
def fake_cuda() -> Iterator[Order]:
    """Within the context tensors are fake, and what fake tensors cannot do is replaced."""
    order = Order()
    turns, plain_update = Turns(order), loop._update
    streams = Replaced(
        torch.cuda,
        is_available=lambda: True,
        Stream=Stream,
        stream=order.on,
        current_stream=lambda _=None: order.current,
    )

    def update(state: TrainState, *rest: Any) -> Any:
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        return plain_update(state, *rest)

    def numbers(self: Tensor, *_: Any, **__: Any) -> np.ndarray:
        if self.device.type != "cpu":
            raise TypeError(f"numpy() of a tensor on {self.device}: move it to the host first")
        order.run(lambda *_: None, (self,), {})
        return np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    with ExitStack() as entered:
        entered.enter_context(warnings.catch_warnings())
        # torch asks whether a copy is lazy
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        for owner, name, stand_in in (
            (loop, "_update", update),
            (Tensor, "backward", lambda self, *args, **kwargs: None),
            (Tensor, "pin_memory", lambda self, *args, **kwargs: self),
            (Tensor, "record_stream", lambda self, stream: None),
            (Tensor, "numpy", numbers),
            (nn.Module, "_apply", _apply),
            # autocast is off without a device otherwise
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
            (torch.cuda, "synchronize", order.synchronise),
            (torch.accelerator, "synchronize", order.synchronise),
            (torch.cuda, "get_device_name", lambda *args: "no device"),
            (device, "torch", Replaced(torch, cuda=streams)),
            (SubNetworks, "check", lambda self: None),  # compares times, which have no values
            (Ahead, "take", turns.waiting(Ahead.take)),
            (Ahead, "close", turns.waiting(Ahead.close)),
            (Ahead, "_outcome", turns.running(Ahead._outcome)),
        ):  # fmt: skip
            entered.enter_context(mock.patch.object(owner, name, stand_in))
        entered.callback(_finish_threads)
        entered.enter_context(turns.taken())
        yield order


def _finish_threads() -> None:
    """Wait for threads that still make a batch after an error."""
    for thread in threading.enumerate():
        if thread.name == "batches ahead":
            thread.join()


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters instead of swapped storage."""
    for child in self.children():
        child._apply(function)
    for name, parameter in list(self._parameters.items()):
        if parameter is not None:
            with torch.no_grad():
                self._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
    for name, buffer in list(self._buffers.items()):
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self
