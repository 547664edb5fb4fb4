"""What every chart is drawn on and with: a bare figure, the page's colours, and SVG text out.

Colours are drawn as stand-ins and replaced by CSS variables, so a chart follows the page's colour scheme. Widths and
heights are CSS pixels. No pyplot, no state.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
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


EDGE_RGBA = (128, 128, 128, 110)  # around images: it shows on white and on black


def thinned(num: int, most: int) -> list[int]:
    """Every so-many-th index of `num`, so that at most `most` and the last are shown."""
    stride = -(-num // most)
    return sorted({*range(0, num, stride), num - 1}) if num else []


def blank(width: int, height: int) -> tuple[Figure, Axes]:
    """An empty chart of that many CSS pixels: no frame, a base line, level lines."""
    figure, (axes,) = row_of_blanks(width, height, 1)
    return figure, axes


def row_of_blanks(width: int, height: int, num: int) -> tuple[Figure, list[Axes]]:
    """Empty charts side by side, with one vertical axis, in that many CSS pixels altogether."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    figure.patch.set_alpha(0)
    made: list[Axes] = []
    for i in range(num):
        axes = figure.add_subplot(1, num, i + 1, sharey=made[0] if made else None)
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
        made.append(axes)
    return figure, made


def log_labels(axis: Axis, limits: tuple[float, float], decades: int = 2) -> None:
    """Plain numbers on a logarithmic axis; 2 and 5 between the powers of ten where fewer than `decades` are shown."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: _minor_label(*limits, value, decades)))


def _minor_label(low: float, high: float, value: float, decades: int) -> str:
    lead = value / 10 ** np.floor(np.log10(value))
    wanted = (2, 3, 5, 7) if high / low < 10 else (2, 5)
    return f"{value:g}" if high / low < 10**decades and any(abs(lead - w) < 1e-6 for w in wanted) else ""


def dots(axes: Axes, points: Sequence[tuple[float, int]], colour: str, opacity: float, size: float) -> None:
    """All points as one path of zero-length strokes with round ends: some 20 bytes a point."""
    if not points:
        return
    vertices = np.repeat(np.asarray(points, dtype=np.float64), 2, axis=0)
    path = Path(vertices, [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False  # simplification would drop strokes without length
    axes.add_patch(
        PathPatch(path, fill=False, edgecolor=colour, alpha=opacity, linewidth=size, capstyle="round", clip_on=False)
    )


def cells(
    axes: Axes, places: Sequence[tuple[float, float, float, float]], colour: str, opacity: float, zorder: float = 1
) -> None:
    """All rectangles (left, bottom, right, top) as one filled path."""
    corners = [[(a, b), (c, b), (c, d), (a, d), (a, b)] for a, b, c, d in places]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(places)
    path = Path(np.asarray(corners, dtype=np.float64).reshape(-1, 2), codes)
    axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", linewidth=0, alpha=opacity, zorder=zorder))


def legend(axes: Axes) -> None:
    """Above the axes, where it covers no curve; left out where there is one curve, which the title names."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(
            frameon=False, labelcolor=MUTED, fontsize=10.5, handlelength=1.2, ncols=2, columnspacing=1.6,
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0,
        )  # fmt: skip


def svg(figure: Figure, salt: str, description: str) -> str:
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
