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

from tinyfusion.commands.evaluate import evaluate
from tinyfusion.commands.report import render_run
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.fetching import WouldFetch
from tinyfusion.core.files import file_label
from tinyfusion.core.records import section_of
from tinyfusion.core.rundir import RunDirectory, read_json, write_json, write_text
from tinyfusion.core.signals import check_stop
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.images import read_shown_npz, write_grid_png
from tinyfusion.jobs.assemble import RunOptions, training_plan
from tinyfusion.jobs.estimate import Estimate, announce
from tinyfusion.jobs.recovery import with_method_of_search
from tinyfusion.jobs.verbs import finished
from tinyfusion.report.load import FURTHER, plan_file
from tinyfusion.report.tables import distance_name

PAGE = "report.html"  # of a run
COMPARED = ("teacher", "pruned", "student")
ALONE = "prompts"  # in the place of a reference, in the names of files of scores without one


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


def score_models(recipe: Recipe, out: Path, models: Sequence[str], main: str, with_pairs: bool = False) -> None:
    """Score the samples of every model against every reference, and the other real set; those of `main` are evaluation.json too.

    with_pairs: those of the same sampler also to the teacher's images of equal seeds. CLIP scores and pairs depend on no reference,
    and stand with the first.
    """
    references: Sequence[str | None] = recipe.evaluate.references or (None,)
    plain = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, clip=None))
    for number, reference in enumerate(references):
        own = plain if number else recipe
        for name in models:
            paired = with_pairs and name in ("pruned", "student") and not number
            against = out / "samples" / "teacher.npz" if paired else None
            if reference is None and against is None and own.evaluate.clip is None:
                continue  # no score is the teacher's alone
            where, first = RunOptions(scores_file(out, name, reference or ALONE)), (number, name) == (0, models[0])
            examples = out / "samples" / "real.npz" if reference is not None and first else None
            evaluate(own, where, out / "samples" / f"{name}.npz", reference, against, False, examples)
        for real in [r for r in references if reference and r and r != reference and r in REAL_SETS][:1]:
            evaluate(
                plain, RunOptions(scores_file(out, "real", str(reference))), Path(real), reference, print_table=False
            )
    write_json(out / "evaluation.json", read_json(scores_file(out, main, references[0] or ALONE)))


def run_outcome(out: Path) -> dict[str, Any]:
    """Print and return the main numbers of a finished run, for `--json`."""
    recipe, evaluation = read_json(out / "run.json")["recipe"], read_json(out / "evaluation.json")
    speedup = fastest(read_json(out / "speed.json")) if (out / "speed.json").is_file() else None
    blocks, page, of_diffusers = read_json(plan_file(out))["kept"], out / PAGE, "class" in recipe
    first = next(iter(recipe["evaluate"]["references"]), ALONE)
    words = {} if of_diffusers else {"student": "recovered", "few-steps": "few steps"}
    files = {words.get(name, name): scores_file(out, name, first) for name in (*COMPARED, *FURTHER.values())}
    scores = {word: read_json(file) for word, file in files.items() if file.is_file()}
    psnr_db, said = (evaluation.get("against") or {}).get("psnr_db"), []
    for key, title in (("fid", distance_name(scores.values())), ("clip_score", "CLIP score")):
        if named := {name: score[key] for name, score in scores.items() if score.get(key) is not None}:
            said.append(f"{title} {' -> '.join(f'{value:.3g}' for value in named.values())} ({', '.join(named)})")
    said += [f"{psnr_db:.3g} dB from the teacher"] if psnr_db is not None else []
    said += [f"{speedup:.2f} times as fast"] if speedup is not None else []
    kept = "; ".join(" ".join(map(str, listed)) for listed in blocks.values())
    print(f"{', '.join(said)}, kept {kept}")
    print(f"open {page}", file=sys.stderr)
    of_prompts = {"clip_score": evaluation.get("clip_score"), "psnr_db": psnr_db} if of_diffusers else {}
    return {"report": str(page), "fid": evaluation.get("fid"), **of_prompts, "speedup": speedup, "kept": blocks}


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
