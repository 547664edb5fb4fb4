"""Training batches of parquet files that do not fit into memory, local or on the hub (row groups are not cached there).

An epoch goes through all row groups in a random order. Consecutive ones with about `window_images` images make a window, and
the images of a window are shuffled. Both permutations are functions of (seed, epoch), so the sequence of images is too: every
image once per epoch, whatever the batch size, the number of processes, and where a run was resumed. In memory are the current
window and the next one, as encoded pictures.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.config.recipe import Orientation
from tinyfusion.core.ahead import Ahead
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import Batches, signed
from tinyfusion.data.hub import HubFile
from tinyfusion.data.parquet import (
    READERS,
    TableFile,
    batches_of,
    checked_label,
    columns_of,
    labels_of,
    opened,
    reading,
    tables_of,
)
from tinyfusion.data.picture import decode

_DECODERS = min(8, os.cpu_count() or 1)
_PER_TASK = 16  # pictures that a thread decodes at a time


@dataclass(frozen=True)
class RowGroup:
    """A row group when the set was opened. first: its first row in the file; file_rows: all rows of the file.

    columns: that are read; None: pictures and labels.
    """

    file: TableFile
    index: int
    first: int
    num: int
    file_rows: int
    columns: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.file}, row group {self.index}"

    def read(self) -> Any:
        """The arrow table of its columns. Raises UserError if the file is damaged, changed or too large."""
        import pyarrow

        with opened(self.file, f", row group {self.index}") as file:
            rows = file.metadata.num_rows
            if rows == self.file_rows and self.index < file.num_row_groups:
                batches: list[Any] = []
                done = read_bytes = 0
                for batch in batches_of(file, self.index, self.columns or columns_of(file, self.file)):
                    batches.append(batch)
                    done, read_bytes = done + batch.num_rows, read_bytes + batch.nbytes
                    left_bytes = read_bytes // max(done, 1) * max(self.num - done, 0)
                    check_memory(left_bytes, f"{self} as pictures in memory")
                if done == self.num:
                    return pyarrow.Table.from_batches(batches)
        raise UserError(
            f"{self.file} has changed since it was opened: it had {self.file_rows:,} rows, {self.num:,} of them in row group "
            f"{self.index}, and now has {rows:,} in other row groups; begin the run anew"
        )


@dataclass(frozen=True)
class ParquetParts:
    """Row groups and shape of a set, without its pictures.

    size, orientation: as in `decode`. shape: (C, H, W) of every image. classes: one more than the largest label.
    """

    name: str
    groups: tuple[RowGroup, ...]
    size: int | None
    shape: tuple[int, int, int]
    classes: int
    orientation: Orientation = "follow"

    def __len__(self) -> int:
        return sum(group.num for group in self.groups)

    def image(self, table: Any, group: RowGroup, row: int) -> tuple[np.ndarray, int]:
        """(H, W, C) uint8 and label of a row of a group's table. Raises UserError where it is damaged or does not fit."""
        where = f"{group}, row {group.first + row}"
        pictures, labels = table.columns
        pixels = decode(pictures[row].as_py(), where, self.size, self.orientation).pixels
        label = checked_label(labels[row].as_py(), where)
        channels, height, width = self.shape
        if pixels.shape[:2] != (height, width):
            sizes = f"the first is {(height, width)}, this one {pixels.shape[:2]} (height, width)"
            raise UserError(f"{where}: images differ in size: {sizes}: give one size for all by --set data.size=N")
        if pixels.shape[-1] > channels:
            advice = "convert the set to one of them, or train a model with --set model.in_channels=3"
            raise UserError(f"{where} is in colour, and the model takes grey images: {advice}")
        if label >= self.classes:
            raise UserError(f"{where} has changed since it was opened: label {label} of {self.classes} classes")
        return pixels.repeat(channels, -1) if pixels.shape[-1] < channels else pixels, label


def open_shards(
    source: Path | str, size: int | None, channels: int | None, orientation: Orientation = "follow"
) -> ParquetParts:
    """Open parquet files: one, all of a folder by name, or a named set. Reads their labels and one picture.

    channels: of the model; None: those of the first picture. With 3, grey pictures become colour. Labels of files of the hub are
    bounded by their footers, where these have statistics. Raises UserError on missing or damaged files.
    """
    files = tables_of(source)
    with ThreadPoolExecutor(READERS, "footers") as threads:  # of the hub's files, several at a time
        list(threads.map(_read_footer, [file for file in files if isinstance(file, HubFile)]))
    groups: list[RowGroup] = []
    classes = 0
    first_shape: tuple[int, ...] | None = None
    for file in files:
        with opened(file) as table:
            nums = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            begins = np.cumsum([0, *nums])
            for group in [RowGroup(file, i, int(begins[i]), n, sum(nums)) for i, n in enumerate(nums) if n]:
                groups.append(group)
                with reading(str(group)):
                    image_column, label_column = columns_of(table, file)
                    classes = max(classes, 1 + _largest_label(table, group, label_column))
                    if first_shape is None:
                        batches = table.iter_batches(batch_size=1, row_groups=[group.index], columns=[image_column])
                        picture = next(batches).column(0)[0].as_py()
                        first_shape = decode(picture, f"{group}, row 0", size, orientation).pixels.shape
    if first_shape is None:
        raise UserError(f"{source} holds no images")
    height, width, own = first_shape
    shape = (3 if (own, channels) == (1, 3) else own, height, width)
    name = f"parquet-stream:{source}" if isinstance(source, Path) else source
    return ParquetParts(name, tuple(groups), size, shape, classes, orientation)


