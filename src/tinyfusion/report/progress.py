"""Progress of an unfinished run: stage, step, estimated time remaining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.core.files import file_label
from tinyfusion.report.format import duration, percent
from tinyfusion.report.load import Run

STAGES = {  # of a whole job, in order, and what is being done
    "prune": "searching for the blocks to keep",
    "recover": "recovering the student",
    "dynamic": "training routers",
    "sample": "sampling",
    "evaluate": "evaluating samples",
    "speed": "timing the models",
    "pictures": "measuring activations and speed by depth",
}
_RECENT = 20  # log lines from which the speed is taken


@dataclass(frozen=True)
class Progress:
    """How far a run is. stages: (name, "done", "now" or "open") of a whole job. share: of this stage, None where unknown.

    facts: short statements, such as the step and the remaining time.
    """

    headline: str
    facts: list[str]
    share: float | None
    stages: list[tuple[str, str]]


def progress_of(run: Run) -> Progress | None:
    """The progress of a run that is running or interrupted; None for others."""
    state, is_whole = run.record.get("state"), run.verb == "run"
    if state not in ("running", "interrupted"):
        return None
    listed = stages_of(run)
    stage = current_stage(run) if is_whole else str(run.record["verb"])
    place = listed.index(stage) if is_whole else 0
    stages = [(name, "done" if i < place else "now" if i == place else "open") for i, name in enumerate(listed)]
    words = "Running when this page was written" if state == "running" else "Interrupted; the same command continues it"
    facts, share = _training(run, stage, waits=state == "interrupted")
    if stage == "sample":
        facts = [f"{sum(name in run.samples for name in _sampled(run))} of {len(_sampled(run))} models have samples"]
    return Progress(f"{words}: {STAGES.get(stage, 'training')}", facts, share, stages if is_whole else [])


def _has_dynamic(run: Run) -> bool:
    """Whether the recipe of a whole job trains a dynamic model."""
    return bool((run.recipe.get("dynamic") or {}).get("in_run"))


def stages_of(run: Run) -> list[str]:
    """The stages of a whole job, in order."""
    return [name for name in STAGES if name != "dynamic" or _has_dynamic(run)]


def _sampled(run: Run) -> tuple[str, ...]:
    """The models that a whole job samples, in order."""
    return ("teacher", "pruned", "student", *(("dynamic",) if _has_dynamic(run) else ()))


def current_stage(run: Run) -> str:
    """The first stage of a whole job whose output is missing."""
    for stage in stages_of(run):
        if stage in ("prune", "recover", "dynamic") and run.records.get(stage, {}).get("state") != "done":
            return stage
    if any(name not in run.samples for name in _sampled(run)) and not run.notes:  # notes: samples too large to be read
        return "sample"
    references = (run.recipe.get("evaluate") or {}).get("references", ())
    if any((_sampled(run)[-1], file_label(str(name))) not in run.evaluations for name in references):
        return "evaluate"
    return "pictures" if "speed" in run.measured else "speed"


def _training(run: Run, stage: str, waits: bool) -> tuple[list[str], float | None]:
    """Step and remaining time of a training, and the share that is done. waits: the run is interrupted."""
    steps = _steps(run, stage)
    if steps is None:
        return [], None
    lines = run.metrics.get(stage, ())
    if not lines:
        return [f"no step of {steps:,} logged yet"], 0.0
    made = min(lines[-1]["step"] + 1, steps)
    facts = [f"step {made:,} of {steps:,} ({percent(made / steps)})"]
    pace = seconds_per_step(lines)
    if pace is not None and made < steps:
        left = f"about {duration(pace * (steps - made))} left in this stage"
        facts.append(left + (" once it continues" if waits else ""))
    return facts, made / steps


def _steps(run: Run, stage: str) -> int | None:
    """Steps of the training of a stage; None where the stage trains nothing, or the record has none."""
    section = run.recipe.get(stage) or {}
    if stage == "prune" and section.get("criterion", "learned") != "learned":
        return None
    training = section if stage == "train" else section.get("training") or {}
    steps, stop = training.get("steps") or 0, training.get("stop_after") or 0
    return None if steps < 1 else min(steps, stop) if stop > 0 else steps


def seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the last log lines since the run was last started: a restart sets the clock back to the last checkpoint."""
    clocked = [(line["step"] + 1, line["seconds"]) for line in lines if line.get("seconds") is not None]
    recent = clocked[-_RECENT:]
    restarts = [i for i in range(1, len(recent)) if recent[i - 1][1] > recent[i][1]]
    recent = recent[restarts[-1] if restarts else 0 :]
    if len(recent) > 1 and recent[-1][0] > recent[0][0]:
        return float((recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0]))
    return float(recent[-1][1] / recent[-1][0]) if recent else None
