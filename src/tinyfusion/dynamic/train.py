"""Train routers and weights under a compute budget, and calibrate the routers at inference.

`DynamicObjective` wraps a process:

    loss = L_dyn [+ L_full or a teacher's loss] + w (r - lambda)^2

L_dyn: the process's loss of the routed network. L_full, in the first part of a training: that of the whole network, with the
same noise and time and independently dropped conditions. r: mean ratio of multiply-accumulates over the *global* batch.

The gradient of (r - lambda)^2 is 2 (r - lambda) dr, and dr is a mean over images. So every image has the term
w [(r - lambda)^2 + 2 (r - lambda) (r_b - stop(r_b))] with r of the whole batch: value and gradient do not depend on how the
batch is split, where the published code squares the mean of each process, which adds the variance of those means. With one
microbatch per rank r is one sum over ranks; with more, `prepared` first runs all of them without a graph, because the gradient
of the first microbatch needs the ratio of the last.

Training controls the mean of random decisions, inference takes the more likely one: units with logits of 1.1 +- 0.5 are on in
74 % of training and 99 % of inference, and published ratios miss their targets (0.5 gave 0.488). Training therefore ends with
steps without noise, and `calibrate` corrects the remaining difference by one offset on the biases of all routers.

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

from tinyfusion.blocks.dynamics import Deciding, kept_shares, model_ratio
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, StratifiedDraws
from tinyfusion.core.signals import check_stop
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.processes.base import Batch, FoldedGuidance, NoisyBatch, Objective, Prediction, Process, StepMemory

# router of a block -> address of its noise
PURPOSES = {
    "attn_rate": "route/attn", "mlp_rate": "route/mlp", "token_selection": "route/token", "block_rate": "route/block",
}  # fmt: skip
TOLERANCE = 0.01  # of the target
_AIM = 0.1  # share of the tolerance at which the search ends: 1,000 other images were up to 0.4 % off the 16 measured
_ROUNDS = 60
_FINE, _FINEST = 1e-3, 1e-6  # smallest interval of offsets searched: within the tolerance, and outside of it
_FURTHEST = 2.0**12
LAST_LAYERS = ("attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.2", "block_rate.router")
Pass = tuple[int, Callable[[], object]]  # number of images, and a forward pass of the model on them
HOLD_STEPS = 100  # steps with a budget of 1 at the beginning, published


def budget_at(step: int, target: float, ramp_steps: int | None) -> float:
    """lambda at `step`: 1 for 100 steps, then the linear ramp from 1 at step 0 to `target` at `ramp_steps`, then `target`.

    ramp_steps None: no ramp. The ramp begins at step 0, so there is a jump at step 100 (published).
    """
    if step < HOLD_STEPS:
        return 1.0
    if ramp_steps is None or step > ramp_steps:
        return target
    return 1.0 - (1.0 - target) * step / ramp_steps


@dataclass(frozen=True, kw_only=True)
class RoutedBatch(NoisyBatch):
    """A noisy batch with the noise of all routers.

    router_noise: per router (B, L, units or tokens), logistic. complete_condition: of the complete pass, dropped
    independently. ratio: of the global batch, if it was measured in advance; a scalar.
    """

    router_noise: dict[str, Tensor]
    complete_condition: Condition
    ratio: Tensor | None = None


@dataclass(frozen=True)
class RoutedPrediction(Prediction):
    """The routed output, with the ratio (B,), the shares (B,) of kept units for the log, and the complete prediction."""

    ratio: Tensor = field(kw_only=True)
    kept: Mapping[str, Tensor] = field(kw_only=True)
    complete: Prediction | None = field(default=None, kw_only=True)


class Routed(Deciding):
    """Decides for every image under its noise, with gradients."""

    def __init__(self, noise: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.drawn = noise

    def noise(self, router: str, index: int) -> Tensor | None:
        return self.drawn[router][:, index]


@dataclass(frozen=True)
class DynamicObjective(Objective):
    """The objective of the module docstring. target: lambda. weight: w.

    auxiliary: the second term while `step < auxiliary_steps`: the loss of the whole network ("complete"), the distance of the
    routed output from that of `teacher`, a frozen static model with its blocks ("teacher"), or none. taught_alone: the teacher's
    output is the only target, at all steps; `guidance` is what the model then folds in, if any. finish_from: the step from which decisions
    have no noise, as at inference, with their gradient. strata: of the times; 1: not stratified. total: the sum of a tensor
    over all ranks. Raises ValueError on invalid settings.
    """

    inner: Process
    dynamic: DynamicModel
    target: float
    label_drop: float
    ramp_steps: int | None = 1000
    weight: float = 2.0
    auxiliary: Literal["complete", "teacher", "none"] = "complete"
    auxiliary_steps: int = 30_000
    auxiliary_weight: float = 1.0
    teacher: tuple[nn.Module, BlockStack] | None = None
    taught_alone: bool = False
    guidance: FoldedGuidance | None = None
    finish_from: int | None = None
    strata: int = 4
    total: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise ValueError(f"a budget is a share above 0 and at most 1; got {self.target:g}")
        if (self.auxiliary == "teacher") != (self.teacher is not None):
            raise ValueError("dynamic.auxiliary teacher needs a teacher, and the others take none")
        if self.teacher is None and (self.taught_alone or self.guidance is not None):
            raise ValueError("a target of a teacher, and its guidance, need dynamic.auxiliary teacher")
        if self.strata < 1:
            raise ValueError(f"strata of times are at least 1; got {self.strata}")

    def step_memory(self) -> StepMemory:
        passes = 2 if self.auxiliary == "complete" and self.auxiliary_steps > 0 else 1
        return StepMemory(self.teacher, teacher_rows=1 if self.guidance is None else 2, passes=passes)

    def draw(self, batch: Batch, draws: Draws) -> RoutedBatch:
        """The inner draws with stratified times, the condition of the complete pass, and the noise of all routers."""
        if self.strata > 1:
            # with four strata of 1000 steps t = 250 (i mod 4) + U{0..249}, as published, but by the index in the global batch
            # instead of that in a process; the mean ratio of a batch varies less
            draws = StratifiedDraws(draws.seed, draws.step, draws.first, draws.num, self.strata)
        noisy = self.inner.draw(batch, draws)
        condition = batch.condition.drop(draws, self.label_drop, "label_drop/complete")
        noise = self._router_noise(draws, batch.x.device)
        return RoutedBatch(**vars(noisy), router_noise=noise, complete_condition=condition)

    def _router_noise(self, draws: Draws, device: torch.device) -> dict[str, Tensor]:
        """Logistic noise of every decision but forced ones; zeros from `finish_from` on."""
        settings, sizes, depth = self.dynamic.settings, self.dynamic.sizes, len(self.dynamic.stack)
        units = sizes.num_heads - settings.forced_first
        decisions = {"attn_rate": units, "mlp_rate": units} if settings.width else {}
        decisions |= {"token_selection": sizes.num_tokens} if settings.tokens else {}
        decisions |= {"block_rate": 1} if settings.depth else {}
        if self.finish_from is not None and draws.step >= self.finish_from:
            return {name: torch.zeros((draws.num, depth, num), device=device) for name, num in decisions.items()}
        uniform = {name: draws.uniform(PURPOSES[name], (depth, num)) for name, num in decisions.items()}
        logistic = {name: (np.log(u) - np.log1p(-u)).astype(np.float32) for name, u in uniform.items()}
        return {name: torch.from_numpy(noise).to(device) for name, noise in logistic.items()}

    def prepared(self, model: nn.Module, microbatches: Sequence[RoutedBatch]) -> list[RoutedBatch]:
        """The microbatches with the ratio of the whole batch; a single one gets it in `losses`, from a sum over ranks."""
        if len(microbatches) == 1:
            return list(microbatches)
        ratios = [self._routed(model, noisy)[1] for noisy in microbatches]
        ratio = self._mean(torch.cat(ratios))
        return [dataclasses.replace(noisy, ratio=ratio) for noisy in microbatches]

    def _routed(self, model: nn.Module, noisy: RoutedBatch) -> tuple[Prediction, Tensor, dict[str, Tensor]]:
        routed = Routed(noisy.router_noise)
        with self.dynamic.using(routed):
            own = self.inner.predict(model, noisy)
        return own, model_ratio(routed.masks, self.dynamic.sizes, len(noisy)), kept_shares(routed.masks)

    def _mean(self, values: Tensor) -> Tensor:
        """Mean of (B,) over the images of all ranks; no gradient."""
        sums = torch.stack([values.detach().sum(), values.new_tensor(float(len(values)))])
        if self.total is not None:
            sums = self.total(sums)
        return sums[0] / sums[1]

    def predict(self, model: nn.Module, noisy: RoutedBatch) -> RoutedPrediction:
        """The routed network, and the auxiliary pass."""
        own, ratio, kept = self._routed(model, noisy)
        complete = taught = None
        if noisy.step < self.auxiliary_steps and self.auxiliary == "complete":
            with self.dynamic.complete():
                complete = self.inner.predict(model, dataclasses.replace(noisy, condition=noisy.complete_condition))
        elif self.teacher is not None and (self.taught_alone or noisy.step < self.auxiliary_steps):
            taught = self.inner.taught(self.teacher[0], noisy, self.guidance)
        return RoutedPrediction(own.output, taught, ratio=ratio, kept=kept, complete=complete)

    def losses(self, model: nn.Module, noisy: RoutedBatch, prediction: RoutedPrediction) -> dict[str, Tensor]:
        """loss, dynamic_loss with its terms, complete_loss or kd_loss, budget_loss, and kept shares."""
        own = self.inner.losses(model, noisy, prediction)
        terms = {"dynamic_loss": own["loss"], **{k: v for k, v in own.items() if k != "loss"}}
        loss = own["loss"]
        if prediction.complete is not None:
            other = dataclasses.replace(noisy, condition=noisy.complete_condition)
            terms["complete_loss"] = self.inner.losses(model, other, prediction.complete)["loss"]
            loss = loss + self.auxiliary_weight * terms["complete_loss"]
        if prediction.teacher is not None:
            terms |= self.inner.kd_terms(noisy, prediction, prediction.teacher)
            loss = self.auxiliary_weight * terms["kd_loss"] + (0 if self.taught_alone else loss)
        budget = budget_at(noisy.step, self.target, self.ramp_steps)
        terms["budget_loss"] = self.budget_loss(prediction.ratio, noisy.ratio, budget)
        shares = {"ratio": prediction.ratio.detach(), "budget": torch.full_like(prediction.ratio, budget).detach()}
        return {"loss": loss + terms["budget_loss"], **terms, **shares, **prediction.kept}

    def budget_loss(self, ratio: Tensor, whole: Tensor | None, budget: float) -> Tensor:
        """(B,), of mean w (r - budget)^2 and its gradient. whole: r of the global batch; None: computed here."""
        gap = (self._mean(ratio) if whole is None else whole) - budget
        return self.weight * (gap**2 + 2 * gap * (ratio - ratio.detach()))


# ------------------------------------------------------------------------------------------------------------ calibration


@torch.no_grad()
def inference_ratio(dynamic: DynamicModel, passes: Sequence[Pass]) -> float:
    """Mean share of the full model's multiply-accumulates that inference runs, over all images of `passes`.

    The images should be noised to the timesteps of the intended sampler, or to evenly spread ones.
    """
    total, num = 0.0, 0
    for images, run in passes:
        check_stop()
        decisions = Deciding()
        with dynamic.using(decisions):
            run()
        total += float(model_ratio(decisions.masks, dynamic.sizes, images).sum())
        num += images
    return total / num


def calibrate(
    dynamic: DynamicModel, target: float, ratio: Callable[[], float], tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """Apply the offset of all logits with which `ratio()` is within `tolerance` (a share) of `target`; return (offset, ratio).

    ratio: measures the current model, such as `inference_ratio`. The search aims at a tenth of the tolerance, so that other
    images meet the target too. Raises UserError, with the model unchanged, if no offset does: the ratio is a step function,
    with smaller steps for more timesteps and images.
    """
    search = _Search(dynamic, target, ratio)
    start, aim = search.at(0.0), _AIM * tolerance * target
    if search.best[0] > aim:
        low, high = _bracket(search, start)
        for _ in range(_ROUNDS):
            fine = _FINE if search.best[0] <= tolerance * target else _FINEST
            if search.best[0] <= aim or high - low < fine:
                break
            middle = (low + high) / 2
            low, high = (low, middle) if search.at(middle) > target else (middle, high)
    off, offset, reached = search.best
    if off > tolerance * target:
        search.shift(0.0)
        raise UserError(
            f"no offset of the routers gives a ratio of {target:g} within {tolerance:.0%}: the nearest is {reached:.4f}. "
            "Calibrate on more timesteps and images, or choose a budget that these routers can reach"
        )
    search.shift(offset)
    return offset, reached


def _bracket(search: _Search, start: float) -> tuple[float, float]:
    """(low, high) offsets between which the ratio crosses the target; (0, 0) if there are none."""
    sign, previous, reach = (1.0 if start < search.target else -1.0), 0.0, 0.25
    while reach <= _FURTHEST:
        edge = sign * reach
        if (search.at(edge) < search.target) != (start < search.target):
            return min(previous, edge), max(previous, edge)
        previous, reach = edge, 2 * reach
    return 0.0, 0.0


class _Search:
    """Evaluates the ratio at offsets from the original biases; `best`: (error, offset, ratio)."""

    def __init__(self, dynamic: DynamicModel, target: float, ratio: Callable[[], float]) -> None:
        self.target, self.ratio = target, ratio
        ends = tuple(f"{layer}.bias" for layer in LAST_LAYERS)
        biases = [p for name, p in dynamic.routers().items() if name.endswith(ends)]
        self.biases = [(bias, bias.detach().clone()) for bias in biases]
        self.best = (float("inf"), 0.0, 0.0)

    @torch.no_grad()
    def shift(self, offset: float) -> None:
        """Set every bias to its original value plus `offset`."""
        for bias, value in self.biases:
            bias.copy_(value + offset)

    def at(self, offset: float) -> float:
        """Apply `offset` and measure the ratio."""
        self.shift(offset)
        value = self.ratio()
        self.best = min(self.best, (abs(value - self.target), offset, value))
        return value
