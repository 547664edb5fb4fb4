"""Models and trainings of two steps for the laws of the library."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tinyfusion as tf
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.models.checkpoint import new_model
from tinyfusion.models.loaded import LoadedModel

TRAINING = tf.TrainingSection(steps=2, batch_size=8, learning_rate=1e-2, ema_decay=0.0)
FEW = tf.DistillStepsSection(num_steps=2, training=dataclasses.replace(TRAINING, clip_groups="apart"))
TASK = tf.Task(lambda model, batch: model(batch[0]), lambda out, batch: (out - batch[1]).square().mean((1, 2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.leave(x)
        return out


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(x, x.roll(1, 1)) for x in (torch.randn(8, 5, 3, generator=generator) for _ in range(2))]


def digits() -> ShuffledBatches:
    return ShuffledBatches(load_digits(), Randomness(0), torch.device("cpu"))


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(one: LoadedModel, other: LoadedModel) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@dataclasses.dataclass(frozen=True)
class Models:
    """A module of one's own, a DiT, a SiT and a student of few steps."""

    own: LoadedModel
    dit: LoadedModel
    sit: LoadedModel
    few: LoadedModel


def made(tiny_model: Any) -> Models:
    """Their weights are the same every time."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 10}
    dit = tiny_model(**sizes)
    sit = new_model("sit", {**sizes, "patch_size": 2, "hidden_size": 16, "depth": 4, "num_heads": 2}, 0)
    return Models(tf.wrap_module(Stack(), ["layers"]), dit, sit, tf.distill_model_steps(dit, dit, digits(), FEW))


def trained(**changes: Any) -> tf.TrainingSection:
    return dataclasses.replace(TRAINING, **changes)


def learn(m: Models, compute: Any = None, seed: Any = 0, **changes: Any) -> tf.LearnedMasks:
    settings = tf.PruneSection(**{"scheme": "1:2", "training": TRAINING, **changes})
    return tf.learn_masks(m.own, TASK, pairs(), settings, compute=compute, seed=seed)


def recover(m: Models, compute: Any = None, **changes: Any) -> LoadedModel:
    settings = tf.RecoverSection(**{"training": TRAINING, **changes})
    return tf.recover_model(tf.prune_model(m.own, [0, 2]), m.own, TASK, pairs(), settings, compute=compute)


def search(m: Models, pruning: Any = None, **changes: Any) -> LoadedModel:
    settings = tf.RecoverSection(**{"search_share": 0.5, "training": TRAINING, **changes})
    return tf.recover_model(m.own, m.own, TASK, pairs(), settings, pruning)


def finetune(m: Models, **changes: Any) -> LoadedModel:
    settings = tf.RecoverSection(method="finetune", **{"training": TRAINING, **changes})
    return tf.recover_model(tf.prune_model(m.own, [0, 2]), None, TASK, pairs(), settings)


def distil(m: Models, argument: float = 1.5, **changes: Any) -> LoadedModel:
    return tf.distill_model_steps(m.dit, m.dit, digits(), dataclasses.replace(FEW, **changes), guidance=argument)


def drawn(model: LoadedModel, labels: Any = (1, 2), seed: int = 0, **changes: Any) -> np.ndarray:
    settings = tf.SampleSection(**{"sampler": "ddim", "num_steps": 2, **changes})
    return tf.sample_images(model, labels, settings, seed=seed)


def recovered(m: Models, task: Any, data: Any, model: LoadedModel | None = None, **changes: Any) -> LoadedModel:
    settings = tf.RecoverSection(method="finetune", training=trained(**changes))
    return tf.recover_model(model or m.dit, None, task, data, settings)
