"""The library: learn masks, prune, recover, sample and evaluate on values, without disk, progress or recipes.

Models are `LoadedModel`s: opened (`open_model`) or your own module (`wrap_module`). They are trained by a `Task` of two
functions for your own module, or by the process of a family (`objective_of`). Batches are any iterable of tensors, or a
function (step, draws) whose random numbers come from `draws`, so that results do not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.streams import Streams
from tinyfusion.conditioning.classes import LABELS
from tinyfusion.conditioning.condition import Condition
from tinyfusion.conditioning.texts import text_table
from tinyfusion.config.constraints import Count, Seed, Share, SmallCount
from tinyfusion.config.loading import checked
from tinyfusion.config.recipe import (
    ComputeSection,
    DistillStepsSection,
    FlowSection,
    PruneSection,
    Recipe,
    RecoverSection,
    SampleSection,
    TrainingSection,
)
from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.image_source import source_of
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.families.family import ModelFamily
from tinyfusion.families.registry import register_family
from tinyfusion.jobs import verbs
from tinyfusion.jobs.criteria import criterion_context, warning_of_loss
from tinyfusion.jobs.driving import average_warning
from tinyfusion.jobs.few_steps import check_few_steps, few_step_training
from tinyfusion.jobs.folding import folds, with_taught_target
from tinyfusion.jobs.library_inputs import (
    block_indices,
    check_data_set,
    checked_images,
    image_labels,
    mode_as_given,
    task_batches,
    trainable_copy,
    training_engine,
    training_source,
    undropped,
)
from tinyfusion.jobs.library_settings import (
    few_step_settings,
    in_python_words,
    mask_settings,
    python_words,
    recovery_settings,
    refuse_arguments,
    sample_settings,
    search_settings,
)
from tinyfusion.jobs.process_specs import check_denoiser, objective_for, process_spec
from tinyfusion.jobs.recording import record_inputs
from tinyfusion.jobs.recovery import recovery
from tinyfusion.jobs.sampling_setup import open_drawing
from tinyfusion.jobs.scoring import Reference, score
from tinyfusion.jobs.training import Training, mask_training, student_of
from tinyfusion.jobs.transformer_sources import open_transformer_model, transformer_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.checkpoint import open_model as open_family_model
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.models.wrapped import wrap_module
from tinyfusion.processes.base import Process
from tinyfusion.processes.task import Task
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.prune.criteria import CRITERIA, by_indices, decide
from tinyfusion.prune.learn import plan_of
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource, StepRecord

__all__ = [
    "ComputeSection", "Condition", "DistillStepsSection", "LearnedMasks", "LoadedModel", "ModelFamily", "PrunePlan",
    "PruneSection", "RecoverSection", "SampleSection", "Streams", "Task", "TrainingSection", "distill_model_steps",
    "evaluate_images", "learn_masks", "objective_of", "open_model", "prune_model", "record_inputs", "recover_model",
    "register_family", "sample_images", "save_model", "text_table", "wrap_module",
]  # fmt: skip

Batches = Iterable[Any] | Callable[[int, Draws], Any]
OnStep = Callable[[StepRecord], None]


@in_python_words
def objective_of(model: LoadedModel, label_drop: float = 0.1) -> Process:
    """The published training objective of a model's family. label_drop: probability that a label becomes the null class.

    Raises UserError for a module of your own, which is trained by a `Task`, and for a model of few steps.
    """
    return objective_for(model, checked(Share, label_drop, "label_drop"), Recipe())


@in_python_words
def open_model(
    source: str | Path,
    weights: str = "ema",
    num_heads: int | None = None,
    family: str | None = None,
    num_classes: int | None = None,
    blocks: str | Path | None = None,
) -> LoadedModel:
    """Open any model by path, name or hub id: of a registered family, or a transformer class of diffusers.

    weights: "ema" or "raw", where both exist. num_heads, family, num_classes: of official files that do not say. blocks: a file of
    rows for classes of diffusers that the shipped table lacks. A transformer of diffusers comes with its weights in the types of
    its file and its blocks declared; what trains it is a `Task` of yours. Comes back in eval mode, on the CPU. Raises UserError on
    anything that is not exactly a model, and on an argument that it does not read.
    """
    if not isinstance(source, str | Path):
        raise UserError(f"source is a path, a name or a hub id; got {source!r}")
    checked(Literal["ema", "raw"], weights, "weights")
    rows = None if blocks is None else Path(blocks)
    if transformer := transformer_of(str(source), rows, prompts=True):
        given = {"weights": (weights, "ema"), "num_heads": (num_heads, None), "num_classes": (num_classes, None)}
        meant = f"a {transformer.class_name} of diffusers has one set of weights, and states its sizes"
        refuse_arguments("open_model", {**given, "family": (family, None)}, meant)
        return open_transformer_model(source, transformer, FlowSection(), rows)
    return open_family_model(source, weights, num_heads, family, num_classes)


@dataclass(frozen=True)
class LearnedMasks:
    """The outcome of `learn_masks`. plan: the blocks to keep. updates: averages of the weight deltas, by name."""

    plan: PrunePlan
    updates: Mapping[str, Tensor]
    settings: PruneSection


@in_python_words
def learn_masks(
    model: LoadedModel,
    task: Process,
    batches: Batches,
    settings: PruneSection | None = None,
    *,
    seed: int = 0,
    compute: ComputeSection | None = None,
    on_step: OnStep = lambda record: None,
) -> LearnedMasks:
    """Learn which blocks of `model` to remove (TinyFusion, arXiv 2412.01199, section 3); `model` is not changed.

    settings: such as `PruneSection(scheme="1:2", training=training)` with `training = dataclasses.replace(PruneSection().training,
    steps=500, ema_decay=0.99)`, which retains the section's other values; a new `TrainingSection` has those of no section. An
    iterable of batches has its own batch size. on_step: called with the record of every step. Warns where the moving average,
    which decides, still holds much of the initial logits at the end. Raises UserError where scheme, task and batches do not fit,
    and on fields that are not read.
    """
    settings, seed = mask_settings(settings, model), checked(Seed, seed, "seed")
    engine = training_engine(model, compute)
    source, settings = training_source(task, batches, settings, model, engine, "learn_masks")
    _warn(None if isinstance(task, Task) else warning_of_loss(model, settings))
    work = mask_training(Recipe(seed=seed, prune=settings), model, task, source, engine)
    _train(work, on_step)
    cost = {"images": float(settings.training.made_images)}
    return LearnedMasks(plan_of(work.decision(), model, settings, seed, cost), work.state.averages(), settings)


@in_python_words
def prune_model(
    model: LoadedModel,
    how: LearnedMasks | PrunePlan | Sequence[int] | np.ndarray | Tensor | str,
    *,
    keep_updates: bool = True,
    num_keep: int | None = None,
    task: Process | None = None,
    batches: Batches | None = None,
    num_batches: int = 4,
    seed: int = 0,
) -> LoadedModel:
    """A student with some of the blocks of `model`, which is not changed.

    how: learned masks (with their weight deltas, unless `keep_updates` is False), a plan, the indices of the blocks to keep, or
    the name of a criterion without training. num_keep: of a criterion, blocks to keep per list; None: half. task, batches,
    num_batches: for criteria that use data, and ignored by the others; no label is dropped, whatever the task says. seed: of a
    criterion that draws, and recorded in the plan. The student is in the mode (train or eval) of the model. Raises UserError on
    arguments that do not fit, and on those that `how` does not read.
    """
    check_denoiser(model)
    seed, num_batches = checked(Seed, seed, "seed"), checked(Count, num_batches, "num_batches")
    of_data = {
        "num_keep": (num_keep, None),
        "task": (task, None),
        "batches": (batches, None),
        "num_batches": (num_batches, 4),
    }
    if isinstance(how, LearnedMasks):
        refuse_arguments("prune_model", {**of_data, "seed": (seed, 0)}, "the masks are learned")
        keeps = keep_updates and how.settings.update != "frozen"
        return student_of(model, how.plan, how.settings, how.updates if keeps else None)
    refuse_arguments("prune_model", {"keep_updates": (keep_updates, True)}, "only learned masks have updates")
    if isinstance(how, PrunePlan):
        refuse_arguments("prune_model", {**of_data, "seed": (seed, 0)}, "the plan names the blocks")
        return model.cut(how)
    if not isinstance(how, str):
        refuse_arguments("prune_model", of_data, "the indices name the blocks")
        return model.cut(by_indices(model, block_indices(how), seed))
    if how not in CRITERIA or how == "indices":
        known = ", ".join(name for name in CRITERIA if name != "indices")
        raise UserError(f"no criterion {how!r} without training: there is {known}; for learned masks see learn_masks")
    if how == "width":
        refuse_arguments("criterion width", {"num_keep": (num_keep, None)}, "it keeps all blocks, narrower")

    def calibration() -> Calibration:
        if task is None or batches is None:
            raise UserError(f"criterion {how} uses data: give task and batches")
        engine, undropping = Engine(next(model.module.parameters()).device), undropped(task)
        source, num = task_batches(undropping, batches, model, engine)
        size = num or PruneSection().calibration_batch_size
        images = num_batches * size
        return calibration_set(undropping, source, "given batches", images, images, size, seed)

    settings = checked(PruneSection, PruneSection(criterion=how, num_keep=num_keep), "")  # type: ignore[arg-type]
    _warn(None if isinstance(task, Task) else warning_of_loss(model, settings))
    with mode_as_given(model.module):
        plan = decide(criterion_context(model, settings, seed, calibration))
    return model.cut(plan)


@in_python_words
def recover_model(
    student: LoadedModel,
    teacher: LoadedModel | None,
    task: Process,
    batches: Batches,
    settings: RecoverSection | None = None,
    pruning: PruneSection | None = None,
    *,
    seed: int = 0,
    compute: ComputeSection | None = None,
    on_step: OnStep = lambda record: None,
) -> LoadedModel:
    """A trained copy of `student`: distilled from `teacher` (outputs, features of paired blocks), or fine-tuned without one.

    With `settings.search_share` the student is the whole model, as the teacher is, and comes back pruned: its blocks are chosen
    within the training by the gates of `pruning` (None: half of every list). `facts.plan` says which. Its weights are the moving
    average of the training (`settings.training.ema_decay`), and a warning says where that still holds much of the initial ones: set
    fewer steps as `dataclasses.replace(RecoverSection().training, steps=500, ema_decay=0.99)`. A search learns the teacher's outputs
    (logits-kd) in place of the default method. With `settings.guidance` the student learns the teacher's outputs under classifier-free
    guidance of that scale, and is drawn without: one pass of the network per step; no label is then dropped, whatever the task says. A
    student that is frozen as a whole trains all the
    same. Student and teacher are not changed. Raises UserError unless the teacher is an ancestor of the student, or shares one; on
    `pruning` without a search; and on fields that are not read.
    """
    settings, seed = recovery_settings(settings, teacher is not None), checked(Seed, seed, "seed")
    if pruning is not None and settings.search_share is None:
        raise UserError(
            "pruning says how blocks are chosen within a recovery: set RecoverSection.search_share, such as 0.1"
        )
    pruning = search_settings(pruning, student)
    engine = training_engine(student, compute)
    source, settings = training_source(task, batches, settings, student, engine, "recover_model")
    if teacher is not None:
        check_denoiser(teacher)
    recipe = Recipe(seed=seed, prune=pruning, recover=settings)
    own = settings.alpha_kd != RecoverSection().alpha_kd
    recipe = dataclasses.replace(recipe, assigned=frozenset({"recover.alpha_kd"} if own else ()))
    recipe = with_taught_target(recipe, teacher or student, [])
    task = task if recipe.recover.training.label_drop else undropped(task)
    if isinstance(student, TransformerModel) and folds(settings) and student.latent_shape is None:
        shape = tuple(source(0, 1, Randomness(seed).at(0, 0, 1)).x.shape[1:])
        student = dataclasses.replace(student, latent_shape=shape)
    work = recovery(recipe, trainable_copy(student), teacher.copy() if teacher else None, task, source, engine)
    _train(work, on_step)
    return _as_given(work.averaged(), student)


@in_python_words
def distill_model_steps(
    student: LoadedModel,
    teacher: LoadedModel,
    batches: BatchSource,
    settings: DistillStepsSection | None = None,
    *,
    guidance: float | None = None,
    seed: int = 0,
    compute: ComputeSection | None = None,
    on_step: OnStep = lambda record: None,
) -> LoadedModel:
    """A trained copy of `student` that draws in `settings.num_steps` steps what `teacher` draws in many under guidance.

    Both are models of families; the student may be the teacher itself, or a pruned one, recovered. batches: of a data set
    (tinyfusion.data.batches). guidance: folded in, unless settings state their own; None: 1.5, or what the teacher has folded in.
    `sample_images` draws with the student's own steps. settings: their training is best the section's own, changed:
    `dataclasses.replace(DistillStepsSection().training, steps=...)`, as matching wants clip_groups "apart". Student and teacher are not
    changed. Raises UserError where they do not go together, or their process has no few steps, and on fields that are not read.
    """
    folded = teacher.facts.folded_guidance
    if folded is not None and guidance not in (None, folded.scale):
        raise UserError(f"guidance is {guidance:g}, and the teacher has folded in {folded.scale:g}: leave it out")
    settings, sampling = few_step_settings(settings, 1.5 if guidance is None else guidance)
    recipe = Recipe(seed=checked(Seed, seed, "seed"), distill_steps=settings, sample=sampling)
    check_few_steps(recipe, student, teacher)
    check_data_set(batches)
    work = few_step_training(
        recipe, trainable_copy(student), teacher.copy(), batches, training_engine(student, compute)
    )
    _train(work, on_step)
    return _as_given(work.averaged(), student)


@in_python_words
def sample_images(
    model: LoadedModel,
    labels: Sequence[int] | np.ndarray | Condition,
    settings: SampleSection | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Images of these labels: uint8 (N, H, W, C); of a latent model float32 latents as the model sees them, (N, H, W, C).

    labels: or a condition with a row per image, such as encoded prompts (`text_table`). Image i depends on seed and i only. Runs
    on the device of the model, which stays in its mode (train or eval). Raises UserError on labels and settings that do not fit the
    model, and on fields that are not read: a model of few steps has its own sampler, steps and guidance.
    """
    process_spec(model)  # raises
    settings, seed = sample_settings(settings, model), checked(Seed, seed, "seed")
    if isinstance(labels, Condition):
        table, labels = labels, np.arange(len(labels))
        if model.family.texts is None:
            labels = table[LABELS].cpu().numpy()
        else:
            model = model.with_prompts(table)
    wanted, device = image_labels(labels, model), next(model.module.parameters()).device
    with mode_as_given(model.module):
        drawing = open_drawing(Recipe(seed=seed, sample=settings), model, device, labels=wanted)
        return np.concatenate(list(drawing.images(0, len(wanted))))


