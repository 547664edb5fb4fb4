"""Interruption: SIGINT and SIGTERM end a verb with what it has saved, SIGUSR1 asks a training for a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_DEFAULT = "what was finished is kept, the same command continues"


class Interrupted(BaseException):
    """Ended by a signal. No `Exception`, like KeyboardInterrupt: it comes from anywhere, and nobody may take it for a fault.

    kept: what became of the work, for people.
    """

    def __init__(self, signum: int, kept: str = _DEFAULT) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}; {kept}")
        self.signum = signum


class SignalWatch:
    """Context that turns signals into Interrupted: at once, or when the block asks.

    patient: signals are noted in `stop` and `save`, and the block acts between its steps; a stop that it did not act
    on is raised at its end. Otherwise Interrupted is raised where the program stands, and SIGUSR1 does nothing. Watches
    nest. After the first SIGINT or SIGTERM further ones are ignored, but for SIGINT, which then acts at once. Does
    nothing outside the main thread.
    """

    def __init__(self, patient: bool = True) -> None:
        self.patient = patient
        self.stop: int | None = None
        self.save = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, SignalWatch) and outer.stop is None:
                outer.stop = self.stop  # it has acted on it: a second signal must not disturb the saving
        if kind is None and self.patient and self.stop is not None:
            raise Interrupted(self.stop)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGUSR1:
            self.save = True
        elif self.stop is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
        else:
            self.stop = signum
            if not self.patient:
                raise Interrupted(signum)
