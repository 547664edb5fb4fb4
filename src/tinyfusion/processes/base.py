"""Interfaces of processes and objectives: draw the random numbers of a batch, predict, compute losses.

A `NoisyBatch` contains all random draws of a batch in one frozen object, so teacher and student see the same noise,
timesteps and label drops. The training loop calls an `Objective`; mask learning and distillation are objectives that
wrap another one. A `Process` is an objective that wraps no other; it also has the methods for noise that pruning and
distillation need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.conditioning.condition import Condition, concat
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws

# (x, time as the network takes it) -> output; condition and guidance are bound
Denoiser = Callable[[Tensor, Tensor], Tensor]
StepNoise = Callable[[int], Tensor]  # position of the step in the trajectory -> noise (B, C, H, W)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch axis: (B,)."""
    return x.flatten(1).mean(1)


def mix_guidance(both: Tensor, scale: float | Tensor, channels: int) -> Tensor:
    """The guided output from the conditional and the unconditional half of a batch (2B, C, H, W): on the first `channels` channels
    uncond + scale * (cond - uncond), the others of the conditional half. scale: a number, or a tensor (1,).
    """
    cond, uncond = both.unflatten(0, (2, -1))  # chunks of an unknown size have no form in graphs
    mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([mixed, cond[:, channels:]], dim=1)


@dataclass(frozen=True)
class Batch:
    """Clean data: x (B, C, H, W) in the model's own space, and the conditions of the images."""

    x: Tensor
    condition: Condition


@dataclass(frozen=True)
class NoisyBatch:
    """A batch and everything that was drawn for it, with the B samples along axis 0 of every tensor except scalars.

    Processes with further random draws add fields in a subclass.
    """

    x0: Tensor  # (B, C, H, W) clean
    noise: Tensor  # (B, C, H, W)
    xt: Tensor  # (B, C, H, W) noised
    t: Tensor  # (B,) time in the process
    condition: Condition  # the null row if dropped
    step: int = 0
    gate_noise: tuple[Tensor, ...] = ()  # per gate group (B, K or M), if gates are learned

    def __len__(self) -> int:
        return len(self.condition)

    @property
    def device(self) -> torch.device:
        return self.condition.device

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with `change`, such as a selection of samples, applied to every tensor except scalars."""

        def changed(value: Any) -> Any:
            if isinstance(value, Condition):
                return value.each(change)
            return tree_map_only(Tensor, lambda tensor: change(tensor) if tensor.ndim else tensor, value)

        return dataclasses.replace(self, **{name: changed(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Prediction:
    """A model's output and, in distillation, the teacher's prediction."""

    output: Tensor
    teacher: Prediction | None = None


@dataclass(frozen=True)
class FoldedGuidance:
    """Classifier-free guidance that a student has learned from its teacher, so that it is drawn without.

    scale: of the guidance, above 1. channels: leading output channels that it mixes, see `mix_guidance`.
    Source: Meng et al., arXiv 2210.03142, of one scale.
    """

    scale: float
    channels: int

    def __post_init__(self) -> None:
        if not (1 < self.scale <= 1e6 and self.channels >= 1):
            raise ValueError(
                f"folded guidance has a scale above 1 and at least one channel; got {self.scale:g} on {self.channels}"
            )


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step in addition to one forward and backward pass of the trained model.

    teacher: a frozen model that runs first, without a graph, and its blocks; teacher_rows: of its batch per image. features:
    number of the teacher's blocks whose outputs are retained for a comparison. graph_share: mean share of the images that run a block
    with a graph.
    passes: number of forward passes of the trained model whose graphs are retained at the same time. passing: bytes of the
    teacher's weights that are on the device on their way through, in addition to those that stay there.
    """

    teacher: tuple[nn.Module, BlockStack] | None = None
    teacher_rows: int = 1
    features: int = 0
    graph_share: float = 1.0
    passes: int = 1
    passing: int = 0


