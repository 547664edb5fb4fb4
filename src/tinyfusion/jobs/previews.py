"""What a training shows while it runs: log lines at trackers, pictures and small FIDs of its averaged weights.

Watching never changes a training: what is drawn is addressed like every other draw, and from a copy of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyfusion.config.loading import nearest, to_plain
from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import RunDirectory, read_json, write_json
from tinyfusion.data.images import image_grid, write_grid_png
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import feature_moments, frechet_distance
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.process_specs import process_spec, sampler_of
from tinyfusion.jobs.references import Reference, open_reference
from tinyfusion.jobs.sampling_setup import (
    autoencoder_for,
    check_sampling,
    image_shape_and_dtype,
    open_drawing,
    protocol,
)
from tinyfusion.jobs.scoring import protocol_of
from tinyfusion.models.autoencoder import Autoencoder
from tinyfusion.models.checkpoint import LoadedModel

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

EXTRAS = {"tensorboard": "trackers", "wandb": "wandb", "trackio": "trackio"}  # tracker -> extra that installs it
MOST_STEPS = 50  # denoising steps of a look
GRID_COLUMNS = 10


def check_previews(recipe: Recipe, model: LoadedModel | None) -> None:
    """UserError on everything that watching a training would refuse. model: what is looked at; None only sends log lines."""
    settings = recipe.watch
    for name in settings.report_to:
        if name not in EXTRAS:
            raise UserError(f"watch.report_to: unknown tracker {name!r}{nearest(name, EXTRAS)}")
        if not _installed(name):
            raise UserError(f"{name} is not installed: pip install 'tinyfusion[{EXTRAS[name]}]'")
    if settings.grid_every_steps < 0 or settings.fid_every_steps < 0:
        raise UserError(
            "watch.grid_every_steps and watch.fid_every_steps are 0 (never) or more; "
            f"got {settings.grid_every_steps} and {settings.fid_every_steps}"
        )
    if settings.grid_images < 1 or settings.fid_images < 2:
        raise UserError(
            "a watched grid has at least 1 image (watch.grid_images) and a watched FID at least 2 (watch.fid_images); "
            f"got {settings.grid_images} and {settings.fid_images}"
        )
    if model is not None and (settings.grid_every_steps or settings.fid_every_steps):
        _check_looks(recipe, model)


def _check_looks(recipe: Recipe, model: LoadedModel) -> None:
    """UserError where no pictures can be drawn from the model, or none be scored."""
    settings = grid_sampling(recipe, model)
    check_sampling(settings, model)
    shape, _ = image_shape_and_dtype(model, autoencoder_for(settings, model))
    if recipe.watch.grid_every_steps and shape[-1] not in (1, 3):
        raise UserError(
            f"watch.grid_every_steps needs images of 1 or 3 channels; the model's have {shape[-1]}: set it to 0"
        )
    if recipe.watch.fid_every_steps:
        if not recipe.evaluate.references:
            raise UserError(
                "watch.fid_every_steps compares with the first of evaluate.references, and there is none: add "
                "--set evaluate.references=NAME"
            )
        extractor = open_extractor(recipe.evaluate.features, str(device_for(recipe)))
        extractor.check(np.zeros((1, *shape), np.uint8), "images of the model")


def _installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of that name (wandb leaves one) is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def cheap_sampling(recipe: Recipe, model: LoadedModel) -> SampleSection:
    """The recipe's sampling where it takes at most `MOST_STEPS` steps, else a quick plain one; float32, eager, decoded."""
    settings = dataclasses.replace(recipe.sample, dtype="float32", compile=False, decode=True)
    return process_spec(model).cheap(settings, MOST_STEPS)


def grid_sampling(recipe: Recipe, model: LoadedModel) -> SampleSection:
    """As `cheap_sampling`, for a grid: classes in turn where all of them fit in."""
    settings = dataclasses.replace(cheap_sampling(recipe, model), num_images=recipe.watch.grid_images)
    fit = len(model.conditions) <= recipe.watch.grid_images
    return dataclasses.replace(settings, label_rule="balanced") if fit else settings


def fid_sampling(recipe: Recipe, model: LoadedModel) -> SampleSection:
    """As `cheap_sampling`, for a small FID."""
    return dataclasses.replace(cheap_sampling(recipe, model), num_images=recipe.watch.fid_images)


