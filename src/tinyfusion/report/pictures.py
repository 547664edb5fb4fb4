"""What was measured beside the training: calibration losses, activations, speed at every depth, FID over the recovery.

SVG text, see `canvas.py`. The numbers come as they are in the run's files; `findings.py` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.report.canvas import (
    CUT,
    INK,
    LINE,
    MUTED,
    STUDENT,
    TEACHER,
    blank,
    cells,
    legend,
    log_labels,
    row_of_blanks,
    svg,
)
from tinyfusion.report.charts import Curve
from tinyfusion.report.format import significant

_BARS = {True: 90, False: 45}  # by whether the chart is wide
_WIDE_FROM = 600
_CHARACTER_PX = 6.2  # of the type of charts, near enough to keep labels apart
_LABEL_ROW_PX = 17


@dataclass(frozen=True)
class Mark:
    """A value on an axis, and what stands there."""

    label: str
    value: float
    colour: str


def calibration_histogram(losses: Sequence[float], marks: Sequence[Mark], width: int, salt: str = "") -> str:
    """How the losses of many masks are spread, on a logarithmic axis, with the place of every criterion's mask.

    losses: finite and positive. Labels stand above the bars, in as many rows as they need.
    Source: arXiv 2412.01199, figure 5.
    """
    values = np.asarray(losses, dtype=np.float64)
    ends = [values.min(), values.max(), *(mark.value for mark in marks)]
    low, high = min(ends) / 1.1, max(ends) * 1.03
    placed, high = label_rows(marks, low, high, width - 60)
    rows = max((row for _, row in placed), default=-1) + 1
    bars_px = 200
    figure, axes = blank(width, 50 + bars_px + _LABEL_ROW_PX * rows)
    axes.set_xscale("log")
    bins = np.geomspace(values.min() / 1.000001, values.max() * 1.000001, _BARS[width > _WIDE_FROM] + 1)
    counts, _ = np.histogram(values, bins)
    shown = [(bins[i], 0.0, bins[i + 1], float(n)) for i, n in enumerate(counts) if n]
    cells(axes, shown, MUTED, 0.45)
    peak = float(counts.max())
    for mark, row in placed:
        top = peak * (1.06 + _LABEL_ROW_PX / bars_px * (rows - 1 - row))
        axes.plot([mark.value] * 2, [0, top], color=mark.colour, linewidth=1.4, solid_capstyle="butt")
        axes.annotate(
            mark.label, (mark.value, top), xytext=(4, 0), textcoords="offset points",
            va="top", fontsize=10.5, color=mark.colour,
        )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(0, peak * (1.06 + _LABEL_ROW_PX / bars_px * (rows + 0.2))))
    axes.set(xlabel="loss right after pruning", ylabel="masks")
    axes.yaxis.set_major_locator(FixedLocator([0, round(peak / 2), round(peak)] if peak > 1 else [0, 1]))
    log_labels(axes.xaxis, (low, high), decades=4)
    return svg(figure, f"{salt}-calibration-{width}", "histogram of the losses of many masks right after pruning")


def label_rows(marks: Sequence[Mark], low: float, high: float, width: float) -> tuple[list[tuple[Mark, int]], float]:
    """(mark, row) with labels to the right of their marks, and the end of the axis that leaves room for the last.

    Row 0 is the highest. A label that would touch earlier ones, from left to right, stands below all of them, so that
    its mark's line, which ends there, crosses none.
    """

    def length(mark: Mark) -> float:
        return _CHARACTER_PX * len(mark.label) + 8

    def place(mark: Mark) -> float:
        return width * math.log(mark.value / low) / math.log(high / low)

    while any(place(mark) + length(mark) > width for mark in marks) and high < 1e3 * low * max(
        m.value / low for m in marks
    ):
        high *= 1.02
    placed: list[tuple[Mark, int]] = []
    for mark in sorted(marks, key=lambda m: m.value):
        touched = [row for earlier, row in placed if place(earlier) + length(earlier) > place(mark) - 3]
        placed.append((mark, max(touched, default=-1) + 1))
    return placed, high


def activation_ridges(
    models: Mapping[str, Sequence[Mapping[str, Any]]],
    bin_width: float,
    lists: Mapping[str, int],
    width: int,
    salt: str = "",
) -> str:
    """A histogram of every block's output, teacher and student side by side, blocks numbered as in the teacher.

    models: {"teacher": [...], "student": [...]}, one entry per block with teacher_block, min, max, mean, std, first and
    counts (see `jobs/diagnostics.py`). lists: blocks of every list of the teacher, through which teacher_block counts; of
    several every one has its name and its own numbers. The horizontal axis is linear in [-1, 1] and logarithmic beyond; heights are
    logarithms of counts, so that a handful of massive activations can be seen.
    Source: arXiv 2412.01199, figure 8.
    """
    wide, depth = width > _WIDE_FROM, sum(lists.values())
    figure, columns = row_of_blanks(width, 60 + (30 if depth <= 16 else 22) * depth, len(models))
    most = max((max(entry["counts"]) for entries in models.values() for entry in entries), default=1)
    ends = [symmetric_log(e[k]) for entries in models.values() for e in entries for k in ("min", "max")]
    low, high = min(ends), max(ends)
    room = 0.42 if wide else 0.03
    coarse = 1 if wide and depth <= 16 else 2
    for axes, (name, entries) in zip(columns, models.items(), strict=True):
        for entry in entries:
            _ridge(axes, entry, bin_width, most, coarse, TEACHER if name == "teacher" else STUDENT)
            if wide:
                text = f"{_short(entry['min'])} to {_short(entry['max'])}, σ {significant(entry['std'], 2)}"
                place = (1.0, entry["teacher_block"] + 0.08)
                axes.text(*place, text, transform=axes.get_yaxis_transform(), ha="right", fontsize=10, color=MUTED)
        axes.set_title(name, color=TEACHER if name == "teacher" else STUDENT, fontsize=12, loc="left")
        span = high - low
        axes.set(xlim=(low - 0.03 * span, high + room * span), ylim=(-0.3, depth + 0.1))
        axes.xaxis.set_major_locator(FixedLocator([symmetric_log(v) for v in _decades(low, high, 7 if wide else 5)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: _short(linear_of(place))))
        axes.set_xlabel("value of an activation")
        axes.tick_params(axis="y", labelleft=axes is columns[0])
    columns[0].set_yticks(range(depth), [str(i) for blocks in lists.values() for i in range(blocks)])
    columns[0].set_ylabel("block of the teacher")
    _part_lists(columns, lists)
    return svg(figure, f"{salt}-activations-{width}", "histograms of the outputs of every block")


def _part_lists(columns: Sequence[Axes], lists: Mapping[str, int]) -> None:
    """A line where a list of blocks ends and the next begins, with the name of each; nothing where there is one."""
    if len(lists) < 2:
        return
    for name, first in first_blocks(lists).items():
        for axes in columns:
            axes.axhline(first - 0.06, color=MUTED, linewidth=0.8)
        place = (0.0, first + 0.6)
        columns[0].text(*place, f" {name}", transform=columns[0].get_yaxis_transform(), fontsize=10.5, color=MUTED)


def _ridge(axes: Axes, entry: Mapping[str, Any], bin_width: float, most: int, coarse: int, colour: str) -> None:
    """One block's histogram, by `coarse` bins at a time, on the line of its block."""
    base, first = entry["teacher_block"], entry["first"]
    counts = np.asarray(entry["counts"], dtype=np.float64)
    counts = np.pad(counts, (first % coarse, -(len(counts) + first) % coarse)).reshape(-1, coarse).mean(1)
    heights = base + 0.86 * np.log1p(np.pad(counts, 1)) / math.log1p(most)
    centres = bin_width * coarse * (first // coarse - 0.5 + np.arange(len(heights)))
    axes.fill_between(centres, heights, base, facecolor=colour, alpha=0.4, linewidth=0)
    for value in (entry["min"], entry["max"]):
        axes.plot([symmetric_log(value)] * 2, [base, base + 0.6], color=CUT, linewidth=1.5, solid_capstyle="butt")
    for value in (entry["mean"] - entry["std"], entry["mean"] + entry["std"]):
        axes.plot([symmetric_log(value)] * 2, [base, base + 0.86], color=INK, linewidth=1, linestyle=(0, (2, 2)))


def symmetric_log(value: float) -> float:
    """Value itself in [-1, 1], sign and 1 + log10 of the magnitude beyond."""
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


def linear_of(place: float) -> float:
    """The inverse of `symmetric_log`."""
    return place if abs(place) <= 1 else math.copysign(10 ** (abs(place) - 1), place)


def _decades(low: float, high: float, most: int) -> list[float]:
    """0 and powers of ten between two places of the axis, at most that many."""
    reach = [i for i in range(0, 12) if i + 1 <= max(abs(low), abs(high)) + 1e-9]
    for stride in range(1, len(reach) + 2):
        powers = [10.0**i for i in reach[::stride]]
        found = [v for v in (*(-p for p in reversed(powers)), 0.0, *powers) if low <= symmetric_log(v) <= high]
        if len(found) <= most:
            return found
    return [0.0]


def _short(value: float) -> str:
    """Up to two significant digits or whole, with a true minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"
    return text.replace("-", "−")


def depth_speed_chart(
    points: Sequence[Mapping[str, Any]],
    teacher_depth: int,
    own: Sequence[Mapping[str, Any]],
    width: int,
    salt: str = "",
) -> str:
    """Measured speed-up against compression, on logarithmic axes, with the linear ideal L / (L - k) for k blocks less.

    points: entries with depth, speedup and speedup_spread (quartiles of the ratios measured side by side). own: those of
    them that have the depth of the student.
    Source: arXiv 2412.01199, figure 4.
    """
    figure, axes = blank(width, 300)
    axes.set(xscale="log", yscale="log")
    compression = [teacher_depth / point["depth"] for point in points]
    speed = [point["speedup"] for point in points]
    low, high = 0.93, max(*compression, *speed) * 1.08
    ideal = f"ideal: {teacher_depth} / blocks left"
    axes.plot([1, high], [1, high], color=MUTED, linewidth=1.2, linestyle=(0, (3, 3)), label=ideal)
    spread = np.array(
        [[s - p["speedup_spread"][0], p["speedup_spread"][1] - s] for p, s in zip(points, speed, strict=True)]
    )
    axes.errorbar(
        compression, speed, yerr=np.maximum(spread, 0).T, color=STUDENT, linewidth=1.8, marker="o", markersize=4.5,
        elinewidth=1, capsize=2, label="measured",
    )  # fmt: skip
    for x, y in ((teacher_depth / point["depth"], point["speedup"]) for point in own):
        axes.plot([x], [y], "s", color=STUDENT, markersize=9)
        axes.annotate(
            "this student's depth",
            (x, y),
            xytext=(8, -5),
            textcoords="offset points",
            va="top",
            fontsize=10.5,
            color=STUDENT,
        )
    axes.set(xlim=(low, high), ylim=(low, high), ylabel="times as fast")
    axes.set_xlabel(f"blocks left of {teacher_depth}; axis: compression, logarithmic")
    shown = _apart(compression, width - 60, low, high)
    axes.xaxis.set_major_locator(FixedLocator([compression[i] for i in shown]))
    labels = {compression[i]: str(points[i]["depth"]) for i in shown}
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: next((t for v, t in labels.items() if math.isclose(v, x)), ""))
    )
    axes.yaxis.set_major_locator(FixedLocator([v for v in (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30) if v <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    legend(axes)
    return svg(figure, f"{salt}-depth-speed-{width}", "measured speed-up against compression, with the linear ideal")


def _apart(values: Sequence[float], width: float, low: float, high: float) -> list[int]:
    """Indices of values on a logarithmic axis that are far enough apart for a label each."""
    shown: list[int] = []
    for i, value in enumerate(values):
        x = width * math.log(value / low) / math.log(high / low)
        if not shown or x - width * math.log(values[shown[-1]] / low) / math.log(high / low) >= 22:
            shown.append(i)
    return shown


def fid_curves(curves: Sequence[Curve], baselines: Sequence[Mark], width: int, salt: str = "") -> str:
    """FID against recovery steps on a logarithmic axis, a line per method, and models to compare with as level lines.

    Source: arXiv 2412.01199, figure 14.
    """
    figure, axes = blank(width, 300)
    axes.set_yscale("log")
    for curve in curves:
        axes.plot(
            curve.x,
            curve.y,
            color=curve.colour,
            linewidth=1.8,
            marker="o",
            markersize=5,
            label=curve.label,
            clip_on=False,
        )
    for mark in baselines:
        axes.axhline(mark.value, color=mark.colour, linewidth=1.2, linestyle=(0, (3, 3)), label=mark.label)
    ends = [*(y for curve in curves for y in curve.y), *(mark.value for mark in baselines)]
    low, high = min(ends) / 1.2, max(ends) * 1.2
    axes.set(ylim=(low, high), xlabel="step of the recovery", ylabel="FID, lower is better")
    axes.set_xlim(left=min(0.0, *(x for curve in curves for x in curve.x)))
    axes.grid(axis="y", which="major", color=LINE, linewidth=0.8)
    log_labels(axes.yaxis, (low, high))
    legend(axes)
    return svg(figure, f"{salt}-fid-steps-{width}", "FID against the steps of the recovery")
