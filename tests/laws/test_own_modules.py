"""Modules of one's own: frozen parameters stay frozen through every training and cut, and dropout depends on the seed alone."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_api import BLOCKS, KD, LEARN, TASK, Model, batches, same, weights
from torch import nn

import tinyfusion as tf
from tinyfusion.config.recipe import RecoverSection
from tinyfusion.models.checkpoint import LoadedModel

FROZEN = ("leave.weight", "trunk.layers.1.inner.weight", "trunk.layers.2.outer.weight")
KEPT = [0, 2, 3]  # so that block 2 becomes block 1
AFTER = {"leave.weight", "trunk.layers.1.outer.weight", "table"}


@pytest.fixture
def teacher() -> LoadedModel:
    torch.manual_seed(0)
    module = Model()
    for name in FROZEN:
        module.get_parameter(name).requires_grad_(False)
    return tf.wrap_module(module, BLOCKS)


def frozen_in(model: LoadedModel) -> set[str]:
    return {name for name, parameter in model.module.named_parameters() if not parameter.requires_grad}


def test_they_are_renumbered_with_their_blocks(teacher: LoadedModel) -> None:
    student = tf.prune_model(teacher, KEPT)
    assert frozen_in(student) == AFTER
    again = tf.prune_model(student, [1, 2])
    assert frozen_in(again) == {"leave.weight", "trunk.layers.0.outer.weight", "table"}
    assert frozen_in(teacher) == {*FROZEN, "table"}, "the teacher is as it was"


@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_recovery_leaves_them(teacher: LoadedModel, update: str) -> None:
    student = tf.prune_model(teacher, KEPT)
    before = weights(student)
    settings = dataclasses.replace(KD, method="logits-kd", update=update)  # type: ignore[arg-type]
    trained = tf.recover_model(student, copy.copy(teacher), TASK, batches(), settings)
    changed = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    assert not changed & AFTER and "enter.weight" in changed
    assert isinstance(settings, RecoverSection) and frozen_in(trained) == AFTER


@pytest.mark.parametrize("update", ["lora", "full"])
def test_a_search_leaves_them(teacher: LoadedModel, update: str) -> None:
    before = weights(teacher)
    settings = dataclasses.replace(LEARN, update=update, lora_rank=2 if update == "lora" else 8)  # type: ignore[arg-type]
    masks = tf.learn_masks(teacher, TASK, batches(), settings)
    student = tf.prune_model(teacher, masks)
    kept = sorted(masks.plan.kept["trunk.layers"])
    for name, value in weights(student).items():
        parts = name.split(".")
        old = ".".join([*parts[:2], str(kept[int(parts[2])]), *parts[3:]]) if name.startswith("trunk") else name
        if old in (*FROZEN, "table"):
            assert torch.equal(value, before[old]), name
    assert not torch.equal(weights(student)["enter.weight"], before["enter.weight"])


class Noisy(Model):
    """With dropout, which draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.drop(x))


@pytest.mark.parametrize("training", ["masks", "recovery"])
def test_dropout_depends_on_the_seed_alone(training: str) -> None:
    torch.manual_seed(0)
    module = Noisy()

    def trained(state: int, seed: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model = tf.wrap_module(copy.deepcopy(module), BLOCKS)
        if training == "masks":
            result = dict(tf.learn_masks(model, TASK, batches(), LEARN, seed=seed).updates)
        else:
            settings = RecoverSection(method="finetune", training=LEARN.training)
            result = weights(tf.recover_model(model, None, TASK, batches(), settings, seed=seed))
        assert torch.equal(torch.get_rng_state(), before), "the caller's generator is as it was"
        return result

    assert same(trained(1), trained(2)) and not same(trained(1), trained(1, seed=5))
