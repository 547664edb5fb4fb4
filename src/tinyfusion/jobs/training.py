"""A training of any verb, ready to run: its steps, the gain of compiling, its models, its cost; mask learning."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tinyfusion.blocks.forwards import Gain, measured_gain
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import BlockStack, num_parameters
from tinyfusion.config.recipe import PruneSection, Recipe, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.cards import lines_of_large
from tinyfusion.jobs.estimate import (
    Estimate,
    MemoryPlan,
    fitting_lines,
    memory_plan,
    muon_macs,
    rounded,
    step_seconds,
    time_after,
)
from tinyfusion.jobs.footprint import FLOAT_BYTES, Footprint, footprint_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Objective, Process
from tinyfusion.prune.decision import Decision
from tinyfusion.prune.layout import gate_layout
from tinyfusion.prune.learn import (
    MaskLearner,
    mask_learner,
    prune_with_weight_updates,
)
from tinyfusion.training.engine import Engine, cut
from tinyfusion.training.loop import BatchSource, ForwardPass, StepRecord, noisy_microbatches, train_steps
from tinyfusion.training.rounding import as_float32
from tinyfusion.training.shards import local_part
from tinyfusion.training.state import TrainState


@dataclass(frozen=True)
class Training:
    """A training, ready to run.

    title: the verb. model: what the run starts from. stack: the blocks of the module that trains. extra: further fields of a
    log line. merged: values of the model's own tensors, from those of the trained ones. other_stacks: blocks of other modules that train.
    """

    title: str
    recipe: Recipe
    settings: TrainingSection
    model: LoadedModel
    stack: BlockStack
    state: TrainState
    objective: Objective
    source: BatchSource
    engine: Engine
    teacher: LoadedModel | None = None
    extra: Callable[[StepRecord], dict[str, Any]] = field(default=lambda record: {})
    merged: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = as_float32
    other_stacks: Sequence[BlockStack] = ()

    def steps(self, trials: bool = True) -> Generator[StepRecord]:
        """The loop, from the current state on. trials: as of `train_steps`."""
        randomness = Randomness(self.recipe.seed)
        return train_steps(self.state, self.objective, self.source, self.settings, randomness, self.engine, trials)

    @property
    def trial_images(self) -> int:
        """Most images of trials, which come on top of those of the steps."""
        return 0

    def tried_lines(self) -> list[str]:
        """Lines on the trials of this process."""
        return []

    @property
    def shown(self) -> LoadedModel | None:
        """The model of the previews; None in a search, which has none yet."""
        return None if self.title == "prune" else self.model

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Compile and checkpoint the blocks as the section `compute` says, within the context."""
        with contextlib.ExitStack() as entered:
            if self.engine.compute.compile:
                for stack in (self.stack, *self.other_stacks, *([self.teacher.stack] if self.teacher else [])):
                    entered.enter_context(stack.compiled())
            entered.enter_context(self._checkpointed())
            yield

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Checkpoint the blocks that train, where the section `compute` says so."""
        with contextlib.ExitStack() as entered:
            for stack in (self.stack, *self.other_stacks) if self.engine.compute.gradient_checkpointing else ():
                entered.enter_context(stack.checkpointed())
            yield

    def compile_gain(self) -> Gain:
        """The gain of compiling a step, measured on the first microbatch. Every process must call."""
        state, settings = self.state, self.settings
        forward, randomness = ForwardPass(state, self.objective, settings), Randomness(self.recipe.seed)
        batch = (state.step, self.objective, self.source, settings.batch_size, randomness, self.engine)
        noisy, *_ = noisy_microbatches(*batch)

        def step() -> list[Tensor]:
            loss = forward(noisy)["loss"].mean()
            loss.backward()
            results = [loss, *(local_part(p.grad) for p in state.parameters.values() if p.grad is not None)]
            state.optimizer.zero_grad(set_to_none=True)
            return results

        def compiled() -> list[Tensor]:
            with self.in_place():
                return step()

        def eager() -> list[Tensor]:
            with self._checkpointed():
                return step()

        return measured_gain(eager, compiled, self.engine.device)

    def averaged(self) -> LoadedModel:
        """The model with averaged weights, unsharded and on the CPU. Every process must call."""
        return self.model.with_changed(self.merged(self.state.averages()))

    def raw(self) -> LoadedModel:
        """The model with its current weights, unsharded and on the CPU. Every process must call."""
        return self.model.with_changed(self.merged(self.state.weights()))

    def disk_bytes(self) -> int:
        """Bytes of a run: checkpoints (weights, average, two moments; one more while it is written), two models, the log."""
        settings, trained = self.settings, sum(p.numel() for p in self.state.parameters.values())
        written = math.ceil(settings.made_steps / settings.checkpoint_every_steps)
        checkpoints = min(settings.checkpoints_limit, written) + 1
        log = 500 * (settings.made_steps // settings.log_every_steps + 100)
        return FLOAT_BYTES * (4 * trained * checkpoints + 2 * num_parameters(self.model.module)) + log

    def kept_blocks(self, whole: LoadedModel) -> dict[str, int]:
        """Blocks per list that the student has, or will have."""
        if not isinstance(self, MaskTraining):
            return self.model.stack.depths()
        share = self.objective.step_memory().graph_share
        return {name: round(share * depth) for name, depth in whole.stack.depths().items()}

    def memory(self) -> tuple[Footprint, MemoryPlan]:
        """Memory of one process. Every process must call."""
        state, settings, engine = self.state, self.settings, self.engine
        modules = [model.module for model in (self.model, self.teacher) if model]
        sizes = (state.model, self.stack, state.parameters, self.objective, self.source, settings, modules)
        footprint = footprint_of(*sizes, state.matrices())
        return footprint, memory_plan(footprint, settings, engine.compute, engine.world)

    def estimate(self) -> Estimate:
        """Minutes, memory and disk. Changes `state`: discard it afterwards. Every process must call."""
        settings, model, teacher, compute = self.settings, self.model, self.teacher, self.engine.compute
        weights = sum(p.numel() for p in self.state.model.parameters())
        weights += num_parameters(teacher.module) if teacher else 0
        footprint, memory = self.memory()
        lines = [*memory.lines(), *fitting_lines(footprint, settings, compute, self.engine.world)]
        lines += lines_of_large(teacher or model, self.kept_blocks(teacher or model))
        macs = 3 * model.macs()  # a backward pass costs two forward passes
        macs += self.objective.step_memory().teacher_rows * teacher.macs() if teacher else 0
        macs += muon_macs(footprint) // settings.batch_size

        def measure(batch_size: int) -> float:
            short = dataclasses.replace(settings, steps=3, stop_after=None, batch_size=batch_size)
            measured = dataclasses.replace(self, settings=short)
            with measured.in_place():
                ends = [time_after(float(record.gradient_norm)) for record in measured.steps(trials=False)]
            return (ends[-1] - ends[0]) / 2

        least = self.engine.world * compute.gradient_accumulation_steps
        seconds, basis = step_seconds(measure, macs, settings.batch_size, weights, self.engine.device, least)
        table = (f"{self.title}: {lines[0]}", *lines[1:])
        seconds *= settings.made_steps + self.trial_images / settings.batch_size
        return rounded(seconds, memory.total, self.disk_bytes(), basis, table)


# ----------------------------------------------------------------------------------------------------------- learned masks


@dataclass(frozen=True, kw_only=True)
class MaskTraining(Training):
    """The training of the learned criterion."""

    learner: MaskLearner

    def decision(self) -> Decision:
        """The decision of the averaged gates after the last step. Raises UserError where their logits are not finite."""
        decision = self.learner.decision(self.state.ema, max(self.state.step, 1) - 1)
        if not all(theta.isfinite().all() for theta in decision.logits):
            raise UserError("the gate logits are not finite; lower prune.gate_learning_rate")
        return decision


def before_search(recipe: Recipe, model: LoadedModel) -> Recipe:
    """The recipe with its scheme spelled out for `model`. Raises UserError where no student of that size could be made of it."""
    layout = gate_layout(model)
    recipe = dataclasses.replace(recipe, prune=layout.spelled(recipe.prune))
    model.cut(layout.stand_in(recipe.prune)).made_for(recipe.destination)
    return recipe


def mask_training(
    recipe: Recipe, teacher: LoadedModel, objective: Process, source: BatchSource, engine: Engine
) -> MaskTraining:
    """Gates and weight deltas on a copy of the teacher. Raises UserError where scheme, data or device do not fit."""
    settings = recipe.prune
    if settings.storage != "own" and (engine.splits or engine.compute.compile):
        raise UserError(
            f"prune.storage {settings.storage} is for whole models that are not compiled: use compute.parallel ddp without "
            "--compile, or own"
        )
    seed = Randomness(recipe.seed).generator_seed("lora")
    learner = mask_learner(teacher, objective, settings, seed, engine.device, engine.place)
    gated = learner.objective
    state, extra = under_gates(learner, settings.training, "prune.training", engine)
    training = ("prune", recipe, settings.training, teacher, gated.stack, state, gated, source, engine)
    return MaskTraining(*training, extra=extra, learner=learner)


def under_gates(
    learner: MaskLearner, settings: TrainingSection, section: str, engine: Engine
) -> tuple[TrainState, Callable[[StepRecord], dict[str, Any]]]:
    """The state of a training with gates, and what it logs of their decision. Raises UserError on a batch that splits pairs."""
    gated = learner.objective
    if gated.gates.paired:
        _check_pairs(settings.batch_size, engine, section)
    state = TrainState(learner.module, learner.parameter_groups, settings, gated.stack)
    return state, lambda record: learner.log(state.ema, record.step)


def _check_pairs(batch_size: int, engine: Engine, section: str) -> None:
    """Raise UserError where a microbatch would begin inside a pair of samples that the score estimator compares."""
    steps = engine.compute.gradient_accumulation_steps
    microbatches = engine.world * steps
    if all(first % 2 == 0 for first, _num in cut(batch_size, microbatches)):
        return
    below = 2 * microbatches * (batch_size // (2 * microbatches))
    sizes = " or ".join(str(size) for size in (below, below + 2 * microbatches) if size)
    raise UserError(
        f"prune.subset_estimator=score compares samples in pairs, and a batch of {batch_size} in {microbatches} microbatches "
        f"({engine.world} processes x {steps} accumulation steps) separates some: set {section}.batch_size to {sizes}, "
        "or compute.gradient_accumulation_steps=1"
    )


def student_of(
    teacher: LoadedModel, plan: PrunePlan, settings: PruneSection, updates: Mapping[str, Tensor] | None
) -> LoadedModel:
    """The pruned teacher. updates: averages of what trained with the gates, for a student that starts from them."""
    return teacher.cut(plan) if updates is None else prune_with_weight_updates(teacher, plan, updates, settings)
