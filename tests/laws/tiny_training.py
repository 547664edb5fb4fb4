"""Short trainings of tiny models, for the laws of the loop and of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.training.checkpoints import CheckpointWriter
from tinyfusion.training.loop import StepRecord, train_steps
from tinyfusion.training.optim import ParameterGroup
from tinyfusion.training.state import TrainState

STEPS = 6
SETTINGS = TrainingSection(
    steps=STEPS,
    batch_size=4,
    learning_rate=1e-2,
    learning_rate_end_share=0.1,
    warmup_steps=1,
    ema_decay=0.8,
    max_bad_steps=3,
)
RANDOMNESS = Randomness(17)
Job = tuple[TrainState, Objective]
ModelFactory = Callable[..., LoadedModel]


def batches(step: int, batch_size: int, draws: Draws) -> Batch:
    """Images (2, 4, 4) of 5 classes, functions of their address."""
    x = torch.from_numpy(draws.normal("data", (2, 4, 4)))
    return Batch(x, class_condition(torch.from_numpy(draws.integers("label", 5)), 5))


def trainable(model: LoadedModel) -> list[ParameterGroup]:
    return [
        ParameterGroup({n: p for n, p in model.module.named_parameters() if p.requires_grad}, SETTINGS.learning_rate)
    ]


def plain_job(tiny_model: ModelFactory) -> Job:
    model = tiny_model()
    return TrainState(model.module, trainable(model), SETTINGS), GaussianObjective()


def gated_job(tiny_model: ModelFactory, update: Any = "lora") -> Job:
    section = PruneSection(scheme="1:2", update=update, lora_rank=2, training=SETTINGS)
    learner = mask_learner(tiny_model(), GaussianObjective(), section, seed=0)
    return TrainState(learner.module, learner.parameter_groups, SETTINGS), learner.objective


def train(
    job: Job, source: Any = batches, settings: TrainingSection = SETTINGS, until: int | None = None
) -> list[StepRecord]:
    state, objective = job
    records = []
    for record in train_steps(state, objective, source, settings, RANDOMNESS):
        records.append(record)
        if state.step == until:
            break
    return records


def save_checkpoint(folder: Path, state: TrainState, limit: int, every: int = 1) -> None:
    """Save one checkpoint in a single process and wait until it is written."""
    with CheckpointWriter(folder, limit, every) as writer:
        writer.save(state)
