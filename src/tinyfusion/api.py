"""The library: learn masks, prune, recover, sample and evaluate on values, without disk, progress or recipes.

Models are `LoadedModel`s: opened (`open_model`) or your own module (`wrap_module`). They are trained by a `Task` of two
functions for your own module, or by the process of a family (`objective_of`). Batches are any iterable of tensors, or a
function (step, draws) whose random numbers come from `draws`, so that results do not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.streams import Streams
from tinyfusion.conditioning.classes import LABELS
from tinyfusion.conditioning.condition import Condition
from tinyfusion.conditioning.texts import text_table
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
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws
from tinyfusion.data.image_source import source_of
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.families.family import ModelFamily
from tinyfusion.families.registry import register_family
from tinyfusion.jobs.criteria import criterion_context
from tinyfusion.jobs.few_steps import check_few_steps, few_step_training
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.jobs.recording import record_inputs
from tinyfusion.jobs.sampling_setup import open_drawing
from tinyfusion.jobs.scoring import Reference, score
from tinyfusion.jobs.training import Training, mask_training, recovery, student_of
from tinyfusion.jobs.transformer_sources import open_transformer_model, transformer_of
from tinyfusion.jobs.verbs import save_model
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.checkpoint import open_model as open_family_model
from tinyfusion.models.wrapped import wrap_module
from tinyfusion.processes.base import Process
from tinyfusion.processes.task import Task, task_source
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


def objective_of(model: LoadedModel, label_drop: float = 0.1) -> Process:
    """The published training objective of a model's family. label_drop: probability that a label becomes the null class."""
    return objective_for(model, label_drop, Recipe())


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
    anything that is not exactly a model.
    """
    rows = None if blocks is None else Path(blocks)
    if transformer := transformer_of(str(source), rows, prompts=True):
        return open_transformer_model(source, transformer, FlowSection(), rows)
    return open_family_model(source, weights, num_heads, family, num_classes)


@dataclass(frozen=True)
class LearnedMasks:
    """The outcome of `learn_masks`. plan: the blocks to keep. updates: averages of the weight deltas, by name."""

    plan: PrunePlan
    updates: Mapping[str, Tensor]
    settings: PruneSection


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

    settings: such as `PruneSection(scheme="1:2", training=TrainingSection(steps=500, batch_size=32))`; an iterable of batches
    has its own batch size. on_step: called with the record of every step. Raises UserError where scheme, task and batches do
    not fit.
    """
    settings = settings or PruneSection()
    engine = _engine(model, compute)
    source, training = _source(task, batches, settings.training, engine)
    settings = dataclasses.replace(settings, training=training)
    work = mask_training(Recipe(seed=seed, prune=settings), model, task, source, engine)
    _train(work, on_step)
    cost = {"images": float(training.made_images)}
    return LearnedMasks(plan_of(work.decision(), model, settings, seed, cost), work.state.averages(), settings)


