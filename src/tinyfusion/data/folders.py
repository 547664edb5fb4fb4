"""Folders of pictures: list the files of a set with their labels, in the order of their names, without opening them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain, unreadable
from tinyfusion.data.hub import SPLIT_WORDS
from tinyfusion.data.picture import SUFFIXES

_NUMBERED_LABELS = 1000  # folder names below this number are labels, and so are those below twice the number of folders
_SHOWN = 4


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a set: files in order, with labels; classes: names by label, empty without class folders.

    root: the folder of the classes, or of the pictures. remarks: lines to print.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Pictures in and below a folder. deep: number of those below it. others: number of other files by suffix."""

    files: tuple[str, ...]
    deep: int
    others: Counter[str]


def printable(name: str | Path) -> str:
    """A file name for messages and JSON, with escapes for bytes that are not UTF-8."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def open_picture_folder(path: Path) -> PictureFolder:
    """List the pictures of a folder: one class per subfolder, or a single class where most pictures are in no subfolder.

    Where the subfolders are splits, the training split is taken. Raises UserError where there are no pictures.
    """
    loose, folders = _listed(path)
    classes = {name: pictures_below(path / name) for name in folders}
    below = sum(len(entry.files) for entry in classes.values())
    if loose.files and len(loose.files) >= below:
        left = f"; pictures left out, in folders below: {below:,}" if below else ""
        remark = f"{printable(path)}: no class folders, so its pictures are one class ({len(loose.files):,}){left}"
        return PictureFolder(path, loose.files, (0,) * len(loose.files), (), (remark, *_about_files(path, loose)))
    if not folders:
        raise UserError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    splits = {word: split for split, words in SPLIT_WORDS.items() for word in words}
    if all(name.lower() in splits for name in folders):
        return _training_split(path, folders, {name: splits[name.lower()] for name in folders})
    return _classes(path, loose, classes)


def _training_split(path: Path, folders: list[str], splits: dict[str, str]) -> PictureFolder:
    names = [name for name in folders if splits[name] == "train"]
    if len(names) != 1:
        raise UserError(f"{path} holds the splits {', '.join(folders)}: name one of them, such as {path / folders[0]}")
    chosen = open_picture_folder(path / names[0])
    others = [name for name in folders if name != names[0]]
    left = f"; name {printable(path / others[0])} for another" if others else ""
    remark = f"{printable(path)}: the split {names[0]} of {', '.join(map(printable, folders))} is taken{left}"
    return replace(chosen, remarks=(remark, *chosen.remarks))


def _classes(path: Path, loose: Listing, folders: dict[str, Listing]) -> PictureFolder:
    labels, remarks = _labels(path, list(folders))
    files: list[str] = []
    listed: list[int] = []
    for name in sorted(folders, key=labels.__getitem__):
        if not folders[name].files:
            raise UserError(f"{path / name} holds no pictures ({', '.join(SUFFIXES)}): every folder is a class")
        files += folders[name].files
        listed += [labels[name]] * len(folders[name].files)
    if loose.files:
        left = f"{len(loose.files):,}, such as {printable(Path(loose.files[0]).name)}"
        remarks.append(f"{printable(path)}: pictures left out, in no class folder: {left}")
    if deep := sum(entry.deep for entry in folders.values()):
        remarks.append(f"{printable(path)}: pictures below a class folder, which are of that class: {deep:,}")
    whole = Listing(tuple(files), deep, sum((entry.others for entry in folders.values()), loose.others))
    names = {label: printable(name) for name, label in labels.items()}
    classes = tuple(names.get(label, str(label)) for label in range(max(names) + 1))
    return PictureFolder(path, whole.files, tuple(listed), classes, (*remarks, *_about_files(path, whole)))


def _labels(path: Path, names: list[str]) -> tuple[dict[str, int], list[str]]:
    """Labels by class folder, and remarks. Names that are all numbers are the labels; otherwise the sorted position is."""
    names = sorted(names)
    places = {name: place for place, name in enumerate(names)}
    numbers = {name: int(name) for name in names if name.isascii() and name.isdigit()}
    if len(set(numbers.values())) < len(names):
        return places, []
    ordered = sorted(numbers, key=numbers.__getitem__)
    first, last = ordered[0], ordered[-1]
    if numbers[last] < max(_NUMBERED_LABELS, 2 * len(names)):
        remark = f"the names of its folders are numbers, and so are the labels: {first} to {last}"
        return numbers, [] if numbers == places else [f"{printable(path)}: {remark}"]
    remark = f"the names of its folders are numbers, and labels count them: {first} is 0, {last} is {len(names) - 1}"
    return {name: place for place, name in enumerate(ordered)}, [f"{printable(path)}: {remark}"]


def _about_files(path: Path, listing: Listing) -> list[str]:
    """Remarks on files of other kinds, and on animations."""
    remarks = []
    if others := listing.others.total():
        kinds = ", ".join(f"{num} {suffix}" for suffix, num in listing.others.most_common(_SHOWN))
        remarks.append(f"{printable(path)}: files left out, without a suffix of pictures: {others:,} ({kinds})")
    if animations := sum(file.lower().endswith(".gif") for file in listing.files):
        remarks.append(f"{printable(path)}: .gif pictures, of which the first frame is taken: {animations:,}")
    return remarks


def pictures_below(folder: Path) -> Listing:
    """Pictures in and below a folder. A folder that is reached twice, as through a looping link, counts once."""
    seen: set[tuple[int, int]] = set()
    listed: list[Listing] = []
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
        listing, names = _listed(root, hidden=True)
        pending += [root / name for name in reversed(names)]
        listed.append(Listing(listing.files, len(listing.files) * (root != folder), listing.others))
    listed.sort(key=lambda entry: os.path.dirname(entry.files[0]) if entry.files else "")
    files = tuple(file for entry in listed for file in entry.files)
    return Listing(files, sum(entry.deep for entry in listed), sum((entry.others for entry in listed), Counter()))


def _listed(folder: Path, hidden: bool = False) -> tuple[Listing, list[str]]:
    """Pictures and other files of one folder, and the sorted names of its subfolders; hidden: include names with a dot.

    Raises UserError on a folder that cannot be read and on a picture that is no regular file.
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
    return Listing(tuple(pictures), 0, others), folders


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; False for a looping link."""
    try:
        return kind()
    except OSError:
        return False
