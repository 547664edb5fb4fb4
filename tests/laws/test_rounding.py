"""bfloat16 weights: rounding is right in the mean, a function of its address, and the same in every order of work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import SETTINGS, batches, save_checkpoint
from torch import Tensor, nn

from tinyfusion.config.recipe import ComputeSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.estimate import memory_plan
from tinyfusion.jobs.footprint import footprint_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.training.checkpoints import load_checkpoint, load_latest
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.rounding import random_bits, round_into, rounded_step
from tinyfusion.training.state import Ema, TrainState

LOW = dataclasses.replace(SETTINGS, dtype="bfloat16", weights="bfloat16")


def test_bits_are_uniform_and_independent_of_their_neighbours() -> None:
    bits = random_bits(0x1234_5678_9ABC_DEF0, 0, 2**18, torch.device("cpu"))
    counts = torch.bincount(bits >> 8, minlength=256).double()
    chi = float(((counts - 1024) ** 2 / 1024).sum())
    assert 160 < chi < 360, "256 cells: 255 +- 5 standard deviations"
    centred = bits.double() / 2**16 - 0.5
    for lag in (1, 2, 64, 4096):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) * 12 < 0.01
    other = random_bits(0x1234_5678_9ABC_DEF1, 0, 2**18, torch.device("cpu")).double() / 2**16 - 0.5
    assert abs(float((centred * other).mean())) * 12 < 0.01, "keys that differ in a bit"
    assert torch.equal(bits[1000:1100], random_bits(0x1234_5678_9ABC_DEF0, 1000, 100, torch.device("cpu")))


def rounded(exact: Tensor, key: int) -> Tensor:
    target = torch.empty(exact.shape, dtype=torch.bfloat16)
    round_into(target, exact, key)
    return target.float()


def test_rounding_goes_to_a_neighbour_and_is_exact_in_the_mean() -> None:
    values = torch.tensor([1.001, -1.001, 3.14159, 1e-8, -7e-20, 0.0, 1.5, 65504.0, 1e-39]).repeat(20_000, 1)
    result = rounded(values, 77)
    for column, value in enumerate(values[0].tolist()):
        low = torch.tensor(value).view(torch.int32).bitwise_and(~0xFFFF).view(torch.float32)
        high = (low.view(torch.int32) + 0x10000).view(torch.float32)
        assert set(result[:, column].tolist()) <= {float(low), float(high)}
        spread = abs(float(high - low)) / 2 / 20_000**0.5
        assert abs(float(result[:, column].double().mean()) - values[0, column].double()) < 5 * spread
    assert torch.equal(result[:, 6], values[:, 6]) and not result[:, 5].any(), "what bfloat16 holds stays"
    ends = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(rounded(ends, 3), ends) and rounded(torch.tensor([float("nan")]), 3).isnan().all()


def test_rows_are_rounded_as_in_the_whole_tensor() -> None:
    exact = torch.linspace(-3, 3, 5000).view(50, 100)
    whole = rounded(exact, 9)
    part = torch.empty(20, 100, dtype=torch.bfloat16)
    round_into(part, exact[30:], 9, 30 * 100)
    assert torch.equal(part.float(), whole[30:])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_small_updates_are_not_lost(optimizer: Any) -> None:
    """A step of a thousandth of bfloat16's spacing: nearest rounding would never move, the mean moves as in float32."""
    settings = TrainingSection(
        steps=40, learning_rate=4e-6, dtype="bfloat16", weights="bfloat16", ema_decay=0.0, optimizer=optimizer
    )
    layer = nn.Linear(64, 128, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    state = TrainState(layer, [ParameterGroup(trainable(layer))], settings)
    assert layer.weight.dtype == torch.bfloat16
    for step in range(40):
        state.step = step
        layer.weight.grad = torch.full_like(layer.weight, -0.5)
        state.update(seed=5)
    moved = float(layer.weight.detach().float().mean()) - 1
    assert moved == pytest.approx(40 * 4e-6, rel=0.4)
    moments = {
        name: v.dtype for name, v in state.tensors().items() if name.startswith("optimizer/") and v.numel() > 500
    }
    assert set(moments.values()) == {torch.uint8 if optimizer == "adamw-8bit" else torch.float32}


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for at_once in (1, 2**25):
        monkeypatch.setattr("tinyfusion.training.rounding.AT_ONCE", at_once)
        parameters = [nn.Parameter(torch.linspace(-1, 1, 30 + i).bfloat16()) for i in range(4)]
        gate = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([{"params": [*parameters, gate], "lr": 0.01}], fused=True)
        for p in (*parameters, gate):
            p.grad = torch.ones_like(p)
        rounded_step(optimizer, {p: str(i) for i, p in enumerate([*parameters, gate])}, 1, 2)
        assert [p.dtype for p in parameters] == [torch.bfloat16] * 4 and float(gate.detach()[0]) != 0
        assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 5
        results.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


MakeModel = Callable[..., LoadedModel]


def low_job(make: MakeModel, settings: TrainingSection = LOW) -> tuple[TrainState, GaussianObjective]:
    model = make()
    return TrainState(model.module, [ParameterGroup(trainable(model.module))], settings), GaussianObjective()


def run(job: tuple[TrainState, Any], settings: TrainingSection, until: int) -> None:
    for _ in train_steps(job[0], job[1], batches, settings, Randomness(17)):
        if job[0].step == until:
            break


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw-8bit"}, {"ema_device": "cpu"}, {"ema_decay": 0.0}, {"weights": "float32"}]
)
def test_a_run_stopped_anywhere_and_continued_is_bit_equal(
    tiny_model: MakeModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = dataclasses.replace(LOW, **changes)
    whole = low_job(tiny_model, settings)
    run(whole, settings, settings.steps)
    first = low_job(tiny_model, settings)
    run(first, settings, 3)
    save_checkpoint(tmp_path, first[0], 1)
    second = low_job(tiny_model, settings)
    assert load_latest(tmp_path, second[0]) == 3
    run(second, settings, settings.steps)
    one, two = whole[0].tensors(), second[0].tensors()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    weights = {value.dtype for name, value in one.items() if name.startswith("weight/")}
    assert weights == {torch.float32 if "weights" in changes else torch.bfloat16}
    averages = {value.dtype for name, value in one.items() if name.startswith("ema/")}
    assert averages == (set() if "ema_decay" in changes else {torch.float32})


def test_losses_follow_float32(tiny_model: MakeModel) -> None:
    """Not equal, but the same training: both fall, and stay near one another."""
    losses: dict[str, list[float]] = {}
    for weights in ("float32", "bfloat16"):
        settings = dataclasses.replace(LOW, weights=weights, steps=30, learning_rate=3e-3)
        job = low_job(tiny_model, settings)
        losses[weights] = [float(r.terms["loss"]) for r in train_steps(*job, batches, settings, Randomness(2))]
    end = {name: sum(values[-5:]) / 5 for name, values in losses.items()}
    assert end["bfloat16"] == pytest.approx(end["float32"], rel=0.15) and end["bfloat16"] < losses["bfloat16"][0]


def test_an_average_of_decay_zero_is_no_copy_and_takes_older_checkpoints(tiny_model: MakeModel, tmp_path: Path) -> None:
    settings = dataclasses.replace(LOW, ema_decay=0.0)
    with_average = low_job(tiny_model)
    run(with_average, LOW, 2)
    save_checkpoint(tmp_path, with_average[0], 1)
    state, _ = low_job(tiny_model, settings)
    assert load_checkpoint(tmp_path / "step-0000002", state) == 2, "the average in it is left out"
    name, parameter = next(iter(state.parameters.items()))
    assert state.ema.average[name].data_ptr() == parameter.data_ptr()
    assert torch.equal(state.averages()[name], parameter.detach())


def test_the_average_of_bfloat16_weights_sees_small_steps() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ema = Ema({"p": parameter}, 0.999)
    with torch.no_grad():
        parameter.fill_(1 + 2**-7)
    ema.update()
    assert ema.average["p"].tolist() == pytest.approx([1 + 0.001 * 2**-7] * 4, abs=1e-7)


def test_bfloat16_weights_want_bfloat16_products(tiny_model: MakeModel) -> None:
    with pytest.raises(UserError, match="dtype is float32: set dtype to bfloat16 too, or weights to float32"):
        low_job(tiny_model, dataclasses.replace(LOW, dtype="float32"))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_plan_counts_what_the_state_has(tiny_model: MakeModel, weights: Any, ema_decay: float) -> None:
    settings = dataclasses.replace(LOW, weights=weights, ema_decay=ema_decay)
    job = low_job(tiny_model, settings)
    run(job, settings, 1)
    stack, state = tiny_model().family.stack(job[0].model), job[0]
    footprint = footprint_of(state.model, stack, state.parameters, job[1], batches, settings)
    plan = memory_plan(footprint, settings, ComputeSection())
    tensors = state.tensors()
    held = {
        kind: sum(v.nbytes for name, v in tensors.items() if name.startswith(kind))
        for kind in ("weight/", "optimizer/", "ema/")
    }
    assert [plan.sizes[name] for name in ("trained_weights", "optimizer", "moving_average")] == list(held.values())
    assert plan.sizes["gradients"] == held["weight/"]
