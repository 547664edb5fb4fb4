"""Charts of `explain`: loss without each block, by noise level and class, its updates, channels, likeness, and drawn images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.report.canvas import WIDE_PX, Axis, Panel, Plot, Shape, Text, cells, rectangle
from tinyfusion.report.charts import Chart, chart
from tinyfusion.report.diagnostic_charts import short_number, short_time
from tinyfusion.report.format import percent, significant
from tinyfusion.report.images import as_picture, data_uri, tiled
from tinyfusion.report.load import Run
from tinyfusion.report.tables import Table

_FAINT, _FULL = 0.01, 100.0  # added loss, as a share of the whole model's, at no and at full colour
_CERTAIN = 3.0  # standard errors, from which a class differs from the mean
_LEGIBLE_CELL_PX = 34  # narrower cells have no numbers
_DARK = 0.72  # opacity from which numbers in a cell are light
_LEVELS_SHOWN = 128  # of 255: a difference with full colour
_MOST_DRAWN_ROWS = 40
_SMALL_PX, _THUMBNAIL_PX = 32, 64
_BRIGHTER, _DARKER = (11, 122, 114), (194, 73, 29)


@dataclass(frozen=True)
class DrawnRow:
    """Images by the model without a block, and where they differ from those of the whole model. difference: mean, in words."""

    title: str
    images: str
    changes: str
    width_px: int
    difference: str


def block_charts(run: Run) -> list[Chart]:
    """The charts of a record of `explain`; none without one."""
    if (record := run.measured.get("explain")) is None:
        return []
    charts = [_loss_chart(record), *_noise_charts(record), *_class_charts(record), *_update_charts(record)]
    return [*charts, *_channel_charts(record), _likeness_chart(record)]


def block_names(lists: Mapping[str, int]) -> list[str]:
    """The number of every block in its list, with the list where there are several."""
    several = len(lists) > 1
    return [f"{name} {i}" if several else str(i) for name, depth in lists.items() for i in range(depth)]


# ------------------------------------------------------------------------------------------------------------------- loss


def _loss_chart(record: Mapping[str, Any]) -> Chart:
    names, blocks = block_names(record["model"]["lists"]), record["blocks"]
    added = [(block["added_loss"]["mean"], block["added_loss"]["error"]) for block in blocks]
    drawn = (record["drawn"] or {}).get("difference") or [None] * len(blocks)
    rows = []
    for name, block, (mean, error), difference in zip(names, blocks, added, drawn, strict=True):
        times = significant(mean / error) if mean is not None and error else "–"
        means = [significant(block[key]["mean"]) for key in ("update_cosine", "update_norm", "influence")]
        rows.append([name, significant(mean), significant(error, 2), times, *means,
                     _percent(block["attention_share"]["mean"]), _percent(difference)])  # fmt: skip
    head = ["block", "added loss", "standard error", "in errors", "cosine of update", "size of update", "influence", "attention",
            "change of images"]  # fmt: skip
    whole = record["loss"]["mean"]
    return chart("Loss added by removing a block", "explain-loss", partial(_bars, names, added, whole),
                 Table(head, rows, f"Loss of the whole model: {significant(whole, 4)}."), record["protocol"], whole=whole)  # fmt: skip


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _bars(
    names: Sequence[str], added: Sequence[tuple[float | None, float | None]], whole: float | None, width: int
) -> Plot:
    """A bar per block on a logarithmic axis, with two standard errors, and the loss of the whole model."""
    known = [(i, mean, error or 0.0) for i, (mean, error) in enumerate(added) if mean is not None and mean > 0]
    values = [value for _, mean, error in known for value in (mean, mean + 2 * error)] or [1.0]
    low, high = min(values) / 2, max([*values, whole or 0.0]) * 1.6
    bars = [rectangle(i - 0.36, low, i + 0.36, mean) for i, mean, _ in known]
    errors = [[(i, max(mean - 2 * error, low)), (i, mean + 2 * error)] for i, mean, error in known]
    items: list[Shape | Text] = [Shape(bars, "student", fill=True, opacity=0.75), Shape(errors, "ink", width=1.4)]
    if whole is not None:
        line = [(-0.6, whole), (len(names) - 0.4, whole)]
        items += [Shape([line], "teacher", width=1.2, dashed=True)]
        items += [Text(len(names) - 0.4, whole, "loss of the whole model", "teacher", "end", dy=-5)]
    helps = [i for i, (mean, _) in enumerate(added) if mean is not None and mean <= 0]
    items += [Text(i, low, "≤ 0", "pruned", "middle", dy=-4) for i in helps]
    every = 1 if len(names) * 16 < width else 4
    ticks = [(float(i), name) for i, name in enumerate(names) if i % every == 0]
    return Plot(
        Axis(low, high, "added loss", log=True), [Panel(Axis(-0.6, len(names) - 0.4, "block", ticks=ticks), items)], 260
    )


def _noise_labels(noise: Mapping[str, Any]) -> list[str]:
    edges = [short_time(edge) if abs(edge) >= 10 or edge == 0 else f"{edge:.2g}" for edge in noise["edges"]]
    return [f"{a} to {b}" for a, b in zip(edges, edges[1:], strict=False)]


def _noise_charts(record: Mapping[str, Any]) -> list[Chart]:
    if record["noise"] is None:
        return []
    labels, shares = _noise_labels(record["noise"]), _shares(record, "by_noise")
    plot = _map(shares, block_names(record["model"]["lists"]), labels, _strength, _share_words, record["noise"]["name"])
    table = _table(record, labels, shares, _share_words)
    return [chart("When each block matters", "explain-noise", plot, table, axis=record["noise"]["name"])]


def _shares(record: Mapping[str, Any], by: str) -> np.ndarray:
    """(blocks, parts): loss added by removing a block, as a share of the whole model's loss in the same part."""
    whole = _floats(part["mean"] for part in record["loss"][by])
    added = np.array([_floats(part["mean"] for part in block["added_loss"][by]) for block in record["blocks"]])
    with np.errstate(divide="ignore", invalid="ignore"):
        return added / whole


