"""From a run to the drawings of its page: which there are, how wide, and what is written around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from tinyfusion.report import charts, pictures, scores
from tinyfusion.report import dynamic_maps as kept
from tinyfusion.report import tables as findings
from tinyfusion.report.canvas import CUT, EXTRA, INK, STUDENT, TEACHER
from tinyfusion.report.charts import Curve
from tinyfusion.report.format import percent, short_names, significant
from tinyfusion.report.pictures import Mark
from tinyfusion.report.run_data import RunData
from tinyfusion.report.scores import Series
from tinyfusion.report.tables import Table

_WIDE_PX, _NARROW_PX, _THIRD_PX = 1060, 350, 350
_COLOURS = (STUDENT, CUT, EXTRA, TEACHER, INK)
_BUDGET = [("ratio", "share", STUDENT), ("budget", "budget", CUT)]
_LOSSES = {
    "prune": [("loss", "loss", STUDENT)],
    "train": [("loss", "loss", STUDENT)],
    "recover": [
        ("loss", "total", INK), ("mse", "noise", TEACHER),
        ("kd_loss", "teacher's output", STUDENT), ("feat_loss", "teacher's features", CUT),
    ],
    "dynamic": [
        ("loss", "total", INK), ("dynamic_loss", "routed", STUDENT), ("complete_loss", "whole", TEACHER),
        ("kd_loss", "teacher's output", TEACHER),
    ],
}  # fmt: skip
_LOSS_TITLES = {
    "prune": "Loss of the search", "recover": "Loss of the recovery", "train": "Training loss", "dynamic": "Loss of the routed model",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A titled drawing. narrow is the one for phones, empty where the wide one serves; text stands above, note beneath.

    signed: colours say above and below chance. table: the numbers that are drawn. protocol: by which they were scored.
    """

    title: str
    wide: Markup
    narrow: Markup = Markup("")
    note: str = ""
    text: str = ""
    table: Table | None = None
    signed: bool = False
    protocol: str = ""


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
    drawn = _decision_curves(run, anchor)
    for stage, metrics in run.metrics.items():
        series = [Curve(label, *_series(metrics, key), colour) for key, label, colour in _LOSSES[stage]]
        series = [curve for curve in series if len(curve.x)]
        if series:
            svg = charts.loss_curves(series, _LOSS_TITLES[stage], _THIRD_PX, salt=anchor)
            drawn.append(Chart(_LOSS_TITLES[stage], Markup(svg), note="Faint: as logged. Bold: running median."))
    routed = run.metrics.get("dynamic", ())
    shares = [Curve(label, *_series(routed, key), colour) for key, label, colour in _BUDGET]
    if len(shares[0].x) > 1:
        svg = charts.loss_curves(shares, "Share that runs", _THIRD_PX, salt=anchor)
        drawn.append(Chart("Share that runs", Markup(svg), note="In training, with random decisions, and its budget."))
    for stage, lines in run.watch_lines.items():
        drawn += _watched_fids(stage, lines, anchor)
    return drawn


def _decision_curves(run: RunData, anchor: str) -> list[Chart]:
    """How sure the search was, of every list of blocks by itself."""
    lines, groups = findings.decision_lines(run), findings.decision_groups(run)
    if len(lines) < 2 or not run.plan:
        return []
    drawn = []
    for name, spans in groups.items():
        which = f": {name}" if len(groups) > 1 else ""
        if "marginals" in lines[-1]:
            svg = charts.marginal_curves(lines, spans, run.plan.kept[name], name, _THIRD_PX, salt=anchor)
            title, note = "Probability of every block to stay", "By what became of the block."
        else:
            svg = charts.confidence_curves(lines, spans, name, _THIRD_PX, salt=anchor)
            title, note = "Confidence of the decision", "Thin: every group. Bold: their median."
        drawn.append(Chart(title + which, Markup(svg), note=note))
    return drawn


def _watched_fids(stage: str, lines: Sequence[Mapping[str, Any]], anchor: str) -> list[Chart]:
    """The small FIDs that were taken while a stage trained, those of every protocol by themselves."""
    drawn = []
    for i, (protocol, points) in enumerate(scores.watched_series(lines).items(), start=1):
        if len(points) > 1:
            curve = Curve("averaged weights", [x for x, _ in points], [y for _, y in points], STUDENT)
            title = f"Small FID, {stage}"
            svg = charts.loss_curves([curve], title, _THIRD_PX, salt=f"{anchor}-{i}")
            drawn.append(Chart(title, Markup(svg), note=protocol))
    return drawn


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    lines = [line for line in metrics if line.get(key) is not None]
    return [line["step"] for line in lines], [line[key] for line in lines]


def pictures_of(run: RunData, anchor: str, runs: Sequence[RunData] = ()) -> list[Chart]:
    """What was measured beside the training, in the order of the job. runs: all of the page."""
    drawn = (
        _calibration(run, anchor, runs),
        *_fid_steps(run, anchor),
        _activations(run, anchor),
        _depth_speed(run, anchor),
        *_kept(run, anchor),
    )
    return [chart for chart in drawn if chart]


