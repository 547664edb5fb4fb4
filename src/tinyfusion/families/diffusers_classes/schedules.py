"""Noise schedules of pipeline folders: what scheduler_config.json and model_index.json mean for training.

Sources: the schedulers of diffusers 0.42; Lin et al., arXiv 2305.08891 (zero terminal SNR).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, Predicted, Schedule

EULER = "FlowMatchEulerDiscreteScheduler"
Settings = Mapping[str, Any]


def training_shift(scheduler: Settings) -> float:
    """The shift in the training examples of diffusers: the static one of an Euler scheduler, else none."""
    if scheduler.get("_class_name") != EULER or scheduler.get("use_dynamic_shifting"):
        return 1.0
    return float(scheduler.get("shift", 1.0))


def expert_range(model_index: Settings, component: str) -> tuple[float, float]:
    """The noise levels that a component of a pipeline is for: of two experts (Wan 2.2) those above or below `boundary_ratio`.

    Raises UserError on a boundary that is no share.
    """
    boundary, two = model_index.get("boundary_ratio"), model_index.get("transformer_2")
    if boundary is None or not two or two[0] is None:
        return 0.0, 1.0
    if not (isinstance(boundary, int | float) and 0 < boundary < 1):
        raise UserError(f"model_index.json has boundary_ratio {boundary}: wanted a number between 0 and 1")
    return (0.0, float(boundary)) if component == "transformer_2" else (float(boundary), 1.0)


# --------------------------------------------------------------------------------------------------------------- Gaussian


def gaussian_schedule(scheduler: Settings) -> tuple[Schedule, Predicted]:
    """The chain of a pipeline folder, from its scheduler_config.json, and what the network predicts.

    Raises UserError on betas or a prediction that are not known.
    """
    num = scheduler.get("num_train_timesteps", NUM_TIMESTEPS)
    if num != NUM_TIMESTEPS:
        raise UserError(f"scheduler_config.json has num_train_timesteps {num}: wanted {NUM_TIMESTEPS}")
    predictions: dict[str, Predicted] = {"epsilon": "epsilon", "v_prediction": "v"}
    named = str(scheduler.get("prediction_type", "epsilon"))
    if named not in predictions:
        raise UserError(
            f"scheduler_config.json has prediction_type {named}: wanted epsilon or v_prediction for a Gaussian model"
        )
    bars = np.cumprod(1.0 - _betas(scheduler))
    if str(scheduler.get("_class_name")).startswith("CogVideoX"):
        scale = float(scheduler.get("snr_shift_scale", 3.0))
        bars = bars / (scale + (1 - scale) * bars)
    if scheduler.get("rescale_betas_zero_snr"):
        roots = np.sqrt(bars)
        bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        if named == "epsilon":
            raise UserError(
                "scheduler_config.json has rescale_betas_zero_snr with prediction_type epsilon, which says nothing at the noise end: "
                "wanted v_prediction"
            )
    return Schedule(betas=1.0 - bars / np.append(1.0, bars[:-1])), predictions[named]


def _betas(scheduler: Settings) -> np.ndarray:
    """The betas of a scheduler, before its signal-to-noise ratio is shifted. Raises UserError on another kind of them."""
    kind, trained = scheduler.get("beta_schedule", "linear"), scheduler.get("trained_betas")
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float64)
        if betas.shape != (NUM_TIMESTEPS,) or not ((betas > 0) & (betas < 1)).all():
            raise UserError(
                f"scheduler_config.json has trained_betas that are not {NUM_TIMESTEPS} numbers between 0 and 1"
            )
        return betas
    first, last = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
    if kind == "linear":
        return np.linspace(first, last, NUM_TIMESTEPS)
    if kind == "scaled_linear":
        return np.asarray(np.linspace(math.sqrt(first), math.sqrt(last), NUM_TIMESTEPS) ** 2)
    raise UserError(f"scheduler_config.json has beta_schedule {kind}: wanted linear or scaled_linear")
