"""Numbers and tables of the page. A column has scores of one protocol, or a row marks where another begins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.core.files import file_label
from tinyfusion.core.rundir import comparable_protocol
from tinyfusion.report.format import count, duration, percent, significant
from tinyfusion.report.load import FURTHER, MODELS, Run

UNBIASED_IMAGES = 10_000  # a Fréchet distance over fewer images is visibly too high
_NAMES = {
    "pruned": "pruned, before recovery",
    "student": "student, recovered",
    "few-steps": "student of few steps",
    "real": "real images",
}
STAGE_NAMES = {"pictures": "diagnostics"}
_SCORES = {
    "fid": "{distance} ↓", "sfid": "sFID ↓", "inception_score": "IS ↑", "precision": "precision ↑", "recall": "recall ↑",
    "clip_score": "CLIP score ↑", "prompt_accuracy": "prompt accuracy ↑",
    "nearest_reference_distance": "nearest reference", "num_images": "images",
}  # fmt: skip
_TRAININGS = {
    "prune": "search",
    "recover": "recovery",
    "dynamic": "training of routers",
    "distill-steps": "distillation of steps",
    "train": "training",
}
_NEAR_MACS = 0.15  # how far a speed-up may be from the ratio of MACs, relative to it
_UNSTEADY = 0.25  # interquartile range of times, relative to their median, from which a machine counts as busy
_HIGHER_IS_BETTER = (
    "speedup",
    "inception_score",
    "precision",
    "recall",
    "psnr_db",
    "ssim",
    "clip_score",
    "prompt_accuracy",
)
_LOWER_IS_BETTER = ("fid", "sfid", "latency_ms", "lpips")
_CHECK_WORDS = {"doubtful": "busy machine?", "missing": "not measured"}


@dataclass(frozen=True)
class Cell:
    """Text of a table. role: CSS class of its colour. mark: number of its protocol. note: a remark beneath."""

    text: str
    role: str = ""
    mark: int = 0
    note: str = ""


Row = Sequence[str | Cell]


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; a row that is a text is a heading within the table. protocols: numbered where several."""

    columns: Sequence[str]
    rows: Sequence[Row | str]
    note: str = ""
    protocols: Sequence[str] = ()


def model_name(model: str) -> str:
    """The name of a model on the page."""
    return _NAMES.get(model, model)


def stated(values: Mapping[str, Any]) -> str:
    """The protocol of a score, or "not stated"."""
    return str(values.get("protocol") or "not stated")


def distance_name(scores: Iterable[Mapping[str, Any]]) -> str:
    """The name of the Fréchet distance of scores by their protocols, which begin with the features: FID or FD-DINOv2."""
    names = ("FD-DINOv2" if stated(score).startswith("dinov2") else "FID" for score in scores)
    return " or ".join(dict.fromkeys(names)) or "FID"


def depths(run: Run) -> dict[str, int]:
    """Blocks per model, over all of its lists, from model.json, the speed measurement or the plan."""
    blocks: dict[str, int] = {}
    for name, model in run.models.items():
        depth = model.get("depth", (model.get("arch") or {}).get("depth"))  # before 0.4.0 in arch alone
        if depth := depth if isinstance(depth, int) else sum(map(len, (model.get("kept") or {}).values())):
            blocks[name] = depth
    blocks |= {name: model["depth"] for name, model in timed_models(run).items()}
    if run.plan:
        blocks["teacher"] = sum(run.plan.depth.values())
        blocks["pruned"] = blocks.setdefault("student", sum(map(len, run.plan.kept.values())))
    return blocks


def timed_models(run: Run) -> Mapping[str, Mapping[str, Any]]:
    """The models of speed.json, the teacher first; empty where teacher or student was not timed."""
    models = (run.measured.get("speed") or {}).get("models") or {}
    listed = {name: models[name] for name in ("teacher", "student", "dynamic", "few-steps") if name in models}
    return listed if {"teacher", "student"} <= set(listed) else {}


def comparable(run: Run) -> tuple[str, dict[str, Mapping[str, Any]], list[str], float]:
    """(reference, evaluations of one protocol by model, other models, fewest images), for the first reference with any.

    The protocol is that of the student, else that of most models. A student of few steps has a sampler of its own, and belongs to
    them where all else is the same.
    """
    for reference in run.references:
        scored = {name: run.evaluations[name, reference] for name in MODELS if (name, reference) in run.evaluations}
        names = [name for name, values in scored.items() if name != "real" and _has_distance(values)]
        protocols = {name: comparable_protocol(stated(run.evaluations[name, reference])) for name in names}
        if names:
            own = protocols.get("student") or max(protocols.values(), key=list(protocols.values()).count)
            alike = {name: protocols[name] == own or _differs_in_steps(name, protocols[name], own) for name in names}
            same = {name: run.evaluations[name, reference] for name in names if alike[name]}
            fewest = min(score.get("num_images") or UNBIASED_IMAGES for score in same.values())
            return reference, same, [name for name in names if name not in same], fewest
    return "", {}, [], UNBIASED_IMAGES


