"""Sort heads and hidden channels by importance before routers are trained, because the first unit of each is always on.

The score of a unit is the sum of its absolute weights; hidden channels are sorted before they are grouped, so group 0
has the strongest. The paper (arXiv 2410.03456) ranks by magnitude; its release does not sort.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyfusion.models.loaded import LoadedModel


@dataclass(frozen=True)
class UnitOrder:
    """Per block: original indices of heads and hidden channels, strongest first."""

    heads: list[list[int]]
    hidden: list[list[int]]


def order_by_importance(model: LoadedModel) -> UnitOrder:
    """Sort the units of every block of `model` in place, without changing its output; return the order for the record."""
    rules = model.family.dynamic_rules()
    sizes = rules.sizes(model.arch)
    order = UnitOrder([], [])
    for block in model.stack:
        heads, hidden = (s.argsort(descending=True, stable=True) for s in rules.scores(block, sizes))
        rules.reorder(block, heads, hidden, sizes)
        order.heads.append(heads.tolist())
        order.hidden.append(hidden.tolist())
    return order
