"""Time the Frechet distance against scipy's general matrix square root, and measure the memory of statistics of 50,000 images.

    python benchmarks/frechet.py --out docs/results/frechet.md

Features are rectified Gaussian mixtures with a decaying spectrum, so that covariances have many small eigenvalues as those of
networks do. Both sides get the same moments and alternate in one process after a warm-up each: ours is
`evaluate.metrics.frechet_distance`, the other |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrtm(S1 S2)). Memory is that of `summarise` over
random features of the three sizes of the Inception network, then of precision and recall, in a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy.linalg import sqrtm

from shared import quartiles
from tinyfusion.core.rundir import write_text
from tinyfusion.evaluate.features import Features
from tinyfusion.evaluate.metrics import Moments, feature_moments, frechet_distance, precision_recall, summarise
from tinyfusion.evaluate.timing import interleaved

CASES = ((512, 5000, 5000), (1024, 5000, 5000), (2048, 10_000, 10_000), (2048, 1000, 10_000))  # D, N1, N2
WIDTHS = (2048, 2023, 1008)  # pooled, spatial, classes
DECADES = 4.0  # over which the mixture's spectrum falls


def moments_of(width: int, num: int, seed: int) -> Moments:
    """Moments of a rectified mixture; nine tenths of the mixture do not depend on the seed."""
    rng = np.random.default_rng(seed)
    falling = 10 ** (-DECADES / 2 * np.linspace(0, 1, width, dtype=np.float32))
    shared = np.random.default_rng(0).standard_normal((width, width), dtype=np.float32)
    mix = (shared + 0.1 * rng.standard_normal((width, width), dtype=np.float32)) * falling
    drawn = rng.standard_normal((num, width), dtype=np.float32) @ mix.T / np.sqrt(np.float32(width))
    return feature_moments(np.maximum(drawn + 0.1, 0))


def by_root(first: Moments, second: Moments) -> float:
    difference = first.mean - second.mean
    root = sqrtm(first.covariance @ second.covariance)
    return float(difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real))


def compare(case: tuple[int, int, int], repeats: int) -> str:
    """A row of the table: sizes, both times, ratio, agreement."""
    width, num1, num2 = case
    first, second = moments_of(width, num1, 1), moments_of(width, num2, 2)
    found: dict[str, float] = {}

    def ours() -> None:
        found["ours"] = frechet_distance(*first, *second)

    def root() -> None:
        found["root"] = by_root(first, second)

    times = interleaved({"ours": ours, "root": root}, repeats, torch.device("cpu"))
    seconds = {name: np.array(timing.measurements_ms) / 1000 for name, timing in times.items()}
    ratio = quartiles(seconds["root"] / seconds["ours"], 1)
    apart = abs(found["ours"] - found["root"]) / abs(found["ours"])
    row = f"| {width} | {num1:,}, {num2:,} | {quartiles(seconds['ours'], 2)} | {quartiles(seconds['root'], 2)} | {ratio} | {apart:.1e} |"
    print(row, flush=True)
    return row


def stream(num: int, references: int) -> dict[str, float]:
    """Seconds and bytes of the statistics of `num` images, and of precision and recall against `references`."""

    def features(count: int, seed: int, batch: int = 256) -> Iterator[Features]:
        rng = np.random.default_rng(seed)
        for first in range(0, count, batch):
            pool, spatial, logits = (rng.standard_normal((min(batch, count - first), w), np.float32) for w in WIDTHS)
            yield Features(pool, spatial, logits)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    real = summarise(((Features(f.pool, None, None)) for f in features(references, 1)), references)
    before, began = peak(), time.perf_counter()
    drawn = summarise(features(num, 2), num)
    summarised = time.perf_counter() - began
    after, began = peak(), time.perf_counter()
    frechet_distance(*real.pool, *drawn.pool)
    distance = time.perf_counter() - began
    began = time.perf_counter()
    assert real.features is not None and drawn.features is not None
    precision_recall(real.features, drawn.features)
    return {
        "before": before, "after": after, "peak": peak(), "summarised": summarised, "distance": distance,
        "recall": time.perf_counter() - began,
    }  # fmt: skip


def streamed(num: int, references: int) -> str:
    """A sentence with the results of `stream` in a separate process."""
    command = [sys.executable, __file__, "--stream", f"{num},{references}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    mega = {name: said[name] / 2**20 for name in ("before", "after", "peak")}
    text = (
        f"{num:,} images, pooled {WIDTHS[0]}, spatial {WIDTHS[1]}, classes {WIDTHS[2]}; {references:,} reference images. "
        f"Peak memory of the whole process: {mega['before']:,.0f} MiB before the stream (torch, and the reference's statistics), "
        f"{mega['after']:,.0f} MiB after it, {mega['peak']:,.0f} MiB after precision and recall too. "
        f"Seconds: {said['summarised']:.0f} moments and score, {said['distance']:.1f} one distance, "
        f"{said['recall']:.0f} precision and recall."
    )
    print(text, flush=True)
    return text


def page(rows: list[str], stream_text: str, arguments: argparse.Namespace) -> str:
    return f"""# Fréchet distance: time and memory

```bash
python benchmarks/frechet.py --out docs/results/frechet.md
```

Seconds for one distance from given moments, median (quartiles) of {arguments.repeats} turns; speed-up within a turn. Method:
[evaluation](../evaluation.md#the-fréchet-distance).

| D | images | ours, s | `scipy.linalg.sqrtm`, s | speed-up | relative difference |
|---|---|---|---|---|---|
{chr(10).join(rows)}

In the last row one side has fewer images than dimensions: its covariance is singular, and the general matrix square root loses
digits; this method does not.

Statistics of a stream: {stream_text}

torch {torch.__version__}, scipy {scipy.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores
({platform.machine()}), which other work shared.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page to write")
    parser.add_argument("--repeats", type=int, default=7, help="turns per side")
    parser.add_argument("--images", type=int, default=50_000, help="images of the stream")
    parser.add_argument("--references", type=int, default=10_000, help="reference images of the stream")
    parser.add_argument("--stream", help="N,M: only this, as JSON")
    arguments = parser.parse_args()
    if arguments.stream:
        num, references = map(int, arguments.stream.split(","))
        print(json.dumps(stream(num, references)))
        return
    rows = [compare(case, arguments.repeats) for case in CASES]
    text = page(rows, streamed(arguments.images, arguments.references), arguments)
    if arguments.out:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
