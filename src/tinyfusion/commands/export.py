"""`export`: a model as other programs read it: diffusers, the published scripts, or our own folder with its card."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.commands.transformers import export_transformer
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain
from tinyfusion.core.rundir import (
    atomic_write,
    check_space,
    check_writable,
    file_output,
    read_json,
    say_finished,
    stamp,
    write_json,
)
from tinyfusion.core.version import __version__
from tinyfusion.export.card import PICTURE, CardNotes, licence_note, model_card
from tinyfusion.export.picture import plan_png
from tinyfusion.export.pipeline import class_names, unfit_autoencoder
from tinyfusion.families.family import DIFFUSERS_RECORD
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.history import Step, history
from tinyfusion.jobs.latent_facts import with_settings
from tinyfusion.jobs.transformers import transformer_of
from tinyfusion.models.checkpoint import LoadedModel, model_record, open_model, save_model
from tinyfusion.models.hub import HUB_ID, autoencoder_folder, upload_folder

RECORD = "tinyfusion.json"  # marks an exported folder as ours
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FILES = (  # that an export writes, as a regular expression of paths in its folder
    rf"(?:transformer/)?(?:config\.json|{_WEIGHTS})|model\.(?:json|safetensors)|README\.md|{PICTURE}|{RECORD}|model_index\.json|"
    r"scheduler/scheduler_config\.json|vae/(?:config\.json|diffusion_pytorch_model[^/]*)"
)
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


def export(options: RunOptions, what: ExportOptions) -> dict[str, Any]:
    """Write the model as `what.to` says; returns what `--json` prints. Raises UserError where the format cannot hold it."""
    _check_options(options.out, what)
    if transformer := transformer_of(what.model, options.blocks):
        return export_transformer(options, what.model, what.to, what.pipeline, transformer)
    if what.to == "single-file":
        raise UserError(
            f"--to single-file is for transformers of diffusers, and {what.model} is none: give another format"
        )
    model = open_model(what.model, what.settings.weights, options.num_heads, options.family, options.num_classes)
    model = with_settings(model, what.settings)
    if reason := model.unfit_formats().get(what.to):
        raise UserError(f"{what.model} cannot be exported to {what.to}: {reason}")
    rounded, model = model, model.with_formulas() if what.to == "diffusers" else model
    vae = _autoencoder(model, what, options.dry_run) if what.pipeline else None
    labels = _labels(model, what) if what.pipeline else None
    plain = {"to": what.to, "pipeline": what.pipeline, "vae": what.vae, "model": model.hash()}
    plain |= {"labels": what.labels} if what.labels else {}
    todo = _check_output(options, what.to, plain)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model, what.to).values())
    check_space(options.out, num_bytes + sum(file.stat().st_size for file in (_autoencoder_files(vae) if vae else [])))
    if model.facts.vae and Path(model.facts.vae).is_absolute():  # a folder here means nothing elsewhere
        model.facts = dataclasses.replace(model.facts, vae=None)
    describe = model.family.differences if what.to != "tinyfusion" else None
    differences = describe(model.module, model.arch, what.to) if describe else []
    if model is not rounded:
        computed = ", ".join(model.family.computed)
        differences.append(
            f"what a formula gives ({computed}) is computed in float32 there and rounded to half precision here"
        )
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
        _write(model, options.out, what, PipelineComponents(vae, labels), record)
    if what.push_to_hub:
        outcome["pushed_to"] = upload_folder(options.out, what.push_to_hub)
    return outcome


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
    if what.push_to_hub is not None and what.to == "official":
        raise UserError("--push-to-hub uploads a folder: give --to diffusers or --to tinyfusion")
    if what.push_to_hub is not None and not HUB_ID.fullmatch(what.push_to_hub):
        raise UserError(f"--push-to-hub wants the id of a repository, ORG/NAME; got {what.push_to_hub!r}")


def _check_output(options: RunOptions, to: str, plain: Mapping[str, Any]) -> bool:
    """Whether there is something to do. Raises UserError on an output that is not ours or of another model."""
    out = options.out
    if to == "official":
        check_writable(out.with_suffix(".json"))
        todo = file_output(
            out, "export", plain, options.overwrite, lambda path: _read_record(path.with_suffix(".json"))
        )
        if todo and not out.exists():
            file_output(out.with_suffix(".json"), "export", plain, True, read_json)
        return todo
    check_writable(out)
    if out.is_file():
        raise UserError(f"--out {out} is a file; export --to {to} writes a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"--out {out} exists and is not an export of tinyfusion; choose another folder")
    return file_output(out / RECORD, "export", plain, options.overwrite, _read_record) if out.is_dir() else True


def _read_record(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


# ------------------------------------------------------------------------------------------------------ what is written


def _tensors(model: LoadedModel, to: str) -> dict[str, Tensor]:
    """The tensors of the file, as views of the model's."""
    state = {name: tensor.detach() for name, tensor in model.module.state_dict().items()}
    return model.diffusers_export().tensors(state, model.arch) if to == "diffusers" else state


@dataclasses.dataclass(frozen=True)
class PipelineComponents:
    """The other components of a pipeline: the folder of an autoencoder, and names of classes where they are known."""

    vae: Path | None
    labels: Mapping[int, str] | None


