"""The moving average and the learning rate: closed forms, exact ends, and a warning with good advice."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.training.checkpoints import CheckpointWriter, load_latest
from tinyfusion.training.optim import ParameterGroup, decay_groups, learning_rate_factor, linear, optimizer_of
from tinyfusion.training.state import Ema, TrainState, horizon_warning


@given(decay=st.floats(0.0, 0.999), values=st.lists(st.floats(-2, 2), min_size=1, max_size=6))
def test_the_average_is_its_closed_form(decay: float, values: list[float]) -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    ema = Ema({"p": parameter}, decay)
    for value in values:
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()
    n = len(values)
    wanted = decay**n + sum((1 - decay) * decay ** (n - 1 - i) * value for i, value in enumerate(values))
    assert ema.average["p"].tolist() == pytest.approx([wanted] * 2, abs=1e-9)


def test_decay_zero_follows_and_decay_one_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema({"p": parameter}, 0.0)
    with torch.no_grad():
        parameter.copy_(torch.tensor([1.0, -2.0, 0.3]))
    ema.update()
    assert torch.equal(ema.average["p"], parameter)
    with pytest.raises(ValueError, match="ema_decay"):
        Ema({"p": parameter}, 1.0)


@pytest.mark.parametrize(
    ("decay", "steps", "warns"),
    [(0.9999, 10_000, True), (0.9999, 100_000, False), (0.999, 10_009, False), (0.99, 10, True), (0.0, 1, False)],
)
def test_an_average_longer_than_the_run_is_reported(decay: float, steps: int, warns: bool) -> None:
    message = horizon_warning(decay, steps, "recover.training")
    assert (message is not None) == warns
    if message:
        assert f"{decay**steps:.0%}" in message and "--set recover.training.ema_decay=" in message
        advised = float(message.split("ema_decay=")[1].split()[0])
        assert horizon_warning(advised, steps, "recover.training") is None, "the advice is good"


def rates(**changes: Any) -> list[float]:
    settings = TrainingSection(warmup_steps=0, **changes)
    return [settings.learning_rate * learning_rate_factor(settings, step) for step in range(settings.steps)]


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_the_learning_rate_is_exact_at_both_ends(steps: int) -> None:
    found = rates(steps=steps, learning_rate=2e-4, learning_rate_end_share=0.5)
    assert found[0] == 2e-4
    if steps > 1:
        assert found[-1] == pytest.approx(1e-4, rel=1e-12)
    assert found == sorted(found, reverse=True)


def test_the_learning_rate_is_a_cosine() -> None:
    found = rates(steps=101, learning_rate=2e-4, learning_rate_end_share=0.5)
    assert found[50] == pytest.approx(1.5e-4) and found[25] == pytest.approx(
        1e-4 + 0.5e-4 * (1 + math.cos(math.pi / 4))
    )
    assert set(rates(steps=5, learning_rate=3e-4, learning_rate_end_share=1.0)) == {3e-4}


def test_the_warm_up_rises_to_the_peak_and_never_starts_at_zero() -> None:
    settings = TrainingSection(steps=10, warmup_steps=3, learning_rate=1.0, learning_rate_end_share=0.5)
    found = [learning_rate_factor(settings, step) for step in range(10)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0] and found[-1] == pytest.approx(0.5)


def test_the_end_of_the_learning_rate_follows_its_peak() -> None:
    recipe = load_recipe(None, ["recover.training.learning_rate=5e-5", "recover.training.steps=2"])
    settings = recipe.recover.training
    assert [settings.learning_rate * learning_rate_factor(settings, step) for step in (0, 1)] == [5e-5, 2.5e-5]
    with pytest.raises(UserError, match=r"learning_rate_end_share must be at least 0 and at most 1; got 2"):
        load_recipe(None, ["recover.training.learning_rate_end_share=2"])


def test_stopping_early_leaves_the_schedule_as_it_was() -> None:
    whole = TrainingSection(steps=100, learning_rate=1.0, learning_rate_end_share=0.1)
    short = TrainingSection(steps=100, stop_after=40, learning_rate=1.0, learning_rate_end_share=0.1)
    assert (short.made_steps, short.made_images, whole.made_steps) == (40, 40 * 256, 100)
    assert [learning_rate_factor(short, i) for i in range(40)] == [learning_rate_factor(whole, i) for i in range(40)]


def test_a_schedule_stays_at_its_end() -> None:
    assert [linear((4.0, 0.1), step, 10) for step in (9, 10, 500)] == [0.1, 0.1, 0.1]
    settings = TrainingSection(steps=10, learning_rate=1.0, learning_rate_end_share=0.5)
    assert [learning_rate_factor(settings, step) for step in (9, 10, 25)] == pytest.approx([0.5, 0.5, 0.5])


def test_a_group_without_a_rate_takes_the_sections() -> None:
    parameter, settings = nn.Parameter(torch.zeros(2)), TrainingSection(learning_rate=3e-4, learning_rate_end_share=1.0)
    groups = [ParameterGroup({"a": parameter}), ParameterGroup({})]
    assert [group["lr"] for group in optimizer_of(groups, settings).param_groups] == [3e-4]
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer_of([ParameterGroup({})], settings)


def trained(optimizer: str, steps: int, state: TrainState | None = None) -> TrainState:
    """A few steps on fixed gradients, of one tensor large enough for 8 bits and one that is not."""
    if state is None:
        generator = torch.Generator().manual_seed(0)
        model = nn.Linear(80, 80)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=generator)
        settings = TrainingSection(optimizer=cast(Any, optimizer), learning_rate=1e-2, learning_rate_end_share=1.0)
        state = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], settings)
    for _ in range(steps):
        for i, parameter in enumerate(state.parameters.values()):
            parameter.grad = torch.sin(torch.arange(parameter.numel()) + 7.0 * state.step + i).view(parameter.shape)
        state.optimizer.step()
        state.ema.update()
        state.step += 1
    return state


def test_moments_in_8_bits_are_bytes_and_come_close_to_full_ones() -> None:
    pytest.importorskip("bitsandbytes", reason="extra 8bit is not installed")
    coarse, fine = trained("adamw-8bit", 5), trained("adamw", 5)
    tensors = coarse.tensors()
    assert tensors["optimizer/state1/weight"].dtype == tensors["optimizer/state2/weight"].dtype == torch.uint8
    assert tensors["optimizer/state1/bias"].dtype == torch.float32, "small tensors keep full moments"
    start = trained("adamw", 0).parameters["weight"]
    moved = (fine.parameters["weight"] - start).norm()
    apart = (coarse.parameters["weight"] - fine.parameters["weight"]).norm()
    assert 0 < apart < 0.1 * moved
    torch.testing.assert_close(coarse.parameters["bias"], fine.parameters["bias"], rtol=1e-5, atol=1e-6)


def check_continues_bit_equal(make: Callable[..., TrainState], optimizer: str, folder: Path) -> None:
    """Six steps are three, a checkpoint and three more; AdamW does not take the checkpoint."""
    straight = make(optimizer, 6)
    with CheckpointWriter(folder, 1, 1) as writer:
        writer.save(make(optimizer, 3))
    resumed = make(optimizer, 1)
    assert load_latest(folder, resumed) == 3
    make(optimizer, 3, resumed)
    assert straight.tensors().keys() == resumed.tensors().keys()
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    assert straight.progress() == resumed.progress()
    with pytest.warns(UserWarning, match=f"made with optimizer {optimizer}, this training has adamw"):
        assert load_latest(folder, make("adamw", 1)) == 0


def test_a_checkpoint_holds_moments_in_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="extra 8bit is not installed")
    check_continues_bit_equal(trained, "adamw-8bit", tmp_path)


class Blocks(nn.Module):
    """Two blocks between an embedding and an output, which Muon leaves to AdamW, as it does tables and small matrices in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 16)
        parts = {"mlp": (16, 16), "wide": (16, 48), "gate": (16, 4)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({**{name: nn.Linear(*sides) for name, sides in parts.items()}, "table": nn.Embedding(20, 16)})
            for _ in range(2)
        )
        self.mixed = nn.Sequential(nn.Linear(16, 16))
        self.head = nn.Linear(16, 20)


