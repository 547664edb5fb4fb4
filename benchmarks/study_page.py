"""Write the page of the study from the outcomes of `benchmarks/study.py` that exist so far.

    python benchmarks/study_page.py --runs runs/study --out docs/results/study.md

Writes the Markdown page, and one SVG and one JSON of all outcomes per yardstick next to it; tables state done / total.
`--load` first copies the outcomes of those JSON files into --runs, so that the study resumes from a clone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student_t

import shared
from study import NUM_MASKS, RECOVERIES, SEARCH_STEPS, SEEDS, STEPS, Job, jobs
from tinyfusion.core.rundir import read_json, write_json, write_text

YARDSTICKS = {"digits": "scikit-learn's digits, 8 x 8, patch 2", "cifar16": "CIFAR-10 at 16 x 16, patch 4"}
TITLES = {
    1: "Row 1: criteria, recovered by plain fine-tuning",
    2: "Row 2: recovery methods, on the learned subset",
    3: "Row 3: weight updates and distributions of the learned criterion",
    4: "Row 4: random masks, does the calibration loss predict the outcome?",
    5: "Row 5: a quarter of the depth",
    6: "Row 6: learning rates and temperatures",
}
BASELINE = {  # what the differences of a row are to
    1: "learned subset by score",
    2: "finetune",
    3: "learned subset by score lora",
    5: "quarter of full, masked-kd",
    6: "learned subset, masked-kd lr 0.001",
}
BEFORE_RECOVERY = "a low loss before recovery is no guide to a good mask"
CLAIMS = (  # of the paper: what it says is better, row, what is better there, what is worse there
    ("the learned choice is better than the mask of the lowest loss", 1, "learned 2:4", "min-loss"),
    ("the learned choice is better than block influence", 1, "learned 2:4", "bi"),
    ("small groups are better than one group over the whole depth", 1, "learned 2:4", "learned subset"),
    ("a choice learned while weights train is better than one with frozen weights, 1:2", 3, "learned 1:2 lora", "learned 1:2 frozen"),
    ("the same, 2:4", 3, "learned 2:4 lora", "learned 2:4 frozen"),
    ("LoRA is better than full updates for the choice, 1:2", 3, "learned 1:2 lora", "learned 1:2 full"),
    ("distilling outputs is better than fine-tuning", 2, "logits-kd", "finetune"),
    ("distilling features is better than distilling outputs", 2, "rep-kd", "logits-kd"),
    ("masking features is better than all of them", 2, "masked-kd", "rep-kd"),
)  # fmt: skip
MARK = "<!-- made by benchmarks/study_page.py from here on; the text above is written by hand -->"
Found = dict[str, dict[str, Any]]  # outcomes by job key


def outcomes(root: Path) -> Found:
    """Read the outcomes in `root`."""
    return {file.stem: read_json(file) for file in sorted((root / "outcomes").glob("*.json"))}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, and the number of seeds if some are missing."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one seed)" if values else "-"
    few = "" if len(values) == len(SEEDS) else f" ({len(values)} seeds)"
    return shared.spread(values, digits) + few


def labels(row: int) -> dict[str, list[Job]]:
    """Jobs of a row by their label in the table."""
    named: dict[str, list[Job]] = {}
    for job in jobs():
        if job.row == row:
            name = {
                1: job.plan,
                2: job.recovery,
                3: f"{job.plan}{'' if job.plan.split()[-1] in ('full', 'frozen') else ' lora'}",
            }
            label = name.get(row, f"{job.plan}, {job.recovery}")
            if row == 1 and job.recovery != "finetune":
                label += f", {job.recovery.removeprefix('finetune ')}"
            named.setdefault(label.replace("deltas kept", "updates merged"), []).append(job)
    return named


def results(
    label: str, listed: list[Job], found: Found, base: dict[int, dict[str, Any]]
) -> tuple[list[str], float] | None:
    """Cells of a label on one yardstick and its mean loss; None if it was not run. Differences are paired by seed."""
    made = [found[job.key] for job in listed if job.key in found]
    if not made:
        return None
    good = [m for m in made if not m["failed"]]
    paired = [m for m in good if m["seed"] in base]
    failed = f" ({len(made) - len(good)} diverged)" if len(made) > len(good) else ""
    masks = sorted({" ".join(map(str, next(iter(m["kept"].values())))) for m in made})
    losses = [m["loss"] for m in good]
    loss_differences = spread([1e3 * (m["loss"] - base[m["seed"]]["loss"]) for m in paired], 2)
    cells = [
        spread([m["calibration_loss"] for m in made], 3),
        f"{spread(losses, 4)}{failed} ({loss_differences})",
        f"{spread([m['fid'] for m in good], 2)} ({spread([m['fid'] - base[m['seed']]['fid'] for m in paired], 2)})",
        "; ".join(masks) if len(masks) < 4 else f"{len(masks)} masks",
    ]
    return cells, float(np.mean(losses)) if losses else np.inf


def table(row: int, found: dict[str, Found]) -> list[str]:
    """Markdown table of one row on all yardsticks, sorted by held-out loss on the first."""
    lines = []
    cases = labels(row)
    base = {name: {j.seed: f[j.key] for j in cases[BASELINE[row]] if j.key in f} for name, f in found.items()}
    for label, listed in cases.items():
        by_yardstick = [results(label, listed, found[name], base[name]) for name in found]
        cells = [cell for made in by_yardstick for cell in (made[0] if made else ["not run"] * 4)]
        lines.append((by_yardstick[0][1] if by_yardstick[0] else np.inf, [label, *cells]))
    columns = ("loss before recovery", "held-out loss (1000 x difference)", "FID (difference)", "kept")
    head = ["", *(f"{name}: {column}" for name in found for column in columns)]
    return shared.table(head, *(line for _, line in sorted(lines, key=lambda item: item[0])))


def correlations(found: Found) -> tuple[list[str], str]:
    """Row 4 on one yardstick: rank correlations with bootstrap intervals, and a sentence on the range of FID."""
    made = [found[job.key] for job in jobs() if job.row == 4 and job.key in found]
    made = [m for m in made if not m["failed"]]
    if len(made) < 8:
        return ["too few"] * 3, f"{len(made)} of {NUM_MASKS} masks so far."
    before, after, fid = (np.array([m[name] for m in made]) for name in ("calibration_loss", "loss", "fid"))
    generator = np.random.default_rng(0)
    cells = []
    for x, y in ((before, fid), (before, after), (after, fid)):
        picks = generator.integers(0, len(x), (2000, len(x)))
        low, high = np.percentile([spearmanr(x[p], y[p]).statistic for p in picks], [2.5, 97.5])
        cells.append(f"{spearmanr(x, y).statistic:.2f} ({low:.2f} to {high:.2f})")
    return cells, f"{len(made)} masks, FID after from {fid.min():.2f} (median {np.median(fid):.2f}) to {fid.max():.2f}."


def verdict(values: Sequence[float]) -> str:
    """Whether the mean of paired differences is below 0: by the 95 % interval of Student's t."""
    reach = float(student_t.ppf(0.975, len(values) - 1)) * np.std(values, ddof=1) / len(values) ** 0.5
    mean = float(np.mean(values))
    return "yes" if mean + reach < 0 else "no, the opposite" if mean - reach > 0 else "level"


