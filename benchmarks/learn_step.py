"""Time a step of mask learning with dense and with skipping gates, at the shape of DiT-XL/2 blocks.

    python benchmarks/learn_step.py --threads 2 --out docs/results/learn-step.md

Both sides are the package's own mask learner on one model with random weights (width 1152, 16 heads, 256 tokens), with the
same noise and masks, alternating in one process: a warm-up turn, then the median of `--repeats` turns with quartiles. A step is
forward, backward, clipping, optimiser and moving average. The floor counts a backward pass with weight gradients as two
forward passes, one without as one, and everything else as 0. Memory is the peak of allocations in forward and backward above
the state before, gradient buffers included in that state.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared import memory_profile, peak_bytes, quartiles, xl_model
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import GatedObjective, MaskLearner, mask_learner
from tinyfusion.training.state import TrainState

# (deltas, scheme, dtype) -> floor, share of it that is wanted
ROWS = {
    ("full", "1:2", "float32"): (1.5, 0.85),
    ("full", "1:4", "float32"): (2.0, 0.85),
    ("lora", "1:2", "float32"): (4 / 3, 0.85),
    ("lora", "1:4", "float32"): (1.6, 0.85),
    ("lora", "1:2", "bfloat16"): (4 / 3, 1.15 * 3 / 4),
}
MEMORY_SHARE, GRADIENT_TOLERANCE = 0.35, 1e-4


@dataclass(frozen=True)
class Side:
    """A learner with its state, and how it runs dropped blocks."""

    learner: MaskLearner
    state: TrainState
    objective: GatedObjective
    dtype: str

    def backward(self, noisy: NoisyBatch) -> None:
        """Forward and backward, as in the loop."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            prediction = self.objective.predict(self.learner.module, noisy)
        self.objective.losses(self.learner.module, noisy, prediction)["loss"].mean().backward()

    def step(self, noisy: NoisyBatch) -> tuple[float, float]:
        """Seconds of a whole step, and of its forward and backward."""
        parameters = list(self.state.parameters.values())
        began = time.perf_counter()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.backward(noisy)
        middle = time.perf_counter()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        self.state.optimizer.step()
        self.state.ema.update()
        return time.perf_counter() - began, middle - began

    def gradients(self, noisy: NoisyBatch) -> dict[str, Tensor]:
        """Gradients of logits and weights."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.backward(noisy)
        return {name: p.grad.clone() for name, p in self.state.parameters.items() if p.grad is not None}

    def peak_bytes(self, noisy: NoisyBatch) -> int:
        """Largest sum of allocations during forward and backward, above the state before."""
        self.state.optimizer.zero_grad(set_to_none=False)
        gc.collect()
        with memory_profile() as recorded:
            self.backward(noisy)
        return peak_bytes(recorded)


def sides_of(teacher: LoadedModel, update: Any, scheme: str, dtype: Any, batch: int) -> dict[str, Side]:
    """The sides to compare; sides of one learner share its state, which does not enter the times."""

    def learner(of_dtype: Any) -> tuple[MaskLearner, TrainState]:
        training = TrainingSection(steps=10_009, batch_size=batch, learning_rate=1e-4, dtype=of_dtype, ema_decay=0.999)
        settings = dataclasses.replace(PruneSection(), scheme=scheme, update=update, training=training)
        made = mask_learner(teacher, GaussianObjective(), settings, seed=0)
        return made, TrainState(made.module, made.parameter_groups, training)

    def side(made: MaskLearner, state: TrainState, dropped: Any) -> Side:
        return Side(made, state, dataclasses.replace(made.objective, dropped=dropped), dtype)

    shared = learner(dtype)
    found = {"dense": side(*shared, "dense"), "skip": side(*shared, "skip")}
    if dtype == "bfloat16":  # the published form casts frozen weights at every call
        found["dense, cast per call"] = side(*learner("float32"), "dense")
    return found


def noisy_batch(side: Side, step: int, batch: int) -> NoisyBatch:
    """Latents, noise, timesteps, labels and the gates' noise of `step`."""
    draws = Randomness(0).at(step, 0, batch)
    x = torch.from_numpy(draws.normal("latents", (4, 32, 32)))
    return side.objective.draw(Batch(x, class_condition(torch.from_numpy(draws.integers("labels", 1000)), 1000)), draws)


