"""Choice of the device of a process, and its free memory."""

from __future__ import annotations

import torch

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
