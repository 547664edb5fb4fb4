"""Models on disk: our folder (`model.safetensors` + `model.json`), official files, folders of diffusers; by path or name.

Loading is strict and never runs code from a file. A folder says everything about itself; official files leave some
sizes to the published tables. Shapes and file formats: docs/contract.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.core.config import build_known, nearest
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json, write_json, written_beside
from tinyfusion.core.weights import fetch_weights, known_weights
from tinyfusion.models import diffusers
from tinyfusion.models.attach import rules_of, settings_in
from tinyfusion.models.family import FAMILIES, DiffusersFolder, ModelFamily
from tinyfusion.models.hub import HUB_ID, fetch_repository
from tinyfusion.models.loaded import LoadedModel, ModelFacts, hash_tensors, make_trainable, new_model
from tinyfusion.models.plan import plan_from_json
from tinyfusion.models.routers import is_router_key, settings_of
from tinyfusion.models.tensors import check_tensors, filled, read_pickle, read_safetensors, read_shards, state_dict_in

__all__ = [
    "MODEL_FORMAT_VERSION", "LoadedModel", "ModelFacts", "hash_tensors", "make_trainable", "model_record", "new_model",
    "open_model", "save_model", "shipped_models",
]  # fmt: skip

MODEL_FORMAT_VERSION = 1
_WEIGHTS = "diffusion_pytorch_model"  # name of the weights in a folder of diffusers


# ------------------------------------------------------------------------------------------------------------ writing


def model_record(model: LoadedModel) -> dict[str, Any]:
    """The contents of model.json."""
    facts = model.facts
    return {
        "format_version": MODEL_FORMAT_VERSION,
        "family": model.family.name,
        "process": model.family.process,
        "process_settings": facts.process_settings,
        "dynamic": facts.dynamic,
        "arch": dataclasses.asdict(model.arch),
        "depth": len(model.stack),  # of all lists together: readers without torch cannot count them
        "plan": facts.plan.to_json() if facts.plan else None,
        "kept": facts.kept,
        "lineage": facts.lineage,
        "hash": model.hash(),
        "image_size": facts.image_size,
        "latent_scale": facts.latent_scale,
        "vae": facts.vae,
        "license": facts.license,
        "seen_images": facts.seen_images,
    }


def save_model(model: LoadedModel, folder: Path) -> None:
    """Write our model folder, whole or not at all."""
    with written_beside(folder) as beside:
        beside.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.module.state_dict().items()}
        save_file(tensors, beside / "model.safetensors")
        write_json(beside / "model.json", model_record(model))


# ------------------------------------------------------------------------------------------------------------ reading


def open_model(
    source: str | Path, weights: str = "ema", num_heads: int | None = None, family: str | None = None
) -> LoadedModel:
    """Open any model: a run folder, a model folder of ours or of diffusers, an official file, a name, or a hub id.

    weights: "ema" or "raw", where both exist; else what there is. num_heads: for official files whose width is in no published table.
    family: for official files whose keys fit several families. The module comes back in eval mode, on the CPU.
    Names are those of shipped models and of known weights, which are fetched once; a hub id is `org/name` or
    `org/name@revision`. Raises UserError on anything that is not exactly a model: missing, unexpected or misshapen
    tensors, NaN, code; and on a name that nothing is known by or that cannot be fetched.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"--weights is ema or raw; got {weights!r}")
    path, extra = Path(source), dict[str, str]()
    if not path.exists():
        path, extra = _by_name(str(source))
        family = family or extra.get("family")
    if path.is_dir():
        model = _open_folder(_model_folder(path, weights), num_heads, family)
    else:
        model = _open_official(path, weights, num_heads, family)
    extra.pop("family", None)
    known: dict[str, Any] = {key: extra.pop(key) for key in ("license", "vae") if key in extra}
    if model.facts.license is not None:
        known.pop("license", None)
    model.facts = dataclasses.replace(model.facts, **known)
    model.origin |= extra
    return model


