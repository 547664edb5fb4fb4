"""The table of transformer classes: where the blocks of each are, and what follows from removing some."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from tinyfusion.blocks.streams import Streams
from tinyfusion.config.loading import build
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import parse_toml, read_text


@dataclass(frozen=True)
class Period:
    """Blocks differ by their position modulo n.

    every: config field of n; where it is absent, 0 or 1 there is no such rule. drops: a module list with one entry per n
    blocks, which goes with the first of them. keyed: `drops` is a dict with the block's index as key. when: a config field
    without which there is no such rule.
    """

    every: str
    drops: str | None = None
    keyed: bool = False
    when: str | None = None

    def size(self, config: Mapping[str, Any]) -> int:
        """The number n of this configuration; 1 where blocks are alike."""
        off = self.when is not None and not config.get(self.when)
        return 1 if off else int(config.get(self.every) or 1)


@dataclass(frozen=True)
class Control:
    """How the residuals of a ControlNet reach the L blocks of a list.

    net: class of the ControlNet, which has S blocks in a list of the same path, counted by the same field. taps: its module list
    with an entry per block, which makes the residual. spread: which of S residuals is added behind block i. interval: number
    i // ceil(L / S); ratio: number i // (L / S), and none behind the last; next: number i - 1. modulo: config field of the
    ControlNet with which it is number i % S instead.
    """

    net: str
    taps: str
    spread: Literal["interval", "ratio", "next"]
    modulo: str = ""


@dataclass(frozen=True)
class BlockList:
    """One list of blocks.

    path: of the ModuleList in the model. count: config field of its length. streams: what a block returns, in that order, by
    the parameters of its `forward` that take it. in_tuple: a single stream is returned inside of a tuple. tapped: the stream
    that is measured; None: hidden_states, else the first. shared: parameters whose tensors all images share. axes: axis of the
    images of other parameters, where it is not 0. aside: a short list apart from the trunk, which criteria leave whole unless a
    budget names it. optional: some models of the class have no such list. stay: positions that cannot go, negative from the
    end. mirror: block i goes with block L-1-i only, and the middle stays. period: see `Period`. as_last: the conversion of a
    block that becomes the last one. rule: why, as the end of a sentence. control: how a ControlNet reaches it. adapter: whether
    an IP-adapter has an entry per block.
    """

    path: str
    count: str
    streams: tuple[str, ...] = ("hidden_states",)
    in_tuple: bool = False
    tapped: str | None = None
    shared: tuple[str, ...] = ()
    axes: dict[str, int] = field(default_factory=dict)
    aside: bool = False
    optional: bool = False
    stay: tuple[int, ...] = ()
    mirror: bool = False
    period: Period | None = None
    as_last: Literal["joint", "mochi"] | None = None
    rule: str = ""
    control: Control | None = None
    adapter: bool = False

    @cached_property
    def declared(self) -> Streams:
        """The declaration of its blocks."""
        alone = len(self.streams) == 1 and not self.in_tuple
        tapped = self.tapped or ("hidden_states" if "hidden_states" in self.streams else self.streams[0])
        names = (tapped, *(name for name in self.streams if name != tapped))
        axes: dict[str, int | None] = {**dict.fromkeys(self.shared), **self.axes}
        return Streams(names, () if alone else self.streams, tapped, axes)


@dataclass(frozen=True)
class Row:
    """One transformer class.

    lists: in the order in which they run. indices: config field of block positions -> list. per_block: config field with one
    entry per block -> lists in the order of the entries. alternating: values that such a field takes in turn where the config
    has none. first, last: config field that counts leading or trailing blocks -> list. parallel: module list with one entry per
    block -> lists. same_index: lists that lose the same positions. hints: config field of positions, whose entry moves to the
    kept block before -> list. one_mask: why all images of a call share their gates. unfit: why a pruned model cannot be written.
    notes: what a user of the student has to know.
    """

    lists: tuple[BlockList, ...]
    indices: dict[str, str] = field(default_factory=dict)
    per_block: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alternating: dict[str, tuple[str, ...]] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    parallel: dict[str, tuple[str, ...]] = field(default_factory=dict)
    same_index: tuple[str, ...] = ()
    hints: dict[str, str] = field(default_factory=dict)
    one_mask: str = ""
    unfit: str = ""
    notes: tuple[str, ...] = ()

    @property
    def same_count(self) -> list[tuple[str, ...]]:
        """Lists whose lengths are one field of the config."""
        by_field: dict[str, list[str]] = {}
        for each in self.lists:
            by_field.setdefault(each.count, []).append(each.path)
        return [tuple(paths) for paths in by_field.values() if len(paths) > 1]


Rows = Mapping[str, Row]


def rows_in(text: str, source: str) -> dict[str, Row]:
    """The rows of a TOML text by class. Raises UserError where it is no such table."""
    rows = {
        name: cast(Row, build(Row, values, f"{source}: {name}")) for name, values in parse_toml(text, source).items()
    }
    for name, row in rows.items():
        paths = [one.path for one in row.lists]
        if not paths or len(set(paths)) < len(paths):
            raise UserError(f"{source}: {name} wants at least one list of blocks, each path once; got {paths}")
        mentioned = [
            *row.indices.values(),
            *row.first.values(),
            *row.last.values(),
            *row.hints.values(),
            *row.same_index,
        ]
        mentioned += [path for listed in (*row.per_block.values(), *row.parallel.values()) for path in listed]
        if odd := next((path for path in mentioned if path not in paths), None):
            raise UserError(f"{source}: {name} names the list {odd!r}; its lists are {', '.join(paths)}")
    return rows


@lru_cache(maxsize=1)
def shipped_rows() -> Rows:
    """The table that comes with the package."""
    return rows_in((resources.files(__package__) / "table.toml").read_text(encoding="utf-8"), "table.toml")


def rows_with(file: Path | None) -> Rows:
    """The shipped table, and the rows of a user's file before it. Raises UserError where the file is no such table."""
    return shipped_rows() if file is None else {**shipped_rows(), **rows_in(read_text(file), str(file))}


def row_for(config: Mapping[str, Any], rows: Rows | None = None) -> Row | None:
    """The row of the class that a config.json names; None where there is none."""
    return (shipped_rows() if rows is None else rows).get(str(config.get("_class_name")))


def row_text(name: str, row: Row) -> str:
    """A row as one line of TOML; fields that are as by default are left out."""
    return f"{name} = {_toml(row)}"


def _stated(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default."""
    values = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    defaults = {each.name: each.default for each in dataclasses.fields(value)}
    return {name: own for name, own in values.items() if own != defaults[name] and own != {}}


def _toml(value: Any) -> str:
    """A value of a row as TOML, on one line."""
    if dataclasses.is_dataclass(value):
        return _toml(_stated(value))
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)  # strings, whole numbers and booleans are written alike
