"""Training of dynamic models: draws, the budget over any cut of a batch, what a bad step leaves alone, and the finish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import batches
from torch import Tensor, nn

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import ComputeSection, TrainingSection
from tinyfusion.core.errors import BadNumbers
from tinyfusion.core.rng import Draws, Randomness, StratifiedDraws
from tinyfusion.dynamic.train import HOLD_STEPS, DynamicObjective, RoutedBatch, budget_at
from tinyfusion.families.registry import FAMILIES
from tinyfusion.models.attach import attach
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.processes.base import FoldedGuidance
from tinyfusion.processes.flow import FlowObjective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import StepRecord, noisy_microbatches, train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

RANDOMNESS = Randomness(5)
SETTINGS = TrainingSection(
    steps=4,
    batch_size=8,
    learning_rate=1e-3,
    learning_rate_end_share=1.0,
    clip_norm=None,
    ema_decay=0.5,
    max_bad_steps=2,
)
ModelFactory = Callable[..., LoadedModel]


@pytest.fixture
def dynamic(tiny_model: ModelFactory) -> DynamicModel:
    """A tiny model with routers that are undecided."""
    model = tiny_model(num_heads=4, hidden_size=32, depth=2).copy()
    made = attach(model, DynamicSettings(width_bias=0.4, token_bias=0.4))
    made.module.train()
    return made


def objective(dynamic: DynamicModel, **changes: Any) -> DynamicObjective:
    fields: dict[str, Any] = dict(inner=GaussianObjective(), target=0.5, label_drop=0.1, ramp_steps=None)
    return DynamicObjective(dynamic=dynamic, **{**fields, **changes})


def draw(goal: DynamicObjective, num: int = 8, step: int = 200, first: int = 0) -> RoutedBatch:
    draws = RANDOMNESS.at(step, first, num)
    return goal.draw(batches(step, num, draws), draws)


def train(
    dynamic: DynamicModel, goal: Any, settings: TrainingSection, **compute: Any
) -> tuple[TrainState, list[StepRecord]]:
    state = TrainState(dynamic.module, [ParameterGroup(trainable(dynamic.module))], settings)
    engine = Engine("cpu", ComputeSection(**compute))
    return state, list(train_steps(state, goal, batches, settings, RANDOMNESS, engine))


# ------------------------------------------------------------------------------------------------------ schedule, draws


def test_trace_of_the_budget() -> None:
    warm, target = 1000, 0.5
    trace = [budget_at(step, target, warm) for step in (0, 99, 100, 500, 1000, 1001)]
    assert trace == pytest.approx([1.0, 1.0, 0.95, 0.75, 0.5, 0.5])
    assert [budget_at(step, 0.7, None) for step in (0, 99, 100)] == [1.0, 1.0, 0.7]


def test_times_are_stratified_by_the_place_in_the_global_batch() -> None:
    whole = StratifiedDraws(1, 7, 0, 8, 4).integers("timestep", 1000)
    assert (whole // 250).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    slices = [StratifiedDraws(1, 7, first, num, 4).integers("timestep", 1000) for first, num in ((0, 3), (3, 5))]
    assert np.array_equal(np.concatenate(slices), whole)
    times = StratifiedDraws(1, 7, 2, 3, 4).uniform("timestep")
    assert [int(4 * t) for t in times] == [2, 3, 0]
    plain, strata = Draws(1, 7, 0, 8), StratifiedDraws(1, 7, 0, 8, 4)
    assert np.array_equal(plain.normal("noise", (3,)), strata.normal("noise", (3,)))


def test_noise_is_addressed(dynamic: DynamicModel) -> None:
    goal = objective(dynamic)
    whole = draw(goal)
    slices = [draw(goal, 3), draw(goal, 5, first=3)]
    for name, value in whole.router_noise.items():
        assert torch.equal(torch.cat([part.router_noise[name] for part in slices]), value)
    assert {name: tuple(v.shape[1:]) for name, v in whole.router_noise.items()} == {
        "attn_rate": (2, 3), "mlp_rate": (2, 3), "token_selection": (2, 4),
    }  # fmt: skip
    picked = whole.each(lambda value: value[2:4])
    assert len(picked.t) == len(picked.condition) == len(picked.router_noise["mlp_rate"]) == 2 and picked.step == 200


def test_labels_of_the_complete_pass_are_dropped_independently(dynamic: DynamicModel) -> None:
    drawn = draw(objective(dynamic, label_drop=0.5, inner=GaussianObjective(0.5)), 64)
    own, other = drawn.condition["labels"] == 5, drawn.complete_condition["labels"] == 5
    assert own.any() and other.any() and (own & ~other).any() and (other & ~own).any()


# ----------------------------------------------------------------------------------------------------------- the budget


def test_the_budget_reaches_every_router(dynamic: DynamicModel) -> None:
    goal = objective(dynamic)
    noisy = draw(goal)
    prediction = goal.predict(dynamic.module, noisy)
    goal.budget_loss(prediction.ratio, None, 0.2).mean().backward()
    for name, parameter in dynamic.routers().items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    plain = [p for name, p in dynamic.module.named_parameters() if name.startswith("t_embedder")]
    assert all(p.grad is not None for p in plain)


def test_value_and_gradient_of_the_budget_are_exact(dynamic: DynamicModel) -> None:
    goal = objective(dynamic)
    ratio = torch.tensor([0.3, 0.9, 0.6], requires_grad=True)
    ours = goal.budget_loss(ratio, None, 0.5).mean()
    (gradient,) = torch.autograd.grad(ours, ratio)
    plain = 2.0 * (ratio.mean() - 0.5) ** 2
    (expected,) = torch.autograd.grad(plain, ratio)
    assert ours.item() == pytest.approx(plain.item()) and torch.allclose(gradient, expected)


@pytest.mark.parametrize("auxiliary", ["complete", "none"])
def test_ratio_and_gradients_do_not_depend_on_the_cut(dynamic: DynamicModel, auxiliary: Any) -> None:
    """One batch of 8, and 4 slices of 2: the same ratio, and gradients up to rounding."""
    found = []
    for slices in (1, 4):
        own = dynamic.copy()
        own.module.train()
        goal = objective(own, auxiliary=auxiliary)
        settings = dataclasses.replace(SETTINGS, steps=1)
        state, (record,) = train(own, goal, settings, gradient_accumulation_steps=slices)
        gradients = {name: p.grad for name, p in state.parameters.items() if p.grad is not None}
        found.append((record.terms, gradients))
    (terms, gradients), (other_terms, other_gradients) = found
    for name in ("ratio", "budget_loss", "loss"):
        assert float(terms[name]) == pytest.approx(float(other_terms[name]), rel=1e-5), name
    assert gradients.keys() == other_gradients.keys()
    for name, value in gradients.items():
        assert torch.allclose(value, other_gradients[name], rtol=1e-4, atol=1e-6), name


def test_ratio_is_summed_over_processes(dynamic: DynamicModel) -> None:
    """Two processes of one slice each: what `total` brings of the other one enters the gap."""
    goal = objective(dynamic, total=lambda sums: sums + torch.tensor([4 * 0.9, 4.0]))
    ratio = torch.tensor([0.5, 0.5, 0.3, 0.7])
    assert goal.budget_loss(ratio, None, 0.5).tolist() == pytest.approx([2 * (0.7 - 0.5) ** 2] * 4)


# -------------------------------------------------------------------------------------------------------------- losses


def test_what_runs_beside(dynamic: DynamicModel, tiny_model: ModelFactory) -> None:
    terms = {}
    static = tiny_model(num_heads=4, hidden_size=32, depth=2).copy()
    teacher = frozen(static.module), static.stack
    for auxiliary in ("complete", "teacher", "none"):
        taught = {"teacher": teacher} if auxiliary == "teacher" else {}
        goal = objective(dynamic, auxiliary=auxiliary, auxiliary_steps=201, **taught)
        noisy = draw(goal)
        terms[auxiliary] = goal.losses(dynamic.module, noisy, goal.predict(dynamic.module, noisy))
        late = draw(goal, step=201)
        assert "complete_loss" not in goal.losses(dynamic.module, late, goal.predict(dynamic.module, late))
    base = terms["none"]
    assert torch.allclose(base["loss"], base["dynamic_loss"] + base["budget_loss"])
    assert torch.allclose(terms["complete"]["loss"], base["loss"] + terms["complete"]["complete_loss"])
    assert torch.allclose(terms["teacher"]["loss"], base["loss"] + terms["teacher"]["kd_loss"])
    assert {"ratio", "budget", "kept_heads", "kept_groups", "kept_tokens", "mse", "vb"} <= set(base)


def test_a_guided_teacher_is_the_only_target_at_all_steps(dynamic: DynamicModel, tiny_model: ModelFactory) -> None:
    static = tiny_model(num_heads=4, hidden_size=32, depth=2).copy()
    how = {"auxiliary": "teacher", "teacher": (frozen(static.module), static.stack), "auxiliary_steps": 1}
    goal = objective(dynamic, taught_alone=True, guidance=FoldedGuidance(2.0, 2), **how)
    noisy = draw(goal)
    prediction = goal.predict(dynamic.module, noisy)
    terms = goal.losses(dynamic.module, noisy, prediction)
    assert torch.allclose(terms["loss"], terms["kd_loss"] + terms["budget_loss"])
    assert prediction.teacher is not None
    torch.testing.assert_close(
        prediction.teacher.output, goal.inner.taught(static.module, noisy, FoldedGuidance(2.0, 2)).output
    )
    assert goal.step_memory().teacher == how["teacher"] and goal.step_memory().teacher_rows == 2


def test_the_complete_pass_is_the_static_loss(dynamic: DynamicModel) -> None:
    goal = objective(dynamic)
    noisy = draw(goal)
    terms = goal.losses(dynamic.module, noisy, goal.predict(dynamic.module, noisy))
    with dynamic.complete():
        other = dataclasses.replace(noisy, condition=noisy.complete_condition)
        expected = goal.inner.losses(dynamic.module, other, goal.inner.predict(dynamic.module, other))
    assert torch.equal(terms["complete_loss"], expected["loss"])


def test_the_finish_decides_as_inference_and_still_learns(dynamic: DynamicModel) -> None:
    goal = objective(dynamic, finish_from=200)
    noisy = draw(goal)
    assert all(not value.any() for value in noisy.router_noise.values())
    prediction = goal.predict(dynamic.module, noisy)
    with torch.no_grad():
        assert torch.equal(prediction.output, goal.inner.predict(dynamic.module, noisy).output)
    prediction.ratio.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in dynamic.routers().values())


def test_recomputed_blocks_have_the_same_gradients(dynamic: DynamicModel) -> None:
    found = []
    for recomputed in (False, True):
        own = dynamic.copy()
        own.module.train()
        goal = objective(own)
        noisy = draw(goal)
        if recomputed:
            with own.stack.checkpointed():
                prediction = goal.predict(own.module, noisy)
        else:
            prediction = goal.predict(own.module, noisy)
        goal.losses(own.module, noisy, prediction)["loss"].mean().backward()
        found.append({name: p.grad for name, p in own.module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_flow_trains_with_the_same_objective(tiny_model: ModelFactory) -> None:
    """DySiT: continuous time, stratified in quarters of [0, 1]; the same modules."""
    plain = tiny_model(num_heads=4, hidden_size=32, depth=2)
    family = FAMILIES["sit"]
    model = dataclasses.replace(plain, family=family, module=family.build(plain.arch))
    model.module.load_state_dict(plain.module.state_dict())
    made = attach(model, DynamicSettings(width_bias=0.4, token_bias=0.4))
    made.module.train()
    goal = DynamicObjective(FlowObjective(), made, 0.5, 5, 0.1)
    noisy = draw(goal)
    assert [int(4 * t) for t in noisy.t] == [0, 1, 2, 3, 0, 1, 2, 3]
    state, records = train(made, goal, SETTINGS)
    assert len(records) == 4 and all(record.applied for record in records)


def test_impossible_settings_say_so(dynamic: DynamicModel) -> None:
    for change, words in (
        ({"target": 0.0}, "share above 0"),
        ({"auxiliary": "teacher"}, "needs a teacher"),
        ({"strata": 0}, "strata of times are at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            objective(dynamic, **change)


# ---------------------------------------------------------------------------------------------------------- the loop


class Counted(torch.optim.SGD):
    """Counts its steps."""

    made = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.made += 1
        return super().step(*args, **kwargs)


def test_one_optimiser_step_per_iteration(dynamic: DynamicModel) -> None:
    state = TrainState(dynamic.module, [ParameterGroup(trainable(dynamic.module))], SETTINGS)
    counted = Counted(state.optimizer.param_groups, lr=1e-3)
    for group in counted.param_groups:
        group |= {"base": 1e-3, "constant": True}
    state.optimizer = counted
    records = list(train_steps(state, objective(dynamic), batches, SETTINGS, RANDOMNESS))
    assert counted.made == len(records) == SETTINGS.steps


class Poisoned(nn.Module):
    """Turns the gradient of what passes into NaN, and leaves the value."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * torch.nan


