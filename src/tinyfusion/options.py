"""What can be typed: the options of every verb, as rows. Every other setting is a recipe field, reached by --set."""

from __future__ import annotations

import os
import re
import typing
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tinyfusion.config.loading import build, field_help, field_kind, nearest_choice
from tinyfusion.config.recipe import Dtype, Recovery, Sampler, StepDistillation
from tinyfusion.core.errors import UserError


@dataclass(frozen=True)
class Option:
    """`--name VALUE`; a flag without a metavar, a word without a name if positional.

    about: its help; empty: that of the first field. fields: the recipe fields that it sets, dotted; its value is of their
    kind, else of `kind`. many: it may be repeated.
    """

    name: str
    about: str = ""
    metavar: str | None = None
    fields: tuple[str, ...] = ()
    kind: Any = str
    many: bool = False
    positional: bool = False
    required: bool = False

    @property
    def help(self) -> str:
        """The text of --help."""
        return (self.about or field_help(self.fields[0])) + " (required)" * self.required

    @property
    def typed(self) -> str:
        """As it is typed."""
        return (self.metavar or "").strip("[]") if self.positional else f"--{self.name.replace('_', '-')}"

    def value(self, text: str) -> Any:
        """The value of a text. Raises UserError where it is none."""
        kind = field_kind(self.fields[0]) if self.fields else self.kind
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is Literal and text not in typing.get_args(kind):
            names = sorted(typing.get_args(kind))
            raise UserError(f"{self.typed} is one of {', '.join(names)}; got {text!r}{nearest_choice(text, names)}")
        if kind == tuple[int, ...] and not re.fullmatch(r"\[?\s*-?\d+(\s*,\s*-?\d+)*\s*,?\s*\]?", text):
            raise UserError(f"{self.typed} wants whole numbers separated by commas, as in 0,2,4; got {text!r}")
        with suppress(ValueError):
            if kind in (int, float):
                return kind(text)
        return Path(os.path.expanduser(text)) if kind is Path else build(kind, text, self.typed)


@dataclass(frozen=True)
class Verb:
    """Summary, example arguments and options of a verb. parallel: several processes share the work."""

    summary: str
    example: str
    options: tuple[Option, ...]
    parallel: bool = False


_ANSWERS = (Option("json", "make the last line of stdout machine-readable"), Option("debug", "show tracebacks"))
_WRITING = (
    Option("overwrite", "replace an earlier result of tinyfusion at --out"),
    Option("dry_run", "check everything, print the plan, write nothing"),
)
_RECIPE = Option("recipe", "shipped recipe by name, or a TOML file; see `tinyfusion recipes`", "NAME|FILE")
_JOB = (
    _RECIPE,
    Option("set", "any recipe field, repeatable: --set section.field=value", "FIELD=VALUE", many=True),
    Option("seed", "", "N", ("seed",)),
    Option("device", "", "NAME", ("device",)),
    *_WRITING,
    *_ANSWERS,
)
_OPENING = (
    Option("weights", "", "ema|raw", ("sample.weights",)),
    Option("num_heads", "attention heads of an official file whose width is in no table", "N", kind=int),
    Option("num_classes", "classes of an official file: as many as its labels have rows, or one fewer", "N", kind=int),
    Option("family", "model family of an official file whose keys fit several", "NAME"),
)
_RESUME = Option("resume", "checkpoint to resume, instead of the newest in --out", "PATH", kind=Path)
_FOR = Option("for", "", "diffusers|official", ("destination",))
_INPUTS = Option(
    "inputs", "transformers of diffusers: output of `record`, to train on, or to score blocks on", "PATH", kind=Path
)
_BLOCKS = Option("blocks", "rows for transformer classes of diffusers that the shipped table lacks", "FILE", kind=Path)
_LINES = "one a line, JSON lines, or a JSON list"  # what a file of prompts is
_PIPELINE = (  # of prompts that a pipeline of diffusers draws
    Option("pipeline", "", "PATH|ID", ("pipeline.folder",)),
    Option("component", "", "NAME", ("pipeline.component",)),
    Option("height", "", "N", ("pipeline.height",)),
    Option("width", "", "N", ("pipeline.width",)),
    Option("frames", "", "N", ("pipeline.frames",)),
)
_RUN_FOLDER = Option("out", "run folder", "PATH", kind=Path, required=True)
_DATA = Option("data", "data set; see data.name in `tinyfusion recipes --list-fields`", "NAME", ("data.name",))
_TEACHER = Option("teacher", "", "MODEL", ("teacher",))
_MODEL = Option("model", "model or run folder", "MODEL", required=True)
_OF_MODEL = Option("model", "model or run folder", "MODEL", positional=True, required=True)