def _floats(values: Any) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _strength(share: float) -> float:
    """The colour of an added loss: 0 at 1 % of the whole model's and below, 1 at 100 times and above; negative where it falls."""
    if abs(share) < _FAINT:
        return 0.0
    return math.copysign(min(math.log(abs(share) / _FAINT) / math.log(_FULL / _FAINT), 1.0), share)


def _share_words(share: float) -> str:
    if not math.isfinite(share):
        return ""
    return f"{significant(share, 2)}×" if abs(share) >= 0.995 else f"{100 * share:.0f} %"


def _class_charts(record: Mapping[str, Any]) -> list[Chart]:
    if len(record["classes"]) < 2:
        return []
    means = np.array([_floats(part["mean"] for part in block["added_loss"]["by_class"]) for block in record["blocks"]])
    own = _floats(block["added_loss"]["mean"] for block in record["blocks"])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means / own[:, None]
    errors = np.array([_floats(p["error"] for p in block["added_loss"]["by_class"]) for block in record["blocks"]])
    certain = np.abs(means - own[:, None]) > _CERTAIN * errors
    labels = list(map(str, record["classes"]))
    names, colours = block_names(record["model"]["lists"]), _strengths(ratios, _ratio_strength) * certain
    plot = _map(ratios, names, labels, colours, _ratio_words, "class")
    return [chart("Which classes need it", "explain-class", plot, _table(record, labels, ratios, _ratio_words))]


def _ratio_strength(ratio: float) -> float:
    """The colour of a ratio to the block's mean: full at twice and at half."""
    return float(np.clip(math.log2(ratio), -1, 1)) if ratio > 0 else 0.0


def _ratio_words(ratio: float) -> str:
    return f"{ratio:.2f}" if math.isfinite(ratio) else ""


def _table(
    record: Mapping[str, Any], labels: Sequence[str], values: np.ndarray, words: Callable[[float], str]
) -> Table:
    names = block_names(record["model"]["lists"])
    return Table(
        ["block", *labels], [[name, *map(words, row)] for name, row in zip(names, values.tolist(), strict=True)]
    )


# --------------------------------------------------------------------------------------------------------------- updates


