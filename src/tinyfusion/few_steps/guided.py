"""The teacher of a distillation in few steps: a frozen model under guidance, as its sampler runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.conditioning.condition import Condition, ModelCall
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.guidance import guided_call
from tinyfusion.processes.noising import Mixture, Noising


@dataclass(frozen=True)
class GuidedTeacher:
    """A frozen model, and the guidance that its student folds in.

    call: how models are called, student and critic too. guidance: scale, on the first `channels` channels of the output.
    """

    module: nn.Module
    stack: BlockStack
    noising: Noising
    call: ModelCall
    guidance: float
    channels: int

    @torch.no_grad()
    def parts(self, x: Tensor, t: Tensor, condition: Condition) -> Mixture:
        """The guided prediction at x (B, C, H, W) and times t (B,)."""
        output = guided_call(self.call, self.module, x, t, condition, self.guidance, self.channels)
        return self.noising.parts(output, x, t)

    def own(self, model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Mixture:
        """The prediction of another model, without guidance."""
        return self.noising.parts(self.call(model, x, t, condition), x, t)

    def noised(self, batch: Batch, t: Tensor, noise: Tensor, step: int) -> NoisyBatch:
        """The images of a batch with this noise at times t (B,)."""
        xt = self.noising.mixed(Mixture(batch.x, noise), t)
        return NoisyBatch(batch.x, noise, xt, t, batch.condition, step)
