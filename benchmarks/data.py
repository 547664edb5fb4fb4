"""Time reading latents against one file per sample, and encoding pictures against the autoencoder alone.

    python benchmarks/data.py --out docs/results/encode.md

Reading: 20,000 samples of 4 x 32 x 32 with mirrored copies, the same values in both layouts, on one disk and in its cache.
One file per sample is read as published: a feature and a label file per item, a random choice of the copy, items collated by
torch's DataLoader, in this process and with two workers. Readers alternate in one process; a turn is an epoch of ours and a
part of one of the others. CPU seconds include the workers.

Encoding: JPEG pictures of 500 x 375 by the job of `encode`, and by the autoencoder alone on the same batches, alternating.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from shared import quartiles
from tinyfusion.commands.encode import encode, work_for
from tinyfusion.config.recipe import EncodeSection, Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.data.latents import (
    LatentBatches,
    LatentSpec,
    encoded_values,
    open_latents,
    unfinished_shard,
    write_manifest,
)
from tinyfusion.jobs.assemble import RunOptions

SHAPE, BATCH, CPU = (4, 32, 32), 256, torch.device("cpu")


class FilePerSample(Dataset):
    """The published layout as a data set of torch."""

    def __init__(self, folder: Path) -> None:
        self.features, self.labels = folder / "imagenet256_features", folder / "imagenet256_labels"
        self.names = sorted(os.listdir(self.features))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = np.load(self.features / self.names[i])
        chosen = both[1] if random.random() < 0.5 else both[0]
        return torch.from_numpy(chosen), torch.from_numpy(np.load(self.labels / self.names[i]))


def lay_out(folder: Path, num: int) -> None:
    """Write the same latents in the published layout and as three sets of ours."""
    kinds = [("samples", "float32"), ("samples", "bfloat16"), ("moments", "float32")]
    specs = [LatentSpec(num, 1024, kind, dtype, 2, SHAPE, 1000, 0.18215, 0.0) for kind, dtype in kinds]
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    labels = np.arange(num) % 1000
    generator = np.random.default_rng(0)
    for shard in range(specs[0].shards):
        first, count = specs[0].bounds(shard)
        values = torch.from_numpy(generator.standard_normal((count, 2, *SHAPE), dtype=np.float32))
        for spec in specs:
            path = folder / f"{spec.kind}-{spec.dtype}"
            path.mkdir(exist_ok=True)
            stored = torch.cat([values, values - 12], 2) if spec.kind == "moments" else values
            with unfinished_shard(path, spec, shard, labels[first : first + count], 0) as append:
                append(encoded_values(stored, spec.dtype))
        for i in range(count):
            np.save(folder / "imagenet256_features" / f"{first + i}.npy", values[i].numpy())
            np.save(folder / "imagenet256_labels" / f"{first + i}.npy", labels[first + i : first + i + 1])
    for spec in specs:
        write_manifest(folder / f"{spec.kind}-{spec.dtype}", spec, {})


def ours(folder: Path) -> Callable[[int], int]:
    """Return a function that reads the next batches and returns their number of images."""
    source, randomness, step = LatentBatches(open_latents(folder), Randomness(0), CPU, 0.5), Randomness(0), 0

    def read(batches: int) -> int:
        nonlocal step
        for _ in range(batches):
            source(step, BATCH, randomness.at(step, 0, BATCH))
            step += 1
        return batches * BATCH

    return read


def theirs(folder: Path, workers: int) -> Callable[[int], int]:
    """As `ours`, by a DataLoader with persistent workers."""
    loader = DataLoader(
        FilePerSample(folder), BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )

    def endless() -> Iterator[object]:
        while True:
            yield from loader

    stream = endless()
    next(stream)  # workers have started

    def read(batches: int) -> int:
        for _ in range(batches):
            next(stream)
        return batches * BATCH

    return read


def cpu_seconds() -> float:
    """CPU seconds of this process."""
    return time.process_time()


def reading(num: int, turns: int) -> tuple[list[str], str]:
    """The table of readers, and a sentence with the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, num)
        readers = {
            "one file per sample, in the process": (theirs(folder, 0), 12),
            "one file per sample, 2 workers": (theirs(folder, 2), 24),
            "samples, float32": (ours(folder / "samples-float32"), num // BATCH),
            "samples, bfloat16": (ours(folder / "samples-bfloat16"), num // BATCH),
            "moments, float32, sampled anew": (ours(folder / "moments-float32"), num // BATCH),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        cpu: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(turns + 1):
            for name, (read, batches) in readers.items():
                began, busy = time.perf_counter(), cpu_seconds()
                images = read(batches)
                if turn:  # the first one warms the cache
                    rates[name].append(images / (time.perf_counter() - began))
                    cpu[name].append(1e6 * (cpu_seconds() - busy) / images)
    first, best = (
        "one file per sample, in the process",
        max(list(readers)[:2], key=lambda n: statistics.median(rates[n])),
    )
    rows = ["| reader | images per second | CPU µs per image | times the first, by turn | by CPU |", "|---" * 5 + "|"]
    for name in readers:
        ratios = [a / b for a, b in zip(rates[name], rates[first], strict=True)]
        own = "in its workers" if "workers" in name else quartiles(cpu[name], 1)
        by_cpu = "" if "workers" in name else f"{statistics.median(cpu[first]) / statistics.median(cpu[name]):.1f}"
        rows.append(f"| {name} | {quartiles(rates[name], 0)} | {own} | {quartiles(ratios, 1)} | {by_cpu} |")
    against = {
        name: statistics.median(a / b for a, b in zip(rates[name], rates[best], strict=True))
        for name in list(readers)[2:]
    }
    said = ", ".join(f"{name} {ratio:.1f}" for name, ratio in against.items())
    return rows, f"Against the faster of the first two ({best}), median by turn: {said}. Goal: 10."


def save_autoencoder(folder: Path, widths: tuple[int, ...], layers: int) -> None:
    """Save an autoencoder with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)
    model = AutoencoderKL(
        block_out_channels=widths, down_block_types=down, up_block_types=up, layers_per_block=layers, norm_num_groups=4
    )
    model.save_pretrained(folder)


def save_pictures(folder: Path, num: int) -> None:
    """Save JPEGs with edges and noise, which take as long to decode as photographs."""
    generator = np.random.default_rng(0)
    for i in range(num):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.clip(np.asarray(coarse) + generator.normal(0, 12, (375, 500, 3)), 0, 255).astype(np.uint8)
        path = folder / f"class-{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def encoding(name: str, widths: tuple[int, ...], layers: int, size: int, num: int, turns: int) -> str:
    """A row of the table: images per second of the job and of the autoencoder alone, on the same batches."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_autoencoder(folder / "vae", widths, layers)
        save_pictures(folder / "pictures", num)
        settings = EncodeSection(vae=str(folder / "vae"), size=size, batch_size=8)
        recipe = dataclasses.replace(Recipe(), encode=settings, device="cpu")
        work = work_for(recipe, str(folder / "pictures"))
        batches = [(first, work.load(first, min(8, num - first))) for first in range(0, num, 8)]
        jobs, alones, shares, cpu, inside = [], [], [], [], []
        for turn in range(turns + 1):
            began, busy = time.perf_counter(), cpu_seconds()
            done = encode(recipe, RunOptions(folder / f"out-{turn}"), str(folder / "pictures"))
            seconds, job_cpu = num / done["images_per_second"], cpu_seconds() - busy
            began, busy = time.perf_counter(), cpu_seconds()
            for first, pixels in batches:
                work.values(pixels, first)
            alone, alone_cpu = time.perf_counter() - began, cpu_seconds() - busy
            if turn:
                jobs.append(num / seconds)
                alones.append(num / alone)
                shares.append(100 * alone / seconds)
                cpu.append(100 * alone_cpu / job_cpu)
                inside.append(100 * done["autoencoder_share"])
    cells = [name, str(size), *(quartiles(values, 1) for values in (jobs, alones, shares, inside, cpu))]
    row = "| " + " | ".join(cells) + " |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20_000, help="samples that are read")
    parser.add_argument("--pictures", type=int, default=32, help="that are encoded")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    torch.set_num_threads(options.threads)
    before = os.getloadavg()
    table, sentence = reading(options.num, options.turns)
    print("\n".join([*table, sentence]), flush=True)
    head = [
        "autoencoder",
        "crop",
        "job, images per second",
        "autoencoder alone",
        "job / alone by turn, %",
        "job inside the autoencoder, %",
        "CPU alone / CPU of the job, %",
    ]
    second = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print("\n".join(second), flush=True)
    second.append(encoding("tiny: widths 8, 8", (8, 8), 1, 64, options.pictures, options.turns))
    second.append(encoding("middle: widths 32, 64, 64, 64", (32, 64, 64, 64), 1, 128, options.pictures, options.turns))
    larger = (64, 128, 128, 128)
    second.append(encoding("larger: widths 64, 128, 128, 128", larger, 1, 128, options.pictures // 2, options.turns))
    load = ", ".join(f"{a:.1f} before, {b:.1f} after" for a, b in [(before[0], os.getloadavg()[0])])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    note = (
        f"{options.num:,} samples, {options.pictures} pictures (half of them in the last row), "
        f"{options.turns} turns; median (first quartile to third). torch "
        f"{torch.__version__}, {options.threads} thread(s), {os.cpu_count()} cores that other work shared (load {load}). "
        f"Most memory of the process: {memory:.1f} GiB."
    )
    print(note)
    if options.out:
        write_text(
            options.out, "\n".join([*PAGE.strip().split("\n"), "", *table, "", sentence, "", *second, "", note, ""])
        )


PAGE = """
# Latents: reading and encoding

```bash
python benchmarks/data.py --out docs/results/encode.md
```

Reading: latents of 4 x 32 x 32 with mirrored copies, batches of 256 in shuffled order, the same values in both layouts, from a warm
disk cache. Encoding: JPEGs of 500 x 375, mirrored copies, moments in float32; "alone" runs the autoencoder on the same batches,
already decoded and cropped. With a spare core, decoding overlaps the autoencoder; where all cores are busy it competes with it.
The published autoencoder (widths 128 to 512, two layers each, crops of 256) computes many times longer per picture than the last
row. See [data](../data.md).
"""


if __name__ == "__main__":
    main()