def _differs_in_steps(model: str, protocol: str, other: str) -> bool:
    """Whether a model is one of few steps, and the protocols differ in the sampler alone: between the images and the labels or prompts."""
    own, others = (each.split(" | ") for each in (protocol, other))
    return model == FURTHER["distill-steps"] and own[:3] == others[:3] and own[-3:] == others[-3:]


def _has_distance(values: Mapping[str, Any]) -> bool:
    """Whether an evaluation is against a reference; a CLIP score needs none."""
    return values.get("fid") is not None or values.get("clip_score") is None


def without_reference(run: Run) -> tuple[str, dict[str, str]] | None:
    """Title and values by model of the score to begin with where there is no distance to a reference; None where there is none."""
    clip = {m: v["clip_score"] for (m, _), v in run.evaluations.items() if v.get("clip_score") is not None}
    psnr_db = {model: values["against"]["psnr_db"] for model, values in run.pairs if values["against"].get("psnr_db")}
    for title, scores in (("CLIP score", clip), ("PSNR to the images of another model, in dB", psnr_db)):
        if len(named := [name for name in MODELS if name in scores and name != "real"]) > 1:
            return f"{title}, higher is better", {name: significant(scores[name]) for name in named}
    return None


def speed_doubt(run: Run) -> str:
    """Why a measured speed-up is far from the ratio of MACs; empty where it is near, or unknown."""
    if not (models := timed_models(run)):
        return ""
    ideal = models["teacher"]["macs"] / models["student"]["macs"]
    if abs(math.log(max(run.measured["speed"]["speedup"], 1e-9) / ideal)) < math.log(1 + _NEAR_MACS):
        return ""
    busy = "the times scatter, so this machine was busy. Measure again when it is idle"
    reason = busy if was_busy(run) else "work outside the blocks, or launching kernels, takes the time"
    return f"far from the ratio of MACs, {ideal:.2f}×: {reason}"


def was_busy(run: Run) -> bool:
    """Whether the times of the speed measurement scatter."""
    models = timed_models(run).values()
    return any(scatters(model.get("latency_ms_spread") or (0.0, 0.0), model["latency_ms"]) for model in models)


def scatters(quartiles: Sequence[float], median: float) -> bool:
    """Whether times scatter as on a busy machine."""
    return quartiles[1] - quartiles[0] > _UNSTEADY * median


def _score_table(head: str, columns: Sequence[str], scored: Iterable[tuple[str, Sequence[str], str]]) -> Table:
    """Rows of one protocol adjoin. scored: (model, cells, protocol) per row."""
    listed = list(scored)
    protocols = list(dict.fromkeys(protocol for *_, protocol in listed))
    rows: list[Row | str] = []
    known: set[str] = set()
    for number, protocol in enumerate(protocols, 1):
        rows += [f"another protocol ({number}): compare with care"] * (
            number > 1 and comparable_protocol(protocol) not in known
        )
        known.add(comparable_protocol(protocol))
        mark = number if len(protocols) > 1 else 0
        rows += [[Cell(model_name(model), model, mark), *cells] for model, cells, own in listed if own == protocol]
    return Table([head, *columns], rows, protocols=protocols)


def _order(model: str) -> int:
    return MODELS.index(model) if model in MODELS else len(MODELS)


def evaluation_tables(run: Run) -> list[Table]:
    """One table of scores per reference."""
    tables = []
    for reference in run.references:
        models = sorted((model for model, other in run.evaluations if other == reference), key=_order)
        scores = [run.evaluations[model, reference] for model in models]
        keys = [key for key in _SCORES if any(values.get(key) is not None for values in scores)]
        columns = [_SCORES[key].format(distance=distance_name(scores)) for key in keys]
        cells = [[(count if key == "num_images" else significant)(v.get(key)) for key in keys] for v in scores]
        rows = zip(models, cells, map(stated, scores), strict=True)
        head = f"against {reference}" if any(map(_has_distance, scores)) else "prompts"
        tables.append(_score_table(head, columns, rows))
    return tables


