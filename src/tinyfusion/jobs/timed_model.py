"""Timed denoising steps of a model, for `bench`, the speed of a run, and the speed by depth."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tinyfusion.blocks.stack import num_parameters
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import SkippedModel, in_dtype, skipped_run_for
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.macs import model_macs
from tinyfusion.sample.drive import SampleDraws

SPREAD_STEPS = 10  # of a timed trajectory where steps differ, as those of a model with routers do


@dataclass(frozen=True)
class TimedModel:
    """One call of `run` makes `steps` denoising steps of a batch, in sub-networks where the model has routers.

    rows: of the network's batch per image. static_macs: of a complete forward pass of one image.
    """

    skipped: SkippedModel
    num_parameters: int
    static_macs: int
    rows: int
    steps: int
    run: Callable[[], object]

    @property
    def model(self) -> LoadedModel:
        """The model on its device, in the timed type."""
        return self.skipped.model

    @property
    def macs(self) -> float:
        """Multiply-accumulates of a forward pass of one image: of sub-networks the mean so far."""
        return self.skipped.macs_run(self.static_macs)


def timed_model(
    model: LoadedModel, settings: SampleSection, num_images: int, device: torch.device, steps: int | None = None,
    seed: int = 0, dtype: str = "float32", compiled: bool = False,
) -> TimedModel:  # fmt: skip
    """The model on `device`. steps: of a trajectory over all noise levels; None: one typical step, of a model without routers."""
    sampler = sampler_of(settings, model)
    short = sampler.of_steps(steps or 1)
    skipping = skipped_run_for(model, short)  # before any cast
    size, macs = num_parameters(model.module), model_macs(model)
    placed = in_dtype(model, dtype, device)
    skipped = SkippedModel(placed, skipping, compiled)
    table = model.conditions
    condition = table.index(torch.arange(num_images) % len(table)).to(device)
    draws = SampleDraws(Randomness(seed), 0, num_images, device)

    @torch.inference_mode()
    def trajectory() -> object:
        with skipped.running():
            return deque(short.trajectory(placed, condition, draws), maxlen=1).pop()

    if steps is None:
        one_step = torch.inference_mode()(sampler.one_step(placed, condition, draws))
        return TimedModel(skipped, size, macs, sampler.rows, 1, one_step)
    return TimedModel(skipped, size, macs, sampler.rows, short.calls, trajectory)
