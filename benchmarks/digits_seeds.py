"""Run the main job on digits over several seeds: FID of teacher, pruned and recovered student, with standard deviations.

    python benchmarks/digits_seeds.py --recipe digits --seeds 3 --runs runs/seeds [--set FIELD=VALUE ...] [--out docs/results/digits.md]

Every seed is a complete run (masks, recovery, samples); finished runs are reused, so the command resumes where it stopped.
Standard deviations are over seeds (n - 1).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared import spread, table
from tinyfusion.commands.run import run
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.files import file_label
from tinyfusion.core.rundir import read_json, write_text
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.report.load import plan_file

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
MODELS = {"teacher": "teacher", "pruned": "pruned", "student": "recovered"}


def metrics(runs: list[Path], references: tuple[str, ...]) -> list[str]:
    """Markdown table of every model against every reference."""
    rows: list[list[str]] = []
    protocols: list[str] = []
    for reference in references:
        slug = file_label(reference)
        for key, label in MODELS.items():
            if not (runs[0] / "evaluations" / f"{key}-{slug}.json").is_file():
                continue  # a search within the recovery has no pruned model
            records = [read_json(r / "evaluations" / f"{key}-{slug}.json") for r in runs]
            cells = [spread([float(f[m]) for f in records], 2 if "fid" in m or "score" in m else 3) for m in METRICS]
            rows.append([f"`{reference}`", label, *cells])
        protocols.append(read_json(runs[0] / "evaluations" / f"student-{slug}.json")["protocol"])
    first = file_label(references[0])
    pairs = [[read_json(r / "evaluations" / f"{m}-{first}.json")["fid"] for m in ("student", "teacher")] for r in runs]
    return [
        *table(["reference", "model", *METRICS], *rows),
        "",
        f"FID of the student over its teacher's, by seed: {spread([own / taught for own, taught in pairs])}.",
        "",
        "Protocols of the first seed: " + "; ".join(protocols) + ".",
        "",
    ]


def facts(runs: list[Path], teacher_images: int | None) -> list[str]:
    """Speed, kept blocks, budgets."""
    speeds = [read_json(r / "speed.json") for r in runs]
    rows = [f"Sampling speed-up: {spread([s['speedup'] for s in speeds])} ({speeds[0]['protocol']})."]
    plans = [read_json(plan_file(run_folder)) for run_folder in runs]
    masks = [f"seed {p['seed']}: {p['kept']} after {p['cost']['images']:,.0f} images" for p in plans]
    rows.append(f"Kept blocks ({plans[0]['scheme']}): {'; '.join(masks)}.")
    stages = [stage for stage in ("prune", "recover") if (runs[0] / stage / "run.json").is_file()]
    seen = sum(float(read_json(runs[0] / stage / "run.json")["seen_images"]) for stage in stages)
    share = f", {seen / teacher_images:.1%} of the teacher's {teacher_images:,}" if teacher_images else ""
    rows.append(f"Images seen by search and recovery: {seen:,.0f}{share}.")
    seconds = [sum(read_json(r / stage / "run.json")["seconds"] for stage in stages) for r in runs]
    rows.append(f"Seconds of both: {spread(seconds, 0)}.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--teacher-images", type=int, help="images the teacher saw in training, for the budget's share")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    folders: list[Path] = []
    outcomes: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        recipe = load_recipe(options.recipe, options.set, {"seed": seed})
        folders.append(options.runs / f"seed-{seed}")
        outcomes.append(run(recipe, RunOptions(folders[-1])))
        print(json.dumps(outcomes[-1]), flush=True)
    rows = [*metrics(folders, recipe.evaluate.references), *facts(folders, options.teacher_images)]
    print("\n".join(rows))
    if options.out:
        write_text(options.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
