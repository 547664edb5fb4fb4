"""How files come into being whole, and what has to be so before one is begun.

Everything is written beside and renamed, so a reader never meets half a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tinyfusion.core.errors import UserError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` when the block ends well and vanishes when it does not.

    Folders above are made where missing, and taken back when the block does not end well. What a killed process left
    of the same output is removed.
    """
    made = missing_folders(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in orphans(path, "part"):
        remove(leftover)
    beside = beside_of(path, "part")
    try:
        yield beside
        _sync(beside)
        _put(beside, path)
        _sync_folder(path.parent)
    except BaseException:
        remove(beside)
        remove_empty(made)
        raise


def disk_reason(error: OSError) -> str:
    """What an error of the file system says, in words for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk"
    return error.strerror or str(error)


def file_label(name: str) -> str:
    """A name or path as a part of a file's name: anything but letters, digits, "_" and "." becomes "-"."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")


def beside_of(path: Path, kind: str) -> Path:
    """Where this process keeps a new ("part") or former ("old") `path` for a moment."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def orphans(path: Path, kind: str) -> list[Path]:
    """What processes that are no more left beside `path`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.{kind}")
    entries = list(path.parent.iterdir()) if path.parent.is_dir() else []
    found = [(match, entry) for entry in entries if (match := name.fullmatch(entry.name))]
    return [entry for match, entry in found if not _is_running(int(match[1]))]


def _is_running(pid: int) -> bool:
    """Whether another process has this number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a folder that others read: out of sight first, so that nobody meets half of it."""
    aside = beside_of(path, "part")
    remove(aside)
    os.replace(path, aside)
    remove(aside)


def _put(new: Path, path: Path) -> None:
    """Rename; a former folder is out of the way for that moment, and back if it goes wrong."""
    if not (new.is_dir() and path.exists()):
        os.replace(new, path)
        return
    old = beside_of(path, "old")
    remove(old)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    remove(old)


def _sync(path: Path) -> None:
    """Have a file, or all in a folder, on the disk before anything is renamed."""
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if path.is_dir():
        _sync_folder(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Clear away what killed processes left in a run folder: unfinished files go, what was set aside comes back."""
    for entry in [p for p in folder.rglob(".*") if p.suffix in (".part", ".old")]:
        match = re.fullmatch(r"\.(.+)\.(\d+)\.(part|old)", entry.name)
        if match is None or _is_running(int(match[2])) or not entry.exists():
            continue
        if match[3] == "old" and not entry.with_name(match[1]).exists():
            os.replace(entry, entry.with_name(match[1]))
        else:
            remove(entry)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(opened: int | IO[bytes]) -> bool:
    """Lock an open file or folder for this process, until it is closed; False where another one holds it.

    True also on systems and disks without locks: there nobody can be told from another.
    """
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and those above it that do not exist, deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove those of `folders`, deepest first, that hold nothing."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole. Bytes of names that are not UTF-8 are escaped in it."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_writable(path: Path) -> None:
    """Raise UserError unless `path` can be made or replaced."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if parent != path.absolute() and not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"cannot write {path}: {parent} is read-only for you")


def check_space(path: Path, num_bytes: int) -> None:
    """Raise UserError unless the disk of `path` has room for `num_bytes`."""
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"no space: {path} needs about {num_bytes / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free"
        )
