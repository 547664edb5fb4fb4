"""Progress with rate and remaining time on stderr: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

from tinyfusion.core.launch import launched_rank
from tinyfusion.core.signals import check_stop


def say(lines: Iterable[str]) -> None:
    """Print lines on stderr, in the first of several processes."""
    for line in lines if launched_rank() == 0 else ():
        print(line, file=sys.stderr)


class Advance(Protocol):
    """Reports that `done` units are complete, with a short note."""

    def __call__(self, done: int, note: str = "", /) -> None:  # noqa: D102
        ...


_LINE_EVERY_S = 30.0


class _Lines:
    """Progress lines for logs, the first after half a minute, so short work prints none."""

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.first = title, total, unit, done
        self.began = self.printed = time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.printed < _LINE_EVERY_S or done == self.first:
            return
        self.printed = now
        rate = (done - self.first) / (now - self.began)
        speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        left = f"{_time((self.total - done) / rate)} left" + (f"  {note}" if note else "")
        print(f"{self.title}: {done:,} of {self.total:,} {self.unit}, {speed}, {left}", file=sys.stderr)


def _time(seconds: float) -> str:
    """A duration such as 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """A bar of `total` units, of which `done` are complete. shown: False on all ranks but the first.

    Each report also checks for a signal whose exception was dropped (`check_stop`).
    """
    with _bar(title, total, unit, done) if shown else nullcontext() as bar:

        def advance(done: int, note: str = "") -> None:
            check_stop()
            if bar is not None:
                bar(done, note)

        yield advance


@contextmanager
def _bar(title: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Lines(title, total, unit, done)
        return
    from rich import console, progress, text

    class Rate(progress.ProgressColumn):
        def render(self, task: progress.Task) -> text.Text:
            return text.Text(f"{task.speed:.1f} {unit}/s" if task.speed else f"- {unit}/s")

    described, note_column = progress.TextColumn("{task.description}"), progress.TextColumn("{task.fields[note]}")
    amounts = progress.BarColumn(), progress.MofNCompleteColumn(), Rate(), progress.TimeRemainingColumn()
    terminal = console.Console(stderr=True)
    with progress.Progress(described, *amounts, note_column, console=terminal, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)
