"""RunDirectory: names, state, lock and recovery of a run folder. A folder of others is never changed."""

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
_FOLDERS = ("checkpoints", "watch", "samples", "evaluations", "prune", "recover", "dynamic", "distill-steps", "latents")
_PROMPTS = r"prompts(?:-\d+-of-\d+)?\.safetensors"
FOLDED = (
    ", folded in"  # ends guidance in the protocol of images of a model that has folded it in, see `comparable_protocol`
)
ENCODE_PROMPTS = "encode --pipeline"  # the verb in the record of such a run
_SAVED = (  # not in hidden folders, which are unfinished
    rf"(?:[^./][^/]*/)*(?:checkpoints/step-\d+/(?:{CHECKPOINT_FILES})|model\.json|shard-\d+-of-\d+\.safetensors)"
)
_BY_OTHERS = (  # trackers, other processes
    r"watch/(?:tensorboard|trackio|wandb)/.+|\.shard-\d+-of-\d+\.safetensors\.part"
)
_OF_A_STAGE = (
    r"run\.json|lora\.safetensors|metrics\.jsonl|log\.txt|(?:plan|calibration|dynamic|kept)\.json|watch/(?:step-\d{7,}\.png|trackers\.json)|"
    rf"checkpoints/step-\d{{7,}}/(?:{CHECKPOINT_FILES})|(?:student|model)(?:-raw)?/model\.(?:json|safetensors)|"
    rf"student(?:-raw)?/(?:config\.json|diffusion_pytorch_model[^/]*|README\.md|plan\.png)|{_BY_OTHERS}"
)
_OF_ENCODE = rf"run\.json|log\.txt|manifest\.json|shard-\d+-of-\d+\.safetensors|{_BY_OTHERS}"
_OF_ENCODE_PROMPTS = (  # in other folders of latents such files are the user's
    rf"{_OF_ENCODE}|prompts\.json|\.?{_PROMPTS}(?:\.part)?|"
    r"bucket-\d+x\d+/(?:manifest\.json|\.?shard-\d+-of-\d+\.safetensors(?:\.part)?)"
)
_OF_RUN = (
    rf"(?:(?:prune|recover|dynamic|distill-steps)/)?(?:{_OF_A_STAGE})|latents/(?:{_OF_ENCODE_PROMPTS})|"
    r"(?:prompts|evaluation|speed|activations|depth_speed|fid_steps)\.json|report\.html|"
    r"samples/(?:teacher|pruned|student|dynamic|few-steps|comparison)\.(?:npz|json|png)|evaluations/(?:teacher|pruned|student|dynamic|few-steps)-.+\.json"
)

_OF_EXPLAIN = (
    rf"run\.json|log\.txt|explain\.json|drawn\.npz|report\.html|checkpoints/step-\d{{7,}}/(?:{CHECKPOINT_FILES})"
)


def comparable_protocol(protocol: str) -> str:
    """The protocol but for whether guidance is folded into a model or added in its sampling: images and scores of both compare."""
    return protocol.replace(FOLDED, "")


def run_files(verb: object) -> str:
    """Regular expression of the relative paths that a run of `verb` writes; of all verbs where `verb` is unknown."""
    stages = dict.fromkeys(("prune", "recover", "dynamic", "distill-steps", "train"), _OF_A_STAGE)
    encoded = {"encode": _OF_ENCODE, ENCODE_PROMPTS: _OF_ENCODE_PROMPTS}
    return {**stages, **encoded, "run": _OF_RUN, "explain": _OF_EXPLAIN}.get(
        str(verb), f"{_OF_RUN}|{_OF_ENCODE}|{_OF_EXPLAIN}"
    )


