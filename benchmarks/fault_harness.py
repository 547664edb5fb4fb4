"""Kill trainings at random moments, continue each by the same command, and compare the end with an undisturbed one.

    python benchmarks/fault_harness.py [--kills 30] [--signals 40] [--seed 0] [--teacher digits] [--device cpu]
        [--out docs/results/faults.md]

Learning a mask (`prune`), recovery by masked distillation (`recover`) and routers (`dynamic`) of the shipped digits model, as
processes of the command line. A kill is SIGKILL, SIGTERM or SIGINT, at one of four moments: somewhere in start-up, at a random step, as
soon as an unfinished checkpoint is seen on the disk, and while the result is being written after the last step. A run
is killed up to `--per-run` times before it may end. After every death each checkpoint that can be seen must agree with
its SHA256SUMS, and after SIGTERM and SIGINT within the training the next sitting must go on at the very step where this one stopped.
At the end plan, weights (averaged and raw) and the logged numbers of every step, but for times, must be equal bit for bit to
those of a run that nobody disturbed. SIGUSR1 is sent to one more run of each stage: a checkpoint must come, and training go on.
Of two processes under torchrun one is killed: the other must end and say why, and the same command go on.
`--signals` stops all verbs at random moments, in a `__del__` too: see `random_signals.py`. With `--kills 0` that is all.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from random_signals import Stop, random_signals, summary
from tinyfusion.core.rundir import write_text

EVERY = 5  # steps between two checkpoints
PATIENCE_S = 180.0  # for anything that is waited for
SIGNALS = (
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGINT,
)  # half of the kills leave no time for anything
MOMENTS = ("step", "checkpoint", "step", "checkpoint", "start-up")
FEWER = ("--set", "dynamic.calibration_images=0", "--set", "dynamic.finish_steps=10")
TIMED = {"seconds", "waiting"}  # fields of a log line that a clock decides


@dataclass(frozen=True)
class Stage:
    """One verb, and what it writes. section: of the recipe."""

    verb: str
    section: str
    options: tuple[str, ...]
    models: tuple[str, ...]
    files: tuple[str, ...] = ()


@dataclass
class Kill:
    """One sitting that was ended. trained: it made steps of its own; done: steps logged when it was dead; unfinished: it left a
    half-written checkpoint; resumed: where the next sitting that trained began.
    """

    stage: str
    run: int
    signal: signal.Signals
    moment: str
    trained: bool = True
    done: int = 0
    unfinished: bool = False
    code: int = 0
    resumed: int | None = None
    faults: list[str] = field(default_factory=list)


@dataclass
class Harness:
    """Where runs lie, and how they are started."""

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
        """One sitting; what it says goes to a file beside the run."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        with open(out.with_suffix(".err"), "ab") as said:
            return subprocess.Popen(
                self.command(stage, out), cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=said
            )

    def finish(self, stage: Stage, out: Path) -> None:
        """A sitting to the end. Raises RuntimeError unless it ends well."""
        code = self.start(stage, out).wait(PATIENCE_S)
        if code:
            raise RuntimeError(f"{stage.verb} in {out} ended with {code}:\n{out.with_suffix('.err').read_text()}")


def undisturbed(harness: Harness, stage: Stage) -> float:
    """A whole run that nobody ends; its seconds. Notes how long it takes until a training begins."""
    out, began = harness.folder / stage.verb, time.perf_counter()
    process = harness.start(stage, out)
    wait_until(lambda: started_from(out), process, 0.01)
    harness.startup_s = time.perf_counter() - began
    if process.wait(PATIENCE_S):
        raise RuntimeError(f"{stage.verb} in {out} ended badly:\n{out.with_suffix('.err').read_text()}")
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------- what is on the disk


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log, without what a clock decides."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def unfinished(out: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list((out / "checkpoints").glob(".step-*.part"))


def started_from(out: Path) -> list[int]:
    """The step at which every sitting that reached its first step began."""
    path = out / "log.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [int(line.rsplit(" ", 1)[1]) for line in lines if ", from step " in line]


def unsound(out: Path) -> list[str]:
    """Checkpoints whose bytes are not those of their SHA256SUMS."""
    wrong = []
    for path in sorted((out / "checkpoints").glob("step-*")):
        sums = dict(reversed(line.split("  ")) for line in (path / "SHA256SUMS").read_text().splitlines())
        found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir() if f.name != "SHA256SUMS"}
        if not found or sums != found:
            wrong.append(f"{path.name} is not what its sums say")
    return wrong


def outcome(stage: Stage, out: Path) -> dict[str, Any]:
    """Everything that must not depend on kills."""
    found: dict[str, Any] = {"metrics": metrics_of(out)}
    for name in stage.models:
        found[name] = hashlib.sha256((out / name / "model.safetensors").read_bytes()).hexdigest()
        found[f"{name} facts"] = untimed(json.loads((out / name / "model.json").read_text(encoding="utf-8")))
    for name in stage.files:
        found[name] = untimed(json.loads((out / name).read_text(encoding="utf-8")))
    return found


