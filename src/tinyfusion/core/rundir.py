"""RunDirectory: the one place that knows the names in a run folder, and how files come into being whole.

Everything is written beside and renamed, so a reader never meets half a file. A folder that is not ours is never touched.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyfusion import __version__
from tinyfusion.core.config import first_difference
from tinyfusion.core.errors import UserError

FORMAT_VERSION = 1
_MARKER = "tinyfusion"


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` when the block ends well and vanishes when it does not.

    Folders above are made where missing, and taken back when the block does not end well.
    """
    made = _missing_folders(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        if beside.is_dir():
            if path.exists():
                shutil.rmtree(path)
            os.replace(beside, path)
        else:
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    except BaseException:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
        _remove_empty(made)
        raise


def _missing_folders(folder: Path) -> list[Path]:
    """`folder` and those above it that do not exist, deepest first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole. NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: not valid JSON ({error})") from error


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


def _check_same(record: Mapping[str, Any], verb: str, recipe: Mapping[str, Any], where: Path) -> None:
    version = record.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise UserError(
            f"{where} was written in format {version} by tinyfusion {record.get('version')}; this one reads up to {FORMAT_VERSION}: upgrade"
        )
    if record["verb"] != verb:
        raise UserError(
            f"{where} was made by `{record['verb']}`, not `{verb}`; choose another --out or give --overwrite"
        )
    difference = first_difference(record["recipe"], recipe)
    if difference:
        raise UserError(
            f"{where} was made with another recipe ({difference}); choose another --out or give --overwrite"
        )


class RunDirectory:
    """A folder of one run. `open` decides whether it is new, to be continued, or finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

    def record(self) -> dict[str, Any]:
        """The contents of run.json."""
        return dict(read_json(self.record_path))

    def check(self, verb: str, recipe: Mapping[str, Any], overwrite: bool) -> str:
        """ "new", "continue" or "finished"; touches nothing. Raises UserError on a folder that may not be used."""
        check_writable(self.path)
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return "new"
        if not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file; this verb writes a folder")
        if not self.record_path.is_file() or not _is_ours(record := read_json(self.record_path)):
            raise UserError(f"--out {self.path} exists and is not a tinyfusion run; choose another folder")
        if overwrite:
            return "new"
        _check_same(record, verb, recipe, self.path)
        return "finished" if record["state"] == "done" else "continue"

    def begin(self, verb: str, recipe: Mapping[str, Any], overwrite: bool = False) -> str:
        """As `check`; then a new folder is made (an old run of ours removed with `overwrite`) and marked running."""
        mode = self.check(verb, recipe, overwrite)
        if mode == "continue":
            self.mark("running")
        elif mode == "new":
            with self._set_aside():
                write_json(self.record_path, stamp(verb, recipe, "running"))
        return mode

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Within the context an old run is out of the way; it comes back where the new one cannot even begin."""
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
        old = self.record_path.exists()
        if old:
            os.replace(self.path, aside)
        try:
            yield
        except BaseException:
            if old:
                os.replace(aside, self.path)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def writing(self, verb: str, recipe: Mapping[str, Any], overwrite: bool = False) -> Iterator[str]:
        """`begin`, and the work within. A new run that fails before anything worth continuing was saved leaves no trace."""
        made = _missing_folders(self.path)
        mode = self.begin(verb, recipe, overwrite)
        try:
            yield mode
        except Exception:
            if mode == "new" and not any(self.path.rglob("step-*")) and not any(self.path.rglob("model.json")):
                for entry in self.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                _remove_empty(made)
            raise

    def mark(self, state: str, **more: Any) -> None:
        """Set the state ("done", "interrupted") and more fields of run.json."""
        write_json(self.record_path, {**self.record(), "state": state, **more})

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")

    def note(self, text: str) -> None:
        """Append one line to log.txt, for people; nothing is ever read back from it."""
        with open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps that a resumed run is going to write again."""
        if not self.metrics.exists():
            return
        lines = [
            json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")
        ]
        kept = [line for line in lines if line.get("step", -1) < step]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where there is no such file."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
