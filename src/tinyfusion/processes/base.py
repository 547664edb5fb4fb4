"""What a process (of noising, of masking) is to everything else: draw the randomness of a batch, predict, take losses.

`NoisyBatch` holds all that is random about a batch in one frozen object, so teacher and student see the same noise,
timesteps and label drops by construction. `Objective` is what the training loop calls; wrappers (gates, distillation)
offer the same methods, and the loop cannot tell. `Process` is an objective that stands on a process itself, and
says what pruning and distillation need to know of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.rng import Draws

Denoiser = Callable[
    [Tensor, Tensor], Tensor
]  # (x, time as the network wants it) -> output; condition, guidance are bound
StepNoise = Callable[[int], Tensor]  # position of the step in the trajectory -> noise (B, C, H, W)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch axis: (B,)."""
    return x.flatten(1).mean(1)


@dataclass(frozen=True)
class Batch:
    """Clean data: x (B, C, H, W) in the model's own space, and what each image is conditioned on."""

    x: Tensor
    condition: Condition


@dataclass(frozen=True)
class NoisyBatch:
    """A batch and everything that was drawn for it. B samples, along axis 0 of every tensor.

    A process with more randomness than this has a subclass with more fields.
    """

    x0: Tensor  # (B, C, H, W) clean
    noise: Tensor  # (B, C, H, W)
    xt: Tensor  # (B, C, H, W) noised
    t: Tensor  # (B,) time in the process
    condition: Condition  # the null row where dropped
    step: int = 0
    gate_noise: tuple[Tensor, ...] = ()  # per gate group (B, K or M), where gates are learned

    def __len__(self) -> int:
        return len(self.condition)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.condition.device

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with `change` applied to every tensor, such as one that picks samples."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, Condition):
                changed[field.name] = value.each(change)
            elif isinstance(value, tuple):
                changed[field.name] = tuple(map(change, value))
        return dataclasses.replace(self, **changed)


@dataclass(frozen=True)
class Prediction:
    """A model's output and, where a wrapper asked for it, the teacher's answer."""

    output: Tensor
    teacher: Prediction | None = None


@dataclass(frozen=True)
class StepMemory:
    """What a training step of an objective holds in memory, as far as the trained model does not show it.

    teacher: a frozen model that runs first, without a graph, and its blocks. features: blocks of the teacher whose outputs
    are retained for a comparison. graph_share: share of the images that run a block with a graph. passes: forward passes of the
    trained model whose graphs are retained at once.
    """

    teacher: tuple[nn.Module, BlockStack] | None = None
    features: int = 0
    graph_share: float = 1.0
    passes: int = 1


class Objective(Protocol):
    """The calls of a training step, in their order. Inherit to get the defaults.

    A noisy batch is a `NoisyBatch`, or another record that the objective's own `draw` returns.
    """

    def draw(self, batch: Any, draws: Draws) -> Any:
        """Everything random about `batch`."""
        ...

    def prepared(self, model: nn.Module, microbatches: Sequence[Any]) -> Sequence[Any]:
        """The microbatches of one process in a step, all seen before the first one runs. No gradients. Default: as they are."""
        return microbatches

    def predict(self, model: nn.Module, noisy: Any) -> Prediction:
        """Run the model."""
        ...

    def losses(self, model: nn.Module, noisy: Any, prediction: Any) -> dict[str, Tensor]:
        """Per-sample terms (B,); "loss" is the one that is optimised (its mean), the others are logged."""
        ...

    def step_memory(self) -> StepMemory:
        """What a step holds in memory. Default: the trained model alone."""
        return StepMemory()


class Process(Objective, Protocol):
    """An objective that is not wrapped around another: what it knows of the noise that it adds."""

    def kd_terms(self, noisy: Any, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """(B,) terms of a student's output against its teacher's on one batch: "kd_loss", and its parts for the log.

        No gradient reaches the teacher.
        """
        ...

    def low_noise(self, noisy: Any) -> Any:
        """The clean input at times of little noise, as the released block influence has it.

        Raises UserError where the process has no such thing.
        """
        ...

    @property
    def num_levels(self) -> int:
        """Levels of noise that `at_level` knows; 0 where noise is not ordered by one number."""
        ...

    def at_level(self, noisy: Any, level: int) -> Any:
        """The same images, noise and conditions, all at one level of noise, from 0 (cleanest) to `num_levels` - 1."""
        ...
