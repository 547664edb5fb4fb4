"""The distillation of a sampling in few steps, ready to run."""

from __future__ import annotations

import dataclasses

from torch import nn

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.few_steps.consistency import ConsistencyObjective
from tinyfusion.few_steps.guided import GuidedTeacher
from tinyfusion.few_steps.matching import MatchingObjective
from tinyfusion.jobs.assemble import take_the_same
from tinyfusion.jobs.process_specs import noising_of
from tinyfusion.jobs.training import Training
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective
from tinyfusion.processes.noising import FewSteps
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

_CRITIC_RATE = 10.0  # learning rate of a critic over that of its generator
_CRITIC = "critic."  # begins the names of its parameters in a checkpoint


def few_steps_of(recipe: Recipe) -> FewSteps:
    """How the student of a recipe will draw."""
    settings = recipe.distill_steps
    guidance = recipe.sample.guidance if settings.guidance is None else settings.guidance
    fresh = settings.method == "matching" and settings.fresh_noise
    return FewSteps(settings.method, settings.levels, guidance, fresh)


def check_few_steps(recipe: Recipe, student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise UserError where student and teacher do not take the same, or cannot draw in few steps."""
    noising_of(student)
    if not take_the_same(teacher, student):
        raise UserError(
            f"the teacher {recipe.teacher} does not take what the student takes: wanted one of the same family, input and classes"
        )
    for role, model in (("student", student), ("teacher", teacher)):
        if model.facts.dynamic is not None:
            raise UserError(
                f"the {role} has routers, which decide by timesteps that few steps leave out: give a model without"
            )
    if teacher.facts.few_steps is not None:
        raise UserError(
            "the teacher draws in few steps itself, and has no trajectory: give the model that it was distilled from"
        )
    low, high = recipe.distill_steps.within
    if not low < high:
        raise UserError(f"distill_steps.within wants two rising noise levels; got {low:g} and {high:g}")
    if few_steps_of(recipe).guidance > 1 and not teacher.null_class:
        raise UserError(
            "guidance compares with a class for no label, and the teacher has none: --set distill_steps.guidance=1"
        )


def few_step_training(
    recipe: Recipe, student: LoadedModel, teacher: LoadedModel, source: BatchSource, engine: Engine
) -> Training:
    """The student, which becomes a model of few steps, on its guided teacher; with a critic, a copy of it, where the method has one.

    Moves and changes both models.
    """
    settings, steps = recipe.distill_steps, few_steps_of(recipe)
    critic = student.copy()
    student.facts = dataclasses.replace(student.facts, few_steps=steps)
    published = recipe.sample.guidance_channels == "published"
    channels = student.guided_channels if published else int(student.arch.in_channels)
    module = engine.place(student.module.train(), list(student.stack))
    engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    taught = GuidedTeacher(
        teacher.module, teacher.stack, noising_of(student), student.family.call, steps.guidance, channels
    )
    groups = [ParameterGroup(trainable(module))]
    objective: Objective = ConsistencyObjective(taught, steps.levels, settings.teacher_steps)
    if settings.method == "matching":
        own = engine.place(critic.module.train(), list(critic.stack))
        rate = settings.critic_learning_rate or _CRITIC_RATE * settings.training.learning_rate
        groups.append(ParameterGroup(_named(own), learning_rate=rate))
        objective = MatchingObjective(taught, own, steps.levels, settings.within, steps.fresh_noise)
    state = TrainState(module, groups, settings.training)
    name, training = "distill-steps", settings.training
    return Training(name, recipe, training, student, student.stack, state, objective, source, engine, teacher)


def _named(critic: nn.Module) -> dict[str, nn.Parameter]:
    return {_CRITIC + name: parameter for name, parameter in trainable(critic).items()}
