"""Subsets of exact size: marginals and gradients are the enumerated ones, samples follow them, nothing overflows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import batches, save_checkpoint
from torch import Tensor

from tinyfusion.blocks.scheme import BlockGroup, consecutive_groups, parse_scheme
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.gates import (
    CategoricalGates,
    SubsetGates,
    draw_subsets,
    inclusion_table,
    marginals,
    relaxed_top_k,
)
from tinyfusion.prune.learn import check_pairs, in_pairs, mask_learner, plan_of
from tinyfusion.training.checkpoints import load_latest
from tinyfusion.training.loop import train_steps
from tinyfusion.training.state import TrainState

ESTIMATORS = ["marginals", "gumbel-top-k"]


def normals(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(Randomness(seed).at(0, 0, 1).normal("z", shape))[0]


def subsets(size: int, keep: int) -> Tensor:
    rows = torch.zeros(math.comb(size, keep), size, dtype=torch.float64)
    for row, chosen in enumerate(itertools.combinations(range(size), keep)):
        rows[row, list(chosen)] = 1.0
    return rows


def enumerated(z: Tensor, keep: int) -> Tensor:
    rows = subsets(len(z), keep)
    return torch.softmax(rows @ z, dim=0) @ rows


sizes = st.integers(1, 8).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size)))


# ------------------------------------------------------------------------------------------------ marginals and samples


@given(pair=sizes, seed=st.integers(0, 999), spread=st.sampled_from([0.0, 1.0, 10.0, 60.0]))
def test_marginals_and_their_gradient_are_the_enumerated_ones(pair: tuple[int, int], seed: int, spread: float) -> None:
    size, keep = pair
    z = (spread * normals(seed, size).double()).requires_grad_()
    upstream = normals(seed + 1, size).double()
    found, wanted = marginals(inclusion_table(z, keep)), enumerated(z, keep)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(pi @ upstream, z)[0] for pi in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "two values", "even", "equal", "alternating"])
@pytest.mark.parametrize(("size", "keep"), [(32, 16), (28, 14), (32, 1), (32, 31), (32, 32), (32, 0)])
def test_marginals_hold_at_extreme_logits(size: int, keep: int, kind: str) -> None:
    """Scaled logits of up to +-100 in float32: as in float64, summing to the budget, gradients finite and centred."""
    made = {
        "normal": (50 * normals(3, size)).clamp(-100, 100),
        "two values": torch.where(torch.arange(size) < keep, 100.0, -100.0),
        "even": torch.linspace(-100, 100, size),
        "equal": torch.full((size,), 100.0),
        "alternating": 100.0 * (-1.0) ** torch.arange(size),
    }
    z = made[kind].requires_grad_()
    found = marginals(inclusion_table(z, keep))
    exact = marginals(inclusion_table(z.detach().double(), keep))
    assert float(found.detach().sum()) == pytest.approx(keep, abs=1e-5)
    torch.testing.assert_close(found.detach().double(), exact, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(found @ normals(4, size), z)
    assert bool(gradient.isfinite().all())
    assert abs(float(gradient.sum())) < 1e-5


def test_samples_have_the_probabilities_of_their_subsets() -> None:
    """Chi-square over all subsets, the draws fixed by their seed."""
    size, keep, num = 6, 3, 20_000
    z = normals(5, size)
    uniforms = torch.from_numpy(Randomness(0).at(0, 0, num).uniform("u", (size,))).float()
    drawn = draw_subsets(inclusion_table(z, keep), uniforms)
    rows = subsets(size, keep)
    expected = num * torch.softmax(rows @ z.double(), dim=0)
    observed = (drawn.double() @ rows.T == keep).sum(0)
    assert int(observed.sum()) == num, "every sample is one of the subsets"
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < 43.8, "the 99.9th percentile at 19 degrees of freedom"


@given(pair=sizes, seed=st.integers(0, 999), spread=st.sampled_from([0.0, 3.0, 100.0]))
def test_samples_have_the_exact_size_even_at_the_ends_of_the_uniforms(
    pair: tuple[int, int], seed: int, spread: float
) -> None:
    size, keep = pair
    table = inclusion_table(spread * normals(seed, size), keep)
    ends = torch.stack([torch.full((size,), 1.0), torch.full((size,), 2.0**-54), torch.full((size,), 0.5)])
    assert draw_subsets(table, ends).sum(1).tolist() == [keep] * 3


@given(pair=sizes, seed=st.integers(0, 99), temperature=st.sampled_from([0.05, 1.0, 4.0]))
def test_the_relaxed_top_k_sums_to_the_budget_and_hardens(pair: tuple[int, int], seed: int, temperature: float) -> None:
    size, keep = pair
    keys = normals(seed, 4, size).requires_grad_()
    relaxed = relaxed_top_k(keys, keep, temperature)
    torch.testing.assert_close(relaxed.sum(1), torch.full((4,), float(keep)), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((relaxed * normals(seed + 1, 4, size)).sum(), keys)
    assert bool(gradient.isfinite().all())
    hard = relaxed_top_k(torch.arange(size).double().expand(2, size), keep, 0.02)
    assert hard[0].round().tolist() == [0.0] * (size - keep) + [1.0] * keep


# --------------------------------------------------------------------------------------------------------------- gates


def gates_of(pairs: list[tuple[int, int]], estimator: str = "marginals", seed: int | None = None) -> SubsetGates:
    gates = SubsetGates(consecutive_groups(pairs), 0.02, estimator)
    if seed is not None:
        with torch.no_grad():
            for index, theta in enumerate(gates.logits):
                theta.copy_(normals(seed + index, len(theta)))
    return gates


groups_of_any_kind = st.lists(
    st.integers(1, 5).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))), min_size=1, max_size=4
)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(pairs=groups_of_any_kind, seed=st.integers(0, 99), scaling=st.sampled_from([0.0, 5.0, 100.0]))
def test_gates_are_exactly_zero_or_one_and_keep_the_budget(
    estimator: str, pairs: list[tuple[int, int]], seed: int, scaling: float
) -> None:
    gates = gates_of(pairs, estimator, seed)
    masks = gates.sample(gates.draw(Randomness(seed).at(0, 0, 8)), 0.5, scaling)
    assert bool(((masks == 0) | (masks == 1)).all())
    assert masks.dtype == torch.float32
    for group in gates.groups:
        assert masks[:, group.start : group.start + group.size].sum(1).tolist() == [group.keep] * 8
    (masks * normals(seed, 8, masks.shape[1])).sum().backward()
    for theta in gates.logits:
        assert theta.grad is not None
        assert bool(theta.grad.isfinite().all())
        assert abs(float(theta.grad.sum())) <= 1e-4 * max(1.0, scaling) * (1 + float(theta.grad.abs().max()))


def test_the_gradient_is_the_covariance_of_the_blocks_seen_by_the_loss() -> None:
    """scaling * sum over samples of Cov(b_i, b_j) u_j, with the covariance enumerated."""
    gates, scaling, size, keep = gates_of([(3, 6)], seed=2), 3.0, 6, 3
    theta = gates.logits[0].detach().double()
    rows = subsets(size, keep)
    p = torch.softmax(rows @ (scaling * theta), dim=0)
    pi = p @ rows
    covariance = (rows * p[:, None]).T @ rows - pi[:, None] * pi[None]
    upstream = normals(7, 4, size)
    (gates.sample(gates.draw(Randomness(0).at(0, 0, 4)), 1.0, scaling) * upstream).sum().backward()
    assert gates.logits[0].grad is not None
    torch.testing.assert_close(
        gates.logits[0].grad.double(), scaling * covariance @ upstream.double().sum(0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_mean_of_the_logits_changes_nothing(estimator: str) -> None:
    """Bit for bit: the values are multiples of 1/64, so that adding 1000 to them is exact."""
    found = []
    for shift in (0.0, 1000.0):
        gates = gates_of([(4, 8)], estimator)
        with torch.no_grad():
            gates.logits[0].copy_(torch.tensor([3.0, -1, 0, 2, 5, -7, 1, -3]) / 64 + shift)
        masks = gates.sample(gates.draw(Randomness(0).at(0, 0, 64)), 1.0, 100.0)
        (masks * normals(1, 64, 8)).sum().backward()
        assert gates.logits[0].grad is not None
        found.append((masks.detach(), gates.logits[0].grad, gates.probabilities(0, gates.logits[0], 100.0)))
    (masks, gradient, row), (masks_of_shifted, gradient_of_shifted, row_of_shifted) = found
    assert torch.equal(masks, masks_of_shifted)
    assert torch.equal(gradient, gradient_of_shifted)
    assert row == row_of_shifted


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_do_not_depend_on_the_batch(estimator: str) -> None:
    gates = gates_of([(1, 2), (3, 6)], estimator, seed=1)
    whole = gates.sample(gates.draw(Randomness(3).at(7, 0, 9)), 1.0, 2.0)
    slices = [gates.sample(gates.draw(Randomness(3).at(7, first, 3)), 1.0, 2.0) for first in (0, 3, 6)]
    assert torch.equal(whole, torch.cat(slices))
    assert len({tuple(row) for row in whole.tolist()}) > 1
    assert not torch.equal(whole, gates.sample(gates.draw(Randomness(3).at(8, 0, 9)), 1.0, 2.0))


@given(seed=st.integers(0, 99), scaling=st.sampled_from([1.0, 20.0]))
def test_one_of_two_as_a_subset_is_the_categorical(seed: int, scaling: float) -> None:
    """1:2 and 1:4: p(block) is the softmax over blocks, and so is the gradient of the probabilities' mean."""
    groups = consecutive_groups([(1, 2), (1, 4)])
    subset, categorical = gates_of([(1, 2), (1, 4)], seed=seed), CategoricalGates(groups)
    for index, theta in enumerate(subset.logits):
        theta = theta.detach()
        assert subset.probabilities(index, theta, scaling) == pytest.approx(
            categorical.probabilities(index, theta, scaling), abs=1e-5
        )
        assert subset.kept(index, theta) == categorical.kept(index, theta)
        assert subset.confidence(index, theta, scaling) == pytest.approx(
            categorical.confidence(index, theta, scaling), abs=1e-5
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(pair=sizes.filter(lambda pair: pair[1] > 0), seed=st.integers(0, 99))
def test_the_mode_is_the_most_probable_subset(estimator: str, pair: tuple[int, int], seed: int) -> None:
    size, keep = pair
    gates = SubsetGates([BlockGroup(10, size, keep)], 0.0, estimator)
    theta = normals(seed, size)
    best = subsets(size, keep)[int(torch.argmax(subsets(size, keep) @ theta.double()))]
    assert gates.kept(0, theta) == [10 + i for i in range(size) if best[i] == 1]
    assert gates.kept(0, torch.zeros(size)) == list(range(10, 10 + keep)), "the first of equals"
    row = gates.probabilities(0, theta, 4.0)
    assert gates.confidence(0, theta, 4.0) == [row[i - 10] for i in gates.kept(0, theta)]
    assert sum(row) == pytest.approx(keep, abs=1e-5)


# ------------------------------------------------------------------------------------------------- schemes, protection


@pytest.mark.parametrize(
    ("scheme", "depth", "num_groups", "num_logits", "kept"),
    [
        ("1:2", 28, 14, 28, 14),
        ("2:4", 28, 7, 28, 14),
        ("7:14", 28, 2, 28, 14),
        ("1:4", 28, 7, 28, 7),
        ("1:2", 14, 7, 14, 7),
        ("2:4x2+3:4+2:4+3:4+2:4x2", 28, 7, 28, 16),
        ("3:4x2+2:4+3:4+2:4+3:4x2", 28, 7, 28, 19),
        ("14:28", 28, 1, 28, 14),
        ("6:12", 12, 1, 12, 6),
        ("1:2x3+3:6", 12, 4, 12, 6),
        ("1:1x4+2:8", 12, 5, 12, 6),
        ("16:32", 32, 1, 32, 16),
    ],
)
def test_every_published_scheme_and_whole_stacks_can_be_subsets(
    scheme: str, depth: int, num_groups: int, num_logits: int, kept: int
) -> None:
    groups = parse_scheme(scheme, {"blocks": depth}, "subset")["blocks"]
    gates = SubsetGates(groups)
    assert (len(groups), sum(len(theta) for theta in gates.logits)) == (num_groups, num_logits)
    masks = gates.sample(gates.draw(Randomness(0).at(0, 0, 3)), 1.0, 5.0)
    assert masks.shape == (3, depth)
    assert masks.sum(1).tolist() == [kept] * 3


def test_too_many_candidates_point_at_subsets_and_misfits_stay_refused() -> None:
    with pytest.raises(UserError, match=r"40,116,600 candidates.*prune.distribution to subset"):
        parse_scheme("14:28", {"blocks": 28})
    with pytest.raises(UserError, match=r"2:4 needs a depth divisible by 4; the model has 14 blocks \(try "):
        parse_scheme("2:4", {"blocks": 14}, "subset")
    fixed = parse_scheme("14:28", {"blocks": 28}, "categorical", list(range(12)))["blocks"][0]
    assert fixed.num_candidates == math.comb(16, 2), "what is protected need not be enumerated"


@given(
    pair=st.integers(1, 7).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))),
    protected=st.sets(st.integers(0, 6)),
)
def test_candidates_with_protection_are_the_candidates_that_keep_it(pair: tuple[int, int], protected: set[int]) -> None:
    keep, size = pair
    inside = sorted(i for i in protected if i < size)[:keep]
    group, every = BlockGroup(0, size, keep, tuple(inside)), BlockGroup(0, size, keep).candidates()
    assert group.candidates() == [chosen for chosen in every if set(inside) <= set(chosen)]
    assert group.num_candidates == len(group.candidates())


