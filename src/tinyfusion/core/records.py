"""Records of outputs: they mark a file or folder as written by tinyfusion, and identify the command that wrote it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tinyfusion.config.loading import first_difference, flatten
from tinyfusion.config.process_sections import ShiftFields
from tinyfusion.core.errors import OtherRecipe, UserError
from tinyfusion.core.files import check_writable, clear_unfinished
from tinyfusion.core.reading import read_json
from tinyfusion.core.version import __version__

FORMAT_VERSION = 1
_MARKER = "tinyfusion"


def section_of(verb: str) -> str:
    """The section of a recipe with the settings of a verb, or of a stage, which is named as its verb."""
    return verb.replace("-", "_")


def machine() -> dict[str, Any]:
    """The machine of a run."""
    system, processor, python = platform.system(), platform.machine(), platform.python_version()
    return {"system": system, "processor": processor, "cores": os.cpu_count(), "python": python}


def stamp(verb: str, recipe: Mapping[str, Any], state: str, **more: Any) -> dict[str, Any]:
    """The record that marks an output as ours: verb, resolved recipe, version, commit, machine, state."""
    root, commit = Path(__file__).resolve().parents[3], None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    made = {"made_by": _MARKER, "format_version": FORMAT_VERSION, "verb": verb, "version": __version__}
    return {**made, "commit": commit, "machine": machine(), "state": state, "recipe": recipe, **more}


def is_ours(record: Any) -> bool:
    """Whether a record was written by tinyfusion."""
    return isinstance(record, dict) and record.get("made_by") == _MARKER


# settings that do not change the result
_IDLE = {
    "compute", "watch", "log_every_steps", "checkpoint_every_steps", "checkpoints_limit", "speed", "bench", "explain", "sample.batch_size",
    "sample.decode_batch_size",
}  # fmt: skip
# fields that older records lack, with their value then, by section
_LATER = {
    "encode": {"orientation": "ignore"}, "flow": asdict(ShiftFields()), "sample": {"quantize": None},
    "distill_steps": {"end_power": 0.0},
    "recover": {"search_candidates": 1, "search_trial_steps": 120, "search_trial_batch_size": None, "search_trial_rate": 0.25},
}  # fmt: skip
# former names of fields, by section
_FORMER = {
    "dynamic": {"beside": "auxiliary", "beside_steps": "auxiliary_steps", "beside_weight": "auxiliary_weight"},
}


def renamed(recipe: Any) -> Any:
    """A plain recipe of this or an older version with the present names of its fields."""
    if not isinstance(recipe, Mapping):
        return recipe
    sections = {name: recipe[name] for name in _FORMER if isinstance(recipe.get(name), Mapping)}
    new = {name: {_FORMER[name].get(k, k): v for k, v in section.items()} for name, section in sections.items()}
    return {**recipe, **new}


def _effective(recipe: Any, section: str = "") -> Any:
    """A plain recipe without settings that do not change the result, and with fields that older recipes lack."""
    if not isinstance(recipe, Mapping):
        return recipe
    recipe = {**_LATER.get(section, {}), **recipe}
    return {k: _effective(v, k) for k, v in recipe.items() if k not in _IDLE and f"{section}.{k}" not in _IDLE}


def _of_stages(recipe: Any) -> Any:
    """The recipe of a `run` without the sections of stages that it leaves out."""
    if not isinstance(recipe, Mapping):
        return recipe
    return {k: v for k, v in recipe.items() if not (isinstance(v, Mapping) and v.get("in_run") is False)}


def check_same(record: Mapping[str, Any], verb: str, recipe: Mapping[str, Any], where: Path) -> None:
    """Raise UserError unless `record` has this verb and a recipe that gives the same result."""
    version, advice = record.get("format_version", 0), "choose another --out or give --overwrite"
    if not isinstance(version, int) or not isinstance(record.get("verb"), str) or "recipe" not in record:
        raise UserError(f"{where} has a damaged record of tinyfusion, without its verb or recipe; {advice}")
    if version > FORMAT_VERSION:
        written = f"{where} was written in format {version} by tinyfusion {record.get('version')}"
        raise UserError(f"{written}; this version reads up to {FORMAT_VERSION}: upgrade")
    if record["verb"] != verb:
        raise UserError(f"{where} was made by `{record['verb']}`, not `{verb}`; {advice}")
    both = (renamed(record["recipe"]), recipe)
    if difference := first_difference(*(_effective(_of_stages(each) if verb == "run" else each) for each in both)):
        field, there, now = difference
        what = f"{where} was made with another recipe ({field}: {there!r} there, {now!r} now)"
        raise OtherRecipe(f"{what}; {advice}", difference)


def other_settings(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted field: (its value in the record, its value now)} of the settings that change the result."""
    old, new = (flatten(_effective(each)) for each in (renamed(record.get("recipe")), recipe))
    return {field: (old.get(field), now) for field, now in new.items() if old.get(field) != now}


def file_output(
    path: Path, verb: str, recipe: Mapping[str, Any], overwrite: bool, record_of: Callable[[Path], Any]
) -> bool:
    """Whether the single-file output `path` is still to be written.

    record_of: reads the record (see `stamp`) of an existing output, None where it has none. Raises UserError where the
    file is not ours or was made with another recipe.
    """
    check_writable(path)
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; this verb writes a file")
    if not path.exists():
        return True
    record = record_of(path)
    if not is_ours(record):
        raise UserError(f"--out {path} exists and was not made by tinyfusion; choose another name")
    if overwrite:
        return True
    check_same(record, verb, recipe, path)
    return False


def folder_output(out: Path, record: str, verb: str, recipe: Mapping[str, Any], overwrite: bool, form: str) -> bool:
    """Whether the output folder `out` is still to be made; `record` is the name of its record.

    form: the options that select a folder, for messages. Raises UserError as `file_output` does, and on folders of others.
    """
    check_writable(out)
    if out.is_file():
        raise UserError(f"--out {out} is a file; {form} writes a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / record).is_file():
        raise UserError(f"--out {out} exists and is not an export of tinyfusion; choose another folder")
    return file_output(out / record, verb, recipe, overwrite, read_record) if out.is_dir() else True


def recorded_output(path: Path, verb: str, recipe: Mapping[str, Any], overwrite: bool) -> bool:
    """As `file_output`, of a file whose record is the JSON file of the same name, which is not replaced either unless it is ours."""
    record = path.with_suffix(".json")
    check_writable(record)
    todo = file_output(path, verb, recipe, overwrite, lambda _: read_record(record))
    return todo and (path.exists() or file_output(record, verb, recipe, True, read_json))


def read_record(path: Path) -> Any:
    """The record in a JSON file; None where there is no file."""
    return read_json(path) if path.is_file() else None


def say_finished(path: Path, dry_run: bool = False) -> None:
    """Report on stderr that an output is complete, and remove leftovers of a process killed after completing it."""
    for name in () if dry_run else (path.name, f"{path.stem}.json"):
        clear_unfinished(path.parent, name)
    print(f"{path} is finished; --overwrite starts anew", file=sys.stderr)
