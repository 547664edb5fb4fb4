"""Output of `sample`: an npz with its record and optional pictures, drawn in shards by one process or several.

Images are drawn in shards next to the npz (`jobs/sharded_output.py`). Rank 0 determines the missing shards, each rank draws
every world-th of them, and rank 0 joins the files (`core/ranks.py`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.records import read_record, recorded_output
from tinyfusion.core.rundir import atomic_write, check_space, check_writable, file_output, say_finished, write_json
from tinyfusion.core.signals import Interrupted
from tinyfusion.data.image_source import (
    ImageSource,
    open_npz,
    source_of,
    stream_images_npz,
    write_png_folder,
    write_video_folder,
)
from tinyfusion.data.images import middle_frames, write_grid_png
from tinyfusion.jobs.sharded_output import ImageShards, Range, clear_shards, shard_images, shards_folder, writing_shards
from tinyfusion.training.engine import Engine

_SLOWER = 4  # times the longest drawing of a shard on rank 0 that a shard of another rank may take


class Images(Protocol):
    """What draws the images of a job."""

    def images(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Images first .. last - 1 in batches (B, H, W, C) of `DrawnOutput.dtype`; of videos (B, F, H, W, 3)."""

    def report(self) -> dict[str, Any]:
        """What is known only after drawing, for the record."""


