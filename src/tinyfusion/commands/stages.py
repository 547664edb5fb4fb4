"""What whole jobs share: timed stages, the files of scores, and a picture that compares models."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.files import file_label
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.core.signals import check_stop
from tinyfusion.data.images import read_shown_npz, write_grid_png


def stages_of(folder: RunDirectory) -> Callable[[str, Callable[[], Any]], None]:
    """A function that runs a stage and adds its seconds to run.json."""

    def stage(name: str, work: Callable[[], Any]) -> None:
        check_stop()
        if not folder.writes:
            work()
            return
        print(f"{name} ...", file=sys.stderr)
        began = time.perf_counter()
        try:
            work()
        finally:  # the time of an interrupted sitting counts
            seconds = dict(folder.record().get("stages", {}))
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - began, 2)
            folder.mark("running", stages=seconds)

    return stage


def scores_file(out: Path, model: str, reference: str) -> Path:
    """The file of the scores of a model against a reference (a name or a path)."""
    return out / "evaluations" / f"{model}-{file_label(reference)}.json"


def write_comparison(samples: Path, models: Sequence[str], columns: int = 20) -> None:
    """A grid: a row of the same seeds for every model, the first image of each label, or the first ones of a single class."""
    drawn = [read_shown_npz(samples / f"{name}.npz") for name in models]
    labels = drawn[0][1]
    if labels is None or drawn[0][0].shape[-1] not in (1, 3):
        return
    _, first = np.unique(labels, return_index=True)
    chosen = (first if len(first) > 1 else np.arange(len(labels)))[:columns]
    rows = np.concatenate([images[chosen] for images, _ in drawn])
    write_grid_png(samples / "comparison.png", rows, len(chosen), max(1, 48 // rows.shape[1]))
