"""PrunePlan: the decision, as data. Every criterion returns one, and everything after it reads only that."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tinyfusion.config.constraints import Seed
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError, prefixed

PLAN_VERSION = 1
_MOST_BLOCKS = 2**12  # of a list; no model has more


@dataclass(frozen=True)
class PrunePlan:
    """Which blocks stay, and why.

    kept: indices into the teacher per block list, ascending. depth: blocks of the teacher per list. groups: per list
    [[N kept, M size], ...] in block order, None for criteria without groups. scores: per block or group, with their meaning
    under "meaning". teacher: hash of the model that the plan is for. cost: seconds and images seen. kept_widths: channels of
    the teacher that stay, per group (see `blocks/widths.py`), None for all. runs: removed runs of a group, of the distribution
    "runs".
    """

    kept: dict[str, list[int]]
    depth: dict[str, int]
    criterion: str
    scheme: str | None = None
    distribution: str | None = None
    groups: dict[str, list[list[int]]] | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    seed: Seed = 0
    teacher: str = ""
    cost: dict[str, float] = field(default_factory=dict)
    kept_widths: dict[str, Any] | None = None
    runs: int | None = None
    version: int = PLAN_VERSION

    @property
    def pairing_groups(self) -> dict[str, list[list[int]]] | None:
        """The groups for the pairs of distillation: None for subsets and runs, whose groups may be a whole list of blocks."""
        return None if self.distribution in ("subset", "runs") else self.groups

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def first_blocks(depth: Mapping[str, int]) -> dict[str, int]:
    """Global index of the first block of every list; global indices count through the lists in order."""
    ends = itertools.accumulate(depth.values())
    return {name: end - own for (name, own), end in zip(depth.items(), ends, strict=True)}


def global_indices(kept: Mapping[str, Sequence[int]], depth: Mapping[str, int]) -> list[int]:
    """The blocks `kept` per list as global indices."""
    return [first + block for name, first in first_blocks(depth).items() for block in kept[name]]


def plan_from_json(values: Any) -> PrunePlan:
    """A plan from plain values; unknown fields are ignored.

    Raises UserError on a newer version, on missing fields and wrong types, and on blocks and groups that do not exist.
    """
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > PLAN_VERSION:
        raise UserError(f"the plan has version {version}; this tinyfusion reads up to {PLAN_VERSION}: upgrade")
    with prefixed("the plan is incomplete or damaged"):
        plan = cast(PrunePlan, build_known(PrunePlan, values, "plan"))
    for name, depth in plan.depth.items():
        kept = plan.kept.get(name, [])
        if not set(kept) <= set(range(min(depth, _MOST_BLOCKS))) or sorted(set(kept)) != kept:
            raise UserError(f"the plan is damaged: of the {depth} blocks of {name} it keeps {str(kept)[:80]}")
    pairs = [pair for groups in (plan.groups or {}).values() for pair in groups]
    if any(len(pair) != 2 or not 0 <= pair[0] <= pair[1] for pair in pairs):
        raise UserError(f"the plan is damaged: its groups {str(pairs)[:80]} are no pairs of blocks kept and blocks")
    if plan.kept.keys() != plan.depth.keys():
        raise UserError(
            f"the plan is damaged: it keeps blocks of {', '.join(plan.kept)}, and has {', '.join(plan.depth)}"
        )
    return plan
