"""The teacher of a distillation in few steps: a frozen model under guidance, as its sampler runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.conditioning.condition import Condition, ModelCall, concat
from tinyfusion.processes.base import Batch, NoisyBatch, mix_guidance
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

    @property
    def memory(self) -> dict[str, Any]:
        """Its fields of `StepMemory`."""
        return {"teacher": (self.module, self.stack), "teacher_rows": 1 if self.guidance == 1 else 2}

    @torch.no_grad()
    def parts(self, x: Tensor, t: Tensor, condition: Condition) -> Mixture:
        """The guided prediction at x (B, C, H, W) and times t (B,)."""
        if self.guidance == 1:
            return self.own(self.module, x, t, condition)
        both = self.call(self.module, torch.cat([x, x]), torch.cat([t, t]), concat([condition, condition.null()]))
        return self.noising.parts(mix_guidance(both.float(), self.guidance, self.channels), x, t)

    def own(self, model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Mixture:
        """The prediction of another model, without guidance."""
        return self.noising.parts(self.call(model, x, t, condition), x, t)

    def noised(self, batch: Batch, t: Tensor, noise: Tensor, step: int) -> NoisyBatch:
        """The images of a batch with this noise at times t (B,)."""
        xt = self.noising.mixed(Mixture(batch.x, noise), t)
        return NoisyBatch(batch.x, noise, xt, t, batch.condition, step)
