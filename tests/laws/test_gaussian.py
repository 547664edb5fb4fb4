"""The Gaussian process: chains, relations, losses, samplers, and randomness that does not know the batch size."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch, Prediction
from tinyfusion.processes.gaussian import (
    GaussianObjective,
    Schedule,
    discretised_log_likelihood,
    normal_kl,
    respaced_timesteps,
    sample_ancestral,
    sample_ddim,
)
from tinyfusion.sample.drive import guided, image_labels, sample, to_uint8
from tinyfusion.sample.gaussian import GaussianSampler

FULL = Schedule()

# --------------------------------------------------------------------------------------------------------- chains


def test_published_schedule() -> None:
    bars = {
        0: 0.9999,
        1: 0.9997800920720721,
        249: 0.5240853738253606,
        499: 0.07858724288177824,
        749: 0.0033505504389367744,
        999: 4.035829765375676e-05,
    }
    for index, value in bars.items():
        assert FULL.alphas_cumprod[index] == pytest.approx(value, rel=1e-12)
    assert FULL.betas[0] == 9.999999999998899e-05
    logs = {0: -9.81672513529595, 1: -9.81672513529595, 2: -9.367121497366247, 999: -3.912023829100454}
    for index, value in logs.items():
        assert FULL.posterior_log_variance_clipped[index] == pytest.approx(value, rel=1e-12)


def test_published_respacings() -> None:
    even = respaced_timesteps("250")
    assert (len(even), sum(even), even[0], even[-1]) == (250, 124875, 0, 999)
    assert {b for a, b in itertools.pairwise(even) if b - a != 4} == {169, 502, 835}
    assert {b - a for a, b in itertools.pairwise(even)} == {4, 5}
    betas = Schedule("250").betas
    assert (betas[1], betas[-1]) == pytest.approx((5.990655644756426e-4, 0.07751934499235003), rel=1e-12)
    sparse = respaced_timesteps("64")
    assert sparse[:12] == [0, 16, 32, 48, 63, 79, 95, 111, 127, 143, 159, 174] and sparse[-2:] == [983, 999]
    assert sum(sparse) == 31968
    assert respaced_timesteps("10") == list(range(0, 1000, 111))
    stride = respaced_timesteps("ddim50")
    assert stride == list(range(0, 1000, 20)) and sum(stride) == 24500
    assert Schedule("ddim50").betas[-1] == pytest.approx(0.3246144475291255, rel=1e-12)
    assert respaced_timesteps("") == list(range(1000))


@given(st.integers(2, 1000))
def test_even_sections_keep_both_ends(count: int) -> None:
    kept = respaced_timesteps(str(count))
    assert len(kept) == len(set(kept)) == count
    assert kept == sorted(kept) and (kept[0], kept[-1]) == (0, 999)


def test_several_sections_add_up() -> None:
    assert respaced_timesteps("10,10,5") == [
        *(start + round(i * 333 / 9) for start in (0,) for i in range(10)),
        *(334 + round(i * 332 / 9) for i in range(10)),
        *(667 + round(i * 332 / 4) for i in range(5)),
    ]


@pytest.mark.parametrize(
    ("spacing", "nearest"),
    [
        ("ddim300", (250, 334)),
        ("ddim60", (59, 63)),
        ("ddim0", (1, 2)),
        ("ddim1200", (500, 1000)),
        ("1001", (999, 1000)),
        ("0", (1, 2)),
    ],
)
def test_impossible_counts_name_the_nearest_two(spacing: str, nearest: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"nearest are {nearest[0]} and {nearest[1]}$"):
        respaced_timesteps(spacing)


@given(st.sampled_from(["", "250", "64", "10", "2", "1", "ddim50", "7,3"]))
def test_a_respaced_chain_keeps_the_marginals(spacing: str) -> None:
    schedule = Schedule(spacing)
    np.testing.assert_allclose(schedule.alphas_cumprod, FULL.alphas_cumprod[schedule.timesteps], rtol=1e-11)
    assert (schedule.betas > 0).all() and (schedule.betas < 1).all()
    assert np.isfinite(schedule.posterior_log_variance_clipped).all()


def test_posterior_mean_leads_a_noiseless_path_along_itself() -> None:
    coefficient = FULL.posterior_mean_x0 + FULL.posterior_mean_xt * np.sqrt(FULL.alphas_cumprod)
    np.testing.assert_allclose(coefficient, np.sqrt(FULL.alphas_cumprod_prev), rtol=1e-10)


# ------------------------------------------------------------------------------------------------------ relations


@given(t=st.integers(0, 999), seed=st.integers(0, 9))
def test_noising_and_both_inversions_are_one_relation(t: int, seed: int) -> None:
    draws, index = Randomness(seed).at(0, 0, 2), torch.tensor([t, 999 - t])
    x0, noise = (torch.from_numpy(draws.normal(name, (2, 3, 3))) for name in ("x0", "noise"))
    xt = FULL.q_sample(x0, index, noise)
    amplified = 1e-6 * float(FULL.sqrt_recip_alphas_cumprod[int(index.max())])
    torch.testing.assert_close(FULL.x0_from_noise(xt, index, noise), x0, rtol=1e-5, atol=10 * amplified)
    shrunk = 1e-6 / float(FULL.sqrt_recipm1_alphas_cumprod[int(index.min())])
    torch.testing.assert_close(FULL.noise_from_x0(xt, index, x0), noise, rtol=1e-5, atol=10 * shrunk)


def test_kl_of_equals_is_zero_and_positive_else() -> None:
    mean, log_variance = torch.tensor([0.3, -1.0]), torch.tensor([-2.0, 0.5])
    assert torch.equal(normal_kl(mean, log_variance, mean, log_variance), torch.zeros(2))
    assert bool((normal_kl(mean, log_variance, mean + 0.1, log_variance + 0.2) > 0).all())


@given(mean=st.floats(-1.5, 1.5), log_scale=st.floats(-6, 1))
def test_discretised_likelihood_is_a_distribution_over_256_values(mean: float, log_scale: float) -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    logs = discretised_log_likelihood(x, torch.tensor(mean).double(), torch.tensor(log_scale).double())
    assert float(logs.exp().sum()) == pytest.approx(1.0, abs=1e-8)


# --------------------------------------------------------------------------------------------------------- losses


def random_output(noisy: NoisyBatch) -> Tensor:
    draws = Randomness(11).at(0, 0, len(noisy.t))
    return torch.from_numpy(draws.normal("output", (2 * noisy.x0.shape[1], *noisy.x0.shape[2:])))


def losses(noisy: NoisyBatch, output: Tensor) -> dict[str, Tensor]:
    return GaussianObjective().losses(torch.nn.Identity(), noisy, Prediction(output))


def test_the_true_noise_and_the_posterior_variance_cost_nothing(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    noisy = noisy_batch(tiny_model(), t=[1, 400, 999])
    terms = losses(noisy, torch.cat([noisy.noise, torch.full_like(noisy.noise, -1.0)], dim=1))
    assert torch.equal(terms["mse"], torch.zeros(3))
    torch.testing.assert_close(terms["vb"], torch.zeros(3), atol=1e-5, rtol=0)


def test_the_hybrid_loss_is_the_sum_of_its_parts_per_sample(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    noisy = noisy_batch(tiny_model(), t=[0, 400, 999])
    terms = losses(noisy, random_output(noisy))
    assert all(value.shape == (3,) for value in terms.values())
    assert torch.equal(terms["loss"], terms["mse"] + terms["vb"])


def test_the_variational_term_trains_the_variance_alone(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    noisy = noisy_batch(tiny_model(), t=[0, 400, 999])
    output = random_output(noisy).requires_grad_()
    losses(noisy, output)["vb"].sum().backward()
    assert output.grad is not None
    channels = noisy.x0.shape[1]
    assert torch.equal(output.grad[:, :channels], torch.zeros_like(noisy.x0))
    assert bool((output.grad[:, channels:].flatten(1).abs().sum(1) > 0).all())


def test_without_learned_variance_the_loss_is_the_noise_error(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model(learn_sigma=False)
    noisy, objective = noisy_batch(model), GaussianObjective()
    terms = objective.losses(model.module, noisy, objective.predict(model.module, noisy))
    assert set(terms) == {"loss", "mse"} and torch.equal(terms["loss"], terms["mse"])


@pytest.mark.parametrize(("label_drop", "kept"), [(0.0, 64), (1.0, 0)])
def test_label_drop_at_its_ends(label_drop: float, kept: int) -> None:
    batch = Batch(torch.zeros(64, 1, 2, 2), class_condition(torch.arange(64) % 5, 5))
    noisy = GaussianObjective(label_drop).draw(batch, Randomness(0).at(0, 0, 64))
    assert (
        int((noisy.condition["labels"] == batch.condition["labels"]).sum()) == kept
        and int((noisy.condition["labels"] == 5).sum()) == 64 - kept
    )


def test_drawn_timesteps_and_drops_have_their_frequencies() -> None:
    batch = Batch(torch.zeros(4000, 1, 1, 1), class_condition(torch.zeros(4000, dtype=torch.int64), 5))
    noisy = GaussianObjective().draw(batch, Randomness(3).at(7, 0, 4000))
    assert abs(float((noisy.condition["labels"] == 5).float().mean()) - 0.1) < 0.02
    assert abs(float(noisy.t.float().mean()) - 499.5) < 15 and noisy.t.min() < 5 and noisy.t.max() > 994


# ------------------------------------------------------------------------------------------------------- samplers


def knows(target: Tensor) -> Callable[[Schedule], Callable[[Tensor, Tensor], Tensor]]:
    """A denoiser whose noise prediction always points at `target`, with the smallest learned variance."""

    def bind(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        position = {int(t): i for i, t in enumerate(schedule.timesteps)}

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            index = torch.full_like(t, position[int(t[0])])
            return torch.cat([schedule.noise_from_x0(x, index, target), torch.full_like(x, -1.0)], dim=1)

        return denoise

    return bind


def no_noise(position: int) -> Tensor:
    raise AssertionError(f"noise {position} was drawn")


def chain(sampler: str, denoiser: Any, schedule: Schedule, x: Tensor, noise: Any, **more: Any) -> Iterator[Tensor]:
    return (sample_ancestral if sampler == "ddpm" else sample_ddim)(denoiser, schedule, x, noise, **more)


@pytest.mark.parametrize(("sampler", "spacing"), [("ddpm", "10"), ("ddpm", "1"), ("ddim", "ddim10"), ("ddim", "ddim1")])
def test_a_denoiser_that_knows_the_image_ends_on_it(sampler: str, spacing: str) -> None:
    draws, schedule = Randomness(2).at(0, 0, 2), Schedule(spacing)
    target, x = (torch.from_numpy(draws.normal(name, (1, 3, 3))) for name in ("target", "x"))
    positions: list[int] = []

    def noise(position: int) -> Tensor:
        positions.append(position)
        return torch.from_numpy(draws.normal(f"step {position}", (1, 3, 3)))

    made = list(chain(sampler, knows(target)(schedule), schedule, x, noise))
    assert len(made) == len(schedule)
    torch.testing.assert_close(made[-1], target, rtol=1e-4, atol=1e-4)
    assert positions == (list(range(len(schedule) - 1)) if sampler == "ddpm" else [])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_clipping_keeps_the_clean_image_in_range(sampler: str) -> None:
    schedule, target = Schedule("1"), torch.full((1, 1, 2, 2), 3.0)
    made = list(chain(sampler, knows(target)(schedule), schedule, torch.zeros_like(target), no_noise, clip=True))
    torch.testing.assert_close(made[-1], torch.ones_like(target))


def test_networks_receive_original_timesteps() -> None:
    seen: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and len(set(t.tolist())) == 1
        seen.append(int(t[0]))
        return torch.zeros(x.shape[0], 2, 2, 2)

    list(sample_ddim(denoise, Schedule("ddim50"), torch.zeros(2, 1, 2, 2), no_noise))
    assert seen == list(range(980, -1, -20))


def test_guidance_at_its_special_scales(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    x, t, y, null = noisy.xt, noisy.t, noisy.condition["labels"], model.arch.num_classes
    conditional, unconditional = model.module(x, t, y), model.module(x, t, torch.full_like(y, null))
    assert torch.equal(guided(model, class_condition(y, null), 1.0, 2)(x, t), conditional)
    none, one = (
        guided(model, class_condition(y, null), 0.0, 2)(x, t),
        guided(model, class_condition(y, null), 3.0, 1)(x, t),
    )
    torch.testing.assert_close(none, torch.cat([unconditional[:, :2], conditional[:, 2:]], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[:, 1:], conditional[:, 1:], rtol=1e-4, atol=1e-5)
    extrapolated = unconditional[:, :1] + 3 * (conditional[:, :1] - unconditional[:, :1])
    torch.testing.assert_close(one[:, :1], extrapolated, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- randomness

DRAWERS: dict[str, Callable[[Draws, tuple[int, ...]], np.ndarray]] = {
    "uniform": lambda draws, shape: draws.uniform("p", shape),
    "normal": lambda draws, shape: draws.normal("p", shape),
    "gumbel": lambda draws, shape: draws.gumbel("p", shape),
    "integers": lambda draws, shape: draws.integers("p", 1000, shape),
}


@pytest.mark.parametrize("kind", DRAWERS)
@given(
    seed=st.integers(0, 2**64 - 1), step=st.integers(0, 10**7), first=st.integers(0, 10**6), before=st.integers(0, 5),
    num=st.integers(1, 4), shape=st.lists(st.integers(1, 5), max_size=3),
)  # fmt: skip
def test_draws_of_a_sample_do_not_know_its_batch(
    kind: str, seed: int, step: int, first: int, before: int, num: int, shape: list[int]
) -> None:
    randomness = Randomness(seed)
    whole = DRAWERS[kind](randomness.at(step, first, before + num + 2), tuple(shape))
    part = DRAWERS[kind](randomness.at(step, first + before, num), tuple(shape))
    assert part.shape == (num, *shape)
    assert np.array_equal(part, whole[before : before + num])


def test_seeds_purposes_steps_and_samples_are_all_different() -> None:
    draws = [
        Randomness(seed).at(step, first, 1).normal(purpose, (4,))
        for seed in (0, 1) for step in (0, 1) for first in (0, 1) for purpose in ("a", "b")
    ]  # fmt: skip
    assert len({float(value) for row in draws for value in row.flatten()}) == 16 * 4


def test_draws_have_the_right_distribution() -> None:
    draws = Randomness(4).at(0, 0, 20_000)
    normal, gumbel, uniform = draws.normal("n"), draws.gumbel("g"), draws.uniform("u")
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03 and np.isfinite(normal).all()
    assert abs(gumbel.mean() - 0.5772) < 0.04 and abs(gumbel.std() - math.pi / math.sqrt(6)) < 0.05
    assert uniform.min() > 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    counts = np.bincount(draws.integers("i", 8), minlength=8)
    assert len(counts) == 8 and (abs(counts - 2500) < 250).all()


def test_draws_touch_no_global_generator() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    Randomness(0).at(0, 0, 8).normal("n", (3,))
    Randomness(0).permutation("p", 0, 8)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()


@given(step=st.integers(0, 100), num=st.integers(1, 50))
def test_permutations_are_permutations(step: int, num: int) -> None:
    assert sorted(Randomness(5).permutation("p", step, num)) == list(range(num))


def test_an_objective_draws_the_same_for_a_part_of_the_batch() -> None:
    x, y = torch.zeros(6, 1, 2, 2), torch.arange(6) % 5
    objective, randomness = GaussianObjective(0.5), Randomness(9)
    whole = objective.draw(Batch(x, class_condition(y, 5)), randomness.at(3, 10, 6))
    part = objective.draw(Batch(x[2:5], class_condition(y[2:5], 5)), randomness.at(3, 12, 3))
    for name in ("noise", "t", "xt"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:5]), name
    assert torch.equal(part.condition["labels"], whole.condition["labels"][2:5])


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest magnitude."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_image_i_is_the_same_at_any_batch_size(tiny_model: Callable[..., LoadedModel], sampler: Any) -> None:
    model = tiny_model(depth=2)
    settings = GaussianSampler(sampler, 4, 1.5, eta=0.5)
    labels = image_labels(7, 5, seed=3)

    def images(batch_size: int, first: int = 0) -> Tensor:
        made = list(sample(model, labels, settings, seed=3, batch_size=batch_size, first=first))
        assert [batch.first for batch in made] == list(range(first, 7, batch_size))
        assert torch.equal(torch.cat([batch.condition["labels"] for batch in made]), torch.from_numpy(labels[first:]))
        return torch.cat([batch.x for batch in made])

    whole = images(7)
    for batch_size in (1, 3, 64):
        assert largest_error(images(batch_size), whole) <= 1e-5
    assert largest_error(images(2, first=4), whole[4:]) <= 1e-5


def test_initial_noise_and_labels_are_bit_equal_at_any_batch_size(tiny_model: Callable[..., LoadedModel]) -> None:
    starts: dict[int, list[Tensor]] = {}

    class Recorder(torch.nn.Module):
        def __init__(self, batch_size: int) -> None:
            super().__init__()
            self.weight, self.batch_size = torch.nn.Parameter(torch.zeros(1)), batch_size

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if int(t[0]) == 999:
                starts.setdefault(self.batch_size, []).append(torch.cat([x.flatten(1), y[:, None].float()], dim=1))
            return torch.zeros(x.shape[0], 4, 4, 4)

    for batch_size in (1, 4, 9):
        model = dataclasses.replace(tiny_model(), module=Recorder(batch_size))
        list(sample(model, image_labels(9, 5, 0), GaussianSampler("ddpm", 2, 1.0), seed=0, batch_size=batch_size))
    whole = torch.cat(starts[9])
    assert torch.equal(torch.cat(starts[1]), whole) and torch.equal(torch.cat(starts[4]), whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"guidance": 0.5}, "at least 1"), ({"eta": 1.5}, "eta"), ({"sampler": "ddim", "num_steps": 70}, "nearest")],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianSampler(**wrong)


@pytest.mark.parametrize(("channels", "guided", "wanted"), [(1, "published", 1), (4, "published", 3), (4, "all", 4)])
def test_guided_channels(tiny_model: Callable[..., LoadedModel], channels: int, guided: Any, wanted: int) -> None:
    assert GaussianSampler(guided=guided).guided_channels(tiny_model(in_channels=channels)) == wanted


def test_labels_in_turn() -> None:
    assert image_labels(5, 10, 0, classes=(3, 7)).tolist() == [3, 7, 3, 7, 3]
    assert image_labels(5, 3, 0, balanced=True).tolist() == [0, 1, 2, 0, 1]
    assert np.array_equal(image_labels(9, 10, 4)[:5], image_labels(5, 10, 4))


def test_pixels_follow_the_published_rounding() -> None:
    x = torch.tensor([-2.0, -1.0, -1 / 255, 0.0, 1.0, 2.0]).view(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 127, 128, 255, 255]
    assert to_uint8(x).shape == (1, 1, 6, 1)