def agreement(sides: dict[str, Side], noisy: NoisyBatch) -> tuple[float, float]:
    """Largest difference of gradients of logits, and of weights, relative to the largest value of their tensor."""
    wanted, found = sides["dense"].gradients(noisy), sides["skip"].gradients(noisy)
    assert wanted.keys() == found.keys()
    relative = {n: float((found[n] - w).abs().max() / w.abs().max().clamp_min(1e-30)) for n, w in wanted.items()}
    logits = max(value for name, value in relative.items() if name.startswith("gates."))
    return logits, max(value for name, value in relative.items() if not name.startswith("gates."))


def row(teacher: LoadedModel, key: tuple[str, str, str], batch: int, repeats: int) -> list[str]:
    """Measure one setting: a row of the table per dense side."""
    update, scheme, dtype = key
    floor, share = ROWS[key]
    sides = sides_of(teacher, update, scheme, dtype, batch)
    for side in sides.values():  # also the warm-up: deltas are not zero afterwards
        side.step(noisy_batch(side, 0, batch))
    logits, weights = agreement(sides, noisy_batch(sides["dense"], 1, batch)) if dtype == "float32" else (0.0, 0.0)
    peaks = {name: side.peak_bytes(noisy_batch(side, 1, batch)) / 2**20 for name, side in sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, side in sides.items():
            times[name].append(side.step(noisy_batch(side, 2 + repeat, batch)))
    lines = []
    for name in sides:
        if name == "skip":
            continue
        dense, skip = (np.array(times[n]) for n in (name, "skip"))
        whole, both = np.median(dense, 0) / np.median(skip, 0)
        lower = 1 - peaks["skip"] / peaks[name]
        kept = whole >= share * floor and lower >= MEMORY_SHARE and max(logits, weights) <= GRADIENT_TOLERANCE
        cells = [
            update, scheme, dtype if name == "dense" else f"{dtype}, {name}",
            quartiles(dense[:, 0], 3), quartiles(skip[:, 0], 3), f"{whole:.2f}", f"{both:.2f}",
            quartiles(dense[:, 0] / skip[:, 0], 3), f"{floor:.2f}", f"{whole / floor:.0%}", f"{share:.0%}",
            f"{peaks[name]:,.0f}", f"{peaks['skip']:,.0f}", f"{lower:.0%}",
            *([f"{logits:.0e}", f"{weights:.0e}"] if dtype == "float32" else ["", ""]), "yes" if kept else "no",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def processor() -> str:
    """Name and bfloat16 units of the processor, as far as the system reports them."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        facts = {name.strip(): value.strip() for name, value in facts.items()}
        units = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
        return f"{facts.get('model name', 'unknown processor')}, bfloat16 units: {', '.join(units) or 'none'}"
    return "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4, help="blocks, a multiple of 4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", help="rows whose name contains this, such as lora or bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    teacher = xl_model(options.depth)
    head = [
        "deltas", "scheme", "dtype", "dense s", "skip s", "ratio", "ratio, forward and backward", "ratio by turn", "floor",
        "share of the floor", "goal", "dense peak MiB", "skip peak MiB", "saved", "logits", "weights", "met",
    ]  # fmt: skip
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join(table), flush=True)
    for key in ROWS:
        if not options.only or options.only in " ".join(key):
            table += row(teacher, key, options.batch, options.repeats)
            gc.collect()
    note = (
        f"{options.depth} blocks of width 1152, 16 heads, 256 tokens; batch {options.batch}; {options.threads} threads; "
        f"{options.repeats} turns, median (quartiles); torch {torch.__version__}; {processor()}; "
        f"{time.perf_counter() - began:.0f} s in all."
    )
    print(note)
    if options.out:
        write_text(options.out, "\n".join([*PAGE.strip().split("\n"), "", *table, "", note, ""]))


PAGE = """
# Mask learning step, dense and skipping

```bash
python benchmarks/learn_step.py --threads 2 --out docs/results/learn-step.md
```

Seconds of whole steps: forward, backward, clipping, optimizer, moving average. The floor is the ratio of forward and backward passes
that are counted in [skipping](../skipping.md). `logits` and `weights` are the largest gradient differences between dense and
skipping, relative to the largest value of the tensor. In bfloat16 both sides store frozen weights in bfloat16; `dense, cast per call`
casts them at every call, as the published code does.
"""


if __name__ == "__main__":
    main()
