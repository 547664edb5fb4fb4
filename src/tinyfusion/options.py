"""What can be typed: the options of every verb, as rows. Every other knob is a recipe field, reached by --set."""

from __future__ import annotations

import os
import re
import typing
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyfusion.config.loading import build, field_kind, nearest_choice
from tinyfusion.config.recipe import Criterion, Dtype, Recovery, Sampler
from tinyfusion.core.errors import UserError


@dataclass(frozen=True)
class Option:
    """`--name VALUE`; a flag where there is no metavar, a word without a name where it is positional.

    fields: the recipe fields that it sets, dotted; its value is of their kind, else of `kind`. many: it may be repeated.
    """

    name: str
    help: str
    metavar: str | None = None
    fields: tuple[str, ...] = ()
    kind: Any = str
    many: bool = False
    positional: bool = False

    @property
    def typed(self) -> str:
        """As it is typed."""
        return (self.metavar or "").strip("[]") if self.positional else f"--{self.name.replace('_', '-')}"

    def value(self, text: str) -> Any:
        """The value that a text stands for. Raises UserError where it stands for none."""
        kind = field_kind(self.fields[0]) if self.fields else self.kind
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is Literal and text not in typing.get_args(kind):
            names = sorted(typing.get_args(kind))
            hint = nearest_choice(text, names)
            raise UserError(f"{self.typed} is one of {', '.join(names)}; got {text!r}{hint}")
        if kind == tuple[int, ...] and not re.fullmatch(r"\[?\s*-?\d+(\s*,\s*-?\d+)*\s*,?\s*\]?", text):
            raise UserError(f"{self.typed} wants whole numbers separated by commas, as in 0,2,4; got {text!r}")
        with suppress(ValueError):
            if kind in (int, float):
                return kind(text)
        return Path(os.path.expanduser(text)) if kind is Path else build(kind, text, self.typed)


@dataclass(frozen=True)
class Verb:
    """What a verb does, an example of its arguments, and its options. parallel: several processes do it together."""

    summary: str
    example: str
    options: tuple[Option, ...]
    required: tuple[str, ...] = ()
    parallel: bool = False

    @property
    def words(self) -> Option | None:
        """The positional option."""
        return next((option for option in self.options if option.positional), None)


_ANSWERS = (
    Option("json", "make the last line of stdout machine-readable"),
    Option("debug", "show tracebacks"),
)
_WRITING = (
    Option("overwrite", "start anew where --out holds an earlier result of tinyfusion"),
    Option("dry_run", "check everything, print the plan, write nothing"),
)
_JOB = (
    Option("recipe", "shipped recipe by name, or a TOML file; see `tinyfusion recipes`", "NAME|FILE"),
    Option("set", "any recipe field, repeatable: --set section.field=value", "FIELD=VALUE", many=True),
    Option("seed", "seed of every draw (default 0)", "N", ("seed",)),
    Option("device", "auto, cpu, cuda or mps", "NAME", ("device",)),
    *_WRITING,
    *_ANSWERS,
)
_OPENING = (
    Option("weights", "averaged or raw weights, where both exist (default ema)", "ema|raw", ("sample.weights",)),
    Option("num_heads", "attention heads of an official file whose width is in no table", "N", kind=int),
    Option(
        "num_classes",
        "classes of an official file, without the null class: as many as its labels have rows, or one fewer",
        "N",
        kind=int,
    ),
    Option("family", "model family of an official file whose keys fit several", "NAME"),
)
_RESUME = Option("resume", "checkpoint to go on from, instead of the newest in --out", "PATH", kind=Path)
_FOR = Option("for", "format of the later export: the model computes what its readers compute, so that the export is exact",
              "diffusers|official", ("destination",))  # fmt: skip
_BLOCKS = Option("blocks", "rows for transformer classes of diffusers that the shipped table lacks", "FILE", kind=Path)
_RUN_FOLDER = Option("out", "run folder (required)", "PATH", kind=Path)
_DATA = Option("data", "data set", "NAME", ("data.name",))
_MODEL = Option("model", "model or run folder (required)", "MODEL")
_OF_MODEL = Option("model", "model or run folder (required)", "MODEL", positional=True)
_DTYPE = "type of weights and activations (default float32)"
_COMPILE = "compile the blocks"


