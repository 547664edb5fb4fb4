"""What a launcher (`torchrun`, `accelerate launch`) told this process about the others: its place and their number."""

from __future__ import annotations

import os


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def launched_rank() -> int:
    """Place of this process among those that were started together; 0 where it is alone."""
    return _number("RANK", 0)


def launched_processes() -> int:
    """How many were started together."""
    return _number("WORLD_SIZE", 1)
