"""GateDistribution, and the published one: a categorical per group, sampled by Gumbel-softmax. Knows no models.

Shapes: B samples, K_g candidates and M_g blocks of group g, L = sum of M_g blocks.
Source: TinyFusion (arXiv 2412.01199), section 3; Jang et al. arXiv 1611.01144 for the straight-through estimator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.core.rng import Draws


class GateDistribution(nn.Module, ABC):
    """One independent distribution per group over which of its blocks stay, with learned logits theta_g."""

    meaning: str  # of `probabilities`, for the plan
    paired = False  # whether `surrogate` compares neighbours that differ in nothing but their masks

    def __init__(self, groups: Sequence[BlockGroup], sizes: Sequence[int], logit_init: float) -> None:
        super().__init__()
        self.groups = list(groups)
        self.logits = nn.ParameterList([nn.Parameter(torch.full((size,), logit_init)) for size in sizes])

    @abstractmethod
    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """What `sample` consumes: noise (B, ...) per group."""

    @abstractmethod
    def sample(self, noise: Sequence[Tensor], temperature: float, scaling: float) -> Tensor:
        """Gates (B, L): exactly 0 or 1 forward, with the estimator's gradient to the logits."""

    def surrogate(self, noise: Sequence[Tensor], scaling: float, losses: Tensor) -> Tensor | None:
        """(B,) to be differentiated beside the losses (B,), for estimators that do not go through the gates."""
        return None

    @abstractmethod
    def kept(self, index: int, theta: Tensor) -> list[int]:
        """Blocks of group `index` that logits `theta` decide for, ascending."""

    @abstractmethod
    def probabilities(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """What `theta` says of group `index`, as `meaning` explains."""

    @abstractmethod
    def confidence(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """How sure the decision of group `index` is: one number for the group, or one per kept block."""


class CategoricalGates(GateDistribution):
    """p(candidate k of group g) = softmax(scaling * theta_g)_k, one independent categorical per group."""

    meaning = "probability of each candidate of each group, candidates in lexicographic order"

    def __init__(self, groups: Sequence[BlockGroup], logit_init: float = 0.02) -> None:
        super().__init__(groups, [g.num_candidates for g in groups], logit_init)
        for index, group in enumerate(self.groups):
            rows = torch.zeros(group.num_candidates, group.size)
            for row, kept in enumerate(group.candidates()):
                rows[row, [i - group.start for i in kept]] = 1.0
            self.register_buffer(f"candidates_{index}", rows, persistent=False)

    def candidates(self, group: int) -> Tensor:
        """(K_g, M_g) of 0 and 1, rows in lexicographic order of the kept positions."""
        return self.get_buffer(f"candidates_{group}")

    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """Standard Gumbel noise (B, K_g) per group."""
        return tuple(
            torch.from_numpy(draws.gumbel(f"gumbel/{index}", tuple(theta.shape)))
            for index, theta in enumerate(self.logits)
        )

    def sample(self, noise: Sequence[Tensor], temperature: float, scaling: float) -> Tensor:
        """Gates (B, L): 0/1 forward, with the gradient of the relaxed sample (straight-through).

        noise: standard Gumbel noise (B, K_g) per group. y = onehot(argmax p) - sg(p) + p with
        p = softmax((scaling * theta + noise) / temperature); the gates of a group are y @ candidates.
        Differs from the released code by staying in float32 under autocast.
        """
        parts = []
        for index, logits in enumerate(self.logits):
            relaxed = torch.softmax((scaling * logits + noise[index]) / temperature, dim=-1)
            hard = nn.functional.one_hot(relaxed.argmax(dim=-1), relaxed.shape[-1]).to(relaxed.dtype)
            with torch.autocast(relaxed.device.type, enabled=False):
                # (relaxed - relaxed.detach()) is exactly 0 forward, so the gates are exactly 0 or 1.
                parts.append((hard + (relaxed - relaxed.detach())) @ self.candidates(index))
        return torch.cat(parts, dim=-1)

    def kept(self, index: int, theta: Tensor) -> list[int]:
        """The most probable candidate; the first of equals."""
        return mode(self.groups[index : index + 1], [theta])

    def probabilities(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """softmax(scaling * theta), (K_g), without temperature."""
        return probabilities([theta], scaling)[0]

    def confidence(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """The probability of the most probable candidate; 1 / K_g is chance."""
        return [max(self.probabilities(index, theta, scaling))]


def mode(groups: Sequence[BlockGroup], logits: Sequence[Tensor]) -> list[int]:
    """Kept block indices of the most probable candidates; the first of equals."""
    kept: list[int] = []
    for group, theta in zip(groups, logits, strict=True):
        kept += group.candidates()[int(torch.argmax(theta))]
    return kept


def probabilities(logits: Sequence[Tensor], scaling: float) -> list[list[float]]:
    """softmax(scaling * theta) per group, without temperature; the confidence of a group is its maximum."""
    return [torch.softmax(scaling * theta.detach().float(), dim=-1).tolist() for theta in logits]
