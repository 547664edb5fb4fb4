"""What the loop costs beside the model: a step of `train_steps` against a bare one, and where its time goes.

    python benchmarks/loop_step.py --case small-float32 --keep /tmp/loop.json --out docs/results/loop-step.md

DiT-S (width 384, 12 blocks, 6 heads), random weights, images in memory. The bare step is forward, losses, backward and fused
AdamW on a batch that is there; ours is what `train_steps` does, draws, clipping, moving average and record included, on the
same batch. Sides have a model each, and take turns in one process: a warm-up turn, then medians with quartiles. The dissected
side is a copy of the step from the same functions, with a clock between its parts. Cases are measured one at a time, and the
page is written from all that are in --keep.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from shared import quartiles, random_model
from tinyfusion.config.recipe import ComputeSection, TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import ImageSet
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import ForwardPass, StepRecord, noisy_microbatches, train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

# name -> words, channels, side, patch, width
SHAPES = {
    "latents": ("DiT-S/2, 32 x 32 x 4: 256 tokens", 4, 32, 2, 384),
    "small": ("DiT-S, 8 x 8 x 1: 16 tokens", 1, 8, 2, 384),
    "narrow": ("width 64, 8 x 8 x 1, jittered", 1, 8, 2, 64),
}
ALLOWED_MS, ALLOWED_SHARE = 2.0, 0.01
LOOSE, TIGHT = 1e6, 1e-3  # clip norms that never bind, and always do
# passes over memory of the size of the trained weights
PASSES = {"gradient norm": 1, "clipping": 2, "AdamW": 7, "moving average": 3}
LOOP_PARTS = ("images and draws", "noising", "gradient norm", "finite, factor", "clipping", "moving average", "record")


class Side:
    """One model and how it is trained: bare, by the loop with so many batches ahead, or dissected."""

    def __init__(self, kind: str, case: argparse.Namespace, dtype: Literal["float32", "bfloat16"], shape: str) -> None:
        _, channels, side, patch, width = SHAPES[shape]
        sizes = dict(input_size=side, patch_size=patch, in_channels=channels, num_heads=6 if width == 384 else 4)
        self.model = random_model(0.02, **sizes, num_classes=10, hidden_size=width, depth=12)
        self.settings = TrainingSection(
            steps=10_000,
            batch_size=case.batch,
            learning_rate=1e-5,
            learning_rate_end_share=1.0,
            dtype=dtype,
            clip_norm=TIGHT if case.clip else LOOSE,
        )
        self.objective = GaussianObjective(10)
        self.state = TrainState(self.model.module, [ParameterGroup(trainable(self.model.module))], self.settings)
        self.randomness = Randomness(0)
        rng = np.random.default_rng(0)
        images = rng.standard_normal((1024, channels, side, side), np.float32).clip(-1, 1)
        labels = rng.integers(0, 10, 1024)
        held = ImageSet("random", images, labels, 10)
        self.source = ShuffledBatches(
            held, self.randomness, torch.device("cpu"), augment=0.5 if shape == "narrow" else 0.0
        )
        ahead = int(kind.rpartition(" ")[2]) if kind.startswith("loop") else 0
        self.engine = Engine("cpu", ComputeSection(prefetch_batches=ahead))
        self.forward = ForwardPass(self.state, self.objective, self.settings)
        self.parts: list[dict[str, tuple[float, float]]] = []
        self.waited: list[float] = []
        self.steps = {"bare": self.bare, "dissected": self.dissected}.get(kind, self.loop)()

    def batch(self, step: int) -> NoisyBatch:
        """The batch of `step`."""
        arguments = (self.objective, self.source, self.settings.batch_size, self.randomness, self.engine)
        made: NoisyBatch = noisy_microbatches(step, *arguments)[0]
        return made

    def loop(self) -> Iterator[None]:
        """The product."""
        arguments = (self.source, self.settings, self.randomness, self.engine)
        for record in train_steps(self.state, self.objective, *arguments):
            self.waited.append(record.waited_s)
            yield

    def bare(self) -> Iterator[None]:
        """Nothing but the model and its optimiser. The batch is made while nobody looks."""
        for step in range(self.settings.steps):
            noisy = self.batch(step)
            yield
            self.state.optimizer.zero_grad(set_to_none=True)
            self.forward(noisy)["loss"].mean().backward()
            self.state.optimizer.step()
            yield

    def dissected(self) -> Iterator[None]:
        """The step of the loop, with a clock between its parts."""
        parameters = list(self.state.parameters.values())
        for step in range(self.settings.steps):
            laps = [("", time.perf_counter(), time.process_time())]

            def lap(name: str, laps: list[tuple[str, float, float]] = laps) -> None:
                laps.append((name, time.perf_counter(), time.process_time()))

            draws = self.randomness.at(step, 0, self.settings.batch_size)
            batch = self.source(step, self.settings.batch_size, draws)
            t = torch.from_numpy(draws.integers("timestep", 1000))
            noise = torch.from_numpy(draws.normal("noise", tuple(batch.x.shape[1:])))
            dropped = torch.from_numpy(draws.uniform("label_drop") < 0.1)
            lap("images and draws")
            noisy = self.objective.noised(batch, t, noise, dropped, step)
            lap("noising")
            self.state.optimizer.zero_grad(set_to_none=True)
            autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16")
            with autocast:
                prediction = self.objective.predict(self.model.module, noisy)
            lap("forward")
            found = self.objective.losses(self.model.module, noisy, prediction)
            lap("losses")
            (found["loss"].sum() / self.settings.batch_size).backward()
            lap("backward")
            norm = self.engine.gradient_norm(parameters)
            lap("gradient norm")
            loss = found["loss"].detach().mean()
            factor = (self.settings.clip_norm or LOOSE) / (norm + 1e-6)
            factor = factor.clamp(max=1.0)
            torch.stack([norm, loss, factor]).tolist()
            lap("finite, factor")
            torch._foreach_mul_([p.grad for p in parameters], factor)
            lap("clipping")
            self.state.optimizer.step()
            lap("AdamW")
            self.state.ema.update()
            lap("moving average")
            terms = {name: values.detach().mean() for name, values in found.items()}
            StepRecord(step, terms, norm, 1e-5, True).values()
            lap("record")
            self.parts.append({name: (wall - w, cpu - c) for (_, w, c), (name, wall, cpu) in pairwise(laps)})
            yield


def turn(kind: str, side: Side) -> tuple[float, float]:
    """Seconds of one step: wall, and all threads of the process."""
    if kind == "bare":
        next(side.steps)  # makes the batch
    began = time.perf_counter(), time.process_time()
    next(side.steps)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def measured(name: str, case: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a case, milliseconds."""
    shape, dtype = name.split("-")
    kinds = case.sides.split(",")
    torch.manual_seed(0)
    sides = {kind: Side(kind, case, "bfloat16" if dtype == "bfloat16" else "float32", shape) for kind in kinds}
    for kind, side in sides.items():
        turn(kind, side)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for repeat in range(case.repeats):
        for place in range(len(kinds)):
            kind = kinds[(place + repeat) % len(kinds)]
            times[kind].append(turn(kind, sides[kind]))
        print(name, {kind: [round(1e3 * s, 1) for s in taken[-1]] for kind, taken in times.items()}, flush=True)
    parts = {
        part: [[1e3 * v for v in taken[part]] for taken in sides["dissected"].parts[1:]]
        for part in sides["dissected"].parts[0]
    }
    trained = sum(p.numel() for p in sides["bare"].state.parameters.values())
    return {
        "name": name, "threads": case.threads, "batch": case.batch, "repeats": case.repeats, "clip": case.clip,
        "times": {kind: [[1e3 * v for v in t] for t in taken] for kind, taken in times.items()},
        "waited": {kind: [1e3 * w for w in side.waited[1:]] for kind, side in sides.items() if side.waited},
        "parts": parts, "bytes": 4 * trained, "load": os.getloadavg()[0],
    }  # fmt: skip


