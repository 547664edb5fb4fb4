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
from tinyfusion.report.run_data import MODEL_NAMES, MODELS, RunData


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
class EvaluationRow:
    """One model's numbers, in the order of `COLUMNS`. mark: number of its protocol beneath the table."""

    model: str
    role: str
    cells: list[str]
    mark: int
    starts_protocol: bool


@dataclass(frozen=True)
class EvaluationTable:
    """The models scored against one reference. protocols: by mark, from 1."""

    reference: str
    columns: list[str]
    rows: list[EvaluationRow]
    protocols: list[str]


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


COLUMNS = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "inception_score": "IS ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "nearest_reference_distance": "nearest reference",
    "num_images": "images",
}
_ROLES = {"teacher": "teacher", "pruned": "cut", "student": "student"}
_SHORT_NAMES = {"teacher": "teacher", "pruned": "cut", "student": "recovered"}
_WHOLE = ("num_images",)


def role_of(model: str) -> str:
    """The colour of a model on the page: teacher, cut, student or plain."""
    return _ROLES.get(model, "plain")


def depths(run: RunData) -> dict[str, int]:
    """Blocks per model, from the plan, the measured models or model.json."""
    found: dict[str, int] = {}
    for name, model in run.models.items():
        depth = (model.get("arch") or {}).get("depth")
        if isinstance(depth, int):
            found[name] = depth
    for name, model in ((run.speed or {}).get("models") or {}).items():
        found[name] = model["depth"]
    if run.plan:
        found["teacher"] = sum(run.plan.depth.values())
        found.setdefault("student", sum(len(kept) for kept in run.plan.kept.values()))
        found["pruned"] = found["student"]
    return found


def headline(run: RunData) -> list[Tile]:
    """The tiles at the top."""
    tiles = [tile for tile in (_fid_tile(run), _depth_tile(run), *_speed_tiles(run)) if tile]
    if not (run.speed or run.evaluations):
        tiles += _training_tiles(run)
    return sorted(tiles, key=lambda tile: ("large", "medium", "small").index(tile.size))


def _depth_tile(run: RunData) -> Tile | None:
    found = depths(run)
    if run.plan and "teacher" in found:
        scheme = (
            f"scheme {run.plan.scheme}, {run.plan.criterion}" if run.plan.scheme else f"criterion: {run.plan.criterion}"
        )
        return Tile("blocks", [("teacher", str(found["teacher"])), ("student", str(found["student"]))], scheme)
    values = [("plain", str(depth)) for depth in list(found.values())[:1]]
    return Tile("blocks", values) if values else None


def _speed_tiles(run: RunData) -> list[Tile]:
    speed = run.speed
    if not speed or not {"teacher", "student"} <= set(speed.get("models", {})):
        return []
    teacher, student = speed["models"]["teacher"], speed["models"]["student"]

    def pair(key: str) -> list[tuple[str, str]]:
        return [("teacher", count(teacher[key])), ("student", count(student[key]))]

    def less(key: str) -> str:
        return f"{percent(student[key] / teacher[key])} of the teacher's"

    low, high = speed.get("speedup_spread", [speed["speedup"]] * 2)
    times = [("teacher", significant(teacher["latency_ms"])), ("student", significant(student["latency_ms"]))]
    ratio = speed["speedup"]
    faster = f"{ratio:.2f}× faster" if ratio >= 1 else f"{ratio:.2f}× the speed"
    batch = f"median, batch {speed['batch_size']}"
    return [
        Tile(
            "sampling speed",
            [("student", faster)],
            f"side by side; half of the ratios in {low:.2f}× to {high:.2f}×",
            size="medium",
        ),
        Tile("parameters", pair("num_parameters"), less("num_parameters")),
        Tile("MACs per image and step", pair("macs"), less("macs")),
        Tile("ms per denoising step", times, batch),
    ]


def _fid_tile(run: RunData) -> Tile | None:
    for reference in run.references:
        found = {name: run.evaluations.get(name, {}).get(reference) for name in _SHORT_NAMES}
        there = {name: evaluation for name, evaluation in found.items() if evaluation}
        if there:
            values = [(_ROLES[name], significant(evaluation.get("fid"))) for name, evaluation in there.items()]
            same = len({evaluation.get("protocol") for evaluation in there.values()}) == 1
            note = "" if same else "The protocols differ: see the table before comparing."
            names = tuple(_SHORT_NAMES[name] for name in there)
            return Tile(f"FID against {reference}, lower is better", values, note, names, "large")
    return None


def _training_tiles(run: RunData) -> list[Tile]:
    """For a run that is one stage only, or has come no further."""
    tiles = []
    for stage, lines in run.metrics.items():
        if lines:
            last = lines[-1]
            tiles.append(
                Tile(f"{stage}: loss", [("plain", significant(last.get("loss")))], f"at step {last.get('step'):,}")
            )
            tiles.append(
                Tile(
                    f"{stage}: images seen", [("plain", count(last.get("seen_images")))], duration(last.get("seconds"))
                )
            )
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


