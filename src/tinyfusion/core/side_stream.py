"""Copies to a CUDA device on a stream of their own, so that they overlap with what the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """A second stream of a CUDA device; on any other device, and without one, everything here does nothing.

    Work inside of `running` is queued on it, by whatever thread. `ready` marks where that work ends, and `receive` lets the
    caller's stream wait for the mark, not the host.
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
