"""Read run folders: the records of a run as plain values, checked by `report/schema.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.blocks.scheme import parse_scheme, scheme_pairs, schemes_by_list
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.files import file_label
from tinyfusion.core.reading import parse_json, read_text, unreadable
from tinyfusion.core.rundir import FORMAT_VERSION, RunDirectory, read_json
from tinyfusion.data.images import read_shown_npz
from tinyfusion.report import schema
from tinyfusion.report.format import printable

VERBS = ("run", "prune", "recover", "dynamic", "distill-steps", "train", "explain")
MODELS = ("teacher", "pruned", "student", "dynamic", "few-steps", "model", "real")
MAX_SAMPLES_BYTES = 1 << 30
MAX_PREVIEWS = 6  # of a training on the page
# optional stages of a run, and the model that each makes
FURTHER = {"dynamic": "dynamic", "distill-steps": "few-steps"}
_STUDENTS = {"prune": "pruned", "recover": "student", **FURTHER}  # verb or stage -> the model in its folder `student`
_MODEL_FOLDERS = {  # by verb: where the models of a run are
    "run": {model: f"{stage}/student" for stage, model in _STUDENTS.items()},
    **{verb: {model: "student"} for verb, model in _STUDENTS.items()},
    "train": {"model": "model"},
    "explain": {},
}
EXPLAINED = "explain"  # folder of a run with the output of `explain` about its model
_MEASURED = {  # JSON file -> (the stage whose folder has it, empty: the run folder; its schema)
    "speed": ("", schema.SPEED),
    "activations": ("", schema.ACTIVATIONS),
    "depth_speed": ("", schema.DEPTH_SPEED),
    "fid_steps": ("", schema.FID_STEPS),
    "calibration": ("prune", schema.CALIBRATION),
    "kept": ("dynamic", schema.KEPT),
    "dynamic": ("dynamic", schema.DYNAMIC),
}
_LOGGED_PLAN = ("kept", "confidence")  # fields of a log line with a decision


@dataclass(frozen=True)
class Samples:
    """Images (N, H, W, C) uint8 and labels (N,), with the sampling protocol and the hash where recorded; of videos middle frames.

    prompts: drawn by a pipeline from texts, image i from that of its label.
    """

    images: np.ndarray
    labels: np.ndarray | None
    protocol: str = ""
    hash: str = ""
    prompts: Sequence[str] = ()


@dataclass(frozen=True)
class Preview:
    """A PNG of samples of the averaged weights after so many training steps."""

    steps: int
    png: bytes


@dataclass(frozen=True)
class Run:
    """The records of a run folder, or of a `prune` run joined with a `recover` run that continues it.

    sources: (folder, its run.json), in order. plan: the decision, or the current choice of a running search (decided False).
    metrics, records, previews, preview_scores: per stage. evaluations: by (model, reference). pairs: (model, evaluation) of
    those with a comparison of pairs. measured: JSON files by name (docs/report.md). samples, models: by model. drawn: images
    of `explain`, by the whole model, then without each block. notes: omissions, with reasons.
    """

    sources: tuple[tuple[str, Mapping[str, Any]], ...]
    plan: PrunePlan | None = None
    decided: bool = True
    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluations: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    pairs: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Samples] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    previews: Mapping[str, Sequence[Preview]] = field(default_factory=dict)
    preview_scores: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    drawn: Samples | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folders as they were given."""
        return " → ".join(folder for folder, _ in self.sources)

    @property
    def record(self) -> Mapping[str, Any]:
        """The run.json of the last source."""
        return self.sources[-1][1]

    @property
    def verb(self) -> str:
        """The verbs of the sources: "run", or "prune and recover"."""
        return " and ".join(str(record["verb"]) for _, record in self.sources)

    @property
    def recipe(self) -> dict[str, Any]:
        """The sections of the resolved recipes, empty where there are none."""
        return {name: value for _, record in self.sources for name, value in (record.get("recipe") or {}).items()}

    @property
    def title(self) -> str:
        """The recipe's name, else the verb; with the depths once they are decided."""
        if self.verb == "explain":
            return f"What each block does: {(self.measured.get('explain') or {}).get('model', {}).get('source', '')}"
        name = str(self.recipe.get("name") or self.verb)
        if not self.plan or not self.decided:
            return name
        return f"{name}: {sum(self.plan.depth.values())} blocks to {sum(map(len, self.plan.kept.values()))}"

    @property
    def references(self) -> list[str]:
        """References of the evaluations, those of the recipe first and in its order."""
        wanted = [file_label(str(name)) for name in (self.recipe.get("evaluate") or {}).get("references", ())]
        used = {reference for _, reference in self.evaluations}
        return [name for name in wanted if name in used] + sorted(used - set(wanted))

    @property
    def decision_lines(self) -> list[Mapping[str, Any]]:
        """The log lines of a search that have a decision; of one within a recovery those until the blocks were fixed."""
        logged = [line for stage in ("prune", "recover") for line in self.metrics.get(stage, ())]
        lines = [line for line in logged if all(key in line for key in _LOGGED_PLAN)]
        fixed = [number for number, line in enumerate(lines) if line.get("fixed")]
        return lines[: fixed[0] + 1] if fixed else lines


