"""Interruption between steps: SIGINT and SIGTERM ask for a save and an end, SIGUSR1 for a save."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A run ended by a signal after its state was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class SignalWatch:
    """Context in which signals are noted instead of acted on; the loop asks between steps. A second SIGINT acts at once."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGUSR1:
            self.save = True
        elif self.stop is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = signum
