"""Models on disk: our folder (`model.safetensors` + `model.json`), official state dicts and training checkpoints.

Loading is strict and never runs code from a file. A folder says everything about itself; official files leave some
sizes to the published tables. Shapes and file formats: docs/contract.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyfusion.core.config import build_known, nearest
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json, write_json, written_beside
from tinyfusion.models.family import FAMILIES, ModelFamily
from tinyfusion.models.plan import PrunePlan, plan_from_json
from tinyfusion.models.stack import BlockStack
from tinyfusion.models.widths import sliced

MODEL_FORMAT_VERSION = 1
_NO_MODEL = "is not a model file, or it is truncated: wanted a torch file or .safetensors with a state dict"
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """What a model carries beside its tensors.

    image_size: side of its images in pixels. latent_scale and vae: None for a pixel-space model. kept: indices into the
    direct parent per list, None for an uncut model. lineage: parents, oldest first, each with hash, depth and kept, where
    it was cut in width the residual channels of its own parent that it kept, and its arch where its child was.
    seen_images: images that a model trained from nothing saw; None for cut models and where unknown.
    """

    image_size: int
    latent_scale: float | None = None
    vae: str | None = None
    license: str | None = None
    kept: dict[str, list[int]] | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    plan: PrunePlan | None = None
    seen_images: int | None = None


@dataclass
class LoadedModel:
    """A model in memory: the module with its family, sizes and facts."""

    module: nn.Module
    family: ModelFamily
    arch: Any
    facts: ModelFacts

    @property
    def stack(self) -> BlockStack:
        """Its residual blocks."""
        return self.family.stack(self.module)

    def copy(self) -> LoadedModel:
        """An independent copy."""
        return dataclasses.replace(self, module=copy.deepcopy(self.module))

    def with_weights(self, tensors: Mapping[str, Tensor]) -> LoadedModel:
        """The same model with other values: a new module, on the CPU, that holds a copy of every tensor of `tensors`."""
        with torch.device("meta"):
            module = self.family.build(self.arch)
        module.load_state_dict(
            {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, assign=True
        )
        make_trainable(module, self.family)
        return dataclasses.replace(self, module=module.train(self.module.training))

    def hash(self) -> str:
        """SHA-256 over the tensors sorted by official name; see `hash_tensors`."""
        return hash_tensors(self.module.state_dict(), self.family, self.arch)

    def unfit_formats(self) -> dict[str, str]:
        """Formats of others that cannot hold this model, each with the reason: what an export must refuse."""
        reasons = self.family.unfit_formats
        return reasons(self.arch, self.module.state_dict()) if reasons else {}

    def cut(self, plan: PrunePlan, force: bool = False) -> LoadedModel:
        """A new, trainable model with only the plan's blocks and channels; this one stays as it is.

        Raises UserError where the plan was made for another model (unless `force`) or does not fit its depth or widths.
        """
        own = self.hash()
        if plan.teacher and plan.teacher != own and not force:
            raise UserError(
                f"the plan was made for the model {plan.teacher[:12]}, this one is {own[:12]}; force it to cut all the same"
            )
        depths = self.stack.depths()
        if plan.depth != depths:
            raise UserError(f"the plan is for depth {plan.depth}, the model has {depths}")
        try:
            student = self.copy() if plan.kept_widths is None else self._narrowed(plan.kept_widths)
            student.stack.keep(plan.kept)
        except ValueError as error:
            raise UserError(str(error)) from error
        make_trainable(student.module, self.family)  # a copy of a frozen teacher is frozen
        kept = {name: sorted(indices) for name, indices in plan.kept.items()}
        parent: dict[str, Any] = {"hash": own, "depth": depths, "kept": self.facts.kept}
        student.arch = self.family.arch_with_depths(student.arch, student.stack.depths())
        if plan.kept_widths is not None:
            parent["arch"] = dataclasses.asdict(self.arch)
        if self.facts.plan and self.facts.plan.kept_widths:
            parent["residual"] = self.facts.plan.kept_widths.get("residual")  # so that a grandchild finds its features
        if self.facts.plan and self.facts.plan.pairing_groups:
            parent["groups"] = (
                self.facts.plan.pairing_groups
            )  # a grandchild is paired with this model's parent through them
        lineage = [*self.facts.lineage, parent]
        student.facts = dataclasses.replace(self.facts, kept=kept, lineage=lineage, plan=plan, seen_images=None)
        return student

    def _narrowed(self, kept_widths: Mapping[str, Any]) -> LoadedModel:
        """A copy with only these channels; ValueError where they do not fit."""
        if self.family.widths is None:
            raise ValueError(f"widths of the family {self.family.name} cannot be cut")
        arch, tensors = sliced(self.family.widths, self.arch, self.module.state_dict(), kept_widths)
        with torch.device("meta"):
            module = self.family.build(arch)
        module.load_state_dict(tensors, assign=True)
        return dataclasses.replace(self, module=module.train(self.module.training), arch=arch)


def hash_tensors(tensors: Mapping[str, Tensor], family: ModelFamily, arch: Any) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name; formula tensors are left out if equal.

    It is the hash of the tensors as held. Opened models hold float32, whatever their file held: a half-precision file
    has the hash of its values in float32, not that of its bytes. Nothing remembers it: weights change in place.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        formula = family.computed.get(name)
        if formula is not None and torch.equal(tensor, formula(arch).to(tensor.dtype)):
            continue
        digest.update(f"{name}\0{_DTYPE_NAMES[tensor.dtype]}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # a view: nothing is copied
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ writing


def model_record(model: LoadedModel) -> dict[str, Any]:
    """The contents of model.json."""
    facts = model.facts
    return {
        "format_version": MODEL_FORMAT_VERSION,
        "family": model.family.name,
        "process": model.family.process,
        "arch": dataclasses.asdict(model.arch),
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
    """Open any model: a run folder, a model folder of ours, an official file, or a shipped model by name.

    weights: "ema" or "raw", where both exist; else what there is. num_heads: for official files whose width is in no published table.
    family: for official files whose keys fit several families. The module comes back in eval mode, on the CPU.
    Raises UserError on anything that is not exactly a model: missing, unexpected or misshapen tensors, NaN, code.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"--weights is ema or raw; got {weights!r}")
    path = Path(source)
    if not path.exists():
        shipped = shipped_models()
        if str(source) not in shipped:
            hint = nearest(str(source), shipped)
            raise UserError(f"no model at {source}: no such file or folder, and no shipped model of that name{hint}")
        path = shipped[str(source)]
    if path.is_dir():
        return _open_folder(_model_folder(path, weights), num_heads, family)
    return _open_official(path, weights, num_heads, family)


