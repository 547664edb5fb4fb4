"""A plan as a small picture: the blocks of the parent in a row, those that stay in colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_STAYS, _EDGE, _INK = "#2a6f97", "#9aa5b1", "#334155"
_CELL, _GAP, _ROW, _MARGIN = 34, 4, 76, 12  # pixels: a block, between two, a list of blocks with its title, around all


def plan_png(kept: Mapping[str, Sequence[int]], depth: Mapping[str, int]) -> bytes:
    """One row of numbered cells per list of blocks, as PNG.

    kept: indices that stay, per list. depth: blocks of the parent, per list.
    """
    width = max(480, 2 * _MARGIN + max(depth.values()) * _CELL)
    image = Image.new("RGB", (width, 2 * _MARGIN + _ROW * len(depth)), "white")
    draw, title, number = ImageDraw.Draw(image), ImageFont.load_default(16), ImageFont.load_default(13)
    for row, (name, blocks) in enumerate(depth.items()):
        stays, top = set(kept[name]), _MARGIN + _ROW * row
        draw.text((_MARGIN, top), f"{name}: {len(stays)} of {blocks} blocks stay", _INK, title)
        for i in range(blocks):
            left, upper = _MARGIN + _CELL * i, top + 26
            fill, ink = (_STAYS, "white") if i in stays else ("white", _EDGE)
            draw.rectangle((left, upper, left + _CELL - _GAP, upper + _CELL - _GAP), fill, _EDGE)
            draw.text((left + (_CELL - _GAP) / 2, upper + (_CELL - _GAP) / 2), str(i), ink, number, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
