"""Compare the speed-up of the shared mask search with its ceiling, the block evaluations that sharing saves.

    python benchmarks/mask_search.py [--images 64] [--repeats 7] [--num-masks 20000] [--out docs/results/mask-search.md]

Two spaces at the shape of the shipped digits teacher: all 924 masks that keep 6 of its 12 blocks, and random masks that
keep 14 of 28 blocks of an untrained model of the same width. Both sides use one calibration batch. The plain side prunes and
runs the model, mask by mask, on a sample of the masks; both sides alternate over slices of the masks, in processor time of
one thread. The ceiling is the number of block evaluations over that of distinct ones; the share is the measured ratio over the
ceiling, as the median over slices with the extremes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from shared import random_model
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.config.recipe import DataSection, Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import machine, write_text
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.prune.mask_search import (
    Mask,
    mask_losses,
    plain_losses,
    random_masks,
    separate_evaluations,
    shared_evaluations,
)

_CHECKED = 20  # masks whose losses are compared
_SAMPLED = 30  # masks of a piece that the plain side runs


@dataclass(frozen=True)
class Piece:
    """A slice of the masks: seconds per mask of both sides, and the ceiling of these masks."""

    shared_s: float
    plain_s: float
    ceiling: float

    @property
    def ratio(self) -> float:
        """Seconds of the plain side over those of the shared."""
        return self.plain_s / self.shared_s

    @property
    def share(self) -> float:
        """The ratio over the ceiling."""
        return self.ratio / self.ceiling


def deeper_model(depth: int) -> LoadedModel:
    """A model of the digits teacher's shape at another depth, with random weights."""
    sizes = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=64, num_heads=4, num_classes=10)
    return random_model(0.05, **sizes, depth=depth)


def one_batch(model: LoadedModel, images: int) -> Calibration:
    source = batches_for(Recipe(data=DataSection(name="digits")), model, torch.device("cpu"))
    return calibration_set(objective_for(model, 0.0, Recipe()), source, "digits", len(source), images, images, 0)


def measured(model: LoadedModel, calibration: Calibration, masks: list[Mask], pieces: int) -> list[Piece]:
    """Measure sorted masks in consecutive slices, or all of them in each if they are few."""
    few = len(masks) < 1000 * pieces
    size = len(masks) if few else math.ceil(len(masks) / pieces)
    found: list[Piece] = []
    for number in range(pieces):
        part = masks if few else masks[number * size : (number + 1) * size]
        order = Randomness(number).permutation("sample", 0, len(part))[:_SAMPLED]
        began = time.thread_time()
        mask_losses(model, calibration, part)
        between = time.thread_time()
        for i in order:
            plain_losses(model, calibration, part[int(i)])
        ended = time.thread_time()
        ceiling = separate_evaluations(part) / shared_evaluations(part)
        found.append(Piece((between - began) / len(part), (ended - between) / len(order), ceiling))
        print(f"  piece {number + 1}: {found[-1].ratio:.2f} x, {found[-1].share:.1%}", file=sys.stderr)
    return found


def largest_error(model: LoadedModel, calibration: Calibration, masks: list[Mask]) -> float:
    """Largest relative difference of the two sides on some masks."""
    some = sorted(masks[int(i)] for i in Randomness(1).permutation("check", 0, len(masks))[:_CHECKED])
    sums = mask_losses(model, calibration, some)
    plain = [plain_losses(model, calibration, mask)[0] for mask in some]
    return max(abs(a - b) / abs(b) for a, b in zip(sums.loss, plain, strict=True))


def row(name: str, model: LoadedModel, keep: int, arguments: argparse.Namespace) -> str:
    calibration = one_batch(model, arguments.images)
    depth = len(model.stack)
    masks = random_masks([BlockGroup(0, depth, keep)], arguments.num_masks, 0)
    print(f"{name}: {len(masks):,} of {math.comb(depth, keep):,} masks", file=sys.stderr)
    error = largest_error(model, calibration, masks)
    mask_losses(model, calibration, masks[:20])  # warm
    found = measured(model, calibration, masks, arguments.repeats)
    shares = [piece.share for piece in found]
    rate = {side: 1 / statistics.median(getattr(piece, side) for piece in found) for side in ("shared_s", "plain_s")}
    distinct, plain = shared_evaluations(masks), separate_evaluations(masks)
    return (
        f"| {name} | {len(masks):,} | {plain:,} | {distinct:,} | {plain / distinct:.2f} | {rate['plain_s']:.1f} | "
        f"{rate['shared_s']:.1f} | {statistics.median(piece.ratio for piece in found):.2f} | "
        f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) | {error:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="images of the calibration batch")
    parser.add_argument("--repeats", type=int, default=7, help="pieces that are timed")
    parser.add_argument("--num-masks", type=int, default=20_000, help="random masks of 14 of 28")
    parser.add_argument("--only", choices=("6:12", "14:28"), help="one of the two spaces")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    spaces = {"6:12": (lambda: open_model("digits"), 6), "14:28": (lambda: deeper_model(28), 14)}
    rows = [row(n, make(), keep, arguments) for n, (make, keep) in spaces.items() if arguments.only in (None, n)]
    text = "\n".join(
        [
            "| space | masks | block evaluations, plain | distinct | ceiling | plain masks/s | shared masks/s | ratio | "
            "share of ceiling | largest relative error |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"One thread, batch of {arguments.images} images, width 64, 16 tokens; {arguments.repeats} pieces; "
            f"{machine()['processor']}, {machine()['cores']} cores.",
            "",
        ]
    )
    print(text)
    if arguments.out:
        write_text(arguments.out, f"# Mask search\n\n`python benchmarks/mask_search.py`\n\n{text}")


if __name__ == "__main__":
    main()