@pytest.mark.parametrize("why", ["nan", "norm"])
def test_a_step_that_is_not_made_leaves_weights_and_average(dynamic: DynamicModel, why: str) -> None:
    goal: Any = objective(dynamic)
    settings = dataclasses.replace(SETTINGS, skip_norm=1e-6 if why == "norm" else None)

    class NotANumber(DynamicObjective):
        def losses(self, *args: Any) -> dict[str, Tensor]:
            terms = super().losses(*args)
            poisoned: Tensor = Poisoned.Function.apply(terms["loss"])
            return {**terms, "loss": poisoned}

    if why == "nan":
        goal = NotANumber(**{f.name: getattr(goal, f.name) for f in dataclasses.fields(goal)})
    state = TrainState(dynamic.module, [ParameterGroup(trainable(dynamic.module))], settings)
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    words = "non-finite loss or gradient" if why == "nan" else r"were skipped.*skip_norm is 1e-06"
    records: list[StepRecord] = []
    with pytest.raises(BadNumbers, match=words):
        records.extend(train_steps(state, goal, batches, settings, RANDOMNESS))
    assert state.step == 2 and state.bad_steps == 2
    for name, value in before.items():
        assert torch.equal(state.parameters[name], value) and torch.equal(state.ema.average[name], value), name


