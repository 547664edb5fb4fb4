"""Compare the memory plan with the measured memory of a training on the CPU.

    python benchmarks/memory_plan.py [--only NAME] [--threads 2] [--runs runs/memory] [--out docs/results/memory.md]

Each case is a separate process. Measured is its peak resident memory (VmHWM of /proc/self/status, reset before the first step
by /proc/self/clear_refs) over two steps of the package's own loop, minus the resident memory before the models were created and
after a step of a tiny one. The C allocator returns freed blocks of 64 KiB or more to the system, so that resident memory is
memory in use. Finished cases are cached in --runs, so the command resumes where it stopped. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import BlockStack, frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import ComputeSection, PruneSection, TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.families.dit.model import published_arch
from tinyfusion.families.registry import FAMILIES
from tinyfusion.families.sizes import position_table
from tinyfusion.jobs.estimate import fitting_lines, memory_plan
from tinyfusion.jobs.footprint import footprint_of
from tinyfusion.models.checkpoint import LoadedModel, make_trainable
from tinyfusion.models.facts import ModelFacts
from tinyfusion.processes.base import Batch, Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import train_steps
from tinyfusion.training.lora import add_lora
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

GIB = 2**30
TOLERANCE = 0.15
STEPS = 2  # the second begins with moments and ends with gradients as well
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Case:
    """One training. kind: recovery of a DiT-D14/2 by XL/2, learned masks 1:2 with low-rank deltas on XL/2, or S/2 alone."""

    kind: str
    dtype: str
    checkpointing: bool
    batch_size: int
    parts: int = 1

    @property
    def name(self) -> str:
        """Its name in the table and for --only."""
        extra = ", checkpointing" if self.checkpointing else ""
        return f"{self.kind}, {self.dtype}{extra}, batch {self.batch_size}" + (
            f" in {self.sizes}" if self.sizes > 1 else ""
        )


CASES = [
    Case("recover", "float32", False, 2),
    Case("recover", "bfloat16", False, 4),
    Case("learn", "float32", False, 2),
    Case("recover", "float32", True, 2),
    Case("recover", "bfloat16", True, 4),
    Case("recover", "bfloat16", False, 8, 2),
    Case("learn", "bfloat16", True, 4),
    Case("train", "float32", False, 32),
    Case("train", "float32", True, 32),
    Case("train", "bfloat16", False, 32),
    Case("train", "bfloat16", True, 32),
]


def model_of(name: str, seed: int) -> LoadedModel:
    """A published shape with random weights everywhere."""
    arch, family = published_arch(name), FAMILIES["dit"]
    with torch.device("meta"):
        module = family.build(arch)
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if parameter_name == "pos_embed":
                parameter.copy_(position_table(arch.hidden_size, arch.input_size // arch.patch_size))
            else:
                parameter.normal_(std=0.02, generator=generator)
    return LoadedModel(make_trainable(module, family).train(), family, arch, ModelFacts(image_size=256))


def latents(step: int, batch_size: int, draws: Draws) -> Batch:
    """Random latents and labels."""
    x = torch.from_numpy(draws.normal("latents", (4, 32, 32)))
    return Batch(x, class_condition(torch.from_numpy(draws.integers("labels", 1000)), 1000))


@dataclass(frozen=True)
class Made:
    """Objective, state and blocks of a case, and modules that are also resident."""

    state: TrainState
    stack: BlockStack
    objective: Objective
    also_resident: list[torch.nn.Module]


def made(case: Case, settings: TrainingSection) -> Made:
    """Models, objective and state of a case."""
    inner = GaussianObjective()
    if case.kind == "learn":
        teacher = model_of("DiT-XL/2", 0)
        learner = mask_learner(teacher, inner, replace(PruneSection(), scheme="1:2", training=settings), seed=0)
        state = TrainState(learner.module, learner.parameter_groups, settings)
        return Made(state, learner.objective.stack, learner.objective, [teacher.module])
    if case.kind == "train":
        model = model_of("DiT-S/2", 0)
        return Made(
            TrainState(model.module, [ParameterGroup(trainable(model.module))], settings), model.stack, inner, []
        )
    teacher, student = model_of("DiT-XL/2", 0), model_of("DiT-D14/2", 1)
    frozen(teacher.module)
    plan = PrunePlan({"blocks": list(range(0, 28, 2))}, {"blocks": 28}, "indices", groups={"blocks": [[1, 2]] * 14})
    objective = DistilledObjective(
        inner, teacher.module, teacher.stack, student.stack, block_pairs(plan), settings.steps
    )
    state = TrainState(student.module, [ParameterGroup(trainable(student.module))], settings)
    return Made(state, student.stack, objective, [])


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


@contextlib.contextmanager
def blocks_as(stack: BlockStack, compute: ComputeSection) -> Iterator[None]:
    """Within the context the blocks run as `compute` says."""
    with stack.checkpointed() if compute.gradient_checkpointing else contextlib.nullcontext():
        yield


def warm_up(dtype: str) -> None:
    """Load everything that building and a first step load: peft and its libraries, kernels, threads, the optimiser's code."""
    add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), 1, 1.0, 0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model(torch.ones(64, 64)).sum()
    loss.backward()
    optimizer.step()


