"""Sample a few images of every class into one picture.

    python examples/sample_grid.py [--model digits] [--per-class 6] [--num-steps 50] [--guidance 2] [--out grid.png]

Image i depends on the seed and i alone, so earlier rows do not change when there are more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tinyfusion import open_model
from tinyfusion.data.images import write_grid_png
from tinyfusion.sample.drive import image_labels, sample, to_uint8
from tinyfusion.sample.gaussian import GaussianSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", help="model, as every verb takes it")
    parser.add_argument("--per-class", type=int, default=6)
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    args = parser.parse_args()

    model = open_model(args.model)
    arch = model.arch
    labels = image_labels(args.per_class * arch.num_classes, arch.num_classes, args.seed, balanced=True)
    sampler = GaussianSampler("ddim", args.num_steps, args.guidance)
    batches = sample(model, labels, sampler, args.seed)
    images = np.concatenate([to_uint8(batch.x) for batch in batches])
    write_grid_png(args.out, images, columns=arch.num_classes, scale=4)
    print(f"{len(images)} images of {len(model.stack)} blocks in {args.out}, one column per class")


if __name__ == "__main__":
    main()
