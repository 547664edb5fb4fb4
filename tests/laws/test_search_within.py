"""A search within a recovery: gates until the blocks are decided, then the training of the student that they leave."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_training import RANDOMNESS, SETTINGS, batches, trainable

from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import PruneSection, RecoverSection
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.gates import CategoricalGates, SubsetGates
from tinyfusion.prune.learn import MaskLearner, Search, cut_with_weights, plan_of, search_within
from tinyfusion.prune.sureness import sureness_lines
from tinyfusion.recover.distill import distilled
from tinyfusion.training.loop import StepRecord, train_steps
from tinyfusion.training.state import TrainState

LONG = dataclasses.replace(SETTINGS, steps=12, warmup_steps=0, eps=1e-3)  # without eps, rounding is a direction
HALF = LONG.steps // 2
ModelFactory = Callable[..., LoadedModel]


def search(
    tiny_model: ModelFactory, sure: float = 2.0, trials: dict[str, Any] | None = None, **changes: Any
) -> tuple[MaskLearner, TrainState]:
    """A distillation that chooses half of four blocks in its first half; no decision has the probability 2."""
    teacher, student = tiny_model(depth=4), tiny_model(depth=4)
    frozen(teacher.module)
    section = PruneSection(**{"scheme": "2:4", "distribution": "subset", "gate_learning_rate": 0.05, **changes})
    goal = distilled(RecoverSection(method="logits-kd", training=LONG), GaussianObjective(), teacher, student, [])
    learner = search_within(
        student, goal, trainable(student), section, Search(HALF, sure, **(trials or {})), torch.device("cpu")
    )
    return learner, TrainState(learner.module, learner.parameter_groups, LONG)


def trained(learner: MaskLearner, state: TrainState, until: int = LONG.steps) -> list[StepRecord]:
    settings = dataclasses.replace(LONG, stop_after=until)
    return list(train_steps(state, learner.objective, batches, settings, RANDOMNESS))


@pytest.mark.parametrize("estimator", ["marginals", "gumbel-top-k", "score"])
def test_after_the_search_the_training_is_that_of_the_student(tiny_model: ModelFactory, estimator: str) -> None:
    """The second half on its own, on the student cut at the decision with its moments and averages, gives the same weights."""
    learner, state = search(tiny_model, subset_estimator=estimator)
    trained(learner, state, HALF)
    assert learner.objective.gates.fixed_step is None
    before = tiny_model(depth=4)
    before.module.load_state_dict(learner.module.state_dict())
    saved = state.optimizer.state
    moments = {name: {k: v.clone() for k, v in saved[p].items()} for name, p in state.parameters.items() if p in saved}
    averages = {name: value.clone() for name, value in state.ema.average.items()}
    trained(learner, state)
    gates = learner.objective.gates
    assert gates.fixed_step == HALF, "the first step after the search"
    kept = learner.decision(state.ema, LONG.steps - 1).kept()["blocks"]

    student = before.cut(by_indices(before, kept, 0))
    teacher = tiny_model(depth=4)
    goal = distilled(RecoverSection(method="logits-kd", training=LONG), GaussianObjective(), teacher, student, [])
    alone = TrainState(student.module, trainable(student), LONG)
    names = {f"blocks.{new}.": f"blocks.{old}." for new, old in enumerate(kept)}
    for name, parameter in alone.parameters.items():
        whole = next((name.replace(new, old, 1) for new, old in names.items() if name.startswith(new)), name)
        alone.optimizer.state[parameter] = {k: v.clone() for k, v in moments[whole].items()}
        alone.ema.average[name].copy_(averages[whole])
    alone.step, alone.seen_images = HALF, HALF * LONG.batch_size
    list(train_steps(alone, goal, batches, LONG, RANDOMNESS))
    for name, parameter in alone.parameters.items():
        whole = next((name.replace(new, old, 1) for new, old in names.items() if name.startswith(new)), name)
        torch.testing.assert_close(parameter, state.parameters[whole], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(alone.ema.average[name], state.ema.average[whole], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("sure", "fixed_step"), [(0.49, 0), (0.51, None)])
def test_a_sure_search_ends_at_once(tiny_model: ModelFactory, sure: float, fixed_step: int | None) -> None:
    """At equal logits every block stays with probability 0.5."""
    learner, state = search(tiny_model, sure=sure, gate_learning_rate=0.0)
    trained(learner, state, 2)
    assert learner.objective.gates.fixed_step == fixed_step


def test_blocks_that_are_fixed_do_not_run(tiny_model: ModelFactory) -> None:
    learner, state = search(tiny_model)
    trained(learner, state, HALF)
    ran: list[int] = []
    for index, block in enumerate(learner.objective.stack):
        block.get_submodule("attn").register_forward_pre_hook(lambda _m, _a, index=index: ran.append(index))
    trained(learner, state)
    kept = learner.decision(state.ema, LONG.steps - 1).kept()["blocks"]
    assert sorted(set(ran)) == kept and len(kept) == 2


def test_the_state_has_the_decision(tiny_model: ModelFactory) -> None:
    """What a checkpoint saves is enough to go on with the same blocks, whatever the logits would choose by then."""
    learner, state = search(tiny_model)
    trained(learner, state, HALF + 1)
    names = set(state.parameters)
    assert {"gates.fixed_logits.0", "gates.fixed_at"} <= names
    with torch.no_grad():
        decided = learner.decision(state.ema, HALF)
        kept, levels = decided.kept(), decided.confidence()
        for theta in learner.objective.gates.logits:
            theta.neg_()
            state.ema.average["gates.logits.0"].copy_(theta)
        now = learner.decision(state.ema, HALF)
        assert (now.kept(), now.confidence()) == (kept, levels)


def test_the_student_descends_from_the_teacher(tiny_model: ModelFactory) -> None:
    learner, state = search(tiny_model)
    trained(learner, state)
    teacher = tiny_model(depth=4)
    plan = plan_of(
        learner.decision(state.ema, LONG.steps - 1), teacher, PruneSection(scheme="2:4", distribution="subset"), 0, {}
    )
    student = cut_with_weights(teacher, plan, teacher.with_changed(state.averages()))
    assert student.facts.lineage[-1]["hash"] == teacher.hash() == plan.teacher
    first = plan.kept["blocks"][0]
    name = "blocks.{}.mlp.fc1.weight"
    found = dict(student.module.named_parameters())[name.format(0)]
    assert torch.equal(found, state.ema.average[name.format(first)])
    assert not torch.equal(found, dict(teacher.module.named_parameters())[name.format(first)])


@pytest.mark.parametrize(
    ("theta", "doubtful"), [([3.0, 0.4, 0.35, -3.0], ["block 1 (0.5"]), ([3.0, 3.0, -3.0, -3.0], [])]
)
def test_a_coin_toss_is_told(theta: list[float], doubtful: list[str], tiny_model: ModelFactory) -> None:
    gates = SubsetGates([BlockGroup(0, 4, 2)])
    learner, _ = search(tiny_model)
    decision = dataclasses.replace(learner.decision(Empty(theta), 0), gates=gates, scaling=1.0)
    lines = sureness_lines(decision)
    assert lines[0].startswith("probability of each kept block ") and lines[0].endswith("(chance 0.50)")
    assert len(lines) == 1 + bool(doubtful)
    assert all(part in lines[1] for part in doubtful) and "block 0" not in "".join(lines[1:])


def test_a_coin_toss_between_candidates_is_told(tiny_model: ModelFactory) -> None:
    gates = CategoricalGates([BlockGroup(0, 2, 1), BlockGroup(2, 2, 1)])
    learner, _ = search(tiny_model)
    groups = {"blocks": [BlockGroup(0, 2, 1), BlockGroup(2, 2, 1)]}
    logits = [torch.tensor([0.0, 3.0]), torch.tensor([0.05, 0.0])]
    decision = dataclasses.replace(
        learner.decision(Empty([0.0] * 4), 0), gates=gates, groups=groups, logits=logits, scaling=1.0
    )
    first, second = sureness_lines(decision)
    assert first == "probability of each group's choice 0.95 0.51 (chance 0.50)"
    assert "blocks 2 to 3 (0.51)" in second and "blocks 0 to 1" not in second


class Empty:
    """An average of logits."""

    def __init__(self, theta: list[float]) -> None:
        self.average = {"gates.logits.0": torch.tensor(theta)}


@pytest.mark.parametrize(
    ("scheme", "distribution", "kind"),
    [
        ("50%", None, SubsetGates),
        ("1:2", None, CategoricalGates),
        ("1:2", "subset", SubsetGates),
        ("50%", "runs", CategoricalGates),
    ],
)
def test_a_scheme_names_its_distribution(scheme: str, distribution: Any, kind: type, tiny_model: ModelFactory) -> None:
    """A share is any subset of its size; groups are categoricals, as published; either can be named."""
    learner, state = search(tiny_model, scheme=scheme, distribution=distribution)
    assert type(learner.objective.gates) is kind
    plan = plan_of(
        learner.decision(state.ema, 0),
        tiny_model(depth=4),
        PruneSection(scheme=scheme, distribution=distribution),
        0,
        {},
    )
    assert "%" not in str(plan.scheme) and plan.distribution in ("subset", "categorical", "runs")


TRIALS = {"candidates": 4, "trial_steps": 3, "trial_batch_size": LONG.batch_size}
OPEN = (1.0, 1.0)  # a scaling of logits that leaves a search undecided


def of_trials(records: list[StepRecord]) -> list[StepRecord]:
    return [record for record in records if record.trial is not None]


def snapshot(state: TrainState) -> dict[str, Any]:
    """All of a state that a training depends on."""
    return {**{name: tensor.clone() for name, tensor in state.tensors().items()}, "progress": state.progress()}


def test_the_best_of_the_likeliest_choices_stays(tiny_model: ModelFactory) -> None:
    """A trial is the training with that choice; the lowest mean loss of the second half decides; nothing else of trials is left."""
    learner, state = search(tiny_model, trials=TRIALS, scaling=OPEN)
    records = trained(learner, state)
    tried = learner.objective.gates.tried
    assert [record.trial for record in of_trials(records)] == [i for i in range(4) for _ in range(3)]
    assert [record.step for record in of_trials(records)] == [HALF, HALF + 1, HALF + 2] * 4
    assert len({tuple(choice[0]) for choice, _ in tried}) == 4
    weights = {}
    for choice, loss in tried:
        by_hand, alone = search(tiny_model, scaling=OPEN)
        trained(by_hand, alone, HALF)
        by_hand.objective.gates.fix(HALF, choice)
        own = trained(by_hand, alone)
        late = [float(record.terms["loss"]) for record in own[1:3]]
        assert loss == sum(late) / 2
        weights[loss] = alone.weights()
    best = weights[min(weights)]
    assert (
        learner.decision(state.ema, LONG.steps - 1).kept_units()["blocks"] == min(tried, key=lambda each: each[1])[0][0]
    )
    assert all(torch.equal(value, best[name]) for name, value in state.weights().items() if "trial_images" not in name)
    assert int(learner.objective.gates.trial_images) == 4 * 3 * LONG.batch_size
    assert state.seen_images == LONG.steps * LONG.batch_size


def test_trials_have_a_learning_rate_of_their_own(tiny_model: ModelFactory) -> None:
    learner, state = search(tiny_model, trials={**TRIALS, "trial_rate": 0.5}, scaling=OPEN)
    records = trained(learner, state)
    whole = {record.step: record.learning_rate for record in records if record.trial is None}
    assert [record.learning_rate for record in of_trials(records)[:3]] == [0.5 * whole[HALF + i] for i in range(3)]


@pytest.mark.parametrize("taken", [1, 4, 5])
def test_a_trial_that_is_stopped_leaves_no_trace(tiny_model: ModelFactory, taken: int) -> None:
    learner, state = search(tiny_model, trials=TRIALS, scaling=OPEN)
    trained(learner, state, HALF - 1)
    records = train_steps(state, learner.objective, batches, LONG, RANDOMNESS)
    assert next(records).trial is None
    before = snapshot(state)
    for _ in range(taken):
        assert next(records).trial is not None
    assert state.step > HALF and learner.objective.gates.is_fixed
    records.close()
    after = snapshot(state)
    assert before.keys() == after.keys() and before["progress"] == after["progress"]
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != "progress")
    assert not learner.objective.gates.is_fixed


def test_a_state_without_moments_has_none_after_a_trial(tiny_model: ModelFactory) -> None:
    _, state = search(tiny_model)
    names = set(state.tensors())
    with state.restored():
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        state.optimizer.step()
        assert set(state.tensors()) > names
    assert set(state.tensors()) == names and not state.optimizer.state


@pytest.mark.parametrize(("logits", "num"), [([9.0, 9.0, -9.0, -9.0], 0), ([9.0, 0.1, 0.0, -9.0], 2)])
def test_only_likely_choices_are_tried(tiny_model: ModelFactory, logits: list[float], num: int) -> None:
    learner, _ = search(tiny_model, trials=TRIALS, scaling=OPEN)
    with torch.no_grad():
        learner.objective.gates.logits[0].copy_(torch.tensor(logits))
    trials = learner.objective.trials()
    assert (trials.num if trials else 0) == num


def test_trials_are_not_decided_by_losses_that_are_not_finite(tiny_model: ModelFactory) -> None:
    learner, _ = search(tiny_model, trials=TRIALS, scaling=OPEN)
    trials = learner.objective.trials()
    assert trials is not None
    trials.decide([float("nan"), 2.0, 1.0, float("inf")])
    gates = learner.objective.gates
    assert gates.fixed_choice == gates.tried[2][0]


def test_a_sure_decision_is_not_tried(tiny_model: ModelFactory) -> None:
    """Every block stays with the probability 0.5 at equal logits."""
    for sure, tried in ((0.49, False), (0.51, True)):
        learner, _ = search(tiny_model, sure=sure, trials=TRIALS, scaling=OPEN)
        assert (learner.objective.trials() is not None) == tried


def test_bad_steps_of_trials_do_not_end_a_training(tiny_model: ModelFactory) -> None:
    """Nor do they count together with those before."""
    learner, state = search(tiny_model, trials=TRIALS, scaling=OPEN)
    bad = dataclasses.replace(LONG, skip_norm=1e-9, max_bad_steps=13, stop_after=HALF)
    records = list(train_steps(state, learner.objective, batches, bad, RANDOMNESS))
    assert len(of_trials(records)) == 12 and state.bad_steps == HALF and not any(record.applied for record in records)


def test_trials_can_be_left_out(tiny_model: ModelFactory) -> None:
    learner, state = search(tiny_model, trials=TRIALS, scaling=OPEN)
    records = list(train_steps(state, learner.objective, batches, LONG, RANDOMNESS, trials=False))
    assert not of_trials(records) and not learner.objective.gates.tried and learner.objective.gates.is_fixed


def every_choice(gates: Any, scaling: float) -> list[tuple[float, list[list[int]]]]:
    """Joint choices of all groups with their log probabilities up to a constant, falling."""
    of_groups = []
    for index, group in enumerate(gates.groups):
        theta = gates.logits[index].detach()
        subset = isinstance(gates, SubsetGates)
        levels = [
            scaling * float(sum(theta[b - group.start] for b in kept if b in group.free) if subset else theta[row])
            for row, kept in enumerate(group.candidates())
        ]
        of_groups.append([(level, list(kept)) for level, kept in zip(levels, group.candidates(), strict=True)])
    joint = [(sum(level for level, _ in each), [kept for _, kept in each]) for each in itertools.product(*of_groups)]
    return sorted(joint, key=lambda each: -each[0])


@pytest.mark.parametrize(
    "gates",
    [
        SubsetGates([BlockGroup(0, 9, 4)]),
        SubsetGates([BlockGroup(0, 5, 2, protected=(3,)), BlockGroup(5, 4, 3)]),
        SubsetGates([BlockGroup(0, 2, 2), BlockGroup(2, 5, 1)]),
        CategoricalGates([BlockGroup(0, 2, 1), BlockGroup(2, 3, 2), BlockGroup(5, 4, 1)]),
        CategoricalGates([BlockGroup(0, 8, 4, runs=2)]),
    ],
)
def test_the_likeliest_choices_are_those_of_all(gates: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for theta in gates.logits:
            theta.copy_(torch.randn(theta.shape, generator=generator))
    wanted = every_choice(gates, 1.5)
    for num in (1, 2, 7, 1000):
        assert gates.likeliest(num, 1.5, 1e-30) == [choice for _, choice in wanted[:num]]
    near = [choice for level, choice in wanted if level >= wanted[0][0] + math.log(0.3)]
    assert gates.likeliest(1000, 1.5, 0.3) == near
