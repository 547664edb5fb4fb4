"""The one training loop. It yields a record per step; logging, checkpoints and interruption are the caller's `for` body.

What it does not know: families, gates, teachers. They arrive as an `Objective` and as parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import TrainingSection
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.training.optim import learning_rate_factor
from tinyfusion.training.state import TrainState

BatchSource = Callable[[int, int, Draws], Any]  # (step, batch size, draws) -> batch on the model's device


class LoopObjective(Protocol):
    """What the loop calls: the three methods of `processes.base.Objective`, structurally."""

    def draw(self, batch: Any, draws: Draws) -> Any:
        """All randomness of a batch."""
        ...

    def predict(self, model: nn.Module, noisy: Any) -> Any:
        """Run the model."""
        ...

    def losses(self, model: nn.Module, noisy: Any, prediction: Any) -> Mapping[str, Tensor]:
        """Per-sample terms; the mean of "loss" is optimised."""
        ...


@dataclass(frozen=True)
class StepRecord:
    """One step: 0-based number, mean of every term, joint gradient norm before clipping, whether it was applied."""

    step: int
    terms: Mapping[str, Tensor]
    gradient_norm: Tensor
    learning_rate: float
    applied: bool

    def values(self) -> dict[str, float | None]:
        """Numbers for a log line; None where not finite."""
        numbers = {**{k: float(v) for k, v in self.terms.items()}, "gradient_norm": float(self.gradient_norm)}
        return {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"learning_rate": self.learning_rate}


def train_steps(
    state: TrainState,
    objective: LoopObjective,
    source: BatchSource,
    settings: TrainingSection,
    randomness: Randomness,
) -> Iterator[StepRecord]:
    """Train from `state.step` to `settings.made_steps`, yielding after every step; the state is then complete for that step.

    A non-finite loss or gradient skips the update (average and optimiser stay as they are); `settings.max_bad_steps` of
    them in a row raise UserError. Autocast to `settings.dtype` is around the forward pass alone.
    """
    parameters = list(state.parameters.values())
    device = parameters[0].device
    while state.step < settings.made_steps:
        step = state.step
        factor = learning_rate_factor(settings, step)
        for group in state.optimizer.param_groups:
            group["lr"] = group["base"] * (1.0 if group["constant"] else factor)

        draws = randomness.at(step, 0, settings.batch_size)
        noisy = objective.draw(source(step, settings.batch_size, draws), draws)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            prediction = objective.predict(state.model, noisy)
        terms = {name: values.mean() for name, values in objective.losses(state.model, noisy, prediction).items()}

        state.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        limit = math.inf if settings.clip_norm is None else settings.clip_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        applied = bool(torch.isfinite(norm) & torch.isfinite(terms["loss"].detach()))
        if applied:
            state.optimizer.step()
            state.ema.update()
            state.bad_steps = 0
        else:
            state.bad_steps += 1
        state.step += 1
        detached = {name: value.detach() for name, value in terms.items()}
        yield StepRecord(step, detached, norm, settings.learning_rate * factor, applied)
        if state.bad_steps >= settings.max_bad_steps:
            raise UserError(
                f"{state.bad_steps} steps in a row had a non-finite loss or gradient, the last at step {step}: "
                "lower the learning rate, use float32, or look at the data of that step"
            )
