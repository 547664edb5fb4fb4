"""Transformers of diffusers as the verbs see them: found by name, and planned by rules that need no data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyfusion.blocks.plan import PrunePlan, first_blocks
from tinyfusion.blocks.scheme import BlockGroup, check_range
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.families.diffusers_classes.cutting import Cut, UnitList
from tinyfusion.families.diffusers_classes.folder import (
    INDEX,
    RECORD,
    TransformerFolder,
    component_folders,
    open_transformer,
)
from tinyfusion.families.diffusers_classes.guess import guessed_row, is_transformer
from tinyfusion.families.diffusers_classes.rows import Row, Rows, row_for, rows_with
from tinyfusion.families.registry import families
from tinyfusion.models.hub import HUB_ID
from tinyfusion.models.places import by_name, exists
from tinyfusion.prune.rules import RULES

_ALL = "all"  # in a budget: the lists of the trunk together


def transformer_of(source: str, blocks: Path | None, prompts: bool = False) -> TransformerFolder | None:
    """The transformer of diffusers at a path or hub id; None where it is a model of a family, or none at all.

    blocks: a file of rows for classes that the shipped table lacks. prompts: encoded prompts are given, so that a family which
    needs them opens folders that have none. Raises UserError where a pipeline has several, a class has no
    row (with a guess at it), and where folder and row contradict each other.
    """
    rows, path, known = rows_with(blocks), Path(source), dict[str, str]()
    if not exists(path):
        if not HUB_ID.fullmatch(source) or path.parent.exists():
            return None
        path, known = by_name(source)
    folder = _located(path, rows, prompts)
    if folder is None:
        return None
    config = read_json_object(folder / "config.json")
    if row_for(config, rows) is None and not _recorded_row(config):
        if not is_transformer(str(config.get("_class_name"))):
            return None
        raise UserError(_unknown(folder, config))
    model = open_transformer(folder, rows)
    license, parent = model.license or known.get("license"), model.parent or known.get("hub")
    return dataclasses.replace(model, license=license, parent=parent)


def _located(path: Path, rows: Rows, prompts: bool) -> Path | None:
    """The folder with config.json in it: of a run, a pipeline, or itself; None where a family of ours opens the model."""
    if not path.is_dir() or (path / "model.json").exists():
        return None
    if (path / "run.json").is_file():
        return path / "student" if (path / "student" / "config.json").is_file() else None
    if (path / INDEX).is_file():
        folders = [folder for folder in component_folders(path, rows) if not _of_a_family(folder, prompts)]
        if len(folders) > 1:
            names = " or ".join(str(folder) for folder in folders)
            raise UserError(f"{path} has {len(folders)} transformers, each with blocks of its own: give {names}")
        return folders[0] if folders else None
    return path if (path / "config.json").is_file() and not _of_a_family(path, prompts) else None


def _of_a_family(folder: Path, prompts: bool) -> bool:
    """Whether a registered family opens this folder: one that claims its class, with the texts that it needs."""
    config = read_json_object(folder / "config.json")
    kind = config.get("_class_name")
    readers = [family.diffusers for family in families().values() if family.diffusers]
    return any(
        kind in (*each.classes, "Transformer2DModel")
        and each.holds(config)
        and (prompts or each.extra_file is None or (folder / each.extra_file).is_file())
        for each in readers
    )


def _recorded_row(config: Mapping[str, Any]) -> bool:
    """Whether a student carries the row that it was cut by."""
    record = config.get(RECORD)
    return isinstance(record, dict) and isinstance(record.get("row"), str)


def _unknown(folder: Path, config: Mapping[str, Any]) -> str:
    """What to do about a class without a row."""
    text = guessed_row(config)
    kind = config["_class_name"]
    if text is None:
        return f"{folder} is a {kind}, for which there is no row and no guess: write one, and give it as --blocks FILE"
    return (
        f"{folder} is a {kind}, for which there is no row. A guess, which builds and cuts as it should: check in which order "
        f"its blocks return their streams, write this line to a file, and give that as --blocks FILE: {text}"
    )


# ------------------------------------------------------------------------------------------------------------- planning


def planned(model: TransformerFolder, settings: PruneSection, seed: int) -> PrunePlan:
    """The plan of a criterion that looks at no data. Raises UserError on others, and on what breaks a rule of the class."""
    if settings.criterion == "indices":
        kept, meaning = _named(model, settings), ""
    elif settings.criterion in RULES:
        kept = _ruled(model, settings, seed)
        meaning = "no scores: a fixed rule"
    else:
        raise UserError(
            f"criterion {settings.criterion} looks at data, which a {model.class_name} cannot be shown yet: give --keep, or "
            f"--criterion {', '.join(RULES)}"
        )
    Cut(model.row, model.config, model.depths, kept)
    scores = {"meaning": meaning} if meaning else {}
    return PrunePlan(kept, dict(model.depths), settings.criterion, scores=scores, seed=seed, teacher=model.hash)


def _named(model: TransformerFolder, settings: PruneSection) -> dict[str, list[int]]:
    """Exactly the blocks of `--keep`, counted through the lists; a list aside of which none is named stays whole."""
    depths = model.depths
    check_range("--keep", settings.keep, depths)
    if missing := sorted({*settings.protect} - {*settings.keep}):
        raise UserError(f"--keep leaves out the protected blocks {missing}: name them too, or do not protect them")
    if not settings.keep:
        raise UserError("criterion indices wants the blocks to keep: --keep 0,2,4")
    kept = {}
    for path, start in first_blocks(depths).items():
        kept[path] = sorted({i - start for i in settings.keep if start <= i < start + depths[path]})
    aside = [each.path for each in model.row.lists if each.aside and each.path in kept]
    return {path: own if own or path not in aside else list(range(depths[path])) for path, own in kept.items()}


def _ruled(model: TransformerFolder, settings: PruneSection, seed: int) -> dict[str, list[int]]:
    """What a rule keeps: it chooses among units, list by list."""
    check_range("--protect", sorted(set(settings.protect)), model.depths)
    starts, units = first_blocks(model.depths), model.units
    budgets = _budgets(units, settings)
    kept: dict[str, list[int]] = {}
    start = 0
    for each in units:
        protected = {
            i
            for i, unit in enumerate(each.units)
            if i in each.fixed or any(starts[path] + position in settings.protect for path, position in unit)
        }
        size, wanted = len(each.units), budgets.get(each.name)
        keep = max((size + 1) // 2, len(each.fixed)) if wanted is None else _units_of(each, wanted)
        if each.aside and wanted is None:
            protected, keep = set(range(size)), size
        if settings.criterion != "bk-sdm" and len(protected) > keep:
            raise UserError(
                f"{len(protected)} units of {each.name} have to stay or are protected, and {keep} are to stay: keep more"
            )
        group = BlockGroup(start, size, keep, tuple(start + i for i in sorted(protected)))
        chosen = group.with_protected(RULES[settings.criterion](group, settings, seed))
        if settings.criterion == "bk-sdm" and wanted is not None and len(chosen) != keep:
            raise UserError(
                f"bk-sdm's rule keeps {len(chosen)} of the {size} units of {each.name}, not {keep}: leave out the budget"
            )
        kept |= each.kept([i - start for i in chosen])
        start += size
    return kept


def _units_of(each: UnitList, wanted: int) -> int:
    """How many units hold `wanted` blocks of each list. Raises UserError where none do."""
    path = each.units[0][0][0]
    sizes = [sum(own == path for own, _ in unit) for unit in each.units]
    fixed = sum(sizes[i] for i in each.fixed)
    step = next((size for i, size in enumerate(sizes) if i not in each.fixed), 1)
    least = max(fixed, step)
    if not least <= wanted <= sum(sizes) or (wanted - fixed) % step:
        by = f" in steps of {step}" if step > 1 else ""
        raise UserError(f"{wanted} blocks of {each.name} cannot stay: {least} to {sum(sizes)} can{by}")
    return len(each.fixed) + (wanted - fixed) // step


def _budgets(units: Sequence[UnitList], settings: PruneSection) -> dict[str, int]:
    """Blocks that stay, per list that has a budget: of `prune.budgets`, else `--num-keep` for the lists of the trunk."""
    trunk = [each for each in units if not each.aside]
    budgets = {} if settings.num_keep is None else {each.name: settings.num_keep for each in trunk}
    for entry in settings.budgets:
        name, _, number = entry.partition("=")
        named = [each.name for each in units if name in each.name.split(" + ")]
        if not number.isdecimal() or (name != _ALL and not named):
            known = ", ".join(each.name for each in units)
            raise UserError(f"prune.budgets wants LIST=N or {_ALL}=N, lists are {known}; got {entry!r}")
        budgets |= _divided(trunk, int(number)) if name == _ALL else {named[0]: int(number)}
    return budgets


def _divided(trunk: Sequence[UnitList], total: int) -> dict[str, int]:
    """A budget over several lists, divided as their lengths are; what is left over goes to the largest remainders."""
    sizes = {each.name: len({position for unit in each.units for _, position in unit}) for each in trunk}
    if not len(sizes) <= total <= sum(sizes.values()):
        raise UserError(
            f"{_ALL}={total}: of the {sum(sizes.values())} blocks of {', '.join(sizes)} 1 of each list to all can stay"
        )
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    found = {name: max(1, math.floor(share)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: max(0, total - sum(found.values()))]:
        found[name] += 1
    return found


def couplings(row: Row) -> list[str]:
    """The rules of a class, a line each."""
    rules = [f"{each.path}: {each.rule}" for each in row.lists if each.rule]
    rules += [
        f"{' and '.join(paths)} share one count" for paths in row.same_count if not set(paths) <= set(row.same_index)
    ]
    rules += [f"{' and '.join(row.same_index)} lose the same positions"] if row.same_index else []
    fields = [*row.indices, *row.per_block, *row.first, *row.last, *row.hints]
    return rules + ([f"rewritten in config.json: {', '.join(fields)}"] if fields else [])
