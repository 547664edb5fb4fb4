"""Scores of images and what they may be compared with: results, pairs of the same seeds, runs side by side, FID over steps.

A score of images belongs to its protocol. Here scores are brought together by protocol, so that no table column and no
curve holds those of two without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyfusion.report.format import count, significant
from tinyfusion.report.run_data import MODEL_NAMES, MODELS, RunData

COLUMNS = {
    "fid": "FID ↓",
    "sfid": "sFID ↓",
    "inception_score": "IS ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "nearest_reference_distance": "nearest reference",
    "num_images": "images",
}
PAIR_COLUMNS = ["compared with", "PSNR in dB ↑", "SSIM ↑", "images"]
COMPARED = ("teacher", "pruned", "student")
SHORT_NAMES = {"teacher": "teacher", "pruned": "cut", "student": "recovered", "dynamic": "dynamic"}
_ROLES = {"teacher": "teacher", "pruned": "cut", "student": "student", "dynamic": "extra"}
_WHOLE = ("num_images",)
UNSTATED = "not stated"
UNBIASED_IMAGES = 10_000  # an FID over fewer is visibly above its limit, the more so the fewer there are


@dataclass(frozen=True)
class ScoreRow:
    """One model's numbers, in the order of its table. mark: number of its protocol beneath the table."""

    model: str
    role: str
    cells: list[str]
    mark: int
    starts_protocol: bool


@dataclass(frozen=True)
class ScoreTable:
    """Models scored alike: rows of one protocol stand together. head: over the models. protocols: by mark, from 1."""

    head: str
    columns: list[str]
    rows: list[ScoreRow]
    protocols: list[str]


def role_of(model: str) -> str:
    """The colour of a model on the page: teacher, cut, student or plain."""
    return _ROLES.get(model, "plain")


def stated(values: Mapping[str, Any]) -> str:
    """The protocol of a score, or that there is none."""
    return str(values.get("protocol") or UNSTATED)


def _table(head: str, columns: list[str], found: Iterable[tuple[str, list[str], str]]) -> ScoreTable:
    """found: (model, cells, protocol) of every row."""
    there = list(found)
    protocols = list(dict.fromkeys(protocol for _, _, protocol in there))
    rows = []
    for mark, protocol in enumerate(protocols, start=1):
        same = [(model, cells) for model, cells, own in there if own == protocol]
        for i, (model, cells) in enumerate(same):
            rows.append(ScoreRow(MODEL_NAMES.get(model, model), role_of(model), cells, mark, i == 0 and mark > 1))
    return ScoreTable(head, columns, rows, protocols)


def evaluation_tables(run: RunData) -> list[ScoreTable]:
    """One table per reference."""
    return [_evaluation_table(run, reference) for reference in run.references]


def _evaluation_table(run: RunData, reference: str) -> ScoreTable:
    there = [(name, run.evaluations[name][reference]) for name in _ordered(run) if reference in run.evaluations[name]]
    keys = [key for key in COLUMNS if any(key in evaluation for _, evaluation in there)]
    rows = [(name, [_cell(key, values.get(key)) for key in keys], stated(values)) for name, values in there]
    return _table(f"against {reference}", [COLUMNS[key] for key in keys], rows)


def _ordered(run: RunData) -> list[str]:
    return sorted(run.evaluations, key=_place)


def _place(model: str) -> int:
    return MODELS.index(model) if model in MODELS else len(MODELS)


def _cell(key: str, value: float | None) -> str:
    return count(value) if key in _WHOLE else significant(value)


def pairs_table(run: RunData) -> ScoreTable | None:
    """PSNR and SSIM of images to those that another model drew from the same seeds; None where nothing was compared.

    Their protocol is that of the drawing alone: neither number depends on a reference or a feature extractor.
    """
    rows: dict[tuple[str, str, str], tuple[str, list[str], str]] = {}
    for model, values in sorted(run.pairs, key=lambda pair: _place(pair[0])):
        other = values["against"]
        numbers = [
            _spread(other.get("psnr_db"), other.get("psnr_db_std")),
            _spread(other.get("ssim"), other.get("ssim_std")),
        ]
        name, drawn = _compared_with(run, other), stated(values).split(" | ", 2)[-1]
        protocol = f"{drawn} | compared with {other.get('name', '?')} {str(other.get('hash', ''))[:8]}".rstrip()
        if other.get("protocol") not in (None, drawn):
            protocol += f", which was drawn by {other['protocol']}"
        key = (model, protocol, str(values.get("recipe", {}).get("samples")))
        rows.setdefault(key, (model, [name, *numbers, count(values.get("num_images"))], protocol))
    return _table("same seeds", PAIR_COLUMNS, rows.values()) if rows else None


def _spread(mean: float | None, deviation: float | None) -> str:
    text = significant(mean)
    return text if deviation is None or mean is None else f"{text} ± {significant(deviation, 2)}"


