"""Rank and number of processes from the environment variables of a launcher (`torchrun`, `accelerate launch`)."""

from __future__ import annotations

import os
import re

from tinyfusion.core.errors import UserError

_MOST = 2**20  # processes


def _number(name: str, default: int, low: int, below: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
    if not low <= value < below:
        wanted = f"the environment variable {name} is a whole number from {low} to {below - 1}"
        raise UserError(f"{wanted}; got {text[:40]!r}: unset it, or let torchrun set it")
    return value


def launched_processes() -> int:
    """Number of launched processes. Raises UserError on an invalid WORLD_SIZE."""
    return _number("WORLD_SIZE", 1, 1, _MOST)


def launched_rank() -> int:
    """Rank of this process, 0 where it is alone. Raises UserError on an invalid RANK or WORLD_SIZE."""
    world = launched_processes()
    rank = _number("RANK", 0, 0, _MOST)
    if rank >= world:
        raise UserError(f"RANK {rank} of WORLD_SIZE {world}: processes are numbered from 0, below their number")
    return rank


def launched_local_rank() -> int:
    """Rank of this process on its machine. Raises UserError on an invalid LOCAL_RANK."""
    return _number("LOCAL_RANK", 0, 0, launched_processes())


def check_launch() -> None:
    """Raise UserError on invalid variables of the launcher."""
    launched_rank()
    launched_local_rank()


def check_meeting_place() -> None:
    """Raise UserError where the launcher did not set MASTER_ADDR and MASTER_PORT."""
    _number("MASTER_PORT", 0, 1, 2**16)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():
            unset = f"WORLD_SIZE is {launched_processes()}, and the environment variable {name} is not set"
            raise UserError(f"{unset}: start the processes by torchrun, or unset RANK and WORLD_SIZE")
