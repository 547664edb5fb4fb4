"""Follow up what `explain` shows of the digits: ranks of blocks by noise, a large channel held fixed, and students of several seeds.

    python benchmarks/explain_digits.py --explained runs/digits-explained [--students RUN RUN RUN] [--out tables.md]

--explained: output of `tinyfusion explain digits`. The channel is held at zero, or at its mean, at the output of the block where
it becomes large, and the held-out loss compared on the same noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import shared
from tinyfusion.config.recipe import DataSection, ExplainSection, Recipe
from tinyfusion.core.rundir import read_json, write_text
from tinyfusion.explain.removal import paired_mean
from tinyfusion.jobs.explaining import Measured, measured_on, similarity
from tinyfusion.models.checkpoint import LoadedModel, open_model

NOISY = 3  # tenths of the chain from the noise on


def measured(model: LoadedModel, passes: int) -> Measured:
    data, settings = DataSection("digits:heldout"), ExplainSection(passes=passes, batch_size=360)
    return measured_on(Recipe(data=data, explain=settings), model)


def rank_table(record: dict) -> list[str]:
    """Markdown: the rank of every block by its added loss over all timesteps, and over the noisiest ones."""
    by_noise = np.array([[part["mean"] for part in block["added_loss"]["by_noise"]] for block in record["blocks"]])
    mean, noisy = by_noise.mean(axis=1), by_noise[:, :NOISY].mean(axis=1)
    ranks = [(np.argsort(np.argsort(-values)) + 1).astype(str) for values in (mean, noisy)]
    return shared.table(
        ["block", *map(str, range(len(mean)))],
        ["rank by added loss", *ranks[0]],
        ["rank at timesteps 700 to 999", *ranks[1]],
        ["added loss at 700 to 999", *(f"{value:.4f}" for value in noisy)],
        ["share from timesteps 0 to 99", *(f"{row[-1] / row.sum():.0%}" for row in by_noise)],
    )


@contextmanager
def held(block: torch.nn.Module, channel: int, value: float) -> Iterator[None]:
    """Within the context a channel of the block's output has this value."""

    def change(_module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[..., channel] = value
        return changed

    hook = block.register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def channel_table(record: dict, passes: int) -> list[str]:
    """Markdown: loss added by holding a channel at zero and at its mean: the large channels, and the median of all others."""
    subject, large = measured(open_model("digits"), passes), [set(b["activations"]["large"]) for b in record["blocks"]]
    born = {channel: next(i for i, own in enumerate(large) if channel in own) for channel in set().union(*large)}
    block = min(born.values())

    def losses() -> np.ndarray:
        each = [
            subject.objective.losses(subject.model.module, n, subject.objective.predict(subject.model.module, n))[
                "loss"
            ]
            for n in subject.batches
        ]
        return torch.cat(each).double().numpy()

    outputs: list[torch.Tensor] = []
    with subject.model.stack.watched([block], lambda _block, _before, after: outputs.append(after)):
        whole = losses()
    means, module = torch.cat(outputs).mean(dim=(0, 1)).tolist(), list(subject.model.stack)[block]
    added = np.empty((len(means), 2))
    for channel, mean in enumerate(means):
        for column, value in enumerate((0.0, mean)):
            with held(module, channel, value):
                added[channel, column] = paired_mean(losses() - whole, subject.images)[0]
    others = np.median(np.delete(added, list(born), axis=0), axis=0)
    rows = [
        [f"{channel} (mean {means[channel]:.2f})", *(f"{v:.4f}" for v in added[channel])] for channel in sorted(born)
    ]
    head = [f"channel, at the output of block {block}", "held at 0", "held at its mean"]
    return shared.table(head, *rows, ["median of the others", *(f"{value:.4f}" for value in others)])


def student_table(students: list[Path]) -> list[str]:
    """Markdown: the teacher's block that each block of a student was, and the one that its output is most like."""
    rows = []
    for source in students:
        student = open_model(source)
        found = similarity(measured(student, 4), open_model("digits"), "digits")
        rows += [[str(source), *(" ".join(map(str, found[name])) for name in ("origins", "most_like"))]]
    return shared.table(["student", "its blocks were", "are most like"], *rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explained", type=Path, required=True)
    parser.add_argument(
        "--students", type=Path, nargs="*", default=[], help="runs with recovered students of the digits"
    )
    parser.add_argument("--passes", type=int, default=1, help="noised copies of every image, for the channels")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    record = read_json(options.explained / "explain.json")
    lines = [*rank_table(record), "", *channel_table(record, options.passes)]
    lines += ["", *student_table(options.students)] if options.students else []
    print("\n".join(lines))
    if options.out:
        write_text(options.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
