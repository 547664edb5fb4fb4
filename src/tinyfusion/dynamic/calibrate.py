"""Calibrate the routers of a dynamic model to a target ratio of multiply-accumulates at inference.

Training controls the mean of random decisions, inference takes the more likely one: units with logits of 1.1 +- 0.5 are on in
74 % of training and 99 % of inference, and published ratios miss their targets (0.5 gave 0.488). Training therefore ends with
steps without noise, and the remaining difference is corrected by one offset on the biases of all routers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tinyfusion.blocks.dynamics import Deciding, model_ratio
from tinyfusion.core.errors import UserError
from tinyfusion.core.signals import check_stop
from tinyfusion.models.loaded import DynamicModel

TOLERANCE = 0.01  # of the target
_AIM = 0.1  # share of the tolerance at which the search ends: 1,000 other images were up to 0.4 % off the 16 measured
_ROUNDS = 60
_FINE, _FINEST = 1e-3, 1e-6  # smallest interval of offsets searched: within the tolerance, and outside of it
_FURTHEST = 2.0**12
LAST_LAYERS = ("attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.2", "block_rate.router")

Pass = tuple[int, Callable[[], object]]  # number of images, and a forward pass of the model on them


@torch.no_grad()
def inference_ratio(dynamic: DynamicModel, passes: Sequence[Pass]) -> float:
    """Mean ratio of multiply-accumulates under the decisions of inference, over all images of `passes`.

    The images should be at the times of the intended sampler, or at evenly spread times.
    """
    total, num = 0.0, 0
    for images, run in passes:
        check_stop()
        decisions = Deciding()
        with dynamic.using(decisions):
            run()
        total += float(model_ratio(decisions.masks, dynamic.sizes, images).sum())
        num += images
    return total / num


def calibrate(
    dynamic: DynamicModel, target: float, ratio: Callable[[], float], tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """Apply the offset of all logits with which `ratio()` is within `tolerance` (a share) of `target`; return (offset, ratio).

    ratio: measures the current model, such as `inference_ratio`. The search aims at a tenth of the tolerance, so that other
    images meet the target too. Raises UserError, with the model unchanged, if no offset does: the ratio is a step function,
    with smaller steps for more timesteps and images.
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
    """(low, high) offsets between which the ratio crosses the target; (0, 0) if there are none."""
    sign, previous, reach = (1.0 if start < search.target else -1.0), 0.0, 0.25
    while reach <= _FURTHEST:
        edge = sign * reach
        if (search.at(edge) < search.target) != (start < search.target):
            return min(previous, edge), max(previous, edge)
        previous, reach = edge, 2 * reach
    return 0.0, 0.0


class _Search:
    """Evaluates the ratio at offsets from the original biases; `best`: (error, offset, ratio)."""

    def __init__(self, dynamic: DynamicModel, target: float, ratio: Callable[[], float]) -> None:
        self.target, self.ratio = target, ratio
        ends = tuple(f"{layer}.bias" for layer in LAST_LAYERS)
        biases = [p for name, p in dynamic.routers().items() if name.endswith(ends)]
        self.biases = [(bias, bias.detach().clone()) for bias in biases]
        self.best = (float("inf"), 0.0, 0.0)

    @torch.no_grad()
    def shift(self, offset: float) -> None:
        """Set every bias to its original value plus `offset`."""
        for bias, value in self.biases:
            bias.copy_(value + offset)

    def at(self, offset: float) -> float:
        """Apply `offset` and measure the ratio."""
        self.shift(offset)
        value = self.ratio()
        self.best = min(self.best, (abs(value - self.target), offset, value))
        return value
