"""No fetching: within `no_fetching()`, whatever would be downloaded is said instead. Every verb's --dry-run runs within it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tinyfusion.core.errors import UserError

_FORBIDDEN: ContextVar[bool] = ContextVar("_FORBIDDEN", default=False)


class WouldFetch(UserError):
    """Something is not on this machine, and now is not the time to fetch it.

    what: what it is and where it would come from. num_bytes: its size, None where nobody said.
    """

    def __init__(self, what: str, num_bytes: int | None = None) -> None:
        size = "of unknown size" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"
        super().__init__(f"would fetch {what}, {size}")
        self.what, self.num_bytes = what, num_bytes


@contextmanager
def no_fetching() -> Iterator[None]:
    """Within it `fetching_forbidden()` is true, on this thread."""
    token = _FORBIDDEN.set(True)
    try:
        yield
    finally:
        _FORBIDDEN.reset(token)


def fetching_forbidden() -> bool:
    """Whether what would be downloaded has to be said by `WouldFetch` instead."""
    return _FORBIDDEN.get()
