"""`report`: run folders to one HTML page. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import file_label
from tinyfusion.core.reading import parse_json, read_text, unreadable
from tinyfusion.core.rundir import FORMAT_VERSION, RunDirectory, file_output, read_json, stamp, write_text
from tinyfusion.data.images import read_images_npz
from tinyfusion.prune.scheme import parse_scheme, scheme_pairs
from tinyfusion.report import schema
from tinyfusion.report.format import printable
from tinyfusion.report.render import embedded_record, render
from tinyfusion.report.run_data import MODELS, Look, RunData, Samples

if TYPE_CHECKING:
    from tinyfusion.jobs.assemble import RunOptions

VERBS = ("run", "prune", "recover", "dynamic", "train")
MODEL_FOLDERS = {  # by verb: where the models of a run lie
    "run": {"pruned": "prune/student", "student": "recover/student", "dynamic": "dynamic/student"},
    "prune": {"pruned": "student"},
    "recover": {"student": "student"},
    "dynamic": {"dynamic": "student"},
    "train": {"model": "model"},
}
MAX_SAMPLES_BYTES = 1 << 30
MAX_LOOKS = 6  # pictures of a training that the page shows


def report(runs: Sequence[Path], options: RunOptions) -> None:
    """Write one page about `runs`; a page about the same runs is written anew.

    Raises UserError on a path that is not a run folder, and on an output that is not a page of ours about these runs.
    """
    found = [read_run(path) for path in runs]
    inputs = {"runs": [str(path) for path in runs]}
    file_output(options.out, "report", inputs, options.overwrite, _page_record)
    page = render(found, stamp("report", inputs, "done"))
    if not options.dry_run:
        write_text(options.out, page)


def render_run(path: Path) -> str:
    """The page of one run folder."""
    return render([read_run(path)], stamp("report", {"runs": [str(path)]}, "done"))


def read_run(path: Path) -> RunData:
    """What there is of a run folder: finished, interrupted or still running. Raises UserError where it is none of ours."""
    record = _record(path)
    verb = record["verb"]
    nested = ("prune", "recover", *(["dynamic"] if (path / "dynamic").is_dir() else []))
    stages = {stage: path / stage for stage in nested} if verb == "run" else {verb: path}
    logged = {stage: _metrics(folder / "metrics.jsonl") for stage, folder in stages.items()}
    metrics = {stage: kept for stage, lines in logged.items() if (kept := [x for x in lines if "watch" not in x])}
    found = {stage: _json_if_there(folder / "run.json", schema.RUN) for stage, folder in stages.items()}
    records = {stage: values for stage, values in found.items() if values is not None}
    models = {name: path / folder / "model.json" for name, folder in MODEL_FOLDERS[verb].items()}
    described = {
        name: values for name, file in models.items() if (values := _json_if_there(file, schema.MODEL)) is not None
    }
    plan, decided = _plan(path, record, metrics.get("prune", []), described)
    samples, notes = _samples(path / "samples")
    return RunData(
        name=printable(str(path)),
        record=record,
        plan=plan,
        decided=decided,
        metrics=metrics,
        records=records,
        evaluations=_evaluations(path),
        speed=_json_if_there(path / "speed.json", schema.SPEED),
        samples=samples,
        pairs=_pairs(path),
        models=described,
        calibration=_json_if_there(stages.get("prune", path) / "calibration.json", schema.CALIBRATION),
        activations=_json_if_there(path / "activations.json", schema.ACTIVATIONS),
        depth_speed=_json_if_there(path / "depth_speed.json", schema.DEPTH_SPEED),
        kept=_json_if_there(stages.get("dynamic", path) / "kept.json", schema.KEPT),
        reached=_json_if_there(stages.get("dynamic", path) / "dynamic.json", schema.DYNAMIC),
        fid_steps=_json_if_there(path / "fid_steps.json", schema.FID_STEPS) or (),
        watched={stage: looks for stage, folder in stages.items() if (looks := _looks(RunDirectory(folder).watched))},
        watch_lines={stage: [line for line in lines if "watch" in line] for stage, lines in logged.items()},
        notes=notes,
    )


def _record(path: Path) -> dict[str, Any]:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no run at {path}: no such folder; wanted a run folder, such as the --out of `tinyfusion run`"
        ) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not path.is_dir():
        raise UserError(f"{path} is a file; wanted a run folder, such as the --out of `tinyfusion run`")
    if not (path / "run.json").is_file():
        raise UserError(f"{path} is not a run folder: it has no run.json; wanted the --out of {', '.join(VERBS)}")
    record = read_json(path / "run.json")
    if not isinstance(record, dict) or record.get("made_by") != "tinyfusion" or record.get("verb") not in VERBS:
        raise UserError(f"{path} is not a run folder of tinyfusion: its run.json was made by something else")
    schema.checked(record, schema.RUN, path / "run.json")
    if record.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(
            f"{path} was written in format {record['format_version']}; this tinyfusion reads up to {FORMAT_VERSION}: upgrade"
        )
    return record


def _json_if_there(path: Path, kind: Any) -> Any:
    """The value in a JSON file, None where there is no file. kind: its schema, see `report/schema.py`."""
    if not path.is_file():
        return None
    return schema.checked(read_json(path), kind, path)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    texts = [text for text in read_text(path).splitlines() if text.strip()]
    lines: list[dict[str, Any]] = []
    for i, text in enumerate(texts, start=1):
        try:
            lines.append(parse_json(text, f"{path}, line {i},"))
        except UserError:
            if i < len(texts):
                raise
    for i, line in enumerate(lines, start=1):
        schema.checked(line, schema.LINE, f"{path}, line {i},")
    return lines


def _plan(
    path: Path, record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]
) -> tuple[PrunePlan | None, bool]:
    """The decision and whether it is final: plan.json, that inside a model, else the last logged favourite."""
    for file in (path / "prune" / "plan.json", path / "plan.json"):
        if file.is_file():
            return _sound_plan(read_json(file), file), True
    for name, model in models.items():
        if model.get("plan"):
            return _sound_plan(model["plan"], f"{path}: model.json of {name}"), True
    decisions = [line for line in lines if "kept" in line and "confidence" in line]
    settings = (record.get("recipe") or {}).get("prune") or {}
    if not decisions or not settings.get("scheme"):
        return None, True
    last = decisions[-1]
    scheme, distribution = settings["scheme"], settings.get("distribution")
    depth = _logged_depths(scheme, last)
    groups = {
        name: [[group.keep, group.size] for group in listed]
        for name, listed in parse_scheme(scheme, depth, distribution or "categorical").items()
    }
    return PrunePlan(last["kept"], depth, settings["criterion"], scheme, distribution, groups=groups), False


def _sound_plan(values: Any, source: Path | str) -> PrunePlan:
    """A plan whose blocks are blocks of the teacher. Raises UserError with the file."""
    try:
        plan = plan_from_json(values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    for name, kept in plan.kept.items():
        depth = plan.depth.get(name, 0)
        if any(not 0 <= block < depth for block in kept):
            raise UserError(f"{source} is damaged: kept.{name} is {kept}, of {depth} blocks; correct or remove it")
        groups = (plan.groups or {}).get(name)
        if groups is not None and sum(size for _, size in groups) != depth:
            raise UserError(f"{source} is damaged: groups.{name} do not make up {depth} blocks; correct or remove it")
    return plan


def _logged_depths(scheme: str, line: Mapping[str, Any]) -> dict[str, int]:
    """Blocks per list: a subset logs a marginal for each, a categorical a confidence per group of its scheme."""
    if "marginals" in line:
        return {name: len(values) for name, values in line["marginals"].items()}
    sizes = [size for _, size in scheme_pairs(scheme)]
    sure = line["confidence"].items()
    return {name: sum(sizes) if len(sizes) == len(values) else sizes[0] * len(values) for name, values in sure}


def _scored(path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(model, reference, evaluation) of every MODEL-REFERENCE.json; of another name the reference is empty."""
    found = []
    for file in sorted((path / "evaluations").glob("*.json")):
        values = _json_if_there(file, schema.EVALUATION)
        stem = printable(file.stem)
        model, _, reference = stem.partition("-")
        whole = model in MODELS and reference
        found.append((model if whole else stem, reference if whole else "", values))
    return found