def rate(num_bytes: int, repeats: int = 9) -> float:
    """GB/s at which one tensor of that size is read and written in place, by the time of the processor."""
    values = torch.ones(num_bytes // 4)
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        values.mul_(1.0)
        taken.append(time.process_time() - began)
    return 2 * num_bytes / min(taken) / 1e9


def allowed(bare: float) -> float:
    """Milliseconds that the loop may cost beside a bare step of so many."""
    return ALLOWED_MS + ALLOWED_SHARE * bare


def own(found: dict[str, Any], clock: int) -> float:
    """Milliseconds of all parts that a bare step does not have; clipping only where it is done."""
    parts = [p for p in LOOP_PARTS if found["clip"] or p != "clipping"]
    return float(sum(np.median([v[clock] for v in found["parts"][part]]) for part in parts))


def summary(found: dict[str, Any]) -> str:
    """A case as a line of the first table."""
    shape, dtype = found["name"].split("-")
    times = {kind: np.array(taken) for kind, taken in found["times"].items()}
    bare = times["bare"]
    middle = np.median(bare, 0)
    cells = [
        SHAPES[shape][0], dtype, "binds" if found["clip"] else "does not", str(found["threads"]),
        f"{found['batch']} x {found['repeats']}", quartiles(bare[:, 0], 1), quartiles(bare[:, 1], 1),
    ]  # fmt: skip
    for kind in ("loop 0", "loop 2"):
        for clock in (0, 1):
            cells.append(quartiles(times[kind][:, clock] - bare[:, clock], 1) if kind in times else "")
    clock = 1 if found["threads"] == 1 else 0  # several threads spin while they wait, which is no work
    spent, limit = own(found, clock), allowed(middle[clock])
    cells += [f"{spent:.1f}", f"{limit:.1f}", "yes" if spent <= limit else f"no, {spent - limit:.1f} ms over"]
    cells.append(f"{found['load']:.0f}")
    return "| " + " | ".join(cells) + " |"


def dissection(found: dict[str, Any]) -> list[str]:
    """The parts of a step of a case, a line each."""
    lines = []
    shape, dtype = found["name"].split("-")
    lines += ["", f"{SHAPES[shape][0]}, {dtype}, batch {found['batch']}, {found['threads']} thread(s); in place, memory moves "
              f"{found['rate']:.1f} GB/s:", "",
              "| part | wall ms | processor ms | MB that must move | floor ms | in a bare step |", "|---|---|---|---|---|---|"]  # fmt: skip
    for part, values in found["parts"].items():
        wall, cpu = (np.array(values)[:, clock] for clock in (0, 1))
        moved = PASSES.get(part, 0) * found["bytes"] / 1e6
        skipped = part == "clipping" and not found["clip"]
        cells = [
            part + (" (left out: the factor is 1)" if skipped else ""),
            quartiles(wall, 2), quartiles(cpu, 2), f"{moved:.0f}" if moved else "",
            f"{moved / found['rate']:.1f}" if moved else "", "" if part in LOOP_PARTS else "yes",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(kept: dict[str, Any]) -> str:
    """Everything measured, as a page."""
    head = [
        "shape", "arithmetic", "clipping", "threads", "batch x turns", "bare wall", "bare processor", "in turn - bare, wall",
        "in turn - bare, processor", "2 ahead - bare, wall", "2 ahead - bare, processor", "own parts", "allowed", "kept",
        "load",
    ]  # fmt: skip
    lines = [*PAGE.strip().split("\n"), "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    ordered = sorted(
        kept.values(), key=lambda f: (list(SHAPES).index(f["name"].split("-")[0]), f["threads"], f["clip"])
    )
    lines += [summary(found) for found in ordered]
    lines += ["", *WHERE.strip().split("\n")]
    for found in ordered:
        if found["threads"] == 1 and not found["clip"]:
            lines += dissection(found)
    return "\n".join([*lines, "", *READ.strip().split("\n"), "", f"torch {torch.__version__}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="SHAPE-DTYPE, such as latents-bfloat16")
    parser.add_argument("--sides", default="bare,loop 0,loop 2,dissected")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clip", action="store_true", help="clipping binds at every step; else at none")
    parser.add_argument("--keep", type=Path, required=True, help="numbers of all cases so far, JSON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    torch.set_num_threads(options.threads)
    kept = json.loads(options.keep.read_text(encoding="utf-8")) if options.keep.exists() else {}
    for name in options.case:
        found = measured(name, options)
        found["rate"] = rate(found["bytes"])
        key = " ".join([name, str(options.threads), str(options.batch), str(options.clip)])
        kept = {k: v for k, v in kept.items() if k != key} | {key: found}
        write_text(options.keep, json.dumps(kept))
        print(summary(found), *dissection(found), sep="\n", flush=True)
    if options.out:
        write_text(options.out, page(kept))


PAGE = """
# What the loop costs

```bash
python benchmarks/loop_step.py --case latents-float32 --keep loop.json --out docs/results/loop-step.md
```

A step of `train_steps` against forward, losses, backward and fused AdamW alone, on the same batch; width 384, 12 blocks, 6 heads,
batch 64. Wanted: at most 2 ms + 1 % of the bare step. **Kept at DiT-S/2, in float32 and bfloat16, also where clipping binds (11 ms
more). Not kept at width 384 with 16 tokens**, in either: there the model computes for so short a time that two passes of the loop over
all its weights (gradient norm, moving average) are 3 to 4 % of it, and what memory needs for them alone is above the limit. At width
64 it is on the line. All on a CPU; nothing here says what the loop costs on an accelerator.

All times are milliseconds, medians with quartiles. `wall` is the clock; `processor` is the time of all threads, which a loaded
machine disturbs least, but not never. `in turn` and `2 ahead` are whole steps of the loop, making batches in the step or on a
thread, minus the bare step of the same turn. A step of 10 to 20 s varies by more than all that the loop adds, so whether the
limit is kept is decided by `own parts`: the sum of what only the loop does, each measured by itself in a copy of the step (images
and draws count in full, as if no thread made them). With one thread that is processor time; with two it is wall time, since
threads that wait spin. DiT-S/2 had few turns (2 and 5): its differences say no more than that they are lost in noise.
`load` is the machine's mean load at the end: others computed on its two cores throughout.
"""

WHERE = """
## Where the time of a step goes

The floor is the bytes that a part must move, over the rate at which one tensor of the size of the weights is read and written in
place. That rate was taken once per case; reading alone is slower than it (about 14 GB/s on one core), so a part that only reads
stays above its floor.
"""

READ = """
## What was changed, and what did not help

- **Gradients that need no shortening are not multiplied by 1.** The factor is known to the host with the norm: 86.0 ms to 74.9 ms for
  norm, clipping, AdamW and moving average together (32.5 million weights, one thread, processor time, medians of 20 turns taken
  alternately). Results are the same bit for bit. Where clipping binds, the two passes remain.
- **A step asks the device for numbers once.** Loss, norm and factor come in one transfer, where loss and norm had one each and the
  timesteps' table was moved at every step. On a CPU this is nothing (0.2 ms); on an accelerator every question empties its queue.
  `tests/laws/test_step_cost.py` holds it. Its gain there is not measured.
- **Norm, clipping, AdamW and moving average by pieces that fit a cache** (25 to 2,000 pieces of 16,384 weights and more) gain nothing: 59
  to 66 ms, and 59 ms in one piece, AdamW and moving average, one thread. Nor do large memory pages.
- **The gradient norm as dot products**: 9.5 ms for 10.7 with one thread, other digits, and with two threads on a loaded machine far slower.
  torch takes the norm of a tensor on one thread, whatever their number: the part furthest above its floor, and none of ours.
- **Batches ahead or in turn** make no difference here that can be told from noise: width 64 with jittered images, where a batch
  takes the largest share of a step (1.2 of 90 ms), is the row to look at (101 turns). Ahead does not hurt on two cores whose threads
  all compute, so the default stays at 2, for sources that wait for a disk.

What remains is the price of a moving average and of a gradient norm: four passes over the weights, the same for every number of
tokens and images. Beside them the loop costs 1 ms (16 tokens), with draws 7 ms (DiT-S/2; the noise is 262,144 exact normals).
"""


if __name__ == "__main__":
    main()
