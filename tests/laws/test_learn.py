"""The learned criterion: weight deltas that begin as nothing, what trains, and the decision as a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import frozen, num_parameters
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.rng import Randomness
from tinyfusion.families.dit.model import DiT, published_arch
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner, plan_of
from tinyfusion.training.lora import add_lora
from tinyfusion.training.state import Ema


def test_lora_of_the_largest_model_has_the_published_size() -> None:
    with torch.device("meta"):
        model = DiT(published_arch("DiT-XL/2"))
    deltas = add_lora(model, rank=8, alpha=16.0, seed=0)
    assert sum(p.numel() for p in deltas.values()) == 6_001_920
    per_block = sum(p.numel() for name, p in deltas.items() if name.startswith("blocks.0."))
    assert (
        per_block == 211_968
        and sum(p.numel() for name, p in deltas.items() if not name.startswith("blocks.")) == 66_816
    )
    assert num_parameters(model, trainable_only=True) == 6_001_920, "nothing else trains"


@torch.no_grad()
def test_fresh_deltas_change_nothing_bit_for_bit(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model, copy = tiny_model(), tiny_model()
    noisy = noisy_batch(model)
    inputs, deltas = (noisy.xt, noisy.t, noisy.condition["labels"]), add_lora(copy.module, rank=2, alpha=4.0, seed=1)
    assert torch.equal(copy.module(*inputs), model.module(*inputs))
    for parameter in deltas.values():
        parameter.add_(0.1)
    assert not torch.allclose(copy.module(*inputs), model.module(*inputs))


@torch.no_grad()
def test_a_delta_is_alpha_over_rank_times_the_product() -> None:
    linear_layer = nn.Sequential(nn.Linear(6, 5))
    base = [p.clone() for p in linear_layer.parameters()]
    deltas = add_lora(linear_layer, rank=2, alpha=6.0, seed=0)
    a, b = (next(p for name, p in deltas.items() if f".lora_{kind}." in name) for kind in "AB")
    assert (
        a.shape == (2, 6)
        and b.shape == (5, 2)
        and float(a.abs().max()) <= 6**-0.5
        and float(a.abs().max()) > 0.5 * 6**-0.5
    )
    b.copy_(torch.arange(10.0).view(5, 2))
    x = torch.linspace(-1, 1, 12).view(2, 6)
    torch.testing.assert_close(linear_layer(x), x @ base[0].T + base[1] + 3.0 * (x @ a.T) @ b.T)


def test_initial_deltas_depend_on_their_seed_alone(tiny_model: Callable[..., LoadedModel]) -> None:
    def values(global_seed: int, seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        model = tiny_model().module
        torch.set_rng_state(before)
        deltas = add_lora(model, 2, 4.0, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
        return torch.cat([p.detach().flatten() for p in deltas.values()])

    assert torch.equal(values(1, 5), values(2, 5))
    assert not torch.equal(values(1, 5), values(1, 6))


# --------------------------------------------------------------------------------------------------- the learned criterion


def learner_for(teacher: LoadedModel, **settings: Any) -> Any:
    section = dataclasses.replace(PruneSection(), scheme="1:2", lora_rank=2, **settings)
    return mask_learner(teacher, GaussianObjective(), section, seed=0), section


@pytest.mark.parametrize("update", ["lora", "full", "frozen"])
def test_updates_train_what_they_say_and_leave_the_teacher(tiny_model: Callable[..., LoadedModel], update: Any) -> None:
    teacher = tiny_model()
    before = teacher.hash()
    learner, _ = learner_for(teacher, update=update)
    deltas, logits = (group.parameters for group in learner.parameter_groups)
    total = num_parameters(teacher.module)
    expected = {
        "lora": sum(p.numel() for p in deltas.values()),
        "full": num_parameters(teacher.module, True),
        "frozen": 0,
    }[update]
    assert all(".lora_" in name for name in deltas) == (update != "full")
    assert learner.trainable_share == pytest.approx(expected / total)
    assert len(logits) == 2 and learner.parameter_groups[1].constant
    optimised = {id(p) for group in learner.parameter_groups for p in group.parameters.values()}
    assert {id(p) for p in learner.module.parameters() if p.requires_grad} == optimised - {
        id(p) for p in logits.values()
    }

    batch = Batch(torch.ones(2, 2, 4, 4), class_condition(torch.tensor([0, 1]), 5))
    noisy = learner.objective.draw(batch, Randomness(0).at(0, 0, 2))
    loss = learner.objective.losses(learner.module, noisy, learner.objective.predict(learner.module, noisy))[
        "loss"
    ].mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in logits.values())
    assert teacher.hash() == before and all(p.grad is None for p in teacher.module.parameters())


def test_the_gumbel_noise_is_addressed_like_every_draw(tiny_model: Callable[..., LoadedModel]) -> None:
    learner, _ = learner_for(tiny_model())
    x, y = torch.zeros(6, 2, 4, 4), torch.zeros(6, dtype=torch.int64)
    whole = learner.objective.draw(Batch(x, class_condition(y, 5)), Randomness(0).at(4, 0, 6))
    part = learner.objective.draw(Batch(x[1:3], class_condition(y[1:3], 5)), Randomness(0).at(4, 1, 2))
    assert len(whole.gate_noise) == 2 and whole.step == 4
    assert all(torch.equal(p, w[1:3]) for p, w in zip(part.gate_noise, whole.gate_noise, strict=True))
    assert not torch.equal(whole.gate_noise[0], whole.gate_noise[1])


def test_the_decision_reads_averaged_logits_and_becomes_a_plan(tiny_model: Callable[..., LoadedModel]) -> None:
    teacher = tiny_model()
    learner, section = learner_for(teacher)
    ema = Ema(learner.parameter_groups[1].parameters, 0.9)
    ema.average["gates.logits.0"].copy_(torch.tensor([0.0, 0.05]))
    decision = learner.decision(ema, step=0)
    plan = plan_of(decision, teacher, section, 3, {"seconds": 1.0, "images": 8})
    assert (
        plan.kept == {"blocks": [1, 2]} and plan.depth == {"blocks": 4} and plan.groups == {"blocks": [[1, 2], [1, 2]]}
    )
    assert plan.scores["blocks"][0] == pytest.approx(torch.softmax(torch.tensor([0.0, 5.0]), 0).tolist())
    assert plan.scores["meaning"] and plan.teacher == teacher.hash() and plan.seed == 3
    logged = learner.log(ema, 0)
    assert logged["temperature"] == 4.0 and logged["kept"] == plan.kept
    assert logged["confidence"]["blocks"] == [max(row) for row in plan.scores["blocks"]]
    assert len(teacher.cut(plan).stack) == 2


def test_a_frozen_teacher_still_gives_a_learner_that_trains(tiny_model: Callable[..., LoadedModel]) -> None:
    teacher = tiny_model()
    frozen(teacher.module)
    learner = mask_learner(teacher, GaussianObjective(), PruneSection(update="full"), seed=0)
    wanted = sum(p.numel() for name, p in teacher.module.named_parameters() if name != "pos_embed")
    assert sum(p.numel() for p in learner.parameter_groups[0].parameters.values()) == wanted
    assert not any(p.requires_grad for p in teacher.module.parameters())