def untimed(values: Any) -> Any:
    """A plan or the facts of a model without seconds."""
    if isinstance(values, dict):
        return {k: untimed(v) for k, v in values.items() if k != "seconds"}
    return values


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What of an outcome is not as it should be."""
    return [name for name in wanted if found.get(name) != wanted[name]]


# ------------------------------------------------------------------------------------------------------------------- kills


def wait_until(what: Callable[[], object], process: subprocess.Popen[bytes], pause_s: float = 0.001) -> bool:
    """Whether `what` came true while the process lived."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"waited {PATIENCE_S:g} s in vain")
        time.sleep(pause_s)
    return True


def lines_in(out: Path) -> int:
    """Steps logged so far, counted cheaply."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def reach(harness: Harness, out: Path, process: subprocess.Popen[bytes], moment: str, chance: random.Random) -> bool:
    """Wait for the moment; whether the process still lives then."""
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
    if first >= harness.steps - 1:  # all steps are done, and nothing is left to aim at
        return False
    aim = chance.randrange(first, min(first + max((harness.steps - first) // 2, EVERY), harness.steps - 1))
    if not wait_until(lambda: lines_in(out) > aim, process):
        return False
    if moment == "checkpoint":
        return wait_until(lambda: unfinished(out), process, 0.0)
    time.sleep(chance.uniform(0.0, 0.05))
    return process.poll() is None


def sit(harness: Harness, stage: Stage, out: Path, kill: Kill, chance: random.Random) -> bool:
    """Start a sitting and end it as `kill` says; False where it was done before."""
    sittings = len(started_from(out))
    process = harness.start(stage, out)
    if not reach(harness, out, process, kill.moment, chance):
        process.wait(PATIENCE_S)
        return False
    process.send_signal(kill.signal)
    code = process.wait(PATIENCE_S)
    if code == 0:  # it was faster
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
    """One run with up to `num_kills` kills, and its end. Kills that came too late are not among those returned."""
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
    """Tell the kills that still wait for it where training went on: the ones since the last sitting that trained."""
    starts = started_from(out)
    for kill in kills:
        if kill.resumed is None and len(starts) > before:
            kill.resumed = starts[before]


def judge(kills: list[Kill], stage: Stage, out: Path, wanted: dict[str, Any], steps: int) -> None:
    """Add to the kills of a run what is wrong with its end."""
    wrong = [f"{name} differs" for name in differences(outcome(stage, out), wanted)]
    left = [p.name for p in out.rglob(".*") if p.suffix in (".part", ".old")]
    wrong += [f"left {', '.join(left)}"] if left else []
    for kill in kills:
        kill.faults += wrong
        if kill.resumed is None:
            kill.resumed = steps  # the training was over


def save_request(harness: Harness, stage: Stage, chance: random.Random) -> Kill:
    """SIGUSR1 between two checkpoints: it is saved, training goes on; then SIGKILL, to see that it continues from there."""
    out = harness.folder / f"{stage.verb}-usr1"
    process = harness.start(stage, out)
    kill = Kill(stage.verb, 0, signal.SIGUSR1, "step")
    aim = EVERY * chance.randrange(1, harness.steps // EVERY - 2) + 1
    wait_until(lambda: lines_in(out) > aim, process)
    process.send_signal(signal.SIGUSR1)

    def asked() -> list[int]:
        steps = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")]
        return [step for step in steps if step % EVERY]

    if not wait_until(asked, process):
        kill.faults.append("nothing was saved")
    else:
        saved = asked()[0]
        if not wait_until(lambda: lines_in(out) > saved + 1, process):
            kill.faults.append("training did not go on")
    process.kill()
    process.wait(PATIENCE_S)
    kill.code, kill.done = 0, len(metrics_of(out))
    kill.faults += unsound(out)
    harness.finish(stage, out)
    kill.resumed = started_from(out)[-1]
    if kill.resumed <= aim:
        kill.faults.append(f"went on from {kill.resumed}, which is before the request at {aim}")
    return kill


@dataclass
class Company:
    """Two processes under torchrun, of which one was killed. ended_s: seconds until nothing was left."""

    done: int
    ended_s: float
    resumed: int
    faults: list[str]


def lost_process(harness: Harness, stage: Stage, chance: random.Random) -> Company:
    """SIGKILL one of two processes that torchrun started; then the same command, against two that nobody disturbed."""
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
    faults = [] if process.wait(PATIENCE_S) else ["torchrun said that all was well"]
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.01)
    ended_s = time.perf_counter() - began
    said = out.with_suffix(".err").read_text(encoding="utf-8")
    if "has lost another one, which ended or hangs" not in said or "this is a bug" in said:
        faults.append("the one that was left did not say why it ended")
    done = len(metrics_of(out))
    faults += unsound(out)
    two.finish(stage, out)
    faults += [f"{name} differs" for name in differences(outcome(stage, out), outcome(stage, wanted))]
    return Company(done, ended_s, started_from(out)[-1], faults)


# --------------------------------------------------------------------------------------------------------------------- page


def made_again(kill: Kill) -> int:
    """Steps that the sitting had done, and that had to be made once more."""
    return max(kill.done - (kill.resumed or 0), 0) if kill.trained else 0


def page(
    harness: Harness,
    kills: list[Kill],
    asked: list[Kill],
    company: Company,
    options: argparse.Namespace,
    minutes: float,
) -> str:
    """The result as Markdown."""
    survived = sum(not kill.faults for kill in kills)
    aimed = [kill for kill in kills if kill.moment == "checkpoint"]
    half = [kill for kill in kills if kill.unfinished]
    runs = {(kill.stage, kill.run) for kill in kills}
    lost = {
        kind: max((made_again(k) for k in kills if (k.signal == signal.SIGKILL) == kind), default=0)
        for kind in (True, False)
    }
    saved = sum(not kill.faults for kill in asked)
    rows = [
        "# Kills",
        "",
        f"**{survived} of {len(kills)} kills left no trace in the result.** {len(runs)} runs of `prune` (mask learning), "
        f"`recover` (masked distillation) and `dynamic` (routers) on `{options.teacher}`, {harness.steps} steps each, checkpoint "
        f"every {EVERY}, were killed {len(kills)} times at random moments and each time continued by the same command. In the "
        "end plan, averaged and raw weights, and the logged numbers of every step are equal, bit for bit, to those of a run "
        "that nobody disturbed.",
        "",
        f"Made by `python benchmarks/fault_harness.py --kills {options.kills} --seed {options.seed}` in {minutes:.1f} minutes "
        f"({harness.device}, {os.cpu_count()} cores, {harness.threads} thread a process).",
        "",
        f"- {len(aimed)} kills were aimed at the moment a checkpoint is written; {len(half)} of all kills left an unfinished one "
        "behind, which the next sitting cleared away.",
        "- After every death the exit code (128 + the signal's number) and every finished checkpoint (against its SHA256SUMS) were "
        "checked; what was not right stands in the last column.",
        f"- SIGKILL cost {lost[True]} steps at most, which were made again; SIGTERM and SIGINT {lost[False]}.",
        f"- SIGUSR1: {saved} of {len(asked)} requests gave a checkpoint between two regular ones; training went on, and after "
        "a SIGKILL continued from a step at or after it.",
        f"- Two processes under torchrun: one was killed by SIGKILL after {company.done} steps, {company.ended_s:.1f} s later nothing "
        f"was left of the other, which had said why; the same command continued from {company.resumed} to what two undisturbed "
        f"processes give: {'; '.join(company.faults) or 'equal'}.",
        "",
        "| run | signal | moment | steps done | unfinished checkpoint left | exit code | continued from | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kill in [*kills, *asked]:
        cells = [
            f"{kill.stage} {kill.run}" if kill.run else f"{kill.stage} (saved on request)",
            kill.signal.name,
            kill.moment,
            str(kill.done),
            "yes" if kill.unfinished else "",
            str(kill.code) if kill.run else "went on",
            "the result" if kill.resumed == harness.steps else str(kill.resumed),
            "; ".join(kill.faults) or "equal",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


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
    wanted, kills, asked = {}, [], []
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
            told = "; ".join(kill.faults) or "equal"
            print(f"{kill.stage} {kill.run}: {kill.signal.name} at {kill.moment}, {kill.done} steps done, "
                  f"continued from {kill.resumed}: {told}", flush=True)  # fmt: skip
    for stage in stages:
        kill = save_request(harness, stage, chance)
        judge([kill], stage, folder / f"{stage.verb}-usr1", wanted[stage.verb], harness.steps)
        print(
            f"{kill.stage}: SIGUSR1 after {kill.done} steps: {'; '.join(kill.faults) or 'saved, and went on'}",
            flush=True,
        )
        asked.append(kill)
    company = lost_process(harness, stages[0], chance)
    print(f"two processes: {'; '.join(company.faults) or 'equal'}", flush=True)
    good = not company.faults and not any(kill.faults for kill in [*kills, *asked, *stops])
    minutes = (time.perf_counter() - began) / 60
    print(f"{sum(not kill.faults for kill in kills)} of {len(kills)}, {minutes:.1f} minutes")
    if options.out:
        more = f"\n{summary(stops)}.\n" if stops else ""
        write_text(options.out, page(harness, kills, asked, company, options, minutes) + more)
    return ended(folder, good)


def ended(folder: Path, good: bool) -> int:
    """The exit code; what did not go well is kept."""
    if good:
        shutil.rmtree(folder)
    else:
        print(f"the runs are kept in {folder}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