@dataclass(frozen=True)
class NoiseAxis:
    """The quantity by which a process orders noised images, from `noisiest` to `cleanest`."""

    name: str
    noisiest: float
    cleanest: float


@dataclass(frozen=True)
class Trials:
    """Short trainings that begin at the same state, after which the objective decides how to go on.

    num: of trials. steps: of each. batch_size: images per step. rate: their learning rates over those
    of the training. enter: makes the objective that of a trial. decide: gets the mean
    loss of the second half of every trial, once the state is as it was before.
    """

    num: int
    steps: int
    batch_size: int
    rate: float
    enter: Callable[[int], None]
    decide: Callable[[Sequence[float]], None]


class Objective(Protocol):
    """Interface of a training objective: the calls of a training step, in their order. Inherit for the defaults.

    A noisy batch is a `NoisyBatch`, or any other object that the objective's `draw` returns.
    """

    def draw(self, batch: Any, draws: Draws) -> Any:
        """Draw all random numbers of `batch`, and return it noised."""
        ...

    def prepared(self, model: nn.Module, microbatches: Sequence[Any]) -> Sequence[Any]:
        """Prepare all microbatches of a rank before the first one runs, without gradients. Default: unchanged."""
        return microbatches

    def predict(self, model: nn.Module, noisy: Any) -> Prediction:
        """Run the model."""
        ...

    def losses(self, model: nn.Module, noisy: Any, prediction: Any) -> dict[str, Tensor]:
        """Per-sample terms (B,) by name: the mean of "loss" is optimised, the others are logged."""
        ...

    @property
    def trial_step(self) -> int | None:
        """The step before which `trials` may be wanted. Default: none."""
        return None

    def trials(self) -> Trials | None:
        """The trials before `trial_step`, unless all is decided. Default: none."""
        return None

    def step_memory(self) -> StepMemory:
        """Memory of a step. Default: the trained model alone."""
        return StepMemory()


class Process(Objective, Protocol):
    """An objective that wraps no other one, with methods for pruning and distillation. Default: no noise levels."""

    def taught(self, teacher: nn.Module, noisy: Any, guidance: FoldedGuidance | None) -> Prediction:
        """The teacher's prediction, under guidance that a student folds in: one pass over the batch with its conditions and without.

        No gradient reaches the teacher.
        """
        with torch.no_grad():
            if guidance is None:
                return self.predict(teacher, noisy)
            both = dataclasses.replace(
                noisy.each(lambda tensor: torch.cat([tensor, tensor])),
                condition=concat([noisy.condition, noisy.condition.null()]),
            )
            output = self.predict(teacher, both).output.float()
            return Prediction(mix_guidance(output, guidance.scale, guidance.channels))

    def kd_terms(self, noisy: Any, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """Distillation loss (B,) of a student's output against its teacher's: "kd_loss", and its terms for the log.

        No gradient reaches the teacher.
        """
        ...

    def low_noise(self, noisy: Any) -> Any:
        """The batch with clean inputs and low-noise timesteps, as in TinyFusion's released block influence."""
        raise UserError(
            "clean inputs at low noise need a process with noise levels; a masked model or a module of your own has none: set "
            "prune.bi_inputs=noised"
        )

    @property
    def noise_axis(self) -> NoiseAxis | None:
        """The axis of `noise_places`; None if noised images are not ordered."""
        return None

    def noise_places(self, noisy: Any) -> Tensor:
        """(B,) the place of every noised image on `noise_axis`."""
        return noisy.t

    @property
    def num_levels(self) -> int:
        """Number of noise levels of `at_level`; 0 if the process has no single noise level per image."""
        return 0

    def at_level(self, noisy: Any, level: int) -> Any:
        """The same images, noise and conditions, all at noise level `level`, from 0 (cleanest) to `num_levels` - 1."""
        raise UserError(f"the process of this model has no level of noise {level}")
