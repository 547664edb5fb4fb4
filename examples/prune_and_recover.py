"""Learn which blocks to drop, prune, and recover the model, with a training loop of your own and nothing on disk.

    python examples/prune_and_recover.py [--model digits] [--steps 200] [--batch-size 64]

The two loops are the same function: only the objective differs.
"""

from __future__ import annotations

import argparse

import torch

from tinyfusion import open_model
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner, plan_of
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", help="model, as every verb takes it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    training = TrainingSection(steps=args.steps, batch_size=args.batch_size, ema_decay=0.95)
    settings = PruneSection(scheme="1:2", training=training)
    randomness = Randomness(0)
    batches = ShuffledBatches(load_digits(), randomness, torch.device("cpu"))
    teacher = open_model(args.model)
    plain = GaussianObjective()
    learner = mask_learner(teacher, plain, settings, randomness.generator_seed("lora"))
    state = TrainState(learner.module, learner.parameter_groups, training)
    for record in train_steps(state, learner.objective, batches, training, randomness):
        if record.step % 50 == 0:
            favourite = learner.decision(state.ema, record.step).kept()
            print(f"step {record.step}: loss {float(record.terms['loss']):.4f}, kept {favourite}")
    plan = plan_of(learner.decision(state.ema, args.steps - 1), teacher, settings, seed=0, cost={})

    student = teacher.cut(plan)
    distilled = DistilledObjective(plain, frozen(teacher.module), teacher.stack, student.stack, block_pairs(plan),
                                   alpha_kd=0.9, beta=(1e-2, 0.0), sigmas=2.0, mask="own", steps=args.steps)  # fmt: skip
    state = TrainState(student.module, [ParameterGroup(trainable(student.module))], training)
    *_, last = train_steps(state, distilled, batches, training, randomness)
    state.ema.copy_to(student.module)  # the averaged weights draw better images than the last ones
    print(f"distillation loss at the end {float(last.terms['kd_loss']):.4f}")
    print(f"{len(teacher.stack)} blocks became {len(student.stack)}: {plan.kept}")


if __name__ == "__main__":
    main()