def prune_model(
    model: LoadedModel,
    how: LearnedMasks | PrunePlan | Sequence[int] | str,
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
    num_batches: for criteria that use data. Raises UserError on arguments that do not fit.
    """
    if isinstance(how, LearnedMasks):
        keeps = keep_updates and how.settings.update != "frozen"
        return student_of(model, how.plan, how.settings, how.updates if keeps else None)
    if isinstance(how, PrunePlan):
        return model.cut(how)
    if not isinstance(how, str):
        return model.cut(by_indices(model, list(how), seed))
    if how not in CRITERIA:
        known = ", ".join(CRITERIA)
        raise UserError(f"no criterion {how!r} without training: there is {known}; for learned masks see learn_masks")

    def calibration() -> Calibration:
        if task is None or batches is None:
            raise UserError(f"criterion {how} uses data: give task and batches")
        source, settings = _source(task, batches, TrainingSection(batch_size=64), _engine(model, None))
        images = num_batches * settings.batch_size
        return calibration_set(task, source, "given batches", images, images, settings.batch_size, seed)

    settings = PruneSection(criterion=how, num_keep=num_keep)  # type: ignore[arg-type]
    return model.cut(decide(criterion_context(model, settings, seed, calibration)))


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
    average of the training (`settings.training.ema_decay`). Student and teacher are not changed. Raises UserError unless the teacher
    is an ancestor of the student, or shares one; and on `pruning` without a search.
    """
    settings = settings or RecoverSection(method="masked-kd" if teacher else "finetune")
    if (teacher is None) != (settings.method == "finetune"):
        raise UserError(f"method {settings.method} {'needs a teacher' if teacher is None else 'takes no teacher'}")
    if pruning is not None and settings.search_share is None:
        raise UserError(
            "pruning says how blocks are chosen within a recovery: set RecoverSection.search_share, such as 0.1"
        )
    engine = _engine(student, compute)
    source, training = _source(task, batches, settings.training, engine)
    pruning, settings = pruning or PruneSection(), dataclasses.replace(settings, training=training)
    recipe = Recipe(seed=seed, prune=pruning, recover=settings)
    work = recovery(recipe, student.copy(), teacher.copy() if teacher else None, task, source, engine)
    _train(work, on_step)
    return _as_given(work.averaged(), student)


def distill_model_steps(
    student: LoadedModel,
    teacher: LoadedModel,
    batches: BatchSource,
    settings: DistillStepsSection | None = None,
    *,
    guidance: float = 1.5,
    seed: int = 0,
    compute: ComputeSection | None = None,
    on_step: OnStep = lambda record: None,
) -> LoadedModel:
    """A trained copy of `student` that draws in `settings.num_steps` steps what `teacher` draws in many under guidance.

    Both are models of families; the student may be the teacher itself, or a pruned one, recovered. batches: of a data set
    (tinyfusion.data.batches). guidance: folded in, unless settings state their own. `sample_images` draws with the student's own steps.
    Student and teacher are not changed. Raises UserError where they do not go together, or their process has no few steps.
    """
    settings, sampling = settings or DistillStepsSection(), SampleSection(guidance=guidance)
    recipe = Recipe(seed=seed, distill_steps=settings, sample=sampling)
    check_few_steps(recipe, student, teacher)
    work = few_step_training(recipe, student.copy(), teacher.copy(), batches, _engine(student, compute))
    _train(work, on_step)
    return _as_given(work.averaged(), student)


def sample_images(
    model: LoadedModel,
    labels: Sequence[int] | np.ndarray | Condition,
    settings: SampleSection | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Images of these labels: uint8 (N, H, W, C); of a latent model float32 latents as the model sees them, (N, H, W, C).

    labels: or a condition with a row per image, such as encoded prompts (`text_table`). Image i depends on seed and i only. Runs
    on the device of the model. Raises UserError on settings that do not fit the model.
    """
    if isinstance(labels, Condition):
        table, labels = labels, np.arange(len(labels))
        if model.family.texts is None:
            labels = table[LABELS].cpu().numpy()
        else:
            model = model.with_prompts(table)
    recipe, device = Recipe(seed=seed, sample=settings or SampleSection()), next(model.module.parameters()).device
    drawing = open_drawing(recipe, model, device, labels=np.asarray(labels, dtype=np.int64))
    return np.concatenate(list(drawing.images(0, len(labels))))


def evaluate_images(
    images: np.ndarray,
    reference: np.ndarray,
    features: str = "digits-classifier",
    neighbours: int = 3,
    device: str = "auto",
) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision and recall of images against real ones, both uint8 (N, H, W, C).

    features: a feature extractor by name ("inception" downloads the network of FID once) or its folder. Raises UserError on
    images that the extractor does not accept.
    """
    extractor, source = open_extractor(features, device), source_of(reference)
    for values, what in ((images, "the images"), (reference, "the reference")):
        extractor.check(values, what)
        if len(values) <= neighbours:
            raise UserError(f"{what} are {len(values)}: precision and recall with {neighbours} neighbours need more")
    return score(images, Reference("reference", source.hash(), source, {}, extractor), extractor, neighbours)


def _as_given(trained: LoadedModel, student: LoadedModel) -> LoadedModel:
    """The trained model with weights in the types, and in the mode, of the student as it was given."""
    types = {name: p.dtype for name, p in student.module.named_parameters()}
    for name, parameter in trained.module.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))
    trained.module.train(student.module.training)
    return trained


def _engine(model: LoadedModel, compute: ComputeSection | None) -> Engine:
    """A training in this process, on the device of the model."""
    return Engine(next(model.module.parameters()).device, compute)


def _train(work: Training, on_step: OnStep) -> None:
    """Run all steps, compiled and checkpointed as the section `compute` says."""
    with work.in_place():
        for record in work.steps():
            on_step(record)


def _source(task: Process, batches: Batches, settings: TrainingSection, engine: Engine) -> tuple[Any, TrainingSection]:
    """The source of batches for the loop, and the settings with their batch size."""
    if not isinstance(task, Task):
        if not callable(batches):
            raise UserError(
                "the process of a family needs batches of a data set (tinyfusion.data.batches), got an iterable"
            )
        return batches, settings
    source, num = task_source(batches, engine.device)
    if num is None:
        return source, settings
    if engine.compute.gradient_accumulation_steps > 1:
        raise UserError(
            "microbatches of an iterable are not supported: give smaller batches, or a function (step, draws)"
        )
    return source, dataclasses.replace(settings, batch_size=num)