def shipped_models() -> dict[str, Path]:
    """Model folders that come with the package, by name."""
    root = Path(str(resources.files("tinyfusion"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.json"))}


def _by_name(name: str) -> tuple[Path, dict[str, str]]:
    """Where a model is that is no path, and what is known of it: shipped, known weights (fetched) or a hub id (fetched)."""
    shipped = shipped_models()
    if name in shipped:
        return shipped[name], {"name": name}
    known = {entry.name: entry for entry in known_weights().values() if entry.kind == "model"}
    if name in known:
        entry = known[name]
        path = fetch_weights(name)
        said = {"license": entry.license, "family": entry.family}
        return path, {"name": name, "address": entry.address, **{key: value for key, value in said.items() if value}}
    if HUB_ID.fullmatch(name) and not Path(name).parent.exists():
        return fetch_repository(name)
    hint = nearest(name, [*shipped, *known])
    raise UserError(f"no model at {name}: no such file or folder, and no model of that name{hint}")


def _model_folder(path: Path, weights: str) -> Path:
    """The folder with the model in it: itself, that of a run, or the transformer of a pipeline of diffusers."""
    if (path / "model.json").is_file():
        return path
    for name in ("student", "recover/student", "model", "prune/student"):
        for suffix in ("-raw", "") if weights == "raw" else ("",):
            if (path / f"{name}{suffix}" / "model.json").is_file():
                return path / f"{name}{suffix}"
    if (path / "model_index.json").is_file():
        kind = (read_json(path / "model_index.json") or {}).get("_class_name")
        known = [
            "DiTPipeline",
            *(name for one in FAMILIES.values() if one.diffusers for name in one.diffusers.pipelines),
        ]
        if kind not in known:
            raise UserError(f"{path} is a {kind} of diffusers; of its pipelines only {', '.join(known)} can be opened")
        path = path / "transformer"
    if (path / "config.json").is_file():
        return path
    raise UserError(
        f"{path} holds no model: wanted model.json in it, a run folder with student/ or model/, or a folder of diffusers "
        "with config.json"
    )


def _open_folder(path: Path, num_heads: int | None, family_name: str | None) -> LoadedModel:
    if (path / "model.json").is_file():
        return _open_own(path, num_heads, family_name)
    return _open_diffusers(path, num_heads, family_name)


def _open_own(path: Path, num_heads: int | None, family_name: str | None) -> LoadedModel:
    record = read_json(path / "model.json")
    if not isinstance(record, dict):
        raise UserError(f"{path}/model.json is damaged: not an object")
    version = record.get("format_version")
    if not isinstance(version, int) or version > MODEL_FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this tinyfusion reads up to {MODEL_FORMAT_VERSION}: upgrade"
        )
    family = _family(record.get("family"), path)
    _check_family(path, family, family_name)
    try:
        arch = build_known(family.arch_type, record.get("arch"), "arch")
        plan = None if record.get("plan") is None else plan_from_json(record["plan"])
        facts = build_known(ModelFacts, {**record, "plan": plan}, "")
        routers = None if facts.dynamic is None else settings_in(facts.dynamic)
        if routers is not None:
            rules_of(family)
    except ValueError as error:  # UserError among them
        raise UserError(f"{path}/model.json is damaged: {error}") from error
    _check_heads(path, arch, num_heads)
    module = filled(family, arch, read_safetensors(path / "model.safetensors"), path, routers)
    model = LoadedModel(module, family, arch, facts, {"kind": "model folder of tinyfusion", "path": str(path)})
    if record.get("hash") != model.hash() and record.get("hash") != _hash_of_tensors_alone(model):
        raise UserError(f"{path} is damaged: its tensors do not give the hash in model.json")
    return model


def _hash_of_tensors_alone(model: LoadedModel) -> str:
    """What folders record that were written before rules of its own were part of the hash of a model."""
    return hash_tensors(model.module.state_dict(), model.family, model.arch, rules=False)


def _check_heads(path: Path, arch: Any, num_heads: int | None) -> None:
    if num_heads not in (None, getattr(arch, "num_heads", num_heads)):
        raise UserError(f"{path} has {arch.num_heads} heads; --num-heads {num_heads} contradicts it")


def _check_family(path: Path, family: ModelFamily, name: str | None) -> None:
    if name not in (None, family.name):
        raise UserError(f"{path} is of family {family.name}, not {name}")


def _open_diffusers(path: Path, num_heads: int | None, family_name: str | None) -> LoadedModel:
    """The folder of one model of diffusers: config.json, and weights in one file or several."""
    config = read_json(path / "config.json")
    if not diffusers.is_config(config):
        raise UserError(f"{path}/config.json is not of a model of diffusers: it has no _class_name")
    holding = (one for one in FAMILIES.values() if one.diffusers and one.diffusers.holds(config))
    family = next(holding, FAMILIES["dit"])
    _check_family(path, family, family_name)
    if family.diffusers is not None:
        return _open_diffusers_of(family, family.diffusers, path, config, num_heads)
    try:
        arch = diffusers.arch_of_config(config)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except ValueError as error:
        raise UserError(f"{path}/config.json is damaged: {error}") from error
    _check_heads(path, arch, num_heads)
    tensors, file = _diffusers_weights(path)
    if diffusers.wrong_table(tensors, arch):
        raise UserError(f"{path} holds a position table that is not the formula's, and diffusers takes none but that")
    tensors.pop(diffusers.POSITION_BUFFER, None)
    check_tensors(tensors, diffusers.to_diffusers(family.shapes(arch), arch.depth), f"{path} does not hold this model")
    try:
        ours = diffusers.from_diffusers(tensors, arch)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    del tensors
    if diffusers.RECORD in config and all(tensor.dtype == torch.float32 for tensor in ours.values()):
        shift = diffusers.recorded_shift(
            config, lambda shift: hash_tensors(ours, family, dataclasses.replace(arch, frequency_shift=shift))
        )
        arch = dataclasses.replace(arch, frequency_shift=arch.frequency_shift if shift is None else shift)
    module = filled(family, arch, ours, path)
    inside = " in a DiTPipeline" if (path.parent / "model_index.json").is_file() else ""
    origin = {"kind": f"folder of diffusers{inside}", "path": str(path), "file": file}
    return LoadedModel(module, family, arch, _diffusers_facts(path, config, arch, family), origin)


def _open_diffusers_of(
    family: ModelFamily, folder: DiffusersFolder, path: Path, config: Any, num_heads: int | None
) -> LoadedModel:
    """The folder of one model of diffusers whose family reads it by its own rules."""
    tensors, file = _diffusers_weights(path)
    if (path / folder.beside).is_file():
        tensors |= read_safetensors(path / folder.beside)
    try:
        arch, ours = folder.read(config, tensors)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except ValueError as error:
        raise UserError(f"{path}/config.json is damaged: {error}") from error
    _check_heads(path, arch, num_heads)
    origin = {"kind": "folder of diffusers", "path": str(path), "file": file}
    module = filled(family, arch, ours, path)
    return LoadedModel(module, family, arch, _diffusers_facts(path, config, arch, family), origin)


def _diffusers_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a folder of diffusers, and the name of the file that they are in; safetensors come first."""
    for name, read in ((f"{_WEIGHTS}.safetensors", read_safetensors), (f"{_WEIGHTS}.bin", read_pickle)):
        if (path / f"{name}.index.json").is_file():
            return read_shards(path / f"{name}.index.json", read), f"{name}.index.json"
        if (path / name).is_file():
            return state_dict_in(read(path / name), "raw", path / name), name
    variants = sorted(file.name for file in path.glob(f"{_WEIGHTS}*"))
    there = f"; there is {', '.join(variants)}, which is none of them" if variants else ""
    raise UserError(f"{path} holds no weights: wanted {_WEIGHTS}.safetensors or .bin, whole or with an index{there}")


def _diffusers_facts(path: Path, config: Any, arch: Any, family: ModelFamily) -> ModelFacts:
    """What our own record in an exported folder says; else the published latent facts, with those of a VAE beside."""
    record, facts = config.get(diffusers.RECORD), _published_facts(arch, family)
    if record is not None:
        try:
            plan = None if record.get("plan") is None else plan_from_json(record["plan"])
            facts = build_known(ModelFacts, {**record, "plan": plan}, "")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}/config.json is damaged: {diffusers.RECORD}: {error}") from error
    vae = path.parent / "vae"
    if not (vae / "config.json").is_file():
        return facts
    settings = read_json(vae / "config.json")
    sides = 2 ** (len(settings.get("block_out_channels", [0])) - 1)
    scale = settings.get("scaling_factor", facts.latent_scale)
    name = str(vae.absolute()) if any(vae.glob(f"{_WEIGHTS}*")) else facts.vae
    return dataclasses.replace(facts, image_size=arch.input_size * sides, latent_scale=scale, vae=name)


def _family(name: Any, path: Path) -> ModelFamily:
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{path} is of family {name!r}{nearest(str(name), FAMILIES)}")
    return FAMILIES[name]


def _open_official(path: Path, weights: str, num_heads: int | None, family_name: str | None) -> LoadedModel:
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    tensors = state_dict_in(content, weights, path)
    part = "" if len(tensors) == len(content) else " of a training checkpoint"
    fit = [_family(family_name, path)] if family_name else _families_of(tensors)
    family = fit[0]
    static = {name: t for name, t in tensors.items() if family.dynamic is None or not is_router_key(name)}
    routers = None
    try:
        arch = family.arch_of_state_dict(static, num_heads)
        if len(static) < len(tensors):
            routers = settings_of(tensors, arch.num_heads)
            rules_of(family).sizes(arch)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    facts = _published_facts(arch, family)
    if routers is not None:
        facts = dataclasses.replace(facts, dynamic=dataclasses.asdict(routers))
    kind = f"official state dict{' with routers' if routers else ''}{part}"
    module = filled(family, arch, tensors, path, routers)
    if len(fit) > 1:
        print(f"assuming family {family.name} (give --family to say otherwise)", file=sys.stderr)
    return LoadedModel(module, family, arch, facts, {"kind": kind, "path": str(path)})


def _families_of(tensors: Mapping[str, Tensor]) -> list[ModelFamily]:
    """The families that an official file may be of, by its tensors; the first is assumed."""
    return [family for family in FAMILIES.values() if family.mark in tensors] or list(FAMILIES.values())[:1]


def _published_facts(arch: Any, family: ModelFamily) -> ModelFacts:
    """Of a file that says nothing about its images: pixels, or the published latents where it has their channels."""
    latent = family.published_latent.get(arch.in_channels, {})
    return ModelFacts(
        image_size=arch.input_size * latent.get("pixels_per_latent", 1),
        latent_scale=latent.get("latent_scale"),
        vae=latent.get("vae"),
    )