def _write(
    model: LoadedModel, out: Path, what: ExportOptions, more: PipelineComponents, record: dict[str, Any]
) -> None:
    if what.to == "official":
        _write_official(model, out, history(what.model), record)
        return
    with atomic_write(out, _FILES) as temporary:
        if what.to == "tinyfusion":
            save_model(model, temporary)
        else:
            temporary.mkdir()
            _write_diffusers(model, temporary / "transformer" if what.pipeline else temporary)
        pipeline = model.diffusers_export().pipeline if more.vae is not None else None
        if more.vae is not None and pipeline is not None:
            _copy_autoencoder(more.vae, temporary / "vae")
            (temporary / "scheduler").mkdir()
            write_json(temporary / "scheduler" / "scheduler_config.json", _versioned(pipeline.scheduler))
            named = {} if more.labels is None else {"id2label": {str(i): name for i, name in more.labels.items()}}
            write_json(temporary / "model_index.json", _versioned({**pipeline.model_index, **named}))
        _write_card(model, temporary, out.name, what, record["differences"])
        write_json(temporary / RECORD, record)


def _copy_autoencoder(source: Path, folder: Path) -> None:
    """Its configuration and weights, and nothing else that lies there."""
    folder.mkdir()
    for file in _autoencoder_files(source):
        shutil.copyfile(file, folder / file.name)


def _autoencoder_files(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted(folder.glob("diffusion_pytorch_model*"))]


def _write_official(model: LoadedModel, out: Path, steps: list[Step], record: dict[str, Any]) -> None:
    """The flat state dict. A .pt is tensors and nothing else, which `weights_only` readers take: published scripts read no other."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.module.state_dict().items()}
    license = model.facts.license
    more = {
        "license": license,
        "license_note": licence_note(model, _from_nothing(steps)),
        "history": [step.sentence for step in steps],
        "kept": model.facts.kept,
        "lineage": model.facts.lineage,
        **({"dynamic": model.facts.dynamic} if model.facts.dynamic else {}),
    }
    with atomic_write(out) as temporary:
        if out.suffix == ".pt":
            with open(temporary, "wb") as file:
                torch.save(tensors, file)
        else:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(out.with_suffix(".json"), {**record, **more})


def _write_diffusers(model: LoadedModel, folder: Path) -> None:
    """config.json and weights of one model of diffusers; our own record stands in the configuration."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in _tensors(model, "diffusers").items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    own = {**model_record(model), "made_by": "tinyfusion", "version": __version__}
    write_json(
        folder / "config.json", {**_versioned(model.diffusers_export().config(model.arch)), DIFFUSERS_RECORD: own}
    )


def _versioned(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the version of diffusers that it was written for."""
    return {**config, "_diffusers_version": importlib.metadata.version("diffusers")}


def save_pretrained(model: LoadedModel, folder: Path, notes: CardNotes | None = None) -> None:
    """For users of the library: our own model folder with its card, whole or not at all."""
    with atomic_write(folder, _FILES) as temporary:
        save_model(model, temporary)
        _write_notes(model, temporary, notes or CardNotes(folder.name, "tinyfusion"))


def push_to_hub(model: LoadedModel, repository: str, notes: CardNotes | None = None) -> str:
    """For users of the library: what `save_pretrained` writes, put into a repository of the hub; its address."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model", notes or CardNotes(repository, "tinyfusion"))
        return upload_folder(Path(folder) / "model", repository)


def _write_card(model: LoadedModel, folder: Path, title: str, what: ExportOptions, differences: list[str]) -> None:
    source = Path(what.model)
    run = source if (source / "run.json").is_file() else None
    record = read_json(run / "run.json") if run else {}
    files = sorted((run / "evaluations").glob("student-*.json")) if run else []
    parents = [model.origin[key] for key in ("hub", "address") if key in model.origin]
    target = "pipeline" if what.pipeline else what.to
    evaluations = [read_json(file) for file in files]
    steps = history(what.model)
    untuned = steps[-1].verb == "prune" if steps else None
    sentences, command = [step.sentence for step in steps], record.get("command")
    notes = CardNotes(
        title, target, differences, evaluations, command, parents, sentences, untuned, _from_nothing(steps)
    )
    _write_notes(model, folder, notes)


def _from_nothing(steps: list[Step]) -> bool:
    return bool(steps) and steps[0].verb == "train"


def _write_notes(model: LoadedModel, folder: Path, notes: CardNotes) -> None:
    (folder / "README.md").write_text(model_card(model, notes), encoding="utf-8", errors="backslashreplace")
    if model.facts.plan is not None:
        (folder / PICTURE).write_bytes(plan_png(model.facts.plan.kept, model.facts.plan.depth))


# ----------------------------------------------------------------------------------------------------------- pipeline


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
    index = Path(model.origin.get("path", "")).parent / "model_index.json"
    path = Path(what.labels) if what.labels is not None else index
    check_plain(path)
    if what.labels is None and (not index.is_file() or not (read_json(index) or {}).get("id2label")):
        return None
    try:
        content = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
        return class_names(content, model.arch.num_classes)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels wants a text file, a name per line, or a JSON file; {path}: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} does not name the classes of {what.model}: {error}") from error
