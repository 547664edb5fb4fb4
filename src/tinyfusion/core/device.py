"""Choice of the device of a process, its free memory, and a second stream for copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import available_memory_bytes


def flush_denormals() -> None:
    """Treat denormal numbers as 0 on the CPU: decaying optimiser moments would slow long runs down.

    A setting of the whole process, so only programs (the command line, benchmarks) call it, never the library.
    """
    torch.set_flush_denormal(True)


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. Raises UserError where the device is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} is not available here: use auto, cpu, cuda or mps") from error
    return device


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has done all work that was queued on it; on the CPU nothing is."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None where the device does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes() if device.type == "cpu" else None


class SideStream:
    """A second stream of a CUDA device, so that copies overlap with computation; without CUDA it does nothing.

    Work of any thread within `running` is queued on it. `ready` marks where that work ends, and `receive` lets the caller's
    stream, not the host, wait for the mark.
    """

    def __init__(self, device: torch.device) -> None:
        used = device.type == "cuda" and torch.cuda.is_available()
        self.stream = torch.cuda.Stream(device) if used else None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context CUDA work goes to this stream."""
        with torch.cuda.stream(self.stream):  # None: as it was
            yield

    def ready(self) -> torch.cuda.Event | None:
        """A mark after all work that was queued so far."""
        return None if self.stream is None else self.stream.record_event()

    def receive(self, ready: torch.cuda.Event | None, batches: Iterable[Any]) -> None:
        """Wait for `ready` on the current stream, which reads these noisy batches from now on."""
        if self.stream is None or ready is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_event(ready)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # so that its memory is not given to the next copy too early
            return tensor

        for batch in batches:
            batch.each(used)
