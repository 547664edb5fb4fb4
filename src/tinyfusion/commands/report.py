"""`report`: render run folders as one HTML page. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.core.rundir import file_output, stamp, write_text
from tinyfusion.prune.scheme import parse_scheme, scheme_pairs
from tinyfusion.report.load import Run, load_run
from tinyfusion.report.page import embedded_record, render

if TYPE_CHECKING:
    from tinyfusion.jobs.assemble import RunOptions


def report(runs: Sequence[Path], options: RunOptions) -> None:
    """Write one page about `runs`; an existing page about the same runs is replaced.

    Raises UserError on a path that is not a run folder, and on an output that is not our page about these runs.
    """
    records = [read_run(path) for path in runs]
    inputs = {"runs": [str(path) for path in runs]}
    file_output(options.out, "report", inputs, options.overwrite, _page_record)
    page = render(records, stamp("report", inputs, "done"))
    if not options.dry_run:
        write_text(options.out, page)


def render_run(path: Path) -> str:
    """The page of one run folder."""
    return render([read_run(path)], stamp("report", {"runs": [str(path)]}, "done"))


def read_run(path: Path) -> Run:
    """The records of a run folder; of a search that has not ended with the present choice of blocks as its plan."""
    run = load_run(path)
    settings, lines = run.recipe.get("prune") or {}, run.decision_lines
    if run.plan is not None or not lines or not settings.get("scheme"):
        return run
    scheme, distribution, last = settings["scheme"], settings.get("distribution"), lines[-1]
    depth = _logged_depths(scheme, last)
    groups = {
        name: [[group.keep, group.size] for group in listed]
        for name, listed in parse_scheme(scheme, depth, distribution or "categorical").items()
    }
    plan = PrunePlan(last["kept"], depth, settings["criterion"], scheme, distribution, groups=groups)
    return dataclasses.replace(run, plan=plan, decided=False)


def _logged_depths(scheme: str, line: Mapping[str, Any]) -> dict[str, int]:
    """Blocks per list: a subset logs a marginal for each, a categorical a confidence per group of its scheme."""
    if "marginals" in line:
        return {name: len(values) for name, values in line["marginals"].items()}
    sizes = [size for _, size in scheme_pairs(scheme)]
    confidence = line["confidence"].items()
    return {name: sum(sizes) if len(sizes) == len(values) else sizes[0] * len(values) for name, values in confidence}


def _page_record(path: Path) -> Any:
    try:
        return embedded_record(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None
