"""Inputs that a command does not name: teacher and data of the run that wrote a model, else the digits, else an error.

Recipes name no teacher, data, references or features by default, so that nothing is trained on or compared with a set that
the user did not choose. The same records give the history of a model.
"""

from __future__ import annotations

import dataclasses
import re
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
from tinyfusion.models.places import RUN_MODELS, is_shipped

_MODEL_FOLDERS = ("student", "student-raw", "model", "model-raw")  # of a run
_DIGITS_SHAPE, _DIGITS_CLASSES = (8, 8, 1), 10
_SETS = f"{LATENTS}PATH, {PARQUET}PATH, {HUB}ORG/NAME, a folder of pictures or an .npz; {REAL_SETS[0]} for the shipped digits"
# verb -> what it began with
_PARENTS = {"recover": "student", "prune": "teacher", "dynamic": "model", "distill-steps": "model"}
_MOST_STEPS = 32


@dataclass(frozen=True)
class MakingRun:
    """The run that wrote a model: its folder, and its record with a `job`."""

    path: Path
    record: Mapping[str, Any]

    @property
    def job(self) -> Mapping[str, Any]:
        """The recipe as plain values, and the models as they were named."""
        return dict(self.record["job"])

    def section(self, name: str) -> Any:
        """A field or section of the recipe; None where there is none."""
        recipe = self.job.get("recipe")
        return recipe.get(name) if isinstance(recipe, dict) else None

    def teacher(self) -> str | None:
        """The model that it started from or learned from; None where none is recorded."""
        teacher = self.job.get("teacher") or self.section("teacher")
        return teacher if isinstance(teacher, str) and teacher and self.record.get("verb") != "train" else None


def making_run(source: str | Path) -> MakingRun | None:
    """The run that wrote the model at `source`, a run folder or a model folder in one; None without a record."""
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
    """The recipe with a teacher, where it names none that of the run that wrote the student; and the job of that run, else {}.

    remarks: gets a line to print. Raises UserError where neither names one.
    """
    if recipe.teacher:
        return recipe, {}
    run = making_run(student)
    teacher = run.teacher() if run else None
    if run is None or teacher is None:
        raise UserError(
            f"{verb} needs --teacher: {student} has no record of a run that names the model it was pruned from (give --teacher "
            "MODEL, or a --recipe that names one)"
        )
    remarks.append(f"teacher {teacher}, as in {run.path} (--teacher names another)")
    return dataclasses.replace(recipe, teacher=teacher), run.job


def with_data(
    recipe: Recipe, model: LoadedModel, sources: Iterable[str | Path], remarks: list[str], needed: bool = True
) -> Recipe:
    """The recipe with data, where it names none those of the run that wrote one of the models at `sources`, else the digits.

    remarks: gets lines to print. needed: raise UserError where neither is possible, as the model takes no digits. Features and
    references of watched scores are filled in as well.
    """
    if not recipe.data.name:
        data, reason = _known_data(recipe, model, sources)
        if needed and reason:
            remarks.append(f"data {data.name}, {reason} (--data names another set)")
        recipe = dataclasses.replace(recipe, data=data)
        recipe = require_data(recipe) if needed else recipe
    return with_watched(recipe, model, remarks)


def _known_data(recipe: Recipe, model: LoadedModel, sources: Iterable[str | Path]) -> tuple[DataSection, str]:
    """The section with a data set, and why this one; as it is, and "", where none is known."""
    default, own = DataSection(), vars(recipe.data)
    for run in filter(None, map(making_run, sources)):
        if (data := _data_of(run, model)) is not None:
            given = {n: v for n, v in own.items() if f"data.{n}" in recipe.assigned or v != getattr(default, n)}
            return dataclasses.replace(data, **{**given, "name": data.name}), f"as in {run.path}"
    if not takes_digits(model):
        return recipe.data, ""
    reason = "as no set is named and the model takes such images"
    return dataclasses.replace(recipe.data, name=REAL_SETS[0]), reason


def with_watched(recipe: Recipe, model: LoadedModel, remarks: list[str]) -> Recipe:
    """`with_evaluation` for the images of the model, where a training watches scores."""
    return with_evaluation(recipe, drawn_shape(model), remarks) if recipe.watch.fid_every_steps else recipe


