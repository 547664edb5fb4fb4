"""`export`: a model as other programs read it: diffusers, the published scripts, or our own folder with its card."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tinyfusion.commands.export_onnx import export_onnx
from tinyfusion.commands.export_onnx_transformer import export_onnx_transformer
from tinyfusion.commands.transformers import export_transformer
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain
from tinyfusion.core.records import folder_output, recorded_output
from tinyfusion.core.rundir import check_space, read_json, say_finished, stamp
from tinyfusion.export.card import CardNotes, licence_note
from tinyfusion.export.folder import (
    RECORD,
    PipelineComponents,
    autoencoder_files,
    class_names,
    exported_tensors,
    unfit_autoencoder,
    write_folder,
    write_official,
)
from tinyfusion.export.onnx_folder import GraphForm
from tinyfusion.export.onnx_int8 import Int8Form
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.latent_facts import with_settings
from tinyfusion.jobs.origins import Step, history
from tinyfusion.jobs.transformer_sources import transformer_of
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.models.hub import HUB_ID, autoencoder_folder, upload_folder

_OFFICIAL_SUFFIXES = (".safetensors", ".pt")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of `export`: the model, the format, and for a pipeline its autoencoder and names of classes."""

    model: str
    to: str
    settings: SampleSection = SampleSection()
    pipeline: bool = False
    vae: str | None = None
    labels: str | None = None  # file with the names of the classes
    push_to_hub: str | None = None  # id of a repository of the hub
    guided: bool = False  # of graphs
    quantize: Int8Form | None = None  # of graphs


def export(options: RunOptions, what: ExportOptions) -> dict[str, Any]:
    """Write the model as `what.to` says; returns what `--json` prints. Raises UserError where the format cannot hold it."""
    _check_options(options.out, what)
    if transformer := transformer_of(what.model, options.blocks):
        if what.vae is not None or what.labels is not None:
            raise UserError(
                f"--vae and --labels are for models of classes; the pipeline of {what.model} takes those of its parent: leave them out"
            )
        if options.inputs is not None and what.to != "onnx":
            raise UserError(f"--inputs is for --to onnx, not {what.to}: leave it out")
        if what.to == "onnx":
            form = GraphForm(what.guided, what.quantize)
            outcome = export_onnx_transformer(options, what.model, transformer, form)
        else:
            outcome = export_transformer(options, what.model, what.to, what.pipeline, transformer)
        return outcome if options.dry_run else outcome | _pushed(options, what)
    if what.to == "single-file":
        raise UserError(
            f"--to single-file is for transformers of diffusers, and {what.model} is none: give another format"
        )
    if options.inputs is not None:
        raise UserError(f"--inputs is for transformers of diffusers, and {what.model} is none: leave it out")
    model = open_model(what.model, what.settings.weights, options.num_heads, options.family, options.num_classes)
    model = with_settings(model, what.settings)
    if reason := model.unfit_formats().get(what.to):
        raise UserError(f"{what.model} cannot be exported to {what.to}: {reason}")
    rounded, model = model, model.with_formulas() if what.to == "diffusers" else model
    if what.to == "onnx":
        card = partial(_card_notes, model, options.out.name, what, [], history(what.model))
        outcome = export_onnx(options, model, what.settings, GraphForm(what.guided, what.quantize), card)
        return outcome if options.dry_run else outcome | _pushed(options, what)
    vae = _autoencoder(model, what, options.dry_run) if what.pipeline else None
    labels = _labels(model, what) if what.pipeline else None
    components = None if vae is None else PipelineComponents(vae, labels)
    plain = {"to": what.to, "pipeline": what.pipeline, "vae": what.vae, "model": model.hash()}
    plain |= {"labels": what.labels} if what.labels else {}
    todo = _check_output(options, what.to, plain)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in exported_tensors(model, what.to).values())
    check_space(options.out, num_bytes + sum(file.stat().st_size for file in (autoencoder_files(vae) if vae else [])))
    if model.facts.vae and Path(model.facts.vae).is_absolute():  # a folder here means nothing elsewhere
        model.facts = dataclasses.replace(model.facts, vae=None)
    describe = model.family.differences if what.to != "tinyfusion" else None
    differences = describe(model.module, model.arch, what.to) if describe else []
    if model is not rounded:
        computed = ", ".join(model.family.computed)
        differences.append(
            f"what a formula gives ({computed}) is computed in float32 there and rounded to half precision here"
        )
    if what.to == "official" and not model.takes_guidance and model.null_class:
        differences.append("guidance is folded in, which this format cannot say: draw with guidance 1")
    outcome = {"to": what.to, "model": model.hash(), "bytes": num_bytes, "differences": differences}
    for sentence in differences:
        print(f"note: {sentence}", file=sys.stderr)
    if options.dry_run:
        return outcome
    if not todo:
        say_finished(options.out)
    else:
        record = stamp("export", plain, "done", **outcome)
        _check_output(options, what.to, plain)  # again: what has come to be there meanwhile is not replaced
        steps = history(what.model)
        if what.to == "official":
            write_official(model, options.out, {**record, **_official_record(model, steps)})
        else:
            notes = _card_notes(model, options.out.name, what, differences, steps)
            write_folder(model, options.out, what.to, components, notes, record)
    return outcome | _pushed(options, what)


def _pushed(options: RunOptions, what: ExportOptions) -> dict[str, str]:
    """Upload the export where `--push-to-hub` says so; the address, as part of the outcome."""
    return {"pushed_to": upload_folder(options.out, what.push_to_hub)} if what.push_to_hub else {}