def _trains(*sections: str) -> tuple[Option, ...]:
    """Options of verbs that train what these sections of the recipe say."""
    every = tuple(f"{section}.checkpoint_every_steps" for section in sections)
    limit = tuple(f"{section}.checkpoints_limit" for section in sections)
    accumulated = "parts in which a process goes through its share of a batch; the result stays"
    checkpointed = "run blocks again in the backward pass instead of keeping what is inside"
    return (
        Option("checkpointing_steps", "steps between two checkpoints", "N", every),
        Option("checkpoints_total_limit", "checkpoints kept, older ones are removed", "N", limit),
        Option("gradient_accumulation_steps", accumulated, "N", ("compute.gradient_accumulation_steps",)),
        Option("gradient_checkpointing", checkpointed, None, ("compute.gradient_checkpointing",)),
        Option("compile", "compile the blocks; an error where that gains nothing", None, ("compute.compile",)),
        Option("report_to", "trackers: tensorboard, wandb, trackio", "NAME,..", ("watch.report_to",)),
    )


def _choices(kind: Any) -> str:
    return "|".join(typing.get_args(kind))


VERBS = {
    "run": Verb(
        "The whole job: prune, recover, sample, evaluate, report.",
        "--recipe digits --out runs/digits",
        (*_JOB, *_OPENING, *_trains("prune.training", "recover.training"), _RUN_FOLDER, _DATA, _FOR),
        ("out", "recipe"),
        parallel=True,
    ),
    "train": Verb(
        "A model from nothing.",
        "--recipe digits-teacher --out runs/digits-teacher",
        (
            *_JOB, *_trains("train"), _RUN_FOLDER,
            Option("steps", "optimiser steps", "N", ("train.steps",)), _RESUME, _DATA, _FOR,
        ),
        ("out",),
        parallel=True,
    ),
    "prune": Verb(
        "Decide which blocks go: a plan and a cut, untuned student.",
        "--recipe digits --teacher digits --out runs/cut",
        (
            *_JOB, *_OPENING, *_trains("prune.training"), _RUN_FOLDER,
            Option("teacher", "model to make shallow", "MODEL", ("teacher",)),
            _DATA,
            Option("criterion", f"how blocks are chosen: {', '.join(typing.get_args(Criterion))} (default learned)", "NAME",
                   ("prune.criterion",)),
            Option("num_keep", "blocks that stay, of all criteria but learned (default half)", "N", ("prune.num_keep",)),
            Option("protect", "blocks that stay whatever the criterion says: 0,11", "I,J,..", ("prune.protect",)),
            Option("scheme", "learned: N:M keeps N of every M blocks; 2:4x3+3:4x4 is explicit", "N:M", ("prune.scheme",)),
            Option("update", "learned: what trains beside the gates", "lora|full|frozen", ("prune.update",)),
            Option("keep", "blocks to keep, instead of learning which: 0,2,4", "I,J,..", ("prune.keep",)),
            Option("steps", "learned: optimiser steps", "N", ("prune.training.steps",)),
            Option("inputs", "transformers of diffusers: what `record` wrote, for criteria that look at data", "FILE", kind=Path),
            _FOR,
            _BLOCKS,
            _RESUME,
        ),
        ("out",),
        parallel=True,
    ),
    "recover": Verb(
        "Bring a cut model back to quality.",
        "--recipe digits --teacher digits --student runs/cut --out runs/back",
        (
            *_JOB, *_OPENING, *_trains("recover.training"),
            Option("student", "cut model, or the run folder of `prune` (required)", "PATH", kind=Path),
            _RUN_FOLDER,
            Option("teacher", "model to learn from; only finetune needs none", "MODEL", ("teacher",)),
            _DATA,
            Option("method", "how (default masked-kd)", _choices(Recovery), ("recover.method",)),
            Option("steps", "optimiser steps", "N", ("recover.training.steps",)),
            _RESUME,
        ),
        ("student", "out"),
        parallel=True,
    ),
    "dynamic": Verb(
        "Make a model dynamic: width by timestep and tokens by content, trained under a budget, skipped when sampling.",
        "--recipe digits-dynamic --model digits --target 0.5 --out runs/dynamic",
        (
            *_JOB, *_OPENING, *_trains("dynamic.training"),
            Option("model", "model or run folder; cut students too (required)", "MODEL"),
            _RUN_FOLDER,
            Option("target", "share of the blocks' multiply-accumulates that stays", "X", ("dynamic.target",)),
            _DATA,
            Option("teacher", "model to learn from, where dynamic.beside is teacher", "MODEL", ("teacher",)),
            Option("steps", "optimiser steps", "N", ("dynamic.training.steps",)),
            _RESUME,
        ),
        ("model", "out"),
        parallel=True,
    ),
    "sample": Verb(
        "Draw images.",
        "--recipe digits --model runs/back --labels 3,7 --out 37.npz --grid 37.png",
        (
            *_JOB, *_OPENING, _MODEL,
            Option("out", "npz of images (required)", "PATH", kind=Path),
            Option("grid", "also write a picture of the first images", "PATH", kind=Path),
            Option("num_images", "images to draw", "N", ("sample.num_images",)),
            Option("labels", "classes to draw in turn: 3,7", "I,J,..", ("sample.labels",)),
            Option("prompts", "encoded prompts of a model of texts, which labels count", "PATH", ("data.prompts",)),
            Option("sampler", "ancestral, DDIM, or the fast solvers DPM-Solver++ and UniPC", _choices(Sampler),
                   ("sample.sampler",)),
            Option("num_steps", "denoising steps; of flows points in time, of masked models rounds", "N",
                   ("sample.num_steps",)),
            Option("guidance", "classifier-free guidance scale", "X", ("sample.guidance",)),
            Option("batch_size", "images at a time", "N", ("sample.batch_size",)),
            Option("png", "also write a folder of PNGs, 000000.png and so on", "PATH", kind=Path),
            Option("dtype", _DTYPE, _choices(Dtype), ("sample.dtype",)),
            Option("compile", _COMPILE, None, ("sample.compile",)),
            Option("vae", "autoencoder of a model of latents (default its own)", "PATH|ID", ("sample.vae",)),
        ),
        ("model", "out"),
        parallel=True,
    ),
    "evaluate": Verb(
        "Images to FID, sFID, Inception Score, precision and recall.",
        "--samples images.npz --reference digits --out fid.json",
        (
            *_JOB,
            Option("samples", "npz or folder of images (required)", "PATH", kind=Path),
            Option("out", "JSON of the numbers (required)", "PATH", kind=Path),
            Option("reference", "digits, digits:heldout, or a folder or npz of images", "NAME|PATH"),
            Option("against", "npz that another model drew from the same seeds: also PSNR and SSIM of the pairs", "PATH",
                   kind=Path),
        ),
        ("samples", "out"),
    ),
    "report": Verb(
        "One HTML page about one or several runs.",
        "runs/digits --out page.html",
        (
            *_JOB,
            Option("runs", "run folders", "RUN", kind=Path, many=True, positional=True),
            Option("out", "HTML file (required)", "PATH", kind=Path),
        ),
        ("runs", "out"),
    ),
    "export": Verb(
        "A model as other programs read it: diffusers, the published scripts, or our own folder with a model card.",
        "--model runs/back --to diffusers --out student",
        (
            *_JOB, *_OPENING, _MODEL,
            Option("to", "format (required)", "diffusers|official|single-file|tinyfusion",
                   kind=Literal["diffusers", "official", "single-file", "tinyfusion"]),
            Option("out", "folder; of official a .safetensors or .pt file (required)", "PATH", kind=Path),
            Option("pipeline", "diffusers: a whole DiTPipeline, with scheduler and autoencoder"),
            Option("vae", "autoencoder of the pipeline (default that of the model)", "PATH|ID"),
            Option("labels", "names of the classes for the pipeline: a line each, or JSON (default those of its source)", "FILE"),
            Option("push_to_hub", "also upload the folder to this repository of the hub", "ORG/NAME"),
            _BLOCKS,
        ),
        ("model", "to", "out"),
    ),
    "encode": Verb(
        "Pictures to latents that `--data latents:PATH` trains on; several processes share the work.",
        "--data pictures --vae stabilityai/sd-vae-ft-ema --out latents",
        (
            *_JOB,
            Option("data", "folder of pictures, parquet:PATH, hub:ORG/NAME, webdataset:PATH, or published features:PATH "
                   "(required)", "NAME"),
            Option("out", "folder of the latents (required)", "PATH", kind=Path),
            Option("vae", "autoencoder (default stabilityai/sd-vae-ft-ema)", "PATH|ID", ("encode.vae",)),
            Option("size", "side of the centre crop in pixels (default 256)", "N", ("encode.size",)),
            Option("batch_size", "pictures at a time", "N", ("encode.batch_size",)),
        ),
        ("data", "out"),
        parallel=True,
    ),
    "inspect": Verb(
        "What a model is: family, sizes, depth, parameters, MACs, kept blocks, lineage, hash.",
        "",
        (
            *_OPENING, *_ANSWERS, _OF_MODEL, _BLOCKS,
            Option("inputs", "transformers of diffusers: what `record` wrote, to count the MACs of a call of its size", "FILE", kind=Path),
        ),
        ("model",),
    ),
    "record": Verb(
        "The inputs of a transformer of diffusers while its pipeline draws prompts: what `prune --inputs` scores blocks on.",
        "FLUX.1-dev --prompts prompts.txt --out inputs.safetensors",
        (
            Option("pipeline", "folder of the pipeline, or hub id (required)", "PIPELINE", positional=True),
            Option("prompts", "text file, one prompt a line (required)", "FILE", kind=Path),
            Option("out", "a .safetensors file (required)", "FILE", kind=Path),
            Option("component", "the transformer, where the pipeline has several, such as transformer_2", "NAME"),
            Option("calls", "calls per prompt that are written, spread over the trajectory (default 4)", "N", kind=int),
            Option("steps", "denoising steps (this and the next four: default that of the pipeline)", "N", kind=int),
            Option("guidance_scale", "guidance scale", "X", kind=float),
            Option("height", "height in pixels", "N", kind=int),
            Option("width", "width in pixels", "N", kind=int),
            Option("frames", "frames of a video", "N", kind=int),
            Option("seed", "seed of every draw (default 0)", "N", kind=int),
            Option("device", "auto, cpu, cuda or mps", "NAME"),
            _BLOCKS,
            *_WRITING,
            *_ANSWERS,
        ),
        ("pipeline", "prompts", "out"),
    ),
    "lora": Verb(
        "A LoRA, IP-adapter or ControlNet of an uncut model, for its student: else it acts on other blocks, and no tool says so.",
        "style.safetensors --model runs/flux --out style-student.safetensors",
        (
            *_ANSWERS,
            Option("file", "LoRA or IP-adapter of an uncut model, or ControlNet folder (required)", "FILE", kind=Path, positional=True),
            Option("model", "folder of the student, a transformer of diffusers (required)", "PATH", kind=Path),
            Option("out", "the new one: a .safetensors file, or a folder (required)", "FILE", kind=Path),
            Option("trained_on", "the model of FILE: first of the student's lineage (default) or its last parent",
                   "original|parent", kind=Literal["original", "parent"]),
            Option("form", "names of the keys: as in FILE (default), or peft's", "same|peft", kind=Literal["same", "peft"]),
            Option("blocks", "rows of your own transformer classes, a TOML file", "FILE", kind=Path),
            *_WRITING,
        ),
        ("file", "model", "out"),
    ),
    "bench": Verb(
        "Speed of a guided denoising step: latency, memory, arithmetic; of two models, in turns.",
        "runs/back --vs digits",
        (
            *_JOB, *_OPENING, _OF_MODEL,
            Option("vs", "model to compare with, measured in turns", "MODEL"),
            Option("batch_size", "images per step", "N", ("bench.batch_size",)),
            Option("guidance", "classifier-free guidance scale; 1 runs no unconditional half", "X", ("sample.guidance",)),
            Option("dtype", _DTYPE, _choices(Dtype), ("bench.dtype",)),
            Option("compile", _COMPILE, None, ("bench.compile",)),
            Option("repeats", "measurements of each side", "N", ("bench.repeats",)),
        ),
        ("model",),
    ),
    "replay": Verb(
        "One step of a training again, every loss term of every sample: what happened at step N?",
        "runs/back --step 40",
        (
            *_JOB,
            Option("run", "run folder of train, prune or recover (required)", "RUN", kind=Path, positional=True),
            Option("step", "number of the step, from 0 (required)", "N", kind=int),
        ),
        ("run", "step"),
    ),
    "recipes": Verb(
        "The shipped recipes, with minutes and expected numbers; all that one of them expects; or every field that there is.",
        "digits",
        (
            *_ANSWERS,
            Option("name", "all expected numbers of this recipe", "[NAME]", positional=True),
            Option("list_fields", "list every field with its default and meaning"),
        ),
    ),
}  # fmt: skip
