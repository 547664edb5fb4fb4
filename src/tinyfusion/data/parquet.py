"""Parquet files of encoded pictures and labels, as image data sets on the hub are stored: which files, and which columns.

A set is named by where its files are: `parquet:PATH`, or `hub:` and an id of the hub; `parquet-stream:` and `hub-stream:`
are never whole in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.data.hub import HubFile, open_hub

PARQUET, HUB = "parquet:", "hub:"  # prefixes of sets that are read whole
PARQUET_STREAM, HUB_STREAM = "parquet-stream:", "hub-stream:"  # of those that never are
WHOLE, STREAMED = (PARQUET, HUB), (PARQUET_STREAM, HUB_STREAM)
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "fine_labels")
READERS = 8  # requests to the hub at a time
TableFile = Path | HubFile


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


def checked_label(label: Any, where: str) -> int:
    """The label of a row. Raises UserError where it is no whole number from 0."""
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**63:
        raise UserError(f"{where}: wanted a label, a whole number from 0; got {label!r}")
    return label