def read_run(path: Path) -> Run:
    """The records of a run folder, finished or not; of an unfinished search with the current choice of blocks as its plan.

    Raises UserError on another folder, and on damaged records.
    """
    run = _read(path)
    settings, lines = run.recipe.get("prune") or {}, run.decision_lines
    if run.plan is not None or not lines or not settings.get("scheme"):
        return run
    scheme, distribution, last = settings["scheme"], settings.get("distribution"), lines[-1]
    depth = _logged_depths(scheme, last)
    runs = settings.get("runs") or 1 if distribution == "runs" else None
    parsed = parse_scheme(scheme, depth, distribution or "categorical", runs=runs or 1).items()
    groups = {name: [[group.keep, group.size] for group in listed] for name, listed in parsed}
    plan = PrunePlan(last["kept"], depth, settings["criterion"], scheme, distribution, groups=groups, runs=runs)
    return dataclasses.replace(run, plan=plan, decided=False)


def _logged_depths(scheme: str, line: Mapping[str, Any]) -> dict[str, int]:
    """Blocks per list: a subset logs a marginal for each, a categorical a confidence per group of its scheme."""
    if "marginals" in line:
        return {name: len(values) for name, values in line["marginals"].items()}
    depths: dict[str, int] = {}
    for own, (name, groups) in zip(
        schemes_by_list(scheme, line["confidence"]), line["confidence"].items(), strict=True
    ):
        sizes = [size for _, size in scheme_pairs(own)]
        depths[name] = sum(sizes) if len(sizes) == len(groups) else sizes[0] * len(groups)
    return depths


def _read(path: Path) -> Run:
    record = _run_record(path)
    verb = record["verb"]
    nested = [name for name in _STUDENTS if (path / name).is_dir()]
    folders = {name: path / name for name in nested} if verb == "run" else {verb: path}
    records = {stage: folder / "run.json" for stage, folder in folders.items()}
    if verb == "run":
        records = {"encode": path / "latents" / "run.json", **records}
    lines = {stage: _log_lines(folder / "metrics.jsonl") for stage, folder in folders.items()}
    scores = {stage: [line["watch"] for line in logged if "watch" in line] for stage, logged in lines.items()}
    metrics = {stage: [line for line in logged if "watch" not in line] for stage, logged in lines.items()}
    previews = {stage: _previews(RunDirectory(folder).watched) for stage, folder in folders.items()}
    models = _existing({name: (path / of / "model.json", schema.MODEL) for name, of in _MODEL_FOLDERS[verb].items()})
    measured = {n: (folders.get(stage, path) / f"{n}.json", kind) for n, (stage, kind) in _MEASURED.items()}
    explained = path if verb == "explain" else path / EXPLAINED
    measured["explain"] = (explained / "explain.json", schema.EXPLAIN)
    samples, notes = _samples(path / "samples")
    scored = _scored(path / "evaluations")
    return Run(
        sources=((printable(str(path)), record),),
        plan=_plan(path, models),
        metrics={stage: logged for stage, logged in metrics.items() if logged},
        records=_existing({stage: (file, schema.RUN) for stage, file in records.items()}),
        evaluations={(model, reference): values for model, reference, values in scored if _is_own(reference, values)},
        pairs=tuple((model, values) for model, _, values in scored if isinstance(values.get("against"), dict)),
        measured=_existing(measured),
        samples=samples,
        drawn=_drawn(explained / "drawn.npz"),
        models=models,
        previews={stage: images for stage, images in previews.items() if images},
        preview_scores={stage: listed for stage, listed in scores.items() if listed},
        notes=notes,
    )


def _run_record(path: Path) -> dict[str, Any]:
    wanted = f"wanted a run folder, such as the --out of {', '.join(VERBS)}"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no run at {path}: no such folder; {wanted}") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not path.is_dir():
        raise UserError(f"{path} is a file; {wanted}")
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a run folder: it has no run.json; {wanted}")
    record = read_json(path / "run.json")
    if not isinstance(record, dict) or record.get("made_by") != "tinyfusion" or record.get("verb") not in VERBS:
        raise UserError(f"{path} is not a run folder of tinyfusion: its run.json was made by something else; {wanted}")
    schema.checked(record, schema.RUN, path / "run.json")
    if (version := record.get("format_version", 0)) > FORMAT_VERSION:
        raise UserError(f"{path} has format {version}; this tinyfusion reads up to {FORMAT_VERSION}: upgrade it")
    return record


def _existing(files: Mapping[str, tuple[Path, Any]]) -> dict[str, Any]:
    """The checked contents of the JSON files that exist. files: name -> (path, schema)."""
    return {name: schema.checked(read_json(p), kind, p) for name, (p, kind) in files.items() if p.is_file()}


