"""Measure how long training waits for data with and without prefetching, and the throughput of a streamed set.

    python benchmarks/data_wait.py --cifar DATA/cifar10/train-00000-of-00001.parquet --out docs/results/data.md

Both prefetch depths alternate in one process; a turn is `--steps` steps of the package's own objective, optimiser and
average after two discarded ones, and the result is the median over `--repeats` turns. The share is the seconds that `take`
waited over the seconds of the turn. Streaming is compared with decoding by Pillow alone: the same encoded pictures, from
memory, one thread, alternating.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.ahead import Ahead
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.data.batches import Batches, ShuffledBatches
from tinyfusion.data.digits import ImageSet, load_digits
from tinyfusion.data.stream import StreamedBatches, open_shards
from tinyfusion.models.checkpoint import new_model
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

CPU, SEED = torch.device("cpu"), 0
DEPTHS = (0, 2)


def training(source: Batches, batch_size: int, sizes: dict[str, int]) -> tuple[Callable[[int], NoisyBatch], Callable]:
    """A source of batches, and a training on them."""
    model = new_model("dit", {**sizes, "num_classes": 10}, SEED)
    state = TrainState(
        model.module.train(), [ParameterGroup(trainable(model.module))], TrainingSection(ema_decay=0.999)
    )
    objective, randomness = GaussianObjective(0.1), Randomness(SEED)

    def make(step: int) -> NoisyBatch:
        draws = randomness.at(step, 0, batch_size)
        return objective.draw(source(step, batch_size, draws), draws)

    def train(noisy: NoisyBatch) -> None:
        losses = objective.losses(state.model, noisy, objective.predict(state.model, noisy))
        state.optimizer.zero_grad(set_to_none=True)
        losses["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(list(state.parameters.values()), 1.0)
        state.optimizer.step()
        state.ema.update()

    return make, train


def waiting(name: str, source: Batches, batch_size: int, sizes: dict[str, int], steps: int, repeats: int) -> str:
    """A row of the table: seconds per step and share of waiting at both prefetch depths."""
    make, train = training(source, batch_size, sizes)
    seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    shares: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for turn in range(repeats):
        for depth in DEPTHS:
            with Ahead(make, depth) as ahead:
                first = turn * (steps + 2)
                for step in (first, first + 1):
                    train(ahead.take(step))
                began, before = time.perf_counter(), ahead.waited_s
                for step in range(first + 2, first + 2 + steps):
                    train(ahead.take(step))
                seconds[depth].append((time.perf_counter() - began) / steps)
                shares[depth].append((ahead.waited_s - before) / steps / seconds[depth][-1])
    ratios = [turned / ahead for turned, ahead in zip(seconds[0], seconds[2], strict=True)]
    cells = [name, str(batch_size)]
    for depth in DEPTHS:
        cells += [f"{1000 * statistics.median(seconds[depth]):.1f}", f"{statistics.median(shares[depth]):.1%}"]
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    row = "| " + " | ".join(cells) + " |"
    print(row, flush=True)
    return row


def regrouped(file: Path, folder: Path, rows: int = 1000) -> Path:
    """A copy in row groups of 1,000: as published, the file has a single one."""
    import pyarrow.parquet

    target = folder / file.name
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file), target, row_group_size=rows)
    return target


def streaming(file: Path, repeats: int, window_images: int, num: int = 8192, batch_size: int = 256) -> str:
    """Images per second of a stream, and of decoding alone."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file, columns=["img"]).slice(0, num)
    encoded = [row["bytes"] for row in table.column(0).to_pylist()]
    source = StreamedBatches(open_shards(file, None, 3), Randomness(SEED), CPU, window_images)
    streamed, alone = [], []
    source.rows(0, batch_size)  # the first window is there, the next one is under way
    for turn in range(repeats):
        began = time.perf_counter()
        for first in range(turn * num, (turn + 1) * num, batch_size):
            source.rows(first, batch_size)
        streamed.append(num / (time.perf_counter() - began))
        began = time.perf_counter()
        for content in encoded:
            with Image.open(io.BytesIO(content)) as image:
                np.asarray(image.convert("RGB"))
        alone.append(len(encoded) / (time.perf_counter() - began))
    ratio = statistics.median(a / b for a, b in zip(streamed, alone, strict=True))
    sentence = (
        f"Streamed: {statistics.median(streamed):,.0f} images per second, batches of {batch_size}, windows of at most "
        f"{window_images:,} images; Pillow's decoding alone, one thread: {statistics.median(alone):,.0f}. Ratio by turn {ratio:.2f}."
    )
    print(sentence, flush=True)
    return sentence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="parquet file of CIFAR-10; without it nothing is streamed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    torch.set_num_threads(options.threads)
    digits = ShuffledBatches(load_digits(), Randomness(SEED), CPU, augment=0.5)
    latents = Randomness(SEED).at(0, 0, 1024).normal("latents", (4, 32, 32))
    drawn = ShuffledBatches(ImageSet("latents", latents, np.arange(1024) % 10, 10), Randomness(SEED), CPU)
    digits_dit = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=12, num_heads=4)
    latent_dit = dict(input_size=32, patch_size=8, in_channels=4, hidden_size=128, depth=4, num_heads=4)
    head = ["data and model", "batch", "in turn, ms", "waits", "2 ahead, ms", "waits", "times as fast"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join(table), flush=True)
    how = (options.steps, options.repeats)
    table.append(waiting("digits, augmented; the digits teacher", digits, 128, digits_dit, *how))
    table.append(waiting("4 x 32 x 32 in memory; width 128, 4 blocks, 16 tokens", drawn, 256, latent_dit, *how))
    sentences = []
    if options.cifar:
        with tempfile.TemporaryDirectory() as folder:
            cifar = regrouped(options.cifar, Path(folder))
            stream = StreamedBatches(open_shards(cifar, None, 3), Randomness(SEED), CPU, options.window, flip=0.5)
            pixel_dit = {**latent_dit, "in_channels": 3}
            name = "CIFAR-10 streamed, 32 x 32; width 128, 4 blocks, 16 tokens"
            table.append(waiting(name, stream, 256, pixel_dit, *how))
            sentences = [streaming(cifar, options.repeats, options.window), ""]
    note = (
        f"{options.steps} steps a turn, {options.repeats} turns, median (range); torch {torch.__version__}, {options.threads} "
        f"thread(s), {os.cpu_count()} cores, which other work shared."
    )
    print(note)
    if options.out:
        write_text(options.out, "\n".join([*PAGE.strip().split("\n"), "", *table, "", *sentences, note, ""]))


PAGE = """
# Time spent waiting for data

```bash
python benchmarks/data_wait.py --cifar DATA/cifar10/train-00000-of-00001.parquet --out docs/results/data.md
```

Share of the step time that training waits for its batch, without prefetching (`compute.prefetch_batches` 0) and with two batches
prefetched on another thread. Making a batch is reading, decoding, augmentation and all random draws of the step. See [data](../data.md).
"""


if __name__ == "__main__":
    main()
