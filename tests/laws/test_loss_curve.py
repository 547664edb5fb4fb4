"""A refactor must not move the losses: short mask learning and recovery of the shipped teacher, digit for digit as recorded.

`tests/assets/digits_loss.txt` holds the curve, full digits. Another processor rounds differently, hence the tolerance; a
change of the computation shows in the third digit at once. To record a new one after a wanted change, run

    python tests/laws/test_loss_curve.py > tests/assets/digits_loss.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tinyfusion import open_model
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

RECORDED = Path(__file__).parents[1] / "assets" / "digits_loss.txt"
TRAINING = TrainingSection(steps=8, batch_size=16, learning_rate=1e-3, learning_rate_end_share=0.1, ema_decay=0.9)


def losses() -> Iterator[tuple[str, int, float]]:
    """(stage, step, loss) of both stages."""
    randomness = Randomness(0)
    batches = ShuffledBatches(load_digits(), randomness, torch.device("cpu"), augment=0.5)
    teacher = open_model("digits")
    plain = GaussianObjective()
    learner = mask_learner(teacher, plain, PruneSection(scheme="1:2", training=TRAINING), seed=1)
    state = TrainState(learner.module, learner.parameter_groups, TRAINING)
    for record in train_steps(state, learner.objective, batches, TRAINING, randomness):
        yield "prune", record.step, float(record.terms["loss"])

    plan = by_indices(teacher, [0, 2, 4, 6, 9, 10])
    student = teacher.cut(plan)
    objective = DistilledObjective(
        plain, frozen(teacher.module), teacher.stack, student.stack, block_pairs(plan), TRAINING.steps
    )
    state = TrainState(student.module, [ParameterGroup(trainable(student.module))], TRAINING)
    for record in train_steps(state, objective, batches, TRAINING, randomness):
        yield "recover", record.step, float(record.terms["loss"])


def test_the_losses_are_the_recorded_ones() -> None:
    recorded = [line.split() for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    found = list(losses())
    assert [(stage, str(step)) for stage, step, _ in found] == [(stage, step) for stage, step, _ in recorded]
    assert [loss for _, _, loss in found] == pytest.approx([float(loss) for _, _, loss in recorded], rel=2e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for stage, step, loss in losses():
        print(stage, step, repr(loss))
