"""Recover many masks of a teacher in the same way, and say at which rank the masks of criteria and of learned searches stand.

    python benchmarks/regret.py --runs runs/regret --random 150 --steps 200
    python benchmarks/regret.py --runs runs/regret --table

Half of the blocks of `digits` may be chosen in 924 ways. A sample of them is distilled from the teacher on the same images, noise,
timesteps and label drops, several at once, so that the teacher's output is computed once for all; held-out loss is on the same
noised images for all. Finished masks are reused. Masks are named as the blocks that stay: 0-1-2-3-5-6.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from shared import table
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import ComputeSection, Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.jobs.assemble import batches_for, image_set
from tinyfusion.jobs.folding import fold_guidance, with_taught_target
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.mask_search import Mask, random_masks
from tinyfusion.recover.distill import distilled
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource, train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

Model = TypeVar("Model", bound=LoadedModel)
TOGETHER = 8  # masks that train side by side
FIRST = (0, 1, 2, 3)  # the blocks without which no mask of `digits` is good: all masks that keep them are recovered too


class Remembering(nn.Module):
    """A frozen teacher that runs once per step, for all students of the step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.outputs: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The teacher's output for the first call of the step."""
        if self.outputs is None:
            self.outputs = self.module(*args, **kwargs)
        return self.outputs


def name_of(mask: Sequence[int]) -> str:
    """The blocks that stay, such as 0-1-2-3-5-6."""
    return "-".join(map(str, mask))


def mask_of(name: str) -> Mask:
    """The mask of a name. Raises ValueError on another text."""
    return tuple(sorted(int(block) for block in name.split("-")))


def recipe_of(steps: int) -> Recipe:
    """The recipe digits with so many steps of recovery, of students that predict what the held-out loss measures."""
    sets = (f"recover.training.steps={steps}", "recover.training.ema_decay=0.97", "recover.guidance=none")
    return load_recipe("digits", sets, {"seed": 0})


def recovered(
    teacher: LoadedModel,
    students: Sequence[Model],
    recipe: Recipe,
    objective: Any,
    source: BatchSource,
    losses: list[list[float]] | None = None,
) -> list[Model]:
    """The students distilled side by side: the same images, noise, timesteps and label drops, and one output of the teacher for all.

    losses: gets the losses of all students, step by step.
    """
    recipe = with_taught_target(recipe, teacher, [])
    settings, engine = recipe.recover, Engine("cpu", ComputeSection(prefetch_batches=0))
    taught = Remembering(frozen(teacher.copy().module))
    states, loops = [], []
    for student in students:
        guidance = fold_guidance(recipe, settings, student, teacher, objective)
        goal = replace(distilled(settings, objective, teacher, student, [], guidance=guidance), teacher=taught)
        state = TrainState(student.module.train(), [ParameterGroup(trainable(student.module))], settings.training)
        states.append(state)
        loops.append(train_steps(state, goal, source, settings.training, Randomness(recipe.seed), engine))
    for _ in range(settings.training.steps):
        taught.outputs = None
        made = [next(loop) for loop in loops]
        if losses is not None:
            losses.append([float(record.terms["loss"]) for record in made])
    return [student.with_changed(state.averages()) for student, state in zip(students, states, strict=True)]


def recovered_masks(teacher: LoadedModel, masks: Sequence[Mask], recipe: Recipe) -> list[LoadedModel]:
    """Students of masks of a family's model, distilled side by side."""
    objective = objective_for(teacher, with_taught_target(recipe, teacher, []).recover.training.label_drop, recipe)
    source = batches_for(recipe, teacher, torch.device("cpu"))
    students = [teacher.cut(by_indices(teacher, list(mask), 0)) for mask in masks]
    return recovered(teacher, students, recipe, objective, source)


@torch.inference_mode()
def heldout_loss(model: LoadedModel, calibration: Calibration) -> float:
    """Mean training loss without label drops."""
    model.module.eval()
    terms = [
        calibration.objective.losses(model.module, noisy, calibration.objective.predict(model.module, noisy))["loss"]
        for noisy in calibration.batches
    ]
    return float(torch.cat(terms).double().mean())


def rank_lines(losses: dict[str, float], sample: Sequence[str], named: dict[str, str]) -> list[str]:
    """A row per named mask: its loss, and the share of the random sample that is better."""
    values = np.array([losses[name] for name in sample])
    best = min(losses, key=losses.__getitem__)
    rows = []
    for title, name in named.items():
        if name in losses:
            better = int((values < losses[name]).sum())
            rows.append([title, name.replace("-", " "), f"{losses[name]:.5f}", f"{better + 1} of {len(values) + 1}",
                         f"{1000 * (losses[name] - losses[best]):.2f}"])  # fmt: skip
    head = ["chosen by", "kept", "held-out loss", "rank among random masks", "1000 x above the best of all"]
    spread = f"{values.min():.4f} to {values.max():.4f}, median {np.median(values):.4f}"
    return [*table(head, *sorted(rows, key=lambda row: row[2])), "", f"{len(values)} random masks: {spread}. Best of all {len(losses)}: "
            f"{best.replace('-', ' ')}, {losses[best]:.5f}."]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/regret"))
    parser.add_argument("--random", type=int, default=150, help="masks of the random sample, at least 2")
    parser.add_argument("--steps", type=int, default=200, help="steps of each recovery")
    parser.add_argument("--mask", action="append", default=[], metavar="NAME=0-1-2-3-5-6", help="a mask to rank")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, recover nothing")
    options = parser.parse_args()
    if options.random < 2:
        parser.error("--random wants at least 2")
    torch.set_num_threads(1)
    flush_denormals()
    teacher, recipe = open_model("digits"), recipe_of(options.steps)
    depth = len(teacher.stack)
    group = BlockGroup(0, depth, depth // 2)
    sample = [name_of(mask) for mask in random_masks([group], options.random, 0)]
    near = [name_of((*FIRST, a, b)) for a in range(len(FIRST), depth) for b in range(a + 1, depth)]
    named = dict(text.split("=", 1) for text in options.mask)
    file = options.runs / f"losses-{options.steps}.json"
    losses: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    heldout = image_set("digits:heldout")
    source = ShuffledBatches(heldout, Randomness(0), torch.device("cpu"))
    calibration = calibration_set(
        objective_for(teacher, 0.0, recipe), source, "digits:heldout", len(heldout), 2048, 256, 0
    )
    missing = [name for name in dict.fromkeys([*named.values(), *near, *sample]) if name not in losses]
    options.runs.mkdir(parents=True, exist_ok=True)
    for first in range(0, 0 if options.table else len(missing), TOGETHER):
        names = missing[first : first + TOGETHER]
        students = recovered_masks(teacher, [mask_of(name) for name in names], recipe)
        losses |= {name: heldout_loss(model, calibration) for name, model in zip(names, students, strict=True)}
        file.write_text(json.dumps(losses, indent=1) + "\n")
        print(f"{len(losses)} masks, {first + len(names)} of {len(missing)} in this sitting", flush=True)
    print(f"teacher: {heldout_loss(teacher, calibration):.5f}")
    print("\n".join(rank_lines(losses, [name for name in sample if name in losses], named)))


if __name__ == "__main__":
    main()
