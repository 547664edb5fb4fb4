"""Transformers of diffusers by path or hub id, and what of their pipeline their training depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyfusion.config.recipe import FlowSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.families.diffusers_classes.calls import CallContext
from tinyfusion.families.diffusers_classes.folder import (
    INDEX,
    RECORD,
    TransformerFolder,
    component_folders,
    open_transformer,
)
from tinyfusion.families.diffusers_classes.guess import guessed_row, is_transformer
from tinyfusion.families.diffusers_classes.rows import Rows, row_for, rows_with
from tinyfusion.families.diffusers_classes.schedules import expert_range
from tinyfusion.families.registry import family_of_config
from tinyfusion.models.hub import HUB_ID, fetch_pipeline
from tinyfusion.models.places import by_name, exists, is_shipped, shipped_models, transformer_in_run
from tinyfusion.models.transformer import TransformerModel, opened

_MOST_PARENTS = 16  # that a model's runs are followed back


def is_transformer_class(name: str | None, blocks: Path | None) -> bool:
    """Whether a family's name is that of a transformer class of diffusers with a row. blocks: rows of the user."""
    return name is not None and name in rows_with(blocks)


def transformer_of(source: str, blocks: Path | None, prompts: bool = False) -> TransformerFolder | None:
    """The transformer of diffusers at a path or hub id; None where it is a model of a family, or none at all.

    blocks: a file of rows for classes that the shipped table lacks. prompts: encoded prompts are given, so that a family which
    needs them opens folders that have none. Raises UserError where a pipeline has several, a class has no
    row (with a guess at it), and where folder and row contradict each other.
    """
    rows, path, known = rows_with(blocks), Path(source), dict[str, str]()
    if is_shipped(source) or not exists(path):
        if not is_shipped(source) and (not HUB_ID.fullmatch(source) or path.parent.exists()):
            return None
        path, known = by_name(source)
    folder = _located(path, rows, prompts)
    if folder is None:
        return None
    config = read_json_object(folder / "config.json")
    if row_for(config, rows) is None and not _recorded_row(config):
        if not is_transformer(str(config.get("_class_name"))):
            return None
        raise UserError(_unknown(folder, config))
    model = open_transformer(folder, rows)
    license, parent = model.license or known.get("license"), model.parent or known.get("hub")
    return dataclasses.replace(model, license=license, parent=parent)


def _located(path: Path, rows: Rows, prompts: bool) -> Path | None:
    """The folder with config.json in it: of a run, a pipeline, or itself; None where a family of ours opens the model."""
    if not path.is_dir() or (path / "model.json").exists():
        return None
    if (path / "run.json").is_file():
        return transformer_in_run(path)
    if (path / INDEX).is_file():
        folders = [folder for folder in component_folders(path, rows) if not _of_a_family(folder, prompts)]
        if len(folders) > 1:
            names = " or ".join(str(folder) for folder in folders)
            raise UserError(f"{path} has {len(folders)} transformers, each with blocks of its own: give {names}")
        return folders[0] if folders else None
    return path if (path / "config.json").is_file() and not _of_a_family(path, prompts) else None


def _of_a_family(folder: Path, prompts: bool) -> bool:
    """Whether a registered family opens this folder: one that claims its class, with the texts that it needs.

    A family that needs texts writes no folders of diffusers, so one with our record was pruned as a transformer of diffusers.
    """
    config = read_json_object(folder / "config.json")
    family = family_of_config(config)
    extra = family.diffusers.extra_file if family and family.diffusers else None
    return family is not None and (extra is None or (folder / extra).is_file() or (prompts and RECORD not in config))


def _recorded_row(config: Mapping[str, Any]) -> bool:
    """Whether a student carries the row that it was pruned by."""
    record = config.get(RECORD)
    return isinstance(record, dict) and isinstance(record.get("row"), str)