def claim_cells(row: int, better: str, worse: str, found: Found) -> list[str]:
    """Verdict by FID and by held-out loss, of differences paired by seed."""
    cases = labels(row)
    sides = [{j.seed: found[j.key] for j in cases[name] if j.key in found} for name in (better, worse)]
    cells = []
    for measure, factor, digits in (("fid", 1.0, 2), ("loss", 1e3, 2)):
        values = [
            factor * (sides[0][seed][measure] - sides[1][seed][measure]) for seed in sorted(sides[0].keys() & sides[1])
        ]
        cells.append(f"{verdict(values)} ({spread(values, digits)})" if len(values) > 1 else "not run")
    return cells


def claims(found: dict[str, Found]) -> list[str]:
    """Markdown table: the paper's claims, answered on every yardstick."""
    head = [
        "claim",
        *(f"{name}: {what}" for name in found for what in ("FID (difference)", "held-out loss (1000 x difference)")),
    ]
    rows = [[claim, *(cell for f in found.values() for cell in claim_cells(row, better, worse, f))]
            for claim, row, better, worse in CLAIMS]  # fmt: skip
    by_rank = [cell for f in found.values() for cell in guided(f)]
    return shared.table(head, [BEFORE_RECOVERY, *by_rank], *rows)


def guided(found: Found) -> list[str]:
    """Whether the loss before recovery fails to order random masks, by FID and by held-out loss."""
    by_fid, by_loss, _ = correlations(found)[0]
    return [f"{'no, it is one' if float(cell.split('(')[1].split()[0]) > 0 else 'yes'} ({cell.split()[0]})" if "(" in cell else cell
            for cell in (by_fid, by_loss)]  # fmt: skip