def _log_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that is still being written is skipped."""
    texts = [text for text in read_text(path).splitlines() if text.strip()] if path.is_file() else []
    lines: list[dict[str, Any]] = []
    for i, text in enumerate(texts, start=1):
        try:
            line = parse_json(text, f"{path}, line {i},")
        except UserError:
            if i < len(texts):
                raise
        else:
            lines.append(schema.checked(line, schema.LINE, f"{path}, line {i},"))
    return lines


def plan_file(path: Path) -> Path:
    """The plan of a run: of its pruning, of the search within its recovery, or its own, which need not exist."""
    places = (path / "prune", path / "recover", path)
    return next((file for place in places if (file := place / "plan.json").is_file()), path / "plan.json")


def _plan(path: Path, models: Mapping[str, Mapping[str, Any]]) -> PrunePlan | None:
    """The final decision: plan.json, else that inside a model."""
    files = [file for file in (plan_file(path),) if file.is_file()]
    stored = [(f"{path}: model.json of {name}", model["plan"]) for name, model in models.items() if model.get("plan")]
    for source, values in [*((file, read_json(file)) for file in files), *stored]:
        with prefixed(source):
            plan = plan_from_json(values)
        for name, groups in (plan.groups or {}).items():
            if sum(size for _, size in groups) != (depth := plan.depth.get(name, 0)):
                wrong = f"groups.{name} do not make up {depth} blocks"
                raise UserError(f"{source} is damaged: {wrong}; correct or remove it")
        return plan
    return None


def _scored(folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(model, reference, evaluation) of every MODEL-REFERENCE.json; of another name the reference is empty."""
    scored = []
    for file in sorted(folder.glob("*.json")):
        stem = printable(file.stem)
        model = next((model for model in MODELS if stem.startswith(f"{model}-")), "")
        names = (model, stem[len(model) + 1 :]) if model else (stem, "")
        scored.append((*names, schema.checked(read_json(file), schema.EVALUATION, file)))
    return scored


def _is_own(reference: str, values: Mapping[str, Any]) -> bool:
    """Whether a file is the evaluation against the reference in its name, and not one made for its pairs alone."""
    if not values.get("reference") and "against" in values:  # a reference is not needed for these, nor for a CLIP score
        return bool(reference) and values.get("clip_score") is not None
    own = file_label(str((values.get("reference") or {}).get("name", reference)))
    return bool(reference) and ("against" not in values or reference == own)


def _previews(folder: Path) -> list[Preview]:
    """The previews of a training: the last, and others evenly spread."""
    files = sorted(file for file in folder.glob("step-*.png") if file.is_file() and file.stem[5:].isdecimal())
    chosen = {round(i) for i in np.linspace(0, len(files) - 1, MAX_PREVIEWS)} if files else set[int]()
    return [Preview(int(files[i].stem[5:]), files[i].read_bytes()) for i in sorted(chosen)]


def _samples(folder: Path) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """Images by model, and a note about every file that is too large."""
    samples: dict[str, Samples] = {}
    notes = []
    for file in [file for name in MODELS if (file := folder / f"{name}.npz").is_file()]:
        if file.stat().st_size > MAX_SAMPLES_BYTES:
            notes.append(f"{file.name} is not shown: it is larger than {MAX_SAMPLES_BYTES >> 30} GiB")
            continue
        record = _existing({"": (file.with_suffix(".json"), schema.SAMPLES)}).get("", {})
        images, labels = read_shown_npz(file)
        protocol, digest = (str(record.get(name, "")) for name in ("protocol", "image_hash"))
        samples[file.stem] = Samples(images, labels, protocol, digest, record.get("prompts") or ())
    return samples, tuple(notes)


def _drawn(path: Path) -> Samples | None:
    """Images that `explain` drew; None where there are none, or too many bytes."""
    if not path.is_file() or path.stat().st_size > MAX_SAMPLES_BYTES:
        return None
    return Samples(*read_shown_npz(path))


def join_runs(runs: Sequence[Run]) -> list[Run]:
    """The runs in order, every `recover` run joined with the `prune` run whose student it started from, by that model's hash.

    A search with several recoveries is joined with each of them, and not listed by itself.
    """
    searches = {id(run): search for run in runs if (search := _search_of(run, runs))}
    joined = {id(search) for search in searches.values()}
    listed = [run for run in runs if id(run) not in joined]
    return [_joined(searches[id(run)], run) if id(run) in searches else run for run in listed]


def _search_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The `prune` run whose student a `recover` run started from; of several equal ones that of the recorded path."""
    given = run.recipe.get("student")
    if run.verb != "recover" or not given:
        return None
    same = [o for o in runs if o.verb == "prune" and o.models.get("pruned", {}).get("hash") == given]
    opened = str((run.record.get("job") or {}).get("student", ""))
    return next(iter([*(o for o in same if opened.endswith(o.name.strip("./"))), *same]), None)


def _joined(search: Run, recovery: Run) -> Run:
    """Fields of both: tuples one after the other, mappings merged, else that of the recovery where it has one."""
    values: dict[str, Any] = {}
    for name in (entry.name for entry in dataclasses.fields(Run)):
        first, second = getattr(search, name), getattr(recovery, name)
        merged = {**first, **second} if isinstance(first, dict) else second or first
        values[name] = first + second if isinstance(first, tuple) else merged
    return Run(**values)
