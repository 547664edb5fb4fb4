"""Time and weigh steps of mask learning and of recovery on a FLUX of few blocks, on the CPU.

    python benchmarks/flux_step.py --threads 1 --heads 4 --repeats 5 --out docs/results/flux-step.md

2 + 4 blocks of width 512, or without --heads of the real 3072; 512 image and 256 text tokens, random weights in bfloat16. Learning:
1:2 masks with low-rank updates, dense and skipping gates in turns, on one state and the same batches. Recovery: 1 + 2 of the blocks
on the whole model's output, in several settings of the recipe. A step is forward, backward, clipping, optimiser and average; one
before the measured ones makes the moments. Seconds are of the processor, which other programs lengthen less than those of a clock.
Memory is bytes of live tensors, from the records of torch's allocator since before the models were made: the same in every run, and
without the program, the kernels' own buffers and what the C allocator retains. Peak: the most in a step minus that before it.
Measured: the most in a step. Plan: the sum that `--dry-run` prints.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from learn_step import processor
from shared import live_bytes, memory_profile, quartiles, table
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.streams import Streams
from tinyfusion.config.recipe import ComputeSection, PruneSection, Recipe, RecoverSection, TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.jobs.recovery import recovery
from tinyfusion.jobs.training import Training, mask_training
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.wrapped import wrap_module
from tinyfusion.processes.task import Task, task_source
from tinyfusion.training.engine import Engine

GIB = 2**30
TOLERANCE, FASTER, SAVED = 0.15, 1.3, 0.3  # of the plan; wanted of skipping
BOTH = Streams(
    ("hidden_states", "encoder_hidden_states"), ("encoder_hidden_states", "hidden_states"), "hidden_states",
    {"image_rotary_emb": None},
)  # fmt: skip
LOW = TrainingSection(steps=10_000, learning_rate=1e-5, dtype="bfloat16", ema_decay=0.0)
LEAN = replace(LOW, weights="bfloat16")
DENSE, SKIP = "masks 1:2, low-rank, dense gates", "masks 1:2, low-rank, skipping gates"
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
            return torch.from_numpy(draws.normal(name, shape)).clone()  # torch's own, which its records contain

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


class OwnThread:
    """An executor in the caller's thread, whose allocations are those that are recorded."""

    def __init__(self, *_args: Any, **_settings: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call `function` now."""
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done


@dataclass
class Side:
    """A training and the processor seconds of its steps."""

    name: str
    work: Training
    seconds: list[float] = field(default_factory=list)

    def step(self, step: int) -> None:
        """One step on its batch. It is timed, and marked in the records."""
        state, objective = self.work.state, self.work.objective
        batch = self.work.settings.batch_size
        draws = Randomness(0).at(step, 0, batch)
        noisy = objective.draw(self.work.source(step, batch, draws), draws)
        state.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        began = time.process_time()
        with record_function(self.name), self.work.in_place():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction = objective.predict(state.model, noisy)
            loss = objective.losses(state.model, noisy, prediction)["loss"].mean()
            del prediction
            loss.backward()
            nn.utils.clip_grad_norm_(list(state.parameters.values()), 1.0, foreach=True)
            state.update(0)
        state.step += 1
        self.seconds.append(time.process_time() - began)


@dataclass(frozen=True)
class Row:
    """Measured steps of a training: seconds of each, and bytes: most above those before a step, most of all, and planned."""

    name: str
    seconds: list[float]
    peak: int
    measured: int
    plan: int

    @property
    def ratio(self) -> float:
        """Planned over measured bytes."""
        return self.plan / self.measured

    def cells(self) -> list[str]:
        """The row of the table."""
        sizes = (f"{size / GIB:.3f}" for size in (self.peak, self.plan, self.measured))
        within = "yes" if abs(self.ratio - 1) <= TOLERANCE else "no"
        return [self.name, quartiles(self.seconds, 2), *sizes, f"{self.ratio:.3f}", within]


def rows_of(make: Callable[[], Sequence[Side]], repeats: int) -> Iterator[Row]:
    """Make the sides and step them in turns, one step of each before the measured ones, all of it recorded."""
    with memory_profile() as recorded:
        sides = make()
        for side in sides:
            side.step(0)
        for turn in range(repeats):
            for side in sides:
                side.step(1 + turn)
    for side in sides:
        spans = live_bytes(recorded, side.name)[1:]
        peak, measured = max(most - before for before, most in spans), max(most for _, most in spans)
        yield Row(side.name, side.seconds[1:], peak, measured, side.work.memory()[1].total)


def learning(make: Callable[[], LoadedModel], sizes: Sizes) -> list[Side]:
    """Mask learning with dense and with skipping gates, on one state."""
    settings = PruneSection(scheme="1:2", update="lora", training=replace(LOW, batch_size=sizes.batch))
    source, _ = task_source(sizes.values, torch.device("cpu"))
    engine = Engine("cpu", ComputeSection(prefetch_batches=0))
    skip = mask_training(Recipe(prune=settings), make(), sizes.task(), source, engine)
    dense = replace(skip, objective=replace(skip.objective, dropped="dense"))
    return [Side(DENSE, dense), Side(SKIP, skip)]


def recovering(make: Callable[[], LoadedModel], name: str, sizes: Sizes) -> list[Side]:
    """A way to recover."""
    settings, checkpointed = RECOVERIES[name]
    settings = replace(settings, method="logits-kd", training=replace(settings.training, batch_size=sizes.batch))
    teacher = make()
    source, _ = task_source(sizes.values, torch.device("cpu"))
    engine = Engine("cpu", ComputeSection(prefetch_batches=0, gradient_checkpointing=checkpointed))
    with mock.patch("tinyfusion.recover.storage.ThreadPoolExecutor", OwnThread):
        work = recovery(Recipe(recover=settings), halved(teacher), teacher, sizes.task(), source, engine)
    return [Side(name, work)]


def comparison(rows: Mapping[str, Row]) -> str:
    """Skipping against dense gates, as a sentence."""
    dense, skip = rows[DENSE], rows[SKIP]
    ratio = np.median(dense.seconds) / np.median(skip.seconds)
    turns = quartiles(list(np.array(dense.seconds) / np.array(skip.seconds)), 2)
    saved = 1 - skip.peak / dense.peak
    met = "met" if ratio >= FASTER and saved >= SAVED else "not met"
    return f"Skipping gates are {ratio:.2f} times as fast ({turns} by turn) and take {saved:.0%} less above the weights: {met}."


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
    parser.add_argument("--out", type=Path, help="page that is written anew after every row")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    flush_denormals()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    sizes, (double, single) = Sizes(options.batch, options.tokens, options.texts), options.blocks

    def make() -> LoadedModel:
        return flux(double, single, options.heads)

    def rows() -> Iterator[Row]:
        if options.only != "recover":
            yield from rows_of(partial(learning, make, sizes), options.repeats)
        for name in RECOVERIES if options.only != "learn" else ():
            gc.collect()
            yield from rows_of(partial(recovering, make, name, sizes), options.repeats)

    given = f"--threads {options.threads} --heads {options.heads} --repeats {options.repeats}"
    made: dict[str, Row] = {}
    for row in rows():
        made[row.name] = row
        print(" | ".join(row.cells()), flush=True)
        lines = ["", *table(HEAD, *(row.cells() for row in made.values())), ""]
        lines += [comparison(made), ""] if SKIP in made else []
        lines.append(
            f"{double} + {single} blocks of width {128 * options.heads}, {options.tokens} image and {options.texts} text tokens, "
            f"batch {options.batch}; {options.threads} threads; {options.repeats} turns, median (quartiles); torch "
            f"{torch.__version__}; {processor()}; {time.perf_counter() - began:.0f} s in all."
        )
        if options.out:
            write_text(options.out, "\n".join([*PAGE.strip().format(options=given).split("\n"), *lines, ""]))
    print("\n".join(lines))


HEAD = ["training", "processor s", "peak GiB", "plan GiB", "measured GiB", "plan / measured", f"within {TOLERANCE:.0%}"]
PAGE = """
# Steps of a FLUX of few blocks

```bash
python benchmarks/flux_step.py {options} --out docs/results/flux-step.md
```

A FluxTransformer2DModel of few blocks with random weights in bfloat16, on a CPU, whose seconds are counted. Memory is bytes of live
tensors, by the records of torch's allocator: the same in every run; the program and buffers inside kernels are not in it. Peak: the
most in a step above that before it (weights, moments, batch), gradients included. Measured: the most in a step, of all. Plan: the
sum that `--dry-run` prints, wanted within 15 %. Of skipping gates, wanted are at least 1.3 times the speed of dense ones and 30 %
less memory above the weights.
"""


if __name__ == "__main__":
    main()
