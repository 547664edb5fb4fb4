"""Time of a flow: distributions of noise levels, shifts, conventions of families, and what diffusers makes of the same numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from scipy.special import expit, logit, ndtr
from scipy.stats import kstest
from torch import Tensor, nn

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import FlowSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness, StratifiedDraws
from tinyfusion.jobs.process_specs import objective_for, sampler_of
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.flow import Flow, FlowObjective
from tinyfusion.processes.stochastic import Stochastic, sample_stochastic
from tinyfusion.processes.time import (
    DATA_AT_ONE,
    MODE_SCALES,
    Density,
    TimeConvention,
    TimeSampler,
    shift_for,
    shifted,
    sigma_grid,
)
from tinyfusion.sample.flow import FlowSampler, from_section

NUM = 20_000
TIMES = {
    "uniform": TimeSampler(),
    "logit_normal": TimeSampler("logit_normal"),
    "logit_normal-noisy": TimeSampler("logit_normal", logit_mean=0.7, logit_std=0.6),
    "mode": TimeSampler("mode"),
    "mode-ends": TimeSampler("mode", mode_scale=-0.6),
    "cosmap": TimeSampler("cosmap"),
    "uniform-shifted": TimeSampler(shift=3.0),
    "logit_normal-shifted": TimeSampler("logit_normal", logit_mean=0.5, shift=1.7),
    "mode-shifted": TimeSampler("mode", shift=0.4),
    "cosmap-shifted": TimeSampler("cosmap", shift=6.0),
}
SD3 = TimeConvention("sigma", 1000.0, "noise - data")
CONVENTIONS = {
    "sit, z-image, lumina2": DATA_AT_ONE,
    "flux": TimeConvention(),
    "sd3": SD3,
    "hidream": TimeConvention("sigma", 1000.0, "data - noise"),
    "backwards": TimeConvention("1 - sigma", 1000.0, "noise - data"),
}
every_times = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
every_convention = pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)


def cumulative(times: TimeSampler) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of the noise levels, in closed form but for the mode density, whose inverse is tabulated."""

    def before_shift(sigma: np.ndarray) -> np.ndarray:
        if times.kind == "uniform":
            return sigma
        if times.kind == "logit_normal":
            return np.asarray(ndtr((logit(sigma) - times.logit_mean) / times.logit_std))
        if times.kind == "cosmap":
            return 2 / np.pi * np.arctan(sigma / (1 - sigma))
        u = np.linspace(0, 1, 200_001)
        levels = 1 - u - times.mode_scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        return np.interp(sigma, levels[::-1], 1 - u[::-1])

    return lambda sigma: before_shift(sigma / (times.shift - (times.shift - 1) * sigma))


def slope(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 2e-4) -> np.ndarray:
    """The derivative of a function by central differences."""
    return (function(x + step) - function(x - step)) / (2 * step)


def distance(levels: np.ndarray, times: TimeSampler) -> float:
    """The Kolmogorov-Smirnov statistic times sqrt(N): above 1.95 in one of a thousand samples of the same distribution."""
    return float(kstest(levels, cumulative(times)).statistic) * math.sqrt(len(levels))


def drawn(objective: FlowObjective, num: int = NUM) -> NoisyBatch:
    draws = Randomness(0).at(3, 0, num)
    x = torch.from_numpy(draws.normal("x", (1, 2, 2)))
    return objective.draw(Batch(x, class_condition(torch.from_numpy(draws.integers("y", 5)), 5)), draws)


# ------------------------------------------------------------------------------------------------------------ densities


@every_times
def test_noise_levels_follow_their_distribution_in_every_convention(times: TimeSampler) -> None:
    """And are not mistaken for those that are exchanged with the data."""
    for convention in CONVENTIONS.values():
        t = drawn(FlowObjective(flow=Flow(convention=convention), times=times)).t
        assert t.dtype == torch.float32 and float(t.min()) >= 0 and float(t.max()) <= convention.scale
        levels = convention.level(t.double()).sigma.numpy()
        assert distance(levels, times) < 1.95
        if times.shift != 1 or times.logit_mean:
            assert distance(1 - levels, times) > 10


