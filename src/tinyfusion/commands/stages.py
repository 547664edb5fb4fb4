"""What whole jobs share: the frame of `run`, timed stages, the files of scores, and a picture that compares models."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.commands.report import render_run
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.fetching import WouldFetch
from tinyfusion.core.files import file_label
from tinyfusion.core.records import section_of
from tinyfusion.core.rundir import RunDirectory, write_text
from tinyfusion.core.signals import check_stop
from tinyfusion.data.images import read_shown_npz, write_grid_png
from tinyfusion.jobs.assemble import RunOptions, training_plan
from tinyfusion.jobs.estimate import Estimate, announce
from tinyfusion.jobs.training import with_method_of_search
from tinyfusion.jobs.verbs import finished
from tinyfusion.report.load import FURTHER

PAGE = "report.html"  # of a run
COMPARED = ("teacher", "pruned", "student")


def trainings_of(recipe: Recipe) -> Recipe:
    """The recipe as it trains: without a search within the recovery where another criterion than the learned one chooses the blocks."""
    if recipe.prune.criterion == "learned" or recipe.recover.search_share is None:
        return with_method_of_search(recipe)
    return dataclasses.replace(recipe, recover=dataclasses.replace(recipe.recover, search_share=None))


def trained_models(recipe: Recipe) -> tuple[str, ...]:
    """The models of a run that are compared; a search within the recovery leaves no pruned one before it."""
    return tuple(name for name in COMPARED if name != "pruned" or recipe.recover.search_share is None)


def further_models(recipe: Recipe) -> dict[str, str]:
    """The optional stages of a run by the verb that each is, and the model that each makes."""
    return {verb: model for verb, model in FURTHER.items() if getattr(recipe, section_of(verb)).in_run}


def drawn_models(recipe: Recipe) -> list[str]:
    """The models of a run that are sampled and scored."""
    return [*trained_models(recipe), *further_models(recipe).values()]


def few_steps_said(recipe: Recipe) -> dict[str, str]:
    """The line of a dry run on the stage `distill-steps`, where there is one."""
    few = recipe.distill_steps
    said = f"{few.method}, {few.num_steps} steps, {few.training.steps:,} of training"
    return {"distill-steps": said} if few.in_run else {}


def fastest(speed: Mapping[str, Any]) -> float:
    """The speed-up of a run, from its speed.json: of the student, or of whole drawings by what the optional stages made of it."""
    further = [speed["models"][name] for name in FURTHER.values() if name in speed["models"]]
    return max([model.get("drawing_speedup", model["speedup"]) for model in further], default=speed["speedup"])


def end_again(folder: RunDirectory, dry_run: bool) -> None:
    """Report a run that is finished, after writing its page where it was killed before that."""
    if folder.writes and not (folder.path / PAGE).is_file() and not dry_run:
        write_text(folder.path / PAGE, render_run(folder.path))
    finished(folder, dry_run)


def say_unchecked(what: str, missing: WouldFetch | None) -> dict[str, Any]:
    """Report what a dry run did not check as it needs a download; returns that for `--json`."""
    if missing is None:
        return {}
    print(f"not checked: {what} ({missing})", file=sys.stderr)
    return missing.outcome()


@contextmanager
def whole_run(
    folder: RunDirectory, recipe: Recipe, options: RunOptions, plain: dict[str, Any], **about: Any
) -> Iterator[None]:
    """Within the context the stages run; then the run is done, and its page written. about: further fields of run.json."""
    with folder.writing("run", plain, options.overwrite):
        command = options.command or f"tinyfusion run --recipe {recipe.name} --out {options.out}"
        folder.mark("running", command=command, **about)
        yield
        if not folder.writes:  # one process does everything after the trainings
            return
        folder.mark("done", seconds=sum(folder.record()["stages"].values()))
        try:
            write_text(folder.path / PAGE, render_run(folder.path))
        except BaseException:
            folder.mark("running")  # without its page a run is not done
            raise


def announce_run(
    recipe: Recipe, plan: Mapping[str, str], mode: str, estimates: Sequence[Estimate], spoken: bool
) -> dict[str, Any]:
    """Print (where `spoken`) and return the plan of a dry run, with the sum of the estimates."""
    rows = {**plan, **training_plan(recipe, None, mode)}
    if recipe.minutes:
        rows["published"] = f"{recipe.minutes:g} minutes on {recipe.machine or 'an unnamed machine'}"
    return announce("run", rows, functools.reduce(operator.add, estimates), spoken)


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
