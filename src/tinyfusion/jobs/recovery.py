"""Recovery as a training: a pruned student on its teacher, or fine-tuned alone."""

from __future__ import annotations

from typing import Any

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.origins import making_run
from tinyfusion.jobs.training import Training
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective, Process
from tinyfusion.recover.align import Pairs, pairs_between, pairs_to_ancestors, residual_channels
from tinyfusion.recover.distill import distilled
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource, StepRecord
from tinyfusion.training.optim import decay_groups, linear, trainable
from tinyfusion.training.state import TrainState


def recovery(
    recipe: Recipe,
    student: LoadedModel,
    teacher: LoadedModel | None,
    process: Process,
    source: BatchSource,
    engine: Engine,
) -> Training:
    """What trains the student, on the teacher where there is one. Moves both models.

    Raises UserError where student and teacher do not go together.
    """
    settings, training = recipe.recover, recipe.recover.training
    pairs = _pairs(student, teacher, recipe.teacher) if teacher else []
    channels = residual_channels(student, teacher) if teacher and settings.compares_features else None
    engine.place(student.module.train(), list(student.stack))
    objective: Objective = process
    if teacher:
        engine.place_teacher(frozen(teacher.module), list(teacher.stack))
        try:
            objective = distilled(settings, process, teacher, student, pairs, channels)
        except ValueError as error:
            raise UserError(f"the student's plan is damaged: {error}") from error
    groups = decay_groups(trainable(student.module), student.family.undecayed, training)
    state = TrainState(student.module, groups, training)

    def extra(record: StepRecord) -> dict[str, Any]:
        return {"beta": linear(settings.beta, record.step, training.steps)} if settings.compares_features else {}

    values = (recipe, training, student, student.stack, state, objective, source, engine, teacher)
    return Training("recover", *values, extra)


def _pairs(student: LoadedModel, teacher: LoadedModel, name: str) -> Pairs:
    """Which block of the student answers to which of the teacher, named `name`; UserError where the two are not related."""
    plan = student.facts.plan
    if plan is None:
        raise UserError(
            "the student carries no plan, so its blocks cannot be paired with the teacher's: recover a student made by "
            "`tinyfusion prune`, or fine-tune it without a teacher (--method finetune)"
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
            f"the student was cut from the model {chain}{recorded}, the teacher {name or 'given'} is {own_hash[:12]}: "
            "give the teacher it was cut from (--teacher), or one that shares an ancestor with it"
        )
    if not student.family.differ_in_size_alone(student.arch, teacher.arch, teacher.stack.depths()):
        raise UserError(f"student {student.arch} and teacher {teacher.arch} differ in more than depth and widths")
    return pairs
