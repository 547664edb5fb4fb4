"""Compare dynamic models on digits over several seeds: FID, executed multiply-accumulates, measured speed, training images.

    python benchmarks/digits_dynamic.py [--seeds 0,1,2] [--runs runs/dynamic] [--teacher-images 1664000] [--out FILE]

Rows: the static teacher; dynamic at 0.5, distilled from it, with free guidance and with folded guidance; the shallow half, and that made
dynamic at 0.7, both with folded guidance. Every training is a verb with a run folder of its own; finished runs are reused. All models
of a seed are sampled and timed interleaved in this process. Standard deviations are over seeds (n - 1).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared import quartiles, spread
from tinyfusion.blocks.dynamics import total_macs
from tinyfusion.commands.dynamic import dynamic
from tinyfusion.commands.evaluate import evaluate
from tinyfusion.commands.recover import recover
from tinyfusion.commands.sample import sample
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rundir import read_json, write_json, write_text
from tinyfusion.evaluate.timing import interleaved, speedup
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import SkippedModel, skipped_run_for
from tinyfusion.models.checkpoint import open_model
from tinyfusion.sample.drive import sample as draw_samples

TEACHER = "digits"
REFERENCES = ("digits", "digits:heldout")
SPEED = "speed.json"
TIMED_IMAGES, TIMED_STEPS, REPEATS = 128, 10, 9
NUM_IMAGES = 2000


@dataclass(frozen=True)
class Row:
    """One model: its label, how it is made from a recipe (None: the teacher), fields that it changes, its parent's key."""

    label: str
    make: Callable[[Recipe, Path, str], Any] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    parent: str = TEACHER
    recipe: str = "digits-dynamic"


def _dynamic(recipe: Recipe, out: Path, parent: str) -> None:
    dynamic(recipe, RunOptions(out), parent)


def _half(recipe: Recipe, out: Path, _parent: str) -> None:
    recover(recipe, RunOptions(out), "")


ROWS = {
    "teacher": Row("teacher, static"),
    "free-0.5": Row("dynamic at 0.5, free guidance", _dynamic, {"dynamic.guidance": None, "dynamic.auxiliary_steps": 3600}),
    "dynamic-0.5": Row("dynamic at 0.5", _dynamic),
    "shallow": Row("shallow: half of the blocks", _half, recipe="digits"),
    "shallow-0.7": Row("shallow half x dynamic at 0.7", _dynamic, {"dynamic.target": 0.7, "teacher": TEACHER}, "shallow"),
}  # fmt: skip


def made(folder: Path, seed: int) -> dict[str, str]:
    """Train, sample and evaluate every row of a seed; return the model of each."""
    models: dict[str, str] = {TEACHER: TEACHER, "teacher": TEACHER}
    for key, row in ROWS.items():
        recipe = load_recipe(row.recipe, (), {"seed": seed, "sample.num_images": NUM_IMAGES, **row.changes})
        if row.make is not None:
            row.make(recipe, folder / key, models[row.parent])
            models[key] = str(folder / key)
        sample(recipe, RunOptions(folder / f"{key}.npz"), models[key])
        for reference in REFERENCES:
            out = folder / f"{key}-{reference.replace(':', '-')}.json"
            evaluate(recipe, RunOptions(out), folder / f"{key}.npz", reference)
    return models


def timed(folder: Path, models: dict[str, str], seed: int) -> dict[str, list[float]]:
    """Speed-up over the teacher: ratio of medians with quartiles, all models of a seed interleaved. Cached in the folder."""
    if (folder / SPEED).exists():
        found: dict[str, list[float]] = read_json(folder / SPEED)
        return found
    recipe = load_recipe("digits", (), {"seed": seed})
    labels = np.arange(TIMED_IMAGES) % 10
    sides: dict[str, Callable[[], object]] = {}
    for key in ROWS:
        model = open_model(models[key])
        sampler = sampler_of(recipe.sample, model).of_steps(TIMED_STEPS)
        skipped = SkippedModel(model, skipped_run_for(model, sampler))

        def draw(model: Any = model, sampler: Any = sampler, skipped: SkippedModel = skipped) -> None:
            with skipped.running():
                list(draw_samples(model, labels, sampler, seed, TIMED_IMAGES))

        sides[key] = draw
    times = interleaved(sides, REPEATS, torch.device("cpu"))
    ratios = {key: list(speedup(times["teacher"], times[key])) for key in ROWS}
    write_json(folder / SPEED, ratios)
    return ratios


