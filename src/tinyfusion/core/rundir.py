"""RunDirectory: the one place that knows the names in a run folder. A folder that is not ours is never touched."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyfusion import __version__
from tinyfusion.core.config import first_difference
from tinyfusion.core.errors import BadNumbers, UserError
from tinyfusion.core.files import (
    beside_of,
    check_space,
    check_writable,
    disk_reason,
    missing_folders,
    orphans,
    remove,
    remove_empty,
    sweep,
    try_lock,
    write_json,
    write_text,
    written_beside,
)
from tinyfusion.core.reading import read_json
from tinyfusion.core.signals import Interrupted

__all__ = [
    "FORMAT_VERSION", "RunDirectory", "check_space", "check_writable", "file_output", "machine", "read_json",
    "read_metrics", "stamp", "write_json", "write_text", "written_beside",
]  # fmt: skip

FORMAT_VERSION = 1
_MARKER = "tinyfusion"
_CONTINUES = "mend that, and the same command continues from the last checkpoint"


def machine() -> dict[str, Any]:
    """What the numbers of a run were made on."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def stamp(verb: str, recipe: Mapping[str, Any], state: str, **more: Any) -> dict[str, Any]:
    """The record that makes an output ours: verb, resolved recipe, version, commit, machine, state."""
    return {
        "made_by": _MARKER,
        "format_version": FORMAT_VERSION,
        "verb": verb,
        "version": __version__,
        "commit": _commit(),
        "machine": machine(),
        "state": state,
        "recipe": recipe,
        **more,
    }


def _is_ours(record: Any) -> bool:
    return isinstance(record, dict) and record.get("made_by") == _MARKER


# knobs that change how a result comes about, and not the result
_IDLE = {
    "compute", "watch", "log_every_steps", "checkpoint_every_steps", "checkpoints_limit", "speed", "bench", "sample.batch_size",
    "sample.decode_batch_size",
}  # fmt: skip


# fields that older records lack, with the value that they had
_LATER = {"data": {"orientation": "ignore"}, "encode": {"orientation": "ignore"}}


def _effective(recipe: Any, section: str = "") -> Any:
    """A plain recipe without the knobs that change nothing in the result, and with the fields that came later."""
    if not isinstance(recipe, Mapping):
        return recipe
    recipe = {**_LATER.get(section, {}), **recipe}
    return {k: _effective(v, k) for k, v in recipe.items() if k not in _IDLE and f"{section}.{k}" not in _IDLE}


def _check_same(record: Mapping[str, Any], verb: str, recipe: Mapping[str, Any], where: Path) -> None:
    version = record.get("format_version", 0)
    if not isinstance(version, int) or not isinstance(record.get("verb"), str) or "recipe" not in record:
        raise UserError(
            f"{where} has a damaged record (made by tinyfusion, but by which verb and recipe is gone); "
            "choose another --out or give --overwrite"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{where} was written in format {version} by tinyfusion {record.get('version')}; this one reads up to {FORMAT_VERSION}: upgrade"
        )
    if record["verb"] != verb:
        raise UserError(
            f"{where} was made by `{record['verb']}`, not `{verb}`; choose another --out or give --overwrite"
        )
    difference = first_difference(_effective(record["recipe"]), _effective(recipe))
    if difference:
        raise UserError(
            f"{where} was made with another recipe ({difference}); choose another --out or give --overwrite"
        )


