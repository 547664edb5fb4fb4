"""Recovery of a student, and of a whole model whose blocks are chosen within it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.estimate import MemoryPlan, memory_plan
from tinyfusion.jobs.folding import fold_guidance
from tinyfusion.jobs.footprint import Footprint
from tinyfusion.jobs.origins import making_run
from tinyfusion.jobs.training import MaskTraining, Training, under_gates
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective, Process
from tinyfusion.prune.learn import Search, cut_with_weights, plan_of, search_within
from tinyfusion.recover.align import Pairs, pairs_between, pairs_to_ancestors, residual_channels
from tinyfusion.recover.distill import distilled
from tinyfusion.recover.placing import Placed, place_models
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource, StepRecord
from tinyfusion.training.optim import ParameterGroup, decay_groups, linear
from tinyfusion.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class SearchedRecovery(MaskTraining):
    """A recovery of the whole model that begins as the search for the blocks to keep: one training, one student."""

    @property
    def trial_images(self) -> int:
        """Most images of the trials of the likeliest choices."""
        search = self.learner.objective.search
        return search.trial_images if search and search.steps <= self.settings.made_steps else 0

    def tried_lines(self) -> list[str]:
        """What was tried, and the mean losses."""
        tried, search = self.learner.objective.gates.tried, self.learner.objective.search
        if not tried or search is None:
            return []
        choices = [dataclasses.replace(self.decision(), choice=choice).kept() for choice, _ in tried]
        shown = ["; ".join(" ".join(map(str, kept)) for kept in choice.values()) for choice in choices]
        kept = self.learner.objective.gates.fixed_choice
        marks = [", kept" if choice == kept else "" for choice, _ in tried]
        lines = [f"  {text}: {loss:.4g}{mark}" for text, (_, loss), mark in zip(shown, tried, marks, strict=True)]
        counted = f"mean loss of the second half of {search.trial_steps} steps"
        return [f"the search ended undecided; {counted} of its {len(tried)} likeliest choices:", *lines]

    @property
    def seen_images(self) -> int:
        """Images of all steps so far, trials included."""
        return self.state.seen_images + int(self.learner.objective.gates.trial_images)

    def memory(self) -> tuple[Footprint, MemoryPlan]:
        """Memory of one process; trials begin at a copy of the state, which is in the memory of the host."""
        footprint, plan = super().memory()
        if not self.trial_images or not footprint.on_host:
            return footprint, plan
        copied = sum(plan.sizes[name] for name in ("trained_weights", "optimizer", "moving_average"))
        footprint = dataclasses.replace(footprint, also_resident=footprint.also_resident + copied)
        return footprint, memory_plan(footprint, self.settings, self.engine.compute, self.engine.world)

    def plan(self) -> PrunePlan:
        """The decision as a plan: the one that is fixed, or so far."""
        gates = self.learner.objective.gates
        steps = self.state.step if gates.fixed_step is None else gates.fixed_step
        cost = {"images": float(steps * self.settings.batch_size + int(gates.trial_images))}
        return plan_of(self.decision(), self.model, self.recipe.prune, self.recipe.seed, cost)

    def averaged(self) -> LoadedModel:
        """The student with averaged weights, unsharded and on the CPU. Every process must call."""
        return cut_with_weights(self.model, self.plan(), super().averaged())

    def raw(self) -> LoadedModel:
        """The student with its current weights, unsharded and on the CPU. Every process must call."""
        return cut_with_weights(self.model, self.plan(), super().raw())


def recovery(
    recipe: Recipe,
    student: LoadedModel,
    teacher: LoadedModel | None,
    process: Process,
    source: BatchSource,
    engine: Engine,
) -> Training:
    """The student on its teacher, or fine-tuned without one. Moves both models.

    With `recover.search_share`, student is the whole model, and which blocks stay is learned within the training. Raises UserError
    where student and teacher are not related.
    """
    settings, training = recipe.recover, recipe.recover.training
    searches = settings.search_share is not None
    guidance = fold_guidance(recipe, settings, student, teacher, process)
    whole = student.copy() if searches else None  # before it trains
    if searches and settings.compares_features:
        raise UserError(
            f"recover.search_share chooses blocks while they train, and {settings.method} compares blocks of a student with those that "
            "it replaces: use --method logits-kd"
        )
    pairs = _pairs(student, teacher, recipe.teacher) if teacher and not searches else []
    channels = residual_channels(student, teacher) if teacher and settings.compares_features else None
    placed = place_models(student, teacher, settings, engine, Randomness(recipe.seed).generator_seed("recovery lora"))
    objective: Objective = process
    if teacher:
        with prefixed("the student's plan is damaged", ValueError):
            objective = distilled(settings, process, teacher, placed.student, pairs, channels, placed.passing, guidance)
    groups = decay_groups(placed.parameters, student.family.undecayed, training)
    if whole is not None:
        return _searched(recipe, whole, teacher, placed, groups, objective, source, engine)
    state = TrainState(placed.student.module, groups, training, placed.student.stack)

    def extra(record: StepRecord) -> dict[str, Any]:
        return {"beta": linear(settings.beta, record.step, training.steps)} if settings.compares_features else {}

    values = (recipe, training, student, placed.student.stack, state, objective, source, engine, teacher)
    return Training("recover", *values, extra, placed.merged)


def with_method_of_search(recipe: Recipe) -> Recipe:
    """The recipe; where it searches within the recovery and names no method, with the teacher's outputs as target."""
    settings = recipe.recover
    if settings.search_share is None or not settings.compares_features or "recover.method" in recipe.assigned:
        return recipe
    return dataclasses.replace(recipe, recover=dataclasses.replace(settings, method="logits-kd"))


