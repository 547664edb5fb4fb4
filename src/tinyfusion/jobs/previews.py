"""Previews of a training: log lines for trackers, image grids and small FIDs of the averaged weights.

Previews never change a training: their draws are addressed like all others, and use a copy of the weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyfusion.config.loading import flatten, nearest, to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import RunDirectory, read_json, write_json
from tinyfusion.data.image_source import grey_pixels
from tinyfusion.data.images import image_grid, write_grid_png
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import feature_moments, frechet_distance
from tinyfusion.jobs.assemble import device_for
from tinyfusion.jobs.preview_drawing import FamilyPreviews, PromptPreviews, preview_drawing
from tinyfusion.jobs.scoring import Reference, open_reference, protocol_of
from tinyfusion.models.checkpoint import LoadedModel

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

EXTRAS = {"tensorboard": "trackers", "wandb": "wandb", "trackio": "trackio"}  # tracker -> extra that installs it
GRID_COLUMNS = 10


def check_previews(recipe: Recipe, model: LoadedModel | None) -> FamilyPreviews | PromptPreviews | None:
    """How the previews of a training are drawn; None without any. Raises UserError where they cannot work.

    model: None where there is nothing to draw.
    """
    settings = recipe.watch
    for name in settings.report_to:
        if name not in EXTRAS:
            raise UserError(f"watch.report_to: unknown tracker {name!r}{nearest(name, EXTRAS)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name (wandb leaves one) has no origin
            raise UserError(f"{name} is not installed: pip install 'tinyfusion[{EXTRAS[name]}]'")
    if model is None or not settings.draws:
        return None
    drawing = preview_drawing(recipe, model)
    shape = drawing.check()
    if settings.grid_every_steps and shape[-1] not in (1, 3):
        raise UserError(
            f"watch.grid_every_steps needs images of 1 or 3 channels; the model's have {shape[-1]}: set it to 0"
        )
    if settings.fid_every_steps:
        if not recipe.evaluate.references:
            raise UserError(
                "watch.fid_every_steps compares with the first of evaluate.references, and there is none: add "
                "--set evaluate.references=NAME"
            )
        extractor = open_extractor(recipe.evaluate.features, str(device_for(recipe)))
        blank = np.zeros((1, *shape), np.uint8)
        extractor.check(grey_pixels(blank) if extractor.grey else blank, "images of the model")
    return drawing


class Previews:
    """Context around one training. Only the process that writes the run folder (`run.writes`) draws and prints.

    model: what is trained, None where there is nothing to draw from yet (a search). title: the verb. start: steps made
    before this sitting; grids of later steps are removed. Trackers start on entering. `seconds` is the time spent on previews.
    Raises UserError as `check_previews`, and where a tracker does not start.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, model: LoadedModel | None, title: str, start: int) -> None:
        self._drawing = check_previews(recipe, model)
        self.recipe, self.run, self.title, self.start = recipe, run, title, start
        self.seconds = 0.0
        self._silent = not run.writes
        self._trackers: dict[str, GeneralTracker] = {}
        self._environment: list[str] = []
        self._real: Reference | None = None

    def __enter__(self) -> Previews:
        if self.run.writes:
            began = time.perf_counter()
            self._start()
            self.seconds += time.perf_counter() - began
        return self

    def _start(self) -> None:
        settings, evaluation = self.recipe.watch, self.recipe.evaluate
        for file in self.run.watched.glob("step-*.png"):
            match = re.fullmatch(r"step-([0-9]{7,})", file.stem)
            if match and int(match[1]) > self.start:
                file.unlink()
        planned = []
        if self._drawing and settings.grid_every_steps:
            planned.append(f"{settings.grid_images} images every {settings.grid_every_steps} steps")
        if self._drawing and settings.fid_every_steps:
            extractor = open_extractor(evaluation.features, str(device_for(self.recipe)))
            self._real = open_reference(evaluation.references[0], extractor, self.recipe.data)
            planned.append(f"FID of {settings.fid_images} images every {settings.fid_every_steps} steps")
        if planned and self._drawing:
            self.run.note(f"watching the averaged weights: {', '.join(planned)}; {self._drawing.said}")
        try:
            for name in dict.fromkeys(settings.report_to):
                self._trackers[name] = self._started(name)
        except BaseException:
            self._finish()
            raise

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._finish()

    def due(self, step: int) -> bool:
        """Whether a preview is due after `step` steps: it depends on settings alone, so all processes agree."""
        settings = self.recipe.watch
        drawn = _is_due(settings.grid_every_steps, step) or _is_due(settings.fid_every_steps, step)
        return self._drawing is not None and drawn

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers of a log line to the trackers. step: from 0."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self._send(lambda tracker, _name: tracker.log(numbers, step=step))

    def look(self, step: int, averaged: Callable[[], LoadedModel]) -> None:
        """Draw and score what is due after `step` steps. averaged: the model with averaged weights, on the CPU.

        Every process must call; where a preview is due, each calls `averaged`.
        """
        if not self.due(step):
            return
        began = time.perf_counter()
        model = averaged()
        if not self._silent:
            try:
                previews = self._drawn(step, model)
            except torch.OutOfMemoryError:
                self._silent = True
                self._warn("no memory for pictures of the averaged weights during the training: there are no more")
            else:
                seconds = round(time.perf_counter() - began, 3)
                # the number of the last step, as in all lines: a resumed run drops those that it is going to write again
                self.run.log({"step": step - 1, "watch": {"made_steps": step, **previews, "seconds": seconds}})
                self.log(step - 1, {f"watch/{name}": value for name, value in previews.items() if name == "fid"})
        self.seconds += time.perf_counter() - began

    # --------------------------------------------------------------------------------------------------------- pictures

    def _drawn(self, step: int, model: LoadedModel) -> dict[str, Any]:
        """The previews that are due, as the fields of a log line."""
        settings, fields = self.recipe.watch, dict[str, Any]()
        assert self._drawing is not None
        with self._drawing.opened(model) as drawing:
            if _is_due(settings.grid_every_steps, step):
                grid = self._images(drawing.grid, step)
                if grid is not None:
                    file = self.run.watched / f"step-{step:07d}.png"
                    write_grid_png(file, grid, GRID_COLUMNS, max(1, 256 // (4 * grid.shape[1])))
                    fields["grid"] = str(file.relative_to(self.run.path))
                    self._send(lambda tracker, name: _send_grid(tracker, name, grid, step - 1))
            if _is_due(settings.fid_every_steps, step):
                images = self._images(drawing.small_set, step)
                fields |= {"fid": None} if images is None else self._fid(images, drawing.protocol())
        return fields

    def _fid(self, images: np.ndarray, sampling: str) -> dict[str, Any]:
        assert self._real is not None
        extractor = self._real.extractor
        features = extractor(grey_pixels(images) if extractor.grey else images)
        value = frechet_distance(*self._real.pool, *feature_moments(features.pool))
        return {"fid": value, "protocol": protocol_of(self._real, extractor, self.recipe.evaluate, sampling)}

    def _images(self, draw: Callable[[], np.ndarray], step: int) -> np.ndarray | None:
        """uint8 images (N, H, W, C), the same noise and conditions in every preview; None where one is not finite."""
        try:
            return draw()
        except UserError as error:
            self.run.note(f"watching: no pictures after {step} steps: {error}")
            return None

    # --------------------------------------------------------------------------------------------------------- trackers

    def _started(self, name: str) -> GeneralTracker:
        """A started tracker. What it prints goes to stderr, because stdout is for results."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                tracker = self._opened(name)
                tracker.main_process_only = False  # only one process is here
                tracker.start()
                if name == "tensorboard" and not list(self.run.watched.glob("tensorboard/*/hparams.yml")):
                    leaves = flatten(to_plain(self.recipe)).items()
                    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in leaves}
                    tracker.store_init_configuration(plain)
                return tracker
        except Exception as error:
            reason = _reason(error)
            raise UserError(f"watch.report_to: {name} does not start ({reason}); fix that, or leave it out") from error

    def _opened(self, name: str) -> GeneralTracker:
        """A tracker with its files in the run folder, which continues that of an earlier sitting."""
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        if not PartialState._shared_state:
            PartialState(cpu=True)  # accelerate's log refuses to work without; a training of several processes has it
        folder, settings = self.run.watched, self.recipe.watch
        folder.mkdir(parents=True, exist_ok=True)
        if name == "tensorboard":
            return TensorBoardTracker("tensorboard", folder, purge_step=self.start or None)
        title, config = f"{self.recipe.name} {self.title}", to_plain(self.recipe)
        file = folder / "trackers.json"  # the name of this training at its trackers, the same in every sitting
        if not file.is_file():
            write_json(file, {"id": secrets.token_hex(4)})
        identity = str(read_json(file)["id"])
        if name == "trackio":
            # read once, when trackio is imported: the stages of a whole job share a folder
            whole = self.run.path.parent if (self.run.path.parent / "run.json").is_file() else self.run.path
            self._set("TRACKIO_DIR", RunDirectory(whole).watched / "trackio")
            return TrackioTracker(settings.project, name=f"{title} {identity}", resume="allow", config=config)
        import wandb

        self._set("WANDB_CACHE_DIR", folder / "wandb" / "cache")
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
        return WandBTracker(
            settings.project, name=title, id=identity, resume="allow", dir=str(folder), config=config,
            allow_val_change=True, settings=quiet,
        )  # fmt: skip

    def _set(self, name: str, folder: Path) -> None:
        """Set the environment variable of a tracker's folder, unless the user has set it."""
        if name not in os.environ:
            os.environ[name] = str(folder.absolute())
            self._environment.append(name)

    def _send(self, send: Callable[[GeneralTracker, str], None]) -> None:
        """Send to every tracker; one that fails gets nothing from then on. No tracker may end a training."""
        for name, tracker in list(self._trackers.items()):
            try:
                send(tracker, name)
            except Exception as error:
                del self._trackers[name]
                self._warn(f"{name} failed ({_reason(error)}): nothing more is sent there in this sitting")

    def _finish(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._send(_end)
        self._trackers.clear()
        for name in self._environment:
            os.environ.pop(name, None)

    def _warn(self, text: str) -> None:
        self.run.note(f"warning: {text}")
        print(f"warning: {text}", file=sys.stderr)


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _end(tracker: GeneralTracker, name: str) -> None:
    if name == "trackio":
        import trackio

        trackio.finish()  # accelerate's leaves it to be finished again when the program ends, with output on stdout
    else:
        tracker.finish()


def _send_grid(tracker: GeneralTracker, name: str, images: np.ndarray, step: int) -> None:
    grid = image_grid(images, GRID_COLUMNS)
    if name == "tensorboard":
        tracker.log_images({"watch/grid": grid[None]}, step=step, dataformats="NHWC")
    elif name == "wandb":
        tracker.log_images({"watch/grid": [grid]}, step=step)


def _reason(error: Exception) -> str:
    """The first line of an error, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
