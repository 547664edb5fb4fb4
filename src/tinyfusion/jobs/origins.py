"""What a command leaves unnamed: teacher and data of the run that made a model, the digits where a model takes such, else an error.

Recipes name no teacher, data, references or features by default, so that nothing is trained on or compared with a set that
nobody chose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.config.loading import build_known
from tinyfusion.config.recipe import DataSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.latents import LATENTS
from tinyfusion.data.parquet import HUB, PARQUET, STREAMED
from tinyfusion.evaluate.features import DIGITS_FEATURES, FEATURE_CHOICES
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.places import is_shipped

_MODEL_FOLDERS = ("student", "student-raw", "model", "model-raw")  # of a run
_DIGITS_SHAPE, _DIGITS_CLASSES = (8, 8, 1), 10
_SETS = f"{LATENTS}PATH, {PARQUET}PATH, {HUB}ORG/NAME, a folder of pictures or an .npz; {REAL_SETS[0]} for the shipped digits"


@dataclass(frozen=True)
class MakingRun:
    """The run that made a model: its folder, and its record with a `job`."""

    path: Path
    record: Mapping[str, Any]

    @property
    def job(self) -> Mapping[str, Any]:
        """The whole recipe as plain values, and the models as they were named."""
        return dict(self.record["job"])

    def section(self, name: str) -> Any:
        """A field or section of its recipe; None where there is none."""
        recipe = self.job.get("recipe")
        return recipe.get(name) if isinstance(recipe, dict) else None

    def teacher(self) -> str | None:
        """The model that it started from or learned from; None where it had none, or none is recorded."""
        found = self.job.get("teacher") or self.section("teacher")
        return found if isinstance(found, str) and found and self.record.get("verb") != "train" else None


def making_run(source: str | Path) -> MakingRun | None:
    """The run that made the model at `source`, a run folder or a model folder in one; None where no record of it is there."""
    path = Path(source)
    places = [path, path / "recover", path / "prune", *([path.parent] if path.name in _MODEL_FOLDERS else [])]
    for folder in places if source and not is_shipped(source) else []:  # an empty path would be the current folder
        record: dict[str, Any] = {}
        with suppress(UserError):
            record = read_json_object(folder / "run.json") if (folder / "run.json").is_file() else {}
        if isinstance(record.get("job"), dict):
            return MakingRun(folder, record)
    return None


def with_teacher(
    recipe: Recipe, student: str | Path, verb: str, remarks: list[str]
) -> tuple[Recipe, Mapping[str, Any]]:
    """The recipe with the teacher of the run that made the student, where it names none; and the job of that run, else {}.

    remarks: gets a line for people. Raises UserError where neither names one.
    """
    if recipe.teacher:
        return recipe, {}
    run = making_run(student)
    teacher = run.teacher() if run else None
    if run is None or teacher is None:
        raise UserError(
            f"{verb} needs --teacher: {student} has no record of a run that names the model it was cut from (give --teacher "
            "MODEL, or a --recipe that names one)"
        )
    remarks.append(f"teacher {teacher}, as in {run.path} (--teacher names another)")
    return dataclasses.replace(recipe, teacher=teacher), run.job


def with_data(
    recipe: Recipe, model: LoadedModel, sources: Iterable[str | Path], remarks: list[str], needed: bool = True
) -> Recipe:
    """The recipe with the data of the run that made one of the models at `sources`, where it names none; else the digits.

    remarks: gets lines for people. needed: raise UserError where neither is possible, as the model takes no digits. Where
    scores are watched, features and references are filled in as well.
    """
    if not recipe.data.name:
        recipe = _with_known_data(recipe, model, sources, remarks if needed else None)
    return with_watched(recipe, model, remarks)


def _with_known_data(
    recipe: Recipe, model: LoadedModel, sources: Iterable[str | Path], remarks: list[str] | None
) -> Recipe:
    """remarks: None where no data are needed."""
    for run in filter(None, map(making_run, sources)):
        if (data := _data_of(run, model)) is not None:
            data = dataclasses.replace(data, **{**_given(recipe), "name": data.name})
            if remarks is not None:
                remarks.append(f"data {data.name}, as in {run.path} (--data names another set)")
            return dataclasses.replace(recipe, data=data)
    if not takes_digits(model):
        return recipe if remarks is None else require_data(recipe)
    if remarks is not None:
        remarks.append(
            f"data {REAL_SETS[0]}, as no set is named and the model takes such images (--data names another set)"
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, name=REAL_SETS[0]))


def _given(recipe: Recipe) -> dict[str, Any]:
    """The settings of data that somebody named, or that are not as they are by default."""
    default = DataSection()
    return {
        name: value
        for name, value in vars(recipe.data).items()
        if f"data.{name}" in recipe.assigned or value != getattr(default, name)
    }


def with_watched(recipe: Recipe, model: LoadedModel, remarks: list[str]) -> Recipe:
    """`with_evaluation` for what the model draws, where a training watches scores."""
    return with_evaluation(recipe, drawn_shape(model), remarks) if recipe.watch.fid_every_steps else recipe


def drawn_shape(model: LoadedModel) -> tuple[int, int, int]:
    """(H, W, C) of the images of a model, as far as it knows their side."""
    side = model.facts.image_size
    return side, side, 3 if model.of_latents else model.arch.in_channels


def require_data(recipe: Recipe) -> Recipe:
    """The recipe itself. Raises UserError where it names no data set."""
    if not recipe.data.name:
        raise UserError(f"no data set is named: give --data ({_SETS})")
    return recipe


def _data_of(run: MakingRun, model: LoadedModel) -> DataSection | None:
    """The data of a run; None where it has none, or the digits for a model that cannot take them (an earlier default)."""
    section = run.section("data")
    with suppress(UserError):
        data: DataSection = build_known(DataSection, section, "data")
        data = dataclasses.replace(data, name=build_known(str, run.job.get("data", data.name), "data"))
        return data if data.name and (data.name not in REAL_SETS or takes_digits(model)) else None
    return None


def takes_digits(model: LoadedModel) -> bool:
    """Whether a model takes images and labels of the form of the digits."""
    arch = model.arch
    form = (arch.input_size, arch.input_size, arch.in_channels)
    return form == _DIGITS_SHAPE and arch.num_classes >= _DIGITS_CLASSES and not model.of_latents


def with_evaluation(recipe: Recipe, shape: tuple[int, ...], remarks: list[str]) -> Recipe:
    """The recipe with features and references for images (H, W, C) where it names none: of the digits for such images.

    Else its training data are the reference, where they are pictures. What nothing is known for stays unnamed.
    """
    settings, digits = recipe.evaluate, tuple(shape) == _DIGITS_SHAPE
    if settings.features and settings.references:
        return recipe
    data = recipe.data.name
    own = (data,) if data and not data.startswith((LATENTS, *STREAMED)) and data not in REAL_SETS else ()
    features = settings.features or (DIGITS_FEATURES if digits else "")
    references = settings.references or own or (REAL_SETS if digits else ())
    if (features, references) == (settings.features, settings.references):
        return recipe
    remarks.append(
        f"evaluation by features {features or '(none named)'} against {', '.join(references) or '(none named)'} "
        "(--set evaluate.features= and evaluate.references= name others)"
    )
    return dataclasses.replace(recipe, evaluate=dataclasses.replace(settings, features=features, references=references))


def require_features(recipe: Recipe, what: str, shape: tuple[int, ...]) -> str:
    """The feature extractor. Raises UserError where none is named for `what`, images (H, W, C)."""
    if not recipe.evaluate.features:
        raise UserError(f"no features are named for {what}, images {tuple(shape)}; {FEATURE_CHOICES}")
    return recipe.evaluate.features


def require_reference(recipe: Recipe) -> str:
    """The first reference. Raises UserError where there is none."""
    if not recipe.evaluate.references:
        raise UserError(
            f"no reference is named: give --reference NAME, or --set evaluate.references= ({PARQUET}PATH, {HUB}ORG/NAME, a "
            "folder or npz of images)"
        )
    return recipe.evaluate.references[0]
