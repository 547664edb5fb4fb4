"""`report`: render run folders as one HTML page. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyfusion.core.rundir import file_output, stamp, write_text
from tinyfusion.report.load import read_run
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


def _page_record(path: Path) -> Any:
    try:
        return embedded_record(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None
