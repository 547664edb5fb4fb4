"""`recover`: a cut model back to quality."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Recipe, TrainingSection
from tinyfusion.core.rundir import RunDirectory, check_space
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, objective_for, plain_recipe, training_plan
from tinyfusion.jobs.estimate import Estimate, announce, described, training_disk_bytes, training_estimate
from tinyfusion.jobs.train import averaged
from tinyfusion.jobs.training import Extra, drive
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.models.stack import frozen
from tinyfusion.processes.base import Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.recover.align import Pairs, pairs_between, pairs_to_ancestors
from tinyfusion.recover.channels import residual_channels
from tinyfusion.recover.distill import distilled
from tinyfusion.training.ema import horizon_warning
from tinyfusion.training.optim import ParameterGroup, linear, trainable
from tinyfusion.training.state import TrainState


def recover(recipe: Recipe, options: RunOptions, student_source: Path) -> dict[str, Any] | None:
    """Train the student; writes `student/` (averaged weights) and `student-raw/`. Returns what `--json` prints."""
    student = open_model(student_source, recipe.sample.weights, options.num_heads, options.family)
    teacher = None
    if recipe.recover.method != "finetune":
        teacher = open_model(recipe.teacher, recipe.sample.weights, options.num_heads, options.family)
    recovery = _recovery(recipe, student, teacher)
    inputs = {"student": student.hash(), "teacher": teacher.hash() if teacher else None}
    plain = plain_recipe(recipe, "data", "recover", **inputs)
    run = RunDirectory(options.out)
    mode = run.check("recover", plain, options.overwrite)
    settings, state = recipe.recover.training, recovery.state
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return None
    if mode == "new":
        check_space(options.out, training_disk_bytes(student, state, settings))
    warning = horizon_warning(settings.ema_decay, settings.made_steps)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        return announce("recover", _intent(recipe, student, teacher, mode), _estimate(recovery, settings))
    with run.writing("recover", plain, options.overwrite):
        extra = _logged(recipe) if teacher else lambda record: {}
        seconds = drive(run, "recover", state, recovery.objective, recovery.source, settings, recipe.seed, extra)
        save_model(averaged(student, state), run.path / "student")
        save_model(student, run.path / "student-raw")
        run.mark("done", seconds=seconds, seen_images=settings.made_images)
    return {"seconds": seconds}


@dataclass(frozen=True)
class _Recovery:
    """Student, teacher and what trains the one on the other, ready to go."""

    student: LoadedModel
    teacher: LoadedModel | None
    objective: Objective
    state: TrainState
    source: ShuffledBatches


def _recovery(recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None) -> _Recovery:
    """Raises UserError where student, teacher, data and device do not go together."""
    pairs = _check_pair(student, teacher) if teacher else []
    settings, device = recipe.recover.training, device_for(recipe)
    source = batches_for(recipe, student, device)
    student.module.to(device).train()
    objective = _objective(recipe, student, teacher, pairs, device.type)
    state = TrainState(student.module, [ParameterGroup(trainable(student.module))], settings)
    return _Recovery(student, teacher, objective, state, source)


def _logged(recipe: Recipe) -> Extra:
    """More fields for a log line of a distillation."""
    settings = recipe.recover
    if not settings.compares_features:
        return lambda record: {}
    return lambda record: {"beta": linear(settings.beta, record.step, settings.training.steps)}


def _intent(recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, mode: str) -> dict[str, str]:
    """What `--dry-run` says of a recovery."""
    teachers = {"teacher": described(teacher)} if teacher else {}
    return {
        "student": described(student),
        **teachers,
        "method": recipe.recover.method,
        **training_plan(recipe, recipe.recover.training, mode),
    }


def _estimate(recovery: _Recovery, settings: TrainingSection) -> Estimate:
    return training_estimate(
        recovery.student, recovery.state, recovery.objective, recovery.source, settings, recovery.teacher
    )


def check_recover(recipe: Recipe, student: LoadedModel, teacher: LoadedModel) -> None:
    """Raises UserError on everything that a `recover` of this student would refuse. Moves both models: give copies."""
    _recovery(recipe, student, teacher if recipe.recover.method != "finetune" else None)


def recover_estimate(recipe: Recipe, student: LoadedModel, teacher: LoadedModel) -> Estimate:
    """What a `recover` of this student will take. Trains it for a moment: give a copy."""
    taught = recipe.recover.method != "finetune"
    return _estimate(_recovery(recipe, student, teacher if taught else None), recipe.recover.training)


def _check_pair(student: LoadedModel, teacher: LoadedModel) -> Pairs:
    """Which block of the student answers to which of the teacher; UserError where the two are not related."""
    plan = student.facts.plan
    if plan is None:
        raise UserError(
            "the student carries no plan, so its blocks cannot be paired with the teacher's: "
            "recover a student made by `tinyfusion prune`, or use --method finetune"
        )
    own_hash = teacher.hash()
    try:
        pairs = pairs_between(student.facts, teacher.facts, own_hash)
    except ValueError as error:
        raise UserError(f"the plan of student or teacher is damaged: {error}") from error
    if not pairs:
        chain = " from ".join(ancestor[:12] for ancestor in pairs_to_ancestors(student.facts)) or plan.teacher[:12]
        raise UserError(
            f"the student was cut from the model {chain}, the teacher is {own_hash[:12]}: "
            "give the teacher it was cut from, or one that shares an ancestor with it"
        )
    if not student.family.differ_in_size_alone(student.arch, teacher.arch, teacher.stack.depths()):
        raise UserError(f"student {student.arch} and teacher {teacher.arch} differ in more than depth and widths")
    return pairs


def _objective(
    recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, pairs: Pairs, device: str
) -> Objective:
    """The bare objective, or the distilled one with the terms of the method."""
    settings = recipe.recover
    inner = objective_for(student, settings.training.label_drop)
    if teacher is None:
        return inner
    assert isinstance(inner, GaussianObjective)
    channels = residual_channels(student, teacher) if settings.compares_features else None
    frozen(teacher.module.to(device))
    try:
        return distilled(settings, inner, teacher, student, pairs, channels)
    except ValueError as error:
        raise UserError(f"the student's plan is damaged: {error}") from error
