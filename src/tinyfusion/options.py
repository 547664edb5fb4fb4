"""What can be typed: one frozen dataclass of options per verb. Every other knob is a recipe field, reached by --set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from tinyfusion.core.errors import UserError

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Common:
    """Options of every verb."""

    recipe: Annotated[str | None, arg(help="shipped recipe by name, or a TOML file; see `tinyfusion recipes`")] = None
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(help="any recipe field, repeatable: --set section.field=value", metavar="FIELD=VALUE")] = ()
    seed: Annotated[int | None, arg(help="seed of every draw (default 0)")] = None
    device: Annotated[str | None, arg(help="auto, cpu, cuda or mps")] = None
    overwrite: Annotated[bool, arg(help="start anew where --out holds an earlier result of tinyfusion")] = False
    dry_run: Annotated[bool, arg(help="check everything, print the plan, write nothing")] = False
    json: Annotated[bool, arg(help="make the last line of stdout machine-readable")] = False
    debug: Annotated[bool, arg(help="show tracebacks")] = False

    def overrides(self) -> dict[str, Any]:
        """Recipe fields that the typed options set."""
        named: dict[str, Any] = {"seed": self.seed, "device": self.device}
        return {path: value for path, value in {**named, **self.fields()}.items() if value is not None}

    def fields(self) -> dict[str, Any]:
        """Recipe fields of this verb's own options."""
        return {}


@dataclass(frozen=True)
class OpensModel(Common):
    """Options of verbs that open a model."""

    weights: Annotated[Weights | None, arg(help="averaged or raw weights, where both exist (default ema)")] = None
    num_heads: Annotated[int | None, arg(help="attention heads of an official file whose width is in no table")] = None
    family: Annotated[str | None, arg(help="model family of an official file whose keys fit several")] = None

    def overrides(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"sample.weights": self.weights}
        return {**super().overrides(), **weights}


@dataclass(frozen=True)
class Run(OpensModel):
    """The whole job: prune, recover, sample, evaluate, report."""

    out: Annotated[Path, arg(help="run folder")] = Path()


@dataclass(frozen=True)
class Train(Common):
    """A model from nothing."""

    out: Annotated[Path, arg(help="run folder")] = Path()
    steps: Annotated[int | None, arg(help="optimiser steps")] = None
    data: Annotated[str | None, arg(help="data set")] = None

    def fields(self) -> dict[str, Any]:
        return {"train.steps": self.steps, "data.name": self.data}


@dataclass(frozen=True)
class Prune(OpensModel):
    """Decide which blocks go: a plan and a cut, untuned student."""

    out: Annotated[Path, arg(help="run folder")] = Path()
    teacher: Annotated[str | None, arg(help="model to make shallow")] = None
    data: Annotated[str | None, arg(help="data set")] = None
    criterion: Annotated[Literal["learned", "indices"] | None, arg(help="how blocks are chosen")] = None
    scheme: Annotated[str | None, arg(help="N:M keeps N of every M blocks; 2:4x3+3:4x4 is explicit")] = None
    update: Annotated[Literal["lora", "full", "frozen"] | None, arg(help="what trains beside the gates")] = None
    keep: Annotated[str | None, arg(help="blocks to keep for --criterion indices: 0,2,4")] = None
    steps: Annotated[int | None, arg(help="optimiser steps")] = None

    def fields(self) -> dict[str, Any]:
        keep = None if self.keep is None else _integers("--keep", self.keep)
        return {
            "teacher": self.teacher, "data.name": self.data, "prune.criterion": self.criterion, "prune.scheme": self.scheme,
            "prune.update": self.update, "prune.keep": keep, "prune.training.steps": self.steps,
        }  # fmt: skip


@dataclass(frozen=True)
class Recover(OpensModel):
    """Bring a cut model back to quality."""

    student: Annotated[Path, arg(help="cut model, or the run folder of `prune`")] = Path()
    out: Annotated[Path, arg(help="run folder")] = Path()
    teacher: Annotated[str | None, arg(help="model to learn from; masked-kd needs it")] = None
    data: Annotated[str | None, arg(help="data set")] = None
    method: Annotated[Literal["finetune", "masked-kd"] | None, arg(help="how")] = None
    steps: Annotated[int | None, arg(help="optimiser steps")] = None

    def fields(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher, "data.name": self.data, "recover.method": self.method,
            "recover.training.steps": self.steps,
        }  # fmt: skip


@dataclass(frozen=True)
class Sample(OpensModel):
    """Draw images."""

    model: Annotated[str, arg(help="model or run folder")] = ""
    out: Annotated[Path, arg(help="npz of images")] = Path()
    grid: Annotated[Path | None, arg(help="also write a picture of the first images")] = None
    num_images: Annotated[int | None, arg(help="images to draw")] = None
    labels: Annotated[str | None, arg(help="classes to draw in turn: 3,7")] = None
    sampler: Annotated[Literal["ddpm", "ddim"] | None, arg(help="ancestral or DDIM")] = None
    num_steps: Annotated[int | None, arg(help="denoising steps")] = None
    guidance: Annotated[float | None, arg(help="classifier-free guidance scale")] = None
    batch_size: Annotated[int | None, arg(help="images at a time")] = None

    def fields(self) -> dict[str, Any]:
        labels = None if self.labels is None else _integers("--labels", self.labels)
        return {
            "sample.num_images": self.num_images, "sample.labels": labels, "sample.sampler": self.sampler,
            "sample.num_steps": self.num_steps, "sample.guidance": self.guidance, "sample.batch_size": self.batch_size,
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluate(Common):
    """Images to FID, sFID, Inception Score, precision and recall."""

    samples: Annotated[Path, arg(help="npz or folder of images")] = Path()
    out: Annotated[Path, arg(help="JSON of the numbers")] = Path()
    reference: Annotated[str | None, arg(help="digits, digits:heldout, or a folder or npz of images")] = None


@dataclass(frozen=True)
class Report(Common):
    """One HTML page about one or several runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(help="run folders")] = ()
    out: Annotated[Path, arg(help="HTML file")] = Path()


@dataclass(frozen=True)
class Inspect(OpensModel):
    """What a model is: family, sizes, depth, parameters, MACs, kept blocks, lineage, hash."""

    model: Annotated[Positional[str], arg(help="model or run folder")] = ""


@dataclass(frozen=True)
class Recipes(Common):
    """The shipped recipes, with expected numbers and minutes."""


VERBS: dict[str, type[Common]] = {
    "run": Run, "train": Train, "prune": Prune, "recover": Recover, "sample": Sample,
    "evaluate": Evaluate, "report": Report, "inspect": Inspect, "recipes": Recipes,
}  # fmt: skip
REQUIRED = {
    "run": ("out", "recipe"), "train": ("out",), "prune": ("out",), "recover": ("student", "out"), "sample": ("model", "out"),
    "evaluate": ("samples", "out"), "report": ("runs", "out"), "inspect": ("model",),
}  # fmt: skip


def _integers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"-?\d+", part) for part in parts):
        raise UserError(f"{option} wants whole numbers separated by commas, as in 0,2,4; got {text!r}")
    return [int(part) for part in parts]
