"""RunDirectory: the one place that knows the names in a run folder. A folder that is not ours is never touched."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import BadNumbers, UserError
from tinyfusion.core.files import (
    atomic_write,
    check_space,
    check_writable,
    clear_unfinished,
    disk_reason,
    files_in,
    forget,
    is_as_written,
    is_unfinished,
    missing_folders,
    remember,
    remove_empty,
    remove_file,
    remove_written,
    write_json,
    write_text,
)
from tinyfusion.core.locks import LOCK, Locked, acquire
from tinyfusion.core.reading import check_plain, check_utf8, read_json
from tinyfusion.core.records import FORMAT_VERSION, check_same, file_output, is_ours, machine, say_finished, stamp
from tinyfusion.core.signals import Interrupted

__all__ = [
    "CHECKPOINT_FILES", "FORMAT_VERSION", "RunDirectory", "check_space", "check_writable", "file_output", "machine", "read_json",
    "read_metrics", "run_files", "say_finished", "stamp", "write_json", "write_text", "atomic_write",
]  # fmt: skip

_CONTINUES = "fix that, and the same command continues from the last checkpoint"
_OLD, _BACK = ".tinyfusion.old", ".tinyfusion.back"  # in a run folder: a run that is to be replaced, or that comes back
CHECKPOINT_FILES = r"state-\d{5}-of-\d{5}\.safetensors|state\.json|SHA256SUMS|losses\.safetensors"
_FOLDERS = ("checkpoints", "watch", "samples", "evaluations", "prune", "recover", "dynamic")
_SAVED = (  # nothing in hidden folders, which are not finished
    rf"(?:[^./][^/]*/)*(?:checkpoints/step-\d+/(?:{CHECKPOINT_FILES})|model\.json|shard-\d+-of-\d+\.safetensors)"
)
_BY_OTHERS = (
    r"watch/(?:tensorboard|trackio|wandb)/.+|\.shard-\d+-of-\d+\.safetensors\.part"  # trackers, other processes
)
_OF_A_STAGE = (
    r"run\.json|metrics\.jsonl|log\.txt|(?:plan|calibration|dynamic|kept)\.json|watch/(?:step-\d{7,}\.png|trackers\.json)|"
    rf"checkpoints/step-\d{{7,}}/(?:{CHECKPOINT_FILES})|(?:student|model)(?:-raw)?/model\.(?:json|safetensors)|"
    rf"student/(?:config\.json|diffusion_pytorch_model[^/]*|README\.md|plan\.png)|{_BY_OTHERS}"
)
_OF_ENCODE = rf"run\.json|log\.txt|manifest\.json|shard-\d+-of-\d+\.safetensors|{_BY_OTHERS}"
_OF_RUN = (
    rf"(?:(?:prune|recover|dynamic)/)?(?:{_OF_A_STAGE})|(?:evaluation|speed|activations|depth_speed|fid_steps)\.json|report\.html|"
    r"samples/(?:teacher|pruned|student|dynamic|comparison)\.(?:npz|json|png)|evaluations/(?:teacher|pruned|student|dynamic)-.+\.json"
)


def run_files(verb: object) -> str:
    """The files that a run of a verb writes, as a regular expression of paths in its folder; of all verbs, where it is another."""
    stages = dict.fromkeys(("prune", "recover", "dynamic", "train"), _OF_A_STAGE)
    return {**stages, "encode": _OF_ENCODE, "run": _OF_RUN}.get(str(verb), f"{_OF_RUN}|{_OF_ENCODE}")


class RunDirectory:
    """A folder of one run. `check` decides whether it is new, to be continued, or finished.

    writes: one process of several writes; to the others `writing` is a plain block, and notes and marks say nothing.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self._folder: tuple[int, int] | None = None  # device and inode, while it is being written

    @property
    def record_path(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of training checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def watched(self) -> Path:
        """Folder of what a training shows while it runs: pictures, files of trackers."""
        return self.path / "watch"

    def record(self) -> dict[str, Any]:
        """The contents of run.json."""
        return dict(read_json(self.record_path))

    def check(self, verb: str, recipe: Mapping[str, Any], overwrite: bool) -> str:
        """ "new", "continue" or "finished". Raises UserError on a folder that may not be used. Touches nothing.

        A finished run that a killed `--overwrite` set aside counts as one to continue: `begin` restores it.
        """
        check_writable(self.path)
        check_utf8(self.path)
        if _is_empty(self.path):
            return "new"
        if not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; this verb writes a folder")
        place = self._settled()
        record_path = place / "run.json"
        if not record_path.is_file() or not is_ours(record := read_json(record_path)):
            raise UserError(f"--out {self.path} exists and is not a tinyfusion run; choose another folder")
        if overwrite:
            return "new"
        check_same(record, verb, recipe, self.path)
        return "finished" if record.get("state") == "done" and place == self.path else "continue"

    def begin(self, verb: str, recipe: Mapping[str, Any], overwrite: bool = False) -> str:
        """As `check`; then a new run is marked running in the folder, made where it is missing.

        With `overwrite` the files of an old run are set aside in the folder until the new one has something worth keeping.
        """
        mode = self.check(verb, recipe, overwrite)
        if self.path.is_dir():
            clear_unfinished(self.path)
            self._settle()
        if mode == "continue":
            self.mark("running", recipe=recipe)
        elif mode == "new":
            try:
                if self.record_path.exists():
                    self._set_aside()
                write_json(self.record_path, stamp(verb, recipe, "running"))
            except BaseException:
                self._undo()
                raise
        return mode

    @contextmanager
    def writing(self, verb: str, recipe: Mapping[str, Any], overwrite: bool = False) -> Iterator[str]:
        """`begin`, and the block within, while the folder is locked.

        A new run that ends before it saved anything to continue from is removed, and the run that it was to replace is
        restored; but a run whose numbers went bad, and that replaces nothing, is kept for inspection. One that is interrupted
        later says so in its record. Files that others put into the folder are kept.
        """
        if not self.writes:
            yield "continue"
            return
        self.check(verb, recipe, overwrite)  # not even a lock goes into a folder that is not ours
        made = missing_folders(self.path)
        try:
            with self._alone():
                mode = self.begin(verb, recipe, overwrite)
                yield from self._within(mode)
        finally:
            if not self.path.exists() or self._folder in (None, _folder_identity(self.path)):
                remove_empty(made)
            self._folder = None

    def _within(self, mode: str) -> Iterator[str]:
        """Run the block of `writing`, and clean up or record how it ended."""
        try:
            yield mode
        except BaseException as error:
            evidence = isinstance(error, BadNumbers) and not self._old.exists()
            if not self._is_there():
                raise
            if mode == "new" and not evidence and not _worth_keeping(self.path):
                self._undo()
            elif mode != "finished" and isinstance(error, Interrupted):
                self.mark("interrupted")
            raise
        self._drop_old()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder, made where it is missing. Raises UserError where another process writes the same run."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a run that came to nothing has just removed it
                lock = acquire(self.path / LOCK, f"writes {self.path}")
                break
        try:
            self._folder = _folder_identity(self.path)
            yield
        finally:
            lock.release()

    def tidy(self) -> None:
        """Remove leftovers in a finished run of a process that was killed between its last mark and its end."""
        if self.writes and any(part.startswith(".") for name in files_in(self.path) for part in name.split("/")):
            with contextlib.suppress(Locked, OSError), self._alone():
                clear_unfinished(self.path)
                self._settle()

    @property
    def _old(self) -> Path:
        """Where the files of an old run wait while a new one begins in its place."""
        return self.path / _OLD

    def _settled(self) -> Path:
        """The folder of the run that `_settle` would leave."""
        back = self.path / _BACK
        if (back / "run.json").is_file():
            return back
        return self._old if (self._old / "run.json").is_file() and not _worth_keeping(self.path) else self.path

    def _set_aside(self) -> None:
        """Move the files of the run aside: all of them or, after a kill and `_settle`, none."""
        names = run_files(self.record().get("verb"))
        ours = {name.partition("/")[0] for name in files_in(self.path) if re.fullmatch(names, name)}
        forget(self.path)
        for place in (self._old, self.path / _BACK):
            if place.exists():
                raise UserError(f"{place} holds files that others put in the way of a former run: move them away")
        (self.path / _BACK).mkdir()
        for name in sorted(ours):
            os.replace(self.path / name, self.path / _BACK / name)
        os.replace(self.path / _BACK, self._old)

    def _settle(self) -> None:
        """Resolve a killed `--overwrite`: the old run is restored unless the new one is worth keeping."""
        if self._old.is_dir() and _worth_keeping(self.path):
            self._drop_old()
        elif self._old.is_dir():
            names = run_files(_record_in(self.path).get("verb"))
            for name in [name for name in files_in(self.path) if re.fullmatch(names, name)]:
                remove_file(self.path, name)
            self._bring_back()
        elif (self.path / _BACK).is_dir():
            _merge(self.path / _BACK, self.path)

    def _drop_old(self) -> None:
        """Remove the files of the run that was set aside, its record last; files of others are moved back."""
        if not self._old.is_dir():
            return
        names = run_files(_record_in(self._old).get("verb"))
        ours = [name for name in files_in(self._old) if re.fullmatch(names, name)]
        for name in sorted(ours, key=lambda name: name == "run.json"):
            remove_file(self._old, name)
        _merge(self._old, self.path)

    def _undo(self) -> None:
        """Remove a new run, and restore the old one where there was one."""
        clear_unfinished(self.path)
        remove_written(self.path)
        for name in [name for name in files_in(self.path) if re.fullmatch(_BY_OTHERS, name)]:
            remove_file(self.path, name)
        self._bring_back()

    def _bring_back(self) -> None:
        """Restore an old run that was set aside. Files of the new one are gone; folders that are empty now go too."""
        folders = [folder for folder in self.path.rglob("*") if folder.is_dir() and folder.name in _FOLDERS]
        remove_empty(sorted(folders, reverse=True))
        if self._old.is_dir():
            os.replace(self._old, self.path / _BACK)
        if (self.path / _BACK).is_dir():
            _merge(self.path / _BACK, self.path)

    def mark(self, state: str, **more: Any) -> None:
        """Set the state ("done", "interrupted") and more fields of run.json."""
        if not self.writes:
            return
        self._check_there()
        try:
            write_json(self.record_path, {**self.record(), "state": state, **more})
        except OSError as error:
            raise UserError(f"cannot write {self.record_path}: {disk_reason(error)}; {_CONTINUES}") from error
        if self._old.is_dir() and _worth_keeping(self.path):
            self._drop_old()

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.writes:
            return
        self._append(self.metrics, json.dumps(values, allow_nan=False))

    def note(self, text: str) -> None:
        """Append one line to log.txt, for people; nothing is ever read back from it."""
        if not self.writes:
            return
        self._append(self.path / "log.txt", text)

    def _append(self, file: Path, line: str) -> None:
        """One more line. Raises UserError where the folder has gone or does not take it; no part of the line stays."""
        if self._folder is not None:
            self._check_there()
        check_plain(file)
        size = file.stat().st_size if file.exists() else 0
        ours = not file.exists() or is_as_written(file)
        try:
            with open(file, "a", encoding="utf-8", errors="backslashreplace") as opened:
                opened.write(line + "\n")
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                self._check_there()
            with contextlib.suppress(OSError):
                os.truncate(file, size)
            raise UserError(f"cannot write {file}: {disk_reason(error)}; {_CONTINUES}") from error
        finally:
            if ours:
                remember(file)

    def _check_there(self) -> None:
        """Raise UserError where the folder went away while it was being written."""
        if not self._is_there():
            raise UserError(
                f"the run folder {self.path} was removed, moved or emptied while it was being written: put it back where it was, "
                "or start it anew"
            )

    def _is_there(self) -> bool:
        """Whether the folder is the one that is being written, and holds its record."""
        same = self._folder is None or _folder_identity(self.path) == self._folder
        return same and self.record_path.is_file()

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is going to write again."""
        if not self.writes or not self.metrics.exists():
            return
        numbered = [(line.get("step", -1), line) for line in read_metrics(self.path)]
        kept = [line for number, line in numbered if isinstance(number, int) and number < step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _is_empty(path: Path) -> bool:
    """Whether the folder is missing, empty, or holds only leftovers of a process that was killed before its run began."""
    if not path.exists():
        return True
    return path.is_dir() and all(entry.name == LOCK or is_unfinished(entry) for entry in path.iterdir())


def _folder_identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _merge(source: Path, target: Path) -> None:
    """Move the files in `source` to `target`, and remove `source`; those whose names are taken there stay."""
    for name in files_in(source):
        if not os.path.lexists(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, target / name)
    remove_empty([*sorted((folder for folder in source.rglob("*") if folder.is_dir()), reverse=True), source])


def _record_in(run: Path) -> dict[str, Any]:
    """The record of a run folder of ours, empty where it is none."""
    try:
        record = read_json(run / "run.json")
    except UserError:
        return {}
    return record if is_ours(record) else {}


def _worth_keeping(run: Path) -> bool:
    """Whether a run folder holds a checkpoint, a model, a shard of latents or a finished record."""
    return any(re.fullmatch(_SAVED, name) for name in files_in(run)) or _record_in(run).get("state") == "done"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file. Lines cut short by a crash are left out."""
    path = run / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [line for line in map(_parsed, texts) if isinstance(line, dict)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