def _update_charts(record: Mapping[str, Any]) -> list[Chart]:
    """Size, direction and share of attention of every block's update, by noise level."""
    if record["noise"] is None:
        return []
    names, labels, charts = block_names(record["model"]["lists"]), _noise_labels(record["noise"]), list[Chart]()
    kinds: dict[str, tuple[str, Callable[[float], float], Callable[[float], str]]] = {
        "update_norm": ("Size of its update", lambda value: min(value, 1.0), _plain_words),
        "update_cosine": ("Direction of its update", lambda value: value, partial(_plain_words, form="+.2f")),
        # no colour at one half
        "attention_share": ("Share of attention", lambda value: float(np.clip(2 * value - 1, -1, 1)), _plain_words),
    }
    for key, (title, strength, words) in kinds.items():
        values = np.array([_floats(block[key]["by_noise"]) for block in record["blocks"]])
        if np.isfinite(values).any():
            plot = _map(values, names, labels, strength, words, record["noise"]["name"])
            charts.append(chart(title, f"explain-{key}", plot, _table(record, labels, values, words), small=True))
    return charts


def _plain_words(value: float, form: str = ".2f") -> str:
    return format(value, form).replace("-", "−") if math.isfinite(value) else ""


def _channel_charts(record: Mapping[str, Any]) -> list[Chart]:
    """A map of the channels with the largest values, per list of blocks."""
    charts, lists = [], record["model"]["lists"]
    for name, first in first_blocks(lists).items():
        blocks = record["blocks"][first : first + lists[name]]
        values = np.array([_floats(block["activations"]["ratios"]) for block in blocks])
        labels = list(map(str, record["channels"][name]))
        large = sorted({channel for block in blocks for channel in block["activations"]["large"]})
        born = {c: next(b["block"] - first for b in blocks if c in b["activations"]["large"]) for c in large}
        massive = sorted({channel for block in blocks for channel in block["activations"]["massive"]})
        plot = _map(values, [str(i) for i in range(len(blocks))], labels, _channel_strength, short_number, "channel")
        head = ["block", "median magnitude", "largest", *(f"channel {label}" for label in labels)]
        rows = []
        for number, block in enumerate(blocks):
            own = block["activations"]
            rows.append(
                [str(number), significant(own["median"]), significant(own["largest"]), *map(significant, own["ratios"])]
            )
        title = "Channels with large activations" + (f": {name}" if len(lists) > 1 else "")
        charts.append(chart(title, "explain-channels", plot, Table(head, rows), born=born, massive=massive))
    return charts


def _channel_strength(ratio: float) -> float:
    """The colour of a magnitude in medians: none at 2, full at 20."""
    return float(np.clip(math.log(ratio / 2) / math.log(10), 0, 1)) if ratio > 0 else 0.0


# -------------------------------------------------------------------------------------------------------------- likeness


def _likeness_chart(record: Mapping[str, Any]) -> Chart:
    similar = record["similarity"]
    own, others = block_names(record["model"]["lists"]), block_names(similar["lists"])
    values = np.array([_floats(row) for row in similar["matrix"]])
    finite = values[np.isfinite(values)]
    low = float(np.clip(finite.min(), 0, 0.95)) if len(finite) else 0.0
    itself = similar["with"] == "itself"
    marks = similar["origins"] if similar["origins"] and len(similar["origins"]) == len(own) else None
    word = "block" if itself else "block of the teacher"
    plot = _map(values, own, others, lambda value: (value - low) / (1 - low), _plain_words, word,
                marks, None if itself else similar["most_like"], "block" if itself else "block of the student")  # fmt: skip
    rows = []
    for i, name in enumerate(own):
        best, origin = similar["most_like"][i], "–" if marks is None else others[marks[i]]
        like = [] if itself else [origin, "–" if best is None else others[best]]
        rows.append([name, *like, *map(_plain_words, values[i].tolist())])
    table = Table(["block", *([] if itself else ["was", "is most like"]), *others], rows)
    title = "Which blocks are alike" if itself else "What its blocks have grown into"
    return chart(
        title, "explain-likeness", plot, table, itself=itself, rows=similar["rows"], source=similar["source"], low=low
    )


# ------------------------------------------------------------------------------------------------------------------ maps


def _strengths(values: np.ndarray, strength: Callable[[float], float]) -> np.ndarray:
    """The colours of values; none of those that are not finite."""
    return np.vectorize(lambda value: strength(value) if math.isfinite(value) else 0.0, otypes=[float])(values)