@pytest.mark.parametrize("distribution", ["categorical", "subset"])
@pytest.mark.parametrize("scheme", ["6:12", "1:2x3+3:6", "3:4x2+4:4", "1:2x4+4:4", "1:1x4+4:8", "2:3x4"])
def test_protected_blocks_always_stay(scheme: str, distribution: str) -> None:
    protect = (1, 2, 8, 11)
    groups = parse_scheme(scheme, {"blocks": 12}, distribution, protect)["blocks"]
    gates = SubsetGates(groups) if distribution == "subset" else CategoricalGates(groups)
    with torch.no_grad():
        for index, theta in enumerate(gates.logits):
            theta.copy_(normals(index, len(theta)))
    masks = gates.sample(gates.draw(Randomness(0).at(0, 0, 50)), 1.0, 10.0)
    assert bool((masks[:, list(protect)] == 1).all())
    assert set(masks.sum(1).tolist()) == {float(sum(group.keep for group in groups))}
    kept = [block for index, theta in enumerate(gates.logits) for block in gates.kept(index, theta)]
    assert set(protect) <= set(kept)
    assert len(kept) == sum(group.keep for group in groups)
    if distribution == "subset":
        rows = [p for index, theta in enumerate(gates.logits) for p in gates.probabilities(index, theta, 10.0)]
        assert [rows[i] for i in protect] == [1.0] * 4
        assert sum(rows) == pytest.approx(sum(masks[0].tolist()), abs=1e-4)