def drawn_shape(model: LoadedModel) -> tuple[int, int, int]:
    """(H, W, C) of the images of a model."""
    side = model.facts.image_size
    return side, side, 3 if model.of_latents else model.arch.in_channels


def require_data(recipe: Recipe) -> Recipe:
    """The recipe itself. Raises UserError where it names no data set."""
    if not recipe.data.name:
        raise UserError(f"no data set is named: give --data ({_SETS})")
    return recipe


def _data_of(run: MakingRun, model: LoadedModel) -> DataSection | None:
    """The data of a run; None where it has none, or the digits (an earlier default) for a model that cannot take them."""
    section = run.section("data")
    with suppress(UserError):
        data: DataSection = build_known(DataSection, section, "data")
        data = dataclasses.replace(data, name=build_known(str, run.job.get("data", data.name), "data"))
        return data if data.name and (data.name not in REAL_SETS or takes_digits(model)) else None
    return None


def takes_digits(model: LoadedModel) -> bool:
    """Whether a model takes images and labels like the digits."""
    arch = model.arch
    if model.of_latents:
        return False
    form = (arch.input_size, arch.input_size, arch.in_channels)
    return form == _DIGITS_SHAPE and arch.num_classes >= _DIGITS_CLASSES


def with_evaluation(recipe: Recipe, shape: tuple[int, ...], remarks: list[str]) -> Recipe:
    """The recipe with features and references for images (H, W, C), where it names none.

    Features: those of the digits for such images, else none. References: the training data where they are pictures, else
    the digits for such images, else none.
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


@dataclass(frozen=True)
class Step:
    """A run in a model's history: its verb, and a sentence."""

    verb: str
    sentence: str


def history(source: str | Path) -> list[Step]:
    """The runs that led to the model at `source`, oldest first, as far as their folders hold the models that they recorded."""
    steps: list[Step] = []
    run = making_run(source)
    while run is not None and len(steps) < _MOST_STEPS:
        verb = str(run.record.get("verb"))
        steps.append(Step(verb, _sentence(verb, run)))
        run = _parent(verb, run)
    return steps[::-1]


def _parent(verb: str, run: MakingRun) -> MakingRun | None:
    """The run that wrote the model that this one began with; None where that model has changed since."""
    role = _PARENTS.get(verb, "")
    source = run.job.get(role) or (run.section("teacher") if verb == "prune" else None)
    inputs = run.record.get("recipe")
    if not isinstance(source, str) or not source or not isinstance(inputs, Mapping):
        return None
    for place in ("", *RUN_MODELS):
        file = Path(source) / place / "model.json"
        with suppress(UserError):
            if file.is_file():
                return making_run(source) if read_json_object(file).get("hash") == inputs.get(role) else None
    return None


def _sentence(verb: str, run: MakingRun) -> str:
    own, data, seen = run.section(verb), run.section("data"), run.record.get("seen_images")
    settings: Mapping[str, Any] = own if isinstance(own, Mapping) else {}
    name = data.get("name") if isinstance(data, Mapping) else None
    images = f"{int(seen):,} images" if isinstance(seen, int | float) and 0 < seen < 2**63 else ""
    short = re.sub(r"(^|:)/.*/", r"\1", name) if isinstance(name, str) else ""  # a folder here means nothing elsewhere
    trained = f"{images} drawn from `{short}`" if images and short else images  # a picture counts each time it is drawn
    state = "" if run.record.get("state") == "done" else " (not finished)"
    if verb == "prune":
        learned = f", scheme {settings.get('scheme')}" if settings.get("criterion") == "learned" else ""
        on = f", on {trained}" if trained else ""
        return f"Pruned by the criterion `{settings.get('criterion')}`{learned}{on}{state}."
    if verb == "recover" and settings.get("search_share") is not None:
        pruning = run.section("prune")
        scheme = pruning.get("scheme") if isinstance(pruning, Mapping) else None
        on = trained or "data that are not recorded"
        return f"Pruned by the criterion `learned`, scheme {scheme}, within its recovery by `{settings.get('method')}` on {on}{state}."
    did = {"train": "Trained from nothing", "recover": f"Recovered by `{settings.get('method')}`"}.get(
        verb, f"`{verb}`,"
    )
    return f"{did} on {trained or 'data that are not recorded'}{state}."
