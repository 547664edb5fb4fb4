"""Which gate every block of a model has: one per unit, a unit being what can only be removed together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup, check_range, parse_scheme, spelled_out
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.cutting import UnitList, unit_blocks
from tinyfusion.models.loaded import LoadedModel


@dataclass(frozen=True)
class GateLayout:
    """The lists of units of a model, and its blocks.

    depths: blocks per list of the model. units: those that have gates; blocks in none of them always run.
    """

    depths: Mapping[str, int]
    units: tuple[UnitList, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units per list of gates."""
        return {each.name: len(each.units) for each in self.units}

    @cached_property
    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of every unit, as indices through the lists of the model."""
        return unit_blocks(self.units, self.depths)

    @cached_property
    def columns(self) -> list[int]:
        """The gate of every block; one more than the last of them for a block without."""
        of_block = {block: unit for unit, blocks in enumerate(self.blocks) for block in blocks}
        return [of_block.get(block, len(self.blocks)) for block in range(sum(self.depths.values()))]

    @property
    def plain(self) -> bool:
        """Whether every block has a gate of its own, in order."""
        return self.columns == list(range(len(self.columns)))

    def protected(self, protect: Sequence[int]) -> list[int]:
        """The units that stay: those that the class does not offer, and those of the blocks `protect`. Raises UserError out of range."""
        check_range("--protect", sorted(set(protect)), self.depths)
        fixed = [i in each.fixed for each in self.units for i in range(len(each.units))]
        return [unit for unit, blocks in enumerate(self.blocks) if fixed[unit] or {*blocks} & {*protect}]

    def groups(self, settings: PruneSection) -> dict[str, list[BlockGroup]]:
        """The groups of a learned criterion, per list of gates; they count units. Raises UserError if the scheme does not fit."""
        protect = self.protected(settings.protect)
        settings = self.spelled(settings)
        return parse_scheme(settings.scheme, self.sizes, settings.distribution or "", protect, settings.runs)

    def spelled(self, settings: PruneSection) -> PruneSection:
        """The settings with a distribution, and a scheme of N:M where it is a share: the same for this model, readable without it."""
        if settings.criterion != "learned":
            return settings
        named = settings.distribution or ("subset" if "%" in settings.scheme else "categorical")
        return dataclasses.replace(settings, scheme=spelled_out(settings.scheme, self.sizes), distribution=named)

    def stand_in(self, settings: PruneSection) -> PrunePlan:
        """One choice that the groups allow as a plan: a stand-in for the decision, of its size."""
        groups = self.groups(settings)
        kept = {name: [i for g in listed for i in g.first_of(g.free)] for name, listed in groups.items()}
        return PrunePlan(kept=self.in_blocks(kept), depth=dict(self.depths), criterion="stand-in")

    def of_blocks(self, masks: Tensor) -> Tensor:
        """(B, blocks) from the masks (B, units) of the gates."""
        if self.plain:
            return masks
        always = torch.ones_like(masks[:, :1])
        return torch.cat([masks, always], 1)[:, self.columns]

    def in_blocks(self, kept: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Blocks that stay per list of the model, from the units that stay per list of gates."""
        blocks = {name: list(range(depth)) for name, depth in self.depths.items()}
        for each in self.units:
            blocks |= each.kept(kept[each.name])
        return blocks


def gate_layout(model: LoadedModel) -> GateLayout:
    """The gates of a model: every block has its own, unless its class ties blocks together or sets a list aside."""
    return layout_of(model.stack.depths(), model.units)


def layout_of(depths: Mapping[str, int], lists: Sequence[UnitList] | None) -> GateLayout:
    """The gates of a model of so many blocks per list. lists: its units; None: every block is one."""
    if lists is None:
        lists = [
            UnitList(name, tuple(((name, i),) for i in range(depth)), frozenset(), False)
            for name, depth in depths.items()
        ]
    gated = tuple(each for each in lists if not each.aside)
    if not gated:
        raise UserError("the model has no list of blocks that learned masks may remove from")
    return GateLayout(depths, gated)
