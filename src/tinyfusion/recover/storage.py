"""Where the weights of a frozen teacher are: as opened, packed, or on the host, from where each block comes when it runs.

A streamed block is copied to the device while the one before it runs, and freed after it has run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.core.device import SideStream
from tinyfusion.training.packed import PACKED, pack


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
    if storage in PACKED:
        pack(blocks, storage, device)
    module.to(device)
    return None
