"""From the values of a run to the statements of its page: headline, blocks, tables, checks, cost, provenance.

Every function takes a `RunData` and returns what the template prints; a fact that is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.core.files import file_label
from tinyfusion.models.plan import PrunePlan
from tinyfusion.report.format import count, duration, percent, significant
from tinyfusion.report.run_data import MODEL_NAMES, RunData
from tinyfusion.report.scores import SHORT_NAMES, alike, role_of


@dataclass(frozen=True)
class Tile:
    """One number of the headline: (role, text) from left to right, role being teacher, cut, student or plain.

    names: what to write beneath every value, or nothing. size: large, medium or small.
    """

    label: str
    values: list[tuple[str, str]]
    note: str = ""
    names: tuple[str, ...] = ()
    size: str = "small"


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks that were decided together. blocks: (index, kept). label: "1 of 2", empty without groups."""

    blocks: list[tuple[int, bool]]
    label: str
    confidence: float | None


@dataclass(frozen=True)
class Check:
    """An expected number beside what came; state is ok, off or missing."""

    metric: str
    expected: str
    got: str
    state: str
    note: str


@dataclass(frozen=True)
class Stage:
    """What a stage cost. share: of the whole time, 0 to 1."""

    name: str
    seconds: float
    share: float
    images: int | None


def depths(run: RunData) -> dict[str, int]:
    """Blocks per model, through all of its lists, from the plan, the measured models or model.json."""
    found: dict[str, int] = {}
    for name, model in run.models.items():
        depth = model.get("depth", (model.get("arch") or {}).get("depth"))  # folders before 0.4.0 say it in arch alone
        if isinstance(depth, int):
            found[name] = depth
        elif model.get("kept"):
            found[name] = sum(len(blocks) for blocks in model["kept"].values())
    for name, model in ((run.speed or {}).get("models") or {}).items():
        found[name] = model["depth"]
    if run.plan:
        found["teacher"] = sum(run.plan.depth.values())
        found.setdefault("student", sum(len(kept) for kept in run.plan.kept.values()))
        found["pruned"] = found["student"]
    return found


def headline(run: RunData) -> list[Tile]:
    """The tiles at the top."""
    tiles = [tile for tile in (_fid_tile(run), _depth_tile(run), *_speed_tiles(run), *_kept_tiles(run)) if tile]
    if not (run.speed or run.evaluations):
        tiles += _training_tiles(run)
    return sorted(tiles, key=lambda tile: ("large", "medium", "small").index(tile.size))


def _depth_tile(run: RunData) -> Tile | None:
    found = depths(run)
    if run.plan and "teacher" in found:
        scheme = (
            f"scheme {run.plan.scheme}, {run.plan.criterion}" if run.plan.scheme else f"criterion: {run.plan.criterion}"
        )
        sizes = [f"{name} {depth} → {len(run.plan.kept[name])}" for name, depth in run.plan.depth.items()]
        note = ", ".join([*(sizes if len(sizes) > 1 else []), scheme])
        return Tile("blocks", [("teacher", str(found["teacher"])), ("student", str(found["student"]))], note)
    values = [("plain", str(depth)) for depth in list(found.values())[:1]]
    return Tile("blocks", values) if values else None


def _speed_tiles(run: RunData) -> list[Tile]:
    speed = run.speed
    if not speed or not {"teacher", "student"} <= set(speed.get("models", {})):
        return []
    teacher, student = speed["models"]["teacher"], speed["models"]["student"]

    def pair(key: str) -> list[tuple[str, str]]:
        more = [("extra", count(routed[key]))] if routed else []
        return [("teacher", count(teacher[key])), ("student", count(student[key])), *more]

    def less(key: str) -> str:
        more = f", dynamic {percent(routed[key] / teacher[key])}" if routed else ""
        return f"{percent(student[key] / teacher[key])} of the teacher's{more}"

    low, high = speed.get("speedup_spread", [speed["speedup"]] * 2)
    routed = speed["models"].get("dynamic")
    times = [("teacher", significant(teacher["latency_ms"])), ("student", significant(student["latency_ms"]))]
    times += [("extra", significant(routed["latency_ms"]))] if routed else []
    batch = f"median, batch {speed['batch_size']}"
    faster = [("student", _faster(speed["speedup"], routed is None))]
    faster += [("extra", _faster(routed["speedup"], True))] if routed else []
    return [
        Tile(
            "sampling speed",
            faster,
            f"side by side; half of the ratios in {low:.2f}× to {high:.2f}×",
            size="medium",
        ),
        Tile("parameters", pair("num_parameters"), less("num_parameters")),
        Tile("MACs per image and step", pair("macs"), less("macs")),
        Tile("ms per denoising step", times, batch),
    ]