def pairs_table(run: Run) -> Table | None:
    """PSNR, SSIM and LPIPS of images to those of another model from the same seeds; None where nothing was compared.

    The protocol is that of sampling: neither number depends on a reference or a feature extractor.
    """
    names = {samples.hash: model_name(name) for name, samples in run.samples.items() if samples.hash}
    perceptual = ["lpips"] if any("lpips" in values["against"] for _, values in run.pairs) else []
    rows: dict[tuple[str, ...], tuple[str, Sequence[str], str]] = {}
    for model, values in sorted(run.pairs, key=lambda pair: _order(pair[0])):
        other, sampling = values["against"], stated(values).split(" | ", 2)[-1]
        name, digest = str(other.get("name", "?")), str(other.get("hash", ""))
        protocol = f"{sampling} | compared with {name} {digest[:8]}".rstrip()
        protocol += f", sampled by {other['protocol']}" if other.get("protocol") not in (None, sampling) else ""
        means, num = [_mean(other, key) for key in ("psnr_db", "ssim", *perceptual)], count(values.get("num_images"))
        cells = [names.get(digest, name), *means, num]
        rows.setdefault((model, protocol, str(values.get("recipe", {}).get("samples"))), (model, cells, protocol))
    columns = ["compared with", "PSNR in dB ↑", "SSIM ↑", *(["LPIPS ↓"] * len(perceptual)), "images"]
    return _score_table("same seeds", columns, rows.values()) if rows else None


def _mean(values: Mapping[str, Any], key: str) -> str:
    mean, deviation = values.get(key), values.get(f"{key}_std")
    return significant(mean) + ("" if None in (mean, deviation) else f" ± {significant(deviation, 2)}")


def comparison(runs: Sequence[Run]) -> Table | None:
    """Runs, sorted by protocols, where at least two were evaluated: the first reference in full, of others the student."""
    if sum(bool(run.evaluations) for run in runs) < 2:
        return None
    first, *others = dict.fromkeys(reference for run in runs for reference in run.references)
    wanted = [*((m, first) for m in ("teacher", "pruned", "student")), *(("student", other) for other in others)]
    used = [[stated(run.evaluations[p]) if p in run.evaluations else "" for p in wanted] for run in runs]
    protocols: list[str] = []

    def marked(text: str, protocol: str) -> Cell:
        if protocol and protocol not in protocols:
            protocols.append(protocol)
        return Cell(text, mark=protocols.index(protocol) + 1 if protocol else 0)

    rows: list[Row | str] = []
    alike = [[comparable_protocol(protocol) for protocol in row] for row in used]
    order = sorted(range(len(runs)), key=lambda i: alike.index(alike[i]))
    for place, i in enumerate(order):
        if place and alike[i] != alike[order[place - 1]]:
            rows.append("other protocols: compare with care")
        run, depth_of, speed = runs[i], depths(runs[i]), runs[i].measured.get("speed")
        student = timed_models(run).get("student", {})
        blocks = f"{depth_of['teacher']} → {depth_of['student']}" if {"teacher", "student"} <= set(depth_of) else "–"
        faster = marked(f"{speed['speedup']:.2f}×", stated(speed)) if speed else Cell("–")
        scores = [significant(run.evaluations.get(p, {}).get("fid")) for p in wanted]
        cells = [marked(text, protocol) for text, protocol in zip(scores, used[i], strict=True)]
        sizes = [count(student.get(key)) for key in ("num_parameters", "macs")]
        rows.append([run.name, blocks, *sizes, faster, *cells])
    name = distance_name(run.evaluations[p] for run in runs for p in wanted if p in run.evaluations)
    columns = [f"{name} {reference}, {model}" for model, reference in wanted]
    return Table(["run", "blocks", "parameters", "MACs", "speed-up", *columns], rows, protocols=protocols)


def measured_value(run: Run, metric: str) -> float | None:
    """A number by dotted name: "speedup", "student.digits.fid", "student.macs"; None where it was not measured.

    "step-100000.digits.fid" is that of the recovery's checkpoint at that step.
    """
    model, _, rest = metric.partition(".")
    reference, _, key = rest.rpartition(".")
    label, source = file_label(reference), run.measured.get("speed") or {}
    if reference and model.startswith("step-"):
        points = run.measured.get("fid_steps", ())
        same = [p for p in points if f"step-{p['step']}" == model and p.get("reference", label) == label]
        source = next(iter(same), {})
    elif rest:
        own = run.evaluations.get((model, label), {})
        source = {**(own.get("against") or {}), **own} if reference else timed_models(run).get(model, {})
    value = source.get(key or model)
    return float(value) if isinstance(value, int | float) else None


