"""Keep what was trained beside the gates: a student that has already met its missing blocks.

Not in the paper, which throws it away. Measured in docs/results/recovery-extras.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.config.recipe import PruneSection
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.training.lora import delta_weights


@torch.no_grad()
def prune_with_weight_updates(
    teacher: LoadedModel, plan: PrunePlan, averages: Mapping[str, Tensor], settings: PruneSection
) -> LoadedModel:
    """`teacher.cut(plan)` whose weights hold the averaged deltas, with the same plan and lineage.

    Low-rank deltas are added to the teacher's weights, trained weights (update "full") take their place. Replaying the
    plan on the teacher gives the blocks of this student, not its weights.
    """
    trained = teacher.copy()
    parameters = dict(trained.module.named_parameters())
    for name, value in averages.items():
        if name in parameters:
            parameters[name].copy_(value)
    for name, delta in delta_weights(averages, settings.lora_scale).items():
        parameters[name].add_(delta.to(parameters[name].device))
    student = teacher.cut(plan)
    weights = trained.cut(dataclasses.replace(plan, teacher="")).module.state_dict()
    student.module.load_state_dict(weights)
    return student
