"""Results of `fault_harness.py`: files of a run, records of kills, and the page."""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared import table

TIMED = {"seconds", "waiting"}  # fields of metrics.jsonl that are times


@dataclass(frozen=True)
class Stage:
    """A verb, its section of the recipe, and the models and files that it writes."""

    verb: str
    section: str
    options: tuple[str, ...]
    models: tuple[str, ...]
    files: tuple[str, ...] = ()


@dataclass
class Kill:
    """One killed process. trained: it completed steps; done: steps logged at its end; unfinished: it left an unfinished
    checkpoint; resumed: first step of the next process that trained.
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
class LostRank:
    """The outcome after one of two ranks under torchrun was killed. ended_s: seconds until the other exited."""

    done: int
    ended_s: float
    resumed: int
    faults: list[str]


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Complete lines of a run's metrics, without times."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def unfinished(out: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list((out / "checkpoints").glob(".step-*.part"))


def started_from(out: Path) -> list[int]:
    """First step of every process of the run that reached one."""
    path = out / "log.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [int(line.rsplit(" ", 1)[1]) for line in lines if ", from step " in line]


def unsound(out: Path) -> list[str]:
    """Messages about checkpoints that do not match their SHA256SUMS."""
    wrong = []
    for path in sorted((out / "checkpoints").glob("step-*")):
        sums = dict(reversed(line.split("  ")) for line in (path / "SHA256SUMS").read_text().splitlines())
        found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir() if f.name != "SHA256SUMS"}
        if not found or sums != found:
            wrong.append(f"{path.name} is not what its sums say")
    return wrong


def outcome(stage: Stage, out: Path) -> dict[str, Any]:
    """All results that must not depend on kills."""
    found: dict[str, Any] = {"metrics": metrics_of(out)}
    for name in stage.models:
        found[name] = hashlib.sha256((out / name / "model.safetensors").read_bytes()).hexdigest()
        found[f"{name} facts"] = untimed(json.loads((out / name / "model.json").read_text(encoding="utf-8")))
    for name in stage.files:
        found[name] = untimed(json.loads((out / name).read_text(encoding="utf-8")))
    return found


def untimed(values: Any) -> Any:
    """`values` (a plan or model.json) without times."""
    if isinstance(values, dict):
        return {k: untimed(v) for k, v in values.items() if k != "seconds"}
    return values


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of the results that differ."""
    return [name for name in wanted if found.get(name) != wanted[name]]


def repeated(kill: Kill) -> int:
    """Steps of the killed process that the next one repeated."""
    return max(kill.done - (kill.resumed or 0), 0) if kill.trained else 0


def kill_table(kills: list[Kill]) -> list[str]:
    """Markdown table: a row for every stage and signal."""
    groups: dict[tuple[str, str], list[Kill]] = {}
    for kill in kills:
        groups.setdefault((kill.stage, kill.signal.name), []).append(kill)
    rows = []
    for (stage, name), group in sorted(groups.items()):
        moments = Counter(kill.moment for kill in group)
        codes = sorted({str(kill.code) if kill.run else "continued" for kill in group})
        faults = [fault for kill in group for fault in kill.faults]
        rows.append([
            stage, name, str(len(group)), ", ".join(f"{moment} {count}" for moment, count in sorted(moments.items())),
            ", ".join(codes), str(sum(kill.unfinished for kill in group)), str(max(map(repeated, group))),
            "; ".join(faults) or "equal",
        ])  # fmt: skip
    head = [
        "verb",
        "signal",
        "kills",
        "moments",
        "exit code",
        "unfinished checkpoints",
        "steps repeated, at most",
        "result",
    ]
    return table(head, *rows)


def page(kills: list[Kill], requests: list[Kill], lost: LostRank, steps: int, every: int, made_by: str) -> str:
    """The result as Markdown."""
    survived, saved = (sum(not kill.faults for kill in group) for group in (kills, requests))
    runs = {(kill.stage, kill.run) for kill in kills}
    rows = [
        "# Kills",
        "",
        f"**After {survived} of {len(kills)} kills the result equals that of an uninterrupted run.** {len(runs)} runs of `prune` (mask "
        f"learning), `recover` (masked distillation) and `dynamic` (routers), {steps} steps each, a checkpoint every {every}, were killed "
        f"{len(kills)} times at random moments; the same command continued each time. Compared bit for bit: plan, averaged and raw "
        "weights, and the logged numbers of every step.",
        "",
        made_by,
        "",
        "- After every kill the exit code (128 + the signal's number) and all finished checkpoints (against their SHA256SUMS) are "
        "checked. Unfinished checkpoints are removed by the next process.",
        f"- SIGUSR1: {saved} of {len(requests)} requests wrote a checkpoint between two regular ones and training continued; after "
        "a later SIGKILL it resumed from that checkpoint or a newer one.",
        f"- Two ranks under torchrun: one was killed by SIGKILL after {lost.done} steps, the other exited {lost.ended_s:.1f} s later with "
        f"an error that names the cause. The same command resumed from step {lost.resumed}; compared with two uninterrupted ranks the "
        f"result is: {'; '.join(lost.faults) or 'equal'}.",
        "",
        *kill_table([*kills, *requests]),
    ]
    return "\n".join(rows) + "\n"
