"""Runs of removed blocks as a distribution: candidates are exactly the runs, samples follow their logits, plans replay."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import batches, save_checkpoint

from tinyfusion.blocks.plan import plan_from_json
from tinyfusion.blocks.scheme import BlockGroup, choice_chance, parse_scheme
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.gates import CategoricalGates
from tinyfusion.prune.learn import mask_learner, plan_of
from tinyfusion.recover.align import block_pairs
from tinyfusion.training.checkpoints import load_latest
from tinyfusion.training.loop import train_steps
from tinyfusion.training.state import TrainState

sizes = st.integers(1, 9).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size)))


def removed_runs(group: BlockGroup, kept: tuple[int, ...]) -> list[int]:
    """Lengths of the maximal runs of removed blocks, in order."""
    gone = [i not in kept for i in group.blocks]
    return [len(list(run)) for removed, run in groupby(gone) if removed]


@given(pair=sizes, protected=st.sets(st.integers(0, 8)))
def test_one_run_is_every_choice_with_one_run(pair: tuple[int, int], protected: set[int]) -> None:
    keep, size = pair
    group = BlockGroup(3, size, keep, tuple(sorted(3 + i for i in protected if i < size)[:keep]))
    in_runs = dataclasses.replace(group, runs=1)
    assert in_runs.candidates() == [kept for kept in group.candidates() if len(removed_runs(group, kept)) <= 1]
    assert in_runs.num_candidates == len(in_runs.candidates())
    if not group.protected and keep < size:
        assert in_runs.num_candidates == keep + 1


@given(pair=sizes, runs=st.integers(1, 5), protected=st.sets(st.integers(0, 8)))
def test_several_runs_are_the_choices_that_split_into_them(
    pair: tuple[int, int], runs: int, protected: set[int]
) -> None:
    """Against the definition: the removed blocks in order, dealt out to runs of the wanted lengths, are consecutive in each."""
    keep, size = pair
    group = BlockGroup(0, size, keep, tuple(sorted(i for i in protected if i < size)[:keep]))
    gone, real = size - keep, min(runs, size - keep)
    lengths = [gone // real + (i < gone % real) for i in range(real)]
    ends = list(itertools.accumulate(lengths, initial=0))

    def splits(kept: tuple[int, ...]) -> bool:
        removed = [i for i in group.blocks if i not in kept]
        return all(removed[b - 1] - removed[a] == b - a - 1 for a, b in itertools.pairwise(ends))

    in_runs = dataclasses.replace(group, runs=runs)
    assert in_runs.candidates() == [kept for kept in group.candidates() if splits(kept)]
    assert in_runs.num_candidates == len(in_runs.candidates())


def test_numbers_of_candidates_of_real_models_are_counted_without_enumeration() -> None:
    assert BlockGroup(0, 38, 20, runs=1).num_candidates == 21
    assert BlockGroup(0, 38, 20, runs=2).num_candidates == math.comb(22, 2)
    assert BlockGroup(0, 60, 30, runs=30).num_candidates == math.comb(60, 30)


def test_samples_are_runs_with_the_probabilities_of_their_logits() -> None:
    (group,) = parse_scheme("6:12", {"blocks": 12}, "runs", (0,), runs=2)["blocks"]
    gates = CategoricalGates([group])
    num, draws = len(gates.logits[0]), 20_000
    assert num == group.num_candidates == len(set(group.candidates()))
    with torch.no_grad():
        gates.logits[0].copy_(torch.linspace(-1, 1, num))
    masks = gates.sample(gates.draw(Randomness(0).at(0, 0, draws)), 0.5, 1.0).detach()
    assert set(masks.sum(1).tolist()) == {6.0} and bool((masks[:, 0] == 1).all())
    counts = torch.zeros(num, dtype=torch.float64)
    position = {kept: i for i, kept in enumerate(group.candidates())}
    for row, times in zip(*torch.unique(masks, dim=0, return_counts=True), strict=True):
        counts[position[tuple(row.nonzero().flatten().tolist())]] += times
    expected = draws * torch.softmax(gates.logits[0].detach().double(), 0)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < num - 1 + 5 * math.sqrt(2 * (num - 1)), "five standard deviations of chi-square"
    assert choice_chance(group) == 1 / num, "of the page"
    assert "runs of consecutive blocks" in gates.meaning and "runs" not in CategoricalGates.meaning


@pytest.mark.parametrize(
    ("scheme", "distribution", "protect", "runs", "message"),
    [
        ("6:12", "runs", (2, 6, 9), 1, "removes 6 of 12 blocks in a run, and between the protected blocks 2, 6, 9"),
        ("2:8", "runs", (4,), 2, None),
        ("3:8", "runs", (4,), 1, "in a run, and between the protected blocks 4 there is no room: protect fewer"),
        ("6:12", "subset", (), 2, "prune.runs is 2, and prune.distribution subset has no runs: set it to runs"),
        ("30:60", "runs", (), 6, "choices of 6 runs, too many to enumerate: set prune.runs lower"),
    ],
)
def test_settings_that_do_not_fit_say_why(
    scheme: str, distribution: str, protect: tuple[int, ...], runs: int, message: str | None
) -> None:
    depth = int(scheme.partition(":")[2])
    if message is None:
        assert parse_scheme(scheme, {"blocks": depth}, distribution, protect, runs)["blocks"][0].num_candidates
        return
    with pytest.raises(UserError, match=message):
        parse_scheme(scheme, {"blocks": depth}, distribution, protect, runs)


def test_the_message_counts_through_the_lists() -> None:
    with pytest.raises(UserError, match="between the protected blocks 3 there is no room"):
        parse_scheme("1:1x2;1:4", {"double": 2, "single": 4}, "runs", (3,), 1)


TRAINING = TrainingSection(steps=4, batch_size=2, learning_rate=1e-2, ema_decay=0.5)
SECTION = PruneSection(scheme="4:8", distribution="runs", runs=2, protect=(3,), lora_rank=2, training=TRAINING)


def test_a_search_learns_resumes_bit_equal_and_its_plan_replays(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    teacher = tiny_model(depth=8)

    def job() -> tuple[TrainState, Any]:
        learner = mask_learner(teacher, GaussianObjective(), SECTION, seed=0)
        return TrainState(learner.module, learner.parameter_groups, TRAINING), learner

    def train(state: TrainState, learner: Any, until: int) -> None:
        for _ in train_steps(state, learner.objective, batches, TRAINING, Randomness(3)):
            if state.step == until:
                break

    whole, learner = job()
    before = whole.tensors()["weight/gates.logits.0"].clone()
    train(whole, learner, 4)
    assert not torch.equal(before, whole.tensors()["weight/gates.logits.0"]), "the gates learn"
    first, other = job()
    train(first, other, 2)
    save_checkpoint(tmp_path, first, 1)
    second, again = job()
    load_latest(tmp_path, second)
    train(second, again, 4)
    assert [name for name, value in whole.tensors().items() if not torch.equal(value, second.tensors()[name])] == []

    plan = plan_of(learner.decision(whole.ema, 3), teacher, SECTION, 3, {})
    assert plan.runs == 2 and len(plan.scores["blocks"][0]) == BlockGroup(0, 8, 4, (3,), 2).num_candidates
    assert sum(plan.scores["blocks"][0]) == pytest.approx(1, abs=1e-5)
    read = plan_from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan and 3 in plan.kept["blocks"] and len(teacher.cut(read).stack) == 4
    ends = [teacher_block for _, teacher_block in block_pairs(plan)]
    kept = plan.kept["blocks"]
    assert ends == [*(block - 1 for block in kept[1:]), 7], "paired block by block, as subsets are"
