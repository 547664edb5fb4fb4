"""Charts of what was measured outside the trainings: calibration losses, activations, speed by depth, executed shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.report.canvas import CHARACTER_PX, WIDE_PX, Axis, Panel, Plot, Shape, Text, cells, rectangle, thinned
from tinyfusion.report.charts import Chart, chart, row_ticks
from tinyfusion.report.format import percent, significant
from tinyfusion.report.load import Run
from tinyfusion.report.tables import Table, model_name

_ROW_PX = 17  # of labels above a histogram
_UNITS = {  # of a dynamic model: title and words
    "heads": ("Executed attention heads", "heads of a block's attention"),
    "groups": ("Executed groups of hidden channels", "groups of a block's hidden channels"),
    "tokens": ("Tokens processed by the MLPs", "tokens that a block's MLP processed, mean over images"),
    "gate": ("Executed blocks", "blocks"),
}


def diagnostic_charts(run: Run, runs: Sequence[Run] = ()) -> list[Chart]:
    """The charts of this module for which a run has records. runs: all of the page."""
    return [*_calibration_charts(run, runs), *_activation_charts(run), *_depth_charts(run), *_executed_charts(run)]


@dataclass(frozen=True)
class Mark:
    """A named mask and its loss. below: share of the tried masks with a lower loss."""

    label: str
    loss: float
    below: float = 0.0
    is_own: bool = False


def calibration(run: Run, others: Sequence[Run] = ()) -> tuple[list[float], list[Mark], Table] | None:
    """(sorted finite losses of the tried masks, masks with a name, table), from calibration.json; None of fewer than two.

    others: runs on the same page, whose decisions about the same teacher are marked where their masks were tried.
    """
    record = run.measured.get("calibration") or {}
    tried, masks = record.get("losses") or [], record.get("masks") or []
    losses = sorted(float(loss) for loss in tried if _is_loss(loss))
    if len(losses) < 2:
        return None
    marks = {str(name): loss for name, loss in (record.get("marks") or {}).items() if _is_loss(loss)}
    known = dict(zip(masks, tried, strict=True)) if len(masks) == len(tried) else {}
    known |= {mask: marks[name] for name, mask in (record.get("mark_masks") or {}).items() if name in marks}
    own = known.get(_bits(run), marks.get(run.plan.criterion)) if run.plan and run.decided else None
    listed = [("this run", own), *marks.items()]
    for other in others:
        if other is not run and other.decided and run.plan and other.plan and other.plan.teacher == run.plan.teacher:
            label = f"{other.plan.criterion} ({other.name.rstrip('/').rpartition('/')[2]})"
            listed.append((label, known.get(_bits(other))))
    named: dict[float, list[str]] = {}
    for name, loss in listed:
        if _is_loss(loss):
            named.setdefault(round(float(loss), 9), []).append(name)  # losses that differ by rounding alone are one
    shares = {loss: float(np.searchsorted(losses, loss)) / len(losses) for loss in named}
    placed = [Mark(", ".join(n), loss, shares[loss], n[0] == "this run") for loss, n in sorted(named.items())]
    rows = [[mark.label, significant(mark.loss, 4), percent(mark.below)] for mark in placed]
    for word, q in (("smallest", 0.0), ("median", 0.5), ("largest", 1.0)):
        rows.append([f"{word} of all", significant(float(np.quantile(losses, q)), 4), percent(q)])
    note = f"{len(losses):,} masks, all on the same images with the same noise and timesteps."
    broken = len(tried) - len(losses)
    note += f" {broken:,} more have no finite loss and are not shown." if broken else ""
    return losses, placed, Table(["mask", "loss", "masks with a lower loss"], rows, note)


def _is_loss(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _bits(run: Run) -> str:
    """The decision as one character per block, 1 for kept."""
    assert run.plan is not None
    kept = run.plan.kept
    return "".join("01"[block in kept[name]] for name, depth in run.plan.depth.items() for block in range(depth))


def _calibration_charts(run: Run, runs: Sequence[Run]) -> list[Chart]:
    if (measured := calibration(run, runs)) is None:
        return []
    losses, marks, table = measured
    below, plot = [mark.below for mark in marks if mark.is_own], partial(_histogram, losses, marks)
    return [chart("Loss right after pruning", "calibration", plot, table, num=len(losses), below=below)]


def _histogram(losses: Sequence[float], marks: Sequence[Mark], width: int) -> Plot:
    """Losses on a logarithmic axis, and the place of every named mask, with labels above the bars."""
    ends = [losses[0], losses[-1], *(mark.loss for mark in marks)]
    placed, high = label_rows(marks, low := min(ends) / 1.1, max(ends) * 1.03, width - 60)
    rows = max((row for _, row in placed), default=-1) + 1
    edges = np.geomspace(losses[0] / 1.000001, losses[-1] * 1.000001, 91 if width == WIDE_PX else 46).tolist()
    counts = np.histogram(losses, edges)[0].tolist()
    peak, bars = max(counts), [rectangle(edges[i], 0, edges[i + 1], n) for i, n in enumerate(counts) if n]
    items: list[Shape | Text] = [Shape(bars, "muted", fill=True, opacity=0.45)]
    for mark, row in placed:
        top, colour = peak * (1.06 + _ROW_PX / 200 * (rows - row)), "student" if mark.is_own else "pruned"
        items.append(Shape([[(mark.loss, 0), (mark.loss, top)]], colour, width=1.4))
        items.append(Text(mark.loss, top, mark.label, colour, dx=4, dy=9))
    ticks = [(count, f"{count:,}") for count in sorted({0, round(peak / 2), peak})]
    masks, axis = Axis(0, peak * (1.06 + _ROW_PX / 200 * rows), "masks", ticks=ticks), Axis(low, high, "loss", log=True)
    return Plot(masks, [Panel(axis, items)], 262 + _ROW_PX * rows)


def label_rows(marks: Sequence[Mark], low: float, high: float, width: float) -> tuple[list[tuple[Mark, int]], float]:
    """(mark, row from the top) with labels to the right of their marks, and the end of the axis with room for the last.

    A label that would touch earlier ones, from left to right, is below all of them, so that its mark's line, which ends
    there, crosses none.
    """

    def place(mark: Mark, with_label: bool = False) -> float:
        length = CHARACTER_PX * len(mark.label) + 8 if with_label else 0.0
        return width * math.log(mark.loss / low) / math.log(high / low) + length

    limit = 1e3 * max((mark.loss for mark in marks), default=0.0)
    while any(place(mark, True) > width for mark in marks) and high < limit:
        high *= 1.02
    placed: list[tuple[Mark, int]] = []
    for mark in sorted(marks, key=lambda m: m.loss):
        touched = [row for earlier, row in placed if place(earlier, True) > place(mark) - 3]
        placed.append((mark, max(touched, default=-1) + 1))
    return placed, high


def _activation_charts(run: Run) -> list[Chart]:
    if (record := run.measured.get("activations")) is None:
        return []
    models, lists = record["models"], record.get("lists") or {"blocks": record["depth"]}
    places = [([name] * (len(lists) > 1), str(i)) for name, depth in lists.items() for i in range(depth)]
    rows = []
    for model, entry in ((model, entry) for model, entries in models.items() for entry in entries):
        (name, index), numbers = places[entry["teacher_block"]], [entry[key] for key in ("min", "max", "mean", "std")]
        rows.append([model_name(model), *name, index, *map(significant, numbers)])
    extremes = {
        model: [short_number(end(entry[key] for entry in entries)) for end, key in ((min, "min"), (max, "max"))]
        for model, entries in models.items() if entries
    }  # fmt: skip
    head = ["model", *(["list"] * (len(lists) > 1)), "block of the teacher", "min", "max", "mean", "σ"]
    table, plot = Table(head, rows, record.get("protocol", "")), partial(_ridges, models, record["bin_width"], lists)
    return [chart("Activations by block", "activations", plot, table, extremes=extremes)]


def _ridges(models: Mapping[str, Any], bin_width: float, lists: Mapping[str, int], width: int) -> Plot:
    """A histogram per block on the row of the teacher's block, a panel per model; every list has its name and numbers."""
    is_wide, depth, first = width == WIDE_PX, sum(lists.values()), first_blocks(lists)
    entries = [entry for listed in models.values() for entry in listed]
    most = max((max(entry["counts"]) for entry in entries), default=1)
    low, high = (symmetric_log(end(entry[key] for entry in entries)) for end, key in ((min, "min"), (max, "max")))
    ticks = [(symmetric_log(value), short_number(value)) for value in _decades(low, high, 7 if is_wide else 5)]
    room = (0.42 if is_wide else 0.03) * (high - low)  # a wide chart has the extremes in words on the right
    x, panels = Axis(low - 0.03 * (high - low), high + room, "value of an activation", ticks=ticks), list[Panel]()
    for name, listed in models.items():
        colour, items = "teacher" if name == "teacher" else "student", []
        for entry in listed:
            items += _ridge(entry, bin_width, most, 1 if is_wide and depth <= 16 else 2, colour)
            text = f"{short_number(entry['min'])} to {short_number(entry['max'])}, σ {significant(entry['std'], 2)}"
            items += [Text(x.high, entry["teacher_block"] + 0.08, text, anchor="end")] * is_wide
        for label, start in first.items() if len(lists) > 1 else ():
            items.append(Shape([[(x.low, start - 0.06), (x.high, start - 0.06)]], "muted", width=0.8))
            items += [] if panels else [Text(x.low, start + 0.6, label, dx=4)]
        panels.append(Panel(x, items, name))
    rows = [tick for name, blocks in lists.items() for tick in row_ticks(blocks, first[name])]
    return Plot(Axis(-0.3, depth + 0.1, ticks=rows), panels, 70 + (30 if depth <= 16 else 22) * depth)


