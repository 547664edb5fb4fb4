"""One training of any verb, ready to go: its steps, what compiling gains, the models it leaves, and what it will take."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tinyfusion.blocks.stack import BlockStack, num_parameters
from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.estimate import Estimate, rounded, step_seconds, time_after
from tinyfusion.jobs.footprint import FLOAT_BYTES, Footprint, footprint_of
from tinyfusion.jobs.memory import MemoryPlan, fitting_lines, memory_plan
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.macs import model_macs
from tinyfusion.processes.base import Objective
from tinyfusion.training.compile import Gain, measured_gain
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource, ForwardPass, StepRecord, noisy_microbatches, train_steps
from tinyfusion.training.shards import local_part, whole
from tinyfusion.training.state import TrainState

Extra = Callable[[StepRecord], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One training, ready to go.

    title: the verb. model: what the run starts from. stack: the blocks of the module that trains. extra: more fields for a
    log line.
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
    extra: Extra = field(default=lambda record: {})

    def steps(self) -> Iterator[StepRecord]:
        """The loop, from where the state is."""
        randomness = Randomness(self.recipe.seed)
        return train_steps(self.state, self.objective, self.source, self.settings, randomness, self.engine)

    @property
    def shown(self) -> LoadedModel | None:
        """The model that previews are drawn from; None of a search, whose gates have nothing to show yet."""
        return None if self.title == "prune" else self.model

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Blocks as the recipe's compute section wants them, until the end of the context."""
        with contextlib.ExitStack() as entered:
            if self.engine.compute.compile:
                for stack in (self.stack, *([self.teacher.stack] if self.teacher else [])):
                    entered.enter_context(stack.compiled())
            if self.engine.compute.gradient_checkpointing:
                entered.enter_context(self.stack.checkpointed())
            yield

    def compile_gain(self) -> Gain:
        """What compiling does for a step of this training, measured on the first microbatch. Every process must call."""
        state, randomness = self.state, Randomness(self.recipe.seed)
        forward = ForwardPass(state, self.objective, self.settings)
        noisy, *_ = noisy_microbatches(
            state.step, self.objective, self.source, self.settings.batch_size, randomness, self.engine
        )
        trained = list(state.parameters.values())
        compute = self.engine.compute

        def step() -> list[Tensor]:
            loss = forward(noisy)["loss"].mean()
            loss.backward()
            results = [loss, *(local_part(p.grad) for p in trained if p.grad is not None)]
            state.optimizer.zero_grad(set_to_none=True)
            return results

        def compiled() -> list[Tensor]:
            with self.in_place():
                return step()

        def eager() -> list[Tensor]:
            with self.stack.checkpointed() if compute.gradient_checkpointing else contextlib.nullcontext():
                return step()

        return measured_gain(eager, compiled, self.engine.device)

    def averaged(self) -> LoadedModel:
        """The model with the moving average of its weights, whole and on the CPU. Every process must call."""
        return self._with(self.state.averages())

    def raw(self) -> LoadedModel:
        """The model with its weights as they are, whole and on the CPU. Every process must call."""
        return self._with(self.state.weights())

    def _with(self, trained: Mapping[str, Tensor]) -> LoadedModel:
        tensors = self.model.module.state_dict()
        return self.model.with_weights(
            {name: trained[name] if name in trained else whole(t) for name, t in tensors.items()}
        )

    # ------------------------------------------------------------------------------------------------------- what it takes

    def disk_bytes(self) -> int:
        """Bytes of a run: checkpoints (weights, average, two moments; one more while it is written), two models, the log."""
        settings, trained = self.settings, sum(p.numel() for p in self.state.parameters.values())
        checkpoints = (
            min(settings.checkpoints_limit, math.ceil(settings.made_steps / settings.checkpoint_every_steps)) + 1
        )
        log = 500 * (settings.made_steps // settings.log_every_steps + 100)
        return FLOAT_BYTES * (4 * trained * checkpoints + 2 * num_parameters(self.model.module)) + log

    def memory(self) -> tuple[Footprint, MemoryPlan]:
        """Memory of one process. Every process must call."""
        state, settings, engine = self.state, self.settings, self.engine
        modules = [model.module for model in (self.model, self.teacher) if model]
        footprint = footprint_of(
            state.model, self.stack, state.parameters, self.objective, self.source, settings, modules
        )
        return footprint, memory_plan(footprint, settings, engine.compute, engine.world)

    def estimate(self) -> Estimate:
        """Minutes and memory, with the table of memory. Moves `state`: discard it afterwards. Every process must call."""
        settings, model, teacher, compute = self.settings, self.model, self.teacher, self.engine.compute
        weights = sum(p.numel() for p in self.state.model.parameters())
        weights += num_parameters(teacher.module) if teacher else 0
        footprint, memory = self.memory()
        lines = [*memory.lines(), *fitting_lines(footprint, settings, compute, self.engine.world)]
        macs = 3 * model_macs(model) + (
            model_macs(teacher) if teacher else 0
        )  # a backward pass costs two forward passes

        def measure(batch_size: int) -> float:
            short = dataclasses.replace(settings, steps=3, stop_after=None, batch_size=batch_size)
            measured = dataclasses.replace(self, settings=short)
            with measured.in_place():
                ends = [time_after(float(record.gradient_norm)) for record in measured.steps()]
            return (ends[-1] - ends[0]) / 2

        least = self.engine.world * compute.gradient_accumulation_steps
        seconds, basis = step_seconds(measure, macs, settings.batch_size, weights, self.engine.device, least)
        table = (f"{self.title}: {lines[0]}", *lines[1:])
        return rounded(settings.made_steps * seconds, memory.total, self.disk_bytes(), basis, table)
