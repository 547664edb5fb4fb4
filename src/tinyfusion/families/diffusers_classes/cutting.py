"""What follows from the blocks that stay: units that go together, refusals, the new config, and where each tensor comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.rows import BlockList, Period, Row

Kept = Mapping[str, Sequence[int]]
Chunks = list[tuple[int, int]]


@dataclass(frozen=True)
class UnitList:
    """Units of one budget: a unit is what goes together, (list, position) each. fixed: units that cannot go."""

    name: str
    units: tuple[tuple[tuple[str, int], ...], ...]
    fixed: frozenset[int]
    aside: bool

    def kept(self, units: Sequence[int]) -> dict[str, list[int]]:
        """Positions per list of these units."""
        kept: dict[str, list[int]] = {path: [] for path, _ in self.units[0]}
        for path, position in sorted(block for unit in units for block in self.units[unit]):
            kept[path].append(position)
        return kept


def unit_blocks(lists: Sequence[UnitList], depths: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The blocks of every unit, as indices through the lists of a model of so many blocks per list."""
    first = first_blocks(depths)
    return [tuple(first[path] + i for path, i in unit) for each in lists for unit in each.units]


def unit_lists(row: Row, config: Mapping[str, Any], depths: Mapping[str, int]) -> list[UnitList]:
    """The units of a model in the order in which its lists run: one block each where the class has no rule."""
    found = []
    for each in row.lists:
        if each.path not in depths or each.path in row.same_index[1:]:
            continue
        paths = row.same_index if each.path in row.same_index else (each.path,)
        runs = list(_runs(each, config, depths[each.path]))
        stay = {position % depths[each.path] for position in each.stay}
        fixed = frozenset(i for i, (run, free) in enumerate(runs) if not free or stay & {*run})
        units = tuple(tuple((path, position) for position in run for path in paths) for run, _ in runs)
        found.append(UnitList(" + ".join(paths), units, fixed, each.aside))
    return found


