"""Files of an exported model: a folder for diffusers, alone or as a pipeline, our own folder, or the flat state dict."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.core.rundir import atomic_write, write_json
from tinyfusion.core.version import __version__
from tinyfusion.export.card import PICTURE, CardNotes, model_card, plan_png
from tinyfusion.families.family import DIFFUSERS_RECORD
from tinyfusion.models.autoencoder import SCALE_OF_CLASS
from tinyfusion.models.checkpoint import LoadedModel, model_record, save_model
from tinyfusion.models.hub import DIFFUSERS_WEIGHTS, upload_folder

RECORD = "tinyfusion.json"  # marks an exported folder as ours
_FILES = (  # that an export writes, as a regular expression of paths in its folder
    rf"(?:transformer/)?(?:config\.json|{DIFFUSERS_WEIGHTS}\.safetensors)|model\.(?:json|safetensors)|README\.md|{PICTURE}|{RECORD}|"
    rf"model_index\.json|scheduler/scheduler_config\.json|vae/(?:config\.json|{DIFFUSERS_WEIGHTS}[^/]*)"
)


def unfit_autoencoder(config: Any, model: LoadedModel) -> str | None:
    """Why an autoencoder with this config.json does not fit the model; None where it does."""
    if not isinstance(config, Mapping) or config.get("_class_name") != "AutoencoderKL":
        kind = config.get("_class_name") if isinstance(config, Mapping) else None
        return f"it is {f'a {kind}' if kind else 'no model of diffusers'}, wanted an AutoencoderKL"
    channels, wanted = config.get("latent_channels", 4), model.arch.in_channels
    if channels != wanted:
        return f"its latents have {channels} channels, those of the model {wanted}"
    return model.facts.unlike("it scales latents by", "latent_scale", config.get("scaling_factor", SCALE_OF_CLASS))


def class_names(content: Any, num_classes: int) -> dict[int, str]:
    """The name of every class, from the contents of a file: a list, numbers to names, or a model_index.json with `id2label`.

    A pipeline takes "a, b" for two names of one class. Raises ValueError where not every class has exactly one entry.
    """
    if isinstance(content, Mapping) and "id2label" in content:
        content = content["id2label"]
    pairs = enumerate(content) if isinstance(content, list) else content.items() if isinstance(content, Mapping) else ()
    names = {str(number): name for number, name in pairs}
    wanted = [str(number) for number in range(num_classes)]
    if set(names) != set(wanted) or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise ValueError(f"it names {len(names)} classes, wanted a name for each of 0 to {num_classes - 1}")
    return {int(number): names[number] for number in wanted}


@dataclass(frozen=True)
class PipelineComponents:
    """The other components of a pipeline: the folder of an autoencoder, and names of classes where they are known."""

    vae: Path
    labels: Mapping[int, str] | None


def exported_tensors(model: LoadedModel, to: str) -> dict[str, Tensor]:
    """The tensors that a file of the format `to` holds, as views of the model's."""
    state = {name: tensor.detach() for name, tensor in model.module.state_dict().items()}
    return model.diffusers_export().tensors(state, model.arch) if to == "diffusers" else state


def autoencoder_files(folder: Path) -> list[Path]:
    """The configuration and the weights of an autoencoder, which are all that is copied of its folder."""
    return [folder / "config.json", *sorted(folder.glob(f"{DIFFUSERS_WEIGHTS}*"))]


def write_folder(
    model: LoadedModel,
    out: Path,
    to: str,
    components: PipelineComponents | None,
    notes: CardNotes,
    record: Mapping[str, Any],
) -> None:
    """Write the folder of `--to diffusers`, with `components` a pipeline, or `--to tinyfusion`, with its card."""
    with atomic_write(out, _FILES) as temporary:
        if to == "tinyfusion":
            save_model(model, temporary)
        else:
            _write_diffusers(model, temporary / "transformer" if components else temporary)
        if components is not None:
            _write_components(model, temporary, components)
        write_notes(model, temporary, notes)
        write_json(temporary / RECORD, record)


def _write_diffusers(model: LoadedModel, folder: Path) -> None:
    """config.json, which contains our record, and weights of a model of diffusers."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in exported_tensors(model, "diffusers").items()}
    save_file(tensors, folder / f"{DIFFUSERS_WEIGHTS}.safetensors", metadata={"format": "pt"})
    own = {**model_record(model), "made_by": "tinyfusion", "version": __version__}
    config = _versioned(model.diffusers_export().config(model.arch))
    write_json(folder / "config.json", {**config, DIFFUSERS_RECORD: own})


def _write_components(model: LoadedModel, folder: Path, components: PipelineComponents) -> None:
    pipeline = model.diffusers_export().pipeline
    assert pipeline is not None, "checked before anything is written"
    for name in ("vae", "scheduler"):
        (folder / name).mkdir()
    for file in autoencoder_files(components.vae):
        shutil.copyfile(file, folder / "vae" / file.name)
    few = {"timestep_spacing": "trailing"} if model.facts.few_steps else {}
    write_json(folder / "scheduler" / "scheduler_config.json", _versioned({**pipeline.scheduler, **few}))
    labels = {} if components.labels is None else {"id2label": {str(i): name for i, name in components.labels.items()}}
    write_json(folder / "model_index.json", _versioned({**pipeline.model_index, **labels}))


def _versioned(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "_diffusers_version": importlib.metadata.version("diffusers")}


def write_official(model: LoadedModel, out: Path, record: Mapping[str, Any]) -> None:
    """The flat state dict, and `record` in a .json next to it. A .pt is for published scripts, and readable by `weights_only`."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in exported_tensors(model, "official").items()}
    with atomic_write(out) as temporary:
        if out.suffix == ".pt":
            with open(temporary, "wb") as file:
                torch.save(tensors, file)
        else:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(out.with_suffix(".json"), record)


def save_pretrained(model: LoadedModel, folder: Path, notes: CardNotes | None = None) -> None:
    """For users of the library: write our own model folder with its card, atomically."""
    with atomic_write(folder, _FILES) as temporary:
        save_model(model, temporary)
        write_notes(model, temporary, notes or CardNotes(folder.name, "tinyfusion"))


def push_to_hub(model: LoadedModel, repository: str, notes: CardNotes | None = None) -> str:
    """For users of the library: upload the folder of `save_pretrained` to a repository of the hub. Returns its address."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model", notes or CardNotes(repository, "tinyfusion"))
        return upload_folder(Path(folder) / "model", repository)


def write_notes(model: LoadedModel, folder: Path, notes: CardNotes) -> None:
    """The card of a model and, if it was pruned, the picture of its plan."""
    (folder / "README.md").write_text(model_card(model, notes), encoding="utf-8", errors="backslashreplace")
    if model.facts.plan is not None:
        (folder / PICTURE).write_bytes(plan_png(model.facts.plan.kept, model.facts.plan.depth))
