"""Compute the modulations of all blocks for several sampler steps at once.

A block's modulation depends on time and label alone. With few images its cost is that of reading its weights, a third of the
model's, which do not shrink with the block: at half the width and two images it takes a tenth of the time. The times and
labels of a trajectory are known at its first step, so the weights are read once for several steps.

Shapes: B images, D width, K times computed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyfusion.models.loaded import DynamicModel

ROWS_AHEAD = 32  # K * B: as fast as one row on a CPU


class ModulationsAhead:
    """Modulations of every block for forward passes on a CPU; `calls`: the times of a trajectory in order.

    Passes in another order, at other times or with other labels give the same values, computed step by step.
    """

    def __init__(self, dynamic: DynamicModel, calls: Sequence[float]) -> None:
        self.dynamic, self.calls = dynamic, list(calls)
        self.call = -1  # index of the current pass in `calls`
        self.times: list[float] = []
        self.step = -1  # index of the current pass in `times`
        self.labels: Tensor | None = None
        self.conditions = torch.empty(0)  # (K * B, D)
        self.cached: dict[int, Tensor] = {}  # per block (K, B, modulation)

    def begin(self, time: float, labels: Tensor) -> None:
        """Start a forward pass at this time with label embeddings (B, D), B at most `ROWS_AHEAD`."""
        self._place(time)
        ahead = self.step + 1 < len(self.times) and self.times[self.step + 1] == time
        if ahead and self.labels is not None and torch.equal(self.labels, labels):
            self.step += 1
            return
        many = ROWS_AHEAD // len(labels)
        self.times = [time] if self.call < 0 else self.calls[self.call : self.call + many]
        self.step, self.labels, self.cached = 0, labels, {}
        times = torch.tensor(self.times, device=labels.device)
        embedding = self.dynamic.embedder.forward(times)  # bypasses the hook that starts a pass
        self.conditions = (embedding.unsqueeze(1) + labels).flatten(0, 1)

    def _place(self, time: float) -> None:
        following = (self.call + 1) % len(self.calls)
        if self.calls[following] == time:
            self.call = following
        else:
            self.call = self.calls.index(time) if time in self.calls else -1

    def of(self, index: int, block: nn.Module) -> Tensor:
        """(B, modulation) of a block in the current pass."""
        if index not in self.cached:
            layer = block.get_submodule(self.dynamic.rules.modulation)
            self.cached[index] = layer(self.conditions).unflatten(0, (len(self.times), -1))
        return self.cached[index][self.step]
