"""Kill trainings at random moments, resume each by the same command, and compare the result with an uninterrupted run.

    python benchmarks/fault_harness.py [--kills 30] [--signals 40] [--seed 0] [--teacher digits] [--device cpu]
        [--out docs/results/faults.md]

Runs mask learning (`prune`), masked distillation (`recover`) and routers (`dynamic`) of the shipped digits model as processes of
the command line. A kill is SIGKILL, SIGTERM or SIGINT during start-up, at a random step, while a checkpoint is being written
or while the result is being written. A run is killed up to `--per-run` times. After each kill every complete checkpoint must
match its SHA256SUMS; after SIGTERM and SIGINT during training the next process must resume at exactly the step that was
reached. At the end plan, weights (averaged and raw) and logged numbers, times excepted, must be bit-equal to those of an
uninterrupted run. One more run per stage gets SIGUSR1: a checkpoint must be written and training continue. Of two ranks
under torchrun one is killed: the other must exit with the cause, and the same command resume. `--signals` stops all verbs at
random moments, also within a `__del__`: see `random_signals.py`. `--kills 0` runs that alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_results import (
    Kill,
    LostRank,
    Stage,
    differences,
    metrics_of,
    outcome,
    page,
    started_from,
    unfinished,
    unsound,
)
from random_signals import Stop, random_signals, summary
from tinyfusion.core.rundir import write_text

EVERY = 5  # steps between checkpoints
TIMEOUT_S = 600.0  # also of a machine under load
SIGNALS = (
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGINT,
)  # half of the kills are SIGKILL
MOMENTS = ("step", "checkpoint", "step", "checkpoint", "start-up")
FEWER = ("--set", "dynamic.calibration_images=0", "--set", "dynamic.finish_steps=10")


@dataclass
class Harness:
    """The folder of the runs and their common settings."""

    folder: Path
    steps: int
    teacher: str
    device: str
    threads: int
    launcher: tuple[str, ...] = ()  # modules and options before "tinyfusion"
    startup_s: float = 0.0

    def command(self, stage: Stage, out: Path) -> list[str]:
        """The command of a stage; the same one continues."""
        values = {
            "steps": self.steps, "batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.9, "log_every_steps": 1,
            "checkpoint_every_steps": EVERY,
        }  # fmt: skip
        sets = [f"{stage.section}.training.{name}={value}" for name, value in values.items()]
        chosen = [part for text in sets for part in ("--set", text)]
        options = ["--teacher", self.teacher, "--device", self.device, *stage.options, *chosen]
        return [sys.executable, "-m", *self.launcher, "tinyfusion", stage.verb, *options, "--out", str(out)]

    def start(self, stage: Stage, out: Path) -> subprocess.Popen[bytes]:
        """Start a process; its stderr goes to OUT.err."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        with open(out.with_suffix(".err"), "ab") as stderr:
            return subprocess.Popen(
                self.command(stage, out), cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def finish(self, stage: Stage, out: Path) -> None:
        """Run a command to its end. Raises RuntimeError on another exit code than 0."""
        code = self.start(stage, out).wait(TIMEOUT_S)
        if code:
            raise RuntimeError(f"{stage.verb} in {out} ended with {code}:\n{out.with_suffix('.err').read_text()}")


def undisturbed(harness: Harness, stage: Stage) -> float:
    """Run a stage uninterrupted and return its seconds; also records how long start-up takes."""
    out, began = harness.folder / stage.verb, time.perf_counter()
    process = harness.start(stage, out)
    wait_until(lambda: started_from(out), process, 0.01)
    harness.startup_s = time.perf_counter() - began
    if process.wait(TIMEOUT_S):
        raise RuntimeError(f"{stage.verb} in {out} failed:\n{out.with_suffix('.err').read_text()}")
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------------- kills


def wait_until(what: Callable[[], object], process: subprocess.Popen[bytes], pause_s: float = 0.001) -> bool:
    """Wait until `what()` is true; False if the process exits first."""
    deadline = time.monotonic() + TIMEOUT_S
    while not what():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"waited {TIMEOUT_S:g} s for a condition that did not become true")
        time.sleep(pause_s)
    return True