def _map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], strength: Callable[[float], float] | np.ndarray,
    words: Callable[[float], str], label: str, marks: Sequence[int] | None = None, dots: Sequence[int | None] | None = None,
    row_label: str = "block",
) -> Callable[[int], Plot]:  # fmt: skip
    """A cell per row (from below) and column, coloured by `strength` (-1 to 1, or its function), with its number where there is room.

    marks, dots: of every row the column of a framed cell, and of one with a dot.
    """

    def plot(width: int) -> Plot:
        depth, num = len(rows), len(columns)
        colours = strength if isinstance(strength, np.ndarray) else _strengths(values, strength)
        items: list[Shape | Text] = list(cells(colours, range(num + 1), "student", "pruned"))
        if (width - 60) / max(num, 1) >= _LEGIBLE_CELL_PX:
            for i, line in enumerate(values):
                for j, value in enumerate(line):
                    colour = "card" if abs(colours[i, j]) > _DARK else "ink"
                    items.append(Text(j + 0.5, i, words(float(value)), colour, "middle", dy=4))
        for i, column in enumerate(marks or ()):
            corners = rectangle(column + 0.02, i - 0.46, column + 0.98, i + 0.46)
            items.append(Shape([[*corners, corners[0]]], "ink", width=1.8))
        spots = [[(column + 0.88, i)] for i, column in enumerate(dots or ()) if column is not None]
        items += [Shape(spots, "pruned", width=0, dots=7)] if spots else []
        room = max(map(len, columns), default=1) * 6.5 + 8
        every = max(1, math.ceil(room * num / (width - 60)))
        ticks = [(j + 0.5, text) for j, text in enumerate(columns) if j % every == 0]
        names = [(float(i), name) for i, name in enumerate(rows) if depth <= 20 or i % 4 == 0]
        axis = Axis(-0.6, depth - 0.4, row_label, ticks=names)
        height = 80 + (22 if depth <= 16 else 13) * depth
        return Plot(
            axis,
            [Panel(Axis(0, num, label, ticks=ticks), items)],
            height if width == WIDE_PX else 80 + 17 * depth,
            grid=False,
        )

    return plot


# ---------------------------------------------------------------------------------------------------------- drawn images


def drawn_rows(run: Run) -> list[DrawnRow]:
    """Strips of the drawn images: by the whole model, then without each block, at most 40 of them, evenly spread."""
    record, drawn = run.measured.get("explain") or {}, run.drawn
    if not record.get("drawn") or drawn is None:
        return []
    names, num = block_names(record["model"]["lists"]), len(record["drawn"]["labels"])
    images = drawn.images.reshape(len(names) + 1, num, *drawn.images.shape[1:])
    every = math.ceil(len(names) / _MOST_DRAWN_ROWS)
    rows = [_drawn_row("whole model", images[0], None, "")]
    for i in range(0, len(names), every):
        difference = record["drawn"]["difference"][i]
        rows.append(_drawn_row(f"without {names[i]}", images[i + 1], images[0], _percent(difference)))
    return rows


def _drawn_row(title: str, images: np.ndarray, whole: np.ndarray | None, difference: str) -> DrawnRow:
    strip, width_px = _strip(images)
    if whole is None:
        return DrawnRow(title, strip, "", width_px, difference)
    change = (images.astype(np.float64) - whole).mean(axis=-1)
    maps = np.zeros((*change.shape, 4), dtype=np.uint8)
    maps[..., :3] = np.where(change[..., None] > 0, _BRIGHTER, _DARKER)
    maps[..., 3] = np.clip(255 * np.abs(change) / _LEVELS_SHOWN, 0, 255)
    return DrawnRow(title, strip, _strip(maps)[0], width_px, difference)


def _strip(images: np.ndarray) -> tuple[str, int]:
    """(data URI, width in CSS pixels) of images in one row; larger ones as thumbnails."""
    side = max(images.shape[1:3])
    if side <= _SMALL_PX:
        grid = tiled(images, len(images))
        return data_uri(Image.fromarray(grid)), grid.shape[1] * max(1, round(4 * 8 / side))
    size, mode = (_THUMBNAIL_PX, _THUMBNAIL_PX), "RGBA" if images.shape[-1] == 4 else "RGB"
    small = [np.asarray(as_picture(image).convert(mode).resize(size, Image.Resampling.BOX)) for image in images]
    grid = tiled(small, len(small))
    return data_uri(Image.fromarray(grid)), grid.shape[1]
