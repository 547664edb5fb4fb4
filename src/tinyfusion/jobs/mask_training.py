"""The learned criterion as a training: gates and weight deltas on a copy of the teacher, and the plan that they decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.config.recipe import PruneSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.training import Training
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective
from tinyfusion.prune.deltas import prune_with_weight_updates
from tinyfusion.prune.learn import Decision, MaskLearner, mask_learner
from tinyfusion.training.engine import Engine, cut
from tinyfusion.training.loop import BatchSource, StepRecord
from tinyfusion.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class MaskTraining(Training):
    """The learned criterion, ready to go."""

    learner: MaskLearner

    def decision(self) -> Decision:
        """What the averaged gates decide at the end. Raises UserError where their logits are not finite."""
        decision = self.learner.decision(self.state.ema, self.settings.made_steps - 1)
        if not all(theta.isfinite().all() for theta in decision.logits):
            raise UserError("the gate logits are not finite; lower prune.gate_learning_rate")
        return decision


def mask_training(
    recipe: Recipe, teacher: LoadedModel, objective: Objective, source: BatchSource, engine: Engine
) -> MaskTraining:
    """Gates and weight deltas on a copy of the teacher. Raises UserError where scheme, data or device do not fit."""
    settings = recipe.prune
    seed = Randomness(recipe.seed).generator_seed("lora")
    learner = mask_learner(teacher, objective, settings, seed, engine.device, engine.place)
    gated = learner.objective
    if gated.gates.paired:
        _check_pairs(settings.training.batch_size, engine)
    state = TrainState(learner.module, learner.parameter_groups, settings.training)

    def extra(record: StepRecord) -> dict[str, Any]:
        return learner.decision(state.ema, record.step).log(record.step, gated)

    training = ("prune", recipe, settings.training, teacher, gated.stack, state, gated, source, engine)
    return MaskTraining(*training, extra=extra, learner=learner)


def _check_pairs(batch_size: int, engine: Engine) -> None:
    """Raise UserError where a microbatch would begin inside a pair of samples that the score estimator compares."""
    steps = engine.compute.gradient_accumulation_steps
    num_parts = engine.world * steps
    if all(first % 2 == 0 for first, _num in cut(batch_size, num_parts)):
        return
    below = 2 * num_parts * (batch_size // (2 * num_parts))
    sizes = " or ".join(str(size) for size in (below, below + 2 * num_parts) if size)
    raise UserError(
        f"prune.subset_estimator=score compares samples in pairs, and a batch of {batch_size} in {num_parts} microbatches "
        f"({engine.world} processes x {steps} accumulation steps) separates some: set prune.training.batch_size to {sizes}, "
        "or compute.gradient_accumulation_steps=1"
    )


def student_of(
    teacher: LoadedModel, plan: PrunePlan, settings: PruneSection, updates: Mapping[str, Tensor] | None
) -> LoadedModel:
    """The pruned teacher. updates: averages of what trained with the gates, which the student gets where there are any."""
    return teacher.cut(plan) if updates is None else prune_with_weight_updates(teacher, plan, updates, settings)
