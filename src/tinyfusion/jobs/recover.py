"""`recover`: a cut model back to quality."""

from __future__ import annotations

import sys
from pathlib import Path

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, objective_for, plain_recipe
from tinyfusion.jobs.train import averaged, trainable
from tinyfusion.jobs.training import drive
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.models.plan import PrunePlan
from tinyfusion.models.stack import frozen
from tinyfusion.processes.base import Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training.ema import horizon_warning
from tinyfusion.training.loop import TrainState
from tinyfusion.training.optim import ParameterGroup


def recover(recipe: Recipe, options: RunOptions, student_source: Path) -> None:
    """Train the student; writes `student/` (averaged weights) and `student-raw/`."""
    student = open_model(student_source, recipe.sample.weights, options.num_heads, options.family)
    teacher = None
    if recipe.recover.method != "finetune":
        teacher = open_model(recipe.teacher, recipe.sample.weights, options.num_heads, options.family)
        _check_pair(student, teacher)
    inputs = {"student": student.hash(), "teacher": teacher.hash() if teacher else None}
    plain = plain_recipe(recipe, "data", "recover", **inputs)
    run = RunDirectory(options.out)
    mode = run.check("recover", plain, options.overwrite)
    settings, device = recipe.recover.training, device_for(recipe)
    source = batches_for(recipe, student, device)
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return
    warning = horizon_warning(settings.ema_decay, settings.steps)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        return
    run.begin("recover", plain, options.overwrite)
    student.module.to(device).train()
    objective = _objective(recipe, student, teacher, device.type)
    state = TrainState(student.module, [ParameterGroup(trainable(student.module), settings.learning_rate)], settings)
    seconds = drive(run, "recover", state, objective, source, settings, recipe.seed)
    save_model(averaged(student, state), run.path / "student")
    save_model(student, run.path / "student-raw")
    run.mark("done", seconds=seconds, seen_images=settings.steps * settings.batch_size)


def _check_pair(student: LoadedModel, teacher: LoadedModel) -> PrunePlan:
    """The plan that leads from this teacher to this student; UserError where there is none."""
    plan = student.facts.plan
    if plan is None:
        raise UserError("the student carries no plan, so its blocks cannot be paired with the teacher's: recover a student made by `tinyfusion prune`, or use --method finetune")
    if plan.teacher and plan.teacher != teacher.hash():
        raise UserError(f"the student was cut from the model {plan.teacher[:12]}, the teacher is {teacher.hash()[:12]}: give the teacher it was cut from")
    if student.family.arch_with_depths(student.arch, plan.depth) != teacher.arch:
        raise UserError(f"student {student.arch} and teacher {teacher.arch} differ in more than depth")
    return plan


def _objective(recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, device: str) -> Objective:
    """The bare objective, or the distilled one."""
    settings = recipe.recover
    inner = objective_for(student, settings.training.label_drop)
    if teacher is None:
        return inner
    assert isinstance(inner, GaussianObjective)
    frozen(teacher.module.to(device))
    return DistilledObjective(
        inner=inner,
        teacher=teacher.module,
        teacher_stack=teacher.stack,
        student_stack=student.stack,
        pairs=block_pairs(_check_pair(student, teacher)),
        alpha_kd=settings.alpha_kd,
        beta=settings.beta,
        sigmas=settings.mask_sigmas,
        mask=settings.mask,
        steps=settings.training.steps,
    )
