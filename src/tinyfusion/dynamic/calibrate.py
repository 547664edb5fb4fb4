"""Meeting the budget at inference. Training holds the mean of random decisions, inference takes the likelier one.

Logits of 1.1 +- 0.5 keep 74 % in training and 99 % at inference; published ratios miss theirs for it (0.5 gave 0.488). So
a training ends with noise-free steps, and what is still off goes into one offset on the biases of all routers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tinyfusion.blocks.routed import Deciding
from tinyfusion.core.errors import UserError
from tinyfusion.core.signals import check_stop
from tinyfusion.dynamic.macs import model_ratio
from tinyfusion.models.loaded import DynamicModel

TOLERANCE = 0.01  # of the target
_AIM = 0.1  # of the tolerance, which other images need for themselves: up to 0.4 % of the target between 16 and 1,000 of them
_ROUNDS = 60
_FINE, _FINEST = (
    1e-3,
    1e-6,
)  # offsets between which nothing better is looked for: within the tolerance, and outside of it
_FURTHEST = 2.0**12
LAST_LAYERS = ("attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.2", "block_rate.router")

Pass = tuple[int, Callable[[], object]]  # number of images, and a forward pass of the model on them


@torch.no_grad()
def inference_ratio(dynamic: DynamicModel, passes: Sequence[Pass]) -> float:
    """Mean ratio of multiply-accumulates of the decisions that inference makes, over all images of `passes`.

    Take images at the times of the sampler that will be used, or at times evenly spread.
    """
    total, num = 0.0, 0
    for images, run in passes:
        check_stop()
        way = Deciding()
        with dynamic.using(way):
            run()
        total += float(model_ratio(way.masks, dynamic.sizes, images).sum())
        num += images
    return total / num


def calibrate(
    dynamic: DynamicModel, target: float, ratio: Callable[[], float], tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """Find one offset of all logits with which `ratio()` is within `tolerance` (a share) of `target`, and leave it in.

    The search ends at a tenth of that, or where no step is fine enough, so that other images meet the target too. ratio:
    measures the model as it is, such as `inference_ratio`. The offset and the ratio reached. Raises UserError, with the model
    as it was, where no offset does: the ratio moves in steps, and more timesteps and images make them smaller.
    """
    search = _Search(dynamic, target, ratio)
    start, aim = search.at(0.0), _AIM * tolerance * target
    if search.best[0] > aim:
        low, high = _bracket(search, start)
        for _ in range(_ROUNDS):
            fine = _FINE if search.best[0] <= tolerance * target else _FINEST
            if search.best[0] <= aim or high - low < fine:
                break
            middle = (low + high) / 2
            low, high = (low, middle) if search.at(middle) > target else (middle, high)
    off, offset, reached = search.best
    if off > tolerance * target:
        search.shift(0.0)
        raise UserError(
            f"no offset of the routers gives a ratio of {target:g} within {tolerance:.0%}: the nearest is {reached:.4f}. "
            "Calibrate on more timesteps and images, or choose a budget that these routers can reach"
        )
    search.shift(offset)
    return offset, reached


def _bracket(search: _Search, start: float) -> tuple[float, float]:
    """Two offsets between which the ratio crosses the target; the same twice where none were found."""
    sign, previous, reach = (1.0 if start < search.target else -1.0), 0.0, 0.25
    while reach <= _FURTHEST:
        edge = sign * reach
        if (search.at(edge) < search.target) != (start < search.target):
            return min(previous, edge), max(previous, edge)
        previous, reach = edge, 2 * reach
    return 0.0, 0.0


class _Search:
    """Ratios of a model at offsets of all its logits, from the biases that it had; `best`: (error, offset, ratio)."""

    def __init__(self, dynamic: DynamicModel, target: float, ratio: Callable[[], float]) -> None:
        self.target, self.ratio = target, ratio
        ends = tuple(f"{layer}.bias" for layer in LAST_LAYERS)
        biases = [p for name, p in dynamic.routers().items() if name.endswith(ends)]
        self.biases = [(bias, bias.detach().clone()) for bias in biases]
        self.best = (float("inf"), 0.0, 0.0)

    @torch.no_grad()
    def shift(self, offset: float) -> None:
        """Set every bias to what it was, plus `offset`."""
        for bias, value in self.biases:
            bias.copy_(value + offset)

    def at(self, offset: float) -> float:
        """The ratio at `offset`."""
        self.shift(offset)
        value = self.ratio()
        self.best = min(self.best, (abs(value - self.target), offset, value))
        return value