@every_times
def test_exchange_of_noise_and_data(times: TimeSampler) -> None:
    u = np.linspace(0.001, 0.999, 999)
    np.testing.assert_allclose(times.mirrored.sigma(u), 1 - times.sigma(1 - u), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        slope(cumulative(times.mirrored), u), slope(cumulative(times), 1 - u), rtol=1e-3, atol=1e-9
    )
    assert times.mirrored.mirrored.sigma(u) == pytest.approx(times.sigma(u), rel=1e-12)


@every_times
def test_noise_levels_are_monotone_in_the_uniform_number_and_fill_the_interval(times: TimeSampler) -> None:
    levels = times.sigma(np.linspace(1e-9, 1 - 1e-9, 10_001))
    steps = np.diff(levels)
    assert (steps > 0).all() or (steps < 0).all()
    assert min(levels) < 0.06 and max(levels) > 0.98 and min(levels) >= 0 and max(levels) <= 1


def test_a_stratified_number_gives_stratified_noise_levels() -> None:
    times = TIMES["logit_normal-noisy"]
    draws = StratifiedDraws(0, 3, 0, 400, parts=4)
    part = (4 * cumulative(times)(times.sigma(draws.uniform("timestep")))).astype(int)
    assert np.array_equal(part, np.arange(400) % 4)


@pytest.mark.parametrize("eps", [None, 0.05])
def test_the_uniform_draw_of_a_sit_is_the_addressed_number_itself(eps: float | None) -> None:
    u = Randomness(0).at(3, 0, NUM).uniform("timestep")
    low, high = (0.0, 1.0) if eps is None else (0.05, 1.0 - 0.05)
    assert torch.equal(drawn(FlowObjective(eps=eps)).t, torch.from_numpy(low + (high - low) * u).float())


@every_convention
@every_times
def test_times_stay_away_from_the_ends(times: TimeSampler, convention: TimeConvention) -> None:
    """Also behind a shift: the ends are those of what the network is trained at."""
    flow = Flow("linear", "noise", convention)
    sigma = convention.level(drawn(FlowObjective(flow=flow, eps=0.1, times=times)).t).sigma
    assert 0.1 - 1e-6 <= float(sigma.min()) < 0.3 and 0.8 < float(sigma.max()) <= 0.9 + 1e-6
    only_data = Flow("vp", "velocity", convention)
    sigma = convention.level(drawn(FlowObjective(flow=only_data, eps=0.1, times=times)).t).sigma
    assert 0.1 - 1e-6 <= float(sigma.min()) < 0.3 and 0.9 < float(sigma.max()) <= 1


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("none", {}),
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}),
        ("logit_normal", {"logit_mean": -0.8, "logit_std": 0.5}),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.5}),
    ],
)
def test_noise_levels_of_diffusers_from_the_same_random_numbers(scheme: str, settings: dict[str, float]) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    theirs = compute_density_for_timestep_sampling(scheme, 1000, generator=generator(), **settings)
    if scheme == "logit_normal":
        u = ndtr(torch.normal(0.0, 1.0, (1000,), generator=generator()).double().numpy())
    else:
        u = torch.rand(1000, generator=generator()).double().numpy()
    kind: Density = "uniform" if scheme == "none" else scheme  # type: ignore[assignment]
    np.testing.assert_allclose(TimeSampler(kind, **settings).sigma(u), theirs.numpy(), rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_the_cosmap_density_is_the_loss_weight_of_diffusers() -> None:
    sigma = np.linspace(0.01, 0.99, 99)
    theirs = compute_loss_weighting_for_sd3("cosmap", torch.from_numpy(sigma))
    np.testing.assert_allclose(slope(cumulative(TimeSampler("cosmap")), sigma), theirs.numpy(), rtol=1e-6)


def test_known_values() -> None:
    """By hand: sigmoid(z) at z = 1; the mode density at a half; cosmap at a half and at tan(pi/8)."""
    np.testing.assert_allclose(TimeSampler("logit_normal").sigma(ndtr(np.array([1.0]))), expit(1.0))
    assert TimeSampler("mode", mode_scale=0.0).sigma(np.array([0.25])) == pytest.approx(0.75)
    assert TimeSampler("mode").sigma(np.array([0.5])) == pytest.approx(0.5)
    at_half = 1 / (1 + 1.29 * (1 - math.pi / 2))
    assert slope(cumulative(TimeSampler("mode")), np.array([0.5])) == pytest.approx(at_half, rel=1e-4)
    assert TimeSampler("cosmap").sigma(np.array([0.5])) == pytest.approx(0.5)
    assert TimeSampler("cosmap").sigma(np.array([0.25])) == pytest.approx(1 - 1 / math.sqrt(2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "lognormal"}, {"logit_std": 0.0}, {"logit_std": math.nan}, {"logit_mean": math.inf}, {"shift": 0.0},
        {"shift": 1e-300}, {"shift": math.inf}, {"mode_scale": MODE_SCALES[0] - 1e-6}, {"mode_scale": MODE_SCALES[1] + 1e-6},
    ],
)  # fmt: skip
def test_distributions_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown time sampler|must be"):
        TimeSampler(**wrong)


