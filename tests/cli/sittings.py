"""Sittings of the command line as processes of their own, forked from one that has imported everything: quick to start."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from ports import free_port

PATIENCE_S = 60.0  # for anything that is waited for; a machine with much else to do is slow
_NEEDED = [
    "tinyfusion.options",
    "tinyfusion.commands.prune",
    "tinyfusion.commands.recover",
    "tinyfusion.commands.sample",
]
_NEEDED += [
    "accelerate",
    "peft",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed",
]  # what those import on their way


@dataclass
class Sitting:
    """A process that was started, and where what it says on stderr goes."""

    process: ForkServerProcess
    said_in: Path

    @property
    def said(self) -> str:
        return self.said_in.read_text(encoding="utf-8")

    def send(self, signum: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def end(self, within_s: float = PATIENCE_S) -> int:
        """Its exit code, as a shell has it. AssertionError where it goes on."""
        self.process.join(within_s)
        code = self.process.exitcode
        assert code is not None, f"still running after {within_s:g} s:\n{self.said}"
        return 128 - code if code < 0 else code


class Starter:
    """Starts sittings in a folder; those left over are killed by `clear`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Sitting] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_NEEDED)

    def __call__(
        self, *arguments: str, pace_s: float = 0.0, memory_bytes: int | None = None, **environment: str
    ) -> Sitting:
        """`tinyfusion ARGUMENTS`. pace_s: pause after every step; memory_bytes: limit of further memory."""
        said_in = self.folder.parent / f"said-{len(self.started)}.txt"
        target = (arguments, self.folder, said_in, pace_s, memory_bytes, environment)
        process = self._context.Process(target=_sit, args=target)
        process.start()
        self.started.append(Sitting(process, said_in))
        return self.started[-1]

    def two(
        self, *arguments: str, other: tuple[str, ...] | None = None, pace_s: float = 0.0
    ) -> tuple[Sitting, Sitting]:
        """Two processes of one training, without a launcher. other: arguments of the second."""
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        first = self(*arguments, pace_s=pace_s, RANK="0", LOCAL_RANK="0", **place)
        return first, self(*(other or arguments), pace_s=pace_s, RANK="1", LOCAL_RANK="1", **place)

    def clear(self) -> None:
        for sitting in self.started:
            if sitting.process.is_alive():
                sitting.process.kill()
            sitting.process.join()


def until(what: Callable[[], object]) -> None:
    """Wait until `what` comes true."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def _sit(
    arguments: tuple[str, ...],
    folder: Path,
    said_in: Path,
    pace_s: float,
    memory_bytes: int | None,
    environment: dict[str, str],
) -> None:
    import torch

    import tinyfusion.jobs.training
    from tinyfusion.cli import main

    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    steps = tinyfusion.jobs.training.train_steps

    def paced(*given: Any, **named: Any) -> Iterator[Any]:
        for record in steps(*given, **named):
            time.sleep(pace_s)
            yield record

    tinyfusion.jobs.training.train_steps = paced
    if memory_bytes is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    sys.exit(main(list(arguments)))
