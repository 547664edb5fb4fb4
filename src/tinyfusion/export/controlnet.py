"""ControlNets of an unpruned model for its student: every block that stays gets the residual that it got before, or none is written.

A ControlNet has fewer blocks than its model. diffusers spreads their residuals over the model by position, so a shorter model
gets others at most places without an error. Residuals behind removed blocks go with these blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.rows import BlockList
from tinyfusion.families.diffusers_classes.weights import Stored, stored_weights


@dataclass(frozen=True)
class FittedControlNet:
    """A ControlNet for a student.

    config and weights: of the new folder. residuals: per list of the student, the number of the residual behind each block, None
    where there is none. residuals_before: how many blocks of the unpruned model got one, per list.
    """

    config: dict[str, Any]
    weights: dict[str, Stored]
    residuals: dict[str, list[int | None]]
    residuals_before: dict[str, int]


def residuals_of(spread: str, depth: int, number: int) -> list[int | None]:
    """Which of `number` residuals is added behind each of `depth` blocks, as the model of diffusers does; None: none.

    spread: as in a row of the table, or modulo.
    """
    if spread == "modulo":
        return [i % number for i in range(depth)]
    if spread == "next":
        return [i - 1 if 0 < i <= number else None for i in range(depth)]
    if spread == "ratio":
        return [*(int(i / (depth / number)) for i in range(depth - 1)), None]
    return [i // math.ceil(depth / number) for i in range(depth)]


def fit_controlnet(folder: Path, cuts: Sequence[Cut]) -> FittedControlNet:
    """The ControlNet in a folder of diffusers, for the student to which `cuts` lead from the model that it was trained for.

    Blocks at its end whose residuals nothing reads any more are removed. Raises UserError where it is for another model, and
    where a block of the student would get another residual than before.
    """
    lists = [each for each in cuts[0].lists if each.control]
    config, row = read_json_object(folder / "config.json"), cuts[0].row
    nets = sorted({each.control.net for each in lists if each.control})
    if config.get("_class_name") not in nets:
        wanted = " or ".join(nets) or "none: no ControlNet of this class is known here"
        raise UserError(f"{folder} is a {config.get('_class_name')}; ControlNets of this student's model are {wanted}")
    if config.get("quantization_config"):
        raise UserError(f"{folder} is quantised: give the ControlNet that it was made from")
    weights = stored_weights(folder)
    for prefix in (f"{path}." for each in lists if each.control for path in (each.path, each.control.taps)):
        numbers = _numbers(weights, prefix)
        if numbers != set(map(str, range(len(numbers)))):
            raise UserError(f"{folder} is damaged: entries of {prefix[:-1]} are not numbered from 0 on")
    used = [each for each in lists if _numbers(weights, f"{each.control.taps}.")]  # type: ignore[union-attr]
    if not used:
        raise UserError(f"{folder} holds no blocks that make residuals, and every {config['_class_name']} has them")
    residuals: dict[str, list[int | None]] = {}
    before: dict[str, int] = {}
    for each in used:
        assert each.control is not None
        number = len(_numbers(weights, f"{each.control.taps}."))
        kept = _kept_of_original(each.path, cuts)
        spread = "modulo" if config.get(each.control.modulo) is not None else each.control.spread
        former = residuals_of(spread, cuts[0].depths[each.path], number)
        left = _fitted(each, kept, former, spread, number if each is not used[-1] else 1, number, folder)
        residuals[each.path] = [former[i] for i in kept]
        before[each.path] = sum(residual is not None for residual in former)
        weights = {name: stored for name, stored in weights.items() if not _is_beyond(name, each, left)}
        config[each.count] = left
        for name in (name for name, path in row.indices.items() if path == each.path and config.get(name)):
            config[name] = [i for i in config[name] if i < left]
    return FittedControlNet(config, weights, residuals, before)


def _fitted(
    each: BlockList,
    kept: Sequence[int],
    former: Sequence[int | None],
    spread: str,
    least: int,
    number: int,
    folder: Path,
) -> int:
    """How many blocks of the ControlNet stay, `least` to `number`, so that each block gets its former residual."""
    wanted = [former[i] for i in kept]
    for left in range(number, least - 1, -1):
        if residuals_of(spread, len(kept), left) == wanted:
            return left
    given = residuals_of(spread, len(kept), number)
    wrong = [(old, have, want) for old, have, want in zip(kept, given, wanted, strict=True) if have != want]
    old, have, want = wrong[0]
    groups: dict[int, list[int]] = {}
    for i, residual in enumerate(former):
        if residual is not None:
            groups.setdefault(residual, []).append(i)
    listed = "; ".join(" ".join(map(str, blocks)) for blocks in groups.values())
    raise UserError(
        f"{folder} does not fit this student: {len(wrong)} of the {len(kept)} {each.path} that stay would get another residual "
        f"than before (block {old} {_named(have)} instead of {_named(want)}); {_HINTS[spread]}: {listed}"
    )


_HINTS = {
    "interval": "it fits where equally many of every group stay, fewer only of the last",
    "ratio": "it fits where the last block and equally many of every group stay",
    "next": "it fits where the first block stays, and the blocks with residuals that stay are the first ones of",
    "modulo": "it fits where the remaining blocks go through the groups in turn",
}


def _named(residual: int | None) -> str:
    return "none" if residual is None else f"number {residual}"


def _kept_of_original(path: str, cuts: Sequence[Cut]) -> list[int]:
    """Remaining blocks of a list after pruning, by their index before the first."""
    kept = list(range(cuts[0].depths[path]))
    for cut in cuts:
        kept = [kept[i] for i in cut.kept[path]]
    return kept


def _numbers(weights: Mapping[str, Stored], prefix: str) -> set[str]:
    """The indices of the entries of a module list."""
    return {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}


def _is_beyond(name: str, each: BlockList, left: int) -> bool:
    """Whether a tensor belongs to an entry of the ControlNet's lists that goes."""
    assert each.control is not None
    for prefix in (f"{each.path}.", f"{each.control.taps}."):
        if name.startswith(prefix):
            return int(name.removeprefix(prefix).partition(".")[0]) >= left
    return False
