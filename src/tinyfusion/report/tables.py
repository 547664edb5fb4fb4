"""What a run's measurements beside the training say: the series of its pictures, and the tables beneath them.

Every function takes a `RunData` and returns what is drawn and printed; None, or nothing, where it was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.report.charts import Span, spans
from tinyfusion.report.format import count, percent, significant
from tinyfusion.report.run_data import MODEL_NAMES, RunData
from tinyfusion.report.scores import Series

_MOST_ROWS = 60  # of a table of decisions


@dataclass(frozen=True)
class Table:
    """The numbers of a picture. note: what was left out, or how they were measured."""

    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def decision_lines(run: RunData) -> list[dict[str, Any]]:
    """The log lines of the search that hold a decision."""
    return [line for line in run.metrics.get("prune", ()) if "kept" in line and "confidence" in line]


def decision_groups(run: RunData) -> dict[str, list[Span]]:
    """The groups of every list of blocks, with what the recipe protects; empty where the criterion knows none."""
    if not run.plan or not run.plan.groups:
        return {}
    protected = [int(block) for block in (run.recipe.get("prune") or {}).get("protect") or ()]
    first = first_blocks(run.plan.depth)
    return {name: spans(sizes, [block - first[name] for block in protected]) for name, sizes in run.plan.groups.items()}


def chance_sentence(groups: Sequence[Span], per_block: bool) -> str:
    """The chance level of every kind of group: "50 % for 1:2, 17 % for 2:4"."""
    levels = {span.name: span.block_chance if per_block else span.choice_chance for span in groups}
    return ", ".join(f"{_share(level)} for {name}" for name, level in levels.items())


def _share(value: float) -> str:
    return percent(value) if value >= 1e-3 else f"{100 * value:.1g} %"


def decision_table(lines: Sequence[Mapping[str, Any]], name: str) -> Table:
    """The first and the last decision and every change between them, with the confidence of the groups."""
    changed = [
        line for i, line in enumerate(lines)
        if i in (0, len(lines) - 1) or line["kept"][name] != lines[i - 1]["kept"][name]
    ]  # fmt: skip
    rows = []
    for line in changed[-_MOST_ROWS:]:
        sure = sorted(line["confidence"][name])
        middle = float(np.median(sure))
        kept = ", ".join(map(str, line["kept"][name]))
        rows.append([f"{line['step']:,}", kept, *(f"{value:.2f}" for value in (sure[0], middle, sure[-1]))])
    left_out = len(changed) - len(rows)
    note = f"The first, the last, and every change between them, of {len(lines)} logged steps."
    note += f" {left_out} earlier changes are left out." if left_out else ""
    return Table(["step", "kept", "least sure", "median", "surest"], rows, note)


@dataclass(frozen=True)
class CalibrationMark:
    """A mask among the others. below: share of the tried masks with a lower loss."""

    label: str
    loss: float
    below: float
    is_own: bool


@dataclass(frozen=True)
class Calibration:
    """Losses of many masks right after pruning (finite and positive ones), and the masks that have a name."""

    losses: list[float]
    marks: list[CalibrationMark]
    table: Table


def calibration(run: RunData, others: Sequence[RunData] = ()) -> Calibration | None:
    """From calibration.json: losses, masks as strings of 0 and 1 in block order, marks {criterion: loss} and their masks.

    others: runs on the same page. Their decisions about the same teacher are marked where their masks were tried.
    """
    record = run.calibration or {}
    tried = record.get("losses") or ()
    losses = sorted(float(x) for x in tried if _is_loss(x))
    if len(losses) < 2:
        return None
    known = (
        dict(zip(record.get("masks") or (), tried, strict=True)) if len(record.get("masks") or ()) == len(tried) else {}
    )
    marks = {str(name): loss for name, loss in (record.get("marks") or {}).items() if _is_loss(loss)}
    known |= {mask: marks[name] for name, mask in (record.get("mark_masks") or {}).items() if name in marks}
    named: dict[float, list[str]] = {}
    own = known.get(_bits(run)) if run.plan and run.decided else None
    own = marks.get(run.plan.criterion) if own is None and run.plan and run.decided else own
    if _is_loss(own):
        named[_key(own)] = ["this run"]
    for name, loss in [*marks.items(), *_elsewhere(run, others, known)]:
        named.setdefault(_key(loss), []).append(name)
    found = [
        CalibrationMark(
            ", ".join(names), loss, float(np.searchsorted(losses, loss)) / len(losses), names[0] == "this run"
        )
        for loss, names in sorted(named.items())
    ]
    rows = [[mark.label, significant(mark.loss, 4), percent(mark.below)] for mark in found]
    points = (("smallest", 0.0), ("median", 0.5), ("largest", 1.0))
    rows += [[f"{word} of all", significant(float(np.quantile(losses, q)), 4), percent(q)] for word, q in points]
    note = f"{len(losses):,} masks, all on the same images with the same noise and timesteps."
    broken = len(tried) - len(losses)
    note += f" {broken:,} more have no finite loss and are not shown." if broken else ""
    return Calibration(losses, found, Table(["mask", "loss", "masks below it"], rows, note))


def _is_loss(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _key(loss: Any) -> float:
    """Losses that differ by rounding alone are one."""
    return round(float(loss), 9)


def _bits(run: RunData) -> str:
    """The decision as one character per block, 1 for kept."""
    assert run.plan is not None
    lists = ((set(run.plan.kept[name]), depth) for name, depth in run.plan.depth.items())
    return "".join("1" if block in kept else "0" for kept, depth in lists for block in range(depth))


def _elsewhere(run: RunData, others: Sequence[RunData], known: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(criterion and run, loss) of other runs' decisions about the same teacher, where their mask is known."""
    found = []
    for other in others:
        if (
            other is run
            or not other.plan
            or not other.decided
            or not run.plan
            or other.plan.teacher != run.plan.teacher
        ):
            continue
        loss = known.get(_bits(other))
        if loss is not None and _is_loss(loss):
            found.append((f"{other.plan.criterion} ({other.name.rstrip('/').rpartition('/')[2]})", float(loss)))
    return found


