"""From the values of a run to the statements of its page: headline, blocks, tables, checks, cost, provenance.

Every function takes a `RunData` and returns what the template prints; a fact that is not there is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.core.files import file_label
from tinyfusion.report.format import count, duration, percent, significant
from tinyfusion.report.run_data import MODEL_NAMES, RunData
from tinyfusion.report.scores import SHORT_NAMES, UNBIASED_IMAGES, alike, role_of

_NEAR_MACS = 0.15  # how far a speed-up may be from the ratio of MACs, relative to it
_UNSTEADY = 0.25  # middle half of a model's times, relative to their median, above which a machine was busy
_HIGHER = ("speedup", "inception_score", "precision", "recall", "psnr_db", "ssim")
_LOWER = ("fid", "sfid", "latency_ms")


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
class Check:
    """An expected number beside what came; state is ok, better, off, doubtful (the machine was busy) or missing."""

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
    note = speed_doubt(run) or f"half of the ratios in {low:.2f}× to {high:.2f}×"
    faster = [("student", _faster(speed["speedup"], routed is None))]
    faster += [("extra", _faster(routed["speedup"], True))] if routed else []
    return [
        Tile("sampling speed", faster, note, size="medium"),
        Tile("parameters", pair("num_parameters"), less("num_parameters")),
        Tile("MACs per image and step", pair("macs"), less("macs")),
        Tile("ms per denoising step", times, batch),
    ]


def speed_doubt(run: RunData) -> str:
    """Why a measured speed-up says little of the student: it is far from the ratio of MACs. Empty where it is near."""
    speed = run.speed or {}
    models = speed.get("models") or {}
    if not {"teacher", "student"} <= set(models) or "speedup" not in speed:
        return ""
    teacher, student = models["teacher"], models["student"]
    if not student.get("macs") or not teacher.get("macs"):
        return ""
    ideal = teacher["macs"] / student["macs"]
    if abs(math.log(max(speed["speedup"], 1e-9) / ideal)) < math.log(1 + _NEAR_MACS):
        return ""
    text = f"far from the {ideal:.2f}× of the MACs"
    if was_busy(run):
        return f"{text}: the times scatter, so this machine was busy. Measure again when it is idle"
    return f"{text}: what is not a block, or the start of kernels, takes the time"


def was_busy(run: RunData) -> bool:
    """Whether the times of a speed measurement scatter."""
    models = ((run.speed or {}).get("models") or {}).values()
    return any(scatters(model.get("latency_ms_spread") or (0.0, 0.0), model.get("latency_ms", 0.0)) for model in models)


def scatters(quartiles: Sequence[float], median: float) -> bool:
    """Whether times scatter as they do where other programs run."""
    return quartiles[1] - quartiles[0] > _UNSTEADY * median


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
    counts = [run.evaluations[name][found.reference].get("num_images") or UNBIASED_IMAGES for name in found.fids]
    if min(counts) < UNBIASED_IMAGES:
        note = f"{count(min(counts))} images: biased upward, compare only at equal counts. {note}".strip()
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
        state, note = _compared(item["metric"], value, wanted, tolerance), item.get("note", "")
        if state != "ok" and item["metric"] == "speedup" and was_busy(run) and (doubt := speed_doubt(run)):
            state, note = "doubtful", doubt
        expected = f"{significant(wanted)} ± {significant(tolerance, 2)}"
        found.append(Check(item["metric"], expected, significant(value), state, note))
    return found


def _compared(metric: str, value: float | None, wanted: float, tolerance: float) -> str:
    """The state of a `Check`: a number on the good side of what was expected is better, not off."""
    if value is None:
        return "missing"
    if abs(value - wanted) <= tolerance:
        return "ok"
    key = metric.rpartition(".")[2]
    return "better" if key in (_HIGHER if value > wanted else _LOWER) else "off"


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
