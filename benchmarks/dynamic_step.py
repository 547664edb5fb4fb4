"""Time a forward pass of a dynamic DiT-XL/2 against the static one: is the time proportional to the multiply-accumulates?

    python benchmarks/dynamic_step.py --threads 2 --out docs/results/dynamic-step.md

Weights are random. Width routers select a random set of heads and groups of the given share in every block, token routers
half of the tokens of this input. Both sides run on the same input, alternating in one process after a warm-up, each as
`sample` runs it. Sub-networks are those of `dynamic/subnetworks.py`: resolved in advance, sliced weights, gathered tokens;
token routers count in time and in multiply-accumulates. A turn has as many passes, at as many times, as a sampler computes
modulations for at once; seconds are per pass. `--clock cpu` measures processor time, for a machine with other work.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shared import quartiles, xl_model
from tinyfusion.blocks.dynamics import total_macs
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rundir import write_text
from tinyfusion.dynamic.subnetworks import ROWS_AHEAD, SubNetworks, resolve
from tinyfusion.jobs.sampling_setup import in_dtype
from tinyfusion.models.attach import attach, detached
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.models.macs import count_macs

CPU = torch.device("cpu")
TIMESTEPS = [float(t) for t in range(990, 350, -20)]  # of a trajectory
ALLOWED = 1.08  # time ratio over ratio of multiply-accumulates
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """What is dynamic: share of heads and groups (1: all), and whether half of the tokens are skipped."""

    name: str
    width: float
    tokens: bool


CASES = [
    Case("width 0.7", 0.7, False),
    Case("width 0.5", 0.5, False),
    Case("tokens 0.5", 1.0, True),
    Case("width 0.7, tokens 0.5", 0.7, True),
    Case("width 0.5, tokens 0.5", 0.5, True),
]


@torch.no_grad()
def dynamic_model(base: LoadedModel, case: Case) -> DynamicModel:
    """A copy of `base` with routers of the case; width routers ignore the timestep."""
    settings = DynamicSettings(width=case.width < 1, tokens=case.tokens, forced_first=False)
    dynamic = attach(base.copy(), settings)
    heads, chooser = dynamic.sizes.num_heads, np.random.Generator(np.random.Philox(0))
    depth = len(dynamic.stack)
    counts = np.diff(np.round(np.linspace(0, case.width * heads * depth, depth + 1))).astype(int)
    for block, count in zip(dynamic.stack, counts, strict=True):
        for name in ("attn_rate", "mlp_rate") if settings.width else ():
            router = block.get_submodule(name).router
            on = torch.from_numpy(chooser.permutation(heads) < count)
            router.weight.zero_()
            router.bias.copy_(torch.where(on, 1.0, -1.0))
    dynamic.module.eval()
    return dynamic


def settle(router: nn.Module) -> None:
    """Make a token router set its bias at its next call so that it selects half of the tokens of that input."""
    plain = router.logits

    def once(x: Tensor) -> Tensor:
        del router.logits
        router.mlp_head[2].bias.sub_(plain(x).median())
        return plain(x)

    router.logits = once


def row(base: LoadedModel, case: Case, batch: int, dtype: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    compiled = options.compile
    dynamic = dynamic_model(base, case)
    tables = resolve(dynamic, TIMESTEPS)  # in float32, before the cast
    static_model = in_dtype(detached(dynamic), dtype, CPU)
    dynamic = in_dtype(dynamic.loaded, dtype, CPU).dynamic
    assert dynamic is not None
    arch = base.arch
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, arch.in_channels, arch.input_size, arch.input_size, generator=generator)
    times = TIMESTEPS[: max(1, ROWS_AHEAD // batch)]

    def passes(module: nn.Module, num: int) -> None:
        for t in times[:num]:
            module(x.to(getattr(torch, dtype)), torch.full((batch,), int(t)), torch.arange(batch))

    if case.tokens:
        for block in dynamic.stack:
            settle(block.token_selection)
        passes(dynamic.module, 1)  # at full cost, which decides the same
    way = SubNetworks(dynamic, tables, calls=times, forms=CompiledForwards() if compiled else None)
    seconds: tuple[list[float], list[float]] = ([], [])

    def run(side: int) -> None:
        model, context = ((static_model, nullcontext()), (dynamic.loaded, dynamic.using(way)))[side]
        with context, model.stack.compiled() if compiled else nullcontext():
            passes(model.module, len(times))

    for side in (0, 1):
        run(side)
    now = CLOCKS[options.clock]
    for turn in range(options.repeats):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            began = now()
            run(side)
            seconds[side].append((now() - began) / len(times))
    static = count_macs(lambda: base.family.build(arch), lambda: base.family.example(arch, 1))
    macs = total_macs(static, dynamic.sizes, arch.depth, way.ratio, case.tokens) / static
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    excess = float(np.median(ratios)) / macs
    cells = (
        dtype, str(batch), case.name, f"{macs:.3f}", quartiles(seconds[0], 2), quartiles(seconds[1], 2),
        quartiles(ratios, 3), f"{1 / np.median(ratios):.2f}", f"{excess:.3f}", "yes" if excess <= ALLOWED else "no",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def note(options: argparse.Namespace, depth: int) -> str:
    """Machine, settings and legend of the table."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}, {depth} blocks of "
        f"DiT-XL/2 at 256 pixels, {'compiled' if options.compile else 'eager'}, {options.repeats} turns, {options.clock} clock, "
        f"load {load} at the end. Median (quartiles). "
        f"Excess is the ratio of times over the ratio of multiply-accumulates of the whole model; wanted: at most {ALLOWED}."
    )


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--depth", type=int, default=28, help="blocks; 28 is the published model")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="cases whose name contains this, such as tokens")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--compile", action="store_true", help="both sides, as `bench --compile` does")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    flush_denormals()
    base = xl_model(options.depth)
    head = ("dtype", "rows", "case", "MACs ratio", "static s", "dynamic s", "time ratio", "faster", "excess", "wanted")
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join(table), flush=True)
    for dtype in options.dtype:
        for batch in options.batch:
            for case in CASES:
                if options.only in case.name:
                    table.append(row(base, case, batch, dtype, options))
                    print(table[-1], flush=True)
    text = f"# A dynamic forward pass\n\n{note(options, options.depth)}\n\n" + "\n".join(table) + "\n"
    print(note(options, options.depth))
    if options.out:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
