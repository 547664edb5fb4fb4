"""A decision of learned gates, per list of the model: what stays, and how probable it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.prune.gates import GateDistribution, SubsetGates
from tinyfusion.prune.layout import GateLayout


@dataclass(frozen=True)
class Decision:
    """The blocks that averaged logits select (the mode of the distribution), and their probabilities, per list.

    choice: the kept blocks of every group, where trials decided or the logits went on; None: those of the logits.
    """

    groups: Mapping[str, list[BlockGroup]]
    gates: GateDistribution
    logits: list[Tensor]
    scaling: float
    layout: GateLayout
    choice: Sequence[Sequence[int]] | None = None

    def _per_list(self, rows: Iterable[list[Any]]) -> dict[str, list[list[Any]]]:
        """Rows of the groups, per list and group."""
        ordered = iter(rows)
        return {name: [next(ordered) for _ in listed] for name, listed in self.groups.items()}

    def _chosen(self) -> list[list[int]]:
        """The kept units of every group."""
        if self.choice is not None:
            return [list(kept) for kept in self.choice]
        return [self.gates.kept(index, theta) for index, theta in enumerate(self.logits)]

    def kept(self) -> dict[str, list[int]]:
        """Blocks that stay, per list of the model."""
        return self.layout.in_blocks(self.kept_units())

    def kept_units(self) -> dict[str, list[int]]:
        """Units that stay, per list of gates."""
        return _joined(self._per_list(self._chosen()))

    def probabilities(self) -> dict[str, list[list[float]]]:
        """Probabilities of every group, per list; see the `meaning` of the distribution."""
        return self._per_list(
            self.gates.probabilities(index, theta, self.scaling) for index, theta in enumerate(self.logits)
        )

    def confidence(self) -> dict[str, list[float]]:
        """Probability of the decision, per list: one number per group (categorical), or per kept block (subset)."""
        rows = enumerate(zip(self.logits, self._chosen(), strict=True))
        return _joined(self._per_list(self.gates.confidence(i, theta, self.scaling, kept) for i, (theta, kept) in rows))

    def fields(self) -> dict[str, Any]:
        """Fields of a log line."""
        own = {"scaling": self.scaling, "kept": self.kept(), "confidence": self.confidence()}
        marginals = {"marginals": _joined(self.probabilities())} if isinstance(self.gates, SubsetGates) else {}
        return {**own, **marginals}


def _joined(per_group: Mapping[str, list[list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for row in rows for value in row] for name, rows in per_group.items()}
