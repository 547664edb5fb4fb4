"""Charts as SVG text that takes its colours and its type from the page around it.

Colours are drawn as stand-ins and replaced by CSS variables, so a chart follows the page's colour scheme. Widths and
heights are CSS pixels. No pyplot, no state.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, LINE, BAND = "#010101", "#020202", "#030303", "#040404"
TEACHER, CUT, STUDENT, EXTRA = "#050505", "#060606", "#070707", "#080808"
_VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", BAND: "band",
    TEACHER: "teacher", CUT: "cut", STUDENT: "student", EXTRA: "extra",
}  # fmt: skip
_LEVELS = 12  # steps of opacity


@dataclass(frozen=True)
class Curve:
    """One line of a chart: x, y of the same length, a colour of this module."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def decision_dynamics(
    records: Sequence[Mapping[str, Any]],
    sizes: Sequence[Sequence[int]],
    final: Sequence[int],
    name: str,
    width: int,
    max_records: int,
    salt: str = "",
) -> str:
    """Which blocks win at which step: one point per kept block and log record, opacity = confidence above chance.

    records: lines of metrics.jsonl with step, kept[name], confidence[name] (one per group). sizes: [N, M] per group.
    final: kept blocks of the decision, marked at the right edge. max_records: evenly thinned to that many.
    Source: arXiv 2412.01199, figure 6 and its drawing rule alpha = (confidence - chance) / (1 - chance).
    """
    shown = [records[i] for i in _thinned(len(records), max_records)]
    depth = sum(size for _, size in sizes)
    figure, axes = _figure(width, 70 + (17 if depth <= 16 else 14) * depth)
    last = max(float(shown[-1]["step"]), 1.0)
    _group_bands(axes, [size for _, size in sizes])
    points = dynamics_points(shown, sizes, name)
    dot = min(7.0 if width > 600 else 4.5, 0.75 * width / len(shown))
    _dots(axes, [(x, y) for x, y, _ in points], LINE, 1.0, dot * 0.6)
    for level in range(1, _LEVELS + 1):
        same = [(x, y) for x, y, opacity in points if round(opacity * _LEVELS) == level]
        _dots(axes, same, STUDENT, level / _LEVELS, dot)
    edge = last * 1.035
    axes.plot([edge] * len(final), list(final), "s", color=STUDENT, markersize=6, clip_on=False)
    axes.set(xlim=(-0.02 * last, edge * 1.02), ylim=(-0.7, depth - 0.3), xlabel="step", ylabel="block of the teacher")
    axes.set_yticks(range(depth))
    axes.grid(False)
    return _svg(figure, f"{salt}-dynamics-{name}-{width}", "blocks kept at every logged step, confidence as opacity")


def dynamics_points(
    records: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]], name: str
) -> list[tuple[float, int, float]]:
    """(step, block, opacity) of every kept block of every record; opacity clamped to [0, 1]."""
    group_of = [g for g, (_, size) in enumerate(sizes) for _ in range(size)]
    chance = [1 / comb(size, keep) for keep, size in sizes]
    points = []
    for record in records:
        confidence = record["confidence"][name]
        for block in record["kept"][name]:
            group = group_of[block]
            above = (confidence[group] - chance[group]) / (1 - chance[group]) if chance[group] < 1 else 1.0
            points.append((float(record["step"]), int(block), min(max(above, 0.0), 1.0)))
    return points


def confidence_curves(
    records: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]], name: str, width: int, salt: str = ""
) -> str:
    """Confidence of every group over the steps, with the chance level of the commonest group size."""
    figure, axes = _figure(width, 240)
    shown = [records[i] for i in _thinned(len(records), 120)]
    steps = [record["step"] for record in shown]
    values = np.array([record["confidence"][name] for record in shown], dtype=np.float64)
    for i in range(len(sizes)):
        axes.plot(steps, values[:, i], color=STUDENT, linewidth=1, alpha=0.35)
    axes.plot(steps, np.median(values, axis=1), color=STUDENT, linewidth=2, label="median")
    common = max((tuple(s) for s in sizes), key=[tuple(s) for s in sizes].count)
    axes.axhline(1 / comb(common[1], common[0]), color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label="chance")
    axes.set(ylim=(0, 1.03), xlabel="step")  # what the height means is the title of the chart
    _legend(axes)
    return _svg(figure, f"{salt}-confidence-{name}-{width}", "confidence of every group over the steps of the search")