def lines_in(out: Path) -> int:
    """Steps logged so far, counted cheaply."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def reach(harness: Harness, out: Path, process: subprocess.Popen[bytes], moment: str, chance: random.Random) -> bool:
    """Wait until the run is at `moment`; False if the process exits first."""
    if moment == "start-up":
        time.sleep(chance.uniform(0.0, harness.startup_s))
        return process.poll() is None
    sitting = len(started_from(out)) + 1
    if not wait_until(lambda: len(started_from(out)) >= sitting, process, 0.01):
        return False
    if moment == "result":
        wanted = ("plan.json", "student", "student-raw")
        return wait_until(lambda: any(e.name.split(".")[1:2] in [[w] for w in wanted] for e in out.glob(".*.part"))
                          or any((out / w).exists() for w in wanted), process, 0.0002)  # fmt: skip
    first = started_from(out)[-1]
    if first >= harness.steps - 1:  # all steps are done
        return False
    aim = chance.randrange(first, min(first + max((harness.steps - first) // 2, EVERY), harness.steps - 1))
    if not wait_until(lambda: lines_in(out) > aim, process):
        return False
    if moment == "checkpoint":
        return wait_until(lambda: unfinished(out), process, 0.0)
    time.sleep(chance.uniform(0.0, 0.05))
    return process.poll() is None


def sit(harness: Harness, stage: Stage, out: Path, kill: Kill, chance: random.Random) -> bool:
    """Start a process and kill it as `kill` says; False if it finished before."""
    sittings = len(started_from(out))
    process = harness.start(stage, out)
    if not reach(harness, out, process, kill.moment, chance):
        process.wait(TIMEOUT_S)
        return False
    process.send_signal(kill.signal)
    code = process.wait(TIMEOUT_S)
    if code == 0:  # it finished first
        return False
    kill.code = 128 - code if code < 0 else code
    kill.done, kill.unfinished = len(metrics_of(out)), bool(unfinished(out))
    if kill.code != 128 + kill.signal:
        kill.faults.append(f"exit code {kill.code}")
    kill.faults += unsound(out)
    kill.trained = len(started_from(out)) > sittings
    if kill.trained and kill.signal != signal.SIGKILL and kill.moment != "result":
        newest = max((int(p.name.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*")), default=0)
        if newest != kill.done:
            kill.faults.append(f"stopped after {kill.done} steps, saved {newest}")
    return True


def journey(harness: Harness, stage: Stage, number: int, num_kills: int, chance: random.Random) -> list[Kill]:
    """Kill one run up to `num_kills` times and let it finish; kills that came too late are not returned."""
    out = harness.folder / f"{stage.verb}-{number}"
    kills: list[Kill] = []
    for index in range(num_kills):
        moment = "result" if index == num_kills - 1 and number % 2 else chance.choice(MOMENTS)
        kill = Kill(stage.verb, number, chance.choice(SIGNALS), moment)
        before = len(started_from(out))
        happened = sit(harness, stage, out, kill, chance)
        note_resumed(kills, out, before)
        if not happened:
            break
        kills.append(kill)
    before = len(started_from(out))
    harness.finish(stage, out)
    note_resumed(kills, out, before)
    return kills


def note_resumed(kills: list[Kill], out: Path, before: int) -> None:
    """Set `resumed` of the kills since the last process that trained."""
    starts = started_from(out)
    for kill in kills:
        if kill.resumed is None and len(starts) > before:
            kill.resumed = starts[before]


def judge(kills: list[Kill], stage: Stage, out: Path, wanted: dict[str, Any], steps: int) -> None:
    """Add the faults of the final result to the kills of its run."""
    wrong = [f"{name} differs" for name in differences(outcome(stage, out), wanted)]
    left = [p.name for p in out.rglob(".*") if p.suffix in (".part", ".old")]
    wrong += [f"left {', '.join(left)}"] if left else []
    for kill in kills:
        kill.faults += wrong
        if kill.resumed is None:
            kill.resumed = steps  # the training was over


def save_request(harness: Harness, stage: Stage, chance: random.Random) -> Kill:
    """Send SIGUSR1 between two checkpoints, which must save one; then SIGKILL, after which training must resume from it."""
    out = harness.folder / f"{stage.verb}-usr1"
    process = harness.start(stage, out)
    kill = Kill(stage.verb, 0, signal.SIGUSR1, "step")
    aim = EVERY * chance.randrange(1, harness.steps // EVERY - 2) + 1
    wait_until(lambda: lines_in(out) > aim, process)
    process.send_signal(signal.SIGUSR1)

    def requested() -> list[int]:
        steps = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")]
        return [step for step in steps if step % EVERY]

    if not wait_until(requested, process):
        kill.faults.append("nothing was saved")
    else:
        saved = requested()[0]
        if not wait_until(lambda: lines_in(out) > saved + 1, process):
            kill.faults.append("training did not continue")
    process.kill()
    process.wait(TIMEOUT_S)
    kill.code, kill.done = 0, len(metrics_of(out))
    kill.faults += unsound(out)
    harness.finish(stage, out)
    kill.resumed = started_from(out)[-1]
    if kill.resumed <= aim:
        kill.faults.append(f"resumed from {kill.resumed}, which is before the request at {aim}")
    return kill


def lost_process(harness: Harness, stage: Stage, chance: random.Random) -> LostRank:
    """SIGKILL one of two ranks under torchrun, resume, and compare with two uninterrupted ranks."""
    launched = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    two = dataclasses.replace(harness, launcher=launched)
    wanted, out = harness.folder / f"{stage.verb}-two", harness.folder / f"{stage.verb}-torchrun"
    two.finish(stage, wanted)
    process = two.start(stage, out)
    aim = chance.randrange(EVERY, harness.steps - EVERY)
    wait_until(lambda: lines_in(out) > aim, process)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(chance.choice(workers), signal.SIGKILL)
    began = time.perf_counter()
    faults = [] if process.wait(TIMEOUT_S) else ["torchrun reported success"]
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.01)
    ended_s = time.perf_counter() - began
    said = out.with_suffix(".err").read_text(encoding="utf-8")
    if "has lost another one, which ended or hangs" not in said or "this is a bug" in said:
        faults.append("the other rank did not report why it ended")
    done = len(metrics_of(out))
    faults += unsound(out)
    two.finish(stage, out)
    faults += [f"{name} differs" for name in differences(outcome(stage, out), outcome(stage, wanted))]
    return LostRank(done, ended_s, started_from(out)[-1], faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signals", type=int, default=0, help="signals at random moments of all verbs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--per-run", type=int, default=5, help="kills before a run may end")
    parser.add_argument("--teacher", default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began, chance = time.perf_counter(), random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    harness = Harness(folder, options.steps, options.teacher, options.device, options.threads)
    stops: list[Stop] = []
    if options.signals:
        (folder / "signals").mkdir()
        stops = random_signals(folder / "signals", options.signals, chance)
        print(summary(stops), flush=True)
    if not options.kills:
        return ended(folder, not any(stop.faults for stop in stops))
    stages = [
        Stage("prune", "prune", ("--scheme", "1:2"), ("student",), ("plan.json",)),
        Stage("recover", "recover", ("--student", "prune"), ("student", "student-raw")),
        Stage("dynamic", "dynamic", ("--model", options.teacher, *FEWER), ("student", "student-raw")),
    ]
    wanted, kills, requests = {}, [], []
    for stage in stages:  # the student of the first is what the second trains
        seconds = undisturbed(harness, stage)
        wanted[stage.verb] = outcome(stage, folder / stage.verb)
        print(f"{stage.verb}: {seconds:.1f} s undisturbed", flush=True)
    number = 0
    while len(kills) < options.kills:
        stage = stages[number % len(stages)]
        number += 1
        due = min(options.per_run, options.kills - len(kills))
        found = journey(harness, stage, number, due, chance)
        judge(found, stage, folder / f"{stage.verb}-{number}", wanted[stage.verb], harness.steps)
        kills += found
        for kill in found:
            result = "; ".join(kill.faults) or "equal"
            print(f"{kill.stage} {kill.run}: {kill.signal.name} at {kill.moment}, {kill.done} steps done, "
                  f"continued from {kill.resumed}: {result}", flush=True)  # fmt: skip
    for stage in stages:
        kill = save_request(harness, stage, chance)
        judge([kill], stage, folder / f"{stage.verb}-usr1", wanted[stage.verb], harness.steps)
        print(
            f"{kill.stage}: SIGUSR1 after {kill.done} steps: {'; '.join(kill.faults) or 'saved, and continued'}",
            flush=True,
        )
        requests.append(kill)
    lost = lost_process(harness, stages[0], chance)
    print(f"two processes: {'; '.join(lost.faults) or 'equal'}", flush=True)
    good = not lost.faults and not any(kill.faults for kill in [*kills, *requests, *stops])
    minutes = (time.perf_counter() - began) / 60
    print(f"{sum(not kill.faults for kill in kills)} of {len(kills)}, {minutes:.1f} minutes")
    if options.out:
        more = f"\n{summary(stops)}.\n" if stops else ""
        made_by = (
            f"Made by `python benchmarks/fault_harness.py --kills {options.kills} --seed {options.seed}` in {minutes:.1f} minutes "
            f"({options.device}, {os.cpu_count()} cores, {options.threads} thread a process)."
        )
        write_text(options.out, page(kills, requests, lost, options.steps, EVERY, made_by) + more)
    return ended(folder, good)


def ended(folder: Path, good: bool) -> int:
    """The exit code; removes the folder of runs unless something failed."""
    if good:
        shutil.rmtree(folder)
    else:
        print(f"the runs are in {folder}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
