"""Deltas that stay: the student is the gated model under its own mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinyfusion.config.recipe import PruneSection
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner, plan_of, prune_with_weight_updates
from tinyfusion.training.lora import delta_weights
from tinyfusion.training.state import Ema


@torch.no_grad()
@pytest.mark.parametrize("update", ["lora", "full", "frozen"])
def test_a_student_with_deltas_is_the_gated_model_under_its_mask(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], update: Any
) -> None:
    teacher = tiny_model()
    settings = PruneSection(scheme="1:2", update=update, lora_rank=2, lora_alpha=6.0, dropped="dense")
    learner = mask_learner(teacher, GaussianObjective(), settings, seed=0)
    ema = Ema({n: p for group in learner.parameter_groups for n, p in group.parameters.items()}, 0.5)
    decision = learner.decision(ema, 0)
    plan = plan_of(decision, teacher, settings, 0, {})
    fresh = prune_with_weight_updates(teacher, plan, ema.average, settings)
    assert fresh.hash() == teacher.cut(plan).hash() and fresh.facts == teacher.cut(plan).facts

    generator = torch.Generator().manual_seed(0)
    for name, value in ema.average.items():
        if not name.startswith("gates."):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    own = dict(learner.module.named_parameters())
    for name, value in ema.average.items():
        if name in own:
            own[name].copy_(value)
    student = prune_with_weight_updates(teacher, plan, ema.average, settings)
    assert student.facts == teacher.cut(plan).facts and teacher.hash() == plan.teacher
    assert (student.hash() == teacher.cut(plan).hash()) == (update == "frozen")
    assert all(p.requires_grad for n, p in student.module.named_parameters() if n != "pos_embed")
    noisy = noisy_batch(teacher)
    gates = torch.zeros(len(noisy.t), len(teacher.stack))
    gates[:, plan.kept["blocks"]] = 1.0
    with teacher.family.stack(learner.module).gated(gates):
        wanted = learner.module(noisy.xt, noisy.t, noisy.condition["labels"])
    torch.testing.assert_close(student.module(noisy.xt, noisy.t, noisy.condition["labels"]), wanted)


def test_deltas_of_no_layers_are_none() -> None:
    assert delta_weights({"gates.logits.0": torch.zeros(2)}, 2.0) == {}
    assert PruneSection(lora_rank=4).lora_scale == 2.0
    assert dataclasses.replace(PruneSection(), lora_alpha=4.0).lora_scale == 0.5
