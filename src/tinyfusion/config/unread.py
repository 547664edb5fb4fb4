"""Fields that a command does not read: an option that is typed for it is refused, and a field of --set remarked on.

Fields of a recipe's file are not looked at: a recipe serves several verbs. `VERBS_OF` says which verbs read a field at all, `ROWS`
on what else that depends. Patterns of fields are as in a shell, and all that match hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError

EVEN = ("euler", "midpoint", "heun2", "heun3", "rk4")  # methods of ode that choose no step sizes
DATA_FREE = ("first", "last", "uniform", "random", "bk-sdm", "indices")  # criteria that look at no images


@dataclass(frozen=True)
class ModelKind:
    """What decides which fields are read of an opened model. process: None for a transformer of diffusers."""

    process: str | None
    of_latents: bool = False
    few_steps: bool = False
    null_class: bool = True
    folded: bool = False

    @property
    def transformer(self) -> bool:
        """Whether it is a transformer of diffusers, not a model of a family."""
        return self.process is None


@dataclass(frozen=True)
class Asked:
    """A command. given: its options that are no fields, by name. model: once it is opened."""

    verb: str
    recipe: Recipe
    given: Mapping[str, Any] = field(default_factory=dict)
    model: ModelKind = ModelKind("")

    @property
    def criterion(self) -> str:
        """The criterion of the recipe."""
        return self.recipe.prune.criterion

    @property
    def searches(self) -> bool:
        """Whether blocks are chosen within the recovery."""
        if self.verb == "recover":
            return not self.given.get("student")
        return self.verb == "run" and self.recipe.recover.search_share is not None and self.criterion == "learned"

    @property
    def method(self) -> str:
        """The method of the recovery; one that is not named becomes logits-kd in a search."""
        settings, named = self.recipe.recover, "recover.method" in self.recipe.assigned
        return "logits-kd" if self.searches and settings.compares_features and not named else settings.method

    @property
    def has_outputs(self) -> bool:
        """Whether a recovery learns from recorded outputs alone."""
        return bool(self.given.get("inputs")) and self.method == "logits-kd"

    @property
    def draws_prompts(self) -> bool:
        """Whether a pipeline of diffusers draws texts; files of encoded ones are for families."""
        prompts = self.recipe.data.prompts
        return bool(prompts) and not prompts.endswith(".safetensors")


_TRAIN = "train prune recover dynamic distill-steps run"
_SAMPLER = (
    "sample.sampler sample.num_steps sample.eta sample.guidance sample.guidance_channels sample.guidance_interval sample.clip "
    "sample.flow.* sample.masked.*"
)
_DRAWN = "sample.batch_size sample.quantize sample.decode_batch_size sample.label_rule sample.labels"
_GATES = (
    "prune.scheme prune.distribution prune.runs prune.gate_learning_rate prune.logit_init prune.temperature prune.scaling "
    "prune.subset_estimator prune.dropped"
)
_DELTAS = "prune.update prune.target prune.storage prune.keep_deltas prune.lora_rank prune.lora_alpha prune.training.*"
_SCORES = (
    "prune.calibration_images prune.calibration_batch_size prune.bi_inputs prune.sensitivity_order prune.bk_sdm_list "
    "prune.num_masks prune.width_share prune.width_threshold"
)
_STEPS = (
    "compute.parallel compute.shard_teacher compute.gradient_accumulation_steps compute.gradient_checkpointing compute.compile "
    "compute.prefetch_batches"
)
_SIZES = "model.input_size model.patch_size model.in_channels model.hidden_size model.depth model.num_heads model.num_classes"

# no result depends on these
HARMLESS = "compute.* *.checkpoint_every_steps *.checkpoints_limit prune.calibration_batch_size sample.batch_size sample.decode_batch_size"

VERBS_OF = {
    "teacher teacher_family": "run prune recover dynamic distill-steps explain",
    "seed": f"{_TRAIN} sample bench explain demo encode",
    "device": f"{_TRAIN} sample bench explain demo encode evaluate replay",
    "destination": "train prune run recover",
    "model.*": "train",
    "data.*": f"{_TRAIN} explain evaluate sample bench",
    "data.name": f"{_TRAIN} explain evaluate sample",
    "data.size data.orientation": f"{_TRAIN} explain evaluate",
    "data.window_images": f"{_TRAIN} explain",
    "data.flip data.augment": _TRAIN,
    "encode.*": "encode run",
    "compute.*": f"{_TRAIN} sample encode explain",
    f"{_STEPS} compute.tf32": _TRAIN,
    "watch.*": _TRAIN,
    "watch.grid_* watch.fid_*": "train recover dynamic distill-steps run",
    "flow.* masked.*": "train prune recover dynamic explain run",
    "flow.path flow.prediction": "train",
    "train.*": "train",
    "prune.*": "prune run recover",
    "recover.*": "recover run",
    "dynamic.*": "dynamic run",
    "distill_steps.*": "distill-steps run",
    "dynamic.in_run distill_steps.in_run": "run",
    "sample.*": f"{_TRAIN} sample explain bench demo export",
    "sample.weights": "prune recover dynamic distill-steps run sample explain bench demo export",
    _SAMPLER: "train recover dynamic distill-steps run sample explain bench demo export",
    _DRAWN: "train recover dynamic distill-steps run sample explain",
    "sample.num_images sample.compile": "sample run",
    "sample.dtype sample.decode": "sample explain run",
    "sample.label_rule": "train recover dynamic distill-steps sample run",
    "sample.vae sample.latent_scale sample.latent_shift": f"{_TRAIN} sample explain export",
    "sample.flow.* sample.masked.* sample.sampler sample.num_steps": f"{_TRAIN} sample explain bench export",
    "sample.eta sample.clip sample.guidance_channels sample.guidance_interval": f"{_TRAIN} sample explain bench export",
    "pipeline.*": "sample bench run train recover distill-steps",
    "pipeline.num_images pipeline.frames_per_second": "sample bench run train",
    "evaluate.*": f"{_TRAIN} evaluate",
    "evaluate.clip evaluate.neighbours evaluate.is_splits_size": "evaluate run",
    "evaluate.checkpoints": "run",
    "speed.*": "run",
    "bench.*": "bench run",
    "explain.*": "explain",
    "--recipe --set": f"{_TRAIN} sample explain bench demo export encode evaluate",
    "--overwrite": f"{_TRAIN} sample explain demo export encode evaluate report",
    "--dry-run": f"{_TRAIN} sample explain bench demo export encode evaluate report",
}
"""Patterns of fields, and of options that are no field, and the verbs that read them."""


@dataclass(frozen=True)
class Row:
    """Further fields that are read for `reader` alone, which may name values, as in {recipe.prune.criterion}.

    verbs: to which it applies; empty: all. of_model: whether `read` looks at the opened model.
    """

    fields: str
    reader: str
    read: Callable[[Asked], bool]
    verbs: str = ""
    of_model: bool = False


def _of_model(fields: str, reader: str, read: Callable[[ModelKind], bool], verbs: str = "") -> Row:
    return Row(fields, reader, lambda asked: read(asked.model), verbs, of_model=True)


def _for_criterion(fields: str, *criteria: str) -> Row:
    reader = f"criterion {' or '.join(criteria)}, not {{recipe.prune.criterion}}"
    return Row(fields, reader, lambda a: a.criterion in criteria, "prune run")


_NO_MASKS = "masks that are learned before the recovery"
ROWS = (
    # choosing blocks
    _for_criterion(f"{_GATES} {_DELTAS}", "learned"),
    Row(f"--resume data.flip data.augment {_STEPS} watch.*", "criterion learned, which trains, not {recipe.prune.criterion}",
        lambda a: a.criterion == "learned", "prune"),
    Row("data.size data.orientation data.window_images flow.* masked.*", "criteria that look at images, not {recipe.prune.criterion}",
        lambda a: a.criterion not in DATA_FREE, "prune"),
    _for_criterion("prune.keep", "indices"),
    _for_criterion("prune.bi_inputs", "bi"),
    _for_criterion("prune.sensitivity_order", "sensitivity"),
    _for_criterion("prune.bk_sdm_list", "bk-sdm"),
    _for_criterion("prune.num_masks", "min-loss", "median-loss", "max-loss"),
    _for_criterion("prune.width_*", "width"),
    Row("prune.calibration_*", "criteria that look at images, not {recipe.prune.criterion}",
        lambda a: a.criterion not in ("learned", *DATA_FREE), "prune run"),
    Row("prune.calibration_*", "criteria that look at images, not at --inputs", lambda a: not a.given.get("inputs"), "prune run"),
    Row("prune.protect", "criteria that remove blocks, not width", lambda a: a.criterion != "width", "prune run"),
    Row("prune.budgets prune.num_keep", "criteria that choose, and indices names the blocks",
        lambda a: a.criterion != "indices", "prune run"),
    Row("prune.budgets", "other criteria: learned keeps what its scheme says", lambda a: a.criterion != "learned", "prune run"),
    _of_model("prune.budgets", "transformers of diffusers, not models of families", lambda m: m.transformer, "prune run"),
    Row("prune.runs", "distribution runs", lambda a: a.recipe.prune.distribution == "runs"),
    Row("prune.subset_estimator", "distribution subset", lambda a: a.recipe.prune.distribution in (None, "subset")),
    Row("prune.lora_*", "--update lora, not {recipe.prune.update}", lambda a: a.recipe.prune.update == "lora"),
    # recovery
    Row("prune.* destination", "a search within the recovery, and --student is pruned already",
        lambda a: a.searches, "recover"),
    Row("recover.search_*", "whole models, and --student is pruned already", lambda a: a.searches, "recover"),
    Row("recover.search_*", "criterion learned, not {recipe.prune.criterion}", lambda a: a.criterion == "learned", "run"),
    Row("recover.search_confidence recover.search_candidates recover.search_trial_*", "searches within a recovery (recover.search_share)",
        lambda a: a.recipe.recover.search_share is not None),
    Row("recover.search_trial_*", "recover.search_candidates above 1", lambda a: a.recipe.recover.search_candidates > 1),
    Row(_DELTAS, _NO_MASKS, lambda a: not a.searches),
    Row(f"prune.keep prune.num_keep prune.budgets {_SCORES}", "`prune`: a search within the recovery learns which blocks stay",
        lambda a: a.verb != "recover"),
    Row("prune.criterion", "`prune`: a search within the recovery learns which blocks stay",
        lambda a: a.verb != "recover" or a.criterion == "learned"),
    Row("teacher teacher_family", "methods with a teacher, not finetune",
        lambda a: a.searches or a.method != "finetune", "recover"),
    Row("recover.alpha_kd masked.kl_at_zero", "methods with a teacher, not finetune",
        lambda a: a.method != "finetune", "recover run"),
    Row("teacher teacher_family", "methods with a teacher: --inputs has its outputs",
        lambda a: a.searches or not a.has_outputs, "recover"),
    Row("recover.alpha_kd", "methods with a target besides the teacher's outputs in --inputs", lambda a: not a.has_outputs, "recover"),
    Row("data.name data.size data.orientation data.window_images data.flip data.augment flow.* masked.*",
        "data, and --inputs takes their place", lambda a: not a.given.get("inputs"), "prune recover"),
    Row("recover.guidance", "methods with a teacher: --inputs has its outputs", lambda a: not a.has_outputs, "recover"),
    Row("recover.guidance", "methods with a teacher, not finetune", lambda a: a.method != "finetune", "recover run"),
    Row("sample.guidance_channels", "recover.guidance", lambda a: a.recipe.recover.guidance is not None or a.recipe.watch.draws, "recover"),
    Row("recover.beta", "rep-kd and masked-kd, which compare features", lambda a: a.method in ("rep-kd", "masked-kd")),
    Row("recover.mask recover.mask_sigmas", "method masked-kd", lambda a: a.method == "masked-kd"),
    Row("recover.mask", "recover.mask_sigmas", lambda a: a.recipe.recover.mask_sigmas is not None),
    Row("recover.lora_rank recover.lora_alpha", "recover.update=lora", lambda a: a.recipe.recover.update == "lora"),
    # routers, few steps
    Row("dynamic.*", "a run that trains routers (dynamic.in_run=true)", lambda a: a.recipe.dynamic.in_run, "run"),
    Row("teacher teacher_family", "dynamic.auxiliary=teacher", lambda a: a.recipe.dynamic.auxiliary == "teacher", "dynamic"),
    Row("dynamic.auxiliary_*", "an auxiliary loss, not dynamic.auxiliary=none", lambda a: a.recipe.dynamic.auxiliary != "none"),
    Row("dynamic.guidance", "dynamic.auxiliary=teacher", lambda a: a.recipe.dynamic.auxiliary == "teacher"),
    Row("dynamic.auxiliary_steps dynamic.training.label_drop", "targets besides the teacher (dynamic.guidance=none)",
        lambda a: a.recipe.dynamic.guidance in (None, 1)),
    Row("dynamic.width_bias", "dynamic.width", lambda a: a.recipe.dynamic.width),
    Row("dynamic.token_bias", "dynamic.tokens", lambda a: a.recipe.dynamic.tokens),
    Row("dynamic.block_bias", "dynamic.depth", lambda a: a.recipe.dynamic.depth),
    Row("distill_steps.*", "a run that distils steps (distill_steps.in_run=true)",
        lambda a: a.recipe.distill_steps.in_run, "run"),
    _of_model("evaluate.checkpoints speed.batch_size speed.steps_per_repeat speed.depths",
              "models of families, not transformers of diffusers", lambda m: not m.transformer, "run"),
    Row("distill_steps.within distill_steps.fresh_noise distill_steps.critic_learning_rate", "method matching",
        lambda a: a.recipe.distill_steps.method == "matching"),
    Row("distill_steps.teacher_steps distill_steps.end_power", "method consistency",
        lambda a: a.recipe.distill_steps.method == "consistency"),
    Row("sample.guidance", "distill_steps.guidance=none", lambda a: a.recipe.distill_steps.guidance is None, "distill-steps"),
    # training
    Row("watch.grid_images", "watch.grid_every_steps", lambda a: bool(a.recipe.watch.grid_every_steps)),
    Row("watch.fid_images", "watch.fid_every_steps", lambda a: bool(a.recipe.watch.fid_every_steps)),
    Row("watch.prompts", "watch.grid_every_steps or watch.fid_every_steps", lambda a: a.recipe.watch.draws),
    _of_model("watch.prompts", "transformers of diffusers, not models of families", lambda m: m.transformer),
    Row("watch.project", "watch.report_to", lambda a: bool(a.recipe.watch.report_to)),
    Row("evaluate.*", "watch.fid_every_steps", lambda a: bool(a.recipe.watch.fid_every_steps),
        "train prune recover dynamic distill-steps"),
    Row("sample.sampler sample.num_steps sample.eta sample.clip sample.flow.* sample.masked.*", "previews (section watch)",
        lambda a: a.recipe.watch.draws, "train recover distill-steps"),
    Row("sample.guidance sample.guidance_interval", "previews (section watch)", lambda a: a.recipe.watch.draws, "train recover"),
    Row("sample.guidance_channels", "previews (section watch)", lambda a: a.recipe.watch.draws, "train"),
    Row(_DRAWN, "previews (section watch)", lambda a: a.recipe.watch.draws, "train recover distill-steps"),
    Row("sample.batch_size sample.quantize sample.decode_batch_size", "previews (section watch)",
        lambda a: a.recipe.watch.draws, "dynamic"),
    Row("flow.logit_*", "flow.time_sampler=logit_normal", lambda a: a.recipe.flow.time_sampler == "logit_normal"),
    Row("flow.mode_scale", "flow.time_sampler=mode", lambda a: a.recipe.flow.time_sampler == "mode"),
    Row("flow.base_* flow.max_*", "flow.shift_type exponential or linear", lambda a: a.recipe.flow.shift_type != "static"),
    Row("flow.shift", "flow.shift_type static", lambda a: a.recipe.flow.shift_type == "static"),
    _of_model("flow.*", "models whose process is a flow", lambda m: m.transformer or m.process == "flow"),
    _of_model("flow.guidance", "transformers of diffusers, not models of families", lambda m: m.transformer),
    _of_model("pipeline.*", "transformers of diffusers, not models of families", lambda m: m.transformer,
              "train recover distill-steps run"),
    Row("pipeline.*", "previews (section watch)", lambda a: a.recipe.watch.draws, "recover"),
    Row("pipeline.[!gt]*", "previews (section watch)", lambda a: a.recipe.watch.draws, "distill-steps"),
    _of_model("masked.*", "masked models", lambda m: m.process == "masked"),
    _of_model(_SIZES, "models of families: a transformer of diffusers has model.sizes", lambda m: not m.transformer),
    _of_model("train.label_drop *.training.label_drop", "models with a class for no label", lambda m: m.null_class),
    Row("pipeline.[!fc]* pipeline.frames*", "drawing prompts", lambda a: a.verb != "train" or a.recipe.watch.draws),
    # drawing
    Row("sample.*", "models of families, and --prompts names texts, which a pipeline draws (section pipeline)",
        lambda a: not a.draws_prompts, "sample bench"),
    Row("pipeline.*", "prompts that a pipeline draws, and --prompts names no texts", lambda a: a.draws_prompts, "sample bench"),
    Row("pipeline.num_images pipeline.num_steps pipeline.frames_per_second", "whole drawings, not steps", lambda a: False, "bench"),
    Row("bench.batch_size bench.dtype bench.quantize", "models of families, and --prompts names texts (section pipeline)",
        lambda a: not a.draws_prompts, "bench"),
    Row("data.prompts", "text files, which a pipeline draws", lambda a: a.draws_prompts, "bench"),
    Row("sample.label_rule", "sampling without --labels", lambda a: not a.recipe.sample.labels),
    Row(f"{_SAMPLER} {_DRAWN} sample.dtype sample.decode", "drawn images (explain.drawn is 0)",
        lambda a: a.recipe.explain.drawn > 0, "explain"),
    Row(_SAMPLER, "--to onnx", lambda a: a.given.get("to") == "onnx", "export"),
    _of_model("sample.[!w]*", "models of families, not transformers of diffusers", lambda m: not m.transformer, "run"),
    _of_model("encode.* bench.*", "transformers of diffusers, not models of families", lambda m: m.transformer, "run"),
    _of_model(_SAMPLER, "models of many steps, and this one has its own few", lambda m: not m.few_steps, "sample bench"),
    _of_model("pipeline.num_steps", "models of many steps, and this one has its own few", lambda m: not m.few_steps, "sample bench"),
    _of_model("pipeline.guidance pipeline.true_guidance pipeline.negative_prompt",
              "models that are drawn under guidance, and this one has it in itself",
              lambda m: not (m.folded or m.few_steps), "sample bench"),
    _of_model("sample.guidance*", "models that are drawn under guidance, and this one has folded it in", lambda m: not m.folded,
              "sample bench explain demo export"),
    _of_model("sample.flow.*", "flows, not this model's process", lambda m: m.process == "flow"),
    _of_model("sample.masked.*", "masked models, not this model's process", lambda m: m.process == "masked"),
    Row("sample.eta", "--sampler ddim", lambda a: a.recipe.sample.sampler not in (None, "ddpm") or a.model.process != "gaussian",
        of_model=True),
    Row("sample.flow.base_* sample.flow.max_*", "sample.flow.shift_type exponential or linear",
        lambda a: a.recipe.sample.flow.shift_type != "static"),
    Row("sample.flow.shift", "sample.flow.shift_type static", lambda a: a.recipe.sample.flow.shift_type == "static"),
    Row("sample.flow.diffusion_* sample.flow.last_step*", "--sampler sde", lambda a: a.recipe.sample.sampler == "sde"),
    Row("sample.flow.atol sample.flow.rtol sample.flow.error_norm", "adaptive methods of --sampler ode",
        lambda a: a.recipe.sample.sampler != "sde" and a.recipe.sample.flow.method not in EVEN),
    Row("sample.masked.most_rounds", "sample.num_steps=none", lambda a: a.recipe.sample.num_steps is None),
    _of_model("sample.guidance_channels", "models that predict noise or velocities", lambda m: m.process != "masked"),
    _of_model("sample.vae sample.latent_* sample.decode*", "models of latents, and this model draws pixels", lambda m: m.of_latents,
              "sample explain run bench export"),
)  # fmt: skip


def _unread(name: str, asked: Asked, of_model: bool) -> str | None:
    """Why a field is not read, the rest of a sentence; None where it is, or is off anyway."""
    if not _value(name, asked.recipe):
        return None
    verbs = [verbs for patterns, verbs in VERBS_OF.items() if not of_model and _matches(name, patterns)]
    if other := next((verbs for verbs in verbs if asked.verb not in verbs.split()), None):
        return f"is not read by `{asked.verb}`, but by {', '.join(other.split())}"
    return other_reader(name, asked, of_model)


def other_reader(name: str, asked: Asked, of_model: bool = False) -> str | None:
    """What reads a field in place of this command by `ROWS`, as "is for ..."; None where the command reads it."""
    for row in ROWS:
        applies = row.of_model == of_model and _matches(name, row.fields)
        if applies and asked.verb in (row.verbs or asked.verb).split() and not row.read(asked):
            return f"is for {row.reader.format(recipe=asked.recipe)}"
    return None


def _value(name: str, recipe: Recipe) -> Any:
    """The value of a field; True of an option that is none, and below model.sizes."""
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part, True)
    return value


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def check_typed(asked: Asked, models: Sequence[ModelKind] | None = None) -> tuple[Recipe, list[str]]:
    """The recipe, whose `typed` lacks what is not read, and remarks on that.

    models: the opened ones, of which one has to read a field; None: before any is opened. An option is read where one of its
    fields is. Raises UserError on an option that is not read, unless no result depends on it; of `--set` there are remarks, as one
    list of settings may serve several commands.
    """
    typed, remarks = {}, []
    every = [asked] if models is None else [dataclasses.replace(asked, model=model) for model in models]
    for name, fields in asked.recipe.typed.items():
        why = {path: [_unread(path, each, models is not None) for each in every] for path in fields}
        read = tuple(path for path, reasons in why.items() if None in reasons or not reasons)
        if read:
            typed[name] = read
            continue
        reason = f"{name} {next(iter(why.values()))[0]}"
        if name.startswith("--") and not all(_matches(path, HARMLESS) for path in fields):
            raise UserError(f"{reason}: leave it out")
        remarks.append(f"{reason}; it is left out")
    return dataclasses.replace(asked.recipe, typed=typed), remarks
