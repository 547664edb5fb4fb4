"""Measure the held-out loss of a digits teacher during training, and the loss added by removing each block.

    python benchmarks/digits_teacher.py --model digits [--run runs/digits-teacher] [--out docs/results/digits-teacher.md]

All losses use the same (timestep, noise) pairs, stratified over timesteps; differences are paired per image. With --run, the
loss of every checkpoint's averaged weights is listed too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import shared
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.data.digits import ImageSet, load_digits
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.processes.base import Batch
from tinyfusion.processes.flow import FlowObjective
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, GaussianObjective
from tinyfusion.sample.flow import flow_of

SEED = 99


def objective_of(model: LoadedModel) -> GaussianObjective | FlowObjective:
    """The training objective of the model, without label dropout."""
    if model.family.process == "flow":
        return FlowObjective(label_drop=0.0, flow=flow_of(model))
    return GaussianObjective(label_drop=0.0)


def times(objective: GaussianObjective | FlowObjective, position: np.ndarray) -> torch.Tensor:
    """Convert positions in (0, 1) to timesteps or times of the process."""
    if isinstance(objective, FlowObjective):
        low, high = objective.flow.training_ends(objective.eps)
        return torch.from_numpy(low + (high - low) * position).float()
    return torch.from_numpy((position * NUM_TIMESTEPS).astype(np.int64).clip(0, NUM_TIMESTEPS - 1))


@torch.no_grad()
def calibration_loss(model: LoadedModel, images: ImageSet, repeats: int, without: int | None = None) -> np.ndarray:
    """(N,) loss of every image, mean over `repeats` stratified timesteps, with block `without` removed."""
    objective = objective_of(model)
    batch = Batch(torch.from_numpy(images.x), class_condition(torch.from_numpy(images.y), images.num_classes))
    num = len(images)
    gates = torch.ones(num, len(model.stack))
    if without is not None:
        gates[:, without] = 0.0
    total = torch.zeros(num)
    for repeat in range(repeats):
        draws = Randomness(SEED).at(repeat, 0, num)
        position = (np.argsort(draws.uniform("stratum")) + draws.uniform("timestep")) / num
        t = times(objective, position)
        noise = torch.from_numpy(draws.normal("noise", images.x.shape[1:]))
        noisy = objective.noised(batch, t, noise)
        with model.stack.gated(gates):
            prediction = objective.predict(model.module, noisy)
        total += objective.losses(model.module, noisy, prediction)["loss"]
    return (total / repeats).numpy()


def removal_table(model: LoadedModel, repeats: int) -> list[str]:
    """Markdown table: held-out loss added by removing each block, paired by image, and as a multiple of its standard error."""
    heldout = load_digits(heldout=True)
    base = calibration_loss(model, heldout, repeats)
    added = [calibration_loss(model, heldout, repeats, without=block) - base for block in range(len(model.stack))]
    means = [a.mean() for a in added]
    errors = [a.std(ddof=1) / np.sqrt(len(a)) for a in added]
    return [
        f"Held-out loss of the whole model: {base.mean():.4f} ({len(heldout)} images, {repeats} timesteps each).",
        "",
        *shared.table(
            ["block removed", *map(str, range(len(added)))],
            ["added loss", *(f"{m:.4f}" for m in means)],
            ["standard errors", *(f"{m / e:.1f}" for m, e in zip(means, errors, strict=True))],
        ),
    ]


def curve_table(model: LoadedModel, run: Path, repeats: int) -> list[str]:
    """Markdown table: training and held-out loss of every checkpoint's averaged weights."""
    columns = [["steps", "training digits", "held-out digits"]]
    for folder in sorted((run / "checkpoints").glob("step-*")):
        tensors = {k: v for file in sorted(folder.glob("state*.safetensors")) for k, v in load_file(file).items()}
        at_step = model.copy()
        with torch.no_grad():
            for name, parameter in at_step.module.named_parameters():
                if f"ema/{name}" in tensors:
                    parameter.copy_(tensors[f"ema/{name}"])
        losses = [calibration_loss(at_step, load_digits(heldout), repeats).mean() for heldout in (False, True)]
        columns.append([str(int(folder.name[5:])), *(f"{loss:.4f}" for loss in losses)])
    return ["", *shared.table(*zip(*columns, strict=True))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--run", type=Path, help="run folder of `tinyfusion train`, for the curve")
    parser.add_argument("--repeats", type=int, default=16, help="timesteps per image")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    model = open_model(options.model)
    rows = removal_table(model, options.repeats)
    if options.run:
        rows += curve_table(model, options.run, max(1, options.repeats // 4))
    print("\n".join(rows))
    if options.out:
        write_text(options.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
