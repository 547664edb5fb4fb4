"""Noise schedules of pipeline folders: the levels of the pipelines' own schedulers, and the losses of diffusers' examples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from call_goldens import GOLDENS, Golden
from test_calls import rows_of
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import FlowSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.families.diffusers_classes.calls import CallContext, called
from tinyfusion.families.diffusers_classes.schedules import (
    expert_range,
    gaussian_schedule,
    training_shift,
)
from tinyfusion.jobs.transformer_sources import open_transformer_model, transformer_of
from tinyfusion.jobs.transformer_training import transformer_objective
from tinyfusion.processes.base import Batch, Prediction
from tinyfusion.processes.flow import Flow, FlowObjective, LossWeight
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.processes.time import TimeConvention, TimeSampler

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
EULER, UNIPC, DPM = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"


def test_the_shift_of_training() -> None:
    """Static shifts of Euler schedulers are in the examples' times; shifts by size and flow_shift are not."""
    assert training_shift({"_class_name": EULER, "shift": 3.0}) == 3.0
    assert training_shift({"_class_name": EULER, "shift": 3.0, "use_dynamic_shifting": True}) == 1.0
    assert training_shift({"_class_name": UNIPC, "use_flow_sigmas": True, "flow_shift": 5.0}) == 1.0
    assert training_shift({"_class_name": "SCMScheduler"}) == training_shift({}) == 1.0


def test_experts_are_trained_on_their_own_levels() -> None:
    """Wan 2.2: the second transformer draws below the boundary. The distribution of each is that of all, truncated."""
    index = {"boundary_ratio": 0.875, "transformer": ["diffusers", "Wan"], "transformer_2": ["diffusers", "Wan"]}
    assert expert_range(index, "transformer") == (0.875, 1.0)
    assert expert_range(index, "transformer_2") == (0.0, 0.875)
    assert expert_range({**index, "transformer_2": [None, None]}, "transformer") == (0.0, 1.0)
    assert expert_range({}, "transformer") == (0.0, 1.0)
    with pytest.raises(UserError, match="boundary_ratio 875: wanted a number between 0 and 1"):
        expert_range({**index, "boundary_ratio": 875}, "transformer")


def test_a_folder_of_two_experts(tmp_path: Path) -> None:
    """Each is opened with its own levels, the shift of the scheduler and a time per token; its student too, by its run."""
    golden = next(each for each in GOLDENS if each.pipeline.model == "WanTransformer3DModel")
    parts = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    for name in parts:
        golden.tiny.model().save_pretrained(tmp_path / name)
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.9, "expand_timesteps": True, **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": EULER, "shift": 5.0}))
    run = tmp_path / "run"
    golden.tiny.model().save_pretrained(run / "student")
    (run / "run.json").write_text(json.dumps({"job": {"teacher": str(tmp_path / "transformer_2")}}))
    wanted = {"transformer": (0.9, 1.0), "transformer_2": (0.0, 0.9), "run": (0.0, 0.9)}
    for name, levels in wanted.items():
        folder = transformer_of(str(tmp_path / name), None)
        assert folder is not None
        model = open_transformer_model(tmp_path / name, folder, FlowSection(), None)
        objective = transformer_objective(model, 0.0, load_recipe(None))
        assert isinstance(objective, FlowObjective)
        assert objective.times == TimeSampler(shift=5.0, within=levels), name
        assert model.context.time_per_token