class RunDirectory:
    """Folder of one run, which is new, to be continued, or finished (`check`).

    writes: False on all ranks but the first, where `writing`, `mark`, `log` and `note` do nothing. record_path, metrics: its
    run.json and metrics.jsonl. checkpoints, watched: folders of training checkpoints, and of previews and files of trackers.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.record_path, self.metrics = path / "run.json", path / "metrics.jsonl"
        self.checkpoints, self.watched = path / "checkpoints", path / "watch"
        self._old = path / _OLD  # the files of an old run while a new run begins in its place
        self._folder: tuple[int, int] | None = None  # device and inode, while it is being written

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
        """Do `check` and mark the run as running; a missing folder is created.

        With `overwrite` the files of an old run are set aside in the folder until the new run has saved something.
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
        """Lock the folder, `begin` the run and execute the block.

        A new run that ends before it saved anything is removed, and the run that it was to replace is restored; after
        `BadNumbers` a run that replaces nothing stays for inspection. A run interrupted later is marked as interrupted.
        """
        if not self.writes:
            yield "continue"
            return
        self.check(verb, recipe, overwrite)  # a folder of others does not even get a lock
        created = missing_folders(self.path)
        try:
            with self._alone():
                mode = self.begin(verb, recipe, overwrite)
                try:
                    yield mode
                except BaseException as error:
                    evidence = isinstance(error, BadNumbers) and not self._old.exists()
                    if not self._is_there():
                        self._explain_absence(error)
                        raise
                    if mode == "new" and not evidence and not _has_saved(self.path):
                        self._undo()
                    elif mode != "finished" and isinstance(error, Interrupted):
                        self.mark("interrupted")
                    raise
                self._drop_old()
        finally:
            if not self.path.exists() or self._folder in (None, _folder_identity(self.path)):
                remove_empty(created)
            self._folder = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Create the folder if missing, and lock it. Raises UserError where another process writes the same run."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a run that saved nothing has just removed it
                lock = acquire(self.path / LOCK, f"writes {self.path}")
                break
        try:
            self._folder = _folder_identity(self.path)
            yield
        finally:
            lock.release()

    def tidy(self) -> None:
        """Remove the leftovers in a finished run whose process was killed after its last mark."""
        if self.writes and any(part.startswith(".") for name in files_in(self.path) for part in name.split("/")):
            with contextlib.suppress(Locked, OSError), self._alone():
                clear_unfinished(self.path)
                self._settle()

    def _settled(self) -> Path:
        """Folder of the run that `_settle` would retain."""
        back = self.path / _BACK
        if (back / "run.json").is_file():
            return back
        return self._old if (self._old / "run.json").is_file() and not _has_saved(self.path) else self.path

    def _set_aside(self) -> None:
        """Set the files of the run aside: all or, after a kill and `_settle`, none."""
        ours = {name.partition("/")[0] for name in _matching(self.path, run_files(self.record().get("verb")))}
        forget(self.path)
        for place in (self._old, self.path / _BACK):
            if place.exists():
                raise UserError(f"{place} has files of others at the place of a former run: move them away")
        (self.path / _BACK).mkdir()
        for name in sorted(ours):
            os.replace(self.path / name, self.path / _BACK / name)
        os.replace(self.path / _BACK, self._old)

    def _settle(self) -> None:
        """Resolve a killed `--overwrite`: restore the old run unless the new one has saved something."""
        if self._old.is_dir() and _has_saved(self.path):
            self._drop_old()
        elif self._old.is_dir():
            for name in _matching(self.path, run_files(_record_in(self.path).get("verb"))):
                remove_file(self.path, name)
            self._bring_back()
        elif (self.path / _BACK).is_dir():
            _merge(self.path / _BACK, self.path)

    def _drop_old(self) -> None:
        """Remove the files of the run that was set aside, its record last, and move files of others back."""
        if not self._old.is_dir():
            return
        ours = _matching(self._old, run_files(_record_in(self._old).get("verb")))
        for name in sorted(ours, key=lambda name: name == "run.json"):
            remove_file(self._old, name)
        _merge(self._old, self.path)

    def _undo(self) -> None:
        """Remove a new run, and restore the old one where there was one."""
        others = _OF_ENCODE_PROMPTS if _record_in(self.path).get("verb") == ENCODE_PROMPTS else _BY_OTHERS
        clear_unfinished(self.path)
        remove_written(self.path)
        for name in _matching(self.path, others):
            remove_file(self.path, name)
        self._bring_back()

    def _bring_back(self) -> None:
        """Restore an old run that was set aside, after the files of the new one were removed, and remove empty folders."""
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
        if self._old.is_dir() and _has_saved(self.path):
            self._drop_old()

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self._append(self.metrics, json.dumps(values, allow_nan=False))

    def note(self, text: str) -> None:
        """Append one line to log.txt, which users read and the program never does."""
        self._append(self.path / "log.txt", text)

    def _append(self, file: Path, line: str) -> None:
        """Append a line. Raises UserError if it cannot be written; nothing of the line remains then."""
        if not self.writes:
            return
        if self._folder is not None:
            self._check_there()
        check_plain(file)
        size = file.stat().st_size if file.exists() else 0
        ours = not file.exists() or is_as_written(file)
        try:
            with open(file, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(line + "\n")
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                self._check_there()
            with contextlib.suppress(OSError):
                os.truncate(file, size)
            raise UserError(f"cannot write {file}: {disk_reason(error)}; {_CONTINUES}") from error
        finally:
            if ours:
                remember(file)

    def _explain_absence(self, error: BaseException) -> None:
        """Raise UserError in place of an error that the absence of the folder caused, as the missing folder is what to fix."""
        if isinstance(error, OSError | UserError):
            try:
                self._check_there()
            except UserError as absence:
                raise absence from error

    def _check_there(self) -> None:
        """Raise UserError where the folder was removed while it was being written."""
        if not self._is_there():
            problem = f"the run folder {self.path} was removed, moved or emptied while it was being written"
            raise UserError(f"{problem}: put it back, or start it anew")

    def _is_there(self) -> bool:
        """Whether the folder is still the one that was locked, with its record."""
        same = self._folder is None or _folder_identity(self.path) == self._folder
        return same and self.record_path.is_file()

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will write again."""
        if not self.writes or not self.metrics.exists():
            return
        numbered = [(line.get("step", -1), line) for line in read_metrics(self.path)]
        earlier = [line for number, line in numbered if isinstance(number, int) and number < step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in earlier))


def _is_empty(path: Path) -> bool:
    """Whether the folder is missing or has nothing but the leftovers of a process that was killed before its run began."""
    if not path.exists():
        return True
    return path.is_dir() and all(entry.name == LOCK or is_unfinished(entry) for entry in path.iterdir())


def _matching(folder: Path, pattern: str) -> list[str]:
    """Relative paths of the files in a folder that match a regular expression."""
    return [name for name in files_in(folder) if re.fullmatch(pattern, name)]


def _folder_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _merge(source: Path, target: Path) -> None:
    """Move the files in `source` to `target`, except names that exist there, and remove `source` if it is empty then."""
    for name in files_in(source):
        if not os.path.lexists(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, target / name)
    remove_empty([*sorted((folder for folder in source.rglob("*") if folder.is_dir()), reverse=True), source])


def _record_in(run: Path) -> dict[str, Any]:
    """The record of a run folder; empty where it has none of ours."""
    try:
        record = read_json(run / "run.json")
    except UserError:
        return {}
    return record if is_ours(record) else {}


def _has_saved(run: Path) -> bool:
    """Whether a run folder has a checkpoint, a model, a shard of latents, encoded prompts or a finished record."""
    record = _record_in(run)
    saved = {ENCODE_PROMPTS: f"{_SAVED}|{_PROMPTS}", "run": f"{_SAVED}|latents/{_PROMPTS}"}.get(
        str(record.get("verb")), _SAVED
    )
    return bool(_matching(run, saved)) or record.get("state") == "done"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Records in the metrics.jsonl of a run; none where it is missing. Lines truncated by a crash are left out."""
    path, records = run / "metrics.jsonl", []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(text))
    return [record for record in records if isinstance(record, dict)]
