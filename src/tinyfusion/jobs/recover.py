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
from tinyfusion.models.plan import PrunePlan
from tinyfusion.models.stack import frozen
from tinyfusion.processes.base import Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training.ema import horizon_warning
from tinyfusion.training.loop import TrainState
from tinyfusion.training.optim import ParameterGroup, linear, trainable


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
    plan = _check_pair(student, teacher) if teacher else None
    settings, device = recipe.recover.training, device_for(recipe)
    source = batches_for(recipe, student, device)
    student.module.to(device).train()
    objective = _objective(recipe, student, teacher, plan, device.type)
    state = TrainState(student.module, [ParameterGroup(trainable(student.module))], settings)
    return _Recovery(student, teacher, objective, state, source)


def _logged(recipe: Recipe) -> Extra:
    """More fields for a log line of a distillation."""
    settings = recipe.recover
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
    distilled = recipe.recover.method != "finetune"
    return _estimate(_recovery(recipe, student, teacher if distilled else None), recipe.recover.training)


def _check_pair(student: LoadedModel, teacher: LoadedModel) -> PrunePlan:
    """The plan that leads from this teacher to this student; UserError where there is none."""
    plan = student.facts.plan
    if plan is None:
        raise UserError(
            "the student carries no plan, so its blocks cannot be paired with the teacher's: "
            "recover a student made by `tinyfusion prune`, or use --method finetune"
        )
    if plan.teacher and plan.teacher != teacher.hash():
        raise UserError(
            f"the student was cut from the model {plan.teacher[:12]}, the teacher is {teacher.hash()[:12]}: "
            "give the teacher it was cut from"
        )
    if student.family.arch_with_depths(student.arch, plan.depth) != teacher.arch:
        raise UserError(f"student {student.arch} and teacher {teacher.arch} differ in more than depth")
    return plan


def _objective(
    recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, plan: PrunePlan | None, device: str
) -> Objective:
    """The bare objective, or the distilled one."""
    settings = recipe.recover
    inner = objective_for(student, settings.training.label_drop)
    if teacher is None or plan is None:
        return inner
    assert isinstance(inner, GaussianObjective)
    frozen(teacher.module.to(device))
    return DistilledObjective(
        inner=inner,
        teacher=teacher.module,
        teacher_stack=teacher.stack,
        student_stack=student.stack,
        pairs=block_pairs(plan),
        alpha_kd=settings.alpha_kd,
        beta=settings.beta,
        sigmas=settings.mask_sigmas,
        mask=settings.mask,
        steps=settings.training.steps,
    )
