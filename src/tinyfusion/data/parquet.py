"""Parquet files of encoded pictures and labels, as on the Hugging Face hub: find the files and columns, read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import available_memory_bytes, check_plain, explained, parse_json
from tinyfusion.data.hub import HubFile, open_hub
from tinyfusion.data.images import MAX_LABEL

PARQUET, HUB = "parquet:", "hub:"  # prefixes of sets that are loaded whole
PARQUET_STREAM, HUB_STREAM = "parquet-stream:", "hub-stream:"  # of sets that never are
WHOLE, STREAMED = (PARQUET, HUB), (PARQUET_STREAM, HUB_STREAM)
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label", "fine_labels")
READERS = 8  # requests to the hub at a time
TableFile = Path | HubFile
_BATCH_ROWS, _BATCH_SHARE = 1024, 4  # limits of a batch: rows, and 1 / share of the memory
_ROWS_PER_BYTE = 1000  # of a file: more than any set of pictures has


def tables_of(source: Path | str) -> Sequence[TableFile]:
    """The files of a set, in order. A string is a name with prefix; files of `hub:` are downloaded.

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


def batches_of(table: Any, group: int, columns: Sequence[str]) -> Iterator[Any]:
    """Yield columns of a row group of an open file, in the given order, a few rows at a time.

    Parquet may store a repeated value once, so a single row can take as much memory as its whole column has bytes in
    the file; the number of rows follows from that.
    """
    about = table.metadata.row_group(group)
    chunks = [about.column(place) for place in range(about.num_columns)]
    stored = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in columns)
    rows = available_memory_bytes() // (_BATCH_SHARE * max(stored, 1))
    size = max(1, min(rows, _BATCH_ROWS))
    for batch in table.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False):
        yield batch.select(list(columns))


def labels_of(table: Any, group: int, column: str, where: str, first: int) -> Iterator[np.ndarray]:
    """Yield the labels of a row group of an open file, int64, some rows at a time. Raises UserError on an invalid label.

    where: the file or row group, for messages; first: number of its first row.
    """
    import pyarrow.compute

    begin = first
    for batch in batches_of(table, group, [column]):
        labels = batch.column(0)
        bounds = pyarrow.compute.min_max(labels).as_py()
        if labels.null_count or not 0 <= bounds["min"] <= bounds["max"] <= MAX_LABEL:
            for row, value in enumerate(labels.to_pylist(), first):
                checked_label(value, f"{where}, row {row}")
        yield labels.to_numpy(zero_copy_only=False).astype(np.int64)
        first += len(labels)
    if (claimed := table.metadata.row_group(group).num_rows) != first - begin:
        rows = f"row group {group} has {first - begin:,} rows, and its footer claims {claimed:,}"
        raise UserError(f"{where} is damaged: {rows}")


@contextmanager
def opened(file: TableFile, part: str = "") -> Iterator[Any]:
    """Open a file as pyarrow's `ParquetFile`; part: of it, for messages. Raises UserError where it is damaged.

    The footer of a file of the hub is read once, and its columns are read in few requests.
    """
    import pyarrow.parquet

    open_table = pyarrow.parquet.ParquetFile
    with reading(f"{file}{part}"):
        if isinstance(file, Path):
            check_plain(file)
            with open_table(file) as table:
                check_rows(table.metadata, file, file.stat().st_size)
                yield table
        else:
            with file.open() as stream, open_table(stream, metadata=file.footer, pre_buffer=True) as table:
                check_rows(table.metadata, file, file.size)
                file.footer = table.metadata
                yield table


def check_rows(footer: Any, file: TableFile, num_bytes: int) -> None:
    """Raise UserError where the numbers of rows in a footer contradict each other or the size of the file."""
    groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != footer.num_rows or footer.num_rows > _ROWS_PER_BYTE * num_bytes:
        claim = f"{footer.num_rows:,} rows in {len(groups)} row groups of {num_bytes:,} bytes"
        raise UserError(f"{file} is damaged: its footer claims {claim}")


def reading(where: str) -> AbstractContextManager[None]:
    """Turn errors of pyarrow into UserError; where: the file and the part of it."""
    import pyarrow

    kinds = (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError)
    return explained(f"{where} cannot be read as parquet", *kinds)


def columns_of(table: Any, file: TableFile) -> tuple[str, str]:
    """Names of the columns of pictures and of labels of an open parquet file.

    The usual names, else the only column that the metadata of the library `datasets` declares as images or classes. Raises
    UserError where a column is missing, duplicated or of another type.
    """
    import pyarrow

    image, label = _column(file, table, IMAGE_COLUMNS, "Image"), _column(file, table, LABEL_COLUMNS, "ClassLabel")
    check_column(table, file, image, _holds_pictures, "an encoded picture (bytes) in each row")
    check_column(table, file, label, pyarrow.types.is_integer, "a label, a whole number from 0, in each row")
    return image, label


def image_column(table: Any, file: TableFile) -> str:
    """The name of the column of pictures of an open parquet file. Errors as of `columns_of`."""
    image = _column(file, table, IMAGE_COLUMNS, "Image")
    check_column(table, file, image, _holds_pictures, "an encoded picture (bytes) in each row")
    return image


def check_column(table: Any, file: TableFile, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise UserError where a column is duplicated or of another type."""
    import pyarrow

    schema = table.schema_arrow
    if (num := schema.names.count(name)) > 1:
        raise UserError(f"{file} has {num} columns {name}: wanted one")
    kind = schema.field(name).type
    if not holds(kind.value_type if pyarrow.types.is_dictionary(kind) else kind):
        raise UserError(f"{file}: column {name} is of the type {kind}: wanted {wanted}")


def _holds_pictures(kind: Any) -> bool:
    """Whether a column's type is bytes, or a struct with a field `bytes` of that type."""
    from pyarrow import types

    if types.is_struct(kind):
        inner = [kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"]
        return len(inner) == 1 and not types.is_struct(inner[0]) and _holds_pictures(inner[0])
    value = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_binary(value) or types.is_large_binary(value) or types.is_binary_view(value))


def _column(file: TableFile, table: Any, wanted: Sequence[str], kind: str) -> str:
    names = table.schema_arrow.names
    matching = [name for name in wanted if name in names]
    if not matching:
        features: dict[str, Any] = {}
        with suppress(ValueError, AttributeError):
            declared = (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}").decode()
            features = dict(parse_json(declared, "its metadata").get("info", {}).get("features", {}).items())
        types = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
        matching = [name for name in names if types.get(name) == kind]
        if len(matching) != 1:
            raise UserError(f"{file} has the columns {', '.join(names)}: wanted {' or '.join(wanted)}")
    return matching[0]


def checked_label(label: Any, where: str) -> int:
    """Return a label. Raises UserError where it is invalid."""
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label <= MAX_LABEL:
        raise UserError(f"{where}: wanted a label, a whole number from 0 to {MAX_LABEL:,}; got {label!r}")
    return label
