"""DynamicObjective: an objective that wraps any process's, and trains routers and weights under a budget.

    loss = L_dyn [+ L_full or a teacher's loss] + w (r - lambda)^2

L_dyn: the process's loss of the routed network. L_full, in the first part of a training: that of the whole network, same
noise and time, conditions dropped independently. r: mean ratio of multiply-accumulates over the *global* batch.

The budget over slices and processes. The gradient of (r - lambda)^2 is 2 (r - lambda) dr, and dr is a mean over images. So
every image carries w [(r - lambda)^2 + 2 (r - lambda) (r_b - stop(r_b))] with r of the whole batch: value and gradient are
exact for any cut of the batch, where the published code squares the mean of every process, which adds the variance of
those means. With one slice per process r is one sum over processes; with more, `prepared` runs them all without a graph
first, because the first slice's gradient needs the last slice's ratio.

Source: DyDiT (arXiv 2410.03456). Differs: one optimiser step per iteration (its release makes two), ratio from shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.blocks.routed import Deciding
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.rng import Draws, StratifiedDraws
from tinyfusion.dynamic.macs import kept_shares, model_ratio
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, Process, StepMemory

# submodule of a block -> purpose of its noise
PURPOSES = {
    "attn_rate": "route/attn",
    "mlp_rate": "route/mlp",
    "token_selection": "route/token",
    "block_rate": "route/block",
}
HOLD_STEPS = 100  # steps with a budget of 1 at the beginning, published
Beside = Literal["complete", "teacher", "none"]


def budget_at(step: int, target: float, ramp_steps: int | None) -> float:
    """lambda at `step`: 1 for 100 steps, then on the line from 1 at step 0 to `target` at `ramp_steps`, then `target`.

    ramp_steps None: no line. The line starts at step 0, so there is a jump at step 100 (published).
    """
    if step < HOLD_STEPS:
        return 1.0
    if ramp_steps is None or step > ramp_steps:
        return target
    return 1.0 - (1.0 - target) * step / ramp_steps


@dataclass(frozen=True)
class RoutedBatch:
    """A noisy batch with the noise of all routers.

    noise: per router (B, L, units or tokens), logistic. complete_condition: of the complete pass, dropped independently.
    ratio: of the global batch, where it was taken beforehand; a scalar.
    """

    noisy: NoisyBatch
    noise: Mapping[str, Tensor]
    complete_condition: Condition
    ratio: Tensor | None = None

    @property
    def t(self) -> Tensor:
        """Times (B,) in the process."""
        return self.noisy.t

    @property
    def condition(self) -> Condition:
        """Condition of the routed pass."""
        return self.noisy.condition

    @property
    def step(self) -> int:
        """The step of the training."""
        return self.noisy.step

    def each(self, change: Callable[[Tensor], Tensor]) -> RoutedBatch:
        """The batch with `change` applied to every tensor that has images along axis 0."""
        noise = {name: change(value) for name, value in self.noise.items()}
        return RoutedBatch(self.noisy.each(change), noise, self.complete_condition.each(change), self.ratio)


@dataclass(frozen=True)
class RoutedPrediction(Prediction):
    """The routed output; `own`: what the process predicted with it. ratio (B,); kept: shares (B,) for the log."""

    own: Prediction = field(kw_only=True)
    ratio: Tensor = field(kw_only=True)
    kept: Mapping[str, Tensor] = field(kw_only=True)
    complete: Prediction | None = field(default=None, kw_only=True)


class Routed(Deciding):
    """Every image decides under its noise; decisions carry gradients."""

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.drawn = noise

    def noise(self, router: str, index: int) -> Tensor | None:
        """(B, units or tokens) of the router of block `index`."""
        return self.drawn[router][:, index]


@dataclass(frozen=True)
class DynamicObjective(Objective):
    """See the module. target: lambda. weight: w.

    beside: what runs beside the routed network while `step < beside_steps`: the whole network on the data ("complete"), or
    `teacher`, a frozen static model that the routed output is compared with ("teacher"), or nothing. finish_from: the step
    from which decisions have no noise, as at inference; their gradient stays. strata: parts of the range of times; 1 draws
    them freely. total: the sum of a tensor over all processes.
    """

    inner: Process
    dynamic: DynamicModel
    target: float
    label_drop: float
    ramp_steps: int | None = 1000
    weight: float = 2.0
    beside: Beside = "complete"
    beside_steps: int = 30_000
    beside_weight: float = 1.0
    teacher: nn.Module | None = None
    finish_from: int | None = None
    strata: int = 4
    total: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"a budget is a share above 0 and at most 1; got {self.target:g}")
        if self.beside == "teacher" and self.teacher is None:
            raise ValueError("beside teacher needs a teacher")
        if self.strata < 1:
            raise ValueError(f"times are drawn from at least 1 part; got {self.strata}")

    def step_memory(self) -> StepMemory:
        """The routed pass, and the complete one in the steps that have it."""
        return StepMemory(passes=2 if self.beside == "complete" and self.beside_steps > 0 else 1)

    def draw(self, batch: Batch, draws: Draws) -> RoutedBatch:
        """The inner draws with stratified times, the condition of the complete pass, and the noise of all routers."""
        if self.strata > 1:
            # with four strata of 1000 steps t = 250 (i mod 4) + U{0..249}, as published, but by the place in the global batch
            # instead of that in a process; the mean ratio of a batch is steadier for it
            draws = StratifiedDraws(draws.seed, draws.step, draws.first, draws.num, self.strata)
        noisy = self.inner.draw(batch, draws)
        condition = batch.condition.drop(draws, self.label_drop, "label_drop/complete")
        return RoutedBatch(noisy, self._noise(draws, batch.x.device), condition)

    def _noise(self, draws: Draws, device: torch.device) -> dict[str, Tensor]:
        """Logistic noise of all routers; zeros from `finish_from` on."""
        found, depth = {}, len(self.dynamic.stack)
        for name, shape in self._shapes().items():
            if self.finish_from is not None and draws.step >= self.finish_from:
                found[name] = torch.zeros((draws.num, depth, *shape), device=device)
                continue
            u = draws.uniform(PURPOSES[name], (depth, *shape))
            found[name] = torch.from_numpy((np.log(u) - np.log1p(-u)).astype(np.float32)).to(device)
        return found

    def _shapes(self) -> dict[str, tuple[int]]:
        """Decisions of every kind of router in a block, forced ones left out."""
        settings, sizes = self.dynamic.settings, self.dynamic.sizes
        outputs = sizes.num_heads - settings.forced_first
        shapes = {"attn_rate": (outputs,), "mlp_rate": (outputs,)} if settings.width else {}
        shapes |= {"token_selection": (sizes.num_tokens,)} if settings.tokens else {}
        return shapes | ({"block_rate": (1,)} if settings.depth else {})

    def prepared(self, model: nn.Module, parts: Sequence[RoutedBatch]) -> list[RoutedBatch]:
        """The parts of this process's share of a batch, each with the ratio of the whole batch.

        One part alone needs none: `losses` sums over processes then. Called without gradients, in the types of a step.
        """
        if len(parts) == 1:
            return list(parts)
        ratios = []
        for part in parts:
            way = Routed(part.noise)
            with self.dynamic.using(way):
                self.inner.predict(model, part.noisy)
            ratios.append(model_ratio(way.masks, self.dynamic.sizes, len(part.condition)))
        ratio = self._mean(torch.cat(ratios))
        return [dataclasses.replace(part, ratio=ratio) for part in parts]

    def _mean(self, values: Tensor) -> Tensor:
        """Mean of (B,) over the images of all processes; no gradient."""
        sums = torch.stack([values.detach().sum(), values.new_tensor(float(len(values)))])
        if self.total is not None:
            sums = self.total(sums)
        return sums[0] / sums[1]

    def predict(self, model: nn.Module, noisy: RoutedBatch) -> RoutedPrediction:
        """The routed network, and what runs beside it."""
        way = Routed(noisy.noise)
        with self.dynamic.using(way):
            own = self.inner.predict(model, noisy.noisy)
        ratio, kept = model_ratio(way.masks, self.dynamic.sizes, len(noisy.condition)), kept_shares(way.masks)
        complete = taught = None
        if noisy.step < self.beside_steps and self.beside == "complete":
            with self.dynamic.complete():
                complete = self.inner.predict(
                    model, dataclasses.replace(noisy.noisy, condition=noisy.complete_condition)
                )
        elif noisy.step < self.beside_steps and self.beside == "teacher":
            assert self.teacher is not None
            with torch.no_grad():
                taught = self.inner.predict(self.teacher, noisy.noisy)
        return RoutedPrediction(own.output, taught, own=own, ratio=ratio, kept=kept, complete=complete)

    def losses(self, model: nn.Module, noisy: RoutedBatch, prediction: RoutedPrediction) -> dict[str, Tensor]:
        """loss, dynamic_loss with its parts, complete_loss or kd_loss, budget_loss, and what was kept."""
        own = self.inner.losses(model, noisy.noisy, prediction.own)
        terms = {"dynamic_loss": own["loss"], **{k: v for k, v in own.items() if k != "loss"}}
        loss = own["loss"]
        if prediction.complete is not None:
            other = dataclasses.replace(noisy.noisy, condition=noisy.complete_condition)
            terms["complete_loss"] = self.inner.losses(model, other, prediction.complete)["loss"]
            loss = loss + self.beside_weight * terms["complete_loss"]
        if prediction.teacher is not None:
            terms |= self.inner.kd_terms(noisy.noisy, prediction.own, prediction.teacher)
            loss = loss + self.beside_weight * terms["kd_loss"]
        budget = budget_at(noisy.step, self.target, self.ramp_steps)
        terms["budget_loss"] = self.budget_loss(prediction.ratio, noisy.ratio, budget)
        shares = {"ratio": prediction.ratio.detach(), "budget": torch.full_like(prediction.ratio, budget).detach()}
        return {"loss": loss + terms["budget_loss"], **terms, **shares, **prediction.kept}

    def budget_loss(self, ratio: Tensor, whole: Tensor | None, budget: float) -> Tensor:
        """(B,), of mean w (r - budget)^2 and its gradient. whole: r of the global batch; None takes it here."""
        gap = (self._mean(ratio) if whole is None else whole) - budget
        return self.weight * (gap**2 + 2 * gap * (ratio - ratio.detach()))
