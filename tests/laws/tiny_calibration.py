"""Calibration sets of tiny models, and the plain loss on them."""

from __future__ import annotations

import torch

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.calibrate import Calibration, calibration_set


def calibrated(
    model: LoadedModel, images: int = 3, batch_size: int = 3, seed: int = 0, available: int = 3
) -> Calibration:
    """Images and labels that are functions of their address."""
    arch = model.arch

    def source(_step: int, _size: int, draws: Draws) -> Batch:
        x = draws.normal("x", (arch.in_channels, arch.input_size, arch.input_size))
        labels = torch.from_numpy(draws.integers("y", arch.num_classes))
        return Batch(torch.from_numpy(x), class_condition(labels, arch.num_classes))

    return calibration_set(GaussianObjective(0.0), source, "random", available, images, batch_size, seed)


@torch.no_grad()
def loss_of(student: LoadedModel, calibration: Calibration) -> float:
    """The mean loss of a model on every batch of a calibration set."""
    objective = calibration.objective
    terms = [objective.losses(student.module, n, objective.predict(student.module, n)) for n in calibration.batches]
    return float(torch.cat([term["loss"] for term in terms]).double().mean())