def together(runs: Sequence[RunData]) -> list[Chart]:
    """The recoveries of several runs, a drawing for every protocol that more than one of them was evaluated by."""
    found: dict[str, list[Series]] = {}
    for series in (series for run in runs for series in scores.fid_series(run)):
        found.setdefault(series.protocol, []).append(series)
    shared = {protocol: listed for protocol, listed in found.items() if len({id(s.run) for s in listed}) > 1}
    drawn = (_fid_chart(listed, protocol, f"together-{i}") for i, (protocol, listed) in enumerate(shared.items()))
    return [chart for chart in drawn if chart]


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
    models, lists = record["models"], findings.lists_of(record)
    wide, narrow = (
        Markup(pictures.activation_ridges(models, record["bin_width"], lists, width, salt=anchor))
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
    points, own = record["points"], findings.student_depths(run)
    whole = [point for point in points if point["depth"] == sum(own.values())]
    same = [
        point for point in whole if point.get("lists", own) == own
    ]  # a point names its lists where there are several
    wide, narrow = (
        Markup(pictures.depth_speed_chart(points, record["teacher_depth"], same[:1], width, salt=anchor))
        for width in (_WIDE_PX, _NARROW_PX)
    )
    text = (
        "The teacher with fewer and fewer blocks, timed in turn. What is not a block costs the same at every depth and "
    )
    text += "keeps the speed below the ideal. Bars: the middle half of the ratios."
    if run.speed and "speedup" in run.speed:
        text += (
            f" This is a second, short measurement, of the shape of the curve, with its own batch size; the speed-up of this "
            f"student is the {run.speed['speedup']:.2f}× above, of more steps."
        )
    return Chart("Speed against depth", wide, narrow, text=text, table=findings.depth_speed_table(run))


def _kept(run: RunData, anchor: str) -> list[Chart]:
    """What of every block runs at every time of the sampler, a drawing per kind of unit."""
    record = run.kept
    if not record:
        return []
    names = {
        "heads": "Heads",
        "groups": "Groups of hidden channels",
        "tokens": "Tokens of the MLPs",
        "gate": "Whole blocks",
    }
    drawn = []
    for name, title in names.items():
        if name in record["shares"]:
            wide, narrow = (
                Markup(kept.kept_map(record["shares"][name], record["times"], width, f"{anchor}-{name}"))
                for width in (_WIDE_PX, _NARROW_PX)
            )
            drawn.append(
                Chart(
                    f"{title} that run",
                    wide,
                    narrow,
                    text=kept.told(record, name),
                    table=kept.kept_table(record, name),
                )
            )
    return drawn


def _fid_steps(run: RunData, anchor: str) -> list[Chart]:
    """A drawing for every protocol that the recovery was scored by more than once; the others are told beside the first."""
    found: dict[str, list[Series]] = {}
    for series in scores.fid_series(run):
        found.setdefault(series.protocol, []).append(series)
    drawn = [
        chart for i, (protocol, listed) in enumerate(found.items())
        if (chart := _fid_chart(listed, protocol, f"{anchor}-{i}" if i else anchor))
    ]  # fmt: skip
    shown = {chart.protocol for chart in drawn}
    left = [(p, point) for p, listed in found.items() if p not in shown for s in listed for point in s.points]
    if not drawn or not left:
        return drawn
    told = "; ".join(f"step {point['step']:,}: FID {significant(point['fid'])} by {p}" for p, point in left)
    return [replace(drawn[0], text=f"{drawn[0].text} Another protocol, and so not in the drawing: {told}."), *drawn[1:]]


def _fid_chart(listed: Sequence[Series], protocol: str, anchor: str) -> Chart | None:
    """The curves of one protocol, and the teachers that it scored; None where no recovery has two points."""
    series = [one for one in listed if len(one.points) > 1]
    if not series:
        return None
    runs = {id(one.run): one for one in series}
    several = len({one.method for one in series}) < len(series)
    names = dict(zip(runs, short_names([(one.run.parts or (one.run,))[-1].name for one in runs.values()]), strict=True))
    lines = [
        Curve(
            f"{names[id(one.run)]}: {one.method}" if several else one.method,
            [float(point["step"]) for point in one.points], [float(point["fid"]) for point in one.points], colour,
        )
        for one, colour in zip(series, _repeated(len(series)), strict=True)
    ]  # fmt: skip
    levels: dict[float, list[str]] = {}
    for one in runs.values():
        if one.teacher_fid is not None:
            levels.setdefault(one.teacher_fid, []).append(names[id(one.run)])
    baselines = [
        Mark("teacher" if len(levels) == 1 else f"teacher of {' and '.join(names)}", value, TEACHER)
        for value, names in levels.items()
    ]
    wide, narrow = (
        Markup(pictures.fid_curves(lines, baselines, width, salt=anchor)) for width in (_WIDE_PX, _NARROW_PX)
    )
    text = "The averaged weights at checkpoints of the recovery, each drawn and scored like the student. Step 0 is the cut model."
    table = findings.fid_table(listed) if len(runs) == 1 else None
    return Chart("FID over the recovery", wide, narrow, text=text, table=table, protocol=protocol)


def _repeated(num: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(num)]