def _read_footer(file: HubFile) -> None:
    with opened(file):
        pass


def _largest_label(table: Any, group: RowGroup, column: str) -> int:
    """Of a row group of an open file. Raises UserError on a label that is missing or no whole number from 0."""
    footer = table.metadata.row_group(group.index)
    for chunk in map(footer.column, range(footer.num_columns if isinstance(group.file, HubFile) else 0)):
        bounds = chunk.statistics if chunk.path_in_schema == column and chunk.is_stats_set else None
        if bounds is not None and bounds.has_min_max and not bounds.null_count:
            checked_label(bounds.min, f"{group}, the smallest label")
            return checked_label(bounds.max, f"{group}, the largest label")
    return max(int(labels.max()) for labels in labels_of(table, group.index, column, str(group), group.first))


@dataclass(frozen=True)
class _Window:
    """Row groups in memory, and the order of their rows: rows (W, 2), place of the group and row in it."""

    groups: Sequence[RowGroup]
    tables: Sequence[Any]
    rows: np.ndarray


class StreamedBatches(Batches):
    """Batches of a set that is read in windows. window_images: images of a window, at least a row group."""

    def __init__(
        self,
        parts: ParquetParts,
        randomness: Randomness,
        device: torch.device,
        window_images: int,
        augment: float = 0.0,
        flip: float = 0.0,
        timeout_s: float = 600.0,
    ) -> None:
        if window_images < 1:
            raise UserError(f"data.window_images is {window_images}: wanted 1 or more")
        super().__init__(randomness, device, augment, flip)
        self.parts = parts
        self.classes, self.shape = parts.classes, parts.shape
        self._sequence = _Sequence(parts, randomness, window_images)
        self._windows = Ahead(self._sequence.window, 1, timeout_s=timeout_s, what=f"{parts.name}: window")
        self._current: tuple[int, _Window] | None = None
        self._lock = threading.Lock()
        self._decoders = ThreadPoolExecutor(_DECODERS, "decoding") if _DECODERS > 1 else None
        weakref.finalize(self, self._windows.close)

    def __len__(self) -> int:
        return len(self.parts)

    def rows(self, first: int, num: int) -> tuple[Tensor, Tensor]:
        """As in `Batches`. Raises UserError on a damaged or changed file."""
        images: list[np.ndarray] = []
        labels: list[int] = []
        with self._lock:
            while len(images) < num:
                number, begin = self._sequence.place(first + len(images))
                window = self._window(number)
                due = window.rows[begin : begin + num - len(images)]
                for pixels, label in self._decoded(window, due):
                    images.append(pixels)
                    labels.append(label)
        stacked = np.stack(images) if images else np.empty((0, *self.parts.shape[1:], self.parts.shape[0]), np.uint8)
        return torch.from_numpy(signed(stacked)), torch.tensor(labels, dtype=torch.int64)

    def _window(self, number: int) -> _Window:
        if self._current is None or self._current[0] != number:
            self._current = None  # freed before the next one is loaded
            self._current = number, self._windows.take(number)
        return self._current[1]

    def _decoded(self, window: _Window, due: np.ndarray) -> list[tuple[np.ndarray, int]]:
        def some(begin: int) -> list[tuple[np.ndarray, int]]:
            rows = due[begin : begin + _PER_TASK].tolist()
            return [self.parts.image(window.tables[place], window.groups[place], row) for place, row in rows]

        tasks = range(0, len(due), _PER_TASK)
        done = map(some, tasks) if self._decoders is None else self._decoders.map(some, tasks)
        return [image for images in done for image in images]


class _Sequence:
    """The order of all images. Windows are numbered through the epochs; each epoch has the same number of them."""

    def __init__(self, parts: ParquetParts, randomness: Randomness, window_images: int) -> None:
        self.groups, self.randomness, self.num = parts.groups, randomness, len(parts)
        self.groups_per_window = max(1, window_images // max(group.num for group in parts.groups))
        self.windows_per_epoch = -(-len(self.groups) // self.groups_per_window)
        self._members = lru_cache(maxsize=4)(self._ordered)

    def _ordered(self, epoch: int) -> list[list[RowGroup]]:
        """The row groups of every window of an epoch."""
        order = self.randomness.permutation("epoch/row-groups", epoch, len(self.groups)).tolist()
        step = self.groups_per_window
        return [[self.groups[i] for i in order[begin : begin + step]] for begin in range(0, len(order), step)]

    def place(self, position: int) -> tuple[int, int]:
        """Number of the window that has a position of the sequence, and the place in it."""
        epoch, rest = divmod(position, self.num)
        sizes = [sum(group.num for group in window) for window in self._members(epoch)]
        ends = np.cumsum(sizes)
        window = int(np.searchsorted(ends, rest, side="right"))
        return epoch * self.windows_per_epoch + window, rest - int(ends[window] - sizes[window])

    def window(self, number: int) -> _Window:
        """A window, read from its files."""
        epoch, place = divmod(number, self.windows_per_epoch)
        groups = self._members(epoch)[place]
        rows = np.concatenate(
            [np.stack([np.full(group.num, i), np.arange(group.num)], 1) for i, group in enumerate(groups)]
        )
        order = self.randomness.permutation(f"epoch/window {place}", epoch, len(rows))
        if not isinstance(groups[0].file, HubFile):
            return _Window(groups, [group.read() for group in groups], rows[order])
        with ThreadPoolExecutor(READERS, "fetching") as threads:  # bound by latency
            return _Window(groups, list(threads.map(RowGroup.read, groups)), rows[order])
