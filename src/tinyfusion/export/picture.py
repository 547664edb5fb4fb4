"""A plan as a small picture: the blocks of the parent in a row, those that stay in colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

_STAYS, _GOES, _EDGE, _INK = "#2a6f97", "#ffffff", "#9aa5b1", "#334155"


def plan_png(kept: Mapping[str, Sequence[int]], depth: Mapping[str, int]) -> bytes:
    """One row of numbered cells per list of blocks, as PNG.

    kept: indices that stay, per list. depth: blocks of the parent, per list.
    """
    most = max(depth.values())
    figure = Figure(figsize=(max(4.0, 0.28 * most + 0.6), 0.62 * len(depth) + 0.35), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    axes.set(xlim=(-0.2, most + 0.2), ylim=(-1.6 * len(depth), 0.9))
    axes.axis("off")
    for row, (name, blocks) in enumerate(depth.items()):
        top, stays = -1.6 * row, set(kept[name])
        axes.text(0, top + 0.2, f"{name}: {len(stays)} of {blocks} blocks stay", fontsize=8, color=_INK, va="bottom")
        for i in range(blocks):
            colour = _STAYS if i in stays else _GOES
            axes.add_patch(
                Rectangle((i + 0.06, top - 0.95), 0.88, 0.95, facecolor=colour, edgecolor=_EDGE, linewidth=0.8)
            )
            ink = "white" if i in stays else _EDGE
            axes.text(i + 0.5, top - 0.48, str(i), fontsize=6.5, color=ink, ha="center", va="center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
