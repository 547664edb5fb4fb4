"""Variants of recovery for `recover_extras.py`: starting weights, feature losses, block-wise training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.recover.terms import massive_mask
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import trainable
from tinyfusion.training.state import TrainState

RECIPE = load_recipe("digits-published")
PLANS: dict[str, tuple[list[int], list[list[int]] | None]] = {
    "1:2": ([0, 2, 4, 6, 9, 10], [[1, 2]] * 6),
    "no groups": ([0, 1, 2, 3, 5, 6], None),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A teacher, a plan, a seed, and the length of the recovery."""

    teacher: LoadedModel
    plan: PrunePlan
    seed: int
    steps: int
    batch_size: int

    @property
    def dropped(self) -> dict[int, list[int]]:
        """Student block -> dropped teacher blocks up to the next kept one; those before the first belong to it."""
        kept = self.plan.kept["blocks"]
        ends = [*kept[1:], self.plan.depth["blocks"]]
        runs = {k: list(range(start + 1, end)) for k, (start, end) in enumerate(zip(kept, ends, strict=True))}
        return {**runs, 0: list(range(kept[0])) + runs[0]}


Start = Callable[[Case], tuple[LoadedModel, dict[str, nn.Parameter]]]


def plain_start(case: Case) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """The pruned teacher."""
    student = case.teacher.cut(case.plan)
    return student, trainable(student.module)


def merged_start(case: Case, weight: float) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """The pruned teacher, each kept block mixed with the mean of its dropped neighbours by `weight`."""
    student, parameters = plain_start(case)
    teacher_blocks, student_blocks = list(case.teacher.stack), list(student.stack)
    with torch.no_grad():
        for index, neighbours in case.dropped.items():
            if neighbours:
                others = [dict(teacher_blocks[i].named_parameters()) for i in neighbours]
                for name, own in student_blocks[index].named_parameters():
                    own.lerp_(torch.stack([o[name] for o in others]).mean(0), weight)
    return student, parameters


@functools.cache
def learned_deltas(seed: int) -> dict[str, Tensor]:
    """Averaged LoRA updates of mask learning with the recipe's settings, by name of the weight."""
    teacher = open_model("digits")
    objective = GaussianObjective(RECIPE.prune.training.label_drop)
    learner = mask_learner(teacher, objective, RECIPE.prune, Randomness(seed).generator_seed("lora"))
    state = TrainState(learner.module, learner.parameter_groups, RECIPE.prune.training)
    for _ in train_steps(state, learner.objective, batches(seed), RECIPE.prune.training, Randomness(seed)):
        pass
    with torch.no_grad():
        for name, value in learner.module.named_parameters():
            if name in state.ema.average:
                value.copy_(state.ema.average[name])
        return {
            f"{name}.weight": module.get_delta_weight("delta")
            for name, module in learner.module.named_modules()
            if hasattr(module, "get_delta_weight")
        }


def with_deltas(case: Case) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """The student of a teacher with the LoRA updates of its mask search merged in."""
    changed, deltas = case.teacher.copy(), learned_deltas(case.seed)
    with torch.no_grad():
        for name, delta in deltas.items():
            changed.module.get_parameter(name).add_(delta)
    student = changed.cut(dataclasses.replace(case.plan, teacher=""))
    return student, trainable(student.module)


class LinearBridge(nn.Module):
    """x + x W + b in place of consecutive dropped blocks, after a kept block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to the same shape."""
        return x + torch.addmm(self.bias, x.flatten(0, 1), self.weight).view_as(x)


class AffineBridge(nn.Module):
    """x (1 + a) + b per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to the same shape."""
        return torch.addcmul(self.bias, x, 1 + self.weight)


def bridged_start(case: Case, kind: type[nn.Module], fitted: bool) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """Bridges in place of dropped blocks, initialised to the identity or (fitted) by least squares to the teacher."""
    student, parameters = plain_start(case)
    for index, neighbours in case.dropped.items():
        if neighbours:
            bridge = kind(case.teacher.arch.hidden_size)
            if fitted:
                fit_bridge(case, bridge, neighbours)
            list(student.stack)[index].register_forward_hook(lambda _m, _a, out, bridge=bridge: bridge(out))
            parameters |= {f"bridge.{index}.{name}": p for name, p in bridge.named_parameters()}
    return student, parameters