def _compared_with(run: RunData, other: Mapping[str, Any]) -> str:
    """The model whose images of this run these are, else the name of their file."""
    known = {samples.hash: name for name, samples in run.samples.items() if samples.hash}
    model = known.get(str(other.get("hash")))
    return MODEL_NAMES.get(model, model) if model else str(other.get("name", "?"))


@dataclass(frozen=True)
class Alike:
    """FIDs of a run's models against one reference that share the protocol of the student, or else of most models.

    others: models that were evaluated too, by another protocol.
    """

    reference: str
    fids: dict[str, float | None]
    others: list[str]


def alike(run: RunData) -> Alike | None:
    """The numbers that may stand beside each other without a word: of the first reference with any."""
    for reference in run.references:
        found = {name: run.evaluations.get(name, {}).get(reference) for name in (*COMPARED, *MODELS)}
        there = {name: values for name, values in found.items() if values and name != "real"}
        if there:
            protocols = [stated(values) for values in there.values()]
            own = stated(there["student"]) if "student" in there else max(protocols, key=protocols.count)
            fids = {name: values.get("fid") for name, values in there.items() if stated(values) == own}
            return Alike(reference, fids, [name for name in there if name not in fids])
    return None


# ------------------------------------------------------------------------------------------------- several runs together


@dataclass(frozen=True)
class ComparisonRow:
    """One run. A cell is (text, mark). starts_protocols: whether other protocols than in the row above."""

    name: str
    cells: list[tuple[str, int | None]]
    starts_protocols: bool


@dataclass(frozen=True)
class Comparison:
    """Students of several runs side by side; marks number the protocols beneath. Runs with the same protocols adjoin."""

    columns: list[str]
    rows: list[ComparisonRow]
    protocols: list[str]


def comparison(runs: Sequence[RunData], depths: Sequence[Mapping[str, int]]) -> Comparison | None:
    """A table over runs, where more than one of them was evaluated; the first reference in full, of others the student.

    depths: blocks of every run's models.
    """
    if sum(bool(run.evaluations) for run in runs) < 2:
        return None
    references = list(dict.fromkeys(reference for run in runs for reference in run.references))
    wanted = [*((model, references[0]) for model in COMPARED), *(("student", other) for other in references[1:])]
    scores = [[run.evaluations.get(model, {}).get(reference) for model, reference in wanted] for run in runs]
    used = [tuple(stated(values) if values else None for values in row) for row in scores]
    order = sorted(range(len(runs)), key=lambda i: used.index(used[i]))
    protocols: list[str] = []

    def marked(text: str, protocol: str | None) -> tuple[str, int | None]:
        if protocol is None:
            return text, None
        if protocol not in protocols:
            protocols.append(protocol)
        return text, protocols.index(protocol) + 1

    rows: list[ComparisonRow] = []
    for place, i in enumerate(order):
        run, found, speed = runs[i], depths[i], runs[i].speed or {}
        student = (speed.get("models") or {}).get("student", {})
        both = {"teacher", "student"} <= set(found)
        cells = [
            (f"{found['teacher']} → {found['student']}" if both else "–", None),
            (count(student.get("num_parameters")), None),
            (count(student.get("macs")), None),
            marked(f"{speed['speedup']:.2f}×", stated(speed)) if "speedup" in speed else ("–", None),
        ]
        cells += [
            marked(significant((values or {}).get("fid")), own) for values, own in zip(scores[i], used[i], strict=True)
        ]
        rows.append(ComparisonRow(run.name, cells, place > 0 and used[i] != used[order[place - 1]]))
    fids = [f"FID {reference}, {SHORT_NAMES[model]}" for model, reference in wanted]
    return Comparison(["blocks", "parameters", "MACs", "speed", *fids], rows, protocols)


# --------------------------------------------------------------------------------------------------------- FID over steps


@dataclass(frozen=True)
class Series:
    """FIDs of one recovery at its checkpoints, by one protocol. points: lines of fid_steps.json, by step."""

    run: RunData
    method: str
    protocol: str
    points: list[Mapping[str, Any]]

    @property
    def reference(self) -> str:
        """The reference by name, empty where the points name none."""
        return str(self.points[0].get("reference") or "")

    @property
    def teacher_fid(self) -> float | None:
        """The teacher's FID, where it was scored by the same protocol."""
        values = self.run.evaluations.get("teacher", {}).get(self.reference, {})
        return float(values["fid"]) if values.get("fid") is not None and stated(values) == self.protocol else None


def fid_series(run: RunData) -> list[Series]:
    """Every recovery method by every protocol, in the order of the first step."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in sorted(run.fid_steps, key=lambda point: point["step"]):
        if point.get("fid") is not None:
            found.setdefault((str(point.get("method", "recovery")), stated(point)), []).append(point)
    return [Series(run, method, protocol, points) for (method, protocol), points in found.items()]


def watched_series(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """protocol -> (steps made, small FID) of the looks at a training: what is watched may change when it goes on."""
    found: dict[str, list[tuple[int, float]]] = {}
    for look in (line["watch"] for line in lines):
        if look.get("fid") is not None:
            found.setdefault(stated(look), []).append((int(look["made_steps"]), float(look["fid"])))
    return found