@pytest.mark.parametrize("time", ["sigma", "1 - sigma"])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "mode", "cosmap"])
def test_truncated_levels(kind: Any, time: Any) -> None:
    """The truncated distribution is the sorted levels of the whole one that lie within."""
    u = (np.arange(20000) + 0.5) / 20000
    whole = TimeSampler(kind, logit_mean=0.5, shift=3.0)
    within = dataclasses.replace(whole, within=(0.6, 0.875))
    convention = TimeConvention(time)
    drawn = np.sort(convention.sigma(convention.draw(within, u, (0.0, 1.0))))
    every = np.sort(convention.sigma(convention.draw(whole, u, (0.0, 1.0))))
    inside = every[(every >= 0.6) & (every <= 0.875)]
    assert 0.6 <= drawn[0] < 0.601
    assert 0.874 < drawn[-1] <= 0.875
    grid = np.linspace(0, 1, 101)
    np.testing.assert_allclose(np.quantile(drawn, grid), np.quantile(inside, grid), atol=2e-4)
    objective = FlowObjective(0.0, Flow(convention=convention), times=within)
    noisy = objective.draw(
        Batch(torch.zeros(4, 1, 2, 2), Condition({"embeddings": torch.zeros(4, 1)})), Randomness(1).at(0, 0, 4)
    )
    levels = [objective.at_level(noisy, level).t for level in (0, objective.num_levels - 1)]
    assert [float(convention.level(t).sigma[0]) for t in levels] == pytest.approx([0.6, 0.875])


@pytest.mark.parametrize("within", [(0.5, 0.5), (-0.1, 1.0), (0.9, 0.2)])
def test_levels_that_are_none_are_refused(within: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="the lower one first"):
        TimeSampler(within=within)


# --------------------------------------------------------------------------------------------------------------- Gaussian

COGVIDEOX = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                 rescale_betas_zero_snr=True, timestep_spacing="trailing")  # fmt: skip
GAUSSIANS: list[tuple[str, dict[str, Any]]] = [
    ("CogVideoXDDIMScheduler", COGVIDEOX | dict(snr_shift_scale=3.0)),
    ("CogVideoXDPMScheduler", COGVIDEOX | dict(snr_shift_scale=1.0)),
    ("DPMSolverMultistepScheduler", dict(beta_start=0.0001, beta_end=0.02)),
    ("DPMSolverMultistepScheduler", dict(timestep_spacing="leading", steps_offset=1)),
    ("DDIMScheduler", dict(beta_schedule="scaled_linear")),
    ("DDIMScheduler", dict(trained_betas=list(np.linspace(0.001, 0.01, 1000)))),
]


@pytest.mark.parametrize(("name", "settings"), GAUSSIANS)
def test_chains_are_those_of_the_schedulers(name: str, settings: dict[str, Any]) -> None:
    import diffusers

    theirs = getattr(diffusers, name)(**settings)
    schedule, prediction = gaussian_schedule({**settings, "_class_name": name})
    assert prediction == ("v" if "prediction_type" in settings else "epsilon")
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-5, atol=1e-9)
    assert (schedule.alphas_cumprod[-1] == 0) == bool(settings.get("rescale_betas_zero_snr"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prediction_type": "sample"}, "prediction_type sample: wanted epsilon or v_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2: wanted linear or scaled_linear"),
        ({"num_train_timesteps": 10}, "num_train_timesteps 10: wanted 1000"),
        ({"rescale_betas_zero_snr": True}, "says nothing at the noise end"),
        ({"trained_betas": [0.1]}, "not 1000 numbers between 0 and 1"),
    ],
)
def test_chains_that_are_not_known_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        gaussian_schedule({"_class_name": "DDIMScheduler", **settings})


# ------------------------------------------------------------------------------------------------- losses of the examples


def _case(model: str) -> tuple[Golden, Any, CallContext, Tensor, Condition]:
    golden = next(each for each in GOLDENS if each.pipeline.model == model)
    x, condition = rows_of(golden)
    context = golden.call.resolved(CallContext({**golden.tiny.config, "_class_name": model}))
    return golden, golden.tiny.model(), context, x, condition


