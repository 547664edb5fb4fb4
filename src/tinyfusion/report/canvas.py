"""SVG charts from plain values: axes, filled and stroked shapes, text. Colours are the CSS variables of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

WIDE_PX, NARROW_PX = 1060, 350  # of a desktop page; of a phone or a column
CHARACTER_PX = 6.2  # mean width of a character of chart text
_RIGHT, _GAP, _BOTTOM = 14, 24, 38  # margins in pixels
_CELL_LEVELS = 12  # steps of opacity
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A range of values. ticks: (value, label); None: round numbers, `whole` ones alone where wanted."""

    low: float
    high: float
    label: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    whole: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """The pixel of a value, where `low` and all below is at `start`, `high` and all above at `end`."""
        inside = min(max(value, self.low), self.high)
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, inside))
        return start + (end - start) * (at - low) / ((high - low) or 1.0)

    def labelled(self, most: int) -> list[tuple[float, str]]:
        """The ticks: those given, else at most about `most` round numbers of the range."""
        if self.ticks is not None:
            return list(self.ticks)
        values = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high, most, self.whole)
        return [(value, f"{value:,.10g}") for value in values]


def _linear_ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = max((high - low) / most, 1.0 if whole else 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and numbers between them where the range is short."""
    digits = (1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**power for power in range(first, last + 1, max((last - first) // 8, 1))]
    ticks = [digit * power for power in powers for digit in digits if low <= digit * power <= high]
    return ticks if len(ticks) > 1 else _linear_ticks(low, high, 4)


@dataclass(frozen=True)
class Shape:
    """Polylines in one colour: filled polygons, or strokes `width` wide. dots: diameter of a dot on every point.

    label: in the legend, where there is one.
    """

    lines: Sequence[Points]
    colour: str
    label: str = ""
    fill: bool = False
    width: float = 1.8
    opacity: float = 1.0
    dashed: bool = False
    dots: float = 0.0

    def svg(self, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
        """One or two <path> elements."""
        placed = [[f"{x(a):.1f} {y(b):.1f}" for a, b in line] for line in self.lines]
        drawn = "".join("M" + "L".join(line) + ("Z" if self.fill else "") for line in placed)
        if self.fill:
            return Markup('<path d="{}" fill="var(--{})" opacity="{:.2g}"/>').format(drawn, self.colour, self.opacity)
        stroke = Markup('<path d="{}" stroke="var(--{})" stroke-width="{:g}" opacity="{:.2g}"{}/>')
        dash = Markup(' stroke-dasharray="3 3"') if self.dashed else ""
        path = stroke.format(drawn, self.colour, self.width, self.opacity, dash) if self.width else Markup()
        spots = "".join(f"M{point}h0" for line in placed for point in line)
        return path + (stroke.format(spots, self.colour, self.dots, self.opacity, "") if self.dots else "")


@dataclass(frozen=True)
class Text:
    """Words at a point, `dx` and `dy` pixels away from it. anchor: start, middle or end."""

    x: float
    y: float
    text: str
    colour: str = "muted"
    anchor: str = "start"
    dx: float = 0.0
    dy: float = 0.0

    def svg(self, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
        """A <text> element."""
        return _text(x(self.x) + self.dx, y(self.y) + self.dy, self.text, self.anchor, self.colour)


@dataclass(frozen=True)
class Panel:
    """Shapes and texts over one horizontal axis."""

    x: Axis
    items: Sequence[Shape | Text]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """Panels side by side with one vertical axis, `height` pixels high. grid: horizontal lines at the ticks."""

    y: Axis
    panels: Sequence[Panel]
    height: int = 240
    grid: bool = True


def svg(plot: Plot, width: int, description: str) -> Markup:
    """The plot as an <svg> element of that many pixels, which scales to its container."""
    y_ticks = plot.y.labelled(6)
    left = 10 + CHARACTER_PX * max((len(text) for _, text in y_ticks), default=0)
    has_head = plot.y.label or any(panel.title for panel in plot.panels)
    top, bottom = 24 if has_head else 8, plot.height - _BOTTOM
    each = (width - left - _RIGHT - _GAP * (len(plot.panels) - 1)) / len(plot.panels)
    out = [_text(0, 10, plot.y.label)]
    for i, panel in enumerate(plot.panels):
        start = left + i * (each + _GAP)

        def x(value: float, axis: Axis = panel.x, start: float = start) -> float:
            return axis.place(value, start, start + each)

        def y(value: float) -> float:
            return plot.y.place(value, bottom, top)

        lines = [y(value) for value, _ in y_ticks] if plot.grid else []
        out += [
            Markup('<path class="grid" d="M{:.1f} {:.1f}h{:.1f}"/>').format(start, at, each) for at in (bottom, *lines)
        ]
        if i == 0:
            out += [_text(left - 7, y(value) + 4, text, "end") for value, text in y_ticks]
        out += [_text(x(v), bottom + 16, text, "middle") for v, text in panel.x.labelled(max(int(each / 75), 3))]
        out += [_text(start + each / 2, plot.height - 4, panel.x.label, "middle"), _text(start, 10, panel.title)]
        out += [item.svg(x, y) for item in panel.items]
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(width, plot.height, description) + Markup("\n").join(filter(None, out)) + Markup("</svg>")


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "muted") -> Markup:
    element = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="var(--{})">{}</text>')
    return element.format(x, y, anchor, colour, text) if text else Markup()


def rectangle(left: float, bottom: float, right: float, top: float) -> Points:
    """The corners of a rectangle."""
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def cells(values: np.ndarray, edges: Sequence[float], positive: str, negative: str = "") -> list[Shape]:
    """A map of values (rows, columns) in [-1, 1]: a cell per value, as opaque as it is large; none for 0 and NaN.

    edges: where the columns begin, and the last one ends. positive, negative: colours. Equal neighbours are one cell.
    """
    levels = np.round(np.nan_to_num(values) * _CELL_LEVELS).astype(int)
    places_of: dict[int, list[Points]] = {}
    for row, line in enumerate(levels):
        for a, b in pairwise([0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]):
            if line[a]:
                places_of.setdefault(int(line[a]), []).append(rectangle(edges[a], row - 0.46, edges[b], row + 0.46))
    return [
        Shape(places, positive if level > 0 else negative, fill=True, opacity=abs(level) / _CELL_LEVELS)
        for level, places in sorted(places_of.items())
    ]


def thinned(num: int, most: int) -> list[int]:
    """Indices of at most about `most` of `num` values, evenly spread, the last among them."""
    return sorted({*range(0, num, -(-num // most)), num - 1}) if num else []
