"""What happened over the steps: decisions, marginals, confidence, losses. SVG text, see `canvas.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tinyfusion.report.canvas import (
    BAND,
    CUT,
    EXTRA,
    INK,
    LINE,
    MUTED,
    STUDENT,
    TEACHER,
    blank,
    cells,
    dots,
    legend,
    log_labels,
    svg,
    thinned,
)  # fmt: skip

_LEVELS = 12  # steps of opacity
_KINDS = (STUDENT, EXTRA, TEACHER, CUT, INK)  # colours of groups of unlike size


@dataclass(frozen=True)
class Curve:
    """One line of a chart: x, y of the same length, a colour of `canvas.py`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Span:
    """A group of blocks that are decided together: keep N of the M that begin at `start`, `fixed` of them protected."""

    start: int
    keep: int
    size: int
    fixed: int = 0

    @property
    def choice_chance(self) -> float:
        """One over the number of candidates: the confidence of a categorical that knows nothing."""
        return 1 / comb(self.size - self.fixed, self.keep - self.fixed)

    @property
    def block_chance(self) -> float:
        """The marginal of an unprotected block under a subset that knows nothing; 1 where all are protected."""
        free = self.size - self.fixed
        return (self.keep - self.fixed) / free if free else 1.0

    @property
    def name(self) -> str:
        """N:M."""
        return f"{self.keep}:{self.size}"


def spans(sizes: Sequence[Sequence[int]], protected: Sequence[int] = ()) -> list[Span]:
    """The groups of one list of blocks. sizes: [N, M] per group. protected: blocks of this list that always stay."""
    found: list[Span] = []
    start = 0
    for keep, size in sizes:
        fixed = sum(start <= block < start + size for block in protected)
        found.append(Span(start, keep, size, min(fixed, keep)))
        start += size
    return found


def above_chance(value: float, chance: float) -> float:
    """(value - chance) / (1 - chance), clamped to [0, 1]; 1 where chance is certainty."""
    return min(max((value - chance) / (1 - chance), 0.0), 1.0) if chance < 1 else 1.0


def decision_dynamics(
    records: Sequence[Mapping[str, Any]],
    groups: Sequence[Span],
    final: Sequence[int],
    name: str,
    width: int,
    max_records: int,
    salt: str = "",
) -> str:
    """Which blocks win at which step: one point per kept block and log record, opacity = confidence above chance.

    records: lines of metrics.jsonl with step, kept[name], confidence[name] (one per group). final: kept blocks of the
    decision, marked at the right edge. max_records: evenly thinned to that many.
    Source: arXiv 2412.01199, figure 6 and its drawing rule alpha = (confidence - chance) / (1 - chance).
    """
    shown = [records[i] for i in thinned(len(records), max_records)]
    figure, axes, last = _rows(groups, shown, width)
    points = dynamics_points(shown, groups, name)
    dot = min(7.0 if width > 600 else 4.5, 0.75 * width / len(shown))
    dots(axes, [(x, y) for x, y, _ in points], LINE, 1.0, dot * 0.6)
    for level in range(1, _LEVELS + 1):
        same = [(x, y) for x, y, opacity in points if round(opacity * _LEVELS) == level]
        dots(axes, same, STUDENT, level / _LEVELS, dot)
    _mark_final(axes, final, last)
    return svg(figure, f"{salt}-dynamics-{name}-{width}", "blocks kept at every logged step, confidence as opacity")


def dynamics_points(
    records: Sequence[Mapping[str, Any]], groups: Sequence[Span], name: str
) -> list[tuple[float, int, float]]:
    """(step, block, opacity) of every kept block of every record; opacity clamped to [0, 1]."""
    group_of = [g for g, span in enumerate(groups) for _ in range(span.size)]
    chance = [span.choice_chance for span in groups]
    points = []
    for record in records:
        confidence = record["confidence"][name]
        for block in record["kept"][name]:
            group = group_of[block]
            points.append((float(record["step"]), int(block), above_chance(confidence[group], chance[group])))
    return points


def marginal_map(
    records: Sequence[Mapping[str, Any]],
    groups: Sequence[Span],
    final: Sequence[int],
    name: str,
    width: int,
    max_records: int,
    salt: str = "",
) -> str:
    """How likely every block is to stay, at every step: a cell per block and log record, without colour at chance.

    records: lines of metrics.jsonl with step and marginals[name] (one per block). Above chance the colour of what is
    kept, below it that of what goes, as strong as the way from chance to certainty.
    """
    shown = [records[i] for i in thinned(len(records), max_records)]
    figure, axes, last = _rows(groups, shown, width, bands=False)
    edges = _edges([float(record["step"]) for record in shown], last)
    found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    for i, record in enumerate(shown):
        for block, (level, stays) in enumerate(marginal_levels(record["marginals"][name], groups)):
            if level:
                place = (edges[i], block - 0.46, edges[i + 1], block + 0.46)
                found.setdefault((STUDENT if stays else CUT, level), []).append(place)
    for (colour, level), places in sorted(found.items()):
        cells(axes, places, colour, level / _LEVELS)
    for span in groups[1:]:
        axes.axhline(span.start - 0.5, color=MUTED, linewidth=0.8)
    _mark_final(axes, final, last)
    return svg(figure, f"{salt}-marginals-{name}-{width}", "probability of every block to stay, over the steps")