def blocks_state(
    optimizer: str, steps: int, state: TrainState | None = None, turn: float = 7.0, **more: Any
) -> TrainState:
    """Some steps on fixed gradients of `Blocks`. turn: how they change from step to step."""
    if state is None:
        torch.manual_seed(0)
        model = Blocks()
        settings = TrainingSection(
            **{"optimizer": optimizer, "learning_rate": 1e-2, "learning_rate_end_share": 1.0, "ema_decay": 0.5, **more}
        )
        state = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], settings, model.blocks)
    for _ in range(steps):
        for i, parameter in enumerate(state.parameters.values()):
            wave = torch.sin(torch.arange(parameter.numel()) ** 2 + turn * state.step + i)
            parameter.grad = wave.view(parameter.shape).to(parameter.dtype)
        state.update(0)
        state.step += 1
    return state


def test_muon_updates_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    start, plain, muon = (blocks_state(*how) for how in (("muon", 0), ("adamw", 1), ("muon", 1)))
    matrices = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("mlp", "wide")}
    for name, value in muon.parameters.items():
        moved, same = (value - start.parameters[name]).detach(), torch.equal(value, plain.parameters[name])
        assert same == (name not in matrices), name
        if name in matrices:  # nearly orthogonal, and of the size of an AdamW update
            size = 1e-2 * 0.2 * max(value.shape) ** 0.5
            values = torch.linalg.svdvals(moved) / size
            assert values.min() > 0.5 and values.max() < 1.3, name
            assert moved.square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.2), name
    held = {name.split("/")[1] for name in muon.tensors() if name.startswith("optimizer/") and "mlp.weight" in name}
    assert held == {"momentum_buffer"}, "one moment, where AdamW has two"


