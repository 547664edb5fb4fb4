"""Gate the residual blocks of a model: drop one at a time, per image, and measure the error and the residual stream.

    python examples/gate_a_model.py [--model digits] [--num-images 32]

A gate of 1 is the block, 0 the identity. All depths run in one batch, with a mask per image.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from tinyfusion import open_model
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.rng import Randomness
from tinyfusion.data.digits import load_digits
from tinyfusion.processes.base import Batch
from tinyfusion.processes.gaussian import GaussianObjective


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", help="model, as every verb takes it")
    parser.add_argument("--num-images", type=int, default=32)
    args = parser.parse_args()

    model, digits, num = open_model(args.model), load_digits(heldout=True), args.num_images
    batch = Batch(torch.from_numpy(digits.x[:num]), class_condition(torch.from_numpy(digits.y[:num]), 10))
    noisy = GaussianObjective(label_drop=0.0).draw(batch, Randomness(0).at(0, 0, num))
    depth, channels, labels = len(model.stack), model.arch.in_channels, noisy.condition["labels"]

    with model.stack.tap(range(depth)) as outputs:
        whole = model.module(noisy.xt, noisy.t, labels)
    stream = [outputs[i].flatten(1) for i in range(depth)]

    gates = torch.ones(depth, depth) - torch.eye(depth)  # row i: without block i
    with model.stack.gated(gates.repeat_interleave(num, 0)):
        every = model.module(*(part.repeat(depth, *[1] * (part.ndim - 1)) for part in (noisy.xt, noisy.t, labels)))
    with model.stack.gated(torch.ones(num, depth)):
        assert model.module(noisy.xt, noisy.t, labels).equal(whole), "gates of ones are the model itself"

    print("block  change of the stream  noise error without it")
    truth = F.mse_loss(whole[:, :channels], noisy.noise)
    for i, without in enumerate(every.chunk(depth)):
        change = 1 - F.cosine_similarity(stream[i - 1], stream[i]).mean() if i else torch.tensor(torch.nan)
        error = F.mse_loss(without[:, :channels], noisy.noise)
        print(f"{i:5}  {change:20.4f}  {error:.4f} ({error - truth:+.4f})")


if __name__ == "__main__":
    main()