@pytest.mark.parametrize("weight", ["none", "data", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("model", ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"])
def test_flow_losses_of_the_examples(model: str, weight: LossWeight) -> None:
    """Noised latents, prediction and weighted loss for fixed draws, as the training scripts of diffusers write them."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    golden, module, context, z, condition = _case(model)
    objective = FlowObjective(0.0, Flow(convention=golden.call.convention), weight, call=called(golden.call, context))
    noisy = objective.draw(Batch(z, condition), Randomness(1).at(0, 0, 2))
    with torch.no_grad():
        losses = objective.losses(module, noisy, objective.predict(module, noisy))
        noise, sigmas = noisy.noise, noisy.t / golden.call.convention.scale
        sigmas = sigmas.view(-1, *[1] * (z.ndim - 1))
        x = (1.0 - sigmas) * z + sigmas * noise
        given = golden.call.arguments(context, x, noisy.t, condition)
        pred = golden.call.output(context, module(**given, return_dict=False)[0], x)
    if weight == "data":  # precondition_outputs of the SD3 example
        error = (pred * (-sigmas) + x - z) ** 2
    else:
        error = compute_loss_weighting_for_sd3(weight, sigmas) * (pred - (noise - z)) ** 2
    torch.testing.assert_close(losses["loss"], error.flatten(1).mean(1), rtol=1e-5, atol=1e-5)


def test_the_loss_of_the_cogvideox_example() -> None:
    """v to x_0 through the scheduler's get_velocity, weighted by 1 / (1 - alpha_bar), at zero terminal SNR too."""
    from diffusers import CogVideoXDPMScheduler

    golden, module, context, z, condition = _case("CogVideoXTransformer3DModel")
    settings = COGVIDEOX | dict(snr_shift_scale=1.0)
    scheduler = CogVideoXDPMScheduler(**settings)
    schedule, prediction = gaussian_schedule({**settings, "_class_name": "CogVideoXDPMScheduler"})
    objective = GaussianObjective(0.0, schedule, call=called(golden.call, context), prediction=prediction)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
    for timesteps in (torch.tensor([3, 700]), torch.tensor([999, 0])):
        noisy = objective.noised(Batch(z, condition), timesteps, noise)
        with torch.no_grad():
            output = objective.predict(module, noisy)
            losses = objective.losses(module, noisy, output)
            frames = z.transpose(1, 2)  # as the example has them
            x = scheduler.add_noise(frames, noise.transpose(1, 2), timesteps)
            given = dict(encoder_hidden_states=condition["embeddings"], timestep=timesteps, return_dict=False)
            model_output = module(hidden_states=x, image_rotary_emb=None, **given)[0]
            model_pred = scheduler.get_velocity(model_output, x, timesteps)
        alphas = scheduler.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1, 1)
        error = (1 / (1 - alphas)) * (model_pred - frames) ** 2
        torch.testing.assert_close(noisy.xt, x.transpose(1, 2).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["loss"], error.flatten(1).mean(1).float(), rtol=1e-3, atol=1e-4)
        assert torch.equal(objective.kd_terms(noisy, output, output)["kd_loss"], torch.zeros(2))
    exact = schedule.velocity(z, timesteps, noise)
    assert float(objective.losses(module, noisy, Prediction(exact))["loss"].max()) < 1e-10


def test_the_loss_of_pixart_is_that_of_the_gaussian_process() -> None:
    """The first channels are the noise, as diffusers adds it; the others a variance."""
    from diffusers import DDPMScheduler

    golden, module, context, z, condition = _case("PixArtTransformer2DModel")
    settings = dict(beta_start=0.0001, beta_end=0.02)
    schedule, prediction = gaussian_schedule({**settings, "_class_name": DPM})
    objective = GaussianObjective(0.0, schedule, call=called(golden.call, context), prediction=prediction)
    noisy = objective.draw(Batch(z, condition), Randomness(1).at(0, 0, 2))
    x = DDPMScheduler(**settings).add_noise(z, noisy.noise, noisy.t)
    torch.testing.assert_close(noisy.xt, x, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        output = objective.predict(module, noisy)
        given = golden.call.arguments(context, x, noisy.t, condition)
        pred = module(**given, return_dict=False)[0].chunk(2, 1)[0]
    losses = objective.losses(module, noisy, output)
    assert output.output.shape[1] == 8
    torch.testing.assert_close(losses["mse"], ((pred - noisy.noise) ** 2).flatten(1).mean(1), rtol=1e-3, atol=1e-4)
    assert (losses["loss"] != losses["mse"]).all()
