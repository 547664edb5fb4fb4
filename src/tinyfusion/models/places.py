"""Locate a model by its path, the folder of a run or of diffusers, a shipped name, known weights, or a hub id."""

from __future__ import annotations

import errno
import sys
from importlib import resources
from pathlib import Path

from tinyfusion.config.loading import nearest
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain, read_json_object, unreadable
from tinyfusion.core.weights import KnownWeights, fetch_weights, known_weights
from tinyfusion.families.registry import diffusers_classes
from tinyfusion.models.hub import HUB_ID, fetch_repository
from tinyfusion.models.statedicts import OTHER_KINDS

_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
RUN_MODELS = ("student", "recover/student", "model", "prune/student")  # model folders of a run, the best first
_LORA = ("adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


def shipped_models() -> dict[str, Path]:
    """Models that come with the package, by name: folders of ours, and pipelines of diffusers."""
    root = Path(str(resources.files("tinyfusion"))) / "assets"
    files = sorted([*root.glob("*/model.json"), *root.glob("*/model_index.json")])
    return {path.parent.name: path.parent for path in files}


def is_shipped(source: str | Path) -> bool:
    """Whether a text is the name of a shipped model, which has priority over a folder of that name (`./NAME`)."""
    return isinstance(source, str) and source in shipped_models()


def exists(path: Path) -> bool:
    """Whether there is a file or folder. Raises UserError if it cannot be read, and on special files."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return False
        raise unreadable(path, error) from error
    except ValueError:  # a NUL in the name
        return False
    check_plain(path)
    return True


def by_name(name: str) -> tuple[Path, dict[str, str]]:
    """Path and known facts of a shipped model, known weights or a hub id; the latter two are fetched."""
    shipped = shipped_models()
    if name in shipped:
        if Path(name).exists():
            print(f"{name} is the shipped model; ./{name} is the folder of that name here", file=sys.stderr)
        return shipped[name], {"name": name}
    known = {entry.name: entry for entry in known_weights().values() if entry.kind == "model"}
    if name in known:
        entry = known[name]
        path = fetch_weights(name)
        facts = {"license": entry.license, "family": entry.family}
        return path, {"name": name, "address": entry.address, **{key: value for key, value in facts.items() if value}}
    if Path(name).suffix in _FILES:
        raise UserError(f"no model at {name}: no such file{_fetched_as(Path(name).name, known)}")
    if HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        try:
            return fetch_repository(name)
        except UserError as error:
            raise UserError(
                f"no model at {name}: no such folder here (`tinyfusion train` makes one), and {error}"
            ) from error
    hint = nearest(name.lower(), [*shipped, *known])
    raise UserError(f"no model at {name}: no such file or folder, and no model of that name{hint}")


def transformer_in_run(path: Path) -> Path | None:
    """The folder of a transformer of diffusers in a run, the best first; None where it is no run, or has none."""
    names = RUN_MODELS if (path / "run.json").is_file() else ()
    return next((path / name for name in names if (path / name / "config.json").is_file()), None)


def _fetched_as(file_name: str, known: dict[str, KnownWeights]) -> str:
    """A hint at known weights that are published under this file name."""
    names = [name for name, entry in known.items() if entry.file_name.lower() == file_name.lower()]
    return f"; {names[0]} fetches the published file of that name" if len(names) == 1 else ""


def model_folder(path: Path, weights: str) -> Path:
    """The model folder: `path` itself, that of a run, or the transformer of a folder of diffusers."""
    if (path / "model.json").exists():
        return path
    for name in RUN_MODELS:
        for suffix in ("-raw", "") if weights == "raw" else ("",):
            if (path / f"{name}{suffix}" / "model.json").exists():
                if name == "prune/student":
                    print(
                        f"warning: {path} is not recovered yet: this is the student as it was pruned", file=sys.stderr
                    )
                return path / f"{name}{suffix}"
    if (path / "model_index.json").exists():
        kind, path = read_json_object(path / "model_index.json").get("_class_name"), path / "transformer"
        if not (path / "config.json").exists():
            raise UserError(
                f"{path.parent} is a {kind} of diffusers without transformer/config.json; pipelines with a transformer of class "
                f"{diffusers_classes()} can be opened"
            )
    elif not (path / "config.json").exists() and (path / "transformer" / "config.json").exists():
        path = path / "transformer"
    if (path / "config.json").exists():
        return path
    raise UserError(
        f"{path} holds no model: wanted model.json in it, a run folder with student/ or model/, or a folder of diffusers "
        f"with config.json{_what_is_there(path)}"
    )


def _what_is_there(path: Path) -> str:
    """A hint at the content of a folder without a model."""
    if (path / "student" / "config.json").is_file():
        return "; its student is a transformer of diffusers, which prune, export and inspect take"
    if (path / "run.json").is_file():
        record = read_json_object(path / "run.json")
        state = "makes no model" if record.get("state") == "done" else "has not finished: the same command continues it"
        return f"; it is a run of `{record.get('verb')}` that {state}"
    if any((path / name).exists() for name in _LORA):
        return f"; it {OTHER_KINDS['lora']}"
    files = sorted(file.name for file in path.iterdir() if file.suffix in _FILES) if path.is_dir() else []
    return f"; give the file itself: {', '.join(str(path / name) for name in files[:3])}" if files else ""
