"""Values of an address, made ahead of need: while step 7 computes, a thread makes what steps 8 and 9 will ask for.

What is made is a function of its address alone, so nothing but time depends on the depth, and any address may be asked
for next: a resumed run and a repeated step find what an uninterrupted one does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from tinyfusion.core.errors import UserError

Value = TypeVar("Value")
_CLOSING_S = 5.0  # a thread that is in the middle of something is waited for so long, then left to end with the program


class Ahead(Generic[Value]):
    """The values of `make`, up to `depth` steps ahead of the last one taken, made in order on one background thread.

    Depth 0 makes them in turn, without a thread. end: first step that nobody will want, so that nothing is made in vain.
    timeout_s: how long `take` waits at most. what: names the
    value of a step to people. `waited_s` is what all calls of `take` have waited, in seconds; in turn, that
    is all the time of making. One caller at a time; a context manager, which ends the thread.

    `make` runs without the caller's thread-local settings: give it devices with their index, and no autocast around it.
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
        self.make = make
        self.depth = depth
        self.end = end
        self.timeout_s = timeout_s
        self.what = what
        self.waited_s = 0.0
        self._changed = threading.Condition()
        self._made: dict[int, Value | _Failure] = {}
        self._wanted = range(0)
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self, step: int) -> Value:
        """`make(step)`, and the steps after it are begun. What `make` raised is raised here, at its step.

        Raises UserError where nothing came within `timeout_s`.
        """
        if self._closed:
            raise RuntimeError(f"step {step} was asked of batches that are closed")
        began = time.perf_counter()
        try:
            outcome = self._awaited(step) if self.depth else self.make(step)
        finally:
            self.waited_s += time.perf_counter() - began
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    def close(self) -> None:
        """End the thread; what it has made is thrown away. Returns in a bounded time, whatever the thread does."""
        with self._changed:
            self._closed = True
            self._wanted = range(0)
            self._made.clear()
            self._changed.notify_all()
        # the collector may let go of an owner on any thread, this one's own too
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSING_S)

    def __enter__(self) -> Ahead[Value]:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _awaited(self, step: int) -> Value | _Failure:
        """The outcome of `step`, waited for."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="batches ahead", daemon=True)
            thread.start()
            self._thread = thread  # not before: a thread that could not be started cannot be joined
        limit = step + self.depth + 1
        wanted = range(step, limit if self.end is None else max(min(limit, self.end), step + 1))
        with self._changed:
            self._aim(wanted)
            if not self._changed.wait_for(lambda: step in self._made, self.timeout_s):
                raise UserError(
                    f"{self.what} {step} did not come within {self.timeout_s:g} s: see whether the disk or network it "
                    "is read from still answers, or allow more by compute.timeout_s"
                )
            outcome = self._made.pop(step)
            self._aim(wanted[1:])
        return outcome

    def _aim(self, wanted: range) -> None:
        """Have the thread make these; what was made for others goes. The lock is held."""
        self._wanted = wanted
        self._made = {step: outcome for step, outcome in self._made.items() if step in wanted}
        self._changed.notify_all()

    def _next(self) -> int | None:
        """The first step that is wanted and not there. The lock is held."""
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
                if step in self._wanted:  # else it is no longer asked for
                    self._made[step] = outcome
                    self._changed.notify_all()
            del outcome  # nothing is held beside what is counted

    def _outcome(self, step: int) -> Value | _Failure:
        try:
            return self.make(step)
        except BaseException as error:  # of whatever kind: it belongs to the caller, and must not end the thread
            return _Failure(error)


class _Failure:
    """What was raised instead of a value."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
