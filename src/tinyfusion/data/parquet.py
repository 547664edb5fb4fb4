"""Images and labels out of parquet files, as image data sets on the hub are stored: encoded pictures in a column.

Pictures are decoded by Pillow (PNG, JPEG, WebP), never unpickled, and may be reduced by a box filter. A set is named by
where its files are: `parquet:PATH`, or `hub:` and an id of the hub; `parquet-stream:` and `hub-stream:` are never whole in memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyfusion.core.errors import UserError
from tinyfusion.data.hub import HubFile, open_hub

PARQUET, HUB = "parquet:", "hub:"  # prefixes of sets that are read whole
PARQUET_STREAM, HUB_STREAM = "parquet-stream:", "hub-stream:"  # of those that never are
WHOLE, STREAMED = (PARQUET, HUB), (PARQUET_STREAM, HUB_STREAM)
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "fine_labels")
READERS = 8  # requests to the hub at a time
TableFile = Path | HubFile
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")


def read_parquet_images(source: Path | str, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) uint8 and labels (N,) int64 of a parquet file, of all in a folder by name, or of a named set.

    The pictures are encoded bytes, or a struct with `bytes`; labels are whole numbers from 0; `columns_of` says in which
    columns. size: side to which square pictures are reduced by a box filter, each pixel the mean of its area; None keeps
    theirs. C is 1 where all are grey, else 3. Raises UserError on what is missing, damaged or not of one size.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in tables_of(source):
        for row, encoded, label in _rows(file):
            images.append(decoded(encoded, f"{file}, row {row}", size))
            labels.append(checked_label(label, f"{file}, row {row}"))
    return stacked(images, source), np.array(labels, dtype=np.int64)


def stacked(images: Sequence[np.ndarray], source: Path | str) -> np.ndarray:
    """(N, H, W, C) uint8 of decoded pictures, in colour where one is. Raises UserError on none, and on several sizes."""
    if not images:
        raise UserError(f"{source} holds no images")
    grey = all(image.shape[-1] == 1 for image in images)
    images = images if grey else [image.repeat(3, -1) if image.shape[-1] == 1 else image for image in images]
    odd = next((i for i, image in enumerate(images) if image.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(
            f"{source}: images differ in size: the first is {images[0].shape[:2]}, image {odd} {images[odd].shape[:2]} "
            "(height, width); give one size by data.size"
        )
    return np.stack(images)


def tables_of(source: Path | str) -> Sequence[TableFile]:
    """The files of a set, in their order. A string is a name with its prefix; those of the hub are fetched, but for streams.

    Raises UserError where there are none.
    """
    if isinstance(source, Path):
        return parquet_files(source)
    prefix, _, rest = source.partition(":")
    if f"{prefix}:" == HUB:
        files = open_hub(rest).files
        with ThreadPoolExecutor(READERS, "fetching") as threads:
            return list(threads.map(HubFile.fetched, files))
    return open_hub(rest).files if f"{prefix}:" == HUB_STREAM else parquet_files(Path(rest))


def parquet_files(path: Path) -> list[Path]:
    """The file, or all of a folder, by name. Raises UserError where there is none, or files of several splits."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f"no parquet data at {path}: wanted a .parquet file, or a folder of them")
    splits = sorted({file.name.split("-")[0] for file in files if "-of-" in file.name})
    if len(splits) > 1:
        raise UserError(f"{path} holds the splits {', '.join(splits)}: name one file, or a folder with one split")
    return files


def _rows(file: TableFile) -> Iterator[tuple[int, Any, Any]]:
    """(row number, encoded picture, label) of one file."""
    with opened(file) as table:
        image_column, label_column = columns_of(table, file)
        first = 0
        for batch in table.iter_batches(columns=[image_column, label_column]):
            pictures, labels = batch.column(image_column).to_pylist(), batch.column(label_column).to_pylist()
            yield from zip(range(first, first + len(labels)), pictures, labels, strict=True)
            first += len(labels)


@contextmanager
def opened(file: TableFile, part: str = "") -> Iterator[Any]:
    """A file as pyarrow's `ParquetFile`; part: of it, for people. Raises UserError where it is damaged.

    The footer of a file of the hub is read once; what is read of its columns comes in few requests.
    """
    import pyarrow.parquet

    with reading(f"{file}{part}"):
        if isinstance(file, Path):
            with pyarrow.parquet.ParquetFile(file) as table:
                yield table
        else:
            with (
                file.open() as stream,
                pyarrow.parquet.ParquetFile(stream, metadata=file.footer, pre_buffer=True) as table,
            ):
                file.footer = table.metadata
                yield table


@contextmanager
def reading(where: str) -> Iterator[None]:
    """What pyarrow says of a damaged file or of the disk, as UserError; where: the file, and the part of it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read as parquet: {' '.join(str(error).split())}") from error


def columns_of(table: Any, file: TableFile) -> tuple[str, str]:
    """Names of the columns of pictures and labels of an open parquet file.

    Those with the usual names, else the only one that the file declares, as the library `datasets` writes it, to be of images
    or of classes. Raises UserError where one is missing.
    """
    return _column(file, table, IMAGE_COLUMNS, "Image"), _column(file, table, LABEL_COLUMNS, "ClassLabel")


def _column(file: TableFile, table: Any, wanted: Sequence[str], kind: str) -> str:
    names = table.schema_arrow.names
    found = [name for name in wanted if name in names]
    if not found:
        declared = _declared(table)
        found = [name for name in names if declared.get(name) == kind]
        if len(found) != 1:
            raise UserError(f"{file} has the columns {', '.join(names)}: wanted {' or '.join(wanted)}")
    return found[0]


def _declared(table: Any) -> dict[str, str]:
    """Kinds of columns by name, where the file says them."""
    try:
        told = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = told.get("info", {}).get("features", {})
        return {name: str(one["_type"]) for name, one in features.items() if isinstance(one, dict) and "_type" in one}
    except (ValueError, AttributeError):
        return {}


def decoded(encoded: Any, where: str, size: int | None) -> np.ndarray:
    """The picture of a row, (H, W, 1 or 3) uint8; size as in `read_parquet_images`, where: names the row to people."""
    content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
    if not isinstance(content, bytes):
        raise UserError(f"{where}: wanted an encoded picture (bytes); got {type(content).__name__}")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            mode, opaque = image.mode, "transparency" not in image.info
            picture = image.convert("L" if mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be decoded as {', '.join(_FORMATS)}") from error
    if mode not in _MODES or not opaque:
        raise UserError(f"{where} is a picture of mode {mode}: wanted 8-bit grey or colour without transparency")
    if size is not None and picture.size != (size, size):
        if picture.width != picture.height or picture.width < size:
            raise UserError(f"{where} is {picture.width} x {picture.height}: data.size={size} reduces larger squares")
        picture = picture.resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def checked_label(label: Any, where: str) -> int:
    """The label of a row. Raises UserError where it is no whole number from 0."""
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise UserError(f"{where}: wanted a label, a whole number from 0; got {label!r}")
    return label
