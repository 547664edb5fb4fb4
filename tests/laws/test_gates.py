"""Learned pruning: gates are the model or its cut, bit for bit; the estimator is the closed form; schemes are kept."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.stack import frozen
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.prune.gates import CategoricalGates, mode, probabilities
from tinyfusion.prune.scheme import Group, consecutive_groups, parse_scheme
from tinyfusion.training.optim import linear

# ------------------------------------------------------------------------------------------- gates and the cut model


@torch.no_grad()
def gated_output(model: LoadedModel, noisy: NoisyBatch, gates: Tensor) -> Tensor:
    with model.stack.gated(gates):
        return model.module(noisy.xt, noisy.t, noisy.y)


@torch.no_grad()
def cut_output(model: LoadedModel, noisy: NoisyBatch, kept: tuple[int, ...]) -> Tensor:
    student = model.copy()
    student.stack.keep({"blocks": list(kept)})
    assert len(student.stack) == len(kept)
    return student.module(noisy.xt, noisy.t, noisy.y)


def as_gates(kept: tuple[int, ...], depth: int, num: int) -> Tensor:
    return torch.tensor([[1.0 if i in kept else 0.0 for i in range(depth)]] * num)


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_gates_of_ones_are_the_teacher_bit_for_bit(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], seed: int
) -> None:
    model = tiny_model(seed, depth=6)
    noisy = noisy_batch(model, 4, seed)
    untouched = model.module(noisy.xt, noisy.t, noisy.y)
    assert torch.equal(gated_output(model, noisy, torch.ones(4, 6)), untouched)
    assert torch.equal(model.module(noisy.xt, noisy.t, noisy.y), untouched), "hooks are gone"


@pytest.mark.parametrize("kept", [kept for num in (1, 2, 3, 4) for kept in itertools.combinations(range(4), num)])
def test_every_mask_of_a_small_model_is_its_cut(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], kept: tuple[int, ...]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    assert torch.equal(gated_output(model, noisy, as_gates(kept, 4, 3)), cut_output(model, noisy, kept))


@given(kept=st.sets(st.integers(0, 11), min_size=1).map(lambda found: tuple(sorted(found))), seed=st.integers(0, 3))
def test_random_masks_of_a_deep_model_are_its_cut(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], kept: tuple[int, ...], seed: int
) -> None:
    model = tiny_model(seed, depth=12)
    noisy = noisy_batch(model, 2, seed)
    assert torch.equal(gated_output(model, noisy, as_gates(kept, 12, 2)), cut_output(model, noisy, kept))


def test_every_sample_has_its_own_mask(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model, 3)
    masks = [(0, 2), (1, 3), (0, 1, 2, 3)]
    mixed = gated_output(model, noisy, torch.cat([as_gates(kept, 4, 1) for kept in masks]))
    for row, kept in enumerate(masks):
        assert torch.equal(mixed[row], gated_output(model, noisy, as_gates(kept, 4, 3))[row])


def test_all_gates_closed_pass_the_stream_through(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    with torch.no_grad():
        tokens = model.module.x_embedder(noisy.xt) + model.module.pos_embed
        c = model.module.t_embedder(noisy.t) + model.module.y_embedder(noisy.y)
        wanted = model.module.unpatchify(model.module.final_layer(tokens, c))
    assert torch.equal(gated_output(model, noisy, torch.zeros(3, 4)), wanted)


def test_hooks_are_removed_after_an_error(tiny_model: Callable[..., LoadedModel]) -> None:
    model = tiny_model()
    with pytest.raises(KeyError), model.stack.gated(torch.zeros(1, 4)), model.stack.tap([0]):
        raise KeyError
    assert all(not block._forward_hooks for block in model.stack)


@pytest.mark.parametrize("indices", [[0, 99], [-1], [4]])
def test_a_block_that_is_not_there_is_refused_and_leaves_no_hook(
    tiny_model: Callable[..., LoadedModel], indices: list[int]
) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="out of range, the model has blocks 0 to 3"), model.stack.tap(indices):
        pass
    assert all(not block._forward_hooks for block in model.stack)


@pytest.mark.parametrize("context", ["gated", "tap"])
def test_a_block_that_takes_no_hook_leaves_none_on_the_others(
    tiny_model: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    model = tiny_model()

    def refuse(_hook: object) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(list(model.stack)[2], "register_forward_hook", refuse)
    opened = model.stack.gated(torch.ones(1, 4)) if context == "gated" else model.stack.tap([0, 1, 2])
    with pytest.raises(RuntimeError, match="no hooks here"), opened:
        pass
    assert all(not block._forward_hooks for block in model.stack)


@pytest.mark.parametrize("shape", [(4,), (3, 3), (3, 4, 1)])
def test_gates_of_another_shape_are_refused(tiny_model: Callable[..., LoadedModel], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one column per block"), tiny_model().stack.gated(torch.ones(shape)):
        pass


# ---------------------------------------------------------------------------------------------------- gate gradient


def test_gradient_of_a_gate_is_the_branch_seen_by_the_loss(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    """d loss / d m_j = <d loss / d x, block(x) - x>, for closed gates as well."""
    model = tiny_model()
    frozen(model.module)
    noisy, gates = noisy_batch(model), torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]], requires_grad=True)
    streams: list[tuple[Tensor, Tensor]] = []

    def branch(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        streams.append((args[0], block.forward(*args)))

    outputs: list[Tensor] = []

    def after(_block: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    with model.stack.gated(gates):
        handles = [
            h for b in model.stack for h in (b.register_forward_pre_hook(branch), b.register_forward_hook(after))
        ]
        model.module(noisy.xt, noisy.t, noisy.y).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert gates.grad is not None and len(streams) == len(outputs) == 4
    for j, ((x, through), output) in enumerate(zip(streams, outputs, strict=True)):
        assert output.grad is not None
        wanted = (output.grad * (through - x).detach()).flatten(1).sum(1)
        torch.testing.assert_close(gates.grad[:, j], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def closed_form(gates: CategoricalGates, gumbel: list[Tensor], s: float, tau: float, upstream: Tensor) -> list[Tensor]:
    """(s / tau) y_k (a_k - sum_i y_i a_i) summed over samples, a = candidates @ upstream, y the relaxed sample."""
    found = []
    for index, (group, theta) in enumerate(zip(gates.groups, gates.logits, strict=True)):
        y = torch.softmax((s * theta.detach() + gumbel[index]).double() / tau, dim=-1)
        a = upstream[:, group.start : group.start + group.size].double() @ gates.candidates(index).double().T
        found.append((s / tau * y * (a - (y * a).sum(-1, keepdim=True))).sum(0))
    return found


groups_of_any_kind = st.lists(
    st.integers(1, 5).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))), min_size=1, max_size=4
)


def gates_for(pairs: list[tuple[int, int]], **more: Any) -> CategoricalGates:
    return CategoricalGates(consecutive_groups(pairs), **more)


def gumbel_for(gates: CategoricalGates, seed: int, num: int) -> list[Tensor]:
    draws = Randomness(seed).at(0, 0, num)
    return [torch.from_numpy(draws.gumbel(f"g{i}", tuple(theta.shape))) for i, theta in enumerate(gates.logits)]


@given(pairs=groups_of_any_kind, seed=st.integers(0, 99), s=st.sampled_from([1.0, 100.0]), tau=st.floats(0.1, 4.0))
def test_logit_gradient_is_the_closed_form(pairs: list[tuple[int, int]], seed: int, s: float, tau: float) -> None:
    gates = gates_for(pairs)
    with torch.no_grad():
        for index, theta in enumerate(gates.logits):
            theta.copy_(
                0.02 * torch.from_numpy(Randomness(seed).at(1, index, 1).normal("theta", tuple(theta.shape)))[0]
            )
    gumbel = gumbel_for(gates, seed, 3)
    upstream = torch.from_numpy(Randomness(seed).at(0, 0, 3).normal("upstream", (sum(size for _, size in pairs),)))
    (gates.sample(gumbel, tau, s) * upstream).sum().backward()
    for theta, wanted in zip(gates.logits, closed_form(gates, gumbel, s, tau, upstream), strict=True):
        assert theta.grad is not None
        torch.testing.assert_close(theta.grad.double(), wanted, rtol=1e-3, atol=1e-4 * s / tau)


def test_published_logit_gradient() -> None:
    gates = gates_for([(1, 2)])
    m = gates.sample([torch.tensor([[0.3, -0.5]])], temperature=4.0, scaling=100.0)
    (m * torch.tensor([[0.7, -0.2]])).sum().backward()
    assert m.tolist() == [[1.0, 0.0]]
    assert gates.logits[0].grad is not None
    assert gates.logits[0].grad.tolist() == pytest.approx([5.569123, -5.569122], rel=1e-6)


# ----------------------------------------------------------------------------------------------- samples and schemes


@given(pairs=groups_of_any_kind, seed=st.integers(0, 2**32), temperature=st.floats(0.1, 4.0))
def test_samples_keep_exactly_n_of_every_group(pairs: list[tuple[int, int]], seed: int, temperature: float) -> None:
    gates = gates_for(pairs)
    masks = gates.sample(gumbel_for(gates, seed, 8), temperature, 100.0).detach()
    assert masks.shape == (8, sum(size for _, size in pairs))
    assert bool(((masks == 0) | (masks == 1)).all()), "exactly 0 or 1"
    for group in gates.groups:
        assert masks[:, group.start : group.start + group.size].sum(1).tolist() == [group.keep] * 8


def test_samples_follow_the_softmax_of_scaled_logits() -> None:
    gates = gates_for([(1, 3)])
    with torch.no_grad():
        gates.logits[0].copy_(torch.tensor([0.02, 0.01, 0.0]))
    shares = gates.sample(gumbel_for(gates, 1, 20_000), 1.0, 100.0).detach().mean(0)
    torch.testing.assert_close(shares, torch.softmax(torch.tensor([2.0, 1.0, 0.0]), 0), atol=0.015, rtol=0)


def test_gates_stay_float32_under_autocast() -> None:
    gates = gates_for([(2, 4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = gates.sample(gumbel_for(gates, 0, 4), 4.0, 100.0)
    assert masks.dtype == torch.float32 and bool(((masks == 0) | (masks == 1)).all())


def test_candidates_are_in_lexicographic_order() -> None:
    assert Group(2, 4, 8).candidates() == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    rows = gates_for([(1, 2), (2, 4)]).candidates(1)
    assert rows.tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]


@given(st.integers(1, 8).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))))
def test_candidates_are_all_subsets_once(pair: tuple[int, int]) -> None:
    found = Group(*pair, 0).candidates()
    assert len(set(found)) == len(found) == Group(*pair, 0).num_candidates == math.comb(pair[1], pair[0])
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("scheme", "depth", "num_groups", "num_logits", "kept"),
    [
        ("1:2", 28, 14, 28, 14),
        ("2:4", 28, 7, 42, 14),
        ("7:14", 28, 2, 6864, 14),
        ("1:4", 28, 7, 28, 7),
        ("1:2", 14, 7, 14, 7),
        ("2:4x2+3:4+2:4+3:4+2:4x2", 28, 7, 38, 16),
        ("3:4x2+2:4+3:4+2:4+3:4x2", 28, 7, 32, 19),
        ("2:4x3+3:4x4", 28, 7, 34, 18),
        ("12:12", 12, 1, 1, 12),
        (" 1:2x3 + 1:6 ", 12, 4, 12, 4),
    ],
)
def test_published_and_hybrid_schemes(scheme: str, depth: int, num_groups: int, num_logits: int, kept: int) -> None:
    groups = parse_scheme(scheme, {"blocks": depth})["blocks"]
    assert (len(groups), sum(g.num_candidates for g in groups), sum(g.keep for g in groups)) == (
        num_groups,
        num_logits,
        kept,
    )
    assert [g.start for g in groups] == list(itertools.accumulate((g.size for g in groups[:-1]), initial=0))
    assert groups[-1].start + groups[-1].size == depth


def test_a_uniform_scheme_fills_every_list_without_crossing() -> None:
    groups = parse_scheme("1:2", {"encoder_blocks": 4, "decoder_blocks": 2})
    assert {name: [g.start for g in listed] for name, listed in groups.items()} == {
        "encoder_blocks": [0, 2],
        "decoder_blocks": [0],
    }


@pytest.mark.parametrize(
    ("scheme", "depth", "message"),
    [
        ("2:4", 14, r"divisible by 4; the model has 14.*try 1:2 or .*7.*2:4x3\+1:2"),
        ("1:2", 7, "divisible by 2; the model has 7"),
        ("5:14", 6, "divisible by 14; the model has 6"),
        ("2:4x3+3:4x4", 12, "covers 28 blocks; the model has 12"),
        ("1:2x2", 12, "covers 4 blocks; the model has 12"),
        ("3:2", 12, "3:2 must keep at least 1 and at most 2"),
        ("0:2", 12, "0:2 must keep at least 1"),
        ("0:0", 12, "0:0 must keep at least 1"),
        ("half", 12, "is not N:M"),
        ("1:2+", 12, "is not N:M"),
        ("", 12, "is not N:M"),
        ("-1:2", 12, "is not N:M"),
        ("14:28", 28, "40,116,600 candidates"),
    ],
)
def test_schemes_that_do_not_fit_say_why(scheme: str, depth: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_scheme(scheme, {"blocks": depth})


@pytest.mark.parametrize("depth", [1, 5, 6, 9, 14, 27, 29, 31])
@pytest.mark.parametrize("scheme", ["2:4", "1:3", "4:8", "7:14", "5:11", "1:40"])
def test_suggested_schemes_fit(scheme: str, depth: int) -> None:
    message = ""
    try:
        parse_scheme(scheme, {"blocks": depth})
    except UserError as error:
        message = str(error)
    suggestions = re.findall(r"(?:\(try | or )(\S+?)(?=\)| or )", message)
    assert bool(suggestions) == bool(message)
    for suggestion in suggestions:
        assert parse_scheme(suggestion, {"blocks": depth})["blocks"], suggestion


# ----------------------------------------------------------------------------------------------- decision, schedules


@pytest.mark.parametrize("steps", [1, 2, 3, 100, 10_009])
@pytest.mark.parametrize("ends", [(4.0, 0.1), (100.0, 100.0), (1e-2, 0.0), (0.3, 0.7)])
def test_schedules_are_exact_at_both_ends(ends: tuple[float, float], steps: int) -> None:
    values = [linear(ends, step, steps) for step in range(steps)]
    assert values[0] == ends[0]
    if steps > 1:
        assert values[-1] == ends[1]
    assert all(min(ends) <= value <= max(ends) for value in values)


def test_published_temperatures() -> None:
    assert linear((4.0, 0.1), 5000, 10_009) == pytest.approx(2.0516, abs=5e-5)
    assert linear((4.0, 0.1), 8000, 10_009) == pytest.approx(0.8825, abs=5e-5)


def test_equal_logits_decide_for_the_first_candidates() -> None:
    gates = gates_for([(2, 4)] * 7)
    assert mode(gates.groups, list(gates.logits)) == [i for g in range(7) for i in (4 * g, 4 * g + 1)]
    for row in probabilities(list(gates.logits), 100.0):
        assert row == pytest.approx([1 / 6] * 6)


@given(pairs=groups_of_any_kind, seed=st.integers(0, 99))
def test_the_decision_is_the_most_probable_candidate_of_each_group(pairs: list[tuple[int, int]], seed: int) -> None:
    gates = gates_for(pairs)
    logits = [g[0] for g in gumbel_for(gates, seed, 1)]
    kept = set(mode(gates.groups, logits))
    for group, row in zip(gates.groups, probabilities(logits, 2.0), strict=True):
        best = group.candidates()[max(range(len(row)), key=row.__getitem__)]
        assert {group.start + i for i in best} == {i for i in kept if group.start <= i < group.start + group.size}
        assert sum(row) == pytest.approx(1.0, abs=1e-5)
