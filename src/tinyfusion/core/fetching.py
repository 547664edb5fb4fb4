"""Downloads forbidden during a dry run: within `no_fetching()`, code that would download raises `WouldFetch`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_contexts = 0  # that are open; of the process, as data sets are opened on several threads


class WouldFetch(BaseException):
    """A dry run needs something that is not on this machine. Derives from BaseException, as it ends the check and is no error.

    what: what it is and where it would come from. num_bytes: its size, None where it is unknown.
    """

    def __init__(self, what: str, num_bytes: int | None = None) -> None:
        size = "of unknown size" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"
        super().__init__(f"would fetch {what}, {size}")
        self.what, self.num_bytes = what, num_bytes

    def outcome(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {"would_fetch": {"what": self.what, "bytes": self.num_bytes}}


@contextmanager
def no_fetching() -> Iterator[None]:
    """Forbid downloads within the context."""
    global _contexts
    _contexts += 1
    try:
        yield
    finally:
        _contexts -= 1


def fetching_forbidden() -> bool:
    """Whether code must raise `WouldFetch` instead of downloading."""
    return _contexts > 0
