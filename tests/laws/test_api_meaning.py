"""The library does what its settings say: labels, averages, modes of models, frozen weights, indices and labels of every kind."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import library_models
import numpy as np
import pytest
import torch
from library_models import (
    FEW,
    TASK,
    TRAINING,
    Models,
    digits,
    distil,
    drawn,
    learn,
    made,
    pairs,
    recover,
    recovered,
    same,
    search,
    trained,
    weights,
)
from torch import Tensor

import tinyfusion as tf
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws


@pytest.fixture(scope="module")
def models(tiny_model: Any) -> Models:
    return made(tiny_model)


def test_numbers_of_numpy_and_lists_are_settings(models: Models) -> None:
    plain = recover(models, beta=(1e-2, 0.0))
    other = recover(models, beta=[np.float32(1e-2), 0], training=trained(steps=np.int64(2)))
    assert (
        max(float((a - b).abs().max()) for a, b in zip(weights(plain).values(), weights(other).values(), strict=True))
        < 1e-6
    )
    assert learn(models, seed=np.int64(3)).plan.seed == 3


def test_a_short_training_warns_of_its_average(models: Models) -> None:
    training = dataclasses.replace(tf.RecoverSection().training, steps=2)
    with pytest.warns(UserWarning, match=r"holds 100% .*: RecoverSection.training.ema_decay=0.2236 or less") as caught:
        recover(models, training=training)
    assert caught[0].filename == library_models.__file__, "it points at the caller"
    with pytest.warns(UserWarning, match="PruneSection.training.ema_decay"):
        learn(models, training=dataclasses.replace(tf.PruneSection().training, steps=2))
    with pytest.warns(UserWarning, match="DistillStepsSection.training.ema_decay"):
        distil(models, training=dataclasses.replace(tf.DistillStepsSection().training, steps=2, batch_size=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recover(models, training=dataclasses.replace(training, ema_decay=0.2))


def test_labels_are_dropped_as_the_objective_says(models: Models) -> None:
    whole, half = (recovered(models, tf.objective_of(models.dit, drop), digits()) for drop in (0.0, 0.5))
    stated = recovered(models, tf.objective_of(models.dit, 0.5), digits(), label_drop=0.5)
    assert same(stated, half) and not same(whole, half)


def test_criteria_drop_no_labels(models: Models) -> None:
    given = {"batches": digits(), "num_batches": 1}
    dropping, whole = (
        tf.prune_model(models.dit, "sensitivity", task=tf.objective_of(models.dit, share), **given)
        for share in (0.9, 0.0)
    )
    assert dropping.facts.plan is not None and whole.facts.plan is not None
    assert dropping.facts.plan.scores == whole.facts.plan.scores
    assert "labels kept" in dropping.facts.plan.scores["calibration"]["protocol"]
    own = tf.prune_model(models.own, "sensitivity", task=TASK, batches=pairs(), num_batches=2).facts.plan
    assert own is not None and own.scores["calibration"]["protocol"] == "batches of a task, with all that they draw"


def test_models_stay_in_their_modes(models: Models) -> None:
    own, dit = models.own.copy(), models.dit.copy()
    own.module.train().layers[1].eval()
    student = tf.prune_model(own, "bi", task=TASK, batches=pairs(), num_batches=1, num_keep=3)
    assert own.module.training and not own.module.layers[1].training and own.module.layers[2].training
    assert student.module.training
    dit.module.train()
    drawn(dit)
    assert all(part.training for part in dit.module.modules())


def test_a_frozen_student_trains(models: Models) -> None:
    student = tf.wrap_module(copy.deepcopy(models.own.module).requires_grad_(False), ["layers"])
    settings = tf.RecoverSection(method="finetune", training=TRAINING)
    free = tf.recover_model(models.own, None, TASK, pairs(), settings)
    assert same(tf.recover_model(student, None, TASK, pairs(), settings), free)
    assert not any(p.requires_grad for p in student.module.parameters())
    dit = models.dit.copy()
    dit.module.requires_grad_(False)
    assert same(tf.distill_model_steps(dit, models.dit, digits(), FEW), models.few)


def test_a_search_learns_outputs_by_default(models: Models) -> None:
    assert same(search(models), search(models, method="logits-kd"))
    with pytest.raises(UserError, match="use method logits-kd"):
        search(models, method="rep-kd")


def test_arrays_and_tensors_of_indices_are_plain_in_the_plan(models: Models, tmp_path: Path) -> None:
    for how in (np.array([0, 2]), torch.tensor([0, 2]), range(0, 4, 2)):
        student = tf.prune_model(models.dit, how)  # type: ignore[arg-type]
        tf.save_model(student, str(tmp_path / "student"))
        opened = tf.open_model(str(tmp_path / "student"))
        assert opened.facts.kept == {"blocks": [0, 2]} and opened.hash() == student.hash()


def test_labels_of_every_kind(models: Models) -> None:
    wanted = drawn(models.dit, [1, 2])
    for labels in (
        (1, 2),
        np.array([1, 2], dtype=np.uint8),
        torch.tensor([1, 2]),
        class_condition(torch.tensor([1, 2]), 10),
    ):
        assert np.array_equal(drawn(models.dit, labels), wanted)


def test_a_function_of_a_task_takes_step_and_draws(models: Models) -> None:
    def batches(step: int, draws: Draws) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(draws.normal("x", (5, 3)))
        return x, x.roll(1, 1)

    assert not same(recovered(models, TASK, batches, models.own), models.own)


def test_matching_begins_from_a_student_of_consistency(models: Models) -> None:
    student = tf.distill_model_steps(models.few, models.dit, digits(), dataclasses.replace(FEW, method="matching"))
    assert student.facts.few_steps is not None and student.facts.few_steps.method == "matching"
    assert not same(student, models.few)
