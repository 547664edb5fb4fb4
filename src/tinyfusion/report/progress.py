"""How far a run is that has not ended: its stage, its step, and the time that this stage still wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.core.files import file_label
from tinyfusion.report.format import duration, percent
from tinyfusion.report.run_data import RunData

STAGES = ("prune", "recover", "dynamic", "sample", "evaluate", "speed", "pictures")
_DOING = {
    "prune": "deciding which blocks go", "recover": "recovering the student", "train": "training", "dynamic": "training routers",
    "sample": "drawing images", "evaluate": "scoring images", "speed": "timing the models", "pictures": "measuring for pictures",
}  # fmt: skip
_RECENT = 20  # log lines over which the speed is taken


@dataclass(frozen=True)
class Going:
    """How far a run is. stages: (name, "done", "now" or "open") of a whole job. share: of this stage, None where unknown.

    facts: short statements, such as the step and what is left.
    """

    headline: str
    facts: list[str]
    share: float | None
    stages: list[tuple[str, str]]


def going(run: RunData) -> Going | None:
    """None for a run that has ended."""
    state = run.record.get("state")
    if state not in ("running", "interrupted"):
        return None
    verb = str(run.record.get("verb", "run"))
    stage = current_stage(run) if verb == "run" else str(run.parts[-1].record["verb"]) if run.parts else verb
    listed = stages_of(run)
    place = listed.index(stage) if verb == "run" else 0
    stages = [(name, "done" if i < place else "now" if i == place else "open") for i, name in enumerate(listed)]
    words = "Still going when this page was made" if state == "running" else "Interrupted; the same command continues"
    facts, share = _training(run, stage, waits=state == "interrupted")
    if stage == "sample":
        drawn = _drawn(run)
        facts = [f"{sum(name in run.samples for name in drawn)} of {len(drawn)} models drawn"]
    return Going(f"{words}: {_DOING[stage]}", facts, share, stages if verb == "run" else [])


def _in_run(run: RunData) -> bool:
    """Whether the recipe of a whole job asks for a dynamic model."""
    return bool((run.recipe.get("dynamic") or {}).get("in_run"))


def stages_of(run: RunData) -> tuple[str, ...]:
    """The stages of a whole job, in order."""
    return tuple(name for name in STAGES if name != "dynamic" or _in_run(run))


def _drawn(run: RunData) -> tuple[str, ...]:
    """The models that a whole job draws from, in order."""
    return ("teacher", "pruned", "student", *(("dynamic",) if _in_run(run) else ()))


def current_stage(run: RunData) -> str:
    """The first stage of a whole job that has not left what it makes."""
    for stage in (name for name in stages_of(run) if name in ("prune", "recover", "dynamic")):
        if run.records.get(stage, {}).get("state") != "done":
            return stage
    if any(name not in run.samples for name in _drawn(run)) and not run.notes:  # notes: samples too large to be read
        return "sample"
    wanted = {file_label(str(name)) for name in (run.recipe.get("evaluate") or {}).get("references", ())}
    if not wanted <= set(run.evaluations.get(_drawn(run)[-1], {})):
        return "evaluate"
    return "pictures" if run.speed else "speed"


def _training(run: RunData, stage: str, waits: bool) -> tuple[list[str], float | None]:
    """Step and remaining time of a training, and the share that is done. waits: nobody is at work."""
    steps = _steps(run, stage)
    if steps is None:
        return [], None
    lines = [line for line in run.metrics.get(stage, ()) if isinstance(line.get("step"), int)]
    if not lines:
        return [f"no step of {steps:,} logged yet"], 0.0
    made = min(lines[-1]["step"] + 1, steps)
    facts = [f"step {made:,} of {steps:,} ({percent(made / steps)})"]
    pace = seconds_per_step(lines)
    if pace is not None and made < steps:
        facts.append(
            f"about {duration(pace * (steps - made))} left in this stage" + (" once it goes on" if waits else "")
        )
    return facts, made / steps


def _steps(run: RunData, stage: str) -> int | None:
    """Steps that the training of a stage makes; None where it trains nothing, or the record does not tell."""
    section = run.recipe.get(stage)
    if not isinstance(section, Mapping) or (stage == "prune" and section.get("criterion", "learned") != "learned"):
        return None
    training = section if stage == "train" else section.get("training")
    steps = training.get("steps") if isinstance(training, Mapping) else None
    if not isinstance(training, Mapping) or not isinstance(steps, int) or steps < 1:
        return None
    stop = training.get("stop_after")
    return min(steps, stop) if isinstance(stop, int) and stop > 0 else steps


def seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the last log lines of one sitting: its clock begins where the last checkpoint was, and never runs back."""
    clocked = [(line["step"] + 1, line["seconds"]) for line in lines if isinstance(line.get("seconds"), int | float)]
    recent = clocked[-_RECENT:]
    for i in range(len(recent) - 1, 0, -1):
        if recent[i - 1][1] > recent[i][1]:
            recent = recent[i:]
            break
    if len(recent) > 1 and recent[-1][0] > recent[0][0]:
        return float((recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0]))
    return float(recent[-1][1] / recent[-1][0]) if recent else None
