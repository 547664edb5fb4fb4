"""Settings of the library: within the limits of recipes, and read by the function that takes them.

Messages of the verbs name their options; `in_python_words` names arguments and fields instead.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from tinyfusion.config.loading import checked
from tinyfusion.config.recipe import (
    ComputeSection,
    DistillStepsSection,
    PruneSection,
    Recipe,
    RecoverSection,
    SampleSection,
    TrainingSection,
)
from tinyfusion.config.unread import Asked, other_reader
from tinyfusion.core.errors import UserError
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.prune.layout import gate_layout

P = ParamSpec("P")
T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------ words of messages

_SECTIONS = {
    "prune": "PruneSection", "recover": "RecoverSection", "distill_steps": "DistillStepsSection", "sample": "SampleSection",
    "compute": "ComputeSection",
}  # fmt: skip
_REPLAY = re.compile(r"`tinyfusion replay [^`]*` shows it sample by sample; ")
_FIELD = re.compile(rf"(?:--set )?(?<![\w.])({'|'.join(_SECTIONS)})\.(?=[a-z])")
_OPTION = re.compile(r"(?<![\w-])--(?:set )?([a-z][a-z-]*)")


def in_python_words(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose UserErrors name arguments and fields of sections instead of options and recipes."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            error.args = (python_words(str(error)), *error.args[1:])
            raise

    return call


def python_words(message: str) -> str:
    """The message with `num_keep` for --num-keep, and `PruneSection.runs=2` for --set prune.runs=2; commands in backticks stay."""
    pieces = _REPLAY.sub("", message).split("`")
    for place in range(0, len(pieces), 2):
        named = _FIELD.sub(lambda found: f"{_SECTIONS[found[1]]}.", pieces[place])
        pieces[place] = _OPTION.sub(lambda found: found[1].replace("-", "_"), named)
    return "`".join(pieces)


# ------------------------------------------------------------------------------------------------- fields that nothing reads

_GATES = {
    "scheme", "distribution", "runs", "protect", "gate_learning_rate", "logit_init", "temperature", "scaling", "subset_estimator",
    "dropped",
}  # fmt: skip
_DRAWN = {"batch_size", "dtype", "compile", "quantize"}
_SAMPLER = {"sampler", "num_steps", "eta", "guidance", "guidance_channels", "guidance_interval", "clip"}
_GUIDED = {"guidance", "guidance_channels", "guidance_interval"}
_COMPUTE = {
    "gradient_accumulation_steps", "gradient_checkpointing", "compile", "prefetch_batches", "timeout_s",
}  # fmt: skip
_UNTRAINED = {"label_drop", "log_every_steps", "checkpoint_every_steps", "checkpoints_limit"}
_TRAINED = {field.name for field in dataclasses.fields(TrainingSection)} - _UNTRAINED

# what a field is for, or what to give instead; a field without a line or a row of `config/unread.py` is of other functions
_MEANT = {
    "PruneSection.criterion": "prune_model takes criteria without training by name",
    "PruneSection.keep": "prune_model takes the indices of the blocks to keep",
    "PruneSection.num_keep": "the scheme says how many blocks stay, such as '2:4'",
    "PruneSection.budgets": "the scheme says how many blocks of each list stay, such as '2:3;1:2'",
    "PruneSection.keep_deltas": "prune_model(model, masks, keep_updates=...) says whether the updates stay",
    "PruneSection.training": "the training of a search is that of RecoverSection",
    "RecoverSection.lora_apart": "updates are merged into the student that is returned; `tinyfusion recover` writes them alone",
    "DistillStepsSection.in_run": "it is for `tinyfusion run`",
    "TrainingSection.label_drop": "labels are dropped by the objective, objective_of(model, label_drop), or in the batches of a Task",
    "TrainingSection.log_every_steps": "on_step is called with every step",
    "TrainingSection.checkpoint_every_steps": "nothing is written; the command line trains with checkpoints",
    "TrainingSection.checkpoints_limit": "nothing is written; the command line trains with checkpoints",
    "ComputeSection.parallel": "the library trains in one process, the command line in several",
    "ComputeSection.shard_teacher": "the library trains in one process, the command line in several",
    "ComputeSection.tf32": "torch.backends.cuda.matmul.allow_tf32 stays as it is: set it yourself",
    "SampleSection.num_images": "there are as many images as labels",
    "SampleSection.labels": "the argument labels has one per image",
    "SampleSection.label_rule": "the argument labels has one per image",
    "SampleSection.weights": "open_model(source, weights) chooses them",
    **dict.fromkeys(
        ("SampleSection.decode", "SampleSection.vae", "SampleSection.latent_scale", "SampleSection.latent_shift",
         "SampleSection.decode_batch_size"),
        "latents are returned as the model sees them; `tinyfusion sample` decodes",
    ),
    "SampleSection.flow": "it is for models of flows",
    "SampleSection.masked": "it is for models of masked tokens",
}  # fmt: skip


def refuse_unread(
    section: Any, read: Collection[str], reader: str, usual: Sequence[Any] = (), path: str | None = None, verb: str = "",
    **given: Any,
) -> None:  # fmt: skip
    """Raise UserError on a field outside of `read` that differs from its default, and from that of the sections `usual`.

    reader: the function, for the message. path: of the section; None: its class. verb: the command with these settings, whose fields
    are read as `ROWS` of `config/unread.py` say; given: its options.
    """
    kind = type(section)
    name = next((name for name, known in _SECTIONS.items() if known == kind.__name__), "")
    asked = Asked(verb, Recipe(assigned=frozenset({"recover.method"}), **({name: section} if verb else {})), given)
    for field in dataclasses.fields(kind):
        value = getattr(section, field.name)
        if any(value == getattr(each, field.name) for each in (kind(), *usual)):
            continue
        if field.name not in read:
            meant = _MEANT.get(f"{kind.__name__}.{field.name}", "it is for other functions")
        elif verb and (other := other_reader(f"{name}.{field.name}", asked)):
            meant = f"it {other}"
        else:
            continue
        shown = "" if dataclasses.is_dataclass(value) else f"={value!r}"
        raise UserError(
            f"{reader} does not read {path or kind.__name__}.{field.name}{shown} here: {meant}; leave it out"
        )


def refuse_arguments(reader: str, given: Mapping[str, tuple[Any, Any]], meant: str) -> None:
    """Raise UserError on an argument of `given`, {name: (value, default)}, that was given. meant: what takes it."""
    for name, (value, default) in given.items():
        if value is not default and value != default:
            raise UserError(f"{reader} does not read {name} here: {meant}; leave it out")


def section(kind: type[T], given: T | None) -> T:
    """The section within the limits of recipes; None: the defaults. Raises UserError that names the field."""
    return kind() if given is None else checked(kind, given, kind.__name__)


def mask_settings(given: PruneSection | None, model: LoadedModel) -> PruneSection:
    """The settings of `learn_masks`, which reads all that are set."""
    settings = section(PruneSection, given)
    read = _GATES | {"update", "target", "storage", "lora_rank", "lora_alpha", "training"}
    refuse_unread(_spelled(settings, model), read, "learn_masks", verb="prune")
    return settings


def search_settings(given: PruneSection | None, model: LoadedModel) -> PruneSection:
    """The settings of the gates of a search within a recovery, which reads all that are set."""
    settings, reader = section(PruneSection, given), "recover_model with search_share"
    refuse_unread(_spelled(settings, model), _GATES, reader, verb="recover")
    return settings


def _spelled(settings: PruneSection, model: LoadedModel) -> PruneSection:
    """The settings with the distribution of their scheme, where there is one."""
    return gate_layout(model).spelled(settings) if settings.criterion == "learned" else settings


def recovery_settings(given: RecoverSection | None, taught: bool) -> RecoverSection:
    """The settings of `recover_model`, which reads all that are set. taught: there is a teacher.

    A search compares no features: with the default method it learns the teacher's outputs, as `tinyfusion recover` does.
    """
    settings = RecoverSection(method="masked-kd" if taught else "finetune") if given is None else given
    settings = section(RecoverSection, settings)
    if taught == (settings.method == "finetune"):
        raise UserError(f"method {settings.method} {'takes no teacher' if taught else 'needs a teacher'}")
    searches = settings.search_share is not None
    if searches and settings.method == RecoverSection().method:
        settings = dataclasses.replace(settings, method="logits-kd")
    read = {field.name for field in dataclasses.fields(settings)} - {"lora_apart"}
    refuse_unread(settings, read, "recover_model", verb="recover", student="" if searches else "given")
    return settings


def few_step_settings(given: DistillStepsSection | None, guidance: float) -> tuple[DistillStepsSection, SampleSection]:
    """The settings of `distill_model_steps`, which reads all that are set, and its guidance as a section.

    Raises UserError also on two guidances, and where matching would clip generator and critic by their joint norm.
    """
    settings = section(DistillStepsSection, given)
    sampling = checked(SampleSection, SampleSection(guidance=guidance), "")
    if settings.guidance not in (None, sampling.guidance) and sampling != SampleSection():
        raise UserError(f"guidance is {guidance:g}, and DistillStepsSection.guidance {settings.guidance:g}: give one")
    matching, training = settings.method == "matching", settings.training
    read = {field.name for field in dataclasses.fields(settings)} - {"in_run"}
    refuse_unread(settings, read, "distill_model_steps", verb="distill-steps")
    check_training(training, settings, "distill_model_steps", None)
    if matching and training.clip_groups != "apart" and training.clip_norm is not None:
        raise UserError(
            f"DistillStepsSection.training.clip_groups is {training.clip_groups!r}, and method matching clips generator and critic apart: "
            "set it to 'apart', or change the section's own training, dataclasses.replace(DistillStepsSection().training, steps=...)"
        )
    return settings, sampling


def sample_settings(given: SampleSection | None, model: LoadedModel) -> SampleSection:
    """The settings of `sample_images`, which reads all that are set; a model of few steps has its own sampler and guidance."""
    settings, steps = section(SampleSection, given), model.facts.few_steps
    reader = "sample_images"
    if steps is not None:
        refuse_unread(settings, _DRAWN, f"{reader} of a model that draws in its own {len(steps.levels)} steps")
    process = model.family.process
    if model.facts.folded_guidance is not None:
        other = {field.name for field in dataclasses.fields(settings)} - _GUIDED
        refuse_unread(
            settings, other, f"{reader} of a model that has guidance folded in", [SampleSection(guidance=1.0)]
        )
    refuse_unread(settings, _DRAWN | _SAMPLER | ({process} & {"flow", "masked"}), reader)
    return settings


def check_compute(given: ComputeSection | None) -> ComputeSection:
    """The section `compute`, of which a training of the library reads all that is set."""
    compute = section(ComputeSection, given)
    refuse_unread(compute, _COMPUTE, "the library")
    return compute


def check_training(training: TrainingSection, owner: Any, reader: str, label_drop: float | None) -> None:
    """Raise UserError on fields of a training that its loop does not read.

    owner: its section. label_drop: that of the objective, which a section may repeat.
    """
    honoured = {"label_drop"} if training.label_drop == label_drop else set[str]()
    usual, path = [type(owner)().training], f"{type(owner).__name__}.training"
    refuse_unread(training, _TRAINED | honoured, reader, usual, path)


def check_batch_size(owner: Any, num: int) -> None:
    """Raise UserError where the training of a section states another batch size than the batches have."""
    stated, usual = owner.training.batch_size, (TrainingSection(), type(owner)().training)
    if stated not in (num, *(each.batch_size for each in usual)):
        path = f"{type(owner).__name__}.training.batch_size"
        raise UserError(f"{path} is {stated}, and the batches have {num} images: leave it out")
