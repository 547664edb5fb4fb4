"""From a run to the drawings of its page: which there are, how wide, and what is written around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tinyfusion.report import charts, findings, pictures
from tinyfusion.report.canvas import CUT, EXTRA, INK, STUDENT, TEACHER
from tinyfusion.report.charts import Curve
from tinyfusion.report.facts import depths
from tinyfusion.report.findings import Table
from tinyfusion.report.format import percent, significant
from tinyfusion.report.pictures import Mark
from tinyfusion.report.run_data import RunData

_WIDE_PX, _NARROW_PX, _THIRD_PX = 1060, 350, 350
_COLOURS = (STUDENT, CUT, EXTRA, TEACHER, INK)
_LOSSES = {
    "prune": [("loss", "loss", STUDENT)],
    "train": [("loss", "loss", STUDENT)],
    "recover": [
        ("loss", "total", INK), ("mse", "noise", TEACHER),
        ("kd_loss", "teacher's output", STUDENT), ("feat_loss", "teacher's features", CUT),
    ],
}  # fmt: skip
_LOSS_TITLES = {"prune": "Loss of the search", "recover": "Loss of the recovery", "train": "Training loss"}


@dataclass(frozen=True)
class Chart:
    """A titled drawing. narrow is the one for phones, empty where the wide one serves; text stands above, note beneath.

    signed: colours say above and below chance. table: the numbers that are drawn.
    """

    title: str
    wide: Markup
    narrow: Markup = Markup("")
    note: str = ""
    text: str = ""
    table: Table | None = None
    signed: bool = False


def dynamics(run: RunData, anchor: str) -> list[Chart]:
    """One chart per list of blocks that was decided in groups, once there is something to see."""
    lines = findings.decision_lines(run)
    if not run.plan or not lines:
        return []
    drawn = []
    for name, groups in findings.decision_groups(run).items():
        signed = "marginals" in lines[-1]
        draw = charts.marginal_map if signed else charts.decision_dynamics
        chance = findings.chance_sentence(groups, per_block=signed)
        if signed:
            text = "A cell is a block at a logged step, the stronger its colour, the surer that it stays or goes. "
            text += f"No colour is chance: {chance}. Lines part the groups"
        else:
            text = "A point is a block that would be kept if the search ended at that step. The stronger its colour, the surer "
            text += f"the choice: opacity is confidence above chance, which is {chance}. Bands are groups"
        text += f"; squares at the right are the {'final' if run.decided else 'present'} choice."
        wide, narrow = (
            Markup(draw(lines, groups, run.plan.kept[name], name, width, most, salt=anchor))
            for width, most in ((_WIDE_PX, 140), (_NARROW_PX, 50))
        )
        table = findings.decision_table(lines, name)
        drawn.append(Chart(name, wide, narrow, text=text, table=table, signed=signed))
    return drawn


def curves(run: RunData, anchor: str) -> list[Chart]:
    """Confidence and losses over the steps."""
    drawn = []
    lines = findings.decision_lines(run)
    for name, groups in findings.decision_groups(run).items() if len(lines) > 1 else ():
        if "marginals" in lines[-1]:
            kept = run.plan.kept[name] if run.plan else []
            svg = charts.marginal_curves(lines, groups, kept, name, _THIRD_PX, salt=anchor)
            drawn.append(Chart("Probability of every block to stay", Markup(svg), note="By what became of the block."))
        else:
            svg = charts.confidence_curves(lines, groups, name, _THIRD_PX, salt=anchor)
            drawn.append(
                Chart("Confidence of the decision", Markup(svg), note="Thin: every group. Bold: their median.")
            )
    for stage, metrics in run.metrics.items():
        series = [Curve(label, *_series(metrics, key), colour) for key, label, colour in _LOSSES[stage]]
        series = [curve for curve in series if len(curve.x)]
        if series:
            svg = charts.loss_curves(series, _LOSS_TITLES[stage], _THIRD_PX, salt=anchor)
            drawn.append(Chart(_LOSS_TITLES[stage], Markup(svg), note="Faint: as logged. Bold: running median."))
    drawn += [chart for stage in run.watch_lines if (chart := _watched_fid(run, stage, anchor))]
    return drawn


def _watched_fid(run: RunData, stage: str, anchor: str) -> Chart | None:
    """The small FIDs that were taken while a stage trained."""
    looks = [line["watch"] for line in run.watch_lines[stage]]
    scored = [look for look in looks if look.get("fid") is not None]
    if len(scored) < 2:
        return None
    curve = Curve(
        "averaged weights", [look["made_steps"] for look in scored], [look["fid"] for look in scored], STUDENT
    )
    protocols = dict.fromkeys(str(look.get("protocol")) for look in scored)
    title = f"Small FID, {stage}"
    svg = charts.loss_curves([curve], title, _THIRD_PX, salt=anchor)
    return Chart(title, Markup(svg), note=" / ".join(protocols))


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if line.get(key) is not None]
    return [line["step"] for line in lines], [line[key] for line in lines]


def pictures_of(run: RunData, anchor: str, runs: Sequence[RunData] = ()) -> list[Chart]:
    """What was measured beside the training, in the order of the job. runs: all of the page."""
    drawn = (
        _calibration(run, anchor, runs),
        _fid_steps([run], anchor),
        _activations(run, anchor),
        _depth_speed(run, anchor),
    )
    return [chart for chart in drawn if chart]


def together(runs: Sequence[RunData]) -> Chart | None:
    """The recoveries of several runs in one drawing, where they were evaluated by one protocol."""
    shown = [run for run in runs if findings.fid_series(run)]
    protocols = {str(point.get("protocol")) for run in shown for point in run.fid_steps}
    return _fid_steps(shown, "together") if len(shown) > 1 and len(protocols) == 1 else None


def _calibration(run: RunData, anchor: str, runs: Sequence[RunData]) -> Chart | None:
    found = findings.calibration(run, runs)
    if not found:
        return None
    marks = [Mark(mark.label, mark.loss, STUDENT if mark.is_own else CUT) for mark in found.marks]
    wide, narrow = (
        Markup(pictures.calibration_histogram(found.losses, marks, width, salt=anchor))
        for width in (_WIDE_PX, _NARROW_PX)
    )
    own = next((mark for mark in found.marks if mark.is_own), None)
    text = f"{len(found.losses):,} masks of this size, the loss of each before any tuning."
    text += f" {percent(own.below)} of them have a lower loss than the mask of this run." if own else ""
    text += " In the paper, masks with the lowest loss here recovered badly (table 3)."
    return Chart("Loss right after pruning", wide, narrow, text=text, table=found.table)


def _activations(run: RunData, anchor: str) -> Chart | None:
    record = run.activations
    if not record:
        return None
    models, depth = record["models"], record["depth"]
    wide, narrow = (
        Markup(pictures.activation_ridges(models, record["bin_width"], depth, width, salt=anchor))
        for width in (_WIDE_PX, _NARROW_PX)
    )
    extremes = ", ".join(
        f"{name} {significant(min(e['min'] for e in entries))} to {significant(max(e['max'] for e in entries))}"
        for name, entries in models.items()
    )
    text = (
        "How the outputs of every block are spread. Heights are logarithms of counts, the axis is logarithmic outside "
    )
    text += f"-1 to 1. Orange: the extremes; dashed: one standard deviation (σ) to both sides of the mean. Extremes: {extremes}."
    table = findings.activation_table(run)
    return Chart("Activations", wide, narrow, text=text.replace("-", "−"), table=table)


def _depth_speed(run: RunData, anchor: str) -> Chart | None:
    record = run.depth_speed
    if not record:
        return None
    student = depths(run).get("student")
    wide, narrow = (
        Markup(pictures.depth_speed_chart(record["points"], record["teacher_depth"], student, width, salt=anchor))
        for width in (_WIDE_PX, _NARROW_PX)
    )
    text = (
        "The teacher with fewer and fewer blocks, timed in turn. What is not a block costs the same at every depth and "
    )
    text += "keeps the speed below the ideal. Bars: the middle half of the ratios."
    return Chart("Speed against depth", wide, narrow, text=text, table=findings.depth_speed_table(run))


def _fid_steps(runs: Sequence[RunData], anchor: str) -> Chart | None:
    series = [
        (run, method, points) for run in runs for method, points in findings.fid_series(run).items() if len(points) > 1
    ]
    if not series:
        return None
    methods = [method for _, method, _ in series]
    several = len(set(methods)) < len(methods)
    lines = [
        Curve(f"{run.name}: {method}" if several else method, [x for x, _ in points], [y for _, y in points], colour)
        for (run, method, points), colour in zip(series, _repeated(len(series)), strict=True)
    ]
    levels = [level for run in runs[:1] if (level := _teacher_fid(run)) is not None]
    baselines = [Mark("teacher", value, TEACHER) for value in levels]
    wide, narrow = (
        Markup(pictures.fid_curves(lines, baselines, width, salt=anchor)) for width in (_WIDE_PX, _NARROW_PX)
    )
    text = "The averaged weights at checkpoints of the recovery, each drawn and scored like the student. Step 0 is the cut model."
    table = findings.fid_table(runs[0]) if len(runs) == 1 else None
    return Chart("FID over the recovery", wide, narrow, text=text, table=table)


def _repeated(num: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(num)]


def _teacher_fid(run: RunData) -> float | None:
    """The teacher's FID against the reference of the checkpoints."""
    reference = next((point["reference"] for point in run.fid_steps if point.get("reference")), None)
    value = run.evaluations.get("teacher", {}).get(str(reference), {}).get("fid")
    return float(value) if value is not None else None
