"""Runs to the text of one HTML page that needs nothing but itself: no scripts, no fonts, no addresses.

Pure: values in, text out. Numbers are not computed here but in `facts.py`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from tinyfusion.core.errors import UserError
from tinyfusion.report import decisions, facts, figures, scores
from tinyfusion.report import dynamic_maps as kept
from tinyfusion.report.canvas import EDGE_RGBA
from tinyfusion.report.format import count, duration, percent, printable, significant
from tinyfusion.report.merged_runs import stories
from tinyfusion.report.progress import going
from tinyfusion.report.run_data import MODEL_NAMES, Look, RunData, Samples

RECORD_ID = "tinyfusion-record"
_GRID_CLASSES, _GRID_ROWS = 10, 4
_SMALL_PX = 32  # images up to this size are shown pixel by pixel
_THUMBNAIL_PX = 64
_GRID_PX = 364  # a grid is at most this wide; on a phone it shrinks
_LOOK_PX = 340  # three beside each other


@dataclass(frozen=True)
class Grid:
    """Images of one model. width_px: on the page. columns: labels above, empty where unknown. protocol: how they were drawn."""

    name: str
    role: str
    caption: str
    source: str
    width_px: int
    columns: list[str]
    protocol: str


@dataclass(frozen=True)
class Picture:
    """What averaged weights drew while they trained."""

    name: str
    caption: str
    source: str
    width_px: int


def render(runs: Sequence[RunData], record: Mapping[str, Any]) -> str:
    """The page. record: what made it (see `core/rundir.stamp`), kept inside the page as JSON.

    Raises UserError where the values of a run are of the right types and yet contradict each other.
    """
    told = stories(runs)
    sections = []
    for i, run in enumerate(told, start=1):
        with _consistent(run.name):
            sections.append(_section(run, f"run-{i}", told))
    with _consistent(" and ".join(run.name for run in told)):
        page = _template().render(
            title=" · ".join(dict.fromkeys(run.title for run in told)),
            sections=sections,
            num_runs=len(runs),
            comparison=scores.comparison(told, [facts.depths(run) for run in told]),
            together=figures.together(told),
            record_id=RECORD_ID,
            record=_script_json(record),
        )
    return printable(page)


@contextmanager
def _consistent(name: str) -> Iterator[None]:
    """Lists of different lengths, blocks that no list has: whatever a check of types cannot see is one UserError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UnidentifiedImageError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the files of {name} do not fit together ({type(error).__name__}: {error}); --debug shows where"
        ) from error


def embedded_record(page: str) -> Any:
    """The record inside a page of ours; None where there is none."""
    _, begin, rest = page.partition(f'<script type="application/json" id="{RECORD_ID}">')
    text, end, _ = rest.partition("</script>")
    if not begin or not end:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


