"""Tiny models and batches for the laws: milliseconds, and not at any special point of weight space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective

TINY = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=4, num_heads=2, num_classes=5)
ModelFactory = Callable[..., LoadedModel]
NoisyFactory = Callable[..., NoisyBatch]


@pytest.fixture(scope="session")
def tiny_model() -> ModelFactory:
    """tiny_model(seed=0, **sizes): a DiT whose every weight is random, so that every block and branch matters."""

    def make(seed: int = 0, **sizes: Any) -> LoadedModel:
        model = new_model("dit", {**TINY, **sizes}, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.module.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2, generator=generator)
        return dataclasses.replace(model, module=model.module.eval())

    return make


@pytest.fixture(params=["dit", "sit"])
def model(request: pytest.FixtureRequest, tiny_model: ModelFactory) -> LoadedModel:
    """A tiny DiT, and a SiT of the same weights."""
    if request.param == "dit":
        return tiny_model()
    made = new_model("sit", dataclasses.asdict(tiny_model().arch), 0)
    made.module.load_state_dict(tiny_model().module.state_dict(), strict=True)
    return dataclasses.replace(made, module=made.module.eval())


@pytest.fixture(scope="session")
def noisy_batch() -> NoisyFactory:
    """noisy_batch(model, num=3, seed=0, t=None): a drawn batch; `t` replaces the drawn timesteps."""

    def make(model: LoadedModel, num: int = 3, seed: int = 0, t: list[int] | None = None) -> NoisyBatch:
        arch, draws = model.arch, Randomness(seed).at(0, 0, num)
        x = torch.from_numpy(draws.normal("x", (arch.in_channels, arch.input_size, arch.input_size)))
        y = torch.from_numpy(draws.integers("y", arch.num_classes))
        objective = GaussianObjective()
        drawn = objective.draw(Batch(x, class_condition(y, arch.num_classes)), draws)
        if t is None:
            return drawn
        return objective.noised(Batch(x, class_condition(y, arch.num_classes)), torch.tensor(t), drawn.noise)

    return make


@pytest.fixture(scope="session")
def published_tiny() -> Callable[[int, int], LoadedModel]:
    """published_tiny(depth, offset): the DiT of the published numbers, element j of tensor k = 0.05 sin(j + 1 + 7k + offset)."""

    def make(depth: int, offset: int) -> LoadedModel:
        sizes = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=48, depth=depth, num_heads=4, num_classes=5)
        model = new_model("dit", sizes, 0)
        filled = [(name, value) for name, value in model.module.state_dict().items() if name != "pos_embed"]
        for k, (_name, value) in enumerate(filled):
            j = torch.arange(value.numel(), dtype=torch.float64)
            value.copy_((0.05 * torch.sin(j + 1 + 7 * k + offset)).view(value.shape))
        return dataclasses.replace(model, module=model.module.eval())

    return make


@pytest.fixture(scope="session")
def published_noisy() -> NoisyBatch:
    """Images cos(0.37 j), noise sin(0.91 j), t = 0, 250, 999, labels 0, 3, 5 (the null class)."""
    j = torch.arange(3 * 64, dtype=torch.float64)
    x0, noise = (f.float().view(3, 4, 4, 4) for f in (torch.cos(0.37 * j), torch.sin(0.91 * j)))
    batch, t = Batch(x0, class_condition(torch.tensor([0, 3, 5]), 5)), torch.tensor([0, 250, 999])
    return GaussianObjective().noised(batch, t, noise)