def _faster(ratio: float, whole: bool) -> str:
    """A speed-up in words; without them where another one follows."""
    return f"{ratio:.2f}×" + ("" if not whole else " faster" if ratio >= 1 else " the speed")


def _kept_tiles(run: RunData) -> list[Tile]:
    """Of a dynamic model: the share of the blocks that runs, and in how many sub-networks."""
    kept, reached = run.kept or {}, run.reached or {}
    tiles = []
    if "ratio" in reached:
        note = f"of the multiply-accumulates of the blocks; wanted {percent(reached['target'])}"
        tiles.append(Tile("what runs", [("extra", percent(reached["ratio"]))], note))
    if kept:
        note = f"over {len(kept['times'])} times of the sampler"
        tiles.append(Tile("sub-networks", [("extra", str(kept["sub_networks"]))], note))
        if not run.speed:
            macs = [("plain", count(kept["static_macs"])), ("extra", count(kept["macs"]))]
            tiles.append(Tile("MACs per image and step", macs, "whole and on average over a sampling"))
    return tiles


def _fid_tile(run: RunData) -> Tile | None:
    """Only what one protocol scored stands in a row."""
    found = alike(run)
    if not found:
        return None
    values = [(role_of(name), significant(fid)) for name, fid in found.fids.items()]
    others = " and ".join(SHORT_NAMES.get(name, name) for name in found.others)
    note = f"The protocols differ: see the table for {others}." if others else ""
    names = tuple(SHORT_NAMES.get(name, name) for name in found.fids)
    return Tile(f"FID against {found.reference}, lower is better", values, note, names, "large")


def _training_tiles(run: RunData) -> list[Tile]:
    """For a run that is one stage only, or has come no further; of a story without what its cost says."""
    tiles = []
    for stage, lines in run.metrics.items():
        if lines:
            last = lines[-1]
            loss = [("plain", significant(last.get("loss")))]
            tiles.append(Tile(f"{stage}: loss", loss, f"at step {last.get('step'):,}"))
            if not run.parts:
                seen = [("plain", count(last.get("seen_images")))]
                tiles.append(Tile(f"{stage}: images seen", seen, duration(last.get("seconds"))))
    return tiles


def block_lists(plan: PrunePlan, confidence: Mapping[str, Sequence[float]] | None) -> dict[str, list[BlockGroup]]:
    """Every list of blocks in groups; one group without a label where the criterion knows none."""
    lists: dict[str, list[BlockGroup]] = {}
    for name, depth in plan.depth.items():
        kept, sizes = set(plan.kept[name]), (plan.groups or {}).get(name)
        sure = list((confidence or {}).get(name, ()))
        groups, start = [], 0
        for i, (keep, size) in enumerate(sizes or [[len(kept), depth]]):
            blocks = [(index, index in kept) for index in range(start, start + size)]
            groups.append(BlockGroup(blocks, f"{keep} of {size}" if sizes else "", sure[i] if i < len(sure) else None))
            start += size
        lists[name] = groups
    return lists


def final_confidence(run: RunData) -> Mapping[str, list[float]] | None:
    """How sure every group is: the plan's probability of the chosen candidate, else that of the last log line.

    Of a subset, where every block has a probability of its own, the mean of those that are kept.
    """
    plan = run.plan
    if not plan or not plan.groups:
        return None
    if run.decided and "probability" in str(plan.scores.get("meaning", "")):
        found = {name: plan.scores[name] for name in plan.groups if name in plan.scores}
        if plan.distribution == "subset":
            joined = {name: [value for group in rows for value in group] for name, rows in found.items()}
            return {name: _means_of_kept(values, plan.groups[name], plan.kept[name]) for name, values in joined.items()}
        return {name: [max(group) for group in rows] for name, rows in found.items()}
    lines = [line for line in run.metrics.get("prune", ()) if "confidence" in line]
    if lines and "marginals" in lines[-1]:
        marginals = lines[-1]["marginals"]
        return {
            n: _means_of_kept(marginals[n], sizes, plan.kept[n]) for n, sizes in plan.groups.items() if n in marginals
        }
    return lines[-1]["confidence"] if lines else None