def loss_curves(curves: Sequence[Curve], title: str, width: int, salt: str = "") -> str:
    """Losses over steps on a logarithmic axis: every value faint, a running median in full."""
    figure, axes = _figure(width, 240)
    for curve in curves:
        chosen = _thinned(len(curve.x), 240)
        x, y = np.asarray(curve.x, dtype=np.float64)[chosen], np.asarray(curve.y, dtype=np.float64)
        smooth = running_median(y, len(y) // 30)[chosen]
        axes.plot(x, y[chosen], color=curve.colour, linewidth=0.8, alpha=0.3)
        axes.plot(
            x,
            smooth,
            color=curve.colour,
            linewidth=1.8,
            label=curve.label,
            marker="o" if len(x) < 3 else None,
            markersize=3,
        )
    if all(value > 0 for curve in curves for value in curve.y):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _minor_label(axes, value)))
    axes.set(xlabel="step")
    _legend(axes)
    return _svg(figure, f"{salt}-loss-{title}-{width}", title)


def running_median(values: np.ndarray, reach: int) -> np.ndarray:
    """Median over `reach` values to both sides, fewer at the ends; the same length."""
    return np.array([np.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))])


def _minor_label(axes: Axes, value: float) -> str:
    """2 and 5 between the powers of ten, where the axis spans less than two decades; else nothing."""
    low, high = axes.get_ylim()
    lead = value / 10 ** np.floor(np.log10(value))
    wanted = (2, 3, 5, 7) if high / low < 10 else (2, 5)
    return f"{value:g}" if high / low < 100 and any(abs(lead - w) < 1e-6 for w in wanted) else ""


def _thinned(num: int, most: int) -> list[int]:
    """Every so-many-th index of `num`, so that at most `most` and the last are shown."""
    stride = -(-num // most)
    return sorted({*range(0, num, stride), num - 1}) if num else []


def _figure(width: int, height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=10.5)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6 if width > 600 else 4, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure, axes


def _group_bands(axes: Axes, sizes: Sequence[int]) -> None:
    start = 0
    for i, size in enumerate(sizes):
        if i % 2 == 0:
            axes.axhspan(start - 0.5, start + size - 0.5, color=BAND, linewidth=0, zorder=0)
        start += size


def _dots(axes: Axes, points: Sequence[tuple[float, int]], colour: str, opacity: float, size: float) -> None:
    """All points as one path of zero-length strokes with round ends: some 20 bytes a point."""
    if not points:
        return
    vertices = np.repeat(np.asarray(points, dtype=np.float64), 2, axis=0)
    path = Path(vertices, [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False  # simplification would drop strokes without length
    axes.add_patch(
        PathPatch(path, fill=False, edgecolor=colour, alpha=opacity, linewidth=size, capstyle="round", clip_on=False)
    )


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers no curve; left out where there is one curve, which the title names."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(
            frameon=False, labelcolor=MUTED, fontsize=10.5, handlelength=1.2, ncols=2, columnspacing=1.6,
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0,
        )  # fmt: skip


def _svg(figure: Figure, salt: str, description: str) -> str:
    """The figure as an <svg> element without fixed size, ids unique to `salt`, colours as CSS variables."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "axes.unicode_minus": True}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    view_box = re.search(r'viewBox="([^"]*)"', body)
    assert view_box is not None, "matplotlib writes a viewBox"
    body = re.sub(
        r"<svg[^>]*>",
        f'<svg class="chart" viewBox="{view_box[1]}" role="img" aria-label="{_attribute(description)}">',
        body,
        count=1,
    )
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r" ?font-family: [^;\"]*;", "", body)
    body = re.sub(r"#0[1-8]0[1-8]0[1-8]", lambda match: f"var(--{_VARIABLES[match[0]]})", body)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), body)  # places, not the labels
    prefix = hashlib.sha256(salt.encode()).hexdigest()[:6]
    body = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    return re.sub(r"\s*\n\s*", "\n", body).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
