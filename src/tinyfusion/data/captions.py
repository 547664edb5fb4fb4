"""Pictures with captions: folders with a text file per picture or a list in JSON lines, parquet files and tars.

The order depends on names alone, as in `data/originals.py`. Equal captions share a row of the table of prompts; the label of a
picture is its row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory, check_plain, parse_json, read_json, read_text, unreadable
from tinyfusion.data import parquet
from tinyfusion.data.captioned_digits import captioned_pictures
from tinyfusion.data.clips import MOVING, VIDEOS, clips_below
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.folders import pictures_below, printable
from tinyfusion.data.originals import (
    WEBDATASET,
    Contents,
    Originals,
    TarMember,
    fingerprint_of,
    opened_tar,
    pictures_in,
    read_file,
    tar_contents,
    tar_files,
    tars_at,
)
from tinyfusion.data.picture import SUFFIXES
from tinyfusion.data.stream import RowGroup

LINES = (".jsonl", ".ndjson")
METADATA = ("metadata.jsonl", "captions.jsonl")  # in a folder of pictures
COLUMNS = ("text", "caption", "prompt")  # names of captions, in the order of their search
FILES = ("file_name", "image", "video")  # names of the picture in a line of JSON
_NAMED = 3  # pictures without a caption that are named in an error
_LONGEST_LINE = 2**24  # characters: a longer line is damaged
_MOST_CHARACTERS = 100_000  # of a caption: longer ones are files of another kind


@dataclass(frozen=True)
class Captioned:
    """Pictures or clips in order, labelled by the rows of `texts`, their captions without repetitions, in order of appearance."""

    originals: Originals
    texts: tuple[str, ...]
    files: tuple[str, ...] = ()  # the paths of pictures or clips, where each is one

    def __len__(self) -> int:
        return len(self.originals)


def open_captioned(name: str, column: str | None = None, clips: bool = False) -> Captioned:
    """Open a folder, a .jsonl file, a set by its prefix (parquet, hub, webdataset), or `digits`: those of scikit-learn, with texts.

    column: name of the captions in parquet files and JSON; None: text, caption or prompt. clips: videos and folders of frames in
    place of pictures. Raises UserError where pictures or captions are missing, damaged or empty.
    """
    if clips and name.startswith((*parquet.WHOLE, *parquet.STREAMED, WEBDATASET)):
        raise UserError(
            f"{name}: videos are read from a folder or a .jsonl file; to take pictures, leave encode.frames at 1"
        )
    if name == REAL_SETS[0]:
        captions, contents = captioned_pictures()
        return _table(name, captions, contents, iter(()))
    if name.startswith(parquet.WHOLE + parquet.STREAMED):
        return _of_parquet(name, column)
    if name.startswith(WEBDATASET):
        return _of_tars(name, Path(name.removeprefix(WEBDATASET)), column)
    path = Path(name)
    check_plain(path)
    if path.is_file() and path.suffix.lower() in LINES:
        return _of_lines(name, path, column)
    if path.is_file():
        kind = WEBDATASET if path.suffix == ".tar" else parquet.PARQUET
        raise UserError(f"{name} is a file: wanted a folder or {LINES[0]}; for a tar or parquet file say {kind}{name}")
    if not path.is_dir():
        others = f"{REAL_SETS[0]}, a .jsonl file, {parquet.PARQUET}PATH, {parquet.HUB}ORG/NAME or {WEBDATASET}PATH"
        raise UserError(f"no pictures at {name}: wanted a folder of them, {others}")
    return _of_folder(name, path, column, clips)


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file: one a line, JSON lines, or a JSON list. Raises UserError where there are none."""
    texts: Any
    if path.suffix.lower() in LINES:
        texts = [checked_caption(_text(entry, column, where), where) for where, entry in _json_lines(path)]
    elif path.suffix == ".json":
        texts = read_json(path)
        if not isinstance(texts, list) or not all(isinstance(each, str) and each.strip() for each in texts):
            raise UserError(f"{path} holds no prompts: wanted a JSON list of texts, none of them empty")
    else:
        texts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not texts:
        raise UserError(f"{path} holds no prompts: wanted one a line, JSON lines with text, or a JSON list of texts")
    return list(texts)


def checked_caption(text: Any, where: str) -> str:
    """A caption without white space at its ends. Raises UserError where it is no text, empty, or longer than any caption."""
    if not isinstance(text, str):
        raise UserError(f"{where}: wanted a caption, a text; got {type(text).__name__}")
    if "\0" in text or len(text) > _MOST_CHARACTERS:
        raise UserError(f"{where}: wanted a caption of at most {_MOST_CHARACTERS:,} characters; got {len(text):,}")
    if not (text := text.strip()):
        raise UserError(f"{where} has an empty caption: write one, or take the picture out of the set")
    return text


