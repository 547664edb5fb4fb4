"""Images of the page: samples of every model, by prompt where there are any, previews of a training, maps of processed tokens."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tinyfusion.report.charts import preview_fids
from tinyfusion.report.diagnostic_charts import short_time
from tinyfusion.report.format import percent, significant
from tinyfusion.report.load import Run, Samples
from tinyfusion.report.tables import comparable, depths, distance_name, model_name, stated

EDGE_RGBA = (128, 128, 128, 110)  # around images: visible on white and on black
_CLASSES, _ROWS = 10, 4  # of a grid of samples
_SMALL_PX = 32  # images up to this size are shown pixel by pixel
_THUMBNAIL_PX = 64
_PROMPTS, _PROMPT_PX = 12, 256  # shown with their images, and the width of these
_GRID_PX = 364  # a grid is at most this wide; on a phone it shrinks
_PREVIEW_PX = 340  # three side by side
_TOKEN_PX = 96
_TOKEN_RGB = (132, 85, 176)  # the page's colour `extra`


@dataclass(frozen=True)
class Sheet:
    """A grid of images as a data URI. width_px: on the page. columns: labels above. protocol: of sampling."""

    title: str
    source: str
    width_px: int
    caption: str = ""
    columns: Sequence[str] = ()
    role: str = ""
    protocol: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its image by every model."""

    text: str
    sheets: Sequence[Sheet]


def prompt_rows(run: Run) -> list[Prompt]:
    """The first image of each of the first prompts, by every model that drew these prompts; empty without prompts."""
    drawn = {name: s for name, s in run.samples.items() if s.prompts and s.labels is not None and len(s.images)}
    if not drawn:
        return []
    first = next(iter(drawn.values()))
    same = {name: s for name, s in drawn.items() if list(s.prompts) == list(first.prompts)}
    rows = []
    for label, text in list(enumerate(first.prompts))[:_PROMPTS]:
        sheets = []
        for name, samples in same.items():
            places = np.flatnonzero(samples.labels == label)
            if len(places):
                sheets.append(_prompt_sheet(name, samples, samples.images[places[0]]))
        if sheets:
            rows.append(Prompt(text, sheets))
    return rows


