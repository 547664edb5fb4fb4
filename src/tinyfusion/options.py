"""What can be typed: one frozen dataclass of options per verb. Every other knob is a recipe field, reached by --set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional

from tinyfusion.config.recipe import Criterion, Dtype, Recovery, Sampler
from tinyfusion.core.errors import UserError
from tinyfusion.option_groups import Answers, Common, Opening, OpensModel, Trains, option

_BLOCKS = option("rows for transformer classes of diffusers that the shipped table lacks", "FILE")
_RESUME = option("checkpoint to go on from, instead of the newest in --out", "PATH")


@dataclass(frozen=True)
class Run(Trains, OpensModel):
    """The whole job: prune, recover, sample, evaluate, report.

    Example: tinyfusion run --recipe digits --out runs/digits
    """

    trained_sections = ("prune.training", "recover.training")

    out: Annotated[Path, option("run folder (required)", "PATH")] = Path()
    data: Annotated[str | None, option("data set", "NAME")] = None

    def fields(self) -> dict[str, Any]:
        return {"data.name": self.data}


@dataclass(frozen=True)
class Train(Trains):
    """A model from nothing.

    Example: tinyfusion train --recipe digits-teacher --out runs/digits-teacher
    """

    trained_sections = ("train",)

    out: Annotated[Path, option("run folder (required)", "PATH")] = Path()
    steps: Annotated[int | None, option("optimiser steps", "N")] = None
    resume: Annotated[Path | None, _RESUME] = None
    data: Annotated[str | None, option("data set", "NAME")] = None

    def fields(self) -> dict[str, Any]:
        return {"train.steps": self.steps, "data.name": self.data}


@dataclass(frozen=True)
class Prune(Trains, OpensModel):
    """Decide which blocks go: a plan and a cut, untuned student.

    Example: tinyfusion prune --recipe digits --teacher digits --out runs/cut
    """

    trained_sections = ("prune.training",)

    out: Annotated[Path, option("run folder (required)", "PATH")] = Path()
    teacher: Annotated[str | None, option("model to make shallow", "MODEL")] = None
    data: Annotated[str | None, option("data set", "NAME")] = None
    criterion: Annotated[
        Criterion | None, option(f"how blocks are chosen: {', '.join(get_args(Criterion))} (default learned)", "NAME")
    ] = None
    num_keep: Annotated[int | None, option("blocks that stay, of all criteria but learned (default half)", "N")] = None
    protect: Annotated[str | None, option("blocks that stay whatever the criterion says: 0,11", "I,J,..")] = None
    scheme: Annotated[str | None, option("learned: N:M keeps N of every M blocks; 2:4x3+3:4x4 is explicit", "N:M")] = (
        None
    )
    update: Annotated[
        Literal["lora", "full", "frozen"] | None, option("learned: what trains beside the gates", "lora|full|frozen")
    ] = None
    keep: Annotated[str | None, option("blocks to keep, instead of learning which: 0,2,4", "I,J,..")] = None
    steps: Annotated[int | None, option("learned: optimiser steps", "N")] = None
    blocks: Annotated[Path | None, _BLOCKS] = None
    resume: Annotated[Path | None, _RESUME] = None

    def fields(self) -> dict[str, Any]:
        keep = None if self.keep is None else _integers("--keep", self.keep)
        protect = None if self.protect is None else _integers("--protect", self.protect)
        if keep is not None and self.criterion not in (None, "indices"):
            raise UserError(
                f"--keep names the blocks to keep, so nothing is left to choose: leave out --criterion {self.criterion}"
            )
        if keep is not None and self.num_keep is not None:
            raise UserError("--keep names the blocks to keep, and so how many: leave out --num-keep")
        criterion = "indices" if keep is not None else self.criterion
        learning = {"--scheme": self.scheme, "--update": self.update, "--steps": self.steps}
        meant = [name for name, value in learning.items() if value is not None]
        if criterion not in (None, "learned") and meant:
            raise UserError(f"{meant[0]} is for criterion learned, not {criterion}: leave out one of the two")
        return {
            "teacher": self.teacher, "data.name": self.data, "prune.criterion": criterion, "prune.scheme": self.scheme,
            "prune.update": self.update, "prune.keep": keep, "prune.num_keep": self.num_keep, "prune.protect": protect,
            "prune.training.steps": self.steps,
        }  # fmt: skip


@dataclass(frozen=True)
class Recover(Trains, OpensModel):
    """Bring a cut model back to quality.

    Example: tinyfusion recover --recipe digits --teacher digits --student runs/cut --out runs/back
    """

    trained_sections = ("recover.training",)

    student: Annotated[Path, option("cut model, or the run folder of `prune` (required)", "PATH")] = Path()
    out: Annotated[Path, option("run folder (required)", "PATH")] = Path()
    teacher: Annotated[str | None, option("model to learn from; only finetune needs none", "MODEL")] = None
    data: Annotated[str | None, option("data set", "NAME")] = None
    method: Annotated[Recovery | None, option("how (default masked-kd)", "|".join(get_args(Recovery)))] = None
    steps: Annotated[int | None, option("optimiser steps", "N")] = None
    resume: Annotated[Path | None, _RESUME] = None

    def fields(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher, "data.name": self.data, "recover.method": self.method,
            "recover.training.steps": self.steps,
        }  # fmt: skip


@dataclass(frozen=True)
class Dynamic(Trains, OpensModel):
    """Make a model dynamic: width by timestep and tokens by content, trained under a budget, skipped when sampling.

    Example: tinyfusion dynamic --recipe digits-dynamic --model digits --target 0.5 --out runs/dynamic
    """

    trained_sections = ("dynamic.training",)

    model: Annotated[str, option("model or run folder; cut students too (required)", "MODEL")] = ""
    out: Annotated[Path, option("run folder (required)", "PATH")] = Path()
    target: Annotated[float | None, option("share of the blocks' multiply-accumulates that stays", "X")] = None
    data: Annotated[str | None, option("data set", "NAME")] = None
    teacher: Annotated[str | None, option("model to learn from, where dynamic.beside is teacher", "MODEL")] = None
    steps: Annotated[int | None, option("optimiser steps", "N")] = None
    resume: Annotated[Path | None, _RESUME] = None

    def fields(self) -> dict[str, Any]:
        return {
            "dynamic.target": self.target, "data.name": self.data, "teacher": self.teacher,
            "dynamic.training.steps": self.steps,
        }  # fmt: skip


@dataclass(frozen=True)
class Sample(OpensModel):
    """Draw images.

    Example: tinyfusion sample --recipe digits --model runs/back --labels 3,7 --out 37.npz --grid 37.png
    """

    model: Annotated[str, option("model or run folder (required)", "MODEL")] = ""
    out: Annotated[Path, option("npz of images (required)", "PATH")] = Path()
    grid: Annotated[Path | None, option("also write a picture of the first images", "PATH")] = None
    num_images: Annotated[int | None, option("images to draw", "N")] = None
    labels: Annotated[str | None, option("classes to draw in turn: 3,7", "I,J,..")] = None
    sampler: Annotated[
        Sampler | None,
        option("ancestral, DDIM, or the fast solvers DPM-Solver++ and UniPC", "|".join(get_args(Sampler))),
    ] = None
    num_steps: Annotated[
        int | None, option("denoising steps; of flows points in time, of masked models rounds", "N")
    ] = None
    guidance: Annotated[float | None, option("classifier-free guidance scale", "X")] = None
    batch_size: Annotated[int | None, option("images at a time", "N")] = None
    png: Annotated[Path | None, option("also write a folder of PNGs, 000000.png and so on", "PATH")] = None
    dtype: Annotated[
        Dtype | None, option("type of weights and activations (default float32)", "|".join(get_args(Dtype)))
    ] = None
    compile: Annotated[bool, option("compile the blocks")] = False
    vae: Annotated[str | None, option("autoencoder of a model of latents (default its own)", "PATH|ID")] = None

    def fields(self) -> dict[str, Any]:
        labels = None if self.labels is None else _integers("--labels", self.labels)
        return {
            "sample.num_images": self.num_images, "sample.labels": labels, "sample.sampler": self.sampler,
            "sample.num_steps": self.num_steps, "sample.guidance": self.guidance, "sample.batch_size": self.batch_size,
            "sample.dtype": self.dtype, "sample.compile": self.compile or None, "sample.vae": self.vae,
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluate(Common):
    """Images to FID, sFID, Inception Score, precision and recall.

    Example: tinyfusion evaluate --samples images.npz --reference digits --out fid.json
    """

    samples: Annotated[Path, option("npz or folder of images (required)", "PATH")] = Path()
    out: Annotated[Path, option("JSON of the numbers (required)", "PATH")] = Path()
    reference: Annotated[str | None, option("digits, digits:heldout, or a folder or npz of images", "NAME|PATH")] = None
    against: Annotated[
        Path | None, option("npz that another model drew from the same seeds: also PSNR and SSIM of the pairs", "PATH")
    ] = None


@dataclass(frozen=True)
class Report(Common):
    """One HTML page about one or several runs.

    Example: tinyfusion report runs/digits --out page.html
    """

    runs: Annotated[Positional[tuple[Path, ...]], option("run folders", "RUN")] = ()
    out: Annotated[Path, option("HTML file (required)", "PATH")] = Path()


@dataclass(frozen=True)
class Export(OpensModel):
    """A model as other programs read it: diffusers, the published scripts, or our own folder with a model card.

    Example: tinyfusion export --model runs/back --to diffusers --out student
    """

    model: Annotated[str, option("model or run folder (required)", "MODEL")] = ""
    to: Annotated[
        Literal["diffusers", "official", "single-file", "tinyfusion"] | None,
        option("format (required)", "diffusers|official|single-file|tinyfusion"),
    ] = None
    out: Annotated[Path, option("folder; of official a .safetensors or .pt file (required)", "PATH")] = Path()
    pipeline: Annotated[bool, option("diffusers: a whole DiTPipeline, with scheduler and autoencoder")] = False
    vae: Annotated[str | None, option("autoencoder of the pipeline (default that of the model)", "PATH|ID")] = None
    labels: Annotated[
        str | None,
        option("names of the classes for the pipeline: a line each, or JSON (default those of its source)", "FILE"),
    ] = None
    push_to_hub: Annotated[str | None, option("also upload the folder to this repository of the hub", "ORG/NAME")] = (
        None
    )
    blocks: Annotated[Path | None, _BLOCKS] = None


@dataclass(frozen=True)
class Encode(Common):
    """Pictures to latents that `--data latents:PATH` trains on; several processes share the work.

    Example: tinyfusion encode --data pictures --vae stabilityai/sd-vae-ft-ema --out latents
    """

    data: Annotated[
        str,
        option(
            "folder of pictures, parquet:PATH, hub:ORG/NAME, webdataset:PATH, or published features:PATH (required)",
            "NAME",
        ),
    ] = ""
    out: Annotated[Path, option("folder of the latents (required)", "PATH")] = Path()
    vae: Annotated[str | None, option("autoencoder (default stabilityai/sd-vae-ft-ema)", "PATH|ID")] = None
    size: Annotated[int | None, option("side of the centre crop in pixels (default 256)", "N")] = None
    batch_size: Annotated[int | None, option("pictures at a time", "N")] = None

    def fields(self) -> dict[str, Any]:
        return {"encode.vae": self.vae, "encode.size": self.size, "encode.batch_size": self.batch_size}


@dataclass(frozen=True)
class Inspect(Answers, Opening):
    """What a model is: family, sizes, depth, parameters, MACs, kept blocks, lineage, hash."""

    model: Annotated[Positional[str], option("model or run folder (required)", "MODEL")] = ""
    blocks: Annotated[Path | None, _BLOCKS] = None


@dataclass(frozen=True)
class Bench(OpensModel):
    """Speed of a guided denoising step: latency, memory, arithmetic; of two models, in turns.

    Example: tinyfusion bench runs/back --vs digits
    """

    model: Annotated[Positional[str], option("model or run folder (required)", "MODEL")] = ""
    vs: Annotated[str | None, option("model to compare with, measured in turns", "MODEL")] = None
    batch_size: Annotated[int | None, option("images per step", "N")] = None
    guidance: Annotated[float | None, option("classifier-free guidance scale; 1 runs no unconditional half", "X")] = (
        None
    )
    dtype: Annotated[
        Dtype | None, option("type of weights and activations (default float32)", "|".join(get_args(Dtype)))
    ] = None
    compile: Annotated[bool, option("compile the blocks")] = False
    repeats: Annotated[int | None, option("measurements of each side", "N")] = None

    def fields(self) -> dict[str, Any]:
        return {
            "bench.batch_size": self.batch_size, "sample.guidance": self.guidance, "bench.dtype": self.dtype,
            "bench.compile": self.compile or None, "bench.repeats": self.repeats,
        }  # fmt: skip


@dataclass(frozen=True)
class Replay(Common):
    """One step of a training again, every loss term of every sample: what happened at step N?

    Example: tinyfusion replay runs/back --step 40
    """

    run: Annotated[Positional[Path], option("run folder of train, prune or recover (required)", "RUN")] = Path()
    step: Annotated[int | None, option("number of the step, from 0 (required)", "N")] = None


@dataclass(frozen=True)
class Recipes(Answers):
    """The shipped recipes, with minutes and expected numbers; all that one of them expects; or every field that there is.

    Example: tinyfusion recipes digits
    """

    name: Annotated[Positional[str], option("all expected numbers of this recipe", "[NAME]")] = ""
    list_fields: Annotated[bool, option("list every field with its default and meaning")] = False


VERBS: dict[str, type[Answers]] = {
    "run": Run, "train": Train, "prune": Prune, "recover": Recover, "dynamic": Dynamic, "sample": Sample,
    "evaluate": Evaluate, "report": Report, "export": Export, "encode": Encode,
    "inspect": Inspect, "bench": Bench, "replay": Replay, "recipes": Recipes,
}  # fmt: skip
PARALLEL = (
    "run",
    "encode",
    "train",
    "prune",
    "recover",
    "dynamic",
    "sample",
)  # what several processes do together; the others are left to the first
POSITIONAL = {"report": "runs", "inspect": "model", "bench": "model", "replay": "run", "recipes": "name"}
REQUIRED = {
    "run": ("out", "recipe"), "train": ("out",), "prune": ("out",), "recover": ("student", "out"),
    "dynamic": ("model", "out"), "sample": ("model", "out"),
    "evaluate": ("samples", "out"), "report": ("runs", "out"), "export": ("model", "to", "out"), "encode": ("data", "out"),
    "inspect": ("model",),
    "bench": ("model",),
    "replay": ("run", "step"),
}  # fmt: skip


def _integers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"-?\d+", part) for part in parts):
        raise UserError(f"{option} wants whole numbers separated by commas, as in 0,2,4; got {text!r}")
    return [int(part) for part in parts]