def test_a_norm_below_the_threshold_is_applied(dynamic: DynamicModel) -> None:
    _, records = train(dynamic, objective(dynamic), dataclasses.replace(SETTINGS, skip_norm=1e6))
    assert all(record.applied for record in records)


def test_parts_are_prepared_for_accumulation_alone(dynamic: DynamicModel) -> None:
    goal = objective(dynamic)
    for slices in (1, 2):
        engine = Engine("cpu", ComputeSection(gradient_accumulation_steps=slices))
        microbatches = noisy_microbatches(200, goal, batches, 8, RANDOMNESS, engine)
        with torch.no_grad():
            ready = goal.prepared(dynamic.module, microbatches)
        assert len(ready) == slices
        assert all((part.ratio is None) == (slices == 1) for part in ready)


def test_training_reaches_the_budget(tiny_model: ModelFactory) -> None:
    """After the steps that hold everything on, the ratio of drawn decisions comes to the budget."""
    model = tiny_model(num_heads=4, hidden_size=32, depth=2).copy()
    made = attach(model, DynamicSettings(width_bias=2.0, token_bias=2.0))
    made.module.train()
    settings = dataclasses.replace(SETTINGS, steps=HOLD_STEPS + 90, learning_rate=1e-2, batch_size=16)
    goal = objective(made, auxiliary="none", weight=20.0, target=0.35)
    state = TrainState(made.module, [ParameterGroup(trainable(made.module))], settings)
    state.step = HOLD_STEPS
    records = list(train_steps(state, goal, batches, settings, RANDOMNESS))
    last = torch.stack([record.terms["ratio"] for record in records[-30:]]).mean()
    assert float(records[0].terms["ratio"]) > 0.5
    assert float(last) == pytest.approx(0.35, abs=0.05)
