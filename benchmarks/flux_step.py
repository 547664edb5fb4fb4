"""Time and weigh steps of mask learning and of recovery on a FLUX of real width and few blocks, on the CPU.

    python benchmarks/flux_step.py --threads 2 --out docs/results/flux-step.md

2 + 4 blocks of width 3072, 512 image and 256 text tokens, random weights in bfloat16, everything in one process. Learning: 1:2 masks
with low-rank updates, dense and skipping gates in turns, on one state and the same batches. Recovery: 1 + 2 of the blocks on the
whole model's output, in the ways of the recipe. A step is forward, backward, clipping, optimiser and average. Peak above the weights:
the allocator's records of forward and backward. Plan: what `--dry-run` prints, against the peak resident memory of the process
(VmHWM, reset before a step) minus that before the models were made; the C allocator returns freed blocks to the system. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learn_step import processor
from memory_plan import ENVIRONMENT, resident
from shared import memory_profile, peak_bytes, quartiles, table
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.streams import Streams
from tinyfusion.config.recipe import ComputeSection, PruneSection, Recipe, RecoverSection, TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.jobs.training import Training, mask_training, recovery
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.wrapped import wrap_module
from tinyfusion.processes.task import Task, task_source
from tinyfusion.training.engine import Engine

GIB = 2**30
BOTH = Streams(
    ("hidden_states", "encoder_hidden_states"), ("encoder_hidden_states", "hidden_states"), "hidden_states",
    {"image_rotary_emb": None},
)  # fmt: skip
LOW = TrainingSection(steps=10_000, learning_rate=1e-5, dtype="bfloat16", ema_decay=0.0)
LEAN = replace(LOW, weights="bfloat16")
RECOVERIES: dict[str, tuple[RecoverSection, bool]] = {  # settings, checkpointed blocks
    "all weights, bfloat16, 8-bit moments": (RecoverSection(training=replace(LEAN, optimizer="adamw-8bit")), False),
    "all weights, bfloat16, teacher streamed": (RecoverSection(teacher_storage="streamed", training=LEAN), False),
    "low-rank, teacher shared": (RecoverSection(update="lora", training=LOW), False),
    "low-rank, teacher shared, float8": (RecoverSection(update="lora", teacher_storage="float8", training=LOW), False),
    "low-rank, teacher shared, checkpointing": (RecoverSection(update="lora", training=LOW), True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the batches."""

    batch: int
    tokens: int
    texts: int

    def values(self, _step: int, draws: Draws) -> dict[str, Tensor]:
        """Random inputs of FLUX, and a target."""

        def normal(name: str, *shape: int) -> Tensor:
            return torch.from_numpy(draws.normal(name, shape))

        return {
            "x": normal("x", self.tokens, 64), "texts": normal("texts", self.texts, 4096),
            "pooled": normal("pooled", 768), "t": torch.from_numpy(draws.uniform("t")).float(),
            "target": normal("target", self.tokens, 64),
        }  # fmt: skip

    def task(self) -> Task:
        """Velocity as FLUX is called."""
        image_ids, text_ids = torch.zeros(self.tokens, 3), torch.zeros(self.texts, 3)
        image_ids[:, 2] = torch.arange(self.tokens)

        def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            out: Tensor = model(
                hidden_states=batch["x"], encoder_hidden_states=batch["texts"], pooled_projections=batch["pooled"],
                timestep=batch["t"], guidance=torch.full_like(batch["t"], 3.5), img_ids=image_ids, txt_ids=text_ids,
                return_dict=False,
            )[0]  # fmt: skip
            return out.float()

        return Task(predict, lambda out, batch: (out - batch["target"]).square().mean((1, 2)))