def _searched(
    recipe: Recipe,
    whole: LoadedModel,
    teacher: LoadedModel | None,
    placed: Placed,
    groups: Sequence[ParameterGroup],
    objective: Objective,
    source: BatchSource,
    engine: Engine,
) -> SearchedRecovery:
    """The recovery of the placed copy of `whole` under gates."""
    settings, training = recipe.recover, recipe.recover.training
    candidates, trial_steps = settings.search_candidates, settings.search_trial_steps
    batch_size = min(settings.search_trial_batch_size or training.batch_size, training.batch_size)
    trials = candidates, trial_steps, batch_size, settings.search_trial_rate
    search = Search(settings.search_steps, settings.search_confidence, *trials)
    if search.candidates > 1:
        engine.slices(batch_size)  # refuse before anything is learned
    learner = search_within(placed.student, objective, groups, recipe.prune, search, engine.device)
    gated = learner.objective
    state, extra = under_gates(learner, training, "recover.training", engine)
    values = (recipe, training, whole, gated.stack, state, gated, source, engine, teacher)
    return SearchedRecovery("recover", *values, extra, placed.merged, learner=learner)


def _pairs(student: LoadedModel, teacher: LoadedModel, name: str) -> Pairs:
    """Pairs of blocks of student and teacher, named `name`. Raises UserError where the two are not related."""
    plan = student.facts.plan
    if plan is None:
        raise UserError(
            "the student carries no plan, so its blocks cannot be paired with the teacher's: recover a student made by "
            "`tinyfusion prune`, or fine-tune it without a teacher (--method finetune)"
        )
    own_hash = teacher.hash()
    with prefixed("the plan of student or teacher is damaged", ValueError):
        pairs = pairs_between(student.facts, teacher.facts, own_hash)
    if not pairs:
        chain = " from ".join(ancestor[:12] for ancestor in pairs_to_ancestors(student.facts)) or plan.teacher[:12]
        run = making_run(student.origin.get("path", ""))
        recorded = f" ({run.teacher()}, by the record of {run.path})" if run and run.teacher() else ""
        raise UserError(
            f"the student was pruned from the model {chain}{recorded}, the teacher {name or 'given'} is {own_hash[:12]}: "
            "give the teacher it was pruned from (--teacher), or one that shares an ancestor with it"
        )
    if not student.family.differ_in_size_alone(student.arch, teacher.arch, teacher.stack.depths()):
        raise UserError(f"student {student.arch} and teacher {teacher.arch} differ in more than depth and widths")
    return pairs