@in_python_words
def evaluate_images(
    images: np.ndarray,
    reference: np.ndarray,
    features: str = "digits-classifier",
    neighbours: int = 3,
    device: str = "auto",
) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision and recall of images against real ones, both uint8 (N, H, W, C).

    features: a feature extractor by name ("inception" downloads the network of FID once) or its folder. Raises UserError on
    images that the extractor does not accept. neighbours: of precision and recall, at least 1.
    """
    images, reference = checked_images(images, "the images"), checked_images(reference, "the reference")
    neighbours = checked(SmallCount, neighbours, "neighbours")
    choose_device(device)  # raises, also where an extractor is small enough for the CPU
    extractor, source = open_extractor(features, device), source_of(reference)
    for values, what in ((images, "the images"), (reference, "the reference")):
        extractor.check(values, what)
        if len(values) <= neighbours:
            raise UserError(f"{what} are {len(values)}: precision and recall with {neighbours} neighbours need more")
    return score(images, Reference("reference", source.hash(), source, {}, extractor), extractor, neighbours)


@in_python_words
def save_model(model: LoadedModel, folder: str | Path) -> None:
    """Write a model folder, whole or not at all: ours, or for a transformer of diffusers one of diffusers.

    Raises UserError for a module of your own, which has no format of ours.
    """
    verbs.save_model(model, Path(folder))


def _as_given(trained: LoadedModel, student: LoadedModel) -> LoadedModel:
    """The trained model with weights in the types, and in the mode, of the student as it was given."""
    types = {name: p.dtype for name, p in student.module.named_parameters()}
    for name, parameter in trained.module.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    trained.module.train(student.module.training)
    return trained


def _train(work: Training, on_step: OnStep) -> None:
    """Run all steps, compiled and checkpointed as the section `compute` says."""
    _warn(average_warning(work.title, work.settings), 5)
    with work.in_place():
        for record in work.steps():
            on_step(record)


def _warn(message: str | None, stacklevel: int = 4) -> None:
    """Warn in the words of Python, where the library was called; of nothing for None."""
    if message is not None:
        warnings.warn(python_words(message), stacklevel=stacklevel)
