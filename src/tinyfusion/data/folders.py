"""Folders of pictures: which files belong to a set, and which label each has. Pictures are not opened here.

The order is a function of names alone: class folders sorted, of each the folders below sorted, then the names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain, unreadable
from tinyfusion.data.hub import SPLIT_WORDS
from tinyfusion.data.picture import SUFFIXES

_NUMBERED_LABELS = 1000  # folder names below this number are labels, and so are those below twice the number of folders
_SHOWN = 4


@dataclass(frozen=True)
class PictureFolder:
    """files: paths in their order, with a label each. classes: names by label, none of a folder without class folders.

    root: the folder that holds the classes, or the pictures. remarks: what people should know, a line each.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    """Pictures in a folder and below; deep: how many of them are below. others: files of other kinds, by suffix."""

    files: tuple[str, ...]
    deep: int
    others: Counter[str]


def printable(name: str | Path) -> str:
    """A file name for people and JSON files: bytes that are not UTF-8 as escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def open_picture_folder(path: Path) -> PictureFolder:
    """The pictures of a folder: a class per folder in it, or one class where most pictures lie in no such folder.

    Of a folder whose folders are splits, that of training is taken. Raises UserError where there are no pictures.
    """
    loose, folders = _listed(path)
    found = {name: _pictures(path / name) for name in folders}
    below = sum(len(one.files) for one in found.values())
    if loose.files and len(loose.files) >= below:
        return _one_class(path, loose, below)
    if not folders:
        raise UserError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    splits = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    if all(name.lower() in splits for name in folders):
        return _training_split(path, folders, {name: splits[name.lower()] for name in folders})
    return _classes(path, loose, found)


def _one_class(path: Path, loose: _Found, below: int) -> PictureFolder:
    left = f"; pictures left out, in folders below: {below:,}" if below else ""
    remark = f"{printable(path)}: no class folders, so its pictures are one class ({len(loose.files):,}){left}"
    return PictureFolder(path, loose.files, (0,) * len(loose.files), (), (remark, *_about_files(path, loose)))


def _training_split(path: Path, folders: list[str], splits: dict[str, str]) -> PictureFolder:
    names = [name for name in folders if splits[name] == "train"]
    if len(names) != 1:
        raise UserError(f"{path} holds the splits {', '.join(folders)}: name one of them, such as {path / folders[0]}")
    chosen = open_picture_folder(path / names[0])
    others = [name for name in folders if name != names[0]]
    left = f"; name {printable(path / others[0])} for another" if others else ""
    remark = f"{printable(path)}: the split {names[0]} of {', '.join(map(printable, folders))} is taken{left}"
    return PictureFolder(chosen.root, chosen.files, chosen.labels, chosen.classes, (remark, *chosen.remarks))


def _classes(path: Path, loose: _Found, found: dict[str, _Found]) -> PictureFolder:
    labels, remarks = _labels(path, list(found))
    files: list[str] = []
    listed: list[int] = []
    for name in sorted(found, key=labels.__getitem__):
        if not found[name].files:
            raise UserError(f"{path / name} holds no pictures ({', '.join(SUFFIXES)}): every folder is a class")
        files += found[name].files
        listed += [labels[name]] * len(found[name].files)
    if loose.files:
        such = printable(Path(loose.files[0]).name)
        remarks.append(
            f"{printable(path)}: pictures left out, in no class folder: {len(loose.files):,}, such as {such}"
        )
    if deep := sum(one.deep for one in found.values()):
        remarks.append(f"{printable(path)}: pictures below a class folder, which are of that class: {deep:,}")
    whole = _Found(tuple(files), deep, sum((one.others for one in found.values()), loose.others))
    names = {label: printable(name) for name, label in labels.items()}
    classes = tuple(names.get(label, str(label)) for label in range(max(names) + 1))
    return PictureFolder(path, whole.files, tuple(listed), classes, (*remarks, *_about_files(path, whole)))


def _labels(path: Path, names: list[str]) -> tuple[dict[str, int], list[str]]:
    """Labels by name of class folder: the number that the names are, where all are numbers, else their places; and remarks."""
    names = sorted(names)
    places = {name: place for place, name in enumerate(names)}
    numbers = {name: int(name) for name in names if name.isascii() and name.isdigit()}
    if len(set(numbers.values())) < len(names):
        return places, []
    ordered = sorted(numbers, key=numbers.__getitem__)
    first, last = ordered[0], ordered[-1]
    if numbers[last] < max(_NUMBERED_LABELS, 2 * len(names)):
        said = f"the names of its folders are numbers, and so are the labels: {first} to {last}"
        return numbers, [] if numbers == places else [f"{printable(path)}: {said}"]
    said = f"the names of its folders are numbers, and labels count them: {first} is 0, {last} is {len(names) - 1}"
    return {name: place for place, name in enumerate(ordered)}, [f"{printable(path)}: {said}"]


def _about_files(path: Path, found: _Found) -> list[str]:
    """Remarks on files of other kinds, and on animations."""
    remarks = []
    if others := found.others.total():
        kinds = [f"{num} {suffix}" for suffix, num in found.others.most_common(_SHOWN)]
        remarks.append(
            f"{printable(path)}: files left out, whose names are not those of pictures: {others:,} ({', '.join(kinds)})"
        )
    if animations := sum(file.lower().endswith(".gif") for file in found.files):
        remarks.append(f"{printable(path)}: .gif pictures, of which the first frame is taken: {animations:,}")
    return remarks


def _pictures(folder: Path) -> _Found:
    """Pictures in a folder and below. A folder that is met again, through a link that loops, counts once."""
    seen: set[tuple[int, int]] = set()
    listed: list[_Found] = []
    pending = [folder]
    while pending:
        root = pending.pop()
        try:
            status = os.stat(root)
        except OSError as error:
            raise unreadable(root, error) from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        found, names = _listed(root, hidden=True)
        pending += [root / name for name in reversed(names)]
        listed.append(_Found(found.files, len(found.files) * (root != folder), found.others))
    listed.sort(key=lambda one: os.path.dirname(one.files[0]) if one.files else "")
    files = tuple(file for one in listed for file in one.files)
    return _Found(files, sum(one.deep for one in listed), sum((one.others for one in listed), Counter()))


def _listed(folder: Path, hidden: bool = False) -> tuple[_Found, list[str]]:
    """Pictures and other files of one folder, and the names of its folders, sorted; hidden: also folders with a dot.

    Raises UserError on a folder that cannot be read, and on a picture that is no regular file.
    """
    pictures, folders, others = [], [], Counter[str]()
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from error
    for entry in entries:
        if _is(entry.is_dir):
            folders += [entry.name] if hidden or not entry.name.startswith(".") else []
        elif entry.name.startswith("."):
            continue
        elif not entry.name.lower().endswith(SUFFIXES):
            others[printable(Path(entry.name).suffix.lower()) or "without a suffix"] += 1
        else:
            if not _is(entry.is_file):
                check_plain(Path(entry.path))
                raise UserError(f"{entry.path} is a link to nothing: wanted a picture")
            pictures.append(entry.path)
    return _Found(tuple(pictures), 0, others), folders


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link that loops is of none."""
    try:
        return kind()
    except OSError:
        return False
