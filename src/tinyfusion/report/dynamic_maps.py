"""What a dynamic model runs, drawn: shares of units per block over the times of a sampler, and tokens beside the images.

The numbers are those of kept.json (see `jobs/dynamic_record.py`). Pure: values in, SVG text or a picture out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter
from PIL import Image

from tinyfusion.report.canvas import EDGE_RGBA, EXTRA, blank, cells, svg, thinned
from tinyfusion.report.format import count, percent, significant
from tinyfusion.report.tables import Table

_LEVELS = 20  # of opacity
_MOST_TIMES = {True: 120, False: 50}  # columns by whether the chart is wide
_WIDE_FROM = 600
_TILE_PX = 96
_GAP_PX = 8
_TOKEN_RGB = (132, 85, 176)  # of the page's `extra`, which a picture cannot name
_TABLE_TIMES = 8
_WORDS = {
    "heads": "heads of a block's attention",
    "groups": "groups of a block's hidden channels",
    "tokens": "tokens that a block's MLP saw, mean over images",
    "gate": "blocks",
}


def kept_map(shares: Sequence[Sequence[float]], times: Sequence[float], width: int, salt: str) -> str:
    """A cell per block (row) and time (column, in the order of sampling), the stronger the larger the share that runs.

    shares: one row per block, one column per time, 0 to 1. Source: DyDiT (arXiv 2410.03456), figure of activated units.
    """
    depth, chosen = len(shares), thinned(len(times), _MOST_TIMES[width > _WIDE_FROM])
    figure, axes = blank(width, 64 + (17 if depth <= 16 else 12) * depth)
    found: dict[int, list[tuple[float, float, float, float]]] = {}
    for block, row in enumerate(shares):
        levels = [round(_LEVELS * row[i]) for i in chosen]
        start = 0
        for end in range(1, len(levels) + 1):  # equal neighbours are one cell
            if end == len(levels) or levels[end] != levels[start]:
                if levels[start]:
                    found.setdefault(levels[start], []).append((start, block - 0.46, end, block + 0.46))
                start = end
    for level, places in sorted(found.items()):
        cells(axes, places, EXTRA, level / _LEVELS)
    axes.set(xlim=(0, len(chosen)), ylim=(-0.7, depth - 0.3), ylabel="block")
    axes.set_xlabel("time that the network is given, from noise to image")
    stride = 1 if depth <= 16 else 3
    axes.set_yticks(range(0, depth, stride))
    marked = thinned(len(chosen), 8 if width > _WIDE_FROM else 4)
    axes.xaxis.set_major_locator(FixedLocator([i + 0.5 for i in marked]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda place, _: short_time(times[chosen[min(int(place), len(chosen) - 1)]]))
    )
    axes.grid(False)
    return svg(figure, f"{salt}-kept-{width}", "share of every block that runs, over the times of a sampler")


def short_time(value: float) -> str:
    """A time of a chain as it is, one of a flow with two digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"


def told(record: Mapping[str, Any], name: str) -> str:
    """What stands above the map of one kind of unit."""
    rows = np.asarray(record["shares"][name], dtype=np.float64)
    text = f"Share of {_WORDS[name]}: full colour is all, none is nothing. "
    text += f"{percent(float(rows.mean()))} on average; at the beginning (noise) {percent(float(rows[:, 0].mean()))}, "
    text += f"in the middle {percent(float(rows[:, rows.shape[1] // 2].mean()))}, at the end {percent(float(rows[:, -1].mean()))}."
    if name == "heads" or (name == "tokens" and "heads" not in record["shares"]):
        text += f" In all {percent(record['ratio'])} of the multiply-accumulates of the blocks ran on these images, "
        text += (
            f"{count(record['macs'])} of {count(record['static_macs'])} per forward pass, in {record['sub_networks']} "
        )
        text += f"sub-network{'s' * (record['sub_networks'] != 1)} of width."
    return text


def kept_table(record: Mapping[str, Any], name: str) -> Table:
    """Mean and extremes of every block, and its share at some times."""
    times, rows = record["times"], []
    chosen = sorted({round(i) for i in np.linspace(0, len(times) - 1, _TABLE_TIMES)})
    for block, row in enumerate(record["shares"][name]):
        numbers = [sum(row) / len(row), min(row), max(row), *(row[i] for i in chosen)]
        rows.append([str(block), *(significant(value, 2) for value in numbers)])
    head = ["block", "mean", "least", "most", *(f"at {short_time(times[i])}" for i in chosen)]
    return Table(head, rows, record["protocol"])


@dataclass(frozen=True)
class TokenMaps:
    """One picture: an image per row, and beside it its tokens at some times. columns: what stands above."""

    source: str
    width_px: int
    columns: list[str]
    text: str
    protocol: str


def token_maps(record: Mapping[str, Any], data_uri: Callable[[Image.Image, str], str]) -> TokenMaps | None:
    """The picture of the tokens that the MLPs saw; None of a model that does not choose tokens."""
    maps = record.get("maps")
    if not maps:
        return None
    pairs = zip(maps["images"], maps["percent"], strict=True)
    rows = [[_image_tile(image), *map(_token_tile, shares)] for image, shares in pairs]
    num = len(rows[0])
    width = num * (_TILE_PX + _GAP_PX) - _GAP_PX
    height = len(rows) * (_TILE_PX + _GAP_PX) - _GAP_PX
    whole = np.zeros((height, width, 4), dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            top, left = y * (_TILE_PX + _GAP_PX), x * (_TILE_PX + _GAP_PX)
            whole[top : top + _TILE_PX, left : left + _TILE_PX] = tile
    shares = np.asarray(maps["percent"], dtype=np.float64)
    text = "Left the image, then its tokens along the sampling, from noise to image: the stronger the colour, the more blocks ran "
    text += f"their MLP on that token. {percent(float(shares.mean()) / 100)} on average, "
    text += (
        f"from {percent(float(shares.min()) / 100)} to {percent(float(shares.max()) / 100)} for one token at one time."
    )
    if maps["space"] == "latents":
        text += " Images are shown as latents, three channels as colours."
    columns = ["image", *(short_time(time) for time in maps["times"])]
    return TokenMaps(data_uri(Image.fromarray(whole), "PNG"), width, columns, text, record["protocol"])


def _image_tile(pixels: Sequence[Any]) -> np.ndarray:
    """(96, 96, 4) uint8 of an image (S, S, 1 or 3)."""
    values = np.asarray(pixels, dtype=np.uint8)
    image = Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).convert("RGBA")
    tile = np.array(image.resize((_TILE_PX, _TILE_PX), Image.Resampling.NEAREST))
    _draw_edge(tile, EDGE_RGBA)
    return tile


def _draw_edge(tile: np.ndarray, colour: tuple[int, int, int, int]) -> None:
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        tile[edge] = colour


def _token_tile(percent: Sequence[Sequence[int]]) -> np.ndarray:
    """(96, 96, 4) uint8 of a map of tokens, see-through where nothing ran; a frame tells it from the page."""
    shares = np.asarray(percent, dtype=np.float64) / 100
    tile = np.zeros((*shares.shape, 4), dtype=np.uint8)
    tile[..., :3] = _TOKEN_RGB
    tile[..., 3] = np.round(255 * shares)
    wide = np.array(Image.fromarray(tile).resize((_TILE_PX, _TILE_PX), Image.Resampling.NEAREST))
    _draw_edge(wide, (*_TOKEN_RGB, 255))
    return wide