@torch.no_grad()
def fit_bridge(case: Case, bridge: nn.Module, neighbours: list[int]) -> None:
    """Fit a bridge by ridge regression of the dropped blocks' residual on their input, over 512 training images."""
    first = list(case.teacher.stack)[neighbours[0]]
    inputs: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    objective = GaussianObjective(0.0)
    draws = Randomness(case.seed).at(10**6, 0, 512)
    with case.teacher.stack.tap([neighbours[-1]]) as outputs:
        objective.predict(case.teacher.module, objective.draw(batches(case.seed)(10**6, 512, draws), draws))
    handle.remove()
    x = inputs[0].flatten(0, 1).double()
    added = outputs[neighbours[-1]].flatten(0, 1).double() - x
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solved = torch.linalg.solve(ones.T @ ones + 1e-2 * len(x) * torch.eye(ones.shape[1], dtype=x.dtype), ones.T @ added)
    bridge.get_parameter("weight").copy_(solved[:-1])
    bridge.get_parameter("bias").copy_(solved[-1])


@dataclasses.dataclass(frozen=True)
class Normalised(DistilledObjective):
    """The feature loss of a pair over the mean square of the teacher's masked features of the sample."""

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B,) of one pair."""
        calm = 1.0 if self.sigmas is None else massive_mask(teacher, self.sigmas)
        return super().feature_loss(student, teacher) / (calm * teacher).square().flatten(1).mean(1)


@dataclasses.dataclass(frozen=True)
class BlockWise(DistilledObjective):
    """Train each segment between paired blocks on the teacher's activations first, then the student as a whole."""

    blockwise_steps: int = 0

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Any:
        """During the block-wise steps, (B,) squared error of the segments; the student as a whole does not run."""
        if noisy.step >= self.blockwise_steps:
            return super().predict(model, noisy)
        stream: dict[int, tuple[Any, ...]] = {}
        blocks = list(self.teacher_stack)
        handles = [
            block.register_forward_pre_hook(lambda _m, args, i=i: stream.__setitem__(i, args))
            for i, block in enumerate(blocks)
        ]
        with torch.no_grad(), self.teacher_stack.tap([len(blocks) - 1]) as last:
            self.inner.predict(self.teacher, noisy)
        for handle in handles:
            handle.remove()
        after = {**{i - 1: args[0] for i, args in stream.items()}, len(blocks) - 1: last[len(blocks) - 1]}
        own, errors, student, x = list(self.student_stack), [], -1, after[-1]
        for s, t in self.pairs:
            for block in own[student + 1 : s + 1]:
                x = block(x, *stream[0][1:])
            errors.append((x - after[t]).square().flatten(1).mean(1))
            student, x = s, after[t]
        return torch.stack(errors).mean(0)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Any) -> dict[str, Tensor]:
        """The error from `predict` during the block-wise steps, then the losses of the student."""
        return {"loss": prediction} if isinstance(prediction, Tensor) else super().losses(model, noisy, prediction)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Starting weights, objective, and the share of block-wise steps."""

    about: str
    start: Start = plain_start
    objective: type[DistilledObjective] | None = DistilledObjective
    blockwise: float = 0.0  # share of the steps
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "masked-kd": Variant("the published recovery: what the others are compared with"),
    "finetune": Variant("no teacher", objective=None),
    "logits-kd": Variant("no features", more={"beta": (0.0, 0.0)}),
    "rep-kd": Variant("no masks", more={"sigmas": None}),
    "joint": Variant("masks of both sides together", more={"mask": "joint"}),
    "masked-kd beta 0.1": Variant("ten times the feature weight", more={"beta": (0.1, 0.0)}),
    "normalised beta 0.01": Variant("feature loss over the teacher's mean square", objective=Normalised),
    "normalised beta 0.1": Variant("same, ten times the weight", objective=Normalised, more={"beta": (0.1, 0.0)}),
    "normalised beta 1": Variant("same, hundred times the weight", objective=Normalised, more={"beta": (1.0, 0.0)}),
    "merged 0.25": Variant(
        "kept blocks hold 0.25 of their dropped neighbours", functools.partial(merged_start, weight=0.25)
    ),
    "merged 0.5": Variant("the same, 0.5", functools.partial(merged_start, weight=0.5)),
    "updates merged": Variant("the LoRA updates of mask learning stay in the weights", with_deltas),
    "bridge": Variant(
        "x + xW + b after a kept block, from zero", functools.partial(bridged_start, kind=LinearBridge, fitted=False)
    ),
    "bridge fitted": Variant(
        "the same, from least squares", functools.partial(bridged_start, kind=LinearBridge, fitted=True)
    ),
    "bridge affine": Variant(
        "x(1 + a) + b per channel, from zero", functools.partial(bridged_start, kind=AffineBridge, fitted=False)
    ),
    "block-wise 1/8": Variant(
        "an eighth of the steps teacher-forced, block by block", objective=BlockWise, blockwise=0.125
    ),
    "block-wise 1/4": Variant("a quarter", objective=BlockWise, blockwise=0.25),
}


@functools.cache
def batches(seed: int) -> ShuffledBatches:
    """The training batches of the recipe."""
    return ShuffledBatches(load_digits(), Randomness(seed), torch.device("cpu"), RECIPE.data.augment)