def _evaluations(path: Path) -> dict[str, dict[str, Any]]:
    """model -> reference -> evaluation. What was made for its pairs, and has the name of no reference, is left out."""
    found: dict[str, dict[str, Any]] = {}
    for model, reference, values in _scored(path):
        own = file_label(str((values.get("reference") or {}).get("name", reference)))
        if reference and ("against" not in values or reference == own):
            found.setdefault(model, {})[reference] = values
    return found


def _pairs(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(model, evaluation) of `evaluate --against`; a file of another name than MODEL-... stands by its own."""
    return [(model, values) for model, _, values in _scored(path) if isinstance(values.get("against"), dict)]


def _looks(folder: Path) -> list[Look]:
    """The pictures of averaged weights while they trained: the last, and others evenly spread."""
    files = sorted(file for file in folder.glob("step-*.png") if file.is_file() and file.stem[5:].isdecimal())
    chosen = (
        sorted({len(files) - 1 - i * (len(files) - 1) // (MAX_LOOKS - 1) for i in range(MAX_LOOKS)}) if files else []
    )
    return [Look(int(files[i].stem.removeprefix("step-")), files[i].read_bytes()) for i in chosen]


def _samples(folder: Path) -> tuple[dict[str, Samples], tuple[str, ...]]:
    """Images by model, and what is too large to be shown."""
    found: dict[str, Samples] = {}
    notes = []
    for name in MODELS:
        file = folder / f"{name}.npz"
        if not file.is_file():
            continue
        if file.stat().st_size > MAX_SAMPLES_BYTES:
            notes.append(f"{file.name} is not shown: it is larger than {MAX_SAMPLES_BYTES >> 30} GiB")
            continue
        images, labels = read_images_npz(file)
        told = _json_if_there(file.with_suffix(".json"), schema.SAMPLES) or {}
        found[name] = Samples(images, labels, str(told.get("protocol", "")), str(told.get("image_hash", "")))
    return found, tuple(notes)


def _page_record(path: Path) -> Any:
    try:
        return embedded_record(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return None
