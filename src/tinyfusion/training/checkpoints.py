"""Save training states in a background thread and load them. `saved.py` describes the format."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.files import atomic_write, clear_unfinished, discard, disk_reason, unfinished
from tinyfusion.core.ranks import complete_file, wait_for_files, wait_until
from tinyfusion.core.reading import check_plain, read_json, unreadable
from tinyfusion.core.rundir import CHECKPOINT_FILES
from tinyfusion.training.saved import (
    RECORD,
    SUMS,
    Progress,
    damage,
    open_checkpoint,
    other_version,
    part_name,
    write_record,
    write_tensors,
)
from tinyfusion.training.shards import first_row, is_sharded, local_part
from tinyfusion.training.state import TrainState

First = Callable[[Callable[[], Any]], Any]  # runs a call on rank 0 and returns its result on all ranks

# ---------------------------------------------------------------------------------------------------------------- reading


def load_latest(folder: Path, state: TrainState, first: First = lambda call: call()) -> int:
    """Load the newest undamaged checkpoint into `state`. Returns its step, 0 if there is none.

    A checkpoint that is damaged or belongs to another training is reported, and the one before it is tried. first: runs
    the checks on one of several ranks (`Engine.first`). Raises UserError if all checkpoints are of another tinyfusion
    version.
    """
    refused = None
    for path in reversed(first(partial(checkpoint_folders, folder))):
        if other := first(partial(other_version, path)):
            refused = refused or other
            continue
        wrong, kind = first(partial(damage, path)), "is damaged"
        if wrong is None:
            try:
                state.load(open_checkpoint(path))
                return state.step
            except UserError as error:
                wrong, kind = str(error), "does not fit"
        warnings.warn(
            f"checkpoint {path} {kind} ({wrong}); trying the one before it (the next one saved replaces it)",
            stacklevel=2,
        )
    if refused is not None:
        raise UserError(refused)
    return 0


def load_checkpoint(path: Path, state: TrainState, first: First = lambda call: call()) -> int:
    """Load this checkpoint into `state` and return its step. Raises UserError, with `state` unchanged, if it cannot be used."""
    if wrong := first(partial(_unusable, path)):
        raise UserError(wrong)
    with prefixed(f"checkpoint {path} does not fit this training"):
        state.load(open_checkpoint(path))
    return state.step


def _unusable(path: Path) -> str | None:
    """Why a path cannot be loaded as a checkpoint, None if it can. Raises UserError if the path cannot be read."""
    wanted = "wanted a folder such as RUN/checkpoints/step-0001000"
    check_plain(path)
    try:
        missing = None if stat.S_ISDIR(path.stat().st_mode) else "it is a file"
    except (FileNotFoundError, NotADirectoryError):
        missing = "no such folder"
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if missing:
        return f"no checkpoint at {path}: {missing}; {wanted}"
    if not any((path / name).exists() for name in (RECORD, SUMS)):
        inside = checkpoint_folders(path / "checkpoints") or checkpoint_folders(path)
        return f"{path} is not a checkpoint; {f'the newest in it is {inside[-1]}' if inside else wanted}"
    if other := other_version(path):
        return other
    problem = damage(path)
    return problem and f"checkpoint {path} is damaged ({problem}): give another one"


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest first. Raises UserError if it cannot be read.

    A folder with a checkpoint's name is left out if it has files, but none of a checkpoint.
    """
    try:
        entries = list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {disk_reason(error)}") from error
    steps = {entry: step for entry in entries if (step := _step(entry)) is not None and not _is_foreign(entry)}
    return sorted(steps, key=steps.__getitem__)


def _is_foreign(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return bool(names) and not any(re.fullmatch(f"{CHECKPOINT_FILES}|state.safetensors", name) for name in names)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"step-([0-9]{7,})", path.name)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    """Record of a checkpoint (or of this rank's file of it) whose writing is finished: path, size and times.

    num_bytes: size of the tensors that this rank wrote. held_s: seconds for which training was blocked (waiting for the
    previous checkpoint, copying tensors). write_s: seconds of writing in the background.
    """

    step: int
    path: Path
    num_bytes: int
    held_s: float
    write_s: float