def _table(
    name: str, captions: Sequence[str], contents: Contents, names: Iterator[str], remarks: Sequence[str] = ()
) -> Captioned:
    """The set of pictures with these captions, in order. names: of the pictures, for the fingerprint."""
    rows: dict[str, int] = {}
    labels = np.fromiter((rows.setdefault(text, len(rows)) for text in captions), np.int64, len(captions))
    if not len(labels):
        raise UserError(f"{name} holds no pictures with captions")
    texts = tuple(rows)
    digest = fingerprint_of((*names, *texts), labels)
    return Captioned(Originals(name, labels, contents, digest, (), tuple(remarks)), texts)


def _missing(name: str, missing: Sequence[str], total: int, wanted: str) -> UserError:
    """The error of pictures without a caption."""
    more = (
        f" (and so {len(missing):,} of {total:,} pictures: {', '.join(missing[:_NAMED])})" if len(missing) > 1 else ""
    )
    return UserError(f"{name}: {missing[0]} has no caption: wanted {wanted}{more}")


# ----------------------------------------------------------------------------------------------------- folders and lines


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, object) of every line of a file. Raises UserError with the number of a damaged line."""
    check_plain(path)
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), ""), 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                value = parse_json(line, where)
                if not isinstance(value, dict):
                    raise UserError(f"{where}: wanted a JSON object; got {line.strip()[:40]}")
                yield where, value
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: not UTF-8 text near line {number + 1} ({error})") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise unreadable(path, error) from error


def _text(entry: Mapping[str, Any], column: str | None, where: str) -> Any:
    """The caption of a JSON object. Raises UserError where it has none of that name."""
    names = (column,) if column else COLUMNS
    key = next((name for name in names if name in entry), None)
    if key is None:
        there = ", ".join(map(str, entry)) or "nothing"
        raise UserError(f"{where} has no {' or '.join(names)}: it has {there}; --caption-column names another")
    return entry[key]


def _entries(path: Path, column: str | None) -> dict[str, tuple[str, str]]:
    """{absolute path of a picture: (place, caption)} of a file of JSON lines, paths relative to its folder."""
    found: dict[str, tuple[str, str]] = {}
    for where, entry in _json_lines(path):
        key = next((name for name in FILES if isinstance(entry.get(name), str)), None)
        if key is None:
            raise UserError(f"{where} names no picture: wanted {' or '.join(FILES)}")
        file = os.path.abspath(path.parent / entry[key])
        if file in found:
            raise UserError(f"{where}: {entry[key]} is named twice, also in {found[file][0]}")
        found[file] = where, checked_caption(_text(entry, column, where), where)
    return found


def _of_lines(name: str, path: Path, column: str | None) -> Captioned:
    entries = _entries(path, column)
    if absent := [file for file in entries if not Path(file).exists()]:
        where = entries[absent[0]][0]
        more = f" (and {len(absent) - 1:,} more)" if len(absent) > 1 else ""
        raise UserError(f"{where}: {absent[0]} does not exist{more}")
    files = list(entries)
    names = (os.path.relpath(file, path.parent.absolute()) for file in files)
    made = _table(name, [entries[file][1] for file in files], file_contents(files), names)
    return replace(made, files=tuple(files))


def file_contents(files: Sequence[str]) -> Contents:
    """Contents of files in order; of a folder of frames or a video its path."""

    def contents(first: int, num: int) -> Iterator[tuple[str, Any]]:
        for file in files[first : first + num]:
            path = Path(file)
            yield file, path if path.is_dir() or path.suffix.lower() in VIDEOS else read_file(path)

    return contents


def _of_folder(name: str, path: Path, column: str | None, clips: bool) -> Captioned:
    files = clips_below(path) if clips else list(pictures_below(path).files)
    if not files:
        wanted = (
            f"videos ({', '.join((*VIDEOS, *MOVING))}) or folders of frames below it"
            if clips
            else f"pictures ({', '.join(SUFFIXES)})"
        )
        raise UserError(f"{path} holds no {wanted}")
    listed: dict[str, tuple[str, str]] = {}
    for folder in sorted({path, *(Path(file).parent for file in files)}):
        for found in (folder / each for each in METADATA):
            if found.is_file():
                listed |= _entries(found, column)
    captions, missing = [], list[str]()
    for file in files:
        entry, text = listed.get(os.path.abspath(file)), Path(file).with_suffix(".txt")
        if Path(file).is_dir():
            text = Path(f"{file}.txt")
        if entry is not None:
            captions.append(entry[1])
        elif text.is_file():
            captions.append(checked_caption(_read_caption(text), str(text)))
        else:
            missing.append(printable(os.path.relpath(file, path)))
    if missing:
        raise _missing(
            name, missing, len(files), f"{Path(missing[0]).with_suffix('.txt').name} next to it, or a {METADATA[0]}"
        )
    present = {os.path.abspath(file) for file in files}
    remarks = []
    if left := sum(file not in present for file in listed):
        remarks.append(f"{printable(path)}: lines of {METADATA[0]} that name no file of the set: {left:,}")
    names = (os.path.relpath(file, path) for file in files)
    return replace(_table(name, captions, file_contents(files), names, remarks), files=tuple(files))


def _read_caption(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * _MOST_CHARACTERS:
            raise UserError(f"{path}: wanted a caption of at most {_MOST_CHARACTERS:,} characters")
        return read_text(path)
    except OSError as error:
        raise unreadable(path, error) from error


# ------------------------------------------------------------------------------------------------------ parquet and tars


def _of_parquet(name: str, column: str | None) -> Captioned:
    groups: list[RowGroup] = []
    captions: list[str] = []
    for file in parquet.tables_of(name):
        with parquet.opened(file) as table:
            image, text = parquet.image_column(table, file), _text_column(table, file, column)
            first, rows = 0, table.metadata.num_rows
            for index in range(table.num_row_groups):
                num = table.metadata.row_group(index).num_rows
                groups.append(RowGroup(file, index, first, num, rows, (image,)))
                for batch in parquet.batches_of(table, index, [text]):
                    check_memory(2 * batch.nbytes, f"{file}: captions of {rows:,} rows")
                    for row, value in enumerate(batch.column(0).to_pylist(), first):
                        captions.append(checked_caption(value, f"{file}, row {row}"))
                    first += batch.num_rows
    names = (f"{Path(str(group.file)).name} {group.index} {group.num}" for group in groups)
    return _table(name, captions, pictures_in(groups), names)


def _text_column(table: Any, file: Any, column: str | None) -> str:
    """The column of captions. Raises UserError where it is missing or holds no texts."""
    import pyarrow

    names = table.schema_arrow.names
    name = next((each for each in ((column,) if column else COLUMNS) if each in names), None)
    if name is None:
        wanted = column or " or ".join(COLUMNS)
        raise UserError(f"{file} has no column {wanted}; it has {', '.join(names)}: --caption-column names one of them")

    def holds_texts(kind: Any) -> bool:
        return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    parquet.check_column(table, file, name, holds_texts, "texts; --caption-column names another")
    return str(name)


def _of_tars(name: str, path: Path, column: str | None) -> Captioned:
    members: list[TarMember] = []
    captions: list[str] = []
    missing: list[str] = []
    for tar in tars_at(path):
        pictures, texts = _in_tar(tar, column)
        members += pictures
        captions += [texts[each.key] for each in pictures if each.key in texts]
        missing += [str(each) for each in pictures if each.key not in texts]
    if not members:
        raise UserError(f"{path} holds no pictures: wanted NAME.jpg with NAME.txt or NAME.json")
    if missing:
        raise _missing(name, missing, len(members), "NAME.txt, or NAME.json with a text, in the tar")
    return _table(name, captions, tar_contents(members), map(str, members))


def _in_tar(tar: Path, column: str | None) -> tuple[list[TarMember], dict[str, str]]:
    """The pictures of a tar, in its order, and captions by stem."""
    pictures: list[TarMember] = []
    texts: dict[str, str] = {}
    with opened_tar(tar) as archive:
        for key, suffix, info in tar_files(tar, archive, "caption"):
            where = f"{tar}, {info.name}"
            if suffix in SUFFIXES:
                pictures.append(TarMember(tar, key, info.offset_data, info.size))
            elif suffix in (".txt", ".json") and (key not in texts or suffix == ".txt"):
                if info.size > 4 * _MOST_CHARACTERS:
                    raise UserError(f"{where}: wanted a caption of at most {_MOST_CHARACTERS:,} characters")
                content = archive.extractfile(info).read()  # type: ignore[union-attr]
                texts[key] = _tar_caption(content, suffix, column, where)
    return pictures, texts


def _tar_caption(content: bytes, suffix: str, column: str | None, where: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is damaged: not UTF-8 text ({error})") from error
    if suffix == ".txt":
        return checked_caption(text, where)
    entry = parse_json(text, where)
    if not isinstance(entry, dict):
        raise UserError(f"{where}: wanted a JSON object; got {json.dumps(entry)[:40]}")
    return checked_caption(_text(entry, column, where), where)


def subset(originals: Originals, rows: np.ndarray) -> Originals:
    """These rows of a set, in their order."""

    def contents(first: int, num: int) -> Iterator[tuple[str, Any]]:
        for row in rows[first : first + num].tolist():
            yield from originals.contents(row, 1)

    return replace(originals, labels=originals.labels[rows], contents=contents)