def lists_of(record: Mapping[str, Any]) -> dict[str, int]:
    """Blocks of every list of the teacher that activations.json tells of; of an old record all in one."""
    return dict(record.get("lists") or {"blocks": record["depth"]})


def place_of(block: int, lists: Mapping[str, int]) -> tuple[str, int]:
    """The list that a block stands in, counted through the lists, and its number there."""
    firsts = first_blocks(lists)
    name = max((name for name in lists if firsts[name] <= block), key=lambda name: firsts[name])
    return name, block - firsts[name]


def activation_table(run: RunData) -> Table | None:
    """Extremes and spread of every block's output, in order."""
    record = run.activations
    if not record:
        return None
    lists = lists_of(record)
    rows = []
    for model, entries in record["models"].items():
        for entry in entries:
            name, index = place_of(entry["teacher_block"], lists)
            place = [name, str(index)] if len(lists) > 1 else [str(index)]
            numbers = [significant(entry[key]) for key in ("min", "max", "mean", "std")]
            rows.append([MODEL_NAMES.get(model, model), *place, *numbers])
    head = ["model", *(["list"] if len(lists) > 1 else []), "block of the teacher"]
    return Table([*head, "min", "max", "mean", "σ"], rows, record.get("protocol", ""))


def student_depths(run: RunData) -> dict[str, int]:
    """Blocks that stay per list; empty where nobody knows."""
    return {name: len(kept) for name, kept in run.plan.kept.items()} if run.plan else {}


def depth_speed_table(run: RunData) -> Table | None:
    """Speed-up at every measured depth, with the ideal."""
    record = run.depth_speed
    if not record:
        return None
    full, rows = record["teacher_depth"], []
    names = list(record["points"][0].get("lists", ()))
    for point in record["points"]:
        low, high = point["speedup_spread"]
        measured = [f"{point['speedup']:.2f}×", f"{low:.2f}× to {high:.2f}×", f"{full / point['depth']:.2f}×"]
        split = [str(point["lists"][name]) for name in names]
        blocks = [str(point["depth"]), *split, str(full - point["depth"])]
        rows.append([*blocks, significant(point["latency_ms"]), *measured])
    columns = ["blocks left", *names, "fewer", "ms per step", "times as fast", "middle half", "ideal"]
    return Table(columns, rows, record.get("protocol", ""))


def fid_table(listed: Sequence[Series]) -> Table:
    """FID at every evaluated checkpoint of recoveries that one protocol scored."""
    rows = [
        [one.method, f"{point['step']:,}", count(point.get("images")), significant(point["fid"]),
         significant(point.get("inception_score"))]
        for one in listed for point in one.points
    ]  # fmt: skip
    return Table(["recovery", "step", "images seen", "FID", "IS"], rows)
