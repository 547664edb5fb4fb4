"""Commands in a process that a call kills, and in several processes, which are threads here."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tinyfusion.cli import execute, main, parse


def killed_at(owner: Any, name: str, count: int, command: str) -> None:
    """Run a command in a fork that SIGKILL ends at call `count` (from 0) of `owner.name`; of `mark`, at one with "done"."""
    child = os.fork()
    if child == 0:
        try:
            original, calls = getattr(owner, name), itertools.count()

            def armed(*arguments: Any, **named: Any) -> Any:
                if (name != "mark" or "done" in arguments) and next(calls) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **named)

            setattr(owner, name, armed)
            main(shlex.split(command))
        finally:
            os._exit(77)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, (name, count)


def together(
    world: int, command: str, monkeypatch: pytest.MonkeyPatch, modules: Sequence[Any], apart: Sequence[tuple[Any, str]]
) -> None:
    """A command in `world` processes, here as many threads: they know of each other by files alone.

    modules: that ask for the rank. apart: functions (owner, name) for one thread at a time: diffusers changes `nn.Module` for all
    threads while it opens a model, and two at once leave it changed.
    """
    known, failures, opening = threading.local(), [], threading.Lock()
    for module in modules:
        monkeypatch.setattr(module, "launched_rank", lambda: known.rank)
        if hasattr(module, "launched_processes"):
            monkeypatch.setattr(module, "launched_processes", lambda: world)

    def one_by_one(original: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any) -> Any:
            with opening:
                return original(*arguments)

        return locked

    for owner, name in apart:
        monkeypatch.setattr(owner, name, one_by_one(getattr(owner, name)))

    def process(rank: int) -> None:
        known.rank = rank
        try:
            execute(*parse(shlex.split(command)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in reversed(range(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    monkeypatch.undo()