# ---------------------------------------------------------------------------------------------------------------- shift

FLUX_SHIFT = FlowSection(shift_type="exponential")
LTX_SHIFT = FlowSection(shift_type="exponential", base_shift=0.95, max_shift=2.05, base_tokens=1024)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 12.0])
def test_a_shift_keeps_the_ends_and_the_order_and_has_an_inverse(shift: float) -> None:
    sigma = np.linspace(0, 1, 1001)
    moved = shifted(sigma, shift)
    assert (moved[0], moved[-1]) == (0.0, 1.0) and (np.diff(moved) > 0).all()
    assert (np.sign(moved - sigma)[1:-1] == np.sign(shift - 1)).all()
    np.testing.assert_allclose(shifted(moved, 1 / shift), sigma, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(1 - moved, shifted(1 - sigma, 1 / shift), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(shifted(moved, 2.5), shifted(sigma, 2.5 * shift), rtol=1e-12)
    odds = moved[1:-1] / (1 - moved[1:-1])
    np.testing.assert_allclose(odds, shift * sigma[1:-1] / (1 - sigma[1:-1]), rtol=1e-9)


def test_no_shift_changes_no_bit() -> None:
    for sigma in (np.linspace(0, 1, 1001), Randomness(0).at(3, 0, NUM).uniform("timestep"), 2.0 ** -np.arange(1, 80)):
        assert np.array_equal(shifted(sigma, 1.0), sigma)


def test_a_shift_by_resolution() -> None:
    """mu of FLUX: 0.5 at 256 tokens, 1.15 at 4,096, 0.63 at 1,024; linear also beyond."""
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15), (7936, 1.8)):
        assert shift_for(FLUX_SHIFT, tokens) == pytest.approx(math.exp(mu), rel=1e-12)
        assert shift_for(FlowSection(shift_type="linear"), tokens) == pytest.approx(mu, rel=1e-12)
        assert shift_for(FlowSection(shift=3.0), tokens) == 3.0
    assert shift_for(LTX_SHIFT, 4096) == pytest.approx(math.exp(2.05))
    for wrong in (
        FlowSection(shift_type="linear", base_shift=0.0, base_tokens=32),
        FlowSection(shift_type="linear", base_shift=-1e308, max_shift=1e308),
        FlowSection(shift_type="exponential", base_shift=1e9),
        FlowSection(shift_type="exponential", base_shift=-1e9),
    ):
        with pytest.raises(ValueError, match=r"at 16 tokens .* must be at least 1e-06 and at most 1e\+06; got"):
            shift_for(wrong, 16)


SCHEDULES: dict[str, tuple[dict[str, Any], float | None, float, float | None]] = {
    # settings of the scheduler, its mu, our shift and last level
    "none": ({}, None, 1.0, None),
    "static": ({"shift": 3.0}, None, 3.0, None),
    "flux": ({"use_dynamic_shifting": True}, 0.63, shift_for(FLUX_SHIFT, 1024), None),
    "linear": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.15, 1.15, None),
    "ltx": (
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
        0.95 + (2.05 - 0.95) * (2048 - 1024) / (4096 - 1024),
        shift_for(LTX_SHIFT, 2048),
        0.1,
    ),
    "static-terminal": ({"shift": 2.0, "shift_terminal": 0.02}, None, 2.0, 0.02),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def scheduler_of(name: str, num_steps: int) -> Any:
    settings, mu, _, _ = SCHEDULES[name]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
    return scheduler


