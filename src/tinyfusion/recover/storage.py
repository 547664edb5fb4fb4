"""Where the weights of a frozen teacher are: in 8 or 4 bits, or on the host, from where each block comes when it runs.

A packed layer stores its weight as bytes and expands it whenever it multiplies, one layer at a time, forward and backward, so a
student that trains low-rank updates may be built on the very same layers. A streamed block is copied to the device while the
one before it runs, and freed after it has run.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.core.device import SideStream
from tinyfusion.core.errors import UserError
from tinyfusion.training.optim import hush_bitsandbytes

Storage = Literal["own", "float8", "nf4", "streamed"]
_LARGEST_FLOAT8 = 448.0
_BLOCK_4BIT = 64  # numbers that share a float32 scale


class PackedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is bytes; subclasses say how they become numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = (
            None
            if linear._parameters["bias"] is None
            else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        )
        self.register_parameter("bias", bias)
        self.weight = nn.Parameter(self.packed(linear.weight.detach()), requires_grad=False)

    def packed(self, weight: Tensor) -> Tensor:
        """uint8 of a weight (out, in), on its device."""
        raise NotImplementedError

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as numbers."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, in autocast's type where that is on."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        out: Tensor = _Multiplied.apply(input.to(dtype), self)  # type: ignore[no-untyped-call]
        return out


class _Multiplied(torch.autograd.Function):
    """x W^T + b, without a copy of W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer._parameters["bias"] is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.expanded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (upstream,) = gradients
        return upstream @ ctx.layer.expanded(upstream.dtype), None


class Float8Linear(PackedLinear):
    """float8 (e4m3) times a power of two per tensor, so that numbers of bfloat16 and more hold the product exactly."""

    def packed(self, weight: Tensor) -> Tensor:
        largest = float(weight.abs().amax()) if weight.numel() else 0.0
        self.scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST_FLOAT8)) if 0 < largest < math.inf else 1.0
        return (weight.float() / self.scale).to(torch.float8_e4m3fn).view(torch.uint8)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        return self.weight.view(torch.float8_e4m3fn).to(dtype).mul_(self.scale)


class Nf4Linear(PackedLinear):
    """4-bit NormalFloat of bitsandbytes (arXiv 2305.14314), scaled per block of 64 numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight.quant_state = self.state  # type: ignore[attr-defined]  # as in bitsandbytes' own layers

    def packed(self, weight: Tensor) -> Tensor:
        functional = _bitsandbytes()
        packed, self.state = functional.quantize_4bit(
            weight.contiguous(), blocksize=_BLOCK_4BIT, compress_statistics=False, quant_type="nf4"
        )
        return packed

    def expanded(self, dtype: torch.dtype) -> Tensor:
        whole: Tensor = _bitsandbytes().dequantize_4bit(self.weight, self.state)
        return whole.to(dtype)


def _bitsandbytes() -> Any:
    hush_bitsandbytes()
    try:
        return importlib.import_module("bitsandbytes.functional")
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        what = "is not installed" if missing else f"does not load ({error})"
        raise UserError(
            f"recover.teacher_storage nf4 is of bitsandbytes, which {what}: pip install 'tinyfusion[8bit]', or use float8"
        ) from error


_PACKED: Mapping[str, type[PackedLinear]] = {"float8": Float8Linear, "nf4": Nf4Linear}


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Plain linear layers by name; not those of subclasses, which compute otherwise."""
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear:
            yield name, layer


@torch.no_grad()
def pack(blocks: BlockStack, kind: str, device: torch.device) -> None:
    """Replace the linear layers of frozen blocks by packed ones on `device`, in place, one at a time.

    What is in no block (embeddings, the head) stays as it is: it is a small share, and the most sensitive.
    """
    for block in blocks:
        for name, layer in list(linears(block)):
            parent, _, attribute = name.rpartition(".")
            packed = _PACKED[kind](layer.to(device))
            setattr(block.get_submodule(parent), attribute, packed.train(layer.training))
        block.to(device)


class StreamedBlocks:
    """Blocks whose weights are on the host and come to `device` when they run: hooks on the blocks, until `close`."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self.side = device, SideStream(device)
        for block in blocks:
            for buffer_name, buffer in list(block.named_buffers()):
                parent, _, attribute = buffer_name.rpartition(".")
                block.get_submodule(parent)._buffers[attribute] = buffer.to(device)
        self.weights = [list(block.parameters()) for block in blocks]
        self.hosted = [[_on_host(p.detach(), device) for p in weights] for weights in self.weights]
        self._restore(range(len(blocks)))
        self._coming: dict[int, Future[tuple[list[Tensor], Any]]] = {}
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="teacher's next block")
        self._hooks: list[Any] = []
        for index, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(self._bring(index), prepend=True))
            self._hooks.append(block.register_forward_hook(self._free(index), always_call=True))

    @property
    def passing(self) -> int:
        """Bytes on the device at most: the block that runs, and the next one."""
        sizes = [sum(tensor.nbytes for tensor in hosted) for hosted in self.hosted]
        return max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True))

    def close(self) -> None:
        """Remove the hooks; the weights stay on the host."""
        for hook in self._hooks:
            hook.remove()
        self._copies.shutdown(wait=True, cancel_futures=True)
        self._restore(range(len(self.weights)))

    def _copied(self, index: int) -> tuple[list[Tensor], Any]:
        with self.side.running():
            copies = [tensor.to(self.device, copy=True, non_blocking=True) for tensor in self.hosted[index]]
            return copies, self.side.ready()

    def _bring(self, index: int) -> Any:
        def hook(_block: nn.Module, _args: Any) -> None:
            coming = self._coming.pop(index, None) or self._copies.submit(self._copied, index)
            self._coming.clear()  # of a call that went another way
            copies, ready = coming.result()
            self.side.receive(ready, [_Tensors(copies)])
            for parameter, copy in zip(self.weights[index], copies, strict=True):
                parameter.data = copy
            if index + 1 < len(self.weights):  # not the first again: it would be held while the student trains
                self._coming[index + 1] = self._copies.submit(self._copied, index + 1)

        return hook

    def _free(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self._restore([index])

        return hook

    def _restore(self, indices: Sequence[int]) -> None:
        for index in indices:
            for parameter, tensor in zip(self.weights[index], self.hosted[index], strict=True):
                parameter.data = tensor


@dataclass(frozen=True)
class _Tensors:
    """What `SideStream.receive` reads."""

    tensors: list[Tensor]

    def each(self, see: Any) -> None:
        for tensor in self.tensors:
            see(tensor)


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the host; pinned for a GPU, if the limit of locked memory allows."""
    host = tensor.cpu()
    if device.type == "cuda":
        try:
            return host.pin_memory()
        except RuntimeError:
            pass
    return host


def stored(module: nn.Module, blocks: BlockStack, storage: str, device: torch.device) -> StreamedBlocks | None:
    """Move a frozen module to `device` with its blocks stored as `storage` says, in place; returns what streams them.

    Raises UserError where bitsandbytes is missing.
    """
    if storage == "streamed":
        streamed = StreamedBlocks(list(blocks), device)
        inside = {id(p) for weights in streamed.weights for p in weights}
        for parameter in module.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.to(device)
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else buffer.to(device)
        return streamed
    if storage in _PACKED:
        pack(blocks, storage, device)
    module.to(device)
    return None