def _prompt_sheet(name: str, samples: Samples, image: np.ndarray) -> Sheet:
    picture, (height, width) = as_picture(image), image.shape[:2]
    if max(height, width) <= _SMALL_PX:
        source, width_px = data_uri(picture), width * max(_PROMPT_PX // (2 * width), 1)
        return Sheet(model_name(name), source, width_px, role=name, protocol=samples.protocol)
    scale = min(1.0, 2 * _PROMPT_PX / width)  # twice as many pixels as shown, for screens of high density
    size = round(width * scale), max(round(height * scale), 1)
    picture = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return Sheet(model_name(name), data_uri(picture, "JPEG"), _PROMPT_PX, role=name, protocol=samples.protocol)


def sample_sheets(run: Run) -> list[Sheet]:
    """Samples of every model, the same places in each. Scores are captions where all models share a protocol.

    Those that were drawn from prompts are shown by `prompt_rows` instead.
    """
    shown = {n: s for n, s in run.samples.items() if len(s.images) and s.images.shape[-1] in (1, 3) and not s.prompts}
    sampled = [samples for name, samples in shown.items() if name != "real"] or list(shown.values())
    num, (_, scores, *_) = min((len(samples.images) for samples in sampled), default=0), comparable(run)
    sheets = []
    for name, samples in shown.items():
        is_real, depth, score = name == "real", depths(run).get(name), scores.get(name, {})
        source = samples if is_real else sampled[0]
        chosen, columns = choose_images(source.labels, len(samples.images) if is_real else num)
        picture, width_px = _sample_grid(samples, chosen, columns)
        caption = [f"{depth} blocks"] if depth else []
        caption += [] if score.get("fid") is None else [f"{distance_name([score])} {significant(score['fid'])}"]
        text, labels = samples.protocol if is_real else ", ".join(caption), [label for label in columns if label]
        sheets.append(Sheet(model_name(name), picture, width_px, text, labels, name, samples.protocol))
    return sheets


def choose_images(labels: np.ndarray | None, num: int) -> tuple[list[int], list[str]]:
    """Indices, row by row, and the column labels: the first images of each of up to ten classes, else simply the first.

    A class with fewer images than rows leaves gaps, written as -1.
    """
    if labels is None or len(np.unique(labels[:num])) == 1:
        return list(range(min(num, _CLASSES * _ROWS))), [""] * min(num, _CLASSES)
    classes = [int(c) for c in np.unique(labels[:num])[:_CLASSES]]
    firsts = [np.flatnonzero(labels[:num] == c)[:_ROWS].tolist() for c in classes]
    rows = range(max(map(len, firsts)))
    return [first[row] if row < len(first) else -1 for row in rows for first in firsts], [str(c) for c in classes]


def _sample_grid(samples: Samples, chosen: Sequence[int], columns: Sequence[str]) -> tuple[str, int]:
    """(data URI, width in CSS pixels) of a grid; gaps are transparent in small images, white in others."""
    images = [samples.images[i] if i >= 0 else None for i in chosen]
    if max(samples.images.shape[1:3]) <= _SMALL_PX:
        grid = tiled(images, len(columns))
        return data_uri(Image.fromarray(grid)), grid.shape[1] * max(_GRID_PX // grid.shape[1], 1)
    size, box = (_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX
    thumbnails = [i if i is None else np.asarray(as_picture(i).convert("RGB").resize(size, box)) for i in images]
    transparent = Image.fromarray(tiled(thumbnails, len(columns)))
    white = Image.new("RGB", transparent.size, "white")  # JPEG has no transparency
    white.paste(transparent, mask=transparent)
    return data_uri(white, "JPEG"), _GRID_PX


def tiled(images: Iterable[np.ndarray | None], columns: int) -> np.ndarray:
    """(H, W, 4) uint8: images (h, w, 1, 3 or 4) of one size in rows, in edges of one pixel; None leaves a transparent gap."""
    listed = list(images)
    height, width, _ = next(image.shape for image in listed if image is not None)
    grid = np.zeros((-(-len(listed) // columns) * (height + 1) + 1, columns * (width + 1) + 1, 4), dtype=np.uint8)
    for place, image in enumerate(listed):
        if image is not None:
            top, left = place // columns * (height + 1), place % columns * (width + 1)
            edged = grid[top : top + height + 2, left : left + width + 2]
            edged[edged[..., 3] == 0] = EDGE_RGBA
            edged[1:-1, 1:-1, 3] = 255
            edged[1:-1, 1:-1, : max(image.shape[-1], 3)] = image
    return grid


def preview_sheets(run: Run, stage: str) -> list[Sheet]:
    """The previews of a training with their FIDs; protocols are numbered where the training has several."""
    scores = {score["made_steps"]: score for score in run.preview_scores.get(stage, ()) if score.get("fid") is not None}
    protocols, sheets = list(preview_fids(list(scores.values()))), []
    for preview in run.previews[stage]:
        caption, score = "", scores.get(preview.steps)
        if score:
            caption = f"{distance_name([score])} {significant(score['fid'])}"
            caption += f", protocol {protocols.index(stated(score)) + 1}" if len(protocols) > 1 else ""
        with Image.open(io.BytesIO(preview.png)) as picture:
            source = f"data:image/png;base64,{base64.b64encode(preview.png).decode()}"
            if picture.width > 3 * _PREVIEW_PX:
                size = (2 * _PREVIEW_PX, round(picture.height * 2 * _PREVIEW_PX / picture.width))
                source = data_uri(picture.convert("RGB").resize(size, Image.Resampling.BOX), "JPEG")
        sheets.append(Sheet(f"after {preview.steps:,} step{'s' * (preview.steps > 1)}", source, _PREVIEW_PX, caption))
    return sheets


def token_sheet(run: Run) -> Sheet | None:
    """An image per row and its tokens at some times of the sampling; None of a model that does not choose tokens."""
    record = run.measured.get("kept") or {}
    maps = record.get("maps")
    if not maps:
        return None
    shares = np.asarray(maps["percent"], dtype=np.float64) / 100
    tokens = np.empty((*shares.shape, 4), dtype=np.uint8)
    tokens[..., :3], tokens[..., 3] = _TOKEN_RGB, np.round(255 * shares)
    rows = [[as_picture(np.asarray(image, dtype=np.uint8)).convert("RGBA"), *map(Image.fromarray, row)]
            for image, row in zip(maps["images"], tokens, strict=True)]  # fmt: skip
    size = (_TOKEN_PX, _TOKEN_PX)
    grid = tiled((np.array(tile.resize(size, Image.Resampling.NEAREST)) for row in rows for tile in row), len(rows[0]))
    mean, low, high = (percent(float(value)) for value in (shares.mean(), shares.min(), shares.max()))
    text = "Left the image, then its tokens along the sampling, from noise to image: the stronger the colour, the more blocks "
    text += f"processed the token in their MLP. {mean} on average, from {low} to {high} for one token at one time."
    text += " Images are latents, three channels shown as colours." if maps["space"] == "latents" else ""
    columns = ["image", *map(short_time, maps["times"])]
    title = "Processed tokens per image"
    return Sheet(title, data_uri(Image.fromarray(grid)), grid.shape[1], text, columns, protocol=record["protocol"])


def as_picture(values: np.ndarray) -> Image.Image:
    """An image (H, W, C) uint8, C 1, 3 or 4."""
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    """The image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