@dataclass(frozen=True)
class _Snapshot:
    """The data that one rank writes. split: whole shape and own rows of each sharded tensor."""

    path: Path
    progress: Progress
    tensors: dict[str, Tensor]
    split: dict[str, tuple[list[int], list[int]]]


class CheckpointWriter:
    """Write training states to `folder/step-N` in the background, atomically and one at a time.

    Retention: the last `limit` checkpoints whose step is a multiple of `every`, and the one just written. Checkpoints
    of later steps are removed, because they must be damaged: otherwise training would have resumed from them.

    If tensors are sharded, each rank writes its own file into one folder. Rank 0 completes the folder
    (`core/ranks.py`), or gives up after `timeout_s` without progress. Otherwise only rank 0 writes. main_pid: process
    id of rank 0, part of the name of the unfinished folder. An error of the writing thread is raised by the next call,
    once; it is a UserError if the disk or the files are the cause.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        every: int = 1,
        *,
        rank: int = 0,
        world: int = 1,
        main_pid: int | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.folder, self.limit, self.every = folder, max(limit, 1), every
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.main_pid = os.getpid() if main_pid is None else main_pid
        self.written: Written | None = None
        self._host: dict[str, Tensor] = {}  # reused: copying into fresh memory takes four to eight times as long
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if rank == 0:
            clear_unfinished(folder)  # before other ranks wait for the unfinished folder of this run

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        if error is None or isinstance(error, KeyboardInterrupt):  # exit at once: the next start removes the leftovers
            return
        try:
            self.finish()
        except UserError as failure:
            error.add_note(str(failure))

    def save(self, state: TrainState) -> None:
        """Copy `state` to host memory and write it in the background. All ranks must call this after the same step."""
        began = time.perf_counter()
        self.finish()
        tensors = state.tensors()
        num = self.world if any(is_sharded(tensor) for tensor in tensors.values()) else 1
        if self.rank >= num:
            return
        path = self._path(state.step)
        split = {
            name: (list(tensor.shape), [first_row(tensor), local_part(tensor).shape[0]])
            for name, tensor in tensors.items()
            if num > 1 and is_sharded(tensor)
        }
        own = {name: tensor for name, tensor in tensors.items() if name in split or self.rank == 0}
        snapshot = _Snapshot(path, state.progress(), self._copied(own), split)
        args = (snapshot, num, time.perf_counter() - began)
        thread = threading.Thread(target=self._run, args=args, name=f"checkpoint {path.name}", daemon=True)
        thread.start()
        self._thread = thread  # after the start: a thread that did not start cannot be joined

    def finish(self) -> None:
        """Wait until the saved state is written. Raises the error of the writing thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of the writing thread, if there is one."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    @torch.no_grad()
    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory of this rank's rows of all tensors that have rows on it."""
        local = {name: local_part(tensor.detach()) for name, tensor in tensors.items()}
        copies = {}
        for name, part in local.items():
            if is_sharded(tensors[name]) and part.shape[0] == 0:
                continue
            copy = self._host.get(name)
            if copy is None or (copy.shape, copy.dtype) != (part.shape, part.dtype):
                copy = _host_memory(part)
            copies[name] = copy.copy_(part, non_blocking=True)
        for device in {part.device for part in local.values() if part.is_cuda}:
            torch.cuda.synchronize(device)
        self._host = copies
        return copies

    # --------------------------------------------------------------------------------------------- on the writing thread

    def _run(self, snapshot: _Snapshot, num: int, held_s: float) -> None:
        began = time.perf_counter()
        try:
            if self.rank == 0:
                self._write(snapshot, num)
            else:
                self._contribute(snapshot, num)
            num_bytes = sum(tensor.nbytes for tensor in snapshot.tensors.values())
            write_s = time.perf_counter() - began
            self.written = Written(snapshot.progress.step, snapshot.path, num_bytes, held_s, write_s)
            if self.rank == 0:
                self._prune(snapshot.progress.step)
        except (OSError, UserError) as error:
            self._failure = UserError(self._message(snapshot.path, error))
            self._failure.__cause__ = error
        except BaseException as error:  # raised by the next call
            self._failure = error

    def _write(self, snapshot: _Snapshot, num: int) -> None:
        """On rank 0: write the folder, its own tensors and, once the files of all ranks are complete, the record."""
        with atomic_write(snapshot.path, CHECKPOINT_FILES) as temporary:
            temporary.mkdir()
            digests = {part_name(0, num): write_tensors(temporary / part_name(0, num), snapshot.tensors)}
            split: dict[str, dict[str, list[Any]]] = {
                name: {"shape": shape, "rows": [rows]} for name, (shape, rows) in snapshot.split.items()
            }
            notes = {_note(temporary, rank, num): rank for rank in range(1, num)}
            contents: dict[int, dict[str, Any]] = {}

            def is_read(note: Path) -> bool:
                rank = notes[note]
                if note.is_file():
                    contents[rank] = read_json(note)
                    note.unlink()
                    if "error" in contents[rank]:
                        raise UserError(f"process {rank} of {num} could not write its file: {contents[rank]['error']}")
                return rank in contents

            wait_for_files(notes, num, self.timeout_s, is_read)
            for rank, content in sorted(contents.items()):
                digests[part_name(rank, num)] = content["sha256"]
                for name, entry in split.items():
                    entry["rows"].append(content["rows"][name])
            write_record(temporary, snapshot.progress, split, digests)

    def _contribute(self, snapshot: _Snapshot, num: int) -> None:
        """On the other ranks: write the file of this rank, then a note of its hash and rows."""
        folder = unfinished(snapshot.path, self.main_pid) / snapshot.path.name
        wait_until(folder.is_dir, folder, self.timeout_s)
        note = _note(folder, self.rank, num)
        try:
            digest = write_tensors(folder / part_name(self.rank, num), snapshot.tensors)
            _write_note(note, {"sha256": digest, "rows": {name: rows for name, (_, rows) in snapshot.split.items()}})
        except OSError as error:
            if folder.is_dir():
                _write_note(note, {"error": disk_reason(error)})
            raise

    def _prune(self, step: int) -> None:
        """Remove the checkpoints that the retention rule does not include after `step`."""
        paths = checkpoint_folders(self.folder)
        regular = [path for path in paths if (other := _step(path) or 0) <= step and other % self.every == 0]
        for path in paths:
            if path not in (*regular[-self.limit :], self._path(step)):
                discard(path, CHECKPOINT_FILES)

    def _message(self, path: Path, error: OSError | UserError) -> str:
        reason = disk_reason(error) if isinstance(error, OSError) else str(error)
        if self.written is not None and self.written.path == path:
            return f"{path} is written, but superfluous ones cannot be removed: {reason}"
        before = sorted(other.name for other in self.folder.glob("step-*") if other != path)
        last = f"the last one, {before[-1]}, is as it was" if before else "there is none before it"
        return (
            f"cannot write checkpoint {path}: {reason}; {last}, and nothing half-written is left: fix that, and the same "
            "command continues"
        )


def _note(folder: Path, rank: int, num: int) -> Path:
    return folder / f"{part_name(rank, num)}.json"


def _write_note(note: Path, content: dict[str, Any]) -> None:
    with complete_file(note) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def _host_memory(part: Tensor) -> Tensor:
    """An uninitialised host tensor for a copy of `part`; pinned for a GPU, if the limit of locked memory allows."""
    if part.is_cuda:
        try:
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        except RuntimeError:
            pass
    return torch.empty(part.shape, dtype=part.dtype)
