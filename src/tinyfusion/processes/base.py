"""What a noising process is to everything else: draw the randomness of a batch, predict, take losses.

`NoisyBatch` holds all that is random about a batch in one frozen object, so teacher and student see the same noise,
timesteps and label drops by construction. `Objective` is what the training loop calls; wrappers (gates, distillation)
offer the same three methods, and the loop cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn

from tinyfusion.core.rng import Draws


@dataclass(frozen=True)
class Batch:
    """Clean data: x (B, C, H, W) in the model's own space, labels y (B,) int64."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """A batch and everything that was drawn for it. B samples."""

    x0: Tensor  # (B, C, H, W) clean
    noise: Tensor  # (B, C, H, W)
    xt: Tensor  # (B, C, H, W) noised
    t: Tensor  # (B,) int64 index into the process
    y: Tensor  # (B,) int64 labels, the null class where dropped
    step: int = 0
    gate_noise: tuple[Tensor, ...] = ()  # per gate group (B, K or M), where gates are learned

    def each(self, change: Callable[[Tensor], Tensor]) -> NoisyBatch:
        """The batch with `change` applied to every tensor, such as one that picks samples: all have them along axis 0."""
        return replace(
            self,
            x0=change(self.x0),
            noise=change(self.noise),
            xt=change(self.xt),
            t=change(self.t),
            y=change(self.y),
            gate_noise=tuple(map(change, self.gate_noise)),
        )


@dataclass(frozen=True)
class Prediction:
    """A model's output and, where a wrapper asked for it, the teacher's answer."""

    output: Tensor
    teacher: Prediction | None = None


class Objective(Protocol):
    """The three calls of a training step."""

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        """Everything random about `batch`."""
        ...

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        """Run the model."""
        ...

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-sample terms (B,); "loss" is the one that is optimised (its mean), the others are logged."""
        ...