def marginal_levels(values: Sequence[float], groups: Sequence[Span]) -> list[tuple[int, bool]]:
    """(step of opacity, whether above chance) of the marginal of every block; 0 at chance."""
    chance = [span.block_chance for span in groups for _ in range(span.size)]
    levels = []
    for value, base in zip(values, chance, strict=True):
        strength = above_chance(value, base) if value >= base else min((base - value) / base, 1.0)
        levels.append((round(strength * _LEVELS), value >= base))
    return levels


def _edges(steps: Sequence[float], last: float) -> list[float]:
    """Where the cell of every step begins and the last one ends: halfway to its neighbours."""
    if len(steps) == 1:
        return [steps[0] - 0.5 * last, steps[0] + 0.5 * last]
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    return [2 * steps[0] - inner[0], *inner, 2 * steps[-1] - inner[-1]]


def _rows(groups: Sequence[Span], shown: Sequence[Mapping[str, Any]], width: int, bands: bool = True) -> Any:
    """(figure, axes, last step): a row for every block of the teacher, groups shaded in turn."""
    depth = sum(span.size for span in groups)
    figure, axes = blank(width, 70 + (17 if depth <= 16 else 14) * depth)
    last = max(float(shown[-1]["step"]), 1.0)
    for span in groups[::2] if bands else ():
        axes.axhspan(span.start - 0.5, span.start + span.size - 0.5, color=BAND, linewidth=0, zorder=0)
    axes.set(xlim=(-0.02 * last, 1.055 * last), ylim=(-0.7, depth - 0.3), xlabel="step", ylabel="block of the teacher")
    axes.set_yticks(range(depth))
    axes.grid(False)
    return figure, axes, last


def _mark_final(axes: Axes, final: Sequence[int], last: float) -> None:
    axes.plot([last * 1.035] * len(final), list(final), "s", color=STUDENT, markersize=6, clip_on=False)


def confidence_curves(
    records: Sequence[Mapping[str, Any]], groups: Sequence[Span], name: str, width: int, salt: str = ""
) -> str:
    """Confidence of every group over the steps, with the chance level of every kind of group."""
    figure, axes = blank(width, 240)
    shown = [records[i] for i in thinned(len(records), 120)]
    steps = [record["step"] for record in shown]
    values = np.array([record["confidence"][name] for record in shown], dtype=np.float64)
    kinds = list(dict.fromkeys(span.name for span in groups))
    colours = {kind: _KINDS[i % len(_KINDS)] for i, kind in enumerate(kinds)}
    for i, span in enumerate(groups):
        axes.plot(steps, values[:, i], color=colours[span.name], linewidth=1, alpha=0.35)
    for kind in kinds:
        same = [i for i, span in enumerate(groups) if span.name == kind]
        label = "median" if len(kinds) == 1 else f"median {kind}"
        axes.plot(steps, np.median(values[:, same], axis=1), color=colours[kind], linewidth=2, label=label)
    _chance_lines(axes, {(colours[s.name], s.name): s.choice_chance for s in groups})
    axes.set(ylim=(0, 1.03), xlabel="step")  # what the height means is the title of the chart
    legend(axes)
    return svg(figure, f"{salt}-confidence-{name}-{width}", "confidence of every group over the steps of the search")


def marginal_curves(
    records: Sequence[Mapping[str, Any]],
    groups: Sequence[Span],
    final: Sequence[int],
    name: str,
    width: int,
    salt: str = "",
) -> str:
    """Marginal probability of every block over the steps, with the chance level of every kind of group."""
    figure, axes = blank(width, 240)
    shown = [records[i] for i in thinned(len(records), 120)]
    steps = [record["step"] for record in shown]
    values = np.array([record["marginals"][name] for record in shown], dtype=np.float64)
    named: set[str] = set()
    for block in range(values.shape[1]):
        label, colour = ("kept", STUDENT) if block in final else ("dropped", CUT)
        axes.plot(
            steps, values[:, block], color=colour, linewidth=1.2, alpha=0.7, label=None if label in named else label
        )
        named.add(label)
    _chance_lines(axes, {(MUTED, s.name): s.block_chance for s in groups})
    axes.set(ylim=(-0.03, 1.03), xlabel="step")
    legend(axes)
    return svg(figure, f"{salt}-marginal-curves-{name}-{width}", "probability of every block to stay over the steps")


def _chance_lines(axes: Axes, levels: Mapping[tuple[str, str], float]) -> None:
    """Dashed lines at the chance levels {(colour, kind of group): level}; one line for equal levels."""
    kind_of = {level: kind for kind, level in levels.items()}
    for level, (colour, kind) in kind_of.items():
        label, tone = (f"chance {kind}", colour) if len(kind_of) > 1 else ("chance", MUTED)
        axes.axhline(level, color=tone, linewidth=1, linestyle=(0, (3, 3)), label=label)


def loss_curves(curves: Sequence[Curve], title: str, width: int, salt: str = "") -> str:
    """Losses over steps on a logarithmic axis: every value faint, a running median in full."""
    figure, axes = blank(width, 240)
    for curve in curves:
        chosen = thinned(len(curve.x), 240)
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
    ends = [end(curve.y) for curve in curves for end in (min, max)]
    if min(ends) > 0 and max(ends) >= 2 * min(ends):  # in a narrower range no power of ten would have a label
        axes.set_yscale("log")
        log_labels(axes.yaxis, axes.get_ylim())
    axes.set(xlabel="step")
    legend(axes)
    return svg(figure, f"{salt}-loss-{title}-{width}", title)


def running_median(values: np.ndarray, reach: int) -> np.ndarray:
    """Median over `reach` values to both sides, fewer at the ends; the same length."""
    return np.array([np.median(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))])
