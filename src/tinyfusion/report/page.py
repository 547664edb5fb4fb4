"""Render runs as one self-contained HTML page: no scripts, no fonts, no external addresses; progress of unfinished runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, UndefinedError
from markupsafe import Markup
from PIL import UnidentifiedImageError

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import file_label
from tinyfusion.core.records import section_of
from tinyfusion.core.rundir import comparable_protocol
from tinyfusion.report import charts, decisions, diagnostic_charts, explain_charts, images, tables
from tinyfusion.report.format import count, duration, percent, printable, significant
from tinyfusion.report.load import FURTHER, Run, join_runs

RECORD_ID = "tinyfusion-record"
STAGES = {  # of a whole job, in order, and what is being done
    "encode": "encoding pictures and captions",
    "prune": "searching for the blocks to keep",
    "recover": "recovering the student",
    "dynamic": "training routers",
    "distill-steps": "distilling steps",
    "sample": "sampling",
    "evaluate": "evaluating samples",
    "speed": "timing the models",
    "pictures": "measuring activations and speed by depth",
}
_RECENT = 20  # log lines from which the speed is taken
_CONTRADICTIONS = (
    ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError, UnidentifiedImageError,
)  # fmt: skip


def render(runs: Sequence[Run], record: Mapping[str, Any]) -> str:
    """The page. record: what made it (see `core/rundir.stamp`), embedded in the page as JSON.

    Raises UserError where the records of a run have the right types and yet contradict each other.
    """
    joined, sections = join_runs(runs), []
    for i, run in enumerate(joined, start=1):
        with _consistent(run.name):
            sections.append(_section(run, f"run-{i}", joined))
    with _consistent(" and ".join(run.name for run in joined)):
        page = _template().render(
            title=" · ".join(dict.fromkeys(run.title for run in joined)),
            sections=sections,
            comparison=tables.comparison(joined),
            shared=charts.fid_charts(joined, shared=True) if len(joined) > 1 else [],
            record_id=RECORD_ID,
            record=_script_json(record),
        )
    return printable(page)


@contextmanager
def _consistent(name: str) -> Iterator[None]:
    """Raise UserError for contradictions in records of the right types: lists of different lengths, missing blocks."""
    try:
        yield
    except UserError:
        raise
    except _CONTRADICTIONS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"the files of {name} do not fit together ({reason}); --debug shows where") from error


def embedded_record(page: str) -> Any:
    """The record inside a page of ours; None where there is none."""
    _, begin, rest = page.partition(f'<script type="application/json" id="{RECORD_ID}">')
    text, end, _ = rest.partition("</script>")
    try:
        return json.loads(text) if begin and end else None
    except json.JSONDecodeError:
        return None


@cache
def _template() -> Template:
    text = (resources.files("tinyfusion.report") / "template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=count, duration=duration, percent=percent, significant=significant)
    environment.filters["comparable"] = comparable_protocol
    environment.globals.update(distance_name=tables.distance_name, unbiased_images=tables.UNBIASED_IMAGES)
    environment.globals.update(stage_names=tables.STAGE_NAMES)
    return environment.from_string(text)


def _script_json(record: Mapping[str, Any]) -> Markup:
    """JSON that cannot end its script element."""
    text = json.dumps(record, indent=1, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _section(run: Run, anchor: str, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "anchor": anchor,
        "run": run,
        "progress": progress_of(run),
        "comparable": tables.comparable(run),
        "without_reference": tables.without_reference(run),
        "depths": tables.depths(run),
        "models": tables.timed_models(run),
        "doubt": tables.speed_doubt(run),
        "lists": decisions.block_lists(run),
        "decisions": charts.decision_charts(run),
        "curves": charts.training_charts(run),
        "previews": {stage: images.preview_sheets(run, stage) for stage in run.previews},
        "charts": [*charts.fid_charts([run]), *diagnostic_charts.diagnostic_charts(run, runs)],
        "blocks": explain_charts.block_charts(run),
        "without": explain_charts.drawn_rows(run),
        "tokens": images.token_sheet(run),
        "samples": images.sample_sheets(run),
        "prompts": images.prompt_rows(run),
        "scores": tables.evaluation_tables(run),
        "pairs": tables.pairs_table(run),
        "expected": tables.expected_table(run),
        "cost": tables.cost_table(run),
        "provenance": tables.provenance(run),
        "settings": [(folder, json.dumps(record.get("recipe") or {}, indent=1)) for folder, record in run.sources],
    }


# ---------------------------------------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Progress:
    """Progress of a run. stages: (name, "done", "now" or "open") of a whole job. share: of this stage, None where unknown.

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
    doing = {**STAGES, "explain": "measuring what each block does"}.get(stage, "training")
    return Progress(f"{words}: {doing}", facts, share, stages if is_whole else [])


def _further(run: Run) -> dict[str, str]:
    """{optional stage: the model that it makes} of a whole job by its recipe."""
    return {name: model for name, model in FURTHER.items() if (run.recipe.get(section_of(name)) or {}).get("in_run")}


def stages_of(run: Run) -> list[str]:
    """The stages of a whole job, in order: of a transformer of diffusers, which its recipe then names by class, or of a family."""
    of_diffusers = "class" in run.recipe
    has = {"encode": bool(run.recipe.get("encodes")), "pictures": not of_diffusers}
    has |= {name: name in _further(run) for name in FURTHER}
    return [name for name in STAGES if has.get(name, True)]


def _sampled(run: Run) -> tuple[str, ...]:
    return ("teacher", "pruned", "student", *_further(run).values())


def current_stage(run: Run) -> str:
    """The first stage of a whole job whose output is missing."""
    for stage in stages_of(run):
        if (
            stage in ("encode", "prune", "recover", "dynamic", "distill-steps")
            and run.records.get(stage, {}).get("state") != "done"
        ):
            return stage
    if any(name not in run.samples for name in _sampled(run)) and not run.notes:  # notes: samples too large to be read
        return "sample"
    references = (run.recipe.get("evaluate") or {}).get("references", ())
    if "class" in run.recipe and not run.evaluations and not run.pairs:
        return "evaluate"
    if any((_sampled(run)[-1], file_label(str(name))) not in run.evaluations for name in references):
        return "evaluate"
    return "pictures" if "speed" in run.measured and "class" not in run.recipe else "speed"


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
    section = run.recipe.get(section_of(stage)) or {}
    if stage == "prune" and section.get("criterion", "learned") != "learned":
        return None
    training = section if stage == "train" else section.get("training") or {}
    steps, stop = training.get("steps") or 0, training.get("stop_after") or 0
    return None if steps < 1 else min(steps, stop) if stop > 0 else steps


def seconds_per_step(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Over the last log lines since the last start: a restart sets the clock back to the last checkpoint."""
    clocked = [(line["step"] + 1, line["seconds"]) for line in lines if line.get("seconds") is not None]
    recent = clocked[-_RECENT:]
    restarts = [i for i in range(1, len(recent)) if recent[i - 1][1] > recent[i][1]]
    recent = recent[restarts[-1] if restarts else 0 :]
    if len(recent) > 1 and recent[-1][0] > recent[0][0]:
        return float((recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0]))
    return float(recent[-1][1] / recent[-1][0]) if recent else None
