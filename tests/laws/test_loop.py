"""The training loop: it changes what it should; bad steps change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import RANDOMNESS, SETTINGS, batches, gated_job, plain_job, save_checkpoint, train, trainable
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.training.checkpoints import load_latest
from tinyfusion.training.loop import StepRecord, train_steps
from tinyfusion.training.optim import ParameterGroup
from tinyfusion.training.state import TrainState


def values(records: list[StepRecord]) -> list[dict[str, float | None]]:
    return [record.values() for record in records]


# --------------------------------------------------------------------------------------------------------- training


def test_a_finished_run_makes_no_step(tiny_model: Callable[..., LoadedModel]) -> None:
    job = plain_job(tiny_model)
    train(job)
    assert train(job) == []


def test_training_changes_what_it_should(tiny_model: Callable[..., LoadedModel]) -> None:
    state, goal = gated_job(tiny_model)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    logits = {name: p.detach().clone() for name, p in state.parameters.items() if name.startswith("gates.")}
    train((state, goal))
    changed = {name for name, p in state.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    assert len(logits) == 2 and all(not torch.equal(state.parameters[name], value) for name, value in logits.items())


def test_training_learns(tiny_model: Callable[..., LoadedModel]) -> None:
    """On one fixed batch the loss falls."""
    settings = dataclasses.replace(SETTINGS, steps=60, learning_rate_end_share=1.0)
    model = tiny_model()
    job = TrainState(model.module, trainable(model), settings), GaussianObjective(label_drop=0.0)

    class Same(GaussianObjective):
        def draw(self, batch: Batch, draws: Draws) -> Any:
            return super().draw(batch, RANDOMNESS.at(0, 0, 4))

    records = train((job[0], Same(0.0)), lambda step, size, draws: batches(0, size, RANDOMNESS.at(0, 0, 4)), settings)
    losses = [record.values()["mse"] or math.inf for record in records]
    assert losses[-1] < 0.5 * losses[0]


def test_the_global_generator_does_not_matter(tiny_model: Callable[..., LoadedModel]) -> None:
    outcomes = []
    for seed in (1, 2):
        job = gated_job(tiny_model)
        torch.manual_seed(seed)
        outcomes.append(values(train(job)))
    assert outcomes[0] == outcomes[1]


# -------------------------------------------------------------------------------------------------------- bad steps


def poisoned(bad: set[int]) -> Callable[[int, int, Draws], Batch]:
    def source(step: int, batch_size: int, draws: Draws) -> Batch:
        batch = batches(step, batch_size, draws)
        if step in bad:
            batch.x[0, 0, 0, 0] = math.nan
        return batch

    return source


def test_a_non_finite_step_changes_nothing(tiny_model: Callable[..., LoadedModel]) -> None:
    job = plain_job(tiny_model)
    train(job, until=2)
    before = {name: t.clone() for name, t in job[0].tensors().items()}
    (record,) = train(job, poisoned({2}), until=3)
    assert (record.step, record.applied) == (2, False) and record.values()["loss"] is None
    assert json.dumps(record.values(), allow_nan=False)
    after = job[0].tensors()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (job[0].step, job[0].bad_steps) == (3, 1)
    (record,) = train(job, until=4)
    assert record.applied and job[0].bad_steps == 0
    assert all(bool(torch.isfinite(t).all()) for t in job[0].tensors().values())


def test_an_infinite_gradient_is_a_bad_step_even_where_the_loss_is_finite() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    class SquareRoot(Objective):
        def draw(self, batch: Any, draws: Draws) -> Any:
            return batch

        def predict(self, model: nn.Module, noisy: Any) -> Any:
            return None

        def losses(self, model: Any, noisy: Any, prediction: Any) -> dict[str, Tensor]:
            return {"loss": model.weight.sqrt()}

    model = Root()
    state = TrainState(model, [ParameterGroup({"weight": model.weight}, 1.0)], SETTINGS)
    (record,) = train((state, SquareRoot()), until=1)
    assert record.values()["loss"] == 0.0 and record.values()["gradient_norm"] is None and not record.applied
    assert model.weight.tolist() == [0.0]


def test_too_many_bad_steps_in_a_row_stop_the_run(tiny_model: Callable[..., LoadedModel]) -> None:
    job = plain_job(tiny_model)
    with pytest.raises(UserError, match=r"3 steps in a row.*the last at step 4.*learning rate"):
        train(job, poisoned({0, 2, 3, 4}))
    assert job[0].step == 5
    train(plain_job(tiny_model), poisoned({0, 1, 3, 4}))


def test_bad_steps_are_counted_across_a_resume(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    first = plain_job(tiny_model)
    train(first, poisoned({1, 2}), until=3)
    save_checkpoint(tmp_path, first[0], limit=2)
    second = plain_job(tiny_model)
    load_latest(tmp_path, second[0])
    with pytest.raises(UserError, match="3 steps in a row"):
        train(second, poisoned({3}))


# ---------------------------------------------------------------------------------------------- rates and clipping


def test_gates_keep_a_constant_rate_of_their_own(tiny_model: Callable[..., LoadedModel]) -> None:
    state, goal = gated_job(tiny_model)
    seen = []
    for record in train_steps(state, goal, batches, SETTINGS, RANDOMNESS):
        deltas, gates = state.optimizer.param_groups
        seen.append((deltas["lr"], gates["lr"]))
        assert deltas["lr"] == record.learning_rate
    assert {gate for _, gate in seen} == {1e-3} and seen[-1][0] == pytest.approx(1e-3) and seen[1][0] == 1e-2


def test_the_joint_gradient_norm_is_reported_before_clipping_and_clipping_is_joint(
    tiny_model: Callable[..., LoadedModel],
) -> None:
    norms = {}
    for clip in (None, 1e-3):
        state, goal = plain_job(tiny_model)
        settings = dataclasses.replace(SETTINGS, clip_norm=clip)
        (record,) = train((state, goal), settings=settings, until=1)
        left = torch.stack([p.grad.norm() for p in state.parameters.values() if p.grad is not None]).norm()
        norms[clip] = (float(record.gradient_norm), float(left))
    assert norms[None][0] == norms[1e-3][0] == pytest.approx(norms[None][1], rel=1e-5)
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)