def _ridge(entry: Mapping[str, Any], bin_width: float, most: int, coarse: int, colour: str) -> list[Shape | Text]:
    """One block's histogram, by `coarse` bins at a time, with its extremes and its standard deviation."""
    base, first = entry["teacher_block"], entry["first"]
    counts = np.asarray(entry["counts"], dtype=np.float64)
    counts = np.pad(counts, (first % coarse, -(len(counts) + first) % coarse)).reshape(-1, coarse).mean(1)
    heights = base + 0.86 * np.log1p(np.pad(counts, 1)) / math.log1p(most)
    centres = bin_width * coarse * (first // coarse - 0.5 + np.arange(len(heights)))
    outline = [(centres[0], base), *zip(centres, heights, strict=True), (centres[-1], base)]
    ends = [symmetric_log(entry[key]) for key in ("min", "max")]
    spread = [symmetric_log(entry["mean"] + sign * entry["std"]) for sign in (-1, 1)]
    return [
        Shape([outline], colour, fill=True, opacity=0.4),
        Shape([[(at, base), (at, base + 0.6)] for at in ends], "pruned", width=1.5),
        Shape([[(at, base), (at, base + 0.86)] for at in spread], "ink", width=1, dashed=True),
    ]


def symmetric_log(value: float) -> float:
    """Value itself in [-1, 1], sign and 1 + log10 of the magnitude beyond."""
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


def _decades(low: float, high: float, most: int) -> list[float]:
    """0 and powers of ten between two places of the axis, at most that many."""
    for stride in range(1, 13):
        powers = [10.0**i for i in range(0, 12, stride)]
        shown = [v for v in (*(-p for p in reversed(powers)), 0.0, *powers) if low <= symmetric_log(v) <= high]
        if len(shown) <= most:
            return shown
    return [0.0]


def short_number(value: float) -> str:
    """Two significant digits, or whole above 10, with a true minus sign."""
    return (f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}").replace("-", "−")


def _depth_charts(run: Run) -> list[Chart]:
    if (record := run.measured.get("depth_speed")) is None:
        return []
    points, full, rows = record["points"], record["teacher_depth"], []
    names = list(points[0].get("lists", ()))
    for p in points:
        low, high = p["speedup_spread"]
        times = [f"{p['speedup']:.2f}×", f"{low:.2f}× to {high:.2f}×", f"{full / p['depth']:.2f}×"]
        split = [str(p["lists"][name]) for name in names]
        rows.append([str(p["depth"]), *split, str(full - p["depth"]), significant(p["latency_ms"]), *times])
    columns = ["blocks", *names, "fewer", "ms per step", "speed-up", "middle half", "ideal"]
    own = {name: len(kept) for name, kept in run.plan.kept.items()} if run.plan else {}
    same = [p for p in points if p["depth"] == sum(own.values()) and p.get("lists", own) == own]
    speedup = (run.measured.get("speed") or {}).get("speedup")
    table, plot = Table(columns, rows, record.get("protocol", "")), partial(_depth_plot, points, full, same[:1])
    return [chart("Speed-up by depth", "depth", plot, table, speedup=speedup)]


def _depth_plot(points: Sequence[Mapping[str, Any]], full: int, own: Sequence[Mapping[str, Any]], width: int) -> Plot:
    """Speed-up against compression on logarithmic axes, with the linear ideal. own: the point of the student's depth."""
    at = [(full / p["depth"], p["speedup"]) for p in points]
    low, high = 0.93, max(map(max, at)) * 1.08
    bars = [[(x, y) for y in p["speedup_spread"]] for (x, _), p in zip(at, points, strict=True)]
    items: list[Shape | Text] = [
        Shape([[(1, 1), (high, high)]], "muted", f"ideal: {full} / blocks", width=1.2, dashed=True),
        Shape([at], "student", "measured", dots=6),
        Shape(bars, "student", width=1),
    ]
    for x, y in [(full / p["depth"], p["speedup"]) for p in own]:
        words = Text(x, y, "depth of this student", "student", dx=8, dy=16)
        items += [Shape([[(x, y)]], "student", width=0, dots=11), words]
    ticks: list[tuple[float, str]] = []
    room = 22 * math.log(high / low) / width  # of a label
    for (x, _), p in zip(at, points, strict=True):
        if not ticks or math.log(x / ticks[-1][0]) >= room:
            ticks.append((x, str(p["depth"])))
    x_axis = Axis(low, high, f"blocks of {full}, on a logarithmic axis of the compression", log=True, ticks=ticks)
    steps = [(v, f"{v:g}×") for v in (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30) if v <= high]
    return Plot(Axis(low, high, "speed-up", log=True, ticks=steps), [Panel(x_axis, items)], 300)


def _executed_charts(run: Run) -> list[Chart]:
    """Units of every block that run at every time of the sampler, a chart per kind (arXiv 2410.03456)."""
    record, charts = run.measured.get("kept") or {"shares": {}, "times": []}, list[Chart]()
    times = record["times"]
    chosen = sorted({round(i) for i in np.linspace(0, len(times) - 1, 8)})
    for unit, (title, words) in ((u, names) for u, names in _UNITS.items() if u in record["shares"]):
        rows = np.asarray(record["shares"][unit], dtype=np.float64)
        means = [float(part.mean()) for part in (rows, rows[:, 0], rows[:, rows.shape[1] // 2], rows[:, -1])]
        values = np.column_stack([rows.mean(1), rows.min(1), rows.max(1), rows[:, chosen]]).tolist()
        numbers = [[str(block), *(significant(value, 2) for value in line)] for block, line in enumerate(values)]
        head = ["block", "mean", "least", "most", *(f"at {short_time(times[i])}" for i in chosen)]
        plot, table = partial(_executed_map, rows, times), Table(head, numbers, record["protocol"])
        first = None if charts else record  # the caption of the first chart has its numbers
        charts.append(chart(title, "executed", plot, table, words=words, means=means, record=first))
    return charts


def _executed_map(rows: np.ndarray, times: Sequence[float], width: int) -> Plot:
    """A cell per block and time, in the order of sampling."""
    chosen = thinned(len(times), 120 if width == WIDE_PX else 50)
    ticks = [(i + 0.5, short_time(times[chosen[i]])) for i in thinned(len(chosen), 8 if width == WIDE_PX else 4)]
    x = Axis(0, len(chosen), "timestep, from noise to image", ticks=ticks)
    y = Axis(-0.7, len(rows) - 0.3, "block", ticks=row_ticks(len(rows))[:: 1 if len(rows) <= 16 else 3])
    shapes = cells(rows[:, chosen], range(len(chosen) + 1), "extra")
    return Plot(y, [Panel(x, shapes)], 80 + (17 if len(rows) <= 16 else 12) * len(rows), grid=False)


def short_time(value: float) -> str:
    """A timestep of a chain as a whole number, a time of a flow with two digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"