def _choices(kind: Any) -> str:
    return "|".join(typing.get_args(kind))


def _trains(*sections: str) -> tuple[Option, ...]:
    """Options of verbs that train with these sections of the recipe."""
    every = tuple(f"{section}.checkpoint_every_steps" for section in sections)
    limit = tuple(f"{section}.checkpoints_limit" for section in sections)
    return (
        Option("checkpointing_steps", "", "N", every),
        Option("checkpoints_total_limit", "", "N", limit),
        Option("gradient_accumulation_steps", "", "N", ("compute.gradient_accumulation_steps",)),
        Option("gradient_checkpointing", "", None, ("compute.gradient_checkpointing",)),
        Option("compile", "", None, ("compute.compile",)),
        Option("report_to", "", "NAME,..", ("watch.report_to",)),
    )


VERBS = {
    "run": Verb(
        "The whole job: prune, recover, sample, evaluate, report.",
        "--recipe digits --out runs/digits",
        (
            replace(_RECIPE, required=True), *_JOB[1:], *_OPENING, *_trains("prune.training", "recover.training"), _RUN_FOLDER,
            _DATA, _FOR, _INPUTS, _BLOCKS,
            Option("prompts", f"transformers of diffusers: prompts to draw, {_LINES} (default captions of the data)",
                   "PATH", ("data.prompts",)),
        ),
        parallel=True,
    ),
    "train": Verb(
        "Train a new model.",
        "--recipe digits-teacher --out runs/digits-teacher",
        (*_JOB, *_trains("train"), _RUN_FOLDER, Option("steps", "", "N", ("train.steps",)), _RESUME, _DATA, _FOR),
        parallel=True,
    ),
    "prune": Verb(
        "Choose the blocks to remove: a plan and a pruned student, not yet recovered.",
        "--recipe digits --teacher digits --out runs/pruned",
        (
            *_JOB, *_OPENING, *_trains("prune.training"), _RUN_FOLDER, _TEACHER, _DATA,
            Option("criterion", "", "NAME", ("prune.criterion",)),
            Option("num_keep", "", "N", ("prune.num_keep",)),
            Option("protect", "", "I,J,..", ("prune.protect",)),
            Option("scheme", "", "N:M", ("prune.scheme",)),
            Option("update", "", "lora|full|frozen", ("prune.update",)),
            Option("keep", "blocks to keep (criterion indices): 0,2,4", "I,J,..", ("prune.keep",)),
            Option("steps", "learned: optimiser steps", "N", ("prune.training.steps",)),
            _INPUTS, _FOR, _BLOCKS, _RESUME,
        ),
        parallel=True,
    ),
    "recover": Verb(
        "Recover the quality of a pruned model.",
        "--recipe digits --teacher digits --student runs/pruned --out runs/recovered",
        (
            *_JOB, *_OPENING, *_trains("recover.training"),
            Option("student", "pruned model, or the run folder of `prune`; none: --teacher is pruned within the recovery", "PATH",
                   kind=Path),
            Option("search_share", "", "X", ("recover.search_share",)), Option("guidance", "", "X", ("recover.guidance",)),
            Option("scheme", "", "N:M", ("prune.scheme",)),
            _RUN_FOLDER, _TEACHER, _DATA,
            Option("method", "", _choices(Recovery), ("recover.method",)),
            Option("steps", "", "N", ("recover.training.steps",)),
            _INPUTS, _BLOCKS, _RESUME,
        ),
        parallel=True,
    ),
    "dynamic": Verb(
        "Make a model dynamic: width by timestep and tokens by content, trained under a budget, skipped when sampling.",
        "--recipe digits-dynamic --model digits --target 0.5 --out runs/dynamic",
        (
            *_JOB, *_OPENING, *_trains("dynamic.training"), _MODEL, _RUN_FOLDER,
            Option("target", "", "X", ("dynamic.target",)),
            _DATA, _TEACHER,
            Option("steps", "", "N", ("dynamic.training.steps",)),
            _RESUME,
        ),
        parallel=True,
    ),
    "distill-steps": Verb(
        "Train a model to draw in few steps what its teacher draws in many, guidance included.",
        "--recipe digits-4-steps --model runs/recovered --teacher digits --out runs/fast",
        (
            *_JOB, *_OPENING, *_trains("distill_steps.training"), _MODEL, _RUN_FOLDER,
            Option("num_steps", "", "N", ("distill_steps.num_steps",)),
            Option("method", "", _choices(StepDistillation), ("distill_steps.method",)),
            Option("guidance", "", "X", ("distill_steps.guidance",)),
            _DATA, _TEACHER,
            Option("steps", "", "N", ("distill_steps.training.steps",)),
            _BLOCKS, _RESUME,
        ),
        parallel=True,
    ),
    "sample": Verb(
        "Draw images.",
        "--recipe digits --model runs/recovered --labels 3,7 --out 37.npz --grid 37.png",
        (
            *_JOB, *_OPENING, _MODEL,
            Option("out", "npz of images", "PATH", kind=Path, required=True),
            Option("grid", "also write a picture of the first images", "PATH", kind=Path),
            Option("num_images", "", "N", ("sample.num_images", "pipeline.num_images")),
            Option("labels", "", "I,J,..", ("sample.labels",)),
            Option("prompts", f"transformers of diffusers: prompts, {_LINES}; text models: a file of encoded ones",
                   "PATH", ("data.prompts",)),
            Option("sampler", "", _choices(Sampler), ("sample.sampler",)),
            Option("num_steps", "", "N", ("sample.num_steps", "pipeline.num_steps")),
            Option("guidance", "", "X", ("pipeline.guidance", "sample.guidance")),
            Option("batch_size", "", "N", ("sample.batch_size", "pipeline.batch_size")),
            Option("png", "also write a folder of PNGs, 000000.png and so on", "PATH", kind=Path),
            Option("dtype", "", _choices(Dtype), ("sample.dtype", "pipeline.dtype")),
            Option("compile", "", None, ("sample.compile",)),
            Option("quantize", "", "int8", ("sample.quantize",)),
            Option("vae", "", "PATH|ID", ("sample.vae",)),
            *_PIPELINE, _BLOCKS,
        ),
        parallel=True,
    ),
    "evaluate": Verb(
        "Images to FID, sFID, Inception Score, precision and recall.",
        "--samples images.npz --reference digits --out fid.json",
        (
            *_JOB,
            Option("samples", "npz or folder of images", "PATH", kind=Path, required=True),
            Option("out", "JSON of the metrics", "PATH", kind=Path, required=True),
            Option("reference", "digits, digits:heldout, or a folder or npz of images", "NAME|PATH"),
            Option("against", "npz of another model from the same seeds: PSNR, SSIM and LPIPS of the pairs", "PATH", kind=Path),
            Option("clip", "", "PATH|ID", ("evaluate.clip",)),
            Option("prompts", f"prompts of the images, {_LINES} (default those in the record of the npz)", "PATH",
                   ("data.prompts",)),
        ),
    ),
    "report": Verb(
        "One HTML page about one or several runs.",
        "runs/digits --out page.html",
        (
            *_JOB,
            Option("runs", "run folders", "RUN", kind=Path, many=True, positional=True, required=True),
            Option("out", "HTML file", "PATH", kind=Path, required=True),
        ),
    ),
    "export": Verb(
        "Convert a model for other programs: diffusers, the published scripts, or our own folder with a model card.",
        "--model runs/recovered --to diffusers --out student",
        (
            *_JOB, *_OPENING, _MODEL,
            Option("to", "format", "diffusers|official|onnx|single-file|tinyfusion",
                   kind=Literal["diffusers", "official", "onnx", "single-file", "tinyfusion"], required=True),
            Option("out", "folder; of official a .safetensors or .pt file", "PATH", kind=Path, required=True),
            Option("pipeline", "diffusers: a whole DiTPipeline, with scheduler and autoencoder"),
            Option("vae", "autoencoder of the pipeline (default that of the model)", "PATH|ID"),
            Option("labels", "names of the classes for the pipeline: one per line, or JSON (default those of its source)", "FILE"),
            Option("guided", "onnx: the graph of the guided denoiser, with the input `guidance`, at twice the work"),
            Option("quantize", "onnx: int8 products (int8), or weights of 8 bits alone (int8-weights)", "int8|int8-weights",
                   kind=Literal["int8", "int8-weights"]),
            Option("inputs", "onnx of transformers of diffusers: output of `record`, whose calls have the sizes of the graph", "PATH",
                   kind=Path),
            Option("push_to_hub", "also upload the folder to this repository of the hub", "ORG/NAME"),
            _BLOCKS,
        ),
    ),
    "demo": Verb(
        "A page of static files on which models draw in the browser, side by side from the same noise.",
        "runs/recovered --vs digits --out page",
        (
            *_JOB, *_OPENING, _OF_MODEL,
            Option("vs", "model to draw side by side with", "MODEL"),
            Option("out", "folder of the page", "PATH", kind=Path, required=True),
            Option("guidance", "", "X", ("sample.guidance",)),
            Option("labels", "names of the classes: one per line, or JSON (default their numbers)", "FILE", kind=Path),
            Option("runtime", "the npm package onnxruntime-web, packed or unpacked (default fetched once by npm)", "PATH", kind=Path),
        ),
    ),
    "encode": Verb(
        "Pictures to latents for `--data latents:PATH`, captions to embeddings; several processes share the work.",
        "--data pictures --vae stabilityai/sd-vae-ft-ema --out latents",
        (
            *_JOB,
            Option("data", "folder of pictures, parquet:PATH, hub:ORG/NAME, webdataset:PATH, published features:PATH; with --pipeline "
                   "also a .jsonl file of pictures and captions", "NAME"),
            Option("out", "folder of the latents", "PATH", kind=Path, required=True),
            Option("vae", "", "PATH|ID", ("encode.vae",)),
            Option("pipeline", "", "PATH|ID", ("encode.pipeline",)),
            Option("caption_column", "", "NAME", ("encode.caption_column",)),
            Option("prompts", f"with --pipeline, in place of --data: prompts, {_LINES}", "FILE", kind=Path),
            Option("size", "", "N", ("encode.size",)),
            Option("buckets", "", "HxW,..", ("encode.sizes",)),
            Option("frames", "", "N", ("encode.frames",)),
            Option("batch_size", "", "N", ("encode.batch_size",)),
        ),
        parallel=True,
    ),
    "inspect": Verb(
        "Describe a model: family, sizes, depth, parameters, MACs, kept blocks, lineage, hash.",
        "",
        (
            *_OPENING, *_ANSWERS, _OF_MODEL, _BLOCKS,
            Option("inputs", "transformers of diffusers: output of `record`, whose sizes the MACs are counted for", "PATH", kind=Path),
        ),
    ),
    "record": Verb(
        "Inputs and outputs of a transformer of diffusers while its pipeline draws prompts, for --inputs of other verbs; several "
        "processes share the shards of a folder.",
        "FLUX.1-dev --prompts prompts.txt --out inputs.safetensors",
        (
            Option("pipeline", "folder of the pipeline, or hub id", "PIPELINE", positional=True, required=True),
            Option("prompts", f"file of prompts, {_LINES}", "FILE", kind=Path, required=True),
            Option("out", "a .safetensors file or, of many prompts, a folder (a name without suffix)", "PATH", kind=Path, required=True),
            Option("component", "the transformer, where the pipeline has several, such as transformer_2", "NAME"),
            Option("calls", "calls per prompt that are written, spread over the trajectory, or all (default 4)", "N|all"),
            Option("shard_prompts", "of a folder: prompts of a shard, which is in memory and lost by a kill (default 8)", "N", kind=int),
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
        parallel=True,
    ),
    "lora": Verb(
        "Renumber a LoRA, IP-adapter or ControlNet of an unpruned model for its student; without this it acts on other blocks.",
        "style.safetensors --model runs/flux --out style-student.safetensors",
        (
            *_ANSWERS,
            Option("file", "LoRA or IP-adapter of the unpruned model, or ControlNet folder", "FILE", kind=Path, positional=True,
                   required=True),
            Option("model", "folder of the student, a transformer of diffusers", "PATH", kind=Path, required=True),
            Option("out", "the new file (.safetensors), or folder", "FILE", kind=Path, required=True),
            Option("trained_on", "the model of FILE: first of the student's lineage (default) or its last parent",
                   "original|parent", kind=Literal["original", "parent"]),
            Option("form", "names of the keys: as in FILE (default), or peft's", "same|peft", kind=Literal["same", "peft"]),
            _BLOCKS, *_WRITING,
        ),
    ),
    "bench": Verb(
        "Speed of a guided denoising step: latency, memory, arithmetic; of two models, in turns.",
        "runs/recovered --vs digits",
        (
            *_JOB, *_OPENING, _OF_MODEL,
            Option("vs", "model to compare with, measured in turns", "MODEL"),
            Option("batch_size", "", "N", ("bench.batch_size", "pipeline.batch_size")),
            Option("guidance", "", "X", ("pipeline.guidance", "sample.guidance")),
            Option("dtype", "", _choices(Dtype), ("bench.dtype", "pipeline.dtype")),
            Option("compile", "", None, ("bench.compile",)),
            Option("quantize", "", "int8", ("bench.quantize",)),
            Option("repeats", "", "N", ("bench.repeats",)),
            Option("prompts", f"transformers of diffusers: prompts that their pipelines draw, {_LINES}", "PATH",
                   ("data.prompts",)),
            *_PIPELINE, _BLOCKS,
        ),
    ),
    "explain": Verb(
        "What each block does: loss and drawn images without it, by timestep and class; of a student also which teacher block it is like.",
        "runs/recovered --out runs/recovered-explained",
        (
            *_JOB, *_OPENING, _OF_MODEL, _RUN_FOLDER,
            replace(_TEACHER, about="model whose blocks are compared (default that of the run that made the model, else itself)"),
            _DATA,
            Option("num_images", "", "N", ("explain.images",)),
            Option("drawn", "", "N", ("explain.drawn",)),
            Option("labels", "", "I,J,..", ("sample.labels",)),
            Option("guidance", "", "X", ("sample.guidance",)),
            Option("vae", "", "PATH|ID", ("sample.vae",)),
        ),
    ),
    "replay": Verb(
        "Repeat one step of a training, with every loss term of every sample.",
        "runs/recovered --step 40",
        (
            *_JOB,
            Option("run", "run folder of train, prune or recover", "RUN", kind=Path, positional=True, required=True),
            Option("step", "number of the step, from 0", "N", kind=int, required=True),
        ),
    ),
    "recipes": Verb(
        "List the shipped recipes with minutes and expected numbers, all expected numbers of one, or every field.",
        "digits",
        (
            *_ANSWERS,
            Option("name", "all expected numbers of this recipe", "[NAME]", positional=True),
            Option("list_fields", "list every field with its default and meaning"),
        ),
    ),
}  # fmt: skip
