"""Atomic writes of files and folders, and the checks before them.

Every output is written to an unfinished folder next to its path and renamed, so that readers never see half a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.locks import LOCK, Lock, Locked, acquire
from tinyfusion.core.reading import check_plain

_OLD = ".tinyfusion.old"  # in an unfinished folder: the folder that is being replaced
_UNFINISHED = re.compile(r"\.(.+)\.[0-9]+\.part")
Identity = tuple[int, int, int, int]
_written: dict[str, Identity] = {}  # files that this process wrote: state after the last write, by absolute path
_EFFECTIVE = os.access in os.supports_effective_ids


@contextmanager
def atomic_write(path: Path, ours: str = "") -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block succeeds, and is removed when it fails.

    Missing parent folders are created, and removed again on failure. Leftovers of killed processes are removed. When a folder
    is replaced, its files that the new one lacks and `ours` (a regular expression of relative paths) does not match are
    retained. Files get the permissions of the umask.
    """
    check_plain(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() or path.name in ("", "..") else path
    created = missing_folders(target.parent)
    folder, lock = unfinished(target), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _begin(folder, target)
        new = folder / target.name
        yield new
        _follow_umask(new, lock)
        _sync(new)
        remember(new, target)  # before `_put` adds files of others
        _put(new, target, ours)
        _sync(target.parent, inside=False)
        _end(folder, lock)
    except BaseException as error:
        if lock is not None:
            _end(folder, lock)
        remove_empty(created)
        if type(error).__module__.startswith("safetensors") and (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        if isinstance(error, OSError) and (error.filename is None or str(error.filename).startswith(str(folder))):
            error.filename = str(path)
        raise


def unfinished(path: Path, pid: int | None = None) -> Path:
    """The unfinished folder in which process `pid` (None: this one) writes a new `path`."""
    return path.with_name(f".{path.name}.{os.getpid() if pid is None else pid}.part")


def _begin(folder: Path, path: Path) -> Lock:
    """Create and lock the unfinished folder of `path`, and remove those of processes that have ended."""
    clear_unfinished(path.parent, path.name)
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            occupied = f"{folder} has the name of its unfinished folder"
            raise UserError(f"cannot write {path}: {occupied}: move that away") from None
        try:
            return acquire(folder / LOCK, f"writes {path}")
        except FileNotFoundError:  # removed before it was locked, as it was empty
            continue
        except BaseException:
            remove_empty([folder])
            raise


def _end(folder: Path, lock: Lock) -> None:
    """Remove an unfinished folder, its lock last."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if entry.name != LOCK:
            remove(entry)
    lock.release()
    with contextlib.suppress(OSError):
        folder.rmdir()


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove unfinished outputs of ended processes: of output `name` in `folder`, else of all below it.

    A folder that was being replaced is restored where nothing has taken its place.
    """
    levels = os.walk(folder) if name is None else itertools.islice(os.walk(folder), 1)
    for entry in [Path(above, inner) for above, folders, _ in levels for inner in folders]:
        match = _UNFINISHED.fullmatch(entry.name)
        if match is None or name not in (None, match[1]) or not is_unfinished(entry):
            continue
        if not (entry / LOCK).is_file():
            with contextlib.suppress(OSError):
                entry.rmdir()
            continue
        try:
            lock = acquire(entry / LOCK, "writes", sign=False)
        except (Locked, OSError):
            continue
        if (entry / _OLD).is_dir() and not os.path.lexists(entry.with_name(match[1])):
            os.replace(entry / _OLD, entry.with_name(match[1]))
        _end(entry, lock)


def is_unfinished(entry: Path) -> bool:
    """Whether `entry` is the unfinished folder of an output, of a running or an ended process."""
    if _UNFINISHED.fullmatch(entry.name) is None or entry.is_symlink() or not entry.is_dir():
        return False
    try:
        return (entry / LOCK).is_file() or not any(entry.iterdir())
    except FileNotFoundError:  # it was completed just now
        return True


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path, ours: str) -> None:
    """Remove a folder that other processes may read; it is renamed first. A file or link at `path` is not touched.

    ours: a regular expression of relative paths; if the folder has other files, only matching ones are removed.
    """
    if path.is_symlink() or not path.is_dir():
        return
    names = files_in(path)
    matching = [name for name in names if re.fullmatch(ours, name)]
    if len(matching) < len(names):
        for name in matching:
            (path / name).unlink()
        return
    folder = unfinished(path)
    lock = _begin(folder, path)
    try:
        os.replace(path, folder / path.name)
    finally:
        _end(folder, lock)


def _put(new: Path, path: Path, ours: str) -> None:
    """Rename `new` to `path`; a folder that is there is set aside first, and restored on failure."""
    check_plain(path)
    if new.is_dir() != path.is_dir() and os.path.lexists(path):
        kind, other = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise UserError(f"cannot write {path}: it is a {kind}, wanted a {other}; choose another name")
    if not path.is_dir():
        os.replace(new, path)
        return
    if path.samefile("."):
        raise UserError(f"cannot replace the current folder {path}: call it from elsewhere")
    for relative in files_in(path):
        if not os.path.lexists(new / relative) and not re.fullmatch(ours, relative):
            (new / relative).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path / relative, new / relative, follow_symlinks=False)
            except OSError:  # a disk without links
                shutil.copy2(path / relative, new / relative, follow_symlinks=False)
    old = new.with_name(_OLD)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise


