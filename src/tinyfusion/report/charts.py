"""Charts of what a run logged: decisions, training curves, scores during recovery. Their captions are in the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from markupsafe import Markup

from tinyfusion.blocks.scheme import BlockGroup, block_chance, choice_chance
from tinyfusion.core.rundir import comparable_protocol
from tinyfusion.report.canvas import (
    NARROW_PX,
    WIDE_PX,
    Axis,
    Panel,
    Plot,
    Points,
    Shape,
    cells,
    rectangle,
    svg,
    thinned,
)
from tinyfusion.report.decisions import decision_groups, decision_strengths, group_name
from tinyfusion.report.format import count, short_names, significant
from tinyfusion.report.load import Run
from tinyfusion.report.tables import Table, distance_name, stated

COLOURS = ("student", "pruned", "extra", "teacher", "ink")
_STAGES = {
    "prune": "mask search",
    "recover": "recovery",
    "train": "training",
    "dynamic": "router training",
    "distill-steps": "distillation of steps",
}
_LOSSES = {  # field of a log line -> (label, colour)
    "loss": ("total", "ink"), "mse": ("noise", "teacher"), "kd_loss": ("teacher's output", "student"),
    "feat_loss": ("teacher's features", "pruned"), "dynamic_loss": ("routed", "extra"), "complete_loss": ("full model", "muted"),
    "generator_loss": ("generator", "student"), "critic_loss": ("critic", "muted"),
}  # fmt: skip
_SHARES = {"ratio": ("executed", "student"), "budget": ("budget", "pruned")}
_MOST_ROWS = 60  # of a table of decisions


@dataclass(frozen=True)
class Chart:
    """A chart. wide, narrow: SVG for a desktop page (empty for a small chart), and for a phone or a column.

    kind: names its caption in the template, which prints `facts`. legend: labelled shapes. protocol: of the scores in it.
    """

    title: str
    kind: str
    wide: Markup
    narrow: Markup
    legend: Sequence[Shape]
    facts: Mapping[str, Any]
    table: Table | None = None
    protocol: str = ""


def chart(
    title: str, kind: str, plot: Plot | Callable[[int], Plot], table: Table | None = None, protocol: str = "",
    small: bool = False, **facts: Any,
) -> Chart:  # fmt: skip
    """Draw a plot, which may depend on the width; a small one at the narrow width alone. Its legend: the labelled shapes."""
    narrow, full = (plot, plot) if isinstance(plot, Plot) else (plot(NARROW_PX), plot(WIDE_PX))
    legend = [item for item in narrow.panels[0].items if isinstance(item, Shape) and item.label]
    wide, legend = Markup() if small else svg(full, WIDE_PX, title), legend if len(legend) > 1 else []
    return Chart(title, kind, wide, svg(narrow, NARROW_PX, title), legend, facts, table, protocol)


def curves(
    shapes: Sequence[Shape], levels: Sequence[tuple[float, str, str]] = (), label: str = "",
    limits: tuple[float, float] | None = None, height: int = 240,
) -> Plot:  # fmt: skip
    """Curves over steps. levels: (value, label, colour) of level lines. limits: of a linear axis; None: logarithmic if it can be."""
    points = [point for shape in shapes for line in shape.lines for point in line]
    steps = Axis(min(x for x, _ in points), max(1.0, *(x for x, _ in points)), "step", whole=True)
    values = [*(y for _, y in points), *(value for value, _, _ in levels)]
    low, high = limits or (min(values), max(values))
    is_log = limits is None and 0 < 2 * low <= high  # a shorter range has too few round numbers
    pad = 0.0 if limits else 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    ends = (low / 1.1, high * 1.1) if is_log else (low - pad, high + pad)
    ends_of = {value: [(steps.low, value), (steps.high, value)] for value, *_ in levels}
    lines = [Shape([ends_of[v]], colour, name, width=1.2, dashed=True) for v, name, colour in levels]
    return Plot(Axis(*ends, label, log=is_log), [Panel(steps, [*shapes, *lines])], height)


def row_ticks(depth: int, first: int = 0) -> list[tuple[float, str]]:
    """A tick for every block of a list whose rows begin at `first`."""
    return [(first + i, str(i)) for i in range(depth)]


def decision_charts(run: Run) -> list[Chart]:
    """The decision over the steps of the search: a map per list of blocks."""
    lines, plan = run.decision_lines, run.plan
    if not lines or not plan:
        return []
    kind, chance = ("marginals", block_chance) if "marginals" in lines[-1] else ("decision", choice_chance)
    return [
        chart(name, kind, partial(_decision_map, lines, groups, plan.kept[name], name), decision_table(lines, name),
              chances={group_name(group): chance(group) for group in groups}, decided=run.decided)
        for name, groups in decision_groups(run).items()
    ]  # fmt: skip


def _decision_map(
    lines: Sequence[Any], groups: Sequence[BlockGroup], final: Sequence[int], name: str, width: int
) -> Plot:
    shown = [lines[i] for i in thinned(len(lines), 140 if width == WIDE_PX else 50)]
    steps, depth = np.array([line["step"] for line in shown], dtype=float), sum(group.size for group in groups)
    last = max(float(steps[-1]), 1.0)
    edges = [0.0, *((steps[1:] + steps[:-1]) / 2).tolist(), 1.01 * last]
    values = decision_strengths(shown, groups, name)
    items = [] if "marginals" in shown[-1] else cells(np.where(np.isnan(values), 0.0, 1.0), edges, "line")
    items += cells(values, edges, "student", "pruned")
    borders = [[(0.0, group.start - 0.5), (1.04 * last, group.start - 0.5)] for group in groups[1:]]
    items += [Shape(borders, "muted", width=0.8, opacity=0.6)]
    items += [Shape([rectangle(1.02 * last, b - 0.3, 1.04 * last, b + 0.3) for b in final], "student", fill=True)]
    rows, height = Axis(-0.7, depth - 0.3, "block of the teacher", ticks=row_ticks(depth)), 17 if depth <= 16 else 14
    return Plot(rows, [Panel(Axis(0, 1.04 * last, "step", whole=True), items)], 80 + height * depth, grid=False)


def decision_table(lines: Sequence[Mapping[str, Any]], name: str) -> Table:
    """The first and the last decision and every change between them, with the confidence of the groups."""
    kept = [line["kept"][name] for line in lines]
    changed = [i for i in range(len(lines)) if i in (0, len(lines) - 1) or kept[i] != kept[i - 1]]
    rows = []
    for i in changed[-_MOST_ROWS:]:
        quantiles = np.quantile(lines[i]["confidence"][name], (0, 0.5, 1))
        rows.append([f"{lines[i]['step']:,}", ", ".join(map(str, kept[i])), *(f"{value:.2f}" for value in quantiles)])
    note = f"The first, the last, and every change between them, of {len(lines)} logged steps."
    note += f" {len(changed) - len(rows)} earlier changes are left out." if len(changed) > len(rows) else ""
    return Table(["step", "kept", "least confident", "median", "most confident"], rows, note)


def training_charts(run: Run) -> list[Chart]:
    """Confidence, losses, executed share and scores of previews over the steps."""
    charts = _confidence_charts(run)
    for stage, lines in run.metrics.items():
        losses = {"loss": _LOSSES["loss"]} if stage in ("prune", "train") else _LOSSES
        if shapes := _logged(lines, losses):
            charts.append(chart(f"Loss of the {_STAGES[stage]}", "loss", curves(shapes), small=True))
        if stage == "dynamic" and len(lines) > 1 and (shapes := _logged(lines, _SHARES)):
            charts.append(chart("Executed share", "share", curves(shapes), small=True))
    for stage, scores in run.preview_scores.items():
        for protocol, fids in preview_fids(scores).items():
            if len(fids) > 1:
                title = f"{distance_name(s for s in scores if stated(s) == protocol)} of the previews, {_STAGES[stage]}"
                plot = curves(_smoothed(fids, "averaged weights", "student"))
                charts.append(chart(title, "previews", plot, protocol=protocol, small=True))
    return charts


def _confidence_charts(run: Run) -> list[Chart]:
    lines, plan, charts = run.decision_lines, run.plan, []
    if len(lines) < 2 or not plan:
        return []
    shown, groups_of = [lines[i] for i in thinned(len(lines), 120)], decision_groups(run)
    is_marginal, steps = "marginals" in shown[-1], [float(line["step"]) for line in shown]

    def track(values: np.ndarray) -> Points:
        return list(zip(steps, values.tolist(), strict=True))

    for name, groups in groups_of.items():
        values = np.array([line["marginals" if is_marginal else "confidence"][name] for line in shown], dtype=float)
        blocks = ["kept" if block in plan.kept[name] else "removed" for block in range(values.shape[1])]
        kinds = blocks if is_marginal else [group_name(group) for group in groups]
        colours = dict(zip(("kept", "removed") if is_marginal else dict.fromkeys(kinds), cycle(COLOURS), strict=False))
        shapes = []
        for kind in dict.fromkeys(kinds):
            own = values[:, [k == kind for k in kinds]]
            shapes.append(Shape([track(v) for v in own.T], colours[kind], kind * is_marginal, width=1, opacity=0.5))
            shapes += [] if is_marginal else [Shape([track(np.median(own, axis=1))], colours[kind], f"median {kind}")]
        chance = block_chance if is_marginal else choice_chance
        chances = {chance(group): (f"chance {group_name(group)}", "muted") for group in groups}
        title = "Probability of every block to be kept" if is_marginal else "Confidence of the decision"
        plot = curves(shapes, [(value, *names) for value, names in chances.items()], limits=(0, 1.03))
        title += f": {name}" if len(groups_of) > 1 else ""
        charts.append(chart(title, "marginal-curves" if is_marginal else "confidence", plot, small=True))
    return charts


def _logged(lines: Sequence[Mapping[str, Any]], fields: Mapping[str, tuple[str, str]]) -> list[Shape]:
    """Curves of the logged fields. fields: name -> (label, colour)."""
    shapes = []
    for key, (label, colour) in fields.items():
        points = [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]
        shapes += _smoothed(points, label, colour) if points else []
    return shapes


def _smoothed(points: Points, label: str, colour: str) -> list[Shape]:
    """A faint curve as logged, and its running median."""
    chosen, reach, values = thinned(len(points), 240), len(points) // 30, [y for _, y in points]
    median = [(points[i][0], float(np.median(values[max(i - reach, 0) : i + reach + 1]))) for i in chosen]
    faint = Shape([[points[i] for i in chosen]], colour, width=0.8, opacity=0.3)
    return [faint, Shape([median], colour, label, dots=4.0 if len(points) < 8 else 0.0)]


def preview_fids(scores: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """protocol -> [(training steps, FID of the preview)]: a continued training may measure by another protocol."""
    fids: dict[str, list[tuple[float, float]]] = {}
    for score in (score for score in scores if score.get("fid") is not None):
        fids.setdefault(stated(score), []).append((score["made_steps"], score["fid"]))
    return fids


@dataclass(frozen=True)
class Series:
    """Scores of a recovery at its checkpoints, by one protocol. points: of fid_steps.json, by step. teacher_fid: by the same."""

    run: Run
    method: str
    protocol: str
    points: list[Mapping[str, Any]]
    teacher_fid: float | None


def fid_series(run: Run) -> list[Series]:
    """Every recovery method by every protocol, in the order of the first step."""
    points_of: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in sorted(run.measured.get("fid_steps", ()), key=lambda point: point["step"]):
        if point.get("fid") is not None:
            points_of.setdefault((str(point.get("method", "recovery")), stated(point)), []).append(point)
    series = []
    for (method, protocol), points in points_of.items():
        teacher = run.evaluations.get(("teacher", str(points[0].get("reference") or "")), {})
        fid = teacher.get("fid") if comparable_protocol(stated(teacher)) == comparable_protocol(protocol) else None
        series.append(Series(run, method, protocol, points, fid))
    return series


def fid_charts(runs: Sequence[Run], shared: bool = False) -> list[Chart]:
    """Scores during recovery, a chart per protocol with at least two points. shared: of several runs alone."""
    by_protocol: dict[str, list[Series]] = {}
    for series in (series for run in runs for series in fid_series(run)):
        by_protocol.setdefault(series.protocol, []).append(series)
    if shared:
        by_protocol = {p: listed for p, listed in by_protocol.items() if len({id(s.run) for s in listed}) > 1}
    drawn = {p: listed for p, listed in by_protocol.items() if any(len(s.points) > 1 for s in listed)}
    others = [(p, point) for p, listed in by_protocol.items() if p not in drawn for s in listed for point in s.points]
    return [_fid_chart(listed, others if i == 0 else []) for i, listed in enumerate(drawn.values())]


def _fid_chart(every: Sequence[Series], others: Sequence[tuple[str, Mapping[str, Any]]]) -> Chart:
    listed = [series for series in every if len(series.points) > 1]
    protocol, name = listed[0].protocol, distance_name(listed[0].points)
    names = short_names([series.run.sources[-1][0] for series in listed])
    alike, shapes = len({series.method for series in listed}) < len(listed), []
    teachers: dict[float, dict[str, None]] = {}
    for series, run_name, colour in zip(listed, names, cycle(COLOURS), strict=False):
        points = [(float(point["step"]), float(point["fid"])) for point in series.points]
        shapes.append(Shape([points], colour, f"{run_name}: {series.method}" if alike else series.method, dots=6))
        if series.teacher_fid is not None:
            teachers.setdefault(series.teacher_fid, {})[run_name] = None
    rows = [
        [s.method, f"{p['step']:,}", count(p.get("images")), significant(p["fid"]), significant(p.get("inception_score"))]
        for s in every for p in s.points
    ]  # fmt: skip
    table = Table(["recovery", "step", "images seen", name, "IS"], rows) if len(set(names)) == 1 else None
    of_run = {fid: f" of {' and '.join(own)}" * (len(teachers) > 1) for fid, own in teachers.items()}
    levels = [(fid, f"teacher{label}", "teacher") for fid, label in of_run.items()]
    plot = curves(shapes, levels, f"{name}, lower is better", height=300)
    return chart(f"{name} during recovery", "fid", plot, table, protocol, others=others)
