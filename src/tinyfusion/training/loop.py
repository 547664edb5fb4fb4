"""The one training loop. It yields a record per step; logging, checkpoints and interruption are the caller's `for` body.

What it does not know: families, gates, teachers. They arrive as an `Objective` and as parameter groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import TrainingSection
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.training.ema import Ema
from tinyfusion.training.optim import ParameterGroup, adamw, learning_rate_factor

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


class TrainState:
    """Everything a run must remember between two steps."""

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], settings: TrainingSection) -> None:
        self.model = model
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.optimizer = adamw(groups, settings)
        self.ema = Ema(self.parameters, settings.ema_decay)
        self.step = 0
        self.bad_steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and optimiser moments, by name."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"weight/{name}"] = parameter.detach()
            found[f"ema/{name}"] = self.ema.average[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{key}/{name}"] = value
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], step: int, bad_steps: int) -> None:
        """Continue from `tensors()` of an earlier run. Raises ValueError where a tensor is missing or misshapen."""
        targets: dict[str, Tensor] = {f"weight/{name}": p for name, p in self.parameters.items()}
        targets |= {f"ema/{name}": average for name, average in self.ema.average.items()}
        for key, target in targets.items():  # all is checked before anything changes
            if key not in tensors or tensors[key].shape != target.shape:
                raise ValueError(f"checkpoint has no fitting {key}")
        for key, target in targets.items():
            target.copy_(tensors[key])
        for name, parameter in self.parameters.items():
            moments = {key: tensors.get(f"optimizer/{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in moments.items() if value is not None
                }
        self.step, self.bad_steps = step, bad_steps


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