def files_in(folder: Path) -> list[str]:
    """Relative paths of all entries below `folder` except folders."""
    entries = [Path(above, name) for above, inner, files in os.walk(folder) for name in (*inner, *files)]
    return sorted(e.relative_to(folder).as_posix() for e in entries if e.is_symlink() or not e.is_dir())


def _follow_umask(new: Path, lock: Lock) -> None:
    """Give files the permissions that the umask leaves to new ones, read from the lock file: some writers give fewer."""
    usual = os.fstat(lock.descriptor).st_mode & 0o666
    for file in [new, *new.rglob("*")] if new.is_dir() else [new]:
        mode = stat.S_IMODE(file.lstat().st_mode)
        if file.is_file() and not file.is_symlink() and mode | usual != mode:
            file.chmod(mode | usual)


def _sync(path: Path, inside: bool = True) -> None:
    """Flush a file, or a folder and (`inside`) the files in it, to the disk."""
    for entry in [*(file for file in path.rglob("*") if inside and file.is_file()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def disk_reason(error: OSError) -> str:
    """Reason of an error of the file system, for messages."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk"
    return error.strerror or str(error)


def file_label(name: str) -> str:
    """A name as part of a file name: runs of characters other than letters, digits, "_" and "." become "-"."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")


def _identity(path: str | Path) -> Identity | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def remember(path: Path, place: Path | None = None) -> None:
    """Record that this process wrote a file or all files of a folder. place: their path after a rename."""
    for file in [path / relative for relative in files_in(path)] if path.is_dir() else [path]:
        if (identity := _identity(file)) is not None:
            _written[os.path.abspath((place or path) / file.relative_to(path))] = identity


def is_as_written(path: Path) -> bool:
    """Whether this process wrote the file and no other process has changed it since."""
    return (identity := _identity(path)) is not None and _written.get(os.path.abspath(path)) == identity


def remove_written(folder: Path) -> None:
    """Remove the files in `folder` that this process wrote and no other changed, and folders that become empty."""
    for file, identity in forget(folder).items():
        if _identity(file) == identity:
            remove_file(folder, os.path.relpath(file, folder))


def forget(folder: Path) -> dict[str, Identity]:
    """Drop and return the record of files in `folder` that this process wrote."""
    top = os.path.join(os.path.abspath(folder), "")
    return {file: _written.pop(file) for file in list(_written) if file.startswith(top)}


def remove_file(folder: Path, name: str) -> None:
    """Remove a file by its relative path in `folder`, and the folders above it that become empty."""
    (folder / name).unlink()
    remove_empty([folder / parent for parent in Path(name).parents[:-1]])


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and those above it that do not exist, deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove the empty ones of `folders`, which are given deepest first."""
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Bytes of names that are not UTF-8 are escaped in it."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal. Raises UserError on a special file, which may never end."""
    check_plain(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path) -> None:
    """Raise UserError unless this process may create or replace `path`, which is a regular file, a folder or missing."""
    check_plain(path)
    parent = _existing(path)
    if parent != path.absolute() and not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is a file")
    if not os.access(parent, os.W_OK | (os.X_OK if parent.is_dir() else 0), effective_ids=_EFFECTIVE):
        raise UserError(f"cannot write {path}: {parent} is read-only for you")


def _existing(path: Path) -> Path:
    """`path`, or the nearest existing folder above it. Raises UserError where access is denied."""
    parent = path.absolute()
    while True:
        try:
            parent.stat()
            return parent
        except (FileNotFoundError, NotADirectoryError):
            parent = parent.parent
        except (OSError, ValueError) as error:
            reason = disk_reason(error) if isinstance(error, OSError) else str(error)
            raise UserError(f"cannot write {path}: {reason}") from error


def check_space(path: Path, num_bytes: int) -> None:
    """Raise UserError unless the disk of `path` has room for `num_bytes`."""
    free = shutil.disk_usage(_existing(path)).free
    if free < num_bytes:
        needed = f"{path} needs about {num_bytes / 2**20:.0f} MiB"
        raise UserError(f"no space: {needed} and the disk has {free / 2**20:.0f} MiB free")
