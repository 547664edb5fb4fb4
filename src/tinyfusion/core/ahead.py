"""Prefetching of values by step on a background thread: while step 7 computes, the batches of steps 8 and 9 are prepared.

A value is a function of its step alone, so only time depends on the depth, and steps may be taken in any order: a resumed
run and a repeated step get the same values.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from tinyfusion.core.errors import UserError

Value = TypeVar("Value")
_CLOSING_S = 5.0  # limit of waiting for a busy thread; it then ends with the program


class Ahead(Generic[Value]):
    """Computes `make(step)` for up to `depth` steps ahead of the last one taken, in order, on one background thread.

    depth 0: computes each value when it is taken, without a thread. end: the first step that is not computed. timeout_s: the
    longest wait of `take`. what: name of the values in messages. `waited_s`: seconds that all calls of `take` have waited.
    For one caller; as a context manager it ends the thread.

    `make` runs without the caller's thread-local settings: use devices with an index, and no autocast.
    """

    def __init__(
        self,
        make: Callable[[int], Value],
        depth: int,
        *,
        end: int | None = None,
        timeout_s: float = 600.0,
        what: str = "the data of step",
    ) -> None:
        if depth < 0:
            raise UserError(f"{depth} batches cannot be made ahead: wanted 0 or more")
        self.make, self.depth, self.end = make, depth, end
        self.timeout_s, self.what = timeout_s, what
        self.waited_s = 0.0
        self._changed = threading.Condition()
        self._made: dict[int, Value | _Failure] = {}
        self._wanted = range(0)
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self, step: int) -> Value:
        """Return `make(step)` and start the steps after it. Raises what `make` raised, and UserError after `timeout_s`."""
        if self._closed:
            raise RuntimeError(f"step {step} is taken after the batches were closed")
        began = time.perf_counter()
        try:
            outcome = self._awaited(step) if self.depth else self.make(step)
        finally:
            self.waited_s += time.perf_counter() - began
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    def close(self) -> None:
        """End the thread and discard its values. Returns in a bounded time, whatever the thread does."""
        with self._changed:
            self._closed = True
            self._wanted = range(0)
            self._made.clear()
            self._changed.notify_all()
        # the garbage collector may run this on any thread, also on the background thread
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSING_S)

    def __enter__(self) -> Ahead[Value]:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _awaited(self, step: int) -> Value | _Failure:
        """Wait for the outcome of `step`."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="batches ahead", daemon=True)
            thread.start()
            self._thread = thread  # after the start: a thread that did not start cannot be joined
        limit = step + self.depth + 1
        wanted = range(step, limit if self.end is None else max(min(limit, self.end), step + 1))
        with self._changed:
            self._aim(wanted)
            if not self._changed.wait_for(lambda: step in self._made, self.timeout_s):
                advice = "check the disk or network that it is read from, or allow more by compute.timeout_s"
                raise UserError(f"{self.what} {step} did not come within {self.timeout_s:g} s: {advice}")
            outcome = self._made.pop(step)
            self._aim(wanted[1:])
        return outcome

    def _aim(self, wanted: range) -> None:
        """Set the steps to compute and discard values of others. The caller has the lock."""
        self._wanted = wanted
        self._made = {step: outcome for step, outcome in self._made.items() if step in wanted}
        self._changed.notify_all()

    def _next(self) -> int | None:
        """The first wanted step without a value. The caller has the lock."""
        return next((step for step in self._wanted if step not in self._made), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                step = self._next()
                if self._closed or step is None:
                    return
            outcome = self._outcome(step)
            with self._changed:
                if step in self._wanted:  # else it is no longer wanted
                    self._made[step] = outcome
                    self._changed.notify_all()
            del outcome  # at most `depth` values are in memory

    def _outcome(self, step: int) -> Value | _Failure:
        try:
            return self.make(step)
        except BaseException as error:  # raised by `take`: no error may end the thread
            return _Failure(error)


class _Failure:
    """An error that `make` raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