def measured(case: Case) -> dict[str, Any]:
    """Predict and measure one case, in this process."""
    flush_denormals()
    warm_up(case.dtype)
    before = resident("VmRSS")
    settings = TrainingSection(steps=STEPS, batch_size=case.batch_size, dtype=case.dtype)  # type: ignore[arg-type]
    compute = ComputeSection(gradient_checkpointing=case.checkpointing, gradient_accumulation_steps=case.sizes)
    given = made(case, settings)
    began = time.perf_counter()
    args = given.state.model, given.stack, given.state.parameters, given.objective, latents, settings
    footprint = footprint_of(*args, given.also_resident)
    plan = memory_plan(footprint, settings, compute)
    plan_s = time.perf_counter() - began
    began = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    with blocks_as(given.stack, compute):
        for _ in train_steps(given.state, given.objective, latents, settings, Randomness(0), Engine("cpu", compute)):
            pass
    seconds = time.perf_counter() - began
    lines = [*plan.lines(), "", *fitting_lines(footprint, settings, compute)]
    parts = dict(plan.sizes)
    moving = sum(parts[name] for name in ("gradients", "activations", "casts_of_weights", "batches"))
    return {
        "predicted": plan.total,
        "measured": resident("VmHWM") - before,
        "moving": moving,
        "plan_s": plan_s,
        "step_s": seconds / STEPS,
        "lines": lines,
    }


def kept(case: Case, runs: Path, threads: int) -> dict[str, Any]:
    """The result of a case: cached, else measured in a separate process."""
    file = runs / f"{case.name.replace(', ', '-').replace(' ', '-')}.json"
    if not file.exists():
        command = [sys.executable, __file__, "--threads", str(threads), "--case", json.dumps(asdict(case))]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True)
        runs.mkdir(parents=True, exist_ok=True)
        write_text(file, done.stdout.splitlines()[-1])
    return dict(json.loads(file.read_text(encoding="utf-8")))


def row(case: Case, found: dict[str, Any]) -> str:
    """A row of the table."""
    predicted, measured_bytes, moving = found["predicted"], found["measured"], found["moving"]
    left = measured_bytes - (predicted - moving)
    ratio = predicted / measured_bytes
    cells = (
        case.name,
        f"{predicted / GIB:.2f}",
        f"{measured_bytes / GIB:.2f}",
        f"{ratio:.3f}",
        "yes" if abs(ratio - 1) <= TOLERANCE else "no",
        f"{moving / GIB:.2f}",
        f"{left / GIB:.2f}",
        f"{moving / left:.3f}",
        f"{found['plan_s']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


HEAD = [
    "case", "predicted GiB", "measured GiB", "ratio", f"within {TOLERANCE:.0%}", "per step: predicted",
    "measured", "ratio", "planning s",
]  # fmt: skip

PAGE = """
# Predicted and measured training memory

```bash
python benchmarks/memory_plan.py --threads 2 --out docs/results/memory.md
```

`recover` trains a DiT-D14/2 (14 blocks of width 1152, 256 tokens, random weights) by masked distillation from a DiT-XL/2, `learn`
learns 1:2 masks of XL/2 with low-rank updates, `train` trains DiT-S/2. Predicted is the sum that `--dry-run` prints. Measured is
the peak resident memory of two steps minus that of the process before the models were made; every case has its own process, on a
CPU. The right half omits what does not depend on the batch (weights, moments, averages, teacher) on both sides; it is gradients,
activations, casts and batches. At two to four images a recovery of XL peaks at the end of the backward pass, with all gradients
and one block's activations; the rows of S/2 and `learn` test activations.

CUDA's caching allocator, context and kernel workspaces come on top and are not measured; the table of card sizes reserves a tenth
for them. Memory per process under DDP and FSDP2 is computed, not measured. Trainings of two-stream models, dense and skipping gates,
low-rank updates, stored and streamed teachers are compared in bytes of live tensors: [steps of a FLUX](flux-step.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this, such as bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/memory"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own runs
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measured(Case(**json.loads(options.case)))))
        return
    table = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    print("\n".join(table), flush=True)
    for case in CASES:
        if options.only and options.only not in case.name:
            continue
        found = kept(case, options.runs, options.threads)
        table.append(row(case, found))
        print(table[-1], flush=True)
    note = f"{STEPS} steps, {options.threads} threads, torch {torch.__version__}."
    print("\n".join(["", note]))
    if options.out:
        write_text(options.out, "\n".join([*PAGE.strip().split("\n"), "", *table, "", note, ""]))


if __name__ == "__main__":
    main()