def expected_table(run: Run) -> Table | None:
    """The recipe's expected values, and what was measured; None where it expects nothing."""
    rows: list[Row] = []
    for item in run.recipe.get("expected") or ():
        metric, wanted, tolerance = item["metric"], item["value"], item["tolerance"]
        value = measured_value(run, metric)
        state, note = check_state(metric, value, wanted, tolerance), item.get("note", "")
        if state != "ok" and metric == "speedup" and was_busy(run) and (doubt := speed_doubt(run)):
            state, note = "doubtful", doubt
        expected, word = f"{significant(wanted)} ± {significant(tolerance, 2)}", _CHECK_WORDS.get(state, state)
        rows.append([Cell(metric, note=note), expected, significant(value), Cell(word, state)])
    return Table(["number", "expected", "measured", ""], rows) if rows else None


def check_state(metric: str, value: float | None, wanted: float, tolerance: float) -> str:
    """ok, better (beyond the tolerance on the good side), off, or missing."""
    if value is None or abs(value - wanted) <= tolerance:
        return "missing" if value is None else "ok"
    good = _HIGHER_IS_BETTER if value > wanted else _LOWER_IS_BETTER
    return "better" if metric.rpartition(".")[2] in good else "off"


def cost_table(run: Run) -> tuple[Table, list[float]] | None:
    """(time and images per stage, shares of the time); None where nothing was timed."""
    seconds: dict[str, float] = {}
    for _, record in run.sources:
        seconds |= record.get("stages") or {}
        if record["verb"] != "run" and record.get("seconds"):
            seconds.setdefault(record["verb"], record["seconds"])
    for stage, lines in run.metrics.items():  # of an unfinished stage by its log
        seconds.setdefault(stage, max(line.get("seconds", 0.0) for line in lines))
    seen: dict[str, float | None] = {}
    for stage in (*seconds, *_TRAININGS):
        images, logged = run.records.get(stage, {}).get("seen_images"), run.metrics.get(stage) or [{}]
        seen[stage] = logged[-1].get("seen_images") if images is None else images
    shares = {stage: value / (sum(seconds.values()) or 1.0) for stage, value in seconds.items()}
    rows = [[STAGE_NAMES.get(s, s), duration(v), percent(shares[s]), count(seen[s])] for s, v in seconds.items()]
    known = [float(record.get("seconds") or 0.0) for _, record in run.sources]
    note = f"{duration(sum(known))} in all. " if all(known) else ""
    trained = {words: images for stage, words in _TRAININGS.items() if (images := seen[stage])}
    if trained:
        note += f"Images seen: {' and '.join(f'{count(n)} by the {words}' for words, n in trained.items())}"
        if teacher := run.record.get("teacher_seen_images"):
            note += f"; together {percent(sum(trained.values()) / teacher)} of the {count(teacher)} of the teacher's training"
        note += "."
    return (Table(["stage", "time", "share", "images seen"], rows, note), list(shares.values())) if rows else None


def _drawing(model: Mapping[str, Any]) -> str | None:
    """How a model draws that has folded guidance in, in few steps or in many; None of others."""
    few, folded = model.get("few_steps"), model.get("folded_guidance")
    if not few:
        return f"guidance {folded['scale']:g} folded in: one pass of the network per step" if folded else None
    levels = ", ".join(f"{level:g}" for level in few["levels"])
    return f"{len(few['levels'])} steps at noise levels {levels}, distilled by {few['method']}, guidance {few['guidance']:g} folded in"


def provenance(run: Run) -> dict[str, str]:
    """Folders, versions, machines, seeds and models of a run; values that differ between its sources are all listed."""
    rows: list[tuple[str, Any]] = []
    for folder, record in run.sources:
        machine = record.get("machine") or {}
        where = [machine.get(key, "?") for key in ("system", "processor", "cores", "python")]
        rows += [("run folder", folder), ("tinyfusion", record.get("version")), ("commit", record.get("commit"))]
        rows.append(("machine", "{} {}, {} cores, Python {}".format(*where)))
        rows.append(("seed", (record.get("recipe") or {}).get("seed")))
    rows.append(("teacher", run.recipe.get("teacher_hash") or (run.plan.teacher if run.plan else None)))
    rows += [(model_name(name), model.get("hash")) for name, model in run.models.items()]
    rows += [("drawing", _drawing(model)) for model in run.models.values()]
    values: dict[str, list[str]] = {}
    for name, value in rows:
        if value not in (None, "") and str(value) not in values.setdefault(name, []):
            values[name].append(str(value))
    return {name: "; ".join(listed) for name, listed in values.items() if listed}