def _runs(each: BlockList, config: Mapping[str, Any], depth: int) -> Iterator[tuple[tuple[int, ...], bool]]:
    """(positions that go together, whether they can) of one list."""
    if each.mirror:
        half = max(depth // 2 - 1, 0)
        yield from (((i, depth - 1 - i), True) for i in range(half))
        yield tuple(range(half, depth - half)), False
        return
    size = each.period.size(config) if each.period else 1
    whole = depth - depth % size
    yield from ((tuple(range(start, start + size)), True) for start in range(0, whole, size))
    if whole < depth:
        yield tuple(range(whole, depth)), False


@dataclass(frozen=True)
class Cut:
    """A choice of blocks of one model. Raises UserError, one line that names the rule, where it breaks a coupling of the class.

    depths: blocks per list. kept: positions that stay, per list, ascending.
    """

    row: Row
    config: Mapping[str, Any]
    depths: Mapping[str, int]
    kept: Kept

    def __post_init__(self) -> None:
        for each in self.lists:
            self._check_list(each)
        same = {tuple(self.kept[path]) for path in self.row.same_index}
        if len(same) > 1:
            raise UserError(f"{' and '.join(self.row.same_index)} alternate, so the same positions of both must stay")
        for paths in self.row.same_count:
            numbers = {path: len(self.kept[path]) for path in paths if path in self.depths}
            if len(set(numbers.values())) > 1:
                counts = ", ".join(f"{number} of {path}" for path, number in numbers.items())
                raise UserError(
                    f"{' and '.join(numbers)} share one count in the config; {counts} would stay: keep equally many"
                )
        for name, path in self.row.last.items():
            if self.config.get(name) and not self._counted(
                path, self.depths[path] - self.config[name], self.depths[path]
            ):
                raise UserError(
                    f"at least one of the last {self.config[name]} blocks of {path} must stay: they are its {name}"
                )
        for name in self.row.hints:
            moved = self._moved_hints(name)
            if len(set(moved)) < len(moved):
                raise UserError(f"two entries of {name} would move to one block ({moved}): keep a block between them")

    @property
    def lists(self) -> list[BlockList]:
        """The lists that the model has."""
        return [each for each in self.row.lists if each.path in self.depths]

    def removed(self, path: str) -> list[int]:
        """Positions of a list that go."""
        return sorted({*range(self.depths[path])} - {*self.kept[path]})

    def _check_list(self, each: BlockList) -> None:
        depth, kept, gone = self.depths[each.path], self.kept[each.path], self.removed(each.path)
        why = f": {each.rule}" if each.rule else ""
        if not kept:
            raise UserError(f"at least one block of {each.path} must stay")
        if stuck := sorted({position % depth for position in each.stay} & {*gone}):
            raise UserError(f"{each.path} {', '.join(map(str, stuck))} cannot be removed{why}")
        if each.mirror:
            half = depth // 2 - 1
            if stuck := [i for i in gone if half <= i < depth - half]:
                raise UserError(
                    f"{each.path} {', '.join(map(str, stuck))} cannot be removed: the middle blocks have no partner"
                )
            if alone := [i for i in gone if depth - 1 - i not in gone]:
                raise UserError(f"{each.path} {alone[0]} can only be removed together with {depth - 1 - alone[0]}{why}")
        size = each.period.size(self.config) if each.period else 1
        if moved := next((old for new, old in enumerate(kept) if (old - new) % size), None):
            raise UserError(
                f"blocks of {each.path} can only be removed {size} in a row; block {moved} would change its kind{why}"
            )

    # ------------------------------------------------------------------------------------------------------ the config

    def config_changes(self) -> dict[str, Any]:
        """The fields of config.json that change, with their new values."""
        config, row = self.config, self.row
        changes: dict[str, Any] = {each.count: len(self.kept[each.path]) for each in self.lists}
        for name, path in row.indices.items():
            kept = self.kept[path]
            changes[name] = [kept.index(position) for position in config.get(name) or () if position in kept]
        for name, path in row.first.items():
            if isinstance(config.get(name), int):
                changes[name] = self._counted(path, 0, config[name])
        for name, path in row.last.items():
            if isinstance(config.get(name), int):
                changes[name] = self._counted(path, self.depths[path] - config[name], self.depths[path])
        for name, paths in row.per_block.items():
            values = config.get(name)
            if values is None and name in row.alternating:
                cycle = row.alternating[name]
                values = [cycle[i % len(cycle)] for i in range(sum(self.depths[path] for path in paths))]
            if isinstance(values, list | tuple):
                gone = self._removed_through(paths)
                changes[name] = [value for i, value in enumerate(values) if i not in gone]
        changes |= {name: self._moved_hints(name) for name in row.hints if config.get(name)}
        return changes

    def _counted(self, path: str, start: int, stop: int) -> int:
        """Kept blocks of a list between two positions."""
        return sum(start <= position < stop for position in self.kept[path])

    def _removed_through(self, paths: Sequence[str]) -> set[int]:
        """Removed blocks, counted through several lists."""
        gone, start = set(), 0
        for path in paths:
            gone |= {start + position for position in self.removed(path)}
            start += self.depths[path]
        return gone

    def _moved_hints(self, name: str) -> list[int]:
        """Positions of hints in the pruned model: one whose block is removed is added behind the kept block before, the same place."""
        kept = self.kept[self.row.hints[name]]
        return [sum(position <= hint for position in kept) - 1 for hint in self.config.get(name) or ()]

    # ----------------------------------------------------------------------------------------------------- the tensors

    def source(self, names: Sequence[str]) -> dict[str, tuple[str, Chunks]]:
        """Where every tensor of the pruned model comes from: {new name: (old name, chunks)}.

        chunks: (chunk, chunks in all) along axis 0, in the order in which they are concatenated; none: the whole tensor.
        """
        found: dict[str, tuple[str, Chunks]] = {}
        for name in names:
            new, chunks = self._as_last(name)
            if new is not None and (moved := self._renumbered(new)) is not None:
                found[moved] = (name, chunks)
        return found

    def _as_last(self, name: str) -> tuple[str | None, Chunks]:
        """The name and chunks of a tensor in a block that becomes the last of its list; None where it goes."""
        for each in self.lists:
            last = self.kept[each.path][-1]
            prefix = f"{each.path}.{last}."
            if each.as_last and last != self.depths[each.path] - 1 and name.startswith(prefix):
                conversion = LAST_BLOCKS[each.as_last]
                inside = name.removeprefix(prefix)
                if inside.startswith(conversion.dropped):
                    return None, []
                module, _, kind = inside.rpartition(".")
                if module == "norm1_context.linear":
                    chunks = [(chunk, conversion.chunks) for chunk in conversion.order]
                    return f"{prefix}{conversion.renamed}.{kind}", chunks
        return name, []

    @cached_property
    def numbered(self) -> list[tuple[str, Callable[[int], int | None]]]:
        """(prefix, old index -> new index or None) of every module list whose entries move."""

        def through(paths: Sequence[str]) -> Callable[[int], int | None]:
            gone = self._removed_through(paths)
            return lambda index: None if index in gone else index - sum(i < index for i in gone)

        def periodic(each: BlockList, period: Period) -> Callable[[int], int | None]:
            size, kept = period.size(self.config), list(self.kept[each.path])

            def moved(entry: int) -> int | None:
                block = entry if period.keyed else entry * size
                if block not in kept:
                    return None
                return kept.index(block) if period.keyed else kept.index(block) // size

            return moved

        found = [(f"{each.path}.", through((each.path,))) for each in self.lists]
        found += [(f"{path}.", through(paths)) for path, paths in self.row.parallel.items()]
        return found + [
            (f"{each.period.drops}.", periodic(each, each.period))
            for each in self.lists
            if each.period and each.period.drops and each.period.size(self.config) > 1
        ]

    def _renumbered(self, name: str) -> str | None:
        """The name of a tensor in the pruned model; None where it is removed."""
        for prefix, move in self.numbered:
            if name.startswith(prefix):
                index, _, rest = name.removeprefix(prefix).partition(".")
                if index.isdecimal():
                    new = move(int(index))
                    return None if new is None else f"{prefix}{new}.{rest}"
        return name


@dataclass(frozen=True)
class LastBlock:
    """How a joint block becomes the last one, whose text output is not read: of its text side only the norm before attention is left.

    The modulation keeps `order` of its `chunks` rows, under the name `renamed`.
    """

    dropped: tuple[str, ...]
    renamed: str
    chunks: int
    order: tuple[int, ...]


LAST_BLOCKS = {  # by the name of the conversion
    # (shift, scale, gate) twice to (scale, shift), the order of AdaLayerNormContinuous
    "joint": LastBlock(("attn.to_add_out.", "ff_context."), "norm1_context.linear", 6, (1, 0)),
    # (scale, gate) twice to scale
    "mochi": LastBlock(
        ("attn1.to_add_out.", "ff_context.", "norm2_context.", "norm3_context.", "norm4_context."),
        "norm1_context.linear_1", 4, (0,),
    ),
}  # fmt: skip