def _check_options(out: Path, what: ExportOptions) -> None:
    if what.to == "official" and out.suffix not in _OFFICIAL_SUFFIXES:
        raise UserError(
            f"--out of export --to official is a .safetensors file, or a .pt file for the published scripts; got {out}"
        )
    if what.pipeline and what.to != "diffusers":
        raise UserError(f"--pipeline is for --to diffusers, not {what.to}: leave out one of the two")
    if what.vae is not None and not what.pipeline:
        raise UserError("--vae is the autoencoder of a pipeline: add --pipeline, or leave it out")
    if what.labels is not None and not what.pipeline:
        raise UserError("--labels names the classes of a pipeline: add --pipeline, or leave it out")
    for option, given in (("--guided", what.guided), ("--quantize", what.quantize)):
        if given and what.to != "onnx":
            raise UserError(f"{option} is for --to onnx, not {what.to}: leave out one of the two")
    if what.push_to_hub is not None and what.to in ("official", "single-file"):
        raise UserError("--push-to-hub uploads a folder: give --to diffusers, --to onnx or --to tinyfusion")
    if what.push_to_hub is not None and not HUB_ID.fullmatch(what.push_to_hub):
        raise UserError(f"--push-to-hub wants the id of a repository, ORG/NAME; got {what.push_to_hub!r}")


def _check_output(options: RunOptions, to: str, plain: Mapping[str, Any]) -> bool:
    """Whether there is something to do. Raises UserError on an output that is not ours or of another model."""
    out = options.out
    if to == "official":
        return recorded_output(out, "export", plain, options.overwrite)
    return folder_output(out, RECORD, "export", plain, options.overwrite, f"export --to {to}")


def _official_record(model: LoadedModel, steps: list[Step]) -> dict[str, Any]:
    """What the .json next to an official file says of the model."""
    facts = model.facts
    return {
        "license": facts.license,
        "license_note": licence_note(model, _from_nothing(steps)),
        "history": [step.sentence for step in steps],
        "kept": facts.kept,
        "lineage": facts.lineage,
        **({"dynamic": facts.dynamic} if facts.dynamic else {}),
    }


def _card_notes(
    model: LoadedModel, title: str, what: ExportOptions, differences: list[str], steps: list[Step]
) -> CardNotes:
    run = Path(what.model)
    command = read_json(run / "run.json").get("command") if (run / "run.json").is_file() else None
    evaluations = sorted((run / "evaluations").glob("student-*.json")) if (run / "run.json").is_file() else []
    return CardNotes(
        title,
        "pipeline" if what.pipeline else what.to,
        differences,
        [read_json(file) for file in evaluations],
        command,
        [model.origin[key] for key in ("hub", "address") if key in model.origin],
        [step.sentence for step in steps],
        steps[-1].verb == "prune" if steps else None,
        _from_nothing(steps),
    )


def _from_nothing(steps: list[Step]) -> bool:
    return bool(steps) and steps[0].verb == "train"


def _autoencoder(model: LoadedModel, what: ExportOptions, dry_run: bool) -> Path | None:
    """The folder of the autoencoder for a pipeline: as given, else the model's own. Raises UserError where none fits.

    None in a dry run, where it would be fetched.
    """
    pipeline = model.diffusers_export().pipeline
    if pipeline is None:
        raise UserError(
            f"no pipeline of diffusers draws with models of the family {model.family.name}: leave out --pipeline"
        )
    pixels = f"it is a model of pixels, and {pipeline.name} decodes latents (export without --pipeline)"
    unfit = pipeline.unfit(model.arch, model.facts.latent_shift) if model.of_latents else pixels
    if unfit is not None:
        raise UserError(f"{what.model} cannot be exported as a pipeline: {unfit}")
    if model.facts.few_steps and not model.facts.few_steps.is_trailing:
        raise UserError(
            f"{what.model} cannot be exported as a pipeline: it draws in {model.facts.few_steps.describe()}, which no "
            "scheduler of diffusers makes; leave out --pipeline"
        )
    name = what.vae or model.facts.vae
    if name is None:
        raise UserError(f"{what.model} does not say which autoencoder it goes with: give --vae PATH or a hub id")
    if dry_run and HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        print(f"note: the autoencoder {name} is taken from the hub, or its cache, and checked then", file=sys.stderr)
        return None
    folder = autoencoder_folder(name)
    config = read_json(folder / "config.json")
    reason = unfit_autoencoder(config, model) or pipeline.unfit(model.arch, config.get("shift_factor"))
    if reason is not None:
        raise UserError(f"the autoencoder {name} does not go with {what.model}: {reason}")
    return folder


def _labels(model: LoadedModel, what: ExportOptions) -> Mapping[int, str] | None:
    """Names of classes: of `--labels`, else of the pipeline that the model was opened from. Raises UserError on others than its own."""
    if what.labels is not None:
        return read_labels(Path(what.labels), model, what.model)
    index = Path(model.origin.get("path", "")).parent / "model_index.json"
    check_plain(index)
    named = index.is_file() and (read_json(index) or {}).get("id2label")
    return read_labels(index, model, what.model) if named else None


def read_labels(path: Path, model: LoadedModel, source: str) -> Mapping[int, str]:
    """Names of a model's classes from a file: one per line, or JSON. Raises UserError where they are not those of its classes."""
    check_plain(path)
    try:
        content = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
        return class_names(content, model.arch.num_classes)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels wants a text file, a name per line, or a JSON file; {path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} does not name the classes of {source}: {error}") from error
