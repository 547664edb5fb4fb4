"""`recover`: a cut model back to quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.assemble import (
    RunOptions,
    batches_for,
    engine_for,
    open_teacher,
    plain_recipe,
    training_plan,
)
from tinyfusion.jobs.estimate import announce, described, training_disk_bytes, training_estimate
from tinyfusion.jobs.latent_facts import open_stated, with_facts_of
from tinyfusion.jobs.origins import making_run, with_data, with_teacher
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import PROCESS_SECTIONS, objective_for
from tinyfusion.jobs.training import Extra, TrainedRun, Training, drive, save
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective
from tinyfusion.recover.align import Pairs, pairs_between, pairs_to_ancestors
from tinyfusion.recover.channels import residual_channels
from tinyfusion.recover.distill import distilled
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import decay_groups, linear, trainable
from tinyfusion.training.state import TrainState


def recover(recipe: Recipe, options: RunOptions, student_source: Path) -> dict[str, Any] | None:
    """Train the student; writes `student/` (averaged weights) and `student-raw/`. Returns what `--json` prints."""
    engine = engine_for(recipe)  # first: who fails after the processes have met is missed at once
    remarks: list[str] = []
    if recipe.recover.method != "finetune":
        recipe, job = with_teacher(recipe, student_source, "recover", remarks)
        options = _opened_as_then(options, job)
    student, teacher = opened(recipe, student_source, options.num_heads, options.family, options.num_classes)
    recipe = with_data(recipe, student, [student_source, recipe.teacher], remarks)
    student = with_facts_of(recipe, student)
    inputs = {"student": student.hash(), "teacher": teacher.hash() if teacher else None}
    plain = plain_recipe(recipe, "data", "recover", *PROCESS_SECTIONS, **inputs)
    run = TrainedRun("recover", recipe, options, engine, plain, remarks)
    intent = (
        _intent(recipe, student, teacher, run.mode) if options.dry_run else {}
    )  # hashes: before models lie in parts
    training = recovery_of(recipe, student, teacher, engine)
    check_previews(recipe, student)
    if run.settled(lambda: training_disk_bytes(training), training.settings):
        return None
    if options.dry_run:
        return announce("recover", intent, training_estimate(training), engine.is_main)
    with run.writing(student=student_source, teacher=recipe.teacher if teacher else None) as folder:
        seconds = drive(training, folder, options.resume)
        save(folder, training.averaged(), "student")
        save(folder, training.raw(), "student-raw")
        folder.mark("done", seconds=seconds, seen_images=training.state.seen_images)
    return {"seconds": seconds}


def _opened_as_then(options: RunOptions, job: Mapping[str, Any]) -> RunOptions:
    """The options with what was typed to open the teacher in the run of this job, where it is not typed now."""
    kinds = {"num_heads": int, "family": str, "num_classes": int}
    then = {name: job[name] for name, kind in kinds.items() if isinstance(job.get(name), kind)}
    return dataclasses.replace(options, **{name: getattr(options, name) or value for name, value in then.items()})


def opened(
    recipe: Recipe, student: Path, num_heads: int | None, family: str | None, num_classes: int | None = None
) -> tuple[LoadedModel, LoadedModel | None]:
    """Student and, where the method has one, teacher."""
    if not student.is_file():  # a folder says all that itself, and may be narrower than its teacher
        opened = open_stated(recipe, student, None, family)
    else:
        opened = open_stated(recipe, student, num_heads, family, num_classes)
    if recipe.recover.method == "finetune":
        return opened, None
    teacher = open_teacher(recipe, num_heads, family, num_classes=num_classes)
    if teacher.family is not opened.family:  # two families can have equal tensors, and equal hashes
        raise UserError(
            f"the student {student} is of family {opened.family.name} and the teacher {recipe.teacher} of "
            f"{teacher.family.name}: give the teacher that it was cut from"
        )
    return opened, teacher


def recovery_of(recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, engine: Engine) -> Training:
    """What trains the student, on the teacher where there is one. Moves both models.

    Raises UserError where student, teacher, data and device do not go together.
    """
    pairs = _check_pair(student, teacher, recipe.teacher) if teacher else []
    settings = recipe.recover.training
    source = batches_for(recipe, student, engine.device)
    channels = residual_channels(student, teacher) if teacher and recipe.recover.compares_features else None
    engine.place(student.module.train(), list(student.stack))
    if teacher:
        engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    objective = _objective(recipe, student, teacher, pairs, channels)
    state = TrainState(
        student.module, decay_groups(trainable(student.module), student.family.undecayed, settings), settings
    )
    return Training(
        "recover",
        recipe,
        settings,
        student,
        student.stack,
        state,
        objective,
        source,
        engine,
        teacher,
        _logged(recipe),
    )


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


def recovery_alone(recipe: Recipe, student: LoadedModel, teacher: LoadedModel) -> Training:
    """The recovery of a `run`, on this process. Raises UserError on everything that `recover` would refuse. Give copies."""
    taught = recipe.recover.method != "finetune"
    return recovery_of(recipe, student, teacher if taught else None, engine_for(recipe))


def _check_pair(student: LoadedModel, teacher: LoadedModel, name: str) -> Pairs:
    """Which block of the student answers to which of the teacher, named `name`; UserError where the two are not related."""
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
        run = making_run(student.origin.get("path", ""))
        recorded = f" ({run.teacher()}, by the record of {run.path})" if run and run.teacher() else ""
        raise UserError(
            f"the student was cut from the model {chain}{recorded}, the teacher {name} is {own_hash[:12]}: "
            "give the teacher it was cut from by --teacher, or one that shares an ancestor with it"
        )
    if not student.family.differ_in_size_alone(student.arch, teacher.arch, teacher.stack.depths()):
        raise UserError(f"student {student.arch} and teacher {teacher.arch} differ in more than depth and widths")
    return pairs


def _objective(
    recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, pairs: Pairs, channels: list[int] | None
) -> Objective:
    """The bare objective, or the distilled one with the terms of the method."""
    settings = recipe.recover
    inner = objective_for(student, settings.training.label_drop, recipe)
    if teacher is None:
        return inner
    try:
        return distilled(settings, inner, teacher, student, pairs, channels)
    except ValueError as error:
        raise UserError(f"the student's plan is damaged: {error}") from error
