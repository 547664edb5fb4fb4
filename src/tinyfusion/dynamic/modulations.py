"""The modulations of blocks at the next times of a sampler, computed together.

A block's modulation depends on time and label alone. With few images its product takes as long as reading its weights, a
third of the model's, and that does not shrink with the block: at half the width and two images it is a tenth of the time.
The times and labels of a trajectory are known at its first step, so the weights are read once for several steps.

Shapes: B images, D width, K times computed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinyfusion.models.loaded import DynamicModel

ROWS_AHEAD = 32  # K * B: as quick as one row, for a processor


class ModulationsAhead:
    """Modulations of every block, for passes on a processor in the order of `calls`, the times of a trajectory.

    Other orders, times and labels give the right values too, only later: nothing is then computed ahead.
    """

    def __init__(self, dynamic: DynamicModel, calls: Sequence[float]) -> None:
        self.dynamic, self.calls = dynamic, list(calls)
        self.call = -1  # place of the present pass in `calls`
        self.times: list[float] = []
        self.step = -1  # place of the present pass in `times`
        self.labels: Tensor | None = None
        self.conditions = torch.empty(0)  # (K * B, D)
        self.found: dict[int, Tensor] = {}  # per block (K, B, modulation)

    def begin(self, time: float, labels: Tensor) -> None:
        """A pass at this time, of at most `ROWS_AHEAD` images with these label embeddings (B, D), begins."""
        self._place(time)
        ahead = self.step + 1 < len(self.times) and self.times[self.step + 1] == time
        if ahead and self.labels is not None and torch.equal(self.labels, labels):
            self.step += 1
            return
        many = ROWS_AHEAD // len(labels)
        self.times = [time] if self.call < 0 else self.calls[self.call : self.call + many]
        self.step, self.labels, self.found = 0, labels, {}
        times = torch.tensor(self.times, device=labels.device)
        embedding = self.dynamic.embedder.forward(times)  # past the hook: no pass begins
        self.conditions = (embedding.unsqueeze(1) + labels).flatten(0, 1)

    def _place(self, time: float) -> None:
        following = (self.call + 1) % len(self.calls)
        if self.calls[following] == time:
            self.call = following
        else:
            self.call = self.calls.index(time) if time in self.calls else -1

    def of(self, index: int, block: nn.Module) -> Tensor:
        """(B, modulation) of a block, as it would compute it in this pass."""
        if index not in self.found:
            layer = block.get_submodule(self.dynamic.rules.modulation)
            self.found[index] = layer(self.conditions).unflatten(0, (len(self.times), -1))
        return self.found[index][self.step]
