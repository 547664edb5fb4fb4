"""Sampling with a model that has routers: its sub-networks are resolved before the first step, and what they leave out is not computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tinyfusion.blocks.dynamics import TokenMode
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.core.rng import Randomness
from tinyfusion.dynamic.macs import total_macs
from tinyfusion.dynamic.subnetworks import KeepTables, SubNetworks, rehearsed, resolve
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.sample.drive import SampleDraws, Sampler


@dataclass(frozen=True)
class SkippedRun:
    """What a sampler will ask of a model's routers of width and depth. tables: decided in float32, before any cast.

    calls: the times of the forward passes of a trajectory, in order; None where the sampler finds them as it goes.
    """

    tables: KeepTables
    calls: tuple[float, ...] | None

    def on(self, model: LoadedModel, compiled: bool) -> SubNetworks:
        """The sub-networks of `model`, on its device and in its type."""
        assert model.dynamic is not None
        device = next(model.module.parameters()).device
        mode: TokenMode = "bucketed" if device.type == "cuda" else "gathered"
        return SubNetworks(model.dynamic, self.tables, mode, self.calls, forms=CompiledForwards() if compiled else None)


def skipped_run_for(model: LoadedModel, sampler: Sampler) -> SkippedRun | None:
    """What `sampler` will ask of `model`; None of a model without routers. Give the model in float32."""
    if model.dynamic is None:
        return None
    cpu = torch.device("cpu")
    draws = SampleDraws(Randomness(0), 0, 1, cpu)
    with torch.no_grad():
        one = model.conditions.index(slice(1))
        times = rehearsed(model, lambda stand_in: sampler.trajectory(stand_in, one, draws))
    return SkippedRun(resolve(model.dynamic, sorted(set(times))), tuple(times) if sampler.fixed_steps else None)


@dataclass(frozen=True)
class SkippedModel:
    """A model as it is sampled. Enter `running` around every forward pass; `report` says what ran."""

    model: LoadedModel
    skipping: SkippedRun | None
    compiled: bool = False

    @cached_property
    def sub_networks(self) -> SubNetworks | None:
        """Sliced weights, cut out once."""
        return None if self.skipping is None else self.skipping.on(self.model, self.compiled)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the context a model with routers runs its sub-networks; another runs as it is."""
        if self.sub_networks is None or self.model.dynamic is None:
            yield
            return
        with self.model.dynamic.using(self.sub_networks):
            yield
        self.sub_networks.check()

    def macs_run(self, static: float) -> float:
        """Multiply-accumulates of a forward pass of one image: `static`, or what sub-networks ran of it on average so far."""
        routed, ran = self.model.dynamic, self.report()
        if routed is None or ran is None:
            return static
        depth, tokens = len(self.model.stack), routed.settings.tokens
        return total_macs(static, routed.sizes, depth, ran["macs_ratio"], tokens)

    def report(self) -> dict[str, Any] | None:
        """What was kept, and the ratio of multiply-accumulates that ran; None of a model without routers."""
        return None if self.sub_networks is None else self.sub_networks.report()