def _means_of_kept(values: Sequence[float], sizes: Sequence[Sequence[int]], kept: Sequence[int]) -> list[float]:
    """Mean over the kept blocks of every group [N, M]; values: one per block of the list."""
    means, start = [], 0
    for _, size in sizes:
        inside = [values[block] for block in kept if start <= block < start + size]
        means.append(sum(inside) / len(inside) if inside else 1.0)
        start += size
    return means


def measured(run: RunData, metric: str) -> float | None:
    """A number by dotted name: "speedup", "student.digits.fid", "student.macs"; None where it is not there.

    "step-100000.digits.fid" is that of the recovery's checkpoint at that step.
    """
    model, _, rest = metric.partition(".")
    reference, _, key = rest.rpartition(".")
    speed, label = run.speed or {}, file_label(reference)
    source: Mapping[str, Any] = speed
    if reference and model.startswith("step-"):
        same = [p for p in run.fid_steps if f"step-{p['step']}" == model and p.get("reference", label) == label]
        source = same[0] if same else {}
    elif reference:
        source = run.evaluations.get(model, {}).get(label, {})
    elif rest:
        source = (speed.get("models") or {}).get(model, {})
    value = source.get(key or model)
    return float(value) if isinstance(value, int | float) else None


def checks(run: RunData) -> list[Check]:
    """The recipe's expected numbers against what came."""
    found = []
    for item in run.recipe.get("expected") or ():
        value, wanted, tolerance = measured(run, item["metric"]), item["value"], item["tolerance"]
        state = "missing" if value is None else "ok" if abs(value - wanted) <= tolerance else "off"
        expected = f"{significant(wanted)} ± {significant(tolerance, 2)}"
        found.append(Check(item["metric"], expected, significant(value), state, item.get("note", "")))
    return found


def stages(run: RunData) -> list[Stage]:
    """Seconds and images of every stage."""
    seconds = dict(run.record.get("stages") or {})
    for part in run.parts or (run,):
        if not seconds.get(verb := str(part.record.get("verb"))) and verb != "run" and part.record.get("seconds"):
            seconds[verb] = part.record["seconds"]
    for name, lines in run.metrics.items():  # a stage that is at work tells by its log
        seconds.setdefault(name, max(line.get("seconds", 0.0) for line in lines))
    total = sum(seconds.values()) or 1.0
    return [Stage(name, value, value / total, _images(run, name)) for name, value in seconds.items()]


def _images(run: RunData, stage: str) -> int | None:
    record = run.records.get(stage, {})
    if record.get("seen_images") is not None:
        return int(record["seen_images"])
    lines = run.metrics.get(stage)
    return int(lines[-1]["seen_images"]) if lines else None


def budget(run: RunData) -> str:
    """Images seen by search and recovery, and their share of the teacher's training where that is known."""
    seen = {name: images for name in ("prune", "recover", "dynamic", "train") if (images := _images(run, name))}
    if not seen:
        return ""
    words = {
        "prune": "the search",
        "recover": "the recovery",
        "dynamic": "the training of routers",
        "train": "the training",
    }
    text = " and ".join(f"{count(images)} by {words[name]}" for name, images in seen.items())
    text = f"Images seen: {text}"
    teacher = run.record.get("teacher_seen_images")
    if teacher:
        text += f"; together {percent(sum(seen.values()) / teacher)} of the {count(teacher)} that the teacher's training saw"
    return text + "."


def provenance(run: RunData) -> list[tuple[str, str]]:
    """What was used to make the run; of a story the parts where they differ."""
    rows: list[tuple[str, str]] = []
    for part in run.parts or (run,):
        machine = part.record.get("machine") or {}
        system = f"{machine.get('system', '?')} {machine.get('processor', '')}"
        where = f"{system}, {machine.get('cores', '?')} cores, Python {machine.get('python', '?')}"
        rows += [("run folder", part.name), ("tinyfusion", str(part.record.get("version", "?")))]
        if part.record.get("commit"):
            rows.append(("commit", str(part.record["commit"])))
        rows += [("machine", where), ("seed", str(part.recipe.get("seed", "?")))]
    teacher = run.recipe.get("teacher_hash") or (run.plan.teacher if run.plan else None)
    if teacher:
        rows.append(("teacher", str(teacher)))
    rows += [(MODEL_NAMES.get(name, name), str(m["hash"])) for name, m in run.models.items() if m.get("hash")]
    return _grouped(rows)


def _grouped(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows of one name as one row, equal values said once."""
    found: dict[str, dict[str, None]] = {}
    for name, value in rows:
        found.setdefault(name, {})[value] = None
    return [(name, "; ".join(values)) for name, values in found.items()]