def _unknown(folder: Path, config: Mapping[str, Any]) -> str:
    """What to do about a class without a row."""
    text = guessed_row(config)
    kind = config["_class_name"]
    if text is None:
        return f"{folder} is a {kind}, for which there is no row and no guess: write one, and give it as --blocks FILE"
    return (
        f"{folder} is a {kind}, for which there is no row. A guess, which builds and prunes as it should: check in which order "
        f"its blocks return their streams, write this line to a file, and give that as --blocks FILE: {text}"
    )


def origin_of(source: str | Path, model: TransformerFolder, blocks: Path | None) -> tuple[Path, str] | None:
    """The pipeline and the component that a model is, was pruned from or was trained for, as the records of its runs say; else None."""
    if model.pipeline is not None:
        return model.pipeline, model.path.name
    teacher = first_teacher(str(source))
    parent = transformer_of(teacher, blocks) if teacher else None
    if parent is not None and parent.pipeline is not None:
        return parent.pipeline, parent.path.name
    return recorded_pipeline(teacher or source)


def recorded_pipeline(source: str | Path) -> tuple[Path, str] | None:
    """The pipeline and the component that a model was trained for, as the record of its run of `train` says; None without one.

    source: the run, or the folder of a model in it. Raises UserError where that pipeline is gone.
    """
    path = Path(source)
    record = next((place / "run.json" for place in (path, path.parent) if (place / "run.json").is_file()), None)
    job = (read_json_object(record).get("job") or {}) if record else {}
    section = (job.get("recipe") or {}).get("pipeline") or {}
    if not isinstance(section.get("folder"), str):
        return None
    return pipeline_folder(section["folder"]), str(section.get("component") or "transformer")


def pipeline_folder(source: str) -> Path:
    """The folder of a pipeline, fetched where it is a hub id. Raises UserError where there is none."""
    path = located(source)
    if not exists(path):
        raise UserError(f"no pipeline at {source}: no such folder, and it is no hub id")
    if not (path / INDEX).is_file():
        raise UserError(f"{path} is no pipeline of diffusers: wanted a folder with {INDEX}, or a hub id")
    return path


def located(source: str) -> Path:
    """The folder of a shipped name or of a pipeline's hub id, which is fetched; a path otherwise, which need not exist."""
    path = shipped_models().get(source, Path(source))
    if not exists(path) and HUB_ID.fullmatch(source) and not path.parent.exists():
        return fetch_pipeline(source)
    return path


def first_teacher(source: str) -> str | None:
    """What the run of a model was begun with, followed back through the runs of students; None where no run is recorded."""
    teacher = None
    for _ in range(_MOST_PARENTS):
        path = Path(teacher or source)
        places = [path, *([path.parent, path.parent.parent] if path.name == "student" else [])]
        run = next((place for place in places if (place / "run.json").is_file()), None)
        job = read_json_object(run / "run.json").get("job") if run else None
        named = [job.get(role) for role in ("teacher", "student")] if isinstance(job, dict) else []
        texts = [each for each in named if isinstance(each, str) and each]
        if not texts:
            break
        teacher = texts[0]
    return teacher


def open_transformer_model(
    source: str | Path, model: TransformerFolder, settings: FlowSection, blocks: Path | None
) -> TransformerModel:
    """The model in memory, as its pipeline calls it. settings: of its guidance, where that is an input of the network."""
    return in_pipeline(model, origin_of(source, model, blocks), settings)


def in_pipeline(model: TransformerFolder, origin: tuple[Path, str] | None, settings: FlowSection) -> TransformerModel:
    """The model in memory, as a pipeline calls its component; None: as its own config says."""

    def config(name: str) -> Mapping[str, Any]:
        return read_json_object(origin[0] / name) if origin is not None and (origin[0] / name).is_file() else {}

    levels = (0.0, 1.0) if origin is None else expert_range(config(INDEX), origin[1])
    stated: dict[str, Any] = {"guidance": settings.guidance, "levels": levels}
    context = CallContext.of_folder(model.config, config(INDEX), config("vae/config.json"), **stated)
    known: dict[str, Any] = {"scheduler": config("scheduler/scheduler_config.json")}
    if origin is not None:
        known |= {"pipeline": origin[0], "component": origin[1]}
    return dataclasses.replace(opened(model, context), **known)