@dataclass(frozen=True)
class DrawnOutput:
    """An npz of images and its record.

    plain: what identifies the same command. pictures: by option, a grid of the first images and a folder of PNGs. labels: of every
    image. shape: of an image (H, W, C); empty: known once one is drawn. batch_size: most images of a new shard.
    frames_per_second: of mp4 files of videos.
    """

    out: Path
    overwrite: bool
    plain: dict[str, Any]
    pictures: Mapping[str, Path]
    labels: np.ndarray
    batch_size: int
    shape: tuple[int, ...] = ()
    dtype: np.dtype[np.generic] = field(default_factory=lambda: np.dtype(np.uint8))
    timeout_s: float = 600.0
    frames_per_second: int = 16

    def shards(self, num: int) -> ImageShards:
        """The shards, of `num` images each."""
        return ImageShards(shards_folder(self.out), (len(self.labels), *self.shape), self.dtype, num)

    def check(self, engine: Engine) -> tuple[bool, int]:
        """Whether images are to be drawn, and the images of a shard. Raises UserError on unusable outputs."""
        todo = recorded_output(self.out, "sample", self.plain, self.overwrite) or not _is_whole(self.out)
        share = min(self.batch_size, math.ceil(len(self.labels) / engine.world))
        num = shard_images(shards_folder(self.out), self.plain, share, self.overwrite) if todo else share
        self._check_pictures(self.shape[-1] if self.shape else 3)
        if todo:
            check_space(self.out, 2 * len(self.labels) * math.prod(self.shape) * self.dtype.itemsize)
        return todo, num

    def draw(
        self, todo: bool, num: int, engine: Engine, title: str, opened: Callable[[], Images],
        record: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """Draw what is missing, and write npz, record and pictures. Returns what is known only after drawing.

        todo, num: of `check`. opened: opens the model, where there is something to draw. record: of that which is known after
        drawing. All processes call this; only the first one writes the npz.
        """
        shards, report = self.shards(num), dict[str, Any]()
        with ExitStack() as contexts:
            if todo:
                report = self._draw(shards, engine, title, opened, contexts)
            if not engine.is_main:
                return report
            if todo:
                # again: an output of another job that appeared meanwhile is not replaced
                recorded_output(self.out, "sample", self.plain, self.overwrite)
                self._check_pictures(shards.image_shape()[-1])
                paths = {name: str(self.pictures[name]) if name in self.pictures else None for name in ("grid", "png")}
                write_samples(self.out, shards.source(), self.labels, {**record(report), **paths})
                shards.remove()
            else:
                clear_shards(shards, self.plain)
                say_finished(self.out)
            self._write_pictures(todo)
        return report

    # -------------------------------------------------------------------------------------------------------- shards

    def _draw(
        self, shards: ImageShards, engine: Engine, title: str, opened: Callable[[], Images], contexts: ExitStack
    ) -> dict[str, Any]:
        """Draw all missing shards on all ranks. contexts: locks the folder of shards."""

        def begin() -> list[Range]:
            """Create or reopen the folder of shards. Returns the missing ones."""
            contexts.enter_context(writing_shards(shards, self.plain, self.overwrite))
            # another process may have finished since `check`
            file_output(self.out, "sample", self.plain, self.overwrite, _record_of)
            if num := shards.num_drawn():
                print(f"{self.out}: {num:,} of {shards.shape[0]:,} images are there", file=sys.stderr)
            return shards.missing()

        missing = engine.first(begin)
        try:
            return self._draw_shards(shards, missing, engine, title, opened)
        except BaseException as error:
            num = shards.num_drawn()
            if not num and engine.world == 1:
                shards.remove()
            if isinstance(error, Interrupted):
                what = f"{num:,} of {shards.shape[0]:,} images of {self.out} are saved"
                what = what if num else f"no image of {self.out} was finished"
                raise Interrupted(error.signum, f"{what}, the same command continues") from None
            raise

    def _draw_shards(
        self, shards: ImageShards, missing: list[Range], engine: Engine, title: str, opened: Callable[[], Images]
    ) -> dict[str, Any]:
        """Draw every world-th of the `missing` shards; rank 0 then waits for the other ranks."""
        slowest, done = 0.0, 0
        own = missing[engine.rank :: engine.world]
        total = sum(last - first for first, last in own)
        title += f" (process 0 of {engine.world})" if engine.world > 1 else ""
        with progress(title, total, "images", shown=engine.is_main) as bar:
            drawing = opened() if own else None
            for shard in own:
                began = time.monotonic()
                assert drawing is not None
                images = []
                for batch in drawing.images(*shard):
                    images.append(batch)
                    done += len(batch)
                    bar(done)
                shards.write(shard, np.concatenate(images))
                slowest = max(slowest, time.monotonic() - began)
                if shard == own[0] and not self.shape and engine.is_main:
                    check_space(self.out, (total + len(self.labels)) * images[0][0].nbytes)
        if engine.is_main:
            shards.wait_for(missing, engine.world, max(self.timeout_s, _SLOWER * slowest))
        return drawing.report() if drawing else {}

    # ------------------------------------------------------------------------------------------------------ pictures

    def _check_pictures(self, channels: int) -> None:
        """Raise UserError where a picture would replace a file of others, or cannot show these images."""
        record = _record_of(self.out)
        for name, path in self.pictures.items():
            if self.dtype != np.uint8 or channels not in (1, 3):
                what = "latents" if self.dtype != np.uint8 else f"images of {channels} channels"
                raise UserError(f"--{name} shows images of 1 or 3 channels, and these are {what}: leave it out")
            if name == "grid" and path.suffix != ".png":
                raise UserError(f"--grid is a .png file; got {path}")
            if name == "png" and (path.is_file() or path.suffix in (".png", ".npz")):
                raise UserError(f"--png is a folder, for one file per image; got {path}")
            check_writable(path)
            ours = isinstance(record, dict) and record.get(name) == str(path)
            if path.exists() and not ours and not (path.is_dir() and not any(path.iterdir())):
                raise UserError(f"--{name} {path} exists and does not belong to {self.out}; choose another name")

    def _write_pictures(self, anew: bool) -> None:
        """Write the requested pictures that are missing; all of them where the images are new."""
        grid, png = self.pictures.get("grid"), self.pictures.get("png")
        source = open_npz(self.out, videos=True)
        if grid is not None and (anew or not grid.exists()):
            num, columns = (100, 10) if len(source) > 64 else (len(source), 8)
            num = min(num, len(source))
            write_grid_png(grid, _first(source, num), columns, max(1, 256 // (4 * source.shape[-3])))
        if png is not None and (anew or not png.is_dir() or not any(png.iterdir())):
            if len(source.shape) == 5:
                write_video_folder(png, source, self.frames_per_second)
            else:
                write_png_folder(png, source)
        record = _record_of(self.out)
        added = {name: str(path) for name, path in self.pictures.items()}
        if isinstance(record, dict) and any(record.get(name) != path for name, path in added.items()):
            write_json(self.out.with_suffix(".json"), {**record, **added})


def _first(source: ImageSource, num: int) -> np.ndarray:
    """(num, H, W, C): the first images, or middle frames of the first videos."""
    if len(source.shape) == 4:
        return next(source.read(num))
    return np.concatenate([middle_frames(video) for video, _ in zip(source.read(1), range(num), strict=False)])


def write_samples(out: Path, images: np.ndarray | ImageSource, labels: np.ndarray, record: dict[str, Any]) -> None:
    """Write the npz and its record (.json), both or neither.

    The record gets its name just before the images. A process that is killed in between leaves a record with the hash of
    images that do not exist: see `_is_whole`.
    """
    source = images if isinstance(images, ImageSource) else source_of(images)
    with atomic_write(out) as temporary:
        stream_images_npz(temporary, source, labels)
        write_json(out.with_suffix(".json"), {**record, "image_hash": source.hash()})


def _is_whole(out: Path) -> bool:
    """Whether the images have the hash in their record."""
    try:
        recorded = _record_of(out).get("image_hash")
        return recorded is None or recorded == open_npz(out, videos=True).hash()
    except UserError:
        return False


def _record_of(out: Path) -> Any:
    """The record of an npz; None where it has none."""
    return read_record(out.with_suffix(".json"))