@pytest.mark.parametrize(
    ("scheme", "protect", "message"),
    [
        ("1:2", (0, 1), "keeps 1 of blocks 0 to 1, --protect wants 0, 1: protect fewer"),
        ("6:12", tuple(range(7)), "keeps 6 of blocks 0 to 11, --protect wants 0, 1, 2, 3, 4, 5, 6"),
        ("6:12", (3, 12), r"\[12\] out of range: the model has blocks 0 to 11"),
        ("6:12", (-1,), r"\[-1\] out of range"),
    ],
)
@pytest.mark.parametrize("distribution", ["categorical", "subset"])
def test_protection_that_cannot_be_kept_is_refused(
    scheme: str, protect: tuple[int, ...], message: str, distribution: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_scheme(scheme, {"blocks": 12}, distribution, protect)


def test_protection_counts_through_the_lists() -> None:
    groups = parse_scheme("1:2", {"encoder": 4, "decoder": 4}, "subset", (1, 6))
    assert [group.protected for group in groups["encoder"]] == [(1,), ()]
    assert [group.protected for group in groups["decoder"]] == [(), (2,)]


# ------------------------------------------------------------------------------------------- the learned criterion


SETTINGS = TrainingSection(
    steps=4, batch_size=2, learning_rate=1e-2, learning_rate_end_share=1.0, ema_decay=0.5, clip_norm=1.0
)
SECTION = PruneSection(
    scheme="1:2+3:6", distribution="subset", protect=(3,), update="full", scaling=(5.0, 40.0), training=SETTINGS
)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_subset_run_stopped_anywhere_and_continued_is_bit_equal(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, estimator: Any
) -> None:
    section = dataclasses.replace(SECTION, subset_estimator=estimator)

    def job() -> tuple[TrainState, Any]:
        learner = mask_learner(tiny_model(depth=8), GaussianObjective(), section, seed=0)
        return TrainState(learner.module, learner.parameter_groups, SETTINGS), learner.objective

    def train(state: TrainState, objective: Any, until: int) -> None:
        for _ in train_steps(state, objective, batches, SETTINGS, Randomness(3)):
            if state.step == until:
                break

    whole, objective = job()
    start = {name: value.clone() for name, value in whole.tensors().items()}
    train(whole, objective, 4)
    moved = [name for name in start if "gates" in name and not torch.equal(start[name], whole.tensors()[name])]
    assert moved, "the gates learn"
    for stop in (1, 2):
        first, objective = job()
        train(first, objective, stop)
        save_checkpoint(tmp_path / str(stop), first, 1)
        second, objective = job()
        load_latest(tmp_path / str(stop), second)
        train(second, objective, 4)
        one, two = whole.tensors(), second.tensors()
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_the_decision_of_a_subset_becomes_a_log_line_and_a_plan(tiny_model: Callable[..., LoadedModel]) -> None:
    teacher = tiny_model(depth=8)
    learner = mask_learner(teacher, GaussianObjective(), SECTION, seed=0)
    state = TrainState(learner.module, learner.parameter_groups, SETTINGS)
    state.ema.average["gates.logits.1"].copy_(torch.tensor([0.0, 0.0, 0.1, 0.3, 0.2, 0.0]))
    decision = learner.decision(state.ema, step=4)
    logged = learner.log(state.ema, 4)
    marginal = logged["marginals"]["blocks"]
    assert logged["kept"] == {"blocks": [0, 3, 5, 6]}, "block 3 is protected, 5 and 6 have the largest logits"
    assert logged["confidence"]["blocks"] == [marginal[i] for i in (0, 3, 5, 6)]
    assert len(marginal) == 8
    assert marginal[:4] == pytest.approx([0.5, 0.5, marginal[7], 1.0], abs=1e-6)
    np.testing.assert_allclose(
        marginal[4:], enumerated(40.0 * torch.tensor([0.0, 0.1, 0.3, 0.2, 0.0]).double(), 2)[1:], atol=1e-5
    )
    plan = plan_of(decision, teacher, SECTION, 3, {})
    assert plan.distribution == "subset"
    assert plan.kept == logged["kept"]
    assert plan.groups == {"blocks": [[1, 2], [3, 6]]}
    assert [p for row in plan.scores["blocks"] for p in row] == marginal
    assert "marginal" in plan.scores["meaning"]
    assert len(teacher.cut(plan).stack) == 4


@pytest.mark.parametrize("estimator", ["marginals", "gumbel-top-k", "score"])
def test_a_group_that_is_wholly_protected_draws_nothing(estimator: str) -> None:
    groups = parse_scheme("1:1x2+2:4", {"blocks": 6}, "subset", (0,))["blocks"]
    gates = SubsetGates(groups, estimator=estimator)
    noise = gates.draw(Randomness(0).at(0, 0, 8))
    masks = gates.sample(noise, 1.0, 5.0)
    assert bool((masks[:, :2] == 1).all()) and bool((masks.sum(1) == 4).all())
    surrogate = gates.surrogate(noise, 5.0, torch.arange(8.0))
    assert (surrogate is not None) == (estimator == "score")


def test_the_score_estimator_is_unbiased() -> None:
    """Its mean over very many pairs is the exact gradient of the mean loss, enumerated; a linear loss would prove little."""
    group = BlockGroup(0, 4, 2)
    gates = SubsetGates([group], estimator="score")
    theta = gates.logits[0]
    with torch.no_grad():
        theta.copy_(torch.tensor([0.3, -0.2, 0.1, 0.05]))
    cost = torch.tensor([[0.0, 2.0, -1.0, 0.5], [0.0, 0.0, 3.0, -2.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])

    def loss(masks: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", masks, cost, masks)

    rows = torch.zeros(group.num_candidates, 4)
    for row, chosen in zip(rows, group.candidates(), strict=True):
        row[list(chosen)] = 1.0
    probabilities = torch.softmax(3.0 * rows @ theta, dim=0)
    (exact,) = torch.autograd.grad(probabilities @ loss(rows), theta)

    noise = gates.draw(Randomness(5).at(0, 0, 40_000))
    masks = gates.sample(noise, 1.0, 3.0)
    assert not masks.requires_grad
    surrogate = gates.surrogate(noise, 3.0, loss(masks))
    assert surrogate is not None
    (estimate,) = torch.autograd.grad(surrogate.mean(), theta)
    torch.testing.assert_close(estimate, exact, atol=0.05, rtol=0.0)
    assert float(exact.abs().max()) > 0.5


def test_pairs_share_everything_but_their_masks(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    noisy = noisy_batch(tiny_model())
    masks = torch.arange(4 * len(noisy.t)).view(-1, 4)
    noisy = dataclasses.replace(noisy, gate_noise=(masks,))
    paired = in_pairs(noisy)
    assert torch.equal(paired.gate_noise[0], masks)
    assert torch.equal(noisy.each(lambda value: value[:1]).gate_noise[0], masks[:1])
    for name in ("x0", "noise", "xt", "t", "labels"):
        value, own = (batch.condition[name] if name == "labels" else getattr(batch, name) for batch in (paired, noisy))
        assert torch.equal(value[0::2], own[0::2]) and torch.equal(value[1::2], own[0::2][: len(own) // 2])
    with pytest.raises(ValueError, match="begins with an even one"):
        check_pairs(3)