@every_schedule
@pytest.mark.parametrize("num_steps", [4, 28])
def test_noise_levels_of_the_scheduler_of_diffusers(name: str, num_steps: int) -> None:
    """On the grid of its pipelines: num_steps even levels from 1, and 0 behind them."""
    _, _, shift, terminal = SCHEDULES[name]
    ours = sigma_grid(num_steps + 1, shift, terminal)
    np.testing.assert_allclose(ours, scheduler_of(name, num_steps).sigmas.numpy(), rtol=1e-5, atol=1e-6)
    assert (np.diff(ours) < 0).all() and (ours[0], ours[-1]) == (1.0, 0.0)
    assert terminal is None or ours[-2] == pytest.approx(terminal)


def test_the_table_that_training_by_diffusers_takes_its_noise_levels_from() -> None:
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = TimeSampler(shift=3.0).sigma(np.arange(1000, 0, -1) / 1000)
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), rtol=1e-5)
    own = np.linspace(float(scheduler.sigma_max), float(scheduler.sigma_min), 20)  # without a given grid
    scheduler.set_timesteps(20)
    np.testing.assert_allclose([*shifted(own, 3.0), 0.0], scheduler.sigmas.numpy(), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- conventions


@every_convention
def test_translations_come_back(convention: TimeConvention) -> None:
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    level = convention.level(convention.at_sigma(sigma))
    torch.testing.assert_close(level.sigma, sigma)
    torch.testing.assert_close(level.clean, 1 - sigma)
    torch.testing.assert_close(convention.at_clean(1 - sigma), convention.at_sigma(sigma))
    assert convention.sigma(float(convention.at_sigma(0.3))) == pytest.approx(0.3)
    output = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(convention.velocity_of(convention.velocity_of(output)), output)
    noise_end, data_end = convention.at_sigma(1.0), convention.at_sigma(0.0)
    assert sorted((noise_end, data_end)) == [0.0, convention.scale]


def test_what_families_write() -> None:
    quarter = torch.tensor([0.25])
    assert DATA_AT_ONE.level(quarter).sigma == 0.75 and DATA_AT_ONE.at_sigma(0.25) == 0.75
    assert SD3.level(1000 * quarter).sigma == 0.25 and SD3.at_clean(0.25) == 750.0
    assert TimeConvention().at_sigma(0.25) == 0.25
    for wrong in ({"time": "t"}, {"velocity": "data"}, {"scale": 0.0}, {"scale": math.inf}):
        with pytest.raises(ValueError, match=r"unknown (time|velocity) of a flow|must be above 0"):
            TimeConvention(**wrong)  # type: ignore[arg-type]


def test_small_times_keep_their_digits() -> None:
    """In either direction: 1 - (1 - t) of float32 would have three of them."""
    tiny = torch.tensor([1.2345678e-5])
    assert torch.equal(DATA_AT_ONE.level(tiny).clean, tiny) and torch.equal(TimeConvention().level(tiny).sigma, tiny)


@every_convention
def test_a_batch_is_noised_by_its_level_and_the_truth_has_no_loss(convention: TimeConvention) -> None:
    objective = FlowObjective(flow=Flow(convention=convention))
    noisy = drawn(objective, 8)
    sigma = convention.level(noisy.t).sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.xt, (1 - sigma) * noisy.x0 + sigma * noisy.noise)
    sign = 1.0 if convention.velocity == "noise - data" else -1.0

    class Truth(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return sign * (noisy.noise - noisy.x0)

    prediction = objective.predict(Truth(), noisy)
    assert float(objective.losses(Truth(), noisy, prediction)["loss"].abs().max()) < 1e-12
    torch.testing.assert_close(
        objective.flow.noise(prediction.output, noisy.xt, noisy.t), noisy.noise, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(objective.flow.velocity(prediction.output, noisy.xt, noisy.t), noisy.noise - noisy.x0)
    clean, dirty = objective.at_level(noisy, 0), objective.at_level(noisy, objective.num_levels - 1)
    assert torch.equal(clean.xt, noisy.x0) and torch.equal(dirty.xt, noisy.noise)
    quiet = objective.low_noise(noisy)
    torch.testing.assert_close(convention.level(quiet.t).sigma, sigma.flatten() / 4, rtol=1e-4, atol=1e-6)


def test_uniform_times_of_a_family_that_counts_noise_are_those_of_diffusers() -> None:
    u = Randomness(0).at(3, 0, NUM).uniform("timestep")
    assert torch.equal(drawn(FlowObjective(flow=Flow(convention=SD3))).t, torch.from_numpy(1000.0 * u).float())


def network_of(convention: TimeConvention) -> Callable[[Tensor, Tensor], Tensor]:
    """One network as a family writes it: it has the same velocity at the same noise level in every convention."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        sigma = convention.level(t).sigma.view(-1, 1, 1, 1)
        velocity = torch.sin(x + 2 * sigma) + x * torch.cos(3 * sigma)
        return velocity if convention.velocity == "noise - data" else -velocity

    return network


def start(num: int = 3) -> Tensor:
    return torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(2))


@every_convention
@every_schedule
def test_euler_steps_of_the_scheduler_of_diffusers(convention: TimeConvention, name: str) -> None:
    _, _, shift, terminal = SCHEDULES[name]
    scheduler = scheduler_of(name, 9)
    x, states = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network_of(SD3)(x, t.expand(len(x))), t, x).prev_sample
        states.append(x)
    sampler = FlowSampler(method="euler", num_points=10, shift=shift, shift_terminal=terminal)
    ours = list(sampler.steps(Flow(convention=convention).towards_data(network_of(convention)), start(), (0.0, 1.0)))
    torch.testing.assert_close(torch.stack(ours), torch.stack(states), rtol=1e-4, atol=1e-5)


@every_convention
def test_a_stochastic_trajectory_is_the_same_in_every_convention(convention: TimeConvention) -> None:
    def end(convention: TimeConvention, settings: Stochastic) -> Tensor:
        flow, x = Flow(convention=convention), start()
        return deque(
            sample_stochastic(network_of(convention), flow, settings, x, lambda _: torch.ones_like(x)), 1
        ).pop()

    for form in ("sigma", "linear", "decreasing", "increasing-decreasing"):
        for last in ("mean", "euler", "tweedie", "none"):
            settings = Stochastic("heun", 7, form, last_step=last)  # type: ignore[arg-type]
            torch.testing.assert_close(end(convention, settings), end(DATA_AT_ONE, settings), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_shifted_steps_back_are_the_steps_there(shift: float) -> None:
    """The noise levels of a trajectory to noise are those of the one to the data, and both have exact ends."""
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return torch.cos(x) * t.view(-1, 1, 1, 1)

    sampler = FlowSampler(method="heun2", num_points=400, shift=shift)
    there = deque(sampler.steps(field, start(), (0.0, 0.98)), 1).pop()
    ways = sorted(set(seen))
    assert (ways[0], ways[-1], len(ways)) == (0.0, pytest.approx(0.98), 400)
    levels = 1 - np.array(ways) / 0.98
    np.testing.assert_allclose(levels[::-1], shifted(np.linspace(0, 1, 400), shift), atol=1e-6)
    seen.clear()
    back = deque(sampler.steps(field, there, (0.98, 0.0)), 1).pop()
    assert sorted(set(seen)) == ways
    torch.testing.assert_close(back, start(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": 3.0}, {"shift_terminal": 0.1}, {"kind": "sde", "shift": 3.0}, {"method": "euler", "shift": -1.0},
        {"method": "euler", "shift": math.nan}, {"method": "euler", "shift_terminal": 1.0},
        {"method": "euler", "shift_terminal": 0.1, "num_points": 2},
    ],
)  # fmt: skip
def test_shifts_that_a_sampler_has_not_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"shift|noise level"):
        FlowSampler(**wrong)


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    sizes = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    return new_model("sit", sizes, 0)


def test_a_recipe_that_says_nothing_is_that_of_the_paper(model: LoadedModel) -> None:
    objective, sampler = objective_for(model, 0.1, load_recipe(None)), sampler_of(load_recipe(None).sample, model)
    assert objective == FlowObjective(0.1) and sampler == FlowSampler()


def test_a_recipe_says_how_times_are_drawn(model: LoadedModel) -> None:
    recipe = load_recipe(
        None, ["flow.time_sampler=logit_normal", "flow.logit_mean=0.5", "flow.logit_std=0.8", "flow.shift=3"]
    )
    objective = objective_for(model, 0.1, recipe)
    assert isinstance(objective, FlowObjective)
    assert objective.times == TimeSampler("logit_normal", 0.5, 0.8, shift=3.0)
    by_tokens = objective_for(model, 0.1, load_recipe(None, ["flow.shift_type=exponential", "flow.base_tokens=16"]))
    assert isinstance(by_tokens, FlowObjective)
    assert by_tokens.times.shift == pytest.approx(1.6487212707), "16 tokens"


def test_a_recipe_says_how_the_noise_levels_of_sampling_are_shifted(model: LoadedModel) -> None:
    steps = ["sample.flow.method=euler", "sample.num_steps=9"]
    static = load_recipe(None, [*steps, "sample.flow.shift=3", "sample.flow.shift_terminal=0.1"]).sample
    sampler = from_section(static, model)
    assert (sampler.method, sampler.shift, sampler.shift_terminal) == ("euler", 3.0, 0.1)
    assert "euler 9 points shift 3 to 0.1 |" in sampler.describe(model)
    linear = load_recipe(None, [*steps, "sample.flow.shift_type=linear", "sample.flow.base_tokens=16"]).sample
    assert from_section(linear, model).shift == 0.5
    assert sampler.of_steps(1).calls == 1, "a step to be timed"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["flow.time_sampler=lognormal"], "flow.time_sampler must be one of uniform, logit_normal, mode, cosmap"),
        (["flow.logit_std=0"], "flow.logit_std must be above 0"),
        (["flow.logit_mean=-1e4"], "flow.logit_mean must be at least -1,000"),
        (["flow.mode_scale=1.8"], r"flow.mode_scale must be at least -1 and at most 1\.75"),
        (["flow.mode_scale=-1.1"], "flow.mode_scale must be at least -1"),
        (["flow.shift=0"], "flow.shift must be at least 1e-06"),
        (["flow.shift_type=dynamic"], "flow.shift_type must be one of static, exponential, linear"),
        (["flow.base_tokens=0"], "flow.base_tokens must be at least 1"),
        (["flow.max_tokens=256"], "max_tokens of a shift must be above base_tokens; got 256 and 256"),
        (
            ["flow.shift_type=linear", "flow.base_shift=-1"],
            "flow: the shift of shift_type linear at 16 tokens",
        ),
        (["sample.flow.shift=-2"], "sample.flow.shift must be at least 1e-06"),
        (["sample.flow.shift=2"], "needs sampler ode with method euler.*; got dopri5"),
        (["sample.flow.shift_terminal=0.1"], "needs sampler ode with method euler.*; got dopri5"),
        (["sample.flow.shift=2", "sample.sampler=sde"], "needs sampler ode with method euler.*; got sde"),
        (["sample.flow.shift_terminal=1"], "sample.flow.shift_terminal must be above 0 and below 1"),
        (["sample.flow.max_tokens=1"], "max_tokens of a shift must be above base_tokens; got 1 and 256"),
    ],
)
def test_recipes_that_cannot_be_are_refused(model: LoadedModel, settings: list[str], said: str) -> None:
    def use() -> None:
        recipe = load_recipe(None, settings)
        objective_for(model, 0.1, recipe)
        sampler_of(recipe.sample, model)

    with pytest.raises(UserError, match=said):
        use()


def test_the_section_speaks_of_the_densities_that_there_are() -> None:
    hint = get_type_hints(FlowSection, include_extras=True)["time_sampler"]
    assert get_args(get_args(hint)[0]) == get_args(Density)