class Previews:
    """Context around one training. Only the process that writes the run folder (`run.writes`) speaks and draws.

    model: what is trained, None where there is nothing to draw from yet (a search). title: the verb. start: steps made
    before this sitting; pictures of later ones are removed. `check_previews` is called first, the trackers start on entering:
    UserError there. `seconds` is the time of this sitting that went into watching.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, model: LoadedModel | None, title: str, start: int) -> None:
        check_previews(recipe, model)
        self.recipe, self.run, self.title, self.start = recipe, run, title, start
        self.seconds = 0.0
        self._looks, self._sampling = model is not None, ""
        if model is not None:
            self._sampling = sampler_of(cheap_sampling(recipe, model), model).describe(model)
        self._blind = not run.writes
        self._trackers: dict[str, GeneralTracker] = {}
        self._environment: list[str] = []
        self._real: Reference | None = None
        self._autoencoder: Autoencoder | None = None  # of a model of latents, once something is to be drawn

    def __enter__(self) -> Previews:
        if self.run.writes:
            began = time.perf_counter()
            self._start()
            self.seconds += time.perf_counter() - began
        return self

    def _start(self) -> None:
        """Make ready what looks need, and start the trackers."""
        settings = self.recipe.watch
        for file in self.run.watched.glob("step-*.png"):
            match = re.fullmatch(r"step-([0-9]{7,})", file.stem)
            if match and int(match[1]) > self.start:
                file.unlink()
        if self._looks and settings.fid_every_steps:
            evaluation = self.recipe.evaluate
            extractor = open_extractor(evaluation.features, str(device_for(self.recipe)))
            self._real = open_reference(evaluation.references[0], extractor, self.recipe.data)
        if self._looks and (settings.grid_every_steps or settings.fid_every_steps):
            self.run.note(self._intent())
        try:
            for name in dict.fromkeys(settings.report_to):
                self._trackers[name] = self._started(name)
        except BaseException:
            self._finish()
            raise

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._finish()

    def due(self, step: int) -> bool:
        """Whether a look is due after `step` steps: a matter of settings alone, so all processes agree."""
        return self._looks and any(map(bool, self._wanted(step)))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers of a log line to the trackers; whatever else it holds stays in metrics.jsonl. step: from 0."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self._send(lambda tracker, _name: tracker.log(numbers, step=step))

    def look(self, step: int, averaged: Callable[[], LoadedModel]) -> None:
        """After `step` steps: draw and score what is due. averaged: the model with averaged weights, on the CPU.

        Every process calls; `averaged` is called on each of them, where something is due alone.
        """
        if not self.due(step):
            return
        began = time.perf_counter()
        model = averaged()
        if not self._blind:
            try:
                previews = self._drawn(step, model)
            except torch.OutOfMemoryError:
                self._blind = True
                self._warn(
                    "no memory for pictures of the averaged weights during the training: there are none from here on"
                )
            else:
                seconds = round(time.perf_counter() - began, 3)
                # the number of the last step, as in all lines: a resumed run drops those that it is going to write again
                self.run.log({"step": step - 1, "watch": {"made_steps": step, **previews, "seconds": seconds}})
                self.log(step - 1, {f"watch/{name}": value for name, value in previews.items() if name == "fid"})
        self.seconds += time.perf_counter() - began

    # --------------------------------------------------------------------------------------------------------- pictures

    def _wanted(self, step: int) -> tuple[bool, bool]:
        """Whether a grid, and whether a FID, is due after `step` steps."""
        grid, fid = self.recipe.watch.grid_every_steps, self.recipe.watch.fid_every_steps
        return bool(grid) and step > 0 and step % grid == 0, bool(fid) and step > 0 and step % fid == 0

    def _intent(self) -> str:
        settings = self.recipe.watch
        grid = f"{settings.grid_images} images every {settings.grid_every_steps} steps"
        fid = f"FID of {settings.fid_images} images every {settings.fid_every_steps} steps"
        listed = [text for text, every in ((grid, settings.grid_every_steps), (fid, settings.fid_every_steps)) if every]
        return f"watching the averaged weights: {', '.join(listed)}; {self._sampling}"

    def _drawn(self, step: int, model: LoadedModel) -> dict[str, Any]:
        """Make what is due; the fields of its log line."""
        grid, fid = self._wanted(step)
        if self._autoencoder is None:
            self._autoencoder = autoencoder_for(cheap_sampling(self.recipe, model), model)
        try:
            return self._made(step, model, grid, fid)
        finally:
            if self._autoencoder is not None:
                self._autoencoder.module.to("cpu")  # the room is the training's

    def _made(self, step: int, model: LoadedModel, grid: bool, fid: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if grid and (images := self._images(model, grid_sampling(self.recipe, model), step)) is not None:
            file = self.run.watched / f"step-{step:07d}.png"
            write_grid_png(file, images, GRID_COLUMNS, max(1, 256 // (4 * images.shape[1])))
            fields["grid"] = str(file.relative_to(self.run.path))
            self._send(lambda tracker, name: _send_grid(tracker, name, images, step - 1))
        if fid:
            fields |= self._fid(model, step)
        return fields

    def _fid(self, model: LoadedModel, step: int) -> dict[str, Any]:
        settings, evaluation = fid_sampling(self.recipe, model), self.recipe.evaluate
        images = self._images(model, settings, step)
        if images is None:
            return {"fid": None}
        assert self._real is not None
        extractor = open_extractor(evaluation.features, str(device_for(self.recipe)))
        value = frechet_distance(*self._real.pool, *feature_moments(extractor(images).pool))
        sampling = protocol(dataclasses.replace(self.recipe, sample=settings), model, self._autoencoder)
        return {"fid": value, "protocol": protocol_of(self._real, extractor, evaluation, sampling)}

    def _images(self, model: LoadedModel, settings: SampleSection, step: int) -> np.ndarray | None:
        """uint8 images (N, H, W, C), the same noise and labels at every look; None where one is not finite."""
        recipe = dataclasses.replace(self.recipe, sample=settings)
        drawing = open_drawing(recipe, model, device_for(recipe), self._autoencoder)
        try:
            return np.concatenate(list(drawing.images(0, settings.num_images)))
        except UserError as error:
            self.run.note(f"watching: no pictures after {step} steps: {error}")
            return None

    # --------------------------------------------------------------------------------------------------------- trackers

    def _started(self, name: str) -> GeneralTracker:
        """A tracker at work. Raises UserError where it does not start."""
        try:
            with _spoken_aside():
                tracker = self._opened(name)
                tracker.main_process_only = False  # only one process is here
                tracker.start()
                if name == "tensorboard" and not list(self.run.watched.glob("tensorboard/*/hparams.yml")):
                    tracker.store_init_configuration(_flat(to_plain(self.recipe)))
                return tracker
        except Exception as error:
            raise UserError(
                f"watch.report_to: {name} does not start ({_reason(error)}); fix that, or leave it out"
            ) from error

    def _opened(self, name: str) -> GeneralTracker:
        """A tracker whose files lie in the run folder, and which goes on where an earlier sitting was."""
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        if not PartialState._shared_state:
            PartialState(cpu=True)  # accelerate's log refuses to work without; a training of several processes has it
        folder, settings = self.run.watched, self.recipe.watch
        folder.mkdir(parents=True, exist_ok=True)
        if name == "tensorboard":
            return TensorBoardTracker("tensorboard", folder, purge_step=self.start or None)
        title, config = f"{self.recipe.name} {self.title}", to_plain(self.recipe)
        identity = self._identity()
        if name == "trackio":
            # read once, when trackio is imported: the stages of a whole job share a folder
            whole = self.run.path.parent if (self.run.path.parent / "run.json").is_file() else self.run.path
            self._say("TRACKIO_DIR", RunDirectory(whole).watched / "trackio")
            return TrackioTracker(settings.project, name=f"{title} {identity}", resume="allow", config=config)
        import wandb

        self._say("WANDB_CACHE_DIR", folder / "wandb" / "cache")
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        return WandBTracker(
            settings.project, name=title, id=identity, resume="allow", dir=str(folder), config=config,
            allow_val_change=True, settings=quiet,
        )  # fmt: skip

    def _say(self, name: str, folder: Path) -> None:
        """Set the environment variable of a tracker that says where to write, unless the user has set it."""
        if name not in os.environ:
            os.environ[name] = str(folder.absolute())
            self._environment.append(name)

    def _identity(self) -> str:
        """What this training is called at its trackers, the same in every sitting."""
        file = self.run.watched / "trackers.json"
        if not file.is_file():
            write_json(file, {"id": secrets.token_hex(4)})
        return str(read_json(file)["id"])

    def _send(self, send: Callable[[GeneralTracker, str], None]) -> None:
        """Send to every tracker; one that fails gets nothing from then on. No tracker may end a training."""
        for name, tracker in list(self._trackers.items()):
            try:
                send(tracker, name)
            except Exception as error:
                del self._trackers[name]
                self._warn(f"{name} failed ({_reason(error)}): nothing more is sent there in this sitting")

    def _finish(self) -> None:
        with _spoken_aside():
            self._send(_end)
        self._trackers.clear()
        for name in self._environment:
            os.environ.pop(name, None)

    def _warn(self, text: str) -> None:
        self.run.note(f"warning: {text}")
        print(f"warning: {text}", file=sys.stderr)


def _end(tracker: GeneralTracker, name: str) -> None:
    """End a tracker's run."""
    if name == "trackio":
        import trackio

        trackio.finish()  # accelerate's would leave it to be ended again when the program ends, with words on stdout
    else:
        tracker.finish()


def _send_grid(tracker: GeneralTracker, name: str, images: np.ndarray, step: int) -> None:
    """A grid to a tracker that takes pictures."""
    grid = image_grid(images, GRID_COLUMNS)
    if name == "tensorboard":
        tracker.log_images({"watch/grid": grid[None]}, step=step, dataformats="NHWC")
    elif name == "wandb":
        tracker.log_images({"watch/grid": [grid]}, step=step)


@contextlib.contextmanager
def _spoken_aside() -> Iterator[None]:
    """What trackers print goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _reason(error: Exception) -> str:
    """The first line of an error, or what kind it is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sample.eta": 0.0}: dotted names and plain numbers or text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