class RunDirectory:
    """A folder of one run. `check` decides whether it is new, to be continued, or finished.

    writes: one process of several writes; to the others `writing` is a plain block, and notes and marks say nothing.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes

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
        """ "new", "continue" or "finished". Raises UserError on a folder that may not be used.

        Touches nothing, but for an old run that a killed `--overwrite` had set aside: that one comes back.
        """
        check_writable(self.path)
        self._restore()
        if _is_empty(self.path):
            return "new"
        if not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; this verb writes a folder")
        if not self.record_path.is_file() or not _is_ours(record := read_json(self.record_path)):
            raise UserError(f"--out {self.path} exists and is not a tinyfusion run; choose another folder")
        if overwrite:
            if self._place == Path.cwd():
                raise UserError(f"--overwrite cannot replace the current folder {self.path}: call it from elsewhere")
            return "new"
        _check_same(record, verb, recipe, self.path)
        return "finished" if record.get("state") == "done" else "continue"

    def begin(self, verb: str, recipe: Mapping[str, Any], overwrite: bool = False) -> str:
        """As `check`; then a new folder is made and marked running.

        With `overwrite` an old run of ours is set aside until the new one has something worth keeping.
        """
        mode = self.check(verb, recipe, overwrite)
        if mode == "continue":
            sweep(self.path)
            self.mark("running", recipe=recipe)
        elif mode == "new":
            if self.record_path.exists():
                os.replace(self.path, self._aside)
            try:
                write_json(self.record_path, stamp(verb, recipe, "running"))
            except BaseException:
                self._undo()
                raise
        return mode

    @contextmanager
    def writing(self, verb: str, recipe: Mapping[str, Any], overwrite: bool = False) -> Iterator[str]:
        """`begin`, and the work within.

        A new run that ends before anything worth continuing was saved leaves no trace, and what it was to replace
        comes back; but where numbers went bad and nothing was replaced, it stays to be looked at. One that is
        interrupted later says so in its record.
        """
        if not self.writes:
            yield "continue"
            return
        made = missing_folders(self.path)
        with contextlib.ExitStack() as held:
            if self.record_path.is_file():  # before anything of another process's run is touched
                held.enter_context(self._alone())
            mode = self.begin(verb, recipe, overwrite)
            if mode == "new":
                held.enter_context(self._alone())
            yield from self._within(mode, made)

    def _within(self, mode: str, made: list[Path]) -> Iterator[str]:
        """The work of `writing`, and what remains of it."""
        try:
            yield mode
        except BaseException as error:
            evidence = isinstance(error, BadNumbers) and not self._aside.exists()
            if mode == "new" and not evidence and not _worth_keeping(self.path):
                self._undo()
                remove_empty(made)
            elif mode != "finished" and isinstance(error, Interrupted):
                self.mark("interrupted")
            raise
        remove(self._aside)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder: UserError where another process writes the same run. A lock ends with whoever holds it."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            if not try_lock(folder):
                raise UserError(f"another process writes {self.path} right now: wait for it, or choose another --out")
            yield
        finally:
            os.close(folder)

    @property
    def _place(self) -> Path:
        return self.path.absolute()

    @property
    def _aside(self) -> Path:
        """Where an old run waits while a new one begins in its place."""
        return beside_of(self._place, "old")

    def _undo(self) -> None:
        """Take a new run back; the old one comes back where there was one."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            remove(entry)
        if self._aside.exists():
            remove(self.path)
            os.replace(self._aside, self.path)

    def _restore(self) -> None:
        """Settle what a killed `--overwrite` left: the old run comes back unless the new one is worth keeping."""
        for aside in orphans(self._place, "old"):
            if _is_empty(self.path):
                os.replace(aside, self.path)
            elif _record_in(self.path) and _worth_keeping(self.path):
                remove(aside)
            elif _record_in(self.path):
                remove(self.path)
                os.replace(aside, self.path)

    def mark(self, state: str, **more: Any) -> None:
        """Set the state ("done", "interrupted") and more fields of run.json."""
        if not self.writes:
            return
        self._check_there()
        try:
            write_json(self.record_path, {**self.record(), "state": state, **more})
        except OSError as error:
            raise UserError(f"cannot write {self.record_path}: {disk_reason(error)}; {_CONTINUES}") from error
        if self._aside.exists() and _worth_keeping(self.path):
            remove(self._aside)

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
        size = file.stat().st_size if file.exists() else 0
        try:
            with open(file, "a", encoding="utf-8") as opened:
                opened.write(line + "\n")
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                self._check_there()
            with contextlib.suppress(OSError):
                os.truncate(file, size)
            raise UserError(f"cannot write {file}: {disk_reason(error)}; {_CONTINUES}") from error

    def _check_there(self) -> None:
        """Raise UserError where the folder went away while it was being written."""
        if not self.record_path.is_file():
            raise UserError(
                f"the run folder {self.path} was removed, moved or emptied while it was being written: put it back where it was, "
                "or start it anew"
            )

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is going to write again."""
        if not self.writes or not self.metrics.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", -1) < step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _is_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _record_in(run: Path) -> dict[str, Any]:
    """The record of a run folder of ours, empty where it is none."""
    try:
        record = read_json(run / "run.json")
    except UserError:
        return {}
    return record if _is_ours(record) else {}


def _worth_keeping(run: Path) -> bool:
    """Whether a run folder holds a checkpoint, a model, a shard of latents or a finished record."""
    saved = [
        file for pattern in ("checkpoints/step-*", "model.json", "shard-*.safetensors") for file in run.rglob(pattern)
    ]
    whole = [file for file in saved if not any(part.endswith(".part") for part in file.relative_to(run).parts)]
    return bool(whole) or _record_in(run).get("state") == "done"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file. Lines cut short by a crash are left out."""
    path = run / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [line for line in map(_parsed, texts) if isinstance(line, dict)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def file_output(
    path: Path, verb: str, recipe: Mapping[str, Any], overwrite: bool, record_of: Callable[[Path], Any]
) -> bool:
    """Whether the single-file output `path` is still to be made.

    record_of: reads the record (see `stamp`) of an existing output, None where it has none. Raises UserError where the
    file is not ours or was made with another recipe.
    """
    check_writable(path)
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; this verb writes a file")
    if not path.exists():
        return True
    record = record_of(path)
    if not _is_ours(record):
        raise UserError(f"--out {path} exists and was not made by tinyfusion; choose another name")
    if overwrite:
        return True
    _check_same(record, verb, recipe, path)
    return False
