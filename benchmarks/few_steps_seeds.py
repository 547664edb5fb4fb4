"""Distil the steps of recovered students over seeds: FID against the teacher's, block evaluations, and the time of a drawing.

    python benchmarks/few_steps_seeds.py --students runs/seeds --runs runs/few --images 10000 [--out docs/results/few-steps.md]

`--students`: the runs of `digits_seeds.py`. Every variant trains with the settings of the recipe and its own; all are drawn from the
noise and labels of their seed. Finished trainings and measurements are reused. `--images` of the teacher take long: 50 guided steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from drawn_fid import DrawnFid
from shared import spread, table
from tinyfusion.commands.distill_steps import distill_steps
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rundir import read_json, write_json, write_text
from tinyfusion.evaluate.timing import interleaved
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.sample.drive import image_labels, sample

_SECTION = "distill_steps"
VARIANTS = {
    "4 steps, consistency": (f"{_SECTION}.num_steps=4",),
    "2 steps, consistency": (f"{_SECTION}.num_steps=2",),
    "1 step, consistency": (f"{_SECTION}.num_steps=1",),
    "4 steps, matching": (
        f"{_SECTION}.method=matching", f"{_SECTION}.training.learning_rate=2e-4", f"{_SECTION}.critic_learning_rate=3e-3",
        f"{_SECTION}.within=[0.02, 0.6]",
    ),
}  # fmt: skip


def folder_of(runs: Path, seed: int, name: str) -> Path:
    """The run folder of a variant."""
    return runs / f"seed-{seed}" / name.replace(", ", "-").replace(" ", "-")


def measured(options: argparse.Namespace, seed: int, names: list[str]) -> dict[str, dict[str, float]]:
    """{model: its FIDs, passes and blocks} of one seed."""
    file = options.runs / f"measures-{seed}-{options.images}.json"
    done: dict[str, dict[str, float]] = read_json(file) if file.is_file() else {}
    recipe = load_recipe(options.recipe, (), {"seed": seed})
    student = str(options.students / f"seed-{seed}" / "recover" / "student")
    places = {name: str(folder_of(options.runs, seed, name)) for name in names}
    for name, place in places.items():
        distill_steps(load_recipe(options.recipe, VARIANTS[name], {"seed": seed}), RunOptions(Path(place)), student)
    if options.train_only:
        return done
    places = {**places, "student": student, "teacher": recipe.teacher}
    missing = {name: place for name, place in places.items() if name not in done}
    fid = DrawnFid(recipe, options.images) if missing else None
    for name, place in missing.items():
        assert fid is not None
        model = open_model(place)
        sampler = sampler_of(recipe.sample, model)
        done[name] = {**fid.of(model), "blocks": len(model.stack), "passes": sampler.calls * sampler.rows}
        write_json(file, done)
        print(seed, name, json.dumps(done[name]), flush=True)
    return done


def drawing_times(options: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Seconds of drawing 64 images with each model of the first seed, in turns, over those of the teacher."""
    recipe = load_recipe(options.recipe, (), {"seed": 0})
    places = {name: str(folder_of(options.runs, 0, name)) for name in names}
    places |= {"student": str(options.students / "seed-0" / "recover" / "student"), "teacher": recipe.teacher}
    models = {name: open_model(place) for name, place in places.items()}

    def drawing(model: LoadedModel) -> Any:
        labels, sampler = image_labels(64, len(model.conditions), 0), sampler_of(recipe.sample, model)
        return lambda: list(sample(model, labels, sampler, 0, 64))

    times = interleaved({name: drawing(model) for name, model in models.items()}, 5, torch.device("cpu"), "drawing")
    teacher = times["teacher"].median_ms
    return {
        name: f"{timing.median_ms / 64:.2f} ms, {teacher / timing.median_ms:.1f}x" for name, timing in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-4-steps")
    parser.add_argument("--students", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--runs", type=Path, default=Path("runs/few"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), help="this alone; may be repeated")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    names = options.variant or list(VARIANTS)
    seeds = [measured(options, seed, names) for seed in range(options.seeds)]
    if options.train_only:
        return
    times = drawing_times(options, names)
    rows = []
    for name in ("teacher", "student", *names):
        own, evaluations = [each[name] for each in seeds], seeds[0][name]["blocks"] * seeds[0][name]["passes"]
        of_teacher = seeds[0]["teacher"]["blocks"] * seeds[0]["teacher"]["passes"]
        over = [each[name]["digits"] / each["teacher"]["digits"] for each in seeds]
        fids = [spread([each[ref] for each in own], 2) for ref in ("digits", "digits:heldout")]
        rows.append(
            [name, f"{evaluations:,.0f}", f"{of_teacher / evaluations:.0f}", *fids, spread(over, 3), times[name]]
        )
    head = ["drawn by", "block evaluations per image", "times fewer", "FID", "FID, held-out reference", "FID over the teacher's",
            "time per image, speed-up"]  # fmt: skip
    text = "\n".join(table(head, *rows))
    print(text)
    if options.out:
        write_text(options.out, text + "\n")


if __name__ == "__main__":
    main()