def evaluation_tables(run: RunData) -> list[EvaluationTable]:
    """One table per reference; rows of one protocol stand together."""
    return [_evaluation_table(run, reference) for reference in run.references]


def _evaluation_table(run: RunData, reference: str) -> EvaluationTable:
    there = [(name, run.evaluations[name][reference]) for name in _ordered(run) if reference in run.evaluations[name]]
    columns = [key for key in COLUMNS if any(key in evaluation for _, evaluation in there)]
    protocols = list(dict.fromkeys(str(evaluation.get("protocol", "not stated")) for _, evaluation in there))
    rows = []
    for mark, protocol in enumerate(protocols, start=1):
        same = [(name, e) for name, e in there if str(e.get("protocol", "not stated")) == protocol]
        for i, (name, evaluation) in enumerate(same):
            role = role_of(name)
            cells = [_cell(key, evaluation.get(key)) for key in columns]
            rows.append(EvaluationRow(MODEL_NAMES.get(name, name), role, cells, mark, i == 0 and mark > 1))
    return EvaluationTable(reference, [COLUMNS[key] for key in columns], rows, protocols)


def _ordered(run: RunData) -> list[str]:
    return sorted(run.evaluations, key=lambda name: MODELS.index(name) if name in MODELS else len(MODELS))


def _cell(key: str, value: float | None) -> str:
    return count(value) if key in _WHOLE else significant(value)


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
    if not seconds and run.record.get("verb") != "run" and run.record.get("seconds"):
        seconds = {str(run.record.get("verb")): run.record["seconds"]}
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
    seen = {name: images for name in ("prune", "recover", "train") if (images := _images(run, name))}
    if not seen:
        return ""
    words = {"prune": "the search", "recover": "the recovery", "train": "the training"}
    text = " and ".join(f"{count(images)} by {words[name]}" for name, images in seen.items())
    text = f"Images seen: {text}"
    teacher = run.record.get("teacher_seen_images")
    if teacher:
        text += f"; together {percent(sum(seen.values()) / teacher)} of the {count(teacher)} that the teacher's training saw"
    return text + "."


def provenance(run: RunData) -> list[tuple[str, str]]:
    """What was used to make the run."""
    record = run.record
    machine = record.get("machine") or {}
    system = f"{machine.get('system', '?')} {machine.get('processor', '')}"
    where = f"{system}, {machine.get('cores', '?')} cores, Python {machine.get('python', '?')}"
    rows = [("run folder", run.name), ("tinyfusion", str(record.get("version", "?")))]
    if record.get("commit"):
        rows.append(("commit", str(record["commit"])))
    rows += [("machine", where), ("seed", str(run.recipe.get("seed", "?")))]
    teacher = run.recipe.get("teacher_hash") or (run.plan.teacher if run.plan else None)
    if teacher:
        rows.append(("teacher", str(teacher)))
    rows += [(MODEL_NAMES.get(name, name), str(m["hash"])) for name, m in run.models.items() if m.get("hash")]
    return rows


@dataclass(frozen=True)
class Comparison:
    """Students of several runs side by side. A cell is (text, mark); marks number the protocols beneath."""

    columns: list[str]
    rows: list[tuple[str, list[tuple[str, int | None]]]]
    protocols: list[str]


def comparison(runs: Sequence[RunData]) -> Comparison | None:
    """A table over runs, where more than one of them was evaluated; the first reference in full, of others the student."""
    if sum(bool(run.evaluations) for run in runs) < 2:
        return None
    references = list(dict.fromkeys(reference for run in runs for reference in run.references))
    wanted = [*((model, references[0]) for model in _SHORT_NAMES), *(("student", other) for other in references[1:])]
    protocols: list[str] = []

    def marked(text: str, protocol: str | None) -> tuple[str, int | None]:
        if protocol is None:
            return text, None
        if protocol not in protocols:
            protocols.append(protocol)
        return text, protocols.index(protocol) + 1

    rows = []
    for run in runs:
        found, speed = depths(run), run.speed or {}
        student = (speed.get("models") or {}).get("student", {})
        faster = f"{speed['speedup']:.2f}×" if "speedup" in speed else "–"
        cells = [
            (f"{found['teacher']} → {found['student']}" if {"teacher", "student"} <= set(found) else "–", None),
            (count(student.get("num_parameters")), None),
            (count(student.get("macs")), None),
            marked(faster, speed.get("protocol")),
        ]
        for model, reference in wanted:
            evaluation = run.evaluations.get(model, {}).get(reference, {})
            cells.append(marked(significant(evaluation.get("fid")), evaluation.get("protocol")))
        rows.append((run.name, cells))
    fids = [f"FID {reference}, {_SHORT_NAMES[model]}" for model, reference in wanted]
    return Comparison(["blocks", "parameters", "MACs", "speed", *fids], rows, protocols)