@cache
def _template() -> Template:
    text = (resources.files("tinyfusion.report") / "template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=count, duration=duration, percent=percent, significant=significant)
    return environment.from_string(text)


def _script_json(record: Mapping[str, Any]) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(record, indent=1, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _section(run: RunData, anchor: str, runs: Sequence[RunData]) -> dict[str, Any]:
    """Everything the template prints of one run."""
    lists = decisions.block_lists(run)
    return {
        "anchor": anchor,
        "run": run,
        "title": run.title,
        "description": run.recipe.get("description") or "",
        "state": run.record.get("state", "unknown"),
        "verb": run.record.get("verb", "run"),
        "going": going(run),
        "tiles": facts.headline(run),
        "lists": lists,
        "undecided": sum(len(group.undecided) for groups in lists.values() for group in groups),
        "dynamics": figures.dynamics(run, anchor),
        "curves": figures.curves(run, anchor),
        "watched": {stage: _looks(run, stage, looks) for stage, looks in run.watched.items()},
        "pictures": figures.pictures_of(run, anchor, runs),
        "tokens": kept.token_maps(run.kept, _data_uri) if run.kept else None,
        "grids": _grids(run),
        "seeds": list(dict.fromkeys(s.protocol for name, s in _shown(run).items() if name != "real")),
        "tables": scores.evaluation_tables(run),
        "pairs": scores.pairs_table(run),
        "checks": facts.checks(run),
        "stages": facts.stages(run),
        "seconds": run.record.get("seconds"),
        "budget": facts.budget(run),
        "commands": [part.record["command"] for part in run.parts or (run,) if part.record.get("command")],
        "settings": [(part.name, json.dumps(part.recipe, indent=1)) for part in run.parts or (run,)],
        "provenance": facts.provenance(run),
        "speed_protocol": (run.speed or {}).get("protocol"),
    }


def _looks(run: RunData, stage: str, looks: Sequence[Look]) -> list[Picture]:
    """The pictures of a training, with their small FIDs; numbered by protocol where it changed on the way."""
    protocols = list(scores.watched_series(run.watch_lines.get(stage, ())))
    scored = {line["watch"].get("made_steps"): line["watch"] for line in run.watch_lines.get(stage, ())}
    pictures = []
    for look in looks:
        values, caption = scored.get(look.steps, {}), ""
        if values.get("fid") is not None:
            caption = f"small FID {significant(values['fid'])}"
            if len(protocols) > 1:
                caption += f", protocol {protocols.index(scores.stated(values)) + 1}"
        pictures.append(_picture_of(look, caption))
    return pictures


def _picture_of(look: Look, caption: str) -> Picture:
    """A picture of a training as it is, or reduced to what the page can show."""
    with Image.open(io.BytesIO(look.png)) as picture:
        if picture.width <= 3 * _LOOK_PX:
            source = f"data:image/png;base64,{base64.b64encode(look.png).decode()}"
        else:
            height = round(picture.height * 2 * _LOOK_PX / picture.width)
            source = _data_uri(picture.convert("RGB").resize((2 * _LOOK_PX, height), Image.Resampling.BOX), "JPEG")
    return Picture(f"after {look.steps:,} step{'s' * (look.steps > 1)}", caption, source, _LOOK_PX)


def _shown(run: RunData) -> dict[str, Samples]:
    """The images that can be shown."""
    return {name: s for name, s in run.samples.items() if len(s.images) and s.images.shape[-1] in (1, 3)}


def _grids(run: RunData) -> list[Grid]:
    """What every model drew, side by side. An FID stands there only where all that do share a protocol."""
    there = _shown(run)
    if not there:
        return []
    drawn = [samples for name, samples in there.items() if name != "real"] or list(there.values())
    shared = min(len(samples.images) for samples in drawn)
    chosen, columns = choose_images(drawn[0].labels, shared)
    found = scores.alike(run)
    fids = found.fids if found else {}
    grids = []
    for name, samples in there.items():
        is_real = name == "real"
        places, heads = choose_images(samples.labels, len(samples.images)) if is_real else (chosen, columns)
        source, width_px = _picture(samples, places, heads)
        depth, fid = facts.depths(run).get(name), fids.get(name)
        parts = (f"{depth} blocks" if depth else "", f"FID {significant(fid)}" if fid is not None else "")
        caption = samples.protocol if is_real else ", ".join(part for part in parts if part)
        grids.append(
            Grid(
                MODEL_NAMES.get(name, name),
                scores.role_of(name),
                caption,
                source,
                width_px,
                [label for label in heads if label],
                samples.protocol,
            )
        )
    return grids


def choose_images(labels: np.ndarray | None, num: int) -> tuple[list[int], list[str]]:
    """Indices, row by row, and the column labels: the first images of each of up to ten classes, else simply the first.

    A class with fewer images than rows leaves gaps, written as -1.
    """
    if labels is None or len(np.unique(labels[:num])) == 1:
        return list(range(min(num, _GRID_CLASSES * _GRID_ROWS))), [""] * min(num, _GRID_CLASSES)
    classes = [int(c) for c in np.unique(labels[:num])[:_GRID_CLASSES]]
    firsts = [np.flatnonzero(labels[:num] == c)[:_GRID_ROWS].tolist() for c in classes]
    rows = max(len(first) for first in firsts)
    chosen = [first[row] if row < len(first) else -1 for row in range(rows) for first in firsts]
    return chosen, [str(c) for c in classes]


def _picture(samples: Samples, chosen: Sequence[int], columns: Sequence[str]) -> tuple[str, int]:
    """(data URI, width on the page in CSS pixels) of a grid; gaps are see-through in small pictures, white in others."""
    _, height, width, _ = samples.images.shape
    tile = max(height, width)
    if tile <= _SMALL_PX:
        grid = _small_grid(samples.images, chosen, len(columns))
        scale = max(_GRID_PX // grid.shape[1], 1)
        return _data_uri(Image.fromarray(grid), "PNG"), grid.shape[1] * scale
    thumbnails = np.stack([_thumbnail(samples.images[i]) for i in chosen if i >= 0])
    places = iter(range(len(thumbnails)))
    shown = [next(places) if i >= 0 else -1 for i in chosen]
    see_through = Image.fromarray(_small_grid(thumbnails, shown, len(columns)))
    white = Image.new("RGB", see_through.size, "white")  # JPEG has no see-through pixels
    white.paste(see_through, mask=see_through)
    return _data_uri(white, "JPEG"), _GRID_PX


def _small_grid(images: np.ndarray, chosen: Sequence[int], columns: int) -> np.ndarray:
    """(rows, columns, 4) uint8 RGBA: every image in an edge of one pixel that shows on white and on black; gaps see-through."""
    _, height, width, _ = images.shape
    rows = -(-len(chosen) // columns)
    grid = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 4), dtype=np.uint8)
    for place, index in enumerate(chosen):
        if index >= 0:
            top, left = place // columns * (height + 1), place % columns * (width + 1)
            edged = grid[top : top + height + 2, left : left + width + 2]
            outside = edged[..., 3] == 0
            edged[outside] = EDGE_RGBA
            edged[1:-1, 1:-1, :3] = images[index]
            edged[1:-1, 1:-1, 3] = 255
    return grid


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """(64, 64, 3) uint8."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    return np.asarray(
        Image.fromarray(pixels).convert("RGB").resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    )


def _data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