def shipped_models() -> dict[str, Path]:
    """Model folders that come with the package, by name."""
    root = Path(str(resources.files("tinyfusion"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.json"))}


def _model_folder(path: Path, weights: str) -> Path:
    if (path / "model.json").is_file():
        return path
    for name in ("student", "recover/student", "model", "prune/student"):
        for suffix in ("-raw", "") if weights == "raw" else ("",):
            if (path / f"{name}{suffix}" / "model.json").is_file():
                return path / f"{name}{suffix}"
    raise UserError(f"{path} holds no model: wanted model.json in it, or a run folder with student/ or model/")


def _open_folder(path: Path, num_heads: int | None, family_name: str | None) -> LoadedModel:
    record = read_json(path / "model.json")
    if not isinstance(record, dict):
        raise UserError(f"{path}/model.json is damaged: not an object")
    version = record.get("format_version")
    if not isinstance(version, int) or version > MODEL_FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this tinyfusion reads up to {MODEL_FORMAT_VERSION}: upgrade"
        )
    family = _family(record.get("family"), path)
    if family_name not in (None, family.name):
        raise UserError(f"{path} is of family {family.name}, not {family_name}")
    try:
        arch = build_known(family.arch_type, record.get("arch"), "arch")
        plan = None if record.get("plan") is None else plan_from_json(record["plan"])
        facts = build_known(ModelFacts, {**record, "plan": plan}, "")
    except ValueError as error:  # UserError among them
        raise UserError(f"{path}/model.json is damaged: {error}") from error
    if num_heads not in (None, getattr(arch, "num_heads", num_heads)):
        raise UserError(f"{path} has {arch.num_heads} heads; --num-heads {num_heads} contradicts it")
    model = LoadedModel(_fill(family, arch, _read_safetensors(path / "model.safetensors"), path), family, arch, facts)
    if record.get("hash") != model.hash():
        raise UserError(f"{path} is damaged: its tensors do not give the hash in model.json")
    return model


def _family(name: Any, path: Path) -> ModelFamily:
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{path} is of family {name!r}{nearest(str(name), FAMILIES)}")
    return FAMILIES[name]


def _open_official(path: Path, weights: str, num_heads: int | None, family_name: str | None) -> LoadedModel:
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = _state_dict_in(content, weights, path)
    if family_name is None and len(FAMILIES) > 1:
        print("assuming family dit (give --family to say otherwise)", file=sys.stderr)
    family = _family(family_name or "dit", path)
    try:
        arch = family.arch_of_state_dict(tensors, num_heads)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    latent = family.published_latent.get(arch.in_channels, {})
    facts = ModelFacts(
        image_size=arch.input_size * latent.get("pixels_per_latent", 1),
        latent_scale=latent.get("latent_scale"),
        vae=latent.get("vae"),
    )
    return LoadedModel(_fill(family, arch, tensors, path), family, arch, facts)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file (truncated or foreign): {error}") from error


def _read_pickle(path: Path) -> Any:
    """A torch file, without running code from it: only tensors, plain containers and argparse.Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own advice is to run the code; ours is not
        what = f"holds code or foreign objects ({found[1]}), which are never run" if found else _NO_MODEL
        raise UserError(f"{path} {what}") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError, TypeError, struct.error,
            zipfile.BadZipFile, UnicodeDecodeError, ImportError, OverflowError, AssertionError) as error:  # fmt: skip
        raise UserError(f"{path} {_NO_MODEL}") from error


def _state_dict_in(content: Any, weights: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a flat state dict, or of a training checkpoint ("ema", else "model"; "model" for raw weights)."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    for key in ("ema", "model") if weights == "ema" else ("model", "ema"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors or len(tensors) != len(content):
        odd = next((str(k) for k, v in content.items() if not isinstance(v, Tensor)), "nothing")
        raise UserError(f"{path} is no state dict of tensors (it holds {odd!r})")
    return tensors


def _fill(family: ModelFamily, arch: Any, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A module with exactly these values, float32 and in memory of its own, in eval mode; the first few faults are named."""
    with torch.device("meta"):
        module = family.build(arch)
    wanted = module.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults += [f"{name} is {_kind(tensor)}, wanted floats" for name, tensor in tensors.items() if not _is_plain(tensor)]
    held: dict[str, Tensor] = {}
    if not faults:
        held = {name: tensors[name].detach().to(torch.float32, copy=True).contiguous() for name in wanted}
        faults = [f"{name} is not finite" for name, tensor in held.items() if not bool(torch.isfinite(tensor).all())]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UserError(f"{path} does not hold this {family.name}: {'; '.join(faults[:3])}{more}")
    module.load_state_dict(held, assign=True)
    return make_trainable(module, family).eval()


def _is_plain(tensor: Tensor) -> bool:
    """Floating-point numbers that are there, one by one: no integers, complex numbers, sparse, quantised or meta tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" ({tensor.layout})".replace("torch.", "")
    return f"{tensor.dtype}{layout}{' without values' if tensor.is_meta else ''}".removeprefix("torch.")


def make_trainable(module: nn.Module, family: ModelFamily) -> nn.Module:
    """Gradients for every parameter that no formula gives."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in family.computed)
    return module


def new_model(family_name: str, arch_values: Mapping[str, Any], seed: int) -> LoadedModel:
    """A freshly initialised pixel-space model. Raises UserError where the sizes do not fit together."""
    if family_name not in FAMILIES:
        raise UserError(f"unknown family {family_name!r}{nearest(family_name, FAMILIES)}")
    family = FAMILIES[family_name]
    try:
        arch = family.arch_type(**arch_values)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    with torch.random.fork_rng(devices=[]):  # new layers fill themselves from the global generator: not ours to move
        module = family.build(arch)
    family.initialise(module, seed)
    return LoadedModel(module, family, arch, ModelFacts(image_size=arch.input_size))
