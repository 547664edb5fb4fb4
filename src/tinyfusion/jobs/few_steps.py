"""The distillation of a sampling in few steps, ready to run."""

from __future__ import annotations

import dataclasses

import numpy as np

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.few_steps.consistency import ConsistencyObjective
from tinyfusion.few_steps.guided import GuidedTeacher
from tinyfusion.few_steps.matching import MatchingObjective
from tinyfusion.jobs.assemble import other_inputs
from tinyfusion.jobs.folding import guided_channels
from tinyfusion.jobs.process_specs import noising_of
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.transformer_few_steps import check_transformer_steps, guidance_of_pipeline, step_drawing
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import Objective
from tinyfusion.processes.noising import FewSteps, FlowNoising, even_levels
from tinyfusion.recover.placing import cast_half_precision
from tinyfusion.sample.drive import WHOLE
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.rounding import hold_weights
from tinyfusion.training.state import TrainState

_CRITIC_RATE = 10.0  # learning rate of a critic over that of its generator
_MATCHING_LEVEL = 0.8  # first level of noise predictions, which leave the clean image ill-determined above
_CRITIC = "critic."  # begins the names of its parameters in a checkpoint


def guidance_of_steps(recipe: Recipe, model: LoadedModel, teacher: LoadedModel) -> float:
    """The guidance that a student like `model` folds in; of a transformer of diffusers as `guidance_of_pipeline`.

    Raises UserError where it is set for a teacher that has folded in one of its own.
    """
    given, folded = recipe.distill_steps.guidance, teacher.facts.folded_guidance
    if folded is not None:
        if given not in (None, folded.scale):
            raise UserError(
                f"distill_steps.guidance {given:g}: guidance {folded.scale:g} is folded into the teacher already: leave it out, or give "
                "the model that it was recovered from"
            )
        return folded.scale
    if isinstance(model, TransformerModel):
        return guidance_of_pipeline(recipe, model)
    return recipe.sample.guidance if given is None else given


def few_steps_of(recipe: Recipe, model: LoadedModel, teacher: LoadedModel) -> FewSteps:
    """How the student of a recipe will draw, a model of the process of `model`."""
    guidance = guidance_of_steps(recipe, model, teacher)
    if isinstance(model, TransformerModel):
        return step_drawing(recipe, model, guidance).steps
    settings = recipe.distill_steps
    matching = settings.method == "matching"
    first = _MATCHING_LEVEL if matching and not isinstance(noising_of(model), FlowNoising) else 1.0
    levels = tuple(round(level, 6) for level in even_levels(settings.num_steps, settings.first_level or first))
    return FewSteps(settings.method, levels, guidance, matching and settings.fresh_noise)


def check_few_steps(recipe: Recipe, student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise UserError where student and teacher do not take the same, or cannot draw in few steps."""
    noising, settings = noising_of(student), recipe.distill_steps
    if other_inputs(teacher, student, "sizes") or noising != noising_of(teacher):
        raise UserError(
            f"the teacher {recipe.teacher} does not take what the student takes: wanted one of the same family, process, input and classes"
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
    flow = noising.flow if isinstance(noising, FlowNoising) else None
    if flow and flow.prediction != "velocity":
        raise UserError(
            f"few steps begin at noise alone, where a flow that predicts its {flow.prediction} states no image: give a model of velocities"
        )
    if settings.first_level not in (None, 1) and (flow or settings.method == "consistency"):
        raise UserError(
            f"distill_steps.first_level {settings.first_level:g} is for method matching of models that predict noise; others begin at "
            "noise alone: leave it out"
        )
    _check_levels(recipe, student, teacher)
    if recipe.sample.guidance_interval != WHOLE:
        raise UserError("guidance is folded in at all noise levels: leave out sample.guidance_interval")
    guidance = guidance_of_steps(recipe, student, teacher)
    if teacher.distilled_guidance:  # it is given guidance, or has it, and runs once
        return
    if guidance < 1:
        raise UserError(f"guidance must be at least 1 (1 folds none in); got {guidance:g}")
    if guidance > 1 and not teacher.null_class:
        raise UserError(
            "guidance compares with a class for no label, and the teacher has none: --set distill_steps.guidance=1"
        )


def _check_levels(recipe: Recipe, model: LoadedModel, teacher: LoadedModel) -> None:
    """Raise UserError on noise levels that the process cannot tell apart, and on a range that does not rise."""
    settings, times = recipe.distill_steps, noising_of(model).times
    if isinstance(model, TransformerModel):  # whose levels are those of its scheduler, and known with the data
        check_transformer_steps(recipe, model)
    else:
        of_steps = times(np.array(few_steps_of(recipe, model, teacher).levels)).tolist()
        if len(set(of_steps)) < len(of_steps) or min(of_steps) < 0:
            raise UserError(f"the process has no {settings.num_steps:,} different noise levels: give fewer --num-steps")
    low, high = settings.within
    if not low < high or float(times(np.array(low))) < 0:
        raise UserError(
            f"distill_steps.within wants two rising noise levels, of at least one of 1000 timesteps; got {low:g} and {high:g}"
        )


def few_step_training(
    recipe: Recipe, student: LoadedModel, teacher: LoadedModel, source: BatchSource, engine: Engine
) -> Training:
    """The student, which becomes a model of few steps, on its guided teacher; with a critic, a copy of it, where the method has one.

    Moves and changes both models.
    """
    settings, steps = recipe.distill_steps, few_steps_of(recipe, student, teacher)
    training = settings.training
    critic = student.copy() if settings.method == "matching" else None  # before processes split it
    trained = [student, *([critic] if critic else [])]
    for model in (*trained, teacher) if training.dtype == "float32" else ():
        cast_half_precision(model.module)
    for model in trained:
        hold_weights(model.module, trainable(model.module), training)
    if isinstance(student, TransformerModel):
        student.draw_by(step_drawing(recipe, student, steps.guidance))
    else:
        student.facts = dataclasses.replace(student.facts, few_steps=steps, folded_guidance=None)
    channels, guidance = guided_channels(recipe, student), 1.0 if teacher.distilled_guidance else steps.guidance
    module = engine.place(student.module.train(), list(student.stack))
    engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    taught = GuidedTeacher(teacher.module, teacher.stack, noising_of(student), student.family.call, guidance, channels)
    groups = [ParameterGroup(trainable(module))]
    objective: Objective = ConsistencyObjective(taught, steps.levels, settings.teacher_steps, settings.end_power)
    if critic is not None:
        own = engine.place(critic.module.train(), list(critic.stack))
        rate = settings.critic_learning_rate or _CRITIC_RATE * training.learning_rate
        named = {_CRITIC + name: parameter for name, parameter in trainable(own).items()}
        groups.append(ParameterGroup(named, learning_rate=rate))
        objective = MatchingObjective(taught, own, steps.levels, settings.within, steps.fresh_noise)
    blocks = [block for model in trained for block in model.stack]
    state = TrainState(module, groups, training, blocks)
    parts = (student, student.stack, state, objective, source, engine, teacher)
    return Training("distill-steps", recipe, training, *parts, other_stacks=[critic.stack] if critic else [])