def flux(double: int, single: int, heads: int) -> LoadedModel:
    """A FLUX.1-dev of a few blocks, with random weights in bfloat16."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        module = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads, guidance_embeds=True
        )
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                part._parameters[name] = nn.Parameter(values)
    return wrap_module(module.train(), {"transformer_blocks": BOTH, "single_transformer_blocks": BOTH})


def halved(model: LoadedModel) -> LoadedModel:
    """Every other block of each list."""
    depths = model.stack.depths()
    return model.cut(PrunePlan({n: list(range(0, d, 2)) for n, d in depths.items()}, depths, "indices"))


@dataclass
class Measured:
    """A training, and what its steps took."""

    work: Training
    seconds: list[float]
    peak: int = 0

    def backward(self, noisy: Any) -> None:
        """Forward and backward, as in the loop."""
        objective, model = self.work.objective, self.work.state.model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = objective.predict(model, noisy)
        objective.losses(model, noisy, prediction)["loss"].mean().backward()

    def noisy(self, step: int, batch: int) -> Any:
        """The batch of a step."""
        draws = Randomness(0).at(step, 0, batch)
        return self.work.objective.draw(self.work.source(step, batch, draws), draws)

    def step(self, noisy: Any) -> None:
        """One step, timed."""
        state = self.work.state
        began = time.perf_counter()
        state.optimizer.zero_grad(set_to_none=True)
        self.backward(noisy)
        nn.utils.clip_grad_norm_(list(state.parameters.values()), 1.0, foreach=True)
        state.update(0)
        state.step += 1
        self.seconds.append(time.perf_counter() - began)

    def weigh(self, noisy: Any) -> None:
        """Peak of allocations in forward and backward above weights, states and gradients."""
        for parameter in self.work.state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        gc.collect()
        with memory_profile() as recorded:
            self.backward(noisy)
        self.peak = peak_bytes(recorded)


def planned(work: Training, settings: TrainingSection, run: Callable[[], None], before: int) -> tuple[int, int]:
    """(bytes of the plan, peak resident bytes of `run` above `before`)."""
    plan = work.memory()[1].total
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    run()
    return plan, resident("VmHWM") - before


def learning(make: Callable[[], LoadedModel], sizes: Sizes, repeats: int) -> list[str]:
    """The row of mask learning."""
    before = resident("VmRSS")
    model, task = make(), sizes.task()
    settings = PruneSection(scheme="1:2", update="lora", training=replace(LOW, batch_size=sizes.batch))
    source, _ = task_source(sizes.values, torch.device("cpu"))
    work = mask_training(Recipe(prune=settings), model, task, source, Engine("cpu", ComputeSection(prefetch_batches=0)))
    skip = Measured(work, [])
    dense = Measured(replace(work, objective=replace(work.objective, dropped="dense")), [])
    skip.step(skip.noisy(0, sizes.batch))  # the moments, and everything that loads once
    plan, resident_peak = planned(work, settings.training, lambda: skip.step(skip.noisy(1, sizes.batch)), before)
    dense.step(dense.noisy(1, sizes.batch))
    for side in (dense, skip):
        side.weigh(side.noisy(2, sizes.batch))
        side.seconds.clear()
    for turn in range(repeats):
        noisy = skip.noisy(3 + turn, sizes.batch)
        for side in (dense, skip):
            side.step(noisy)
    ratio = np.median(dense.seconds) / np.median(skip.seconds)
    turns = np.array(dense.seconds) / np.array(skip.seconds)
    saved, off = 1 - skip.peak / dense.peak, plan / resident_peak
    return [
        quartiles(dense.seconds, 2), quartiles(skip.seconds, 2), f"{ratio:.2f}", quartiles(list(turns), 2),
        f"{dense.peak / GIB:.3f}", f"{skip.peak / GIB:.3f}", f"{saved:.0%}", f"{plan / GIB:.2f}",
        f"{resident_peak / GIB:.2f}", f"{off:.3f}",
        "yes" if ratio >= 1.3 and saved >= 0.3 and abs(off - 1) <= 0.15 else "no",
    ]  # fmt: skip


def recovering(make: Callable[[], LoadedModel], name: str, sizes: Sizes, repeats: int) -> list[str]:
    """The row of a way to recover."""
    settings, checkpointed = RECOVERIES[name]
    settings = replace(settings, method="logits-kd", training=replace(settings.training, batch_size=sizes.batch))
    before = resident("VmRSS")
    teacher = make()
    student = halved(teacher)
    source, _ = task_source(sizes.values, torch.device("cpu"))
    compute = ComputeSection(prefetch_batches=0, gradient_checkpointing=checkpointed)
    work = recovery(Recipe(recover=settings), student, teacher, sizes.task(), source, Engine("cpu", compute))
    side = Measured(work, [])
    with work.stack.checkpointed() if checkpointed else nullcontext():
        side.step(side.noisy(0, sizes.batch))
        plan, peak = planned(work, settings.training, lambda: side.step(side.noisy(1, sizes.batch)), before)
        side.weigh(side.noisy(2, sizes.batch))
        side.seconds.clear()
        for turn in range(repeats):
            side.step(side.noisy(3 + turn, sizes.batch))
    ratio = plan / peak
    return [
        name, quartiles(side.seconds, 2), f"{side.peak / GIB:.3f}", f"{plan / GIB:.2f}", f"{peak / GIB:.2f}", f"{ratio:.3f}",
        "yes" if abs(ratio - 1) <= 0.15 else "no",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--heads", type=int, default=24, help="of 128 channels; 24 is the real width")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("learn", "recover"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    warnings.simplefilter("ignore")
    flush_denormals()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    sizes = Sizes(options.batch, options.tokens, options.texts)
    warm = Sizes(2, 16, 8)  # loads diffusers, peft, bitsandbytes and kernels, which are not memory of a training
    learning(lambda: flux(2, 2, 1), warm, 1)
    for name in RECOVERIES:
        recovering(lambda: flux(2, 2, 1), name, warm, 1)
    lines: list[str] = []

    def make() -> LoadedModel:
        return flux(*options.blocks, options.heads)

    if options.only != "recover":
        head = [
            "dense s", "skip s", "ratio", "ratio by turn", "dense peak GiB", "skip peak GiB", "saved", "plan GiB",
            "measured GiB", "plan / measured", "met",
        ]  # fmt: skip
        lines += [
            "## Learning 1:2 masks, low-rank updates",
            "",
            *table(head, learning(make, sizes, options.repeats)),
            "",
        ]
        print("\n".join(lines), flush=True)
    if options.only != "learn":
        head = ["recovery", "seconds", "peak GiB", "plan GiB", "measured GiB", "plan / measured", "within 15 %"]
        rows = []
        for name in RECOVERIES:
            rows.append(recovering(make, name, sizes, options.repeats))
            print(" | ".join(rows[-1]), flush=True)
            gc.collect()
        lines += ["## Recovery of half of the blocks", "", *table(head, *rows), ""]
    double, single = options.blocks
    note = (
        f"{double} + {single} blocks of width {128 * options.heads}, {options.tokens} image and {options.texts} text tokens, batch "
        f"{options.batch}; {options.threads} threads; {options.repeats} turns, median (quartiles); torch {torch.__version__}; "
        f"{processor()}; {time.perf_counter() - began:.0f} s in all."
    )
    print(note)
    if options.out:
        write_text(options.out, "\n".join([*PAGE.strip().split("\n"), "", *lines, note, ""]))


PAGE = """
# Steps of a FLUX of real width

```bash
python benchmarks/flux_step.py --threads 2 --out docs/results/flux-step.md
```

A FluxTransformer2DModel of few blocks with random weights in bfloat16, one process on a CPU. Peak: of allocations in forward and
backward above weights, states and gradients. Plan: the sum that `--dry-run` prints; measured: peak resident memory of a step, minus
that before the models were made. Wanted: skipping at least 1.3 times as fast as dense gating with at least 30 % less memory above the
weights, and a plan within 15 %.
"""


if __name__ == "__main__":
    main()
