"""Render runs as one self-contained HTML page: no scripts, no fonts, no external addresses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, UndefinedError
from markupsafe import Markup
from PIL import UnidentifiedImageError

from tinyfusion.core.errors import UserError
from tinyfusion.report import charts, decisions, diagnostic_charts, images, tables
from tinyfusion.report.format import count, duration, percent, printable, significant
from tinyfusion.report.load import Run, join_runs
from tinyfusion.report.progress import progress_of

RECORD_ID = "tinyfusion-record"
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
    """Report as one UserError what a check of types cannot detect: lists of different lengths, missing blocks."""
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
    environment.globals.update(distance_name=tables.distance_name, unbiased_images=tables.UNBIASED_IMAGES)
    environment.globals.update(stage_names=tables.STAGE_NAMES)
    return environment.from_string(text)


def _script_json(record: Mapping[str, Any]) -> Markup:
    """JSON that cannot end the script element around it."""
    text = json.dumps(record, indent=1, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _section(run: Run, anchor: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the template prints of one run."""
    return {
        "anchor": anchor,
        "run": run,
        "progress": progress_of(run),
        "comparable": tables.comparable(run),
        "depths": tables.depths(run),
        "models": tables.timed_models(run),
        "doubt": tables.speed_doubt(run),
        "lists": decisions.block_lists(run),
        "decisions": charts.decision_charts(run),
        "curves": charts.training_charts(run),
        "previews": {stage: images.preview_sheets(run, stage) for stage in run.previews},
        "charts": [*charts.fid_charts([run]), *diagnostic_charts.diagnostic_charts(run, runs)],
        "tokens": images.token_sheet(run),
        "samples": images.sample_sheets(run),
        "scores": tables.evaluation_tables(run),
        "pairs": tables.pairs_table(run),
        "expected": tables.expected_table(run),
        "cost": tables.cost_table(run),
        "provenance": tables.provenance(run),
        "settings": [(folder, json.dumps(record.get("recipe") or {}, indent=1)) for folder, record in run.sources],
    }
