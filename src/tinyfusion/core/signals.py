"""Signals: SIGINT and SIGTERM end a verb after saving, SIGUSR1 requests a checkpoint of a training."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from tinyfusion.core.errors import UserError


class Interrupted(BaseException):
    """Ended by a signal. Derives from BaseException so that `except Exception` does not swallow it.

    result: of the work so far, for the message.
    """

    def __init__(self, signum: int, result: str = "results so far are saved, the same command continues") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}; {result}")
        self.signum = signum


class SignalWatch:
    """Context that turns signals into Interrupted, at once or between two steps of the block.

    patient: signals are noted in `stop` and `save`, and the block acts between its steps; a stop that it did not act
    on is raised at its end. Otherwise Interrupted is raised where the program stands, and SIGUSR1 does nothing. Watches
    nest. After the first SIGINT or SIGTERM further ones are ignored while it is acted on, but for SIGINT, which then acts
    at once. Does nothing outside the main thread.

    Python drops an exception that is raised in a `__del__`, a weak reference's callback or a callback from C. The stop stays
    recorded then: `check_stop`, the next signal, or the end of the block raises it again.
    """

    def __init__(self, patient: bool = True) -> None:
        self.patient = patient
        self.stop: int | None = None
        self.save = False
        self._raised = False  # Interrupted was raised where the program stood, and may have been dropped there
        self._insisted = False
        self._closed = False
        self._old: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            check_stop()
            self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped
            _active.append(self)
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self._old:
            return
        self._closed = True  # a signal from here on is recorded and raised below
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        _active.remove(self)
        sys.unraisablehook = self._hook
        if _active and _active[-1].stop is None:
            _active[-1].stop = self.stop  # already handled: a second signal must not disturb saving
        if self.stop is not None and (kind is None or self._hides_stop(error)):
            raise Interrupted(self.stop) from error

    def check(self) -> None:
        """Raise the recorded stop where its exception was dropped."""
        if self.stop is None or _is_handling_stop(sys.exception()):
            return
        if self._insisted:
            raise KeyboardInterrupt
        if not self.patient:
            self._raise()

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGUSR1:
            self.save = True
            return
        first, self.stop = self.stop is None, signum if self.stop is None else self.stop
        if self._closed:
            return
        acted_on = self.patient or _is_handling_stop(sys.exception())
        if not self.patient and (first or not acted_on):
            self._raise()
        elif not first and signum == signal.SIGINT:
            self._insisted = True
            raise KeyboardInterrupt

    def _raise(self) -> None:
        assert self.stop is not None
        self._raised = True
        raise Interrupted(self.stop)

    def _hides_stop(self, error: BaseException | None) -> bool:
        """Whether `error` came instead of the Interrupted that was raised here: foreign code turned the one into the other."""
        if not self._raised or not isinstance(error, Exception):
            return False
        reported = isinstance(error, UserError | OSError)  # a failed clean-up
        return not (reported and _is_handling_stop(error))

    def _dropped(self, unraisable: Any) -> None:
        """Python's hook for dropped exceptions, without those of a stop, which is raised again."""
        if self.stop is None or not isinstance(unraisable.exc_value, Interrupted | KeyboardInterrupt):
            self._hook(unraisable)


_active: list[SignalWatch] = []  # of the main thread, innermost last


def check_stop() -> None:
    """Raise Interrupted where a signal was recorded and its exception dropped. Loops call it between their steps."""
    if _active and threading.current_thread() is threading.main_thread():
        _active[-1].check()


def _is_handling_stop(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised in the handling of, is a stop."""
    while error is not None and not isinstance(error, Interrupted | KeyboardInterrupt):
        error = error.__context__
    return error is not None
