"""Heads and hidden channels in order of importance, before routers are trained: the first of each is the one always on.

The score of a unit is the sum of the absolute weights that would go with it; hidden channels are sorted before they are
grouped, so that group 0 holds the strongest. The paper (arXiv 2410.03456) ranks by magnitude; its release does not, so
there the unit that always runs is whichever stands first.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyfusion.models.loaded import LoadedModel


@dataclass(frozen=True)
class UnitOrder:
    """Per block: heads and hidden channels of the model as it was, strongest first."""

    heads: list[list[int]]
    hidden: list[list[int]]


def order_by_importance(model: LoadedModel) -> UnitOrder:
    """Sort the units of every block of `model`, in place; it computes what it did. The order, as facts for the record."""
    rules = model.family.dynamic_rules()
    sizes = rules.sizes(model.arch)
    found = UnitOrder([], [])
    for block in model.stack:
        heads, hidden = (s.argsort(descending=True, stable=True) for s in rules.scores(block, sizes))
        rules.reorder(block, heads, hidden, sizes)
        found.heads.append(heads.tolist())
        found.hidden.append(hidden.tolist())
    return found