def seen_images(folder: Path, key: str) -> float:
    """Images seen by all trainings of a row, without the teacher's."""
    row = ROWS[key]
    if row.make is None:
        return 0.0
    own = read_json(folder / key / "run.json").get("seen_images") or 0.0
    return float(own) + (seen_images(folder, row.parent) if row.parent in ROWS else 0.0)


def macs_of(folder: Path, models: dict[str, str], key: str) -> tuple[float, float | None]:
    """Multiply-accumulates of a step of one image, guidance included, and the ratio of the blocks if there are routers."""
    model = open_model(models[key])
    static, rows = model.macs(), 2 if model.takes_guidance else 1
    if model.dynamic is None:
        return float(rows * static), None
    ratio = float(read_json(folder / f"{key}.json")["dynamic"]["macs_ratio"])
    return rows * total_macs(static, model.dynamic.sizes, len(model.stack), ratio, model.dynamic.settings.tokens), ratio


def table(folders: list[Path], models: list[dict[str, str]], speeds: list[dict[str, Any]], images: int) -> list[str]:
    """Markdown table: a row per model, mean and standard deviation over seeds."""
    rows = [
        "| model | FID, training digits | FID, held-out digits | over the teacher's | MACs per step | ratio in the blocks | "
        "speed-up, quartiles | "
        "images of training, share of the teacher's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in ROWS:
        fids = [
            [float(read_json(f / f"{key}-{reference.replace(':', '-')}.json")["fid"]) for f in folders]
            for reference in REFERENCES
        ]
        over = [
            read_json(f / f"{key}-digits.json")["fid"] / read_json(f / "teacher-digits.json")["fid"] for f in folders
        ]
        counted = [macs_of(f, m, key) for f, m in zip(folders, models, strict=True)]
        ratios = [ratio for _, ratio in counted if ratio is not None]
        seen = seen_images(folders[0], key)
        measured = [speed[key] for speed in speeds]
        faster = spread([s[0] for s in measured])
        rows.append(
            f"| {ROWS[key].label} | {spread(fids[0])} | {spread(fids[1])} | {', '.join(f'{o:.2f}' for o in over)} | "
            f"{spread([m / 1e6 for m, _ in counted])} M | "
            f"{spread(ratios, 3) if ratios else '1'} | {faster}, {quartiles([v for s in measured for v in s[1:]], 2)} | "
            f"{seen:,.0f}, {seen / images:.1%} |"
        )
    protocol = read_json(folders[0] / f"teacher-{REFERENCES[0]}.json")["protocol"]
    rows += ["", f"Protocol of the first seed: {protocol}.", ""]
    rows.append(
        f"Speed: {REPEATS} interleaved trajectories of {TIMED_STEPS} steps, {TIMED_IMAGES} images, guidance 1.5, float32, "
        f"{torch.get_num_threads()} thread(s)."
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="numbers, separated by commas")
    parser.add_argument("--runs", type=Path, default=Path("runs/dynamic"))
    parser.add_argument("--teacher-images", type=int, default=1_664_000, help="images the teacher saw in training")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    seeds = [int(part) for part in options.seeds.split(",")]
    folders = [options.runs / f"seed-{seed}" for seed in seeds]
    models, speeds = [], []
    for folder, seed in zip(folders, seeds, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        models.append(made(folder, seed))
        speeds.append(timed(folder, models[-1], seed))
        print(json.dumps({"seed": seed, "speedup": speeds[-1]}), flush=True)
    rows = table(folders, models, speeds, options.teacher_images)
    print("\n".join(rows))
    if options.out:
        write_text(options.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
