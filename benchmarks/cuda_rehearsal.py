"""Rehearse the CUDA code paths on a machine without a GPU: fake CUDA tensors raise where devices mix.

    python benchmarks/cuda_rehearsal.py [--only TEXT]

Needs a CUDA build of torch, but no device. Every training, criterion and sampler of every family runs on `FakeTensorMode`,
where tensors have a device, a shape and a type, but no values. Forward passes, losses, optimiser steps, averages and samplers
are the real code; numbers that the code reads back from the device are stand-ins (1), and the backward pass gives gradients of
zero. So it finds tensors on the wrong device, transfers that cannot be and types that do not match, and no wrong value. Fake
tensors belong to one thread: batches are made in turn, and copies from pinned memory count as plain copies. Not
rehearsed: dpm-solver++ and unipc, whose schedulers look their steps up by value. Exit status 1 where a rehearsal fails; 0, with
the reason, where torch has no CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.process_sections import FlowSampleSection
from tinyfusion.config.recipe import (
    ComputeSection,
    PruneSection,
    Recipe,
    RecoverSection,
    SampleSection,
    TrainingSection,
)
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import ImageSet
from tinyfusion.dynamic.train import DynamicObjective
from tinyfusion.families.registry import FAMILIES
from tinyfusion.jobs.process_specs import objective_for, sampler_of
from tinyfusion.models.attach import attach
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.prune.calibrate import calibration_set
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.criteria import decide
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import distilled
from tinyfusion.sample.drive import sample
from tinyfusion.training import loop
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

CUDA = torch.device("cuda", 0)
SIZES = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=4, num_heads=2, num_classes=5)
MORE = {
    "mar": {"buffer_size": 3, "head_depth": 2, "head_width": 8},
    "pixart": {"caption_tokens": 3, "caption_channels": 8},
}
TRAINING = TrainingSection(steps=2, batch_size=8, ema_decay=0.9)
Rehearsal = Callable[[], None]


class StandInNumbers(TorchDispatchMode):
    """What the host reads from a device is 1, and tensors that are compared are equal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.equal.default:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def on_fake_cuda() -> Iterator[None]:
    """Within the context tensors are fake, and what fake tensors cannot do is replaced."""
    plain_update = loop._update

    def update(state: TrainState, *rest: Any) -> Any:
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        return plain_update(state, *rest)

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`nn.Module._apply` with new parameters instead of swapped storage."""
        for child in self.children():
            child._apply(function)
        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                with torch.no_grad():
                    self._parameters[name] = nn.Parameter(function(parameter), parameter.requires_grad)
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                self._buffers[name] = function(buffer)
        return self

    def numbers(self: Tensor, *_: Any, **__: Any) -> np.ndarray:
        if self.device.type != "cpu":
            raise TypeError(f"numpy() of a tensor on {self.device}: move it to the host first")
        return np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    with ExitStack() as entered:
        for owner, name, stand_in in (
            (loop, "_update", update),
            (Tensor, "backward", lambda self, *args, **kwargs: None),
            (Tensor, "pin_memory", lambda self, *args, **kwargs: self),
            (Tensor, "numpy", numbers),
            (nn.Module, "_apply", apply),
            (
                torch.cuda.amp.common,
                "amp_definitely_not_available",
                lambda: False,
            ),  # else autocast is off without a device
            (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        ):
            entered.enter_context(mock.patch.object(owner, name, stand_in))
        entered.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        entered.enter_context(StandInNumbers())
        yield


def model_of(family: str, **sizes: Any) -> LoadedModel:
    """A tiny model of a family on the fake device."""
    made = new_model(family, {**SIZES, **MORE.get(family, {}), **sizes}, 0)
    return dataclasses.replace(made, module=made.module.to(CUDA))


def batches(model: LoadedModel) -> ShuffledBatches:
    """Random images that fit the model."""
    arch = model.arch
    x = np.zeros((32, arch.in_channels, arch.input_size, arch.input_size), np.float32)
    images = ImageSet("random", x, np.arange(32, dtype=np.int64) % arch.num_classes, arch.num_classes)
    return ShuffledBatches(images, Randomness(0), CUDA, augment=0.5, flip=0.5)


def train(state: TrainState, objective: Any, model: LoadedModel, settings: TrainingSection, **compute: Any) -> None:
    """Two steps, with the average taken out at the end."""
    engine = Engine(CUDA, ComputeSection(prefetch_batches=0, **compute))
    for record in loop.train_steps(state, objective, batches(model), settings, Randomness(0), engine):
        record.values()
    state.averages()


def learning(family: str, dtype: str, **changes: Any) -> Rehearsal:
    def run() -> None:
        model = model_of(family)
        training = dataclasses.replace(TRAINING, dtype=dtype)
        settings = dataclasses.replace(PruneSection(scheme="1:2", training=training), **changes)
        learner = mask_learner(model, objective_for(model, 0.1, Recipe()), settings, 0, CUDA)
        state = TrainState(learner.module, learner.parameter_groups, training)
        train(state, learner.objective, model, training)
        learner.decision(state.ema, 1).kept()

    return run


def recovery(family: str, method: str, dtype: str, checkpointed: bool = False) -> Rehearsal:
    def run() -> None:
        teacher = model_of(family)
        depths = teacher.stack.depths()
        plan = PrunePlan(
            kept={name: [0, depth - 1] for name, depth in depths.items()}, depth=depths, criterion="indices"
        )
        student = teacher.cut(plan)
        training = dataclasses.replace(TRAINING, dtype=dtype)
        inner = objective_for(student, 0.1, Recipe())
        frozen(teacher.module)
        settings = RecoverSection(method=method, training=training)  # type: ignore[arg-type]
        objective = inner if method == "finetune" else distilled(settings, inner, teacher, student, block_pairs(plan))
        state = TrainState(student.module, [ParameterGroup(trainable(student.module))], training)
        with student.stack.checkpointed() if checkpointed else ExitStack():
            train(state, objective, student, training)

    return run


def criterion(family: str, name: str) -> Rehearsal:
    def run() -> None:
        model = model_of(family)
        source = batches(model)
        calibration = calibration_set(objective_for(model, 0.0, Recipe()), source, "random", 32, 8, 4, 0)
        decide(CriterionContext(model, PruneSection(criterion=name), 0, calibration))  # type: ignore[arg-type]

    return run


def sampling(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Rehearsal:
    def run() -> None:
        model = model_of(family)
        model.module.to(dtype)
        sampler = sampler_of(SampleSection(num_images=4, guidance=1.5, **settings), model)
        for batch in sample(model, [0, 1, 2, 3], sampler, 0, 4):
            batch.x.cpu()

    return run


def routed(family: str, dtype: str, auxiliary: str) -> Rehearsal:
    def run() -> None:
        model = model_of(family)
        dynamic = attach(model, DynamicSettings(), 0)
        model.module.to(CUDA).train()
        training = dataclasses.replace(TRAINING, dtype=dtype)
        objective = DynamicObjective(
            inner=objective_for(model, 0.1, Recipe()), dynamic=dynamic, target=0.5, num_classes=model.arch.num_classes,
            label_drop=0.1, ramp_steps=1, weight=2.0, auxiliary=auxiliary, auxiliary_steps=2, auxiliary_weight=1.0,
            teacher=model_of(family).module if auxiliary == "teacher" else None, finish_from=1, strata=4,
        )  # type: ignore[arg-type]  # fmt: skip
        state = TrainState(model.module, [ParameterGroup(trainable(model.module))], training)
        train(state, objective, model, training)

    return run


def rehearsals() -> dict[str, Rehearsal]:
    """Everything that is rehearsed, by name."""
    listed: dict[str, Rehearsal] = {}
    distributions: dict[str, dict[str, Any]] = {
        "categorical": {},
        "marginals": {"distribution": "subset"},
        "gumbel": {"distribution": "subset", "subset_estimator": "gumbel-top-k"},
        "score": {"distribution": "subset", "subset_estimator": "score"},
    }
    for family in FAMILIES:
        for name, changes in distributions.items():
            for update in ("lora", "full", "frozen"):
                listed[f"learn {family} {name} {update}"] = learning(family, "float32", update=update, **changes)
        listed[f"learn {family} dense"] = learning(family, "float32", dropped="dense")
        for dtype in ("bfloat16", "float16"):
            listed[f"learn {family} {dtype}"] = learning(family, dtype)
        for method in ("finetune", "logits-kd", "rep-kd", "masked-kd"):
            listed[f"recover {family} {method}"] = recovery(family, method, "float32")
        listed[f"recover {family} bfloat16"] = recovery(family, "masked-kd", "bfloat16")
        listed[f"recover {family} checkpointed"] = recovery(family, "masked-kd", "float32", checkpointed=True)
        for name in ("bi", "sensitivity", "min-loss"):
            listed[f"criterion {family} {name}"] = criterion(family, name)
        few: dict[str, Any] = {"num_steps": 4 if family == "mar" else 10}
        if family == "sit":
            few["flow"] = FlowSampleSection(method="heun2")
        listed[f"sample {family}"] = sampling(family, **few)
        listed[f"sample {family} bfloat16"] = sampling(family, torch.bfloat16, **few)
    for family in ("dit", "sit"):
        for auxiliary in ("complete", "teacher", "none"):
            listed[f"dynamic {family} {auxiliary}"] = routed(family, "float32", auxiliary)
        listed[f"dynamic {family} bfloat16"] = routed(family, "bfloat16", "complete")
    listed["sample dit ddim"] = sampling(
        "dit", sampler="ddim", num_steps=10
    )  # fast solvers look steps up by value: not here
    listed["sample sit sde"] = sampling("sit", sampler="sde", num_steps=10)
    return listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rehearse only what has this text in its name")
    wanted = parser.parse_args().only
    if not torch.backends.cuda.is_built():
        print(f"skipped: torch {torch.__version__} is built without CUDA; a CUDA build needs no GPU for this")
        return 0
    warnings.filterwarnings(
        "ignore", message="Accessing the data pointer of FakeTensor"
    )  # torch asks whether a copy is lazy
    failed = 0
    listed = {name: run for name, run in rehearsals().items() if wanted in name}
    for name, run in listed.items():
        try:
            with on_fake_cuda():
                run()
        except Exception as error:
            failed += 1
            place = [f for f in traceback.extract_tb(error.__traceback__) if "tinyfusion" in f.filename][-1:]
            where = f"{place[0].filename.rpartition('tinyfusion/')[2]}:{place[0].lineno}" if place else "outside"
            print(f"FAILED {name}: {where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    print(f"{len(listed) - failed} of {len(listed)} rehearsals passed, torch {torch.__version__}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