def picture(found: Found, title: str, file: Path) -> None:
    """Plot of loss before recovery against FID after it: random masks as dots, criteria with their names."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    random = [found[job.key] for job in jobs() if job.row == 4 and job.key in found and not found[job.key]["failed"]]
    axes.scatter(
        [m["calibration_loss"] for m in random], [m["fid"] for m in random], s=18, color="#9aa5b1", label="random masks"
    )
    named: dict[tuple[float, float], list[str]] = {}  # criteria that chose the same mask share a dot
    for label, listed in labels(1).items():
        made = [found[job.key] for job in listed if job.key in found and not found[job.key]["failed"]]
        if made and job_is_plain(listed[0]) and listed[0].plan != "width":
            x, y = (float(np.mean([m[name] for m in made])) for name in ("calibration_loss", "fid"))
            named.setdefault((round(x, 4), round(y, 3)), []).append(label)
    for (x, y), names in named.items():
        learned = names[0].startswith("learned")
        axes.scatter([x], [y], s=44, color="#c2410c" if learned else "#1d4ed8", zorder=3)
        axes.annotate(", ".join(names), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="loss when cut (training set, common noise)", ylabel=f"FID after {STEPS} steps of fine-tuning")
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def job_is_plain(job: Job) -> bool:
    """Whether the job is of the first row and recovered for the common number of steps."""
    return job.row == 1 and job.recovery == "finetune"


def teacher(name: str, root: Path, out: Path, found: Found) -> str:
    """A sentence on the teacher of a yardstick; also writes the outcomes as JSON and the picture."""
    listed = {job.key for job in jobs()}
    text = f"`{name}`: {YARDSTICKS[name]}, {len(listed & found.keys())} / {len(listed)} jobs."
    if (root / "teacher.json").is_file():
        record = read_json(root / "teacher.json")
        fids, heldout = ([run[key] for run in record["fids"]] for key in ("fid", "fid_heldout"))
        write_json(out.parent / f"study-{name}.json", {"teacher": record, "outcomes": found})
        picture(found, YARDSTICKS[name], out.parent.parent / "images" / f"study-{name}.svg")
        text += f" Teacher (12 blocks): held-out loss {record['loss']:.4f}, FID {spread(fids, 2)}, held-out {spread(heldout, 2)}."
    return text


def tables(found: dict[str, Found]) -> list[str]:
    """Tables of all rows; of incomplete rows only the name."""
    lines = []
    for row, title in TITLES.items():
        made = {job.key for job in jobs() if job.row == row}
        done = {name: f"{name} {len(made & f.keys())} / {len(made)}" for name, f in found.items()}
        if any(made - f.keys() for f in found.values()):
            lines += ["", f"{title}: not complete ({', '.join(done.values())} jobs)."]
            continue
        lines += ["", f"### {title}", ""]
        if row != 4:
            lines += table(row, found)
            continue
        columns = {name: correlations(f) for name, f in found.items()}
        lines += shared.table(["Spearman's rank correlation (95 % interval, 2,000 bootstrap samples)", *columns], *(
            [what, *(cells[i] for cells, _ in columns.values())]
            for i, what in enumerate(("loss before recovery, FID after", "loss before recovery, loss after", "loss after, FID after"))
        ))  # fmt: skip
        lines += ["", " ".join(f"{name}: {sentence}" for name, (_, sentence) in columns.items()), ""]
        lines += [f"![{name}: loss before recovery against FID](../images/study-{name}.svg)" for name in found]
    return lines


def load(runs: Path, out: Path) -> None:
    """Copy outcomes of the JSON files next to the page into the folder of runs, where they are missing."""
    for name in YARDSTICKS:
        file = out.parent / f"study-{name}.json"
        if file.is_file():
            record = read_json(file)
            (runs / name / "outcomes").mkdir(parents=True, exist_ok=True)
            wanted = {
                "teacher.json": record["teacher"],
                **{f"outcomes/{key}.json": v for key, v in record["outcomes"].items()},
            }
            for path, values in wanted.items():
                if not (runs / name / path).is_file():
                    write_json(runs / name / path, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/study.md"))
    parser.add_argument("--load", action="store_true", help="first copy the outcomes next to --out into --runs")
    options = parser.parse_args()
    if options.load:
        load(options.runs, options.out)
    text = options.out.read_text().partition(MARK)[0].rstrip() if options.out.is_file() else "# The study"
    found = {name: outcomes(options.runs / name) for name in YARDSTICKS}
    lines = [text, "", MARK, "", "## Results", ""]
    lines += [f"- {teacher(name, options.runs / name, options.out, found[name])}" for name in YARDSTICKS]
    lines += [
        "",
        f"{STEPS} recovery steps of 128 images unless stated, masks learned in {SEARCH_STEPS} of 64; recovery by {', '.join(RECOVERIES)}. "
        "FID against held-out images is in the JSON files next to this page.",
        "",
        "### The claims of the paper, one by one",
        "",
        "Differences are between two choices or recoveries of the same seed; *yes* and *the opposite* where the 95 % interval of three "
        'seeds (Student\'s t) excludes 0, else *level*. The first row has rank correlations of random masks (row 4). "Learned" is 2:4, '
        "the paper's choice at half depth; what is better than it here is in the findings above.",
        "",
        *claims(found),
        *tables(found),
    ]
    write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
