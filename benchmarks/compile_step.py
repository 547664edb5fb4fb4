"""Time a training step with eager and with compiled blocks: plain, mask learning with skipping gates, distillation.

    python benchmarks/compile_step.py --threads 1 --out docs/results/compile.md

A step is forward and backward of the package's own objectives on one model with random weights, without the optimiser. Both
sides read the same batch and alternate in one process after a warm-up; compilation has a column of its own. Gates keep half
of the blocks (1:2), so blocks see batches of many sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared import quartiles, random_model
from tinyfusion.blocks.forwards import Gain, measured_gain
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import BlockStack, frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective

# name -> sizes, batch size
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "digits": (dict(input_size=8, patch_size=2, in_channels=1, hidden_size=64, num_heads=4, depth=12), 64),
    "DiT-S/2": (dict(input_size=32, patch_size=2, in_channels=4, hidden_size=384, num_heads=6, depth=12), 8),
}
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """The module that trains, its objective, and every stack of blocks that can be compiled."""

    module: Any
    objective: Any
    stacks: Sequence[BlockStack]


def plain(teacher: LoadedModel) -> Case:
    """Training from scratch."""
    return Case(teacher.module, GaussianObjective(), [teacher.stack])


def learning(teacher: LoadedModel) -> Case:
    """Learning a 1:2 mask together with all weights."""
    settings = dataclasses.replace(PruneSection(), scheme="1:2", update="full")
    learner = mask_learner(teacher, GaussianObjective(), settings, seed=0)
    return Case(learner.module, learner.objective, [learner.objective.stack])


def recovery(teacher: LoadedModel) -> Case:
    """Masked distillation into every second block."""
    depth = len(teacher.stack)
    groups = {"blocks": [[1, 2]] * (depth // 2)}
    plan = PrunePlan({"blocks": list(range(0, depth, 2))}, {"blocks": depth}, "indices", groups=groups)
    student = teacher.cut(plan)
    frozen(teacher.module)
    stacks = teacher.stack, student.stack
    objective = DistilledObjective(
        GaussianObjective(), teacher.module, *stacks, block_pairs(plan), steps=1, beta=(1e-2, 1e-2)
    )
    return Case(student.module, objective, stacks)


CASES: dict[str, Callable[[LoadedModel], Case]] = {"plain": plain, "learning": learning, "recovery": recovery}


def step(case: Case, noisy: Any, compiled: bool) -> list[Tensor]:
    """Forward and backward: losses and gradients."""
    case.module.zero_grad(set_to_none=True)
    with ExitStack() as contexts:
        for stack in case.stacks if compiled else ():
            contexts.enter_context(stack.compiled())
        prediction = case.objective.predict(case.module, noisy)
    losses = case.objective.losses(case.module, noisy, prediction)["loss"]
    losses.mean().backward()
    return [losses, *(p.grad for p in case.module.parameters() if p.grad is not None)]


def measure(case: Case, noisy: Any, repeats: int) -> tuple[Gain, list[float], list[float]]:
    """The gain as the package measures it, then milliseconds of `repeats` turns of each side."""
    gain = measured_gain(lambda: step(case, noisy, False), lambda: step(case, noisy, True), torch.device("cpu"), 1)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            began = time.perf_counter()
            step(case, noisy, bool(side))
            times[side].append(1000 * (time.perf_counter() - began))
    return gain, *times


def row(shape: str, name: str, repeats: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    sizes, batch = SHAPES[shape]
    teacher = random_model(0.05, **sizes, num_classes=NUM_CLASSES)
    case = CASES[name](teacher)
    draws = Randomness(0).at(0, 0, batch)
    side = sizes["input_size"]
    x = torch.from_numpy(draws.normal("x", (sizes["in_channels"], side, side)))
    noisy = case.objective.draw(
        Batch(x, class_condition(torch.from_numpy(draws.integers("y", NUM_CLASSES)), NUM_CLASSES)), draws
    )
    gain, eager, compiled = measure(case, noisy, repeats)
    ratios = [a / b for a, b in zip(eager, compiled, strict=True)]
    cells = shape, str(batch), name, quartiles(eager, 0), quartiles(compiled, 0), quartiles(ratios, 2)
    return "| " + " | ".join([*cells, f"{gain.compile_s:.0f}", f"{gain.apart:.0e}", _faster(ratios)]) + " |"


def _faster(ratios: Sequence[float]) -> str:
    """Whether three quarters of the turns were faster compiled."""
    return "yes" if float(np.percentile(ratios, 25)) > 1 else "not beyond the spread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="rows whose name contains this, such as digits or recovery")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    flush_denormals()
    head = "shape", "batch", "step", "eager ms", "compiled ms", "eager / compiled", "compile s", "difference", "faster"
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join(table), flush=True)
    for shape in SHAPES:
        for name in CASES:
            if options.only in f"{shape} {name}":
                table.append(row(shape, name, options.repeats))
                print(table[-1], flush=True)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    note = (
        f"CPU, {options.threads} threads, {platform.machine()}, float32, torch {torch.__version__}; median (quartiles) of "
        f"{options.repeats} turns; load averages at the end {load} on {os.cpu_count()} processors."
    )
    print(note)
    if options.out:
        write_text(options.out, "\n".join([*PAGE.strip().split("\n"), "", *table, "", note, ""]))


PAGE = """
# Training step with compiled blocks

```bash
python benchmarks/compile_step.py --threads 1 --out docs/results/compile.md
```

Milliseconds of a forward and a backward pass on the same batch, eager and compiled in alternation. Compilation is paid once per process;
later rows of a shape reuse the compiler's cache. The difference is the largest relative one of losses and gradients.
`faster`: in three quarters of the turns.
"""


if __name__ == "__main__":
    main()
