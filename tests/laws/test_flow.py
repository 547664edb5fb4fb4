"""The flow process: paths, conversions, losses, and samplers whose answer is known on Gaussian data."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import FlowSampleSection, FlowSection, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.processes.base import Batch, NoisyBatch, Prediction
from tinyfusion.processes.flow import NUM_LEVELS, PATHS, Flow, FlowObjective, LossWeight, PathName, Predicted
from tinyfusion.processes.integrate import (
    ADAPTIVE_METHODS,
    EVEN_METHODS,
    Field,
    batch_steps,
    grid_steps,
    log_density,
    sample_steps,
)
from tinyfusion.processes.stochastic import (
    DiffusionForm,
    LastStep,
    Stochastic,
    StochasticMethod,
    sample_stochastic,
)
from tinyfusion.processes.time import Level
from tinyfusion.sample.drive import SampleDraws, sample
from tinyfusion.sample.flow import FlowSampler, cheap, from_section, log_likelihood

FLOWS = [Flow(path, prediction) for path in get_args(PathName) for prediction in get_args(Predicted)]
FLOW_NAMES = [f"{flow.path}-{flow.prediction}" for flow in FLOWS]
STD = 0.5  # of the Gaussian data below


def last(trajectory: Iterator[Tensor]) -> Tensor:
    return deque(trajectory, maxlen=1).pop()


def even(field: Field, x: Tensor, method: str, num_points: int) -> Tensor:
    """x at 1 after even steps from 0."""
    return last(grid_steps(field, x, torch.linspace(0.0, 1.0, num_points), method))


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", get_args(PathName))
def test_derivatives_are_those_of_autodiff(path: PathName) -> None:
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    at = PATHS[path](Level(sigma, 1 - sigma))
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        (found,) = torch.autograd.grad(value.sum(), sigma, retain_graph=True)
        torch.testing.assert_close(derivative, found, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(at.wronskian, at.alpha * at.d_sigma - at.d_alpha * at.sigma, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", get_args(PathName))
def test_paths_end_at_the_data_and_begin_at_noise(path: PathName) -> None:
    at = Flow(path).point(torch.tensor([0.0, 1.0]))
    assert float(at.sigma[1]) == 0.0
    assert float(at.alpha[1]) == 1.0
    if path == "vp":  # published values: this path does not quite begin at noise
        assert float(at.alpha[0]) == pytest.approx(0.00657159, rel=1e-6)
        assert float(at.sigma[0]) == pytest.approx(0.99997841, rel=1e-7)
    else:
        assert (float(at.alpha[0]), float(at.sigma[0])) == (0.0, 1.0)


def test_published_weights() -> None:
    """(lambda / sigma)^2 and lambda / sigma^2 half-way."""
    published = {"linear": (4.0, 4.0), "gvp": (4.9348, 3.14159), "vp": (27.4184, 5.45640)}
    half = torch.tensor([0.5])
    for path, (velocity, likelihood) in published.items():
        flow = Flow(path, "noise")  # type: ignore[arg-type]
        assert float(flow.weight("velocity", half)) == pytest.approx(velocity, rel=1e-5)
        assert float(flow.weight("likelihood", half)) == pytest.approx(likelihood, rel=1e-5)
        assert float(flow.weight("none", half)) == 1.0
        for name in get_args(LossWeight)[:3]:  # of noise and score models
            assert float(Flow(path, "velocity").weight(name, half)) == 1.0  # type: ignore[arg-type]
        for name in get_args(LossWeight)[3:]:  # of velocity models
            assert float(flow.weight(name, half)) == 1.0


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
def test_conversions_are_those_of_the_paper_and_agree(flow: Flow) -> None:
    """The truth of a noised image, whatever of it is given; and the quotients of the paper where they are finite."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(64, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(64, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    at = flow.point(t)
    x, velocity = at.alpha * x0 + at.sigma * noise, at.d_alpha * x0 + at.d_sigma * noise
    truth = {"velocity": -velocity, "noise": noise, "score": -noise / at.sigma}  # of a SiT, towards the data
    output = truth[flow.prediction]
    torch.testing.assert_close(flow.velocity(output, x, t), velocity, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.noise(output, x, t), noise, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.score(output, x, t), truth["score"], rtol=1e-7, atol=1e-7)
    ratio, slope = at.alpha / at.d_alpha, at.d_alpha / at.alpha
    rate = slope * at.sigma**2 - at.sigma * at.d_sigma  # all of it by the noise level
    by_paper = (ratio * velocity - x) / (at.sigma**2 - ratio * at.d_sigma * at.sigma)
    torch.testing.assert_close(flow.score(output, x, t), by_paper, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.velocity(output, x, t), slope * x + rate * truth["score"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", get_args(PathName))
def test_what_is_finite_at_the_ends_is_found_there(path: PathName) -> None:
    flow, ones = Flow(path, "velocity"), torch.ones(2, 1, 2, 2)
    noise = flow.noise(ones, 2 * ones, torch.tensor([0.0, 1.0]))
    assert torch.isfinite(noise).all()
    assert torch.isfinite(flow.score(ones[:1], ones[:1], torch.zeros(1))).all()


def test_ends_of_time_are_the_published_ones() -> None:
    """Training and sampling ends by path and prediction, by default."""
    published = {
        ("linear", "velocity"): ((0.0, 1.0), (0.0, 1.0)),
        ("gvp", "velocity"): ((0.0, 1.0), (0.0, 1.0)),
        ("linear", "noise"): ((1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ("gvp", "score"): ((1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ("vp", "velocity"): ((0.0, 1 - 1e-5), (0.0, 1 - 1e-3)),
        ("vp", "noise"): ((0.0, 1 - 1e-5), (0.0, 1 - 1e-3)),
    }
    for (path, prediction), (training, sampling) in published.items():
        flow = Flow(path, prediction)  # type: ignore[arg-type]
        assert (flow.training_ends(None), flow.sampling_ends(None)) == (training, sampling)


def test_a_distance_from_the_ends_that_is_set_is_used() -> None:
    """The published code overwrites that of velocity models, and tests one of them when it sets the other."""
    assert Flow().training_ends(0.01) == Flow().sampling_ends(0.01) == (0.01, 0.99)
    assert Flow("vp").sampling_ends(0.01) == (0.0, 0.99)
    assert FlowObjective(flow=Flow("linear", "noise"), eps=0.2).eps == 0.2
    model = flow_model("vp", "noise")
    one_set = from_section(SampleSection(flow=FlowSampleSection(sample_eps=0.1)), model)
    assert one_set.eps == 0.1
    assert Flow("vp", "noise").training_ends(None) == (0.0, 1 - 1e-5), "the other keeps its own default"


@pytest.mark.parametrize(
    ("flow", "eps"),
    [(Flow(), -0.1), (Flow(), 0.5), (Flow("linear", "noise"), 0.0), (Flow("gvp", "score"), 0.0), (Flow("vp"), 0.0)],
)
def test_a_distance_that_cannot_be_is_refused(flow: Flow, eps: float) -> None:
    with pytest.raises(ValueError, match=r"must be (above|at least) 0 and below 0\.5"):
        FlowObjective(flow=flow, eps=eps)


@pytest.mark.parametrize("settings", [{"path": "cosine"}, {"prediction": "x0"}, {"pathh": "linear"}])
def test_unknown_settings_of_a_model_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown"):
        Flow.of_settings(settings)


def test_settings_of_a_model_come_back() -> None:
    for flow in FLOWS:
        assert Flow.of_settings(flow.settings()) == flow
    assert Flow.of_settings({}) == Flow("linear", "velocity")


# ------------------------------------------------------------------------------------------------------------- training


class Truth(nn.Module):
    """A network that knows a batch: its output is what the network is to give, plus `off`."""

    def __init__(self, flow: Flow, noisy: NoisyBatch, off: float = 0.0) -> None:
        super().__init__()
        self.flow, self.noisy, self.off = flow, noisy, off

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        at = self.flow.point(t)
        noise = (x - at.alpha * self.noisy.x0) / at.sigma
        velocity = at.d_alpha * self.noisy.x0 + at.d_sigma * noise
        return {"velocity": -velocity, "noise": noise, "score": -noise / at.sigma}[self.flow.prediction] + self.off


def drawn(objective: FlowObjective, first: int = 0, num: int = 6, step: int = 3) -> NoisyBatch:
    draws = Randomness(0).at(step, first, num)
    x = torch.from_numpy(draws.normal("x", (2, 4, 4)))
    return objective.draw(Batch(x, class_condition(torch.from_numpy(draws.integers("y", 5)), 5)), draws)


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
@pytest.mark.parametrize("weight", get_args(LossWeight))
def test_the_truth_has_no_loss_and_an_offset_its_square(flow: Flow, weight: LossWeight) -> None:
    objective = FlowObjective(flow=flow, loss_weight=weight, eps=0.1)
    noisy = drawn(objective)
    exact, off = Truth(flow, noisy), Truth(flow, noisy, off=0.5)
    losses = objective.losses(exact, noisy, objective.predict(exact, noisy))
    torch.testing.assert_close(losses["mse"], torch.zeros(6), atol=1e-7, rtol=0)
    losses = objective.losses(off, noisy, objective.predict(off, noisy))
    scale = flow.point(noisy.t).sigma.flatten() if flow.prediction == "score" else torch.ones(6)
    torch.testing.assert_close(losses["mse"], 0.25 * scale**2, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["mse"] * flow.weight(weight, noisy.t))


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
def test_a_teacher_takes_the_place_of_the_truth(flow: Flow) -> None:
    """kd_loss of a network with itself is 0, with a truthful teacher it is the loss; the teacher gets no gradient."""
    objective = FlowObjective(flow=flow, loss_weight="velocity", eps=0.1)
    noisy = drawn(objective)
    truth = objective.predict(Truth(flow, noisy), noisy)
    own = Prediction((truth.output + torch.randn(truth.output.shape)).requires_grad_())
    taught = Prediction(truth.output.clone().requires_grad_())
    assert torch.equal(objective.kd_terms(noisy, own, own)["kd_loss"], torch.zeros(6))
    kd = objective.kd_terms(noisy, own, taught)["kd_loss"]
    torch.testing.assert_close(kd, objective.losses(nn.Module(), noisy, own)["loss"], rtol=1e-4, atol=1e-5)
    kd.sum().backward()
    assert own.output.grad is not None and taught.output.grad is None


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
def test_times_fill_the_ends_and_nothing_else(flow: Flow) -> None:
    objective = FlowObjective(flow=flow)
    t = drawn(objective, num=4000).t
    low, high = flow.training_ends(None)
    assert t.dtype == torch.float32 and t.shape == (4000,)
    assert low <= float(t.min()) < low + 0.01 and high - 0.01 < float(t.max()) <= high
    assert abs(float(t.mean()) - 0.5) < 0.02


def test_draws_do_not_know_the_batch() -> None:
    objective = FlowObjective(label_drop=0.5)
    whole, part = drawn(objective, num=6), drawn(objective, first=2, num=3)
    for name in ("x0", "noise", "xt", "t"):
        assert torch.equal(getattr(whole, name)[2:5], getattr(part, name)), name
    assert torch.equal(whole.condition["labels"][2:5], part.condition["labels"])


def test_labels_are_dropped_at_their_rate() -> None:
    noisy = drawn(FlowObjective(label_drop=0.25), num=4000)
    assert abs(float((noisy.condition["labels"] == 5).float().mean()) - 0.25) < 0.03
    assert not (drawn(FlowObjective(label_drop=0.0), num=400).condition["labels"] == 5).any()


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
def test_levels_of_noise_go_from_the_data_to_noise(flow: Flow) -> None:
    objective = FlowObjective(flow=flow)
    noisy = drawn(objective)
    low, high = flow.training_ends(None)
    clean, dirty = objective.at_level(noisy, 0), objective.at_level(noisy, objective.num_levels - 1)
    assert objective.num_levels == NUM_LEVELS
    assert float(clean.t[0]) == pytest.approx(high, abs=1e-7) and float(dirty.t[0]) == pytest.approx(low, abs=1e-7)
    assert float((clean.xt - noisy.x0).abs().max()) < 0.2
    assert float((dirty.xt - noisy.noise).abs().max()) < 0.05
    assert torch.equal(clean.condition["labels"], noisy.condition["labels"]) and torch.equal(clean.noise, noisy.noise)


def test_low_noise_is_the_clean_input_at_late_times() -> None:
    noisy = drawn(FlowObjective())
    quiet = FlowObjective().low_noise(noisy)
    assert torch.equal(quiet.xt, noisy.x0)
    assert bool((quiet.t >= 0.75).all()) and torch.equal(quiet.t.argsort(), noisy.t.argsort())


# ---------------------------------------------------------------------------------------------------------- known flows


def gaussian_network(flow: Flow) -> Callable[[Tensor, Tensor], Tensor]:
    """What a perfect SiT says where the data are N(0, STD^2): all of it is x times a function of t."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        at = flow.point(t)
        variance = at.alpha**2 * STD**2 + at.sigma**2
        if flow.prediction == "velocity":
            return -x * (at.d_alpha * at.alpha * STD**2 + at.d_sigma * at.sigma) / variance
        return x * at.sigma / variance if flow.prediction == "noise" else -x / variance

    return network


def gaussian_velocity(flow: Flow) -> Callable[[Tensor, Tensor], Tensor]:
    """Towards the data."""
    return flow.towards_data(gaussian_network(flow))


def std_at(flow: Flow, t: float) -> float:
    at = PATHS[flow.path](flow.convention.level(torch.tensor(t, dtype=torch.float64)))
    return float((at.alpha**2 * STD**2 + at.sigma**2).sqrt())


def start(num: int = 64) -> Tensor:
    return torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(2))


MIXED = [Flow(), Flow("gvp", "score"), Flow("vp", "noise")]
MIXED_NAMES = ["linear-velocity", "gvp-score", "vp-noise"]


def end_error(flow: Flow, sampler: FlowSampler) -> float:
    """How far a sampler is from the end of the known flow, where every point is scaled by std(end) / std(start)."""
    ends = flow.sampling_ends(None)
    found = last(sampler.steps(gaussian_velocity(flow), start(8), ends, beyond=flow.prediction == "velocity"))
    wanted = start(8) * std_at(flow, ends[1]) / std_at(flow, ends[0])
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
def test_every_prediction_on_every_path_ends_at_the_known_place(flow: Flow) -> None:
    for sampler in (FlowSampler(atol=1e-5, rtol=1e-5), FlowSampler(method="rk4", num_points=100)):
        assert end_error(flow, sampler) < 3e-3


@pytest.mark.parametrize("flow", MIXED, ids=MIXED_NAMES)
@pytest.mark.parametrize("method", EVEN_METHODS)
def test_every_even_method_ends_at_the_known_place(flow: Flow, method: str) -> None:
    points, limit = (1000, 0.02) if method == "euler" else (200, 5e-3)
    assert end_error(flow, FlowSampler(method=method, num_points=points)) < limit


@pytest.mark.parametrize("flow", MIXED, ids=MIXED_NAMES)
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_every_method_that_follows_the_error_ends_at_the_known_place(flow: Flow, method: str) -> None:
    """fehlberg2's estimate of its error is a five-hundredth of it, so it needs smaller tolerances."""
    size = 1e-7 if method == "fehlberg2" else 1e-4
    assert end_error(flow, FlowSampler(method=method, atol=size, rtol=size)) < 0.01


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("flow", MIXED, ids=MIXED_NAMES)
def test_steps_that_a_batch_shares_end_there_too(flow: Flow, method: str) -> None:
    assert end_error(flow, FlowSampler(method=method, atol=1e-5, rtol=1e-5, error_norm="batch")) < 3e-3


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
def test_even_methods_have_their_order(method: str, order: int) -> None:
    """Halving the step divides the error by 2^order; float64, against many steps of the best of them."""

    def field(x: Tensor, t: Tensor) -> Tensor:
        time = t.double().view(-1, 1, 1, 1)
        return torch.sin(x + 2 * time) + x * torch.cos(3 * time)

    x = start(4).double()
    exact = even(field, x, "rk4", 513)
    errors = [float((even(field, x, method, steps + 1) - exact).abs().max()) for steps in (8, 16, 32)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(("method", "calls"), [("euler", 49), ("heun2", 98), ("heun3", 147), ("rk4", 196)])
def test_fifty_points_are_forty_nine_steps(method: str, calls: int) -> None:
    made = 0

    def field(x: Tensor, t: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return x

    sampler = FlowSampler(method=method, num_points=50, guidance=1.0)
    assert len(list(sampler.steps(field, start(2), (0.0, 1.0)))) == 49
    assert made == calls == sampler.calls


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_smaller_tolerances_make_smaller_errors(method: str) -> None:
    errors = [end_error(Flow(), FlowSampler(method=method, atol=size, rtol=size)) for size in (1e-2, 1e-3, 1e-4)]
    assert errors[0] > errors[-1] and errors[-1] < (0.02 if method == "fehlberg2" else 5e-3), errors


@pytest.mark.parametrize("method", ["dopri5", "heun2", "adaptive_heun"])
@pytest.mark.parametrize("path", get_args(PathName))
def test_back_and_forth_is_where_it_was(path: PathName, method: str) -> None:
    """From the data to noise by exchanged ends: the published code mirrors them, which is another interval for vp."""
    flow = Flow(path)
    sampler = FlowSampler(method=method, num_points=400, atol=1e-5, rtol=1e-5, guidance=1.0)
    low, high = flow.sampling_ends(None)
    field = gaussian_velocity(flow)
    there = last(sampler.steps(field, start(), (low, high)))
    torch.testing.assert_close(last(sampler.steps(field, there, (high, low))), start(), rtol=5e-3, atol=5e-3)


def swirl(x: Tensor, t: Tensor) -> Tensor:
    """A field that is easy for small samples and hard for large ones."""
    time = t.view(-1, 1, 1, 1)
    return torch.sin(2 * x * time) + torch.cos(9 * time)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_a_sample_with_steps_of_its_own_does_not_see_the_batch(method: str) -> None:
    x = start(7) * torch.logspace(-2, 1, 7).view(-1, 1, 1, 1)
    together = last(sample_steps(swirl, x, (0.0, 1.0), method, 1e-4, 1e-3))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    mixed = last(sample_steps(swirl, x[order], (0.0, 1.0), method, 1e-4, 1e-3))
    torch.testing.assert_close(mixed, together[order], rtol=1e-4, atol=1e-4)
    for i in (0, 3, 6):
        alone = last(sample_steps(swirl, x[i : i + 1], (0.0, 1.0), method, 1e-4, 1e-3))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_the_published_norm_sees_the_batch_within_its_tolerance() -> None:
    x = start(7) * torch.logspace(-2, 1, 7).view(-1, 1, 1, 1)
    together = last(batch_steps(swirl, x, (0.0, 1.0), "dopri5", 1e-6, 1e-3))
    alone = torch.cat([last(batch_steps(swirl, x[i : i + 1], (0.0, 1.0), "dopri5", 1e-6, 1e-3)) for i in range(7)])
    assert float((together - alone).abs().max()) > 1e-5
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)


def test_no_time_beyond_the_ends_is_asked_for() -> None:
    """The published dopri5 asks far beyond, where paths are not known."""
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return swirl(x, t)

    for ends in ((0.25, 0.75), (0.75, 0.25)):
        for steps in (
            sample_steps(field, start(), ends, "dopri5", 1e-6, 1e-3),
            batch_steps(field, start(), ends, "dopri5", 1e-6, 1e-3, beyond=False),
        ):
            seen.clear()
            last(steps)
            assert min(seen) >= 0.25 and max(seen) <= 0.75
    seen.clear()
    last(batch_steps(field, start(), (0.25, 0.75), "dopri5", 1e-6, 1e-3))
    assert max(seen) > 0.75


def test_a_sample_that_is_not_finite_harms_no_other() -> None:
    x = start(3)
    broken = x.clone()
    broken[1] = float("nan")
    found = last(sample_steps(swirl, broken, (0.0, 1.0), "dopri5", 1e-6, 1e-3))
    whole = last(sample_steps(swirl, x, (0.0, 1.0), "dopri5", 1e-6, 1e-3))
    assert torch.equal(found[[0, 2]], whole[[0, 2]]) and not torch.isfinite(found[1]).any()


# ------------------------------------------------------------------------------------------------------------ stochastic


def noise_of(x: Tensor) -> Callable[[int], Tensor]:
    return lambda position: torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + position))


def stochastic_std(flow: Flow, settings: Stochastic, num: int = 5000) -> float:
    x = start(num)  # four elements each
    return float(last(sample_stochastic(gaussian_network(flow), flow, settings, x, noise_of(x))).std())


@pytest.mark.parametrize("form", get_args(DiffusionForm))
@pytest.mark.parametrize("path", get_args(PathName))
def test_every_form_ends_at_the_known_standard_deviation(path: PathName, form: DiffusionForm) -> None:
    """20,000 numbers: their standard deviation is known to 0.0025. The last step is the unbiased one."""
    found = stochastic_std(Flow(path), Stochastic("euler", 150, form, last_step="euler"))
    assert abs(found - STD) < 0.0125, found


@pytest.mark.parametrize("path", get_args(PathName))
def test_heun_ends_there_in_fewer_steps(path: PathName) -> None:
    for form in ("sigma", "sbdm", "decreasing"):
        found = stochastic_std(Flow(path), Stochastic("heun", 150, form, last_step="euler"))  # type: ignore[arg-type]
        assert abs(found - STD) < 0.0125, (form, found)


@pytest.mark.parametrize(("form", "published"), [("sigma", 0.497), ("linear", 0.495), ("decreasing", 0.497)])
def test_published_standard_deviations(form: DiffusionForm, published: float) -> None:
    """Of the published sampler on the same data, with 20,000 samples: two Monte-Carlo errors of 0.0025, theirs and ours."""
    assert abs(stochastic_std(Flow(), Stochastic(form=form)) - published) < 3 * math.sqrt(2) * 0.0025


@pytest.mark.parametrize("step", get_args(LastStep))
@pytest.mark.parametrize("prediction", get_args(Predicted))
def test_every_last_step_and_prediction_ends_there_too(step: LastStep, prediction: Predicted) -> None:
    found = stochastic_std(Flow("linear", prediction), Stochastic(last_step=step))
    assert abs(found - STD) < 0.0125, found


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
def test_nothing_is_infinite(flow: Flow) -> None:
    """Every method, form and last step, on every path: the published code fails on several."""
    x, network = start(2), gaussian_network(flow)
    for method, form, step in itertools.product(
        get_args(StochasticMethod), get_args(DiffusionForm), get_args(LastStep)
    ):
        settings = Stochastic(method, 6, form, last_step=step)
        states = list(sample_stochastic(network, flow, settings, x, noise_of(x)))
        assert len(states) == 5 + (step != "none")
        assert all(torch.isfinite(state).all() for state in states), (method, form, step)


def test_the_stochastic_grid_is_the_published_one() -> None:
    """249 steps on [0, 0.96], then one of 0.04; sbdm has a start of its own, no last step goes to the end."""
    flow = Flow()
    assert Stochastic().ends(flow) == (0.0, 0.96)
    assert Stochastic().calls == 250
    assert Stochastic(last_step="none").ends(flow) == (0.0, 1.0)
    assert Stochastic(last_step="none").calls == 249
    assert Stochastic("heun").calls == 499
    assert Stochastic(form="sbdm").ends(flow) == (1e-3, 0.96)
    assert Stochastic("heun", last_step="none").ends(flow) == (0.0, 1 - 1e-3)
    assert Stochastic().ends(Flow("linear", "noise")) == (1e-3, 0.96)
    assert Stochastic(form="sbdm").ends(Flow("vp")) == (0.0, 0.96)
    assert Stochastic(last_step="none").ends(Flow("vp")) == (0.0, 1 - 1e-3)


def test_no_diffusion_is_the_noiseless_equation() -> None:
    x = start(4)
    settings = Stochastic(num_points=25, norm=0.0, last_size=0.04)  # 24 steps of 0.04, and the last one
    quiet = last(sample_stochastic(gaussian_network(Flow()), Flow(), settings, x, noise_of(x)))
    torch.testing.assert_close(quiet, even(gaussian_velocity(Flow()), x, "euler", 26))


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "Heun"}, {"form": "increasing"}, {"last_step": "Mean"}, {"num_points": 1}, {"norm": -1.0},
        {"last_size": 0.0}, {"last_size": 0.5}, {"norm": math.nan},
    ],
)  # fmt: skip
def test_stochastic_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown|at least|above 0"):
        Stochastic(**wrong)


# ------------------------------------------------------------------------------------------------------------ likelihood


def likelihood_of(flow: Flow, x: Tensor, sampler: FlowSampler, probe: Tensor | None = None) -> Tensor:
    low, high = flow.sampling_ends(sampler.eps)

    def steps(field: Any, state: Tensor, norm: Any) -> Iterator[Tensor]:
        return sampler.steps(field, state, (high, low), norm)

    probe = torch.where(start(len(x)) > 0, 1.0, -1.0) if probe is None else probe
    return log_density(gaussian_velocity(flow), x, probe, steps)


@pytest.mark.parametrize("flow", FLOWS, ids=FLOW_NAMES)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_the_likelihood_of_gaussian_data_is_known(flow: Flow, method: str) -> None:
    """To 0.01 nats of four elements; the density is that at the end of time, a thousandth from the data on some paths."""
    x = STD * start()
    sampler = FlowSampler(method=method, num_points=80, atol=1e-5, rtol=1e-5, guidance=1.0)
    std = std_at(flow, flow.sampling_ends(None)[1])
    exact = -(x.double() ** 2 / (2 * std**2) + 0.5 * math.log(2 * math.pi * std**2)).flatten(1).sum(1)
    assert float((likelihood_of(flow, x, sampler) - exact).abs().max()) < 0.01


def test_one_probe_serves_a_whole_trajectory_and_many_give_the_divergence() -> None:
    """A linear field with a full matrix: the trace is known, a probe misses it, their mean does not."""
    matrix = torch.tensor([[0.3, 0.8], [0.4, -0.7]])

    def field(x: Tensor, t: Tensor) -> Tensor:
        return (x.view(-1, 2) @ matrix.T).view_as(x)

    def steps(both: Any, state: Tensor, norm: Any) -> Iterator[Tensor]:
        return sample_steps(both, state, (1.0, 0.0), "dopri5", 1e-6, 1e-6, norm)

    x = torch.tensor([0.3, -0.2]).view(1, 2, 1, 1)
    at_noise = torch.linalg.matrix_exp(-matrix) @ x.view(2)
    exact = float(-0.5 * (at_noise**2).sum() - math.log(2 * math.pi) - torch.trace(matrix))
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).view(2, 2, 1, 1)
    found = log_density(field, x.expand(2, -1, -1, -1), signs, steps)
    off_diagonal = 0.8 + 0.4  # the elements outside of the diagonal, with the sign of the probe
    assert found.tolist() == pytest.approx([exact - off_diagonal, exact + off_diagonal], abs=1e-4)
    assert float(found.mean()) == pytest.approx(exact, abs=1e-4)


def test_likelihood_of_a_model(flow_networks: LoadedModel) -> None:
    """It does not know the batch, needs no guidance, and leaves no gradients behind."""
    model = flow_networks
    x, condition = start_of(model, 4), class_condition(torch.tensor([0, 1, 2, 3]), 5)
    sampler = FlowSampler(guidance=1.0, rtol=1e-3, atol=1e-3)
    together = log_likelihood(model, x, condition, sampler, seed=5)
    assert together.shape == (4,) and together.dtype == torch.float64 and torch.isfinite(together).all()
    for i in range(4):
        alone = log_likelihood(model, x[i : i + 1], condition.index(slice(i, i + 1)), sampler, seed=5, first=i)
        assert float(alone) == pytest.approx(float(together[i]), rel=1e-4)
    assert not torch.equal(log_likelihood(model, x, condition, sampler, seed=6), together)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    even = dataclasses.replace(sampler, method="rk4", num_points=40)
    torch.testing.assert_close(log_likelihood(model, x, condition, even, seed=5), together, rtol=1e-2, atol=0.05)
    for wrong in (FlowSampler(guidance=1.5), FlowSampler("sde", guidance=1.0)):
        with pytest.raises(ValueError, match="without guidance"):
            log_likelihood(model, x, condition, wrong)


# -------------------------------------------------------------------------------------------------------------- sampling


def flow_model(path: str = "linear", prediction: str = "velocity", seed: int = 0) -> LoadedModel:
    sizes = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=3, num_heads=2, num_classes=5)
    model = new_model("sit", sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    facts = dataclasses.replace(model.facts, process_settings={"path": path, "prediction": prediction})
    return dataclasses.replace(model, module=model.module.eval(), facts=facts)


@pytest.fixture(scope="module")
def flow_networks() -> LoadedModel:
    return flow_model()


def start_of(model: LoadedModel, num: int) -> Tensor:
    arch = model.arch
    return torch.randn(
        num, arch.in_channels, arch.input_size, arch.input_size, generator=torch.Generator().manual_seed(3)
    )


SAMPLERS = {
    "dopri5": FlowSampler(),
    "heun2": FlowSampler(method="heun2", num_points=6),
    "sde": FlowSampler("sde", stochastic=Stochastic(num_points=6)),
    "sde-heun": FlowSampler("sde", stochastic=Stochastic("heun", 6, "sbdm", last_step="tweedie")),
    "interval": FlowSampler(interval=(0.2, 0.7)),
    "interval-even": FlowSampler(method="euler", num_points=9, interval=(0.2, 0.7)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_in_every_batch(flow_networks: LoadedModel, name: str) -> None:
    labels = [0, 1, 2, 3, 4, 0]
    whole = torch.cat([batch.x for batch in sample(flow_networks, labels, SAMPLERS[name], 7, 6)])
    for size in (1, 4):
        batches = torch.cat([batch.x for batch in sample(flow_networks, labels, SAMPLERS[name], 7, size)])
        torch.testing.assert_close(batches, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dopri5", "heun2", "interval-even"])
def test_the_order_of_the_batch_does_not_matter(flow_networks: LoadedModel, name: str) -> None:
    x, y, sampler = start_of(flow_networks, 5), torch.tensor([0, 1, 2, 3, 4]), SAMPLERS[name]
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        straight = last(sampler.steps(sampler.network(flow_networks, class_condition(y, 5)), x, (0.0, 1.0)))
        mixed = last(sampler.steps(sampler.network(flow_networks, class_condition(y[order], 5)), x[order], (0.0, 1.0)))
    torch.testing.assert_close(mixed, straight[order], rtol=1e-5, atol=1e-5)


def test_published_guidance_touches_three_channels(flow_networks: LoadedModel) -> None:
    model, y = flow_networks, torch.tensor([1, 2])
    x, t = start_of(model, 2), torch.full((2,), 0.3)
    with torch.no_grad():
        cond, uncond = model.module(x, t, y), model.module(x, t, torch.full_like(y, 5))
        published = FlowSampler(guidance=4.0).network(model, class_condition(y, 5))(x, t)
        everything = FlowSampler(guidance=4.0, guided="all").network(model, class_condition(y, 5))(x, t)
    mixed = uncond + 4 * (cond - uncond)
    torch.testing.assert_close(published, torch.cat([mixed[:, :3], cond[:, 3:]], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(everything, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dopri5", "euler", "sde"])
def test_guidance_ends_with_its_interval(flow_networks: LoadedModel, method: str) -> None:
    """An interval that holds all is none, one that holds nothing is no guidance, and one between is neither."""
    kind = (
        {"kind": "sde", "stochastic": Stochastic(num_points=9)}
        if method == "sde"
        else {"method": method, "num_points": 9}
    )
    draws, y = SampleDraws(Randomness(1), 0, 3, torch.device("cpu")), torch.tensor([0, 1, 2])

    def drawn(**change: Any) -> Tensor:
        sampler = FlowSampler(**{**kind, "guidance": 3.0, **change})  # type: ignore[arg-type]
        with torch.no_grad():
            return last(sampler.trajectory(flow_networks, class_condition(y, 5), draws))

    whole, plain = drawn(), drawn(guidance=1.0)
    torch.testing.assert_close(drawn(interval=(0.0, 1.0)), whole)
    torch.testing.assert_close(drawn(interval=(0.0009, 0.0011)), plain, rtol=1e-2, atol=2e-2)
    between = drawn(interval=(0.3, 0.6))
    assert all(float((between - other).abs().max()) > 0.05 for other in (whole, plain))


def test_steps_that_follow_the_error_stop_where_guidance_does(flow_networks: LoadedModel) -> None:
    """Rows of the network's batch by time: doubled within the interval alone, whose ends are times of both."""
    rows: list[tuple[float, int]] = []
    handle = flow_networks.module.register_forward_pre_hook(
        lambda _module, args: rows.extend((float(time), len(args[0])) for time in args[1])
    )
    draws = SampleDraws(Randomness(1), 0, 3, torch.device("cpu"))
    with torch.no_grad():
        last(SAMPLERS["interval"].trajectory(flow_networks, class_condition(torch.tensor([0, 1, 2]), 5), draws))
    handle.remove()
    assert {num for _, num in rows} == {3, 6}
    assert all(
        (num == 6) == (0.3 - 1e-6 <= time <= 0.8 + 1e-6) or min(abs(time - 0.3), abs(time - 0.8)) < 1e-6
        for time, num in rows
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_protocol_says_how_images_are_made(flow_networks: LoadedModel, name: str) -> None:
    said = SAMPLERS[name].describe(flow_networks)
    assert said.startswith("linear velocity " + SAMPLERS[name].kind) and "guidance 1.5 on 3 channels" in said
    assert len({sampler.describe(flow_networks) for sampler in SAMPLERS.values()}) == len(SAMPLERS)


def test_a_step_to_be_timed_is_one_pass(flow_networks: LoadedModel) -> None:
    draws = SampleDraws(Randomness(0), 0, 3, torch.device("cpu"))
    calls: list[int] = []
    handle = flow_networks.module.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    for sampler in SAMPLERS.values():
        calls.clear()
        with torch.no_grad():
            x = sampler.one_step(flow_networks, class_condition(torch.tensor([0, 1, 2]), 5), draws)()
        assert x.shape == (3, 4, 4, 4) and torch.isfinite(x).all()
        assert calls in ([3 * sampler.rows], [3 * sampler.rows, 3])
    short = FlowSampler().of_steps(2)
    assert short.calls == 2
    calls.clear()
    with torch.no_grad():
        assert len(list(short.trajectory(flow_networks, class_condition(torch.tensor([0, 1, 2]), 5), draws))) == 2
    assert calls == [6, 6]
    handle.remove()


def test_about_as_many_calls_as_said(flow_networks: LoadedModel) -> None:
    made = 0

    def count(_module: nn.Module, _args: Any) -> None:
        nonlocal made
        made += 1

    handle = flow_networks.module.register_forward_pre_hook(count)
    draws = SampleDraws(Randomness(0), 0, 3, torch.device("cpu"))
    for name in ("heun2", "sde", "sde-heun", "interval-even"):
        made = 0
        with torch.no_grad():
            last(SAMPLERS[name].trajectory(flow_networks, class_condition(torch.tensor([0, 1, 2]), 5), draws))
        assert made == SAMPLERS[name].calls, name
    handle.remove()


# --------------------------------------------------------------------------------------------------------------- recipes


def section(flow: dict[str, Any] | None = None, **values: Any) -> SampleSection:
    return SampleSection(flow=FlowSampleSection(**(flow or {})), **values)


def test_a_recipe_makes_the_sampler_it_says(flow_networks: LoadedModel) -> None:
    assert from_section(section(), flow_networks) == FlowSampler()
    heun = from_section(section({"method": "heun2"}, num_steps=126, guidance=1.0), flow_networks)
    assert (heun.kind, heun.method, heun.calls, heun.rows) == ("ode", "heun2", 250, 1)
    sde = from_section(
        section({"diffusion_form": "sbdm", "last_step": "none", "method": "heun"}, sampler="sde"), flow_networks
    )
    assert sde.stochastic == Stochastic("heun", 250, "sbdm", last_step="none")


@pytest.mark.parametrize(
    ("flow", "values", "said"),
    [
        ({}, {"sampler": "ddpm"}, "they take ode, sde"),
        ({}, {"clip": True}, "sample.clip"),
        ({}, {"eta": 0.5}, "sample.eta"),
        ({}, {"num_steps": 20}, "chooses its steps itself"),
        ({"method": "heun"}, {}, "unknown method 'heun'"),
        ({"method": "dopri5"}, {"sampler": "sde"}, "is not for sde"),
        ({"method": "euler"}, {"num_steps": 1}, "2 points"),
        ({"atol": 0.0}, {}, "tolerances"),
        ({"last_step_size": 0.9}, {"sampler": "sde"}, "last step"),
        ({"sample_eps": 0.7}, {}, "ends of time"),
    ],
)
def test_recipes_that_cannot_be_sampled_are_refused(
    flow_networks: LoadedModel, flow: dict[str, Any], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        from_section(section(flow, **values), flow_networks)


def test_a_model_with_settings_of_no_flow_is_refused() -> None:
    with pytest.raises(UserError, match="process_settings"):
        from_section(section(), flow_model(path="spiral"))


def test_a_quick_look_makes_few_passes(flow_networks: LoadedModel) -> None:
    for settings in (section(), section(sampler="sde"), section({"method": "rk4"}, num_steps=100)):
        assert from_section(cheap(settings, 50), flow_networks).calls <= 50
    few = section({"method": "heun2"}, num_steps=20)
    assert cheap(few, 50) is few


def test_the_sections_speak_of_the_names_that_there_are() -> None:
    """A recipe's choices are those of the process; core cannot import them."""
    hints = get_type_hints(FlowSection, include_extras=True) | get_type_hints(FlowSampleSection, include_extras=True)
    for name, known in {
        "path": PathName, "prediction": Predicted, "loss_weight": LossWeight, "diffusion_form": DiffusionForm,
        "last_step": LastStep,
    }.items():  # fmt: skip
        assert get_args(get_args(hints[name])[0]) == get_args(known), name
    said = str(hints["method"])
    assert all(method in said for method in (*EVEN_METHODS, *ADAPTIVE_METHODS))


def test_numbers_of_float32_times_are_exact_enough() -> None:
    """Times are float32: the last points of a fine grid are still apart, and the last is the end."""
    grid = torch.linspace(0.0, 1.0, 10_000, dtype=torch.float32)
    assert bool((grid.diff() > 0).all()) and float(grid[-1]) == 1.0
    assert np.isclose(float(Flow().point(grid[-2:-1]).sigma), 1e-4, rtol=1e-2)
