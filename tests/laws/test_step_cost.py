"""The cost of a step apart from its arithmetic: transfers of numbers from the device to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_training import batches
from torch.utils._python_dispatch import TorchDispatchMode

from tinyfusion.config.recipe import ComputeSection, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

# a number of the device that the host asks for by itself (bool, int, float); the loop's one transfer is a list of them
TRANSFERS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def operations(tiny_model: Callable[..., LoadedModel], clip_norm: float) -> list[Any]:
    """What the second step of a training runs; the first one makes tables and moments."""
    model = tiny_model()
    settings = TrainingSection(
        steps=3, batch_size=4, learning_rate=1e-3, learning_rate_end_share=1.0, clip_norm=clip_norm
    )
    state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings)
    engine = Engine("cpu", ComputeSection(prefetch_batches=0))
    steps = train_steps(state, GaussianObjective(), batches, settings, Randomness(0), engine)
    next(steps)
    with Calls() as calls:
        assert next(steps).applied
    return calls.seen


def test_a_step_asks_the_device_for_no_single_number(tiny_model: Callable[..., LoadedModel]) -> None:
    seen = operations(tiny_model, 1e-3)
    assert torch.ops.aten._fused_adamw_.default in seen  # the update is within what was watched
    assert not TRANSFERS & set(seen)


def test_gradients_that_are_short_enough_are_not_multiplied(tiny_model: Callable[..., LoadedModel]) -> None:
    multiply = torch.ops.aten._foreach_mul_.Tensor
    assert operations(tiny_model, 1e-3).count(multiply) == 1
    assert operations(tiny_model, 1e6).count(multiply) == 0
