"""What each block adds to the stream: size and direction of its update, the shares of attention and MLP, large activations.

Shapes: B images of a batch, N of all, T tokens, D width. A block maps its input x to x + u; u is its update, the sum of what
attention adds and what the MLP adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import NoisyBatch, Process

STATISTICS = ("update_cosine", "update_norm", "influence", "attention_share")


@dataclass
class Activations:
    """Magnitudes of a block's output. ratio (D,): of each channel, the mean over images of its largest magnitude over the tokens,
    in multiples of the median magnitude of all values of the image. largest (D,): of any value. median: mean over images.
    """

    ratio: np.ndarray
    largest: np.ndarray
    median: float


@dataclass
class BlockUpdates:
    """What one block does, for every noised image in order; means over the tokens of an image.

    update_cosine (N,): of u and x, 0 where one of them is zero: below 0 the block takes away what is there. update_norm (N,):
    |u| / |x|. influence (N,): 1 - cosine of x + u and x (ShortGPT, arXiv 2403.03853). attention_share (N,): |a| / (|a| + |m|),
    a and m being what attention and MLP add; NaN where both are zero, or where the family does not say where a ends.
    """

    update_cosine: np.ndarray
    update_norm: np.ndarray
    influence: np.ndarray
    attention_share: np.ndarray
    activations: Activations


@dataclass
class _Collected:
    """Values of one block so far."""

    columns: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in STATISTICS})
    ratio: Tensor | None = None
    largest: Tensor | None = None
    median: float = 0.0

    def add(self, before: Tensor, after: Tensor, between: Tensor | None) -> None:
        """Take in the stream (B, T, D) before and after the block, and between attention and MLP."""
        update = after - before
        size = update.norm(dim=-1)
        values = {
            "update_cosine": F.cosine_similarity(update, before, dim=-1),
            "update_norm": size / before.norm(dim=-1).clamp(min=torch.finfo(size.dtype).tiny),
            "influence": 1.0 - F.cosine_similarity(after, before, dim=-1),
            "attention_share": torch.full_like(size, torch.nan),
        }
        if between is not None:
            attention, mlp = (between - before).norm(dim=-1), (after - between).norm(dim=-1)
            values["attention_share"] = attention / (attention + mlp)
        for name, tokens in values.items():
            per_image = tokens.double().nanmean(dim=1) if name == "attention_share" else tokens.double().mean(dim=1)
            self.columns[name].append(per_image.cpu())
        magnitude = after.abs()
        median = magnitude.flatten(1).median(dim=1).values.clamp(min=torch.finfo(magnitude.dtype).tiny)
        ratio = (magnitude.amax(dim=1) / median.unsqueeze(1)).double().sum(dim=0).cpu()
        self.ratio = ratio if self.ratio is None else self.ratio + ratio
        self.median += float(median.double().sum())
        largest = magnitude.amax(dim=(0, 1)).double().cpu()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def finished(self) -> BlockUpdates:
        columns = {name: torch.cat(listed).numpy() for name, listed in self.columns.items()}
        num = len(columns["influence"])
        assert self.ratio is not None and self.largest is not None
        activations = Activations(self.ratio.numpy() / num, self.largest.numpy(), self.median / num)
        return BlockUpdates(**columns, activations=activations)


@torch.no_grad()
def block_updates(
    model: LoadedModel,
    objective: Process,
    batches: Sequence[NoisyBatch],
    tick: Callable[[int], None] = lambda done: None,
) -> list[BlockUpdates]:
    """The updates of every block on the same noised images. tick: called with the number of batches done so far."""
    collected = [_Collected() for _ in range(len(model.stack))]
    model.module.eval()
    with (
        _between(model) as between,
        model.stack.watched(
            range(len(collected)),
            lambda block, before, after: collected[block].add(before.float(), after.float(), between.pop(block, None)),
        ),
    ):
        for done, noisy in enumerate(batches, start=1):
            objective.predict(model.module, noisy)
            tick(done)
    return [block.finished() for block in collected]


@contextmanager
def _between(model: LoadedModel) -> Iterator[dict[int, Tensor]]:
    """{block: the stream between its attention and its MLP}, filled as the model runs; empty where the family names no such place."""
    between: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index, block in enumerate(model.stack):
            place = model.family.mlp_norm
            if place is None:
                continue

            def keep(_module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                between[index] = args[0].float()

            hooks.enter_context(block.get_submodule(place).register_forward_pre_hook(keep))
        yield between
