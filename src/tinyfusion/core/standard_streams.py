"""Standard streams of a command that may be closed, full, or unable to write a name: what is printed then, and what is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import disk_reason


class _Stream:
    """A text stream; characters that it cannot encode, such as bytes of a name that is not UTF-8, are escaped.

    lossy: what cannot be written is dropped; else it is a UserError, or BrokenPipeError where the reader has gone.
    """

    def __init__(self, stream: Any, lossy: bool) -> None:
        self._stream, self._lossy = stream, lossy
        self.failed = False

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Any, *given: str) -> None:
        try:
            call(*given)
        except OSError as error:
            self.failed = True
            if self._lossy:
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"cannot write standard output: {disk_reason(error)}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Within it, messages on standard error never fail, and standard output fails with a UserError, at `flush` at the latest.

    A closed stream is the null device, so that no file that is opened later takes its number and gets what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    nothing = open(os.devnull, "w") if None in before else None  # noqa: SIM115  # closed below
    out = _Stream(sys.stdout or nothing, lossy=False)
    sys.stdout, sys.stderr = out, _Stream(sys.stderr or nothing, lossy=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if out.failed:  # what is left in its buffer would fail again at the end of the program
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if nothing is not None:
            nothing.close()