def test_a_training_by_muon_continues_bit_equal(tmp_path: Path) -> None:
    check_continues_bit_equal(blocks_state, "muon", tmp_path)


def test_muon_rounds_weights_in_bfloat16_at_random() -> None:
    """Updates below half a step of bfloat16 add up; rounded to nearest, a hundredth of them would be left."""
    rate: dict[str, Any] = dict(learning_rate=1e-4, turn=0.0)
    how = dict(weights="bfloat16", dtype="bfloat16", **rate)
    start, low, exact = (
        blocks_state("muon", 0, **how),
        blocks_state("muon", 100, **how),
        blocks_state("muon", 100, **rate),
    )
    for name in low.matrices():
        assert low.parameters[name].dtype == torch.bfloat16
        first = start.parameters[name].detach().float()
        moved, wanted = (state.parameters[name].detach().float() - first for state in (low, exact))
        assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.2), name


def test_muon_counts_decay_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks()
    rule = lambda name, _value: name.startswith("embedding")  # noqa: E731
    settings = TrainingSection(optimizer="muon", weight_decay=0.1, learning_rate=1e-2)
    split = decay_groups(dict(model.named_parameters()), rule, settings)
    groups = optimizer_of(split, settings, model.blocks).param_groups
    found = sorted((group["matrices"], group["weight_decay"], len(group["params"])) for group in groups)
    assert found == [(False, 0.0, 1), (False, 0.1, 14), (True, 0.1, 4)]
    assert [len(apart) for apart in TrainState(model, split, settings, model.blocks).clipped_apart()] == [18, 1]
    with pytest.raises(
        UserError, match="updates whole weight matrices of linear layers in blocks, and none trains here"
    ):
        optimizer_of(split, settings)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(
        UserError, match=r"muon needs torch 2.9 or newer, and this is .*: upgrade torch, or use optimizer adamw"
    ):
        optimizer_of(split, settings, model.blocks)


def test_a_checkpoint_of_other_matrices_does_not_fit(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, 1, 1) as writer:
        writer.save(blocks_state("muon", 2))
    model = Blocks()
    settings = TrainingSection(optimizer="muon", ema_decay=0.5)
    fewer = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], settings, model.blocks[:1])
    with pytest.warns(UserWarning, match=r"this training updates blocks.1.mlp.weight otherwise"):
        assert load_latest(tmp_path, fewer) == 0


def test_moments_in_8_bits_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainingSection(optimizer="adamw-8bit")
    with pytest.raises(UserError, match="works on cpu and cuda, not on meta"):
        optimizer_of([ParameterGroup({"a": nn.Parameter(torch.zeros(2, device="meta"))})], settings)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"bitsandbytes, which .*pip install 'tinyfusion\[8bit\]'"):
        optimizer_of([ParameterGroup({"a": nn.Parameter(torch.zeros(2))})], settings)
