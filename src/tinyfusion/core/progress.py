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
    """Report progress: how many units are done now, and a short note."""

    def __call__(self, done: int, note: str = "", /) -> None:
        """`done` units of the total are done."""
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
        left_s = (self.total - done) / rate
        end = f"  {note}" if note else ""
        print(
            f"{self.title}: {done:,} of {self.total:,} {self.unit}, {_significant(rate)}/s, {_time(left_s)} left{end}",
            file=sys.stderr,
        )


def _significant(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _time(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """A bar of `total` units, of which `done` are complete. shown: False on all ranks but the first.

    Each report also checks for a signal whose exception was dropped (`check_stop`).
    """
    with _shown(title, total, unit, done) if shown else nullcontext(_silent) as bar:

        def advance(done: int, note: str = "") -> None:
            check_stop()
            bar(done, note)

        yield advance


def _silent(_done: int, _note: str = "", /) -> None:
    pass


@contextmanager
def _shown(title: str, total: int, unit: str, done: int) -> Iterator[Advance]:
    """A bar on a terminal, lines elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Lines(title, total, unit, done)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit}/s" if task.speed else f"- {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda done, note="": bar.update(task, completed=done, note=note)
