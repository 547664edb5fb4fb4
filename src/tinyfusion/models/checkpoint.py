"""Models on disk: our folder (`model.safetensors` + `model.json`), official files, folders of diffusers; by path or name.

Loading is strict and never runs code from a file. A folder says everything about itself; official files leave some
sizes to the published tables. Shapes and file formats: docs/contract.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyfusion.blocks.plan import plan_from_json
from tinyfusion.blocks.routers import DynamicSettings, is_router_key, settings_of
from tinyfusion.conditioning.condition import Condition
from tinyfusion.conditioning.texts import text_table
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.reading import check_memory, read_json_object
from tinyfusion.core.rundir import atomic_write, write_json
from tinyfusion.core.tensors import read_folder_weights, read_safetensors, read_tensor_file
from tinyfusion.families.family import DIFFUSERS_RECORD, ModelFamily
from tinyfusion.families.registry import diffusers_classes, families, family_named, family_of_config
from tinyfusion.families.sizes import LARGEST_SIZE
from tinyfusion.families.tensor_checks import check_sizes, in_float32
from tinyfusion.models.autoencoder import LARGEST_SCALE, SCALE_OF_CLASS, autoencoder_config
from tinyfusion.models.facts import ModelFacts
from tinyfusion.models.hub import DIFFUSERS_WEIGHTS
from tinyfusion.models.loaded import LoadedModel, make_trainable, settings_in
from tinyfusion.models.places import by_name, exists, is_shipped, model_folder, shipped_models
from tinyfusion.models.statedicts import described_other, find_state_dict
from tinyfusion.models.wrapped import NO_PROCESS
from tinyfusion.processes.base import FoldedGuidance
from tinyfusion.processes.noising import FewSteps

__all__ = [
    "MODEL_FORMAT_VERSION", "LoadedModel", "ModelFacts", "make_trainable", "model_record", "new_model",
    "open_model", "save_model", "shipped_models",
]  # fmt: skip

MODEL_FORMAT_VERSION = 1
_PUBLISHED_CLASSES = 1000  # of ImageNet, trained with a null class in all published files


# ------------------------------------------------------------------------------------------------------------ writing


def new_model(family_name: str | None, arch_values: Mapping[str, Any], seed: int) -> LoadedModel:
    """A freshly initialised model, without facts but its image size. Raises UserError on sizes that do not fit."""
    if family_name is None:
        raise UserError(f"a new model needs a family: --set model.family=NAME, one of {', '.join(families())}")
    family = family_named(family_name)
    with prefixed("model", ValueError):
        arch = family.arch_of_sizes(arch_values)
        num_bytes = family.num_bytes(arch)
    check_memory(num_bytes, "a new model of these sizes")
    with torch.random.fork_rng(devices=[]):  # layers are initialised from the global generator, which must not change
        torch.manual_seed(seed)
        module = family.build(arch)
    if family.initialise is not None:
        family.initialise(module, seed)
    texts = family.texts.initial(arch, seed) if family.texts else None
    return LoadedModel(module, family, arch, ModelFacts(image_size=arch.input_size), texts=texts)


def model_record(model: LoadedModel) -> dict[str, Any]:
    """The contents of model.json."""
    facts = {field.name: getattr(model.facts, field.name) for field in dataclasses.fields(ModelFacts)}
    return {
        "format_version": MODEL_FORMAT_VERSION,
        "family": model.family.name,
        "process": model.family.process,
        "arch": dataclasses.asdict(model.arch),
        "depth": len(model.stack),  # of all lists together: readers without torch cannot count them
        "hash": model.hash(),
        **facts,
        "plan": model.facts.plan.to_json() if model.facts.plan else None,
        **{name: _as_json(getattr(model.facts, name)) for name in ("few_steps", "folded_guidance")},
    }


def _as_json(drawn: FewSteps | FoldedGuidance | None) -> dict[str, Any] | None:
    return None if drawn is None else dataclasses.asdict(drawn)


def save_model(model: LoadedModel, folder: Path) -> None:
    """Write our model folder, whole or not at all. Raises UserError for a module of your own, which has no format of ours."""
    if model.family.process == NO_PROCESS:
        raise UserError(f"a {model.family.title} of your own has no model folder: save its state dict")
    with atomic_write(folder) as temporary:
        temporary.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.tensors().items()}
        save_file(tensors, temporary / "model.safetensors")
        write_json(temporary / "model.json", model_record(model))


# ------------------------------------------------------------------------------------------------------------ reading


def open_model(
    source: str | Path,
    weights: str = "ema",
    num_heads: int | None = None,
    family: str | None = None,
    num_classes: int | None = None,
) -> LoadedModel:
    """Open any model: a run folder, a model folder of ours or of diffusers, an official file, a name, or a hub id.

    weights: "ema" or "raw", where both exist; else what there is. num_heads: for official files whose width is in no published table.
    family: for official files whose keys fit several families. num_classes: for official files, without the null class, as a label
    table does not say whether its last row is one. The module comes back in eval mode, on the CPU.
    Names are those of shipped models, before a folder of that name, and of known weights, which are fetched once; a hub
    id is `org/name` or `org/name@revision`. Raises UserError on anything that is not exactly a model: missing, unexpected or misshapen
    tensors, NaN, code; and on a name that nothing is known by or that cannot be fetched.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"--weights is ema or raw; got {weights!r}")
    path, extra = Path(source), dict[str, str]()
    if is_shipped(source) or not exists(path):
        path, extra = by_name(str(source))
        family = family or extra.get("family")
    stated = _Stated(family, num_heads, num_classes)
    if not path.is_dir():
        model = _open_official(path, weights, stated)
    elif ((folder := model_folder(path, weights)) / "model.json").exists():
        model = _open_own(folder, stated)
    else:
        model = _open_diffusers(folder, stated)
    extra.pop("family", None)
    known: dict[str, Any] = {key: extra.pop(key) for key in ("license", "vae") if key in extra}
    if model.facts.license is not None:
        known.pop("license", None)
    assumed = [name for name in model.facts.assumed if name not in known]
    model.facts = dataclasses.replace(model.facts, **known, assumed=assumed)
    model.origin |= extra
    return model


@dataclass(frozen=True)
class _Stated:
    """What the user says of a model: name of its family, attention heads, classes without the null class; None: nothing."""

    family: str | None
    num_heads: int | None
    num_classes: int | None

    def check_family(self, path: Path, family: ModelFamily) -> None:
        """Raise UserError where a model of another family is stated."""
        if self.family not in (None, family.name):
            raise UserError(f"{path} is of family {family.name}, not {self.family}")

    def check_sizes(self, path: Path, arch: Any) -> None:
        """Raise UserError where a model whose file has its sizes is stated to have others."""
        for what in ("heads", "classes"):
            stated = getattr(self, f"num_{what}")
            size = getattr(arch, f"num_{what}", stated)
            if stated not in (None, size):
                raise UserError(f"{path} has {size} {what}; --num-{what} {stated} contradicts it")


def _filled(
    family: ModelFamily, arch: Any, tensors: Mapping[str, Tensor], path: Path, routers: DynamicSettings | None = None
) -> tuple[nn.Module, Condition | None]:
    """A module with exactly these values, float32, in its own memory and in eval mode, and the texts among them.

    Raises UserError, naming the first few faults.
    """
    check_sizes(dataclasses.asdict(arch), tensors, str(path))
    what, texts, rules = f"{path} does not hold this {family.name}", None, family.texts
    if rules is not None and (shapes := rules.shapes(arch)):
        wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        own = in_float32({name: tensors[name] for name in wanted if name in tensors}, wanted, what)
        texts = text_table({ours: own[theirs] for ours, theirs in rules.names.items()})
        tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
    with (
        prefixed(f"{path} has sizes that no {family.name} can have", RuntimeError, OverflowError),
        torch.device("meta"),
    ):
        module = family.build_with_routers(arch, routers)
    module.load_state_dict(in_float32(tensors, module.state_dict(), what), assign=True)
    return make_trainable(module, family).eval(), texts


def _open_own(path: Path, stated: _Stated) -> LoadedModel:
    record = read_json_object(path / "model.json")
    version = record.get("format_version")
    if not isinstance(version, int) or version > MODEL_FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}; this tinyfusion reads up to {MODEL_FORMAT_VERSION}: upgrade"
        )
    with prefixed(path):
        family = family_named(record.get("family"))
    stated.check_family(path, family)
    with prefixed(f"{path}/model.json is damaged", ValueError, OverflowError):  # UserError among them
        arch = build_known(family.arch_type, record.get("arch"), "arch")
        facts = _recorded_facts(record, family, arch)
        routers = None if facts.dynamic is None else settings_in(facts.dynamic)
        if routers is not None:
            family.dynamic_rules()
    stated.check_sizes(path, arch)
    module, texts = _filled(family, arch, read_safetensors(path / "model.safetensors"), path, routers)
    model = LoadedModel(module, family, arch, facts, {"kind": "model folder of tinyfusion", "path": str(path)}, texts)
    # folders that are older than `arch.rules` have the hash of their tensors alone
    recorded = record.get("hash")
    if recorded != model.hash() and recorded != family.hash(model.tensors(), arch, rules=False):
        raise UserError(f"{path} is damaged: its tensors do not give the hash in model.json")
    return model


@dataclass(frozen=True)
class _Parent:
    """An entry of `lineage` as it must be; see docs/contract.md."""

    hash: str
    depth: dict[str, int]
    kept: dict[str, list[int]] | None
    groups: dict[str, list[list[int]]] | None = None
    residual: list[int] | None = None
    arch: dict[str, Any] | None = None


def _recorded_facts(record: Mapping[str, Any], family: ModelFamily, arch: Any) -> ModelFacts:
    """The facts of a model in our record. Raises ValueError where fields are of other kinds, or contradict each other."""
    plan = None if record.get("plan") is None else plan_from_json(record["plan"])
    facts: ModelFacts = build_known(ModelFacts, {**record, "plan": plan}, "")
    if not 1 <= facts.image_size <= LARGEST_SIZE:
        raise ValueError(f"image_size must be at least 1 and at most {LARGEST_SIZE}; got {facts.image_size}")
    if facts.latent_scale is not None and not 0 < facts.latent_scale <= LARGEST_SCALE:
        raise ValueError(f"latent_scale must be above 0 and at most {LARGEST_SCALE:g}; got {facts.latent_scale:g}")
    parents: list[_Parent] = [build_known(_Parent, p, f"lineage[{i}]") for i, p in enumerate(facts.lineage)]
    kept_of = [*(parent.kept for parent in parents), facts.kept]
    for kept, parent in zip(kept_of[1:], parents, strict=True):
        for name, indices in (kept or {}).items():
            if sorted({*indices} & set(range(parent.depth.get(name, 0)))) != indices:
                raise ValueError(f"kept.{name} {indices[:8]} are no rising blocks of a parent of depth {parent.depth}")
    depths = {name: getattr(arch, depth) for name, depth in family.block_lists.items()}
    if facts.kept is not None and {name: len(indices) for name, indices in facts.kept.items()} != depths:
        raise ValueError(f"kept names other numbers of blocks than the depth {depths}")
    ratio = (facts.dynamic or {}).get("ratio", 1.0)
    if type(ratio) not in (int, float) or not 0 < ratio <= 1:
        raise ValueError(f"dynamic.ratio must be above 0 and at most 1; got {ratio!r}")
    return facts


def _open_diffusers(path: Path, stated: _Stated) -> LoadedModel:
    """The folder of one model of diffusers: config.json, and weights in one file or several."""
    config = read_json_object(path / "config.json")
    if "_class_name" not in config:
        raise UserError(f"{path}/config.json is not of a model of diffusers: it has no _class_name")
    family = family_of_config(config)
    if family is None or family.diffusers is None:
        raise UserError(
            f"{path} is a {config['_class_name']} of diffusers, which prune, export, inspect and lora take if it is a transformer; "
            f"of its models {diffusers_classes()} can be opened here"
        )
    stated.check_family(path, family)
    folder = family.diffusers
    tensors, file = read_folder_weights(path, DIFFUSERS_WEIGHTS)
    if folder.extra_file is not None and (path / folder.extra_file).is_file():
        tensors |= read_safetensors(path / folder.extra_file)
    try:
        arch, ours = folder.read(config, tensors)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}/config.json is damaged: {error}") from error
    del tensors
    stated.check_sizes(path, arch)
    index = path.parent / "model_index.json"
    pipeline = str(read_json_object(index).get("_class_name")) if index.is_file() else ""
    inside = f" in a {pipeline}" if pipeline.isidentifier() else ""
    origin = {"kind": f"folder of diffusers{inside}", "path": str(path), "file": file}
    module, texts = _filled(family, arch, ours, path)
    return LoadedModel(module, family, arch, _diffusers_facts(path, config, arch, family), origin, texts)


def _diffusers_facts(path: Path, config: Any, arch: Any, family: ModelFamily) -> ModelFacts:
    """What our own record in an exported folder says; else the published latent facts; an autoencoder in `vae/` next to it wins."""
    record, facts = config.get(DIFFUSERS_RECORD), _published_facts(arch, family)
    if record is not None:
        with prefixed(f"{path}/config.json is damaged: {DIFFUSERS_RECORD}", ValueError, OverflowError, AttributeError):
            facts = _recorded_facts(record, family, arch)
    vae = path.parent / "vae"
    if not (vae / "config.json").is_file():
        return facts
    settings = autoencoder_config(vae / "config.json")
    sides = 2 ** (len(settings.get("block_out_channels", [0])) - 1)
    name = str(vae.absolute()) if any(vae.glob(f"{DIFFUSERS_WEIGHTS}*")) else None
    own = {
        "image_size": arch.input_size * sides,
        "latent_scale": settings.get("scaling_factor", facts.latent_scale or SCALE_OF_CLASS),
        "latent_shift": settings.get("shift_factor") or 0.0,
        "vae": name or facts.vae,
    }
    return dataclasses.replace(facts, **own, assumed=[] if name else [each for each in facts.assumed if each == "vae"])


def _open_official(path: Path, weights: str, stated: _Stated) -> LoadedModel:
    offered = (
        [each for each in families().values() if each.mark] if not stated.family else [family_named(stated.family)]
    )
    marks = [each.mark for each in offered if each.mark]
    untrained = {name for each in offered for name in each.computed}
    state = find_state_dict(read_tensor_file(path), marks, weights, path, untrained)
    tensors = state.tensors
    if what := described_other(tensors, path.suffix):
        raise UserError(f"{path} {what}")
    fit = offered if stated.family else _families_of(tensors, offered, path)
    family = fit[0]
    if family.arch_of_state_dict is None:
        raise UserError(
            f"{path}: official files of the family {family.name} are not known: give a folder that tinyfusion wrote"
        )
    static = {name: t for name, t in tensors.items() if family.dynamic is None or not is_router_key(name)}
    routers = None
    with prefixed(path, ValueError):
        arch = family.arch_of_state_dict(static, stated.num_heads, stated.num_classes)
        if len(static) < len(tensors):
            routers = settings_of(tensors, arch.num_heads)
            family.dynamic_rules().sizes(arch)
    facts = _published_facts(arch, family)
    if routers is not None:
        facts = dataclasses.replace(facts, dynamic=dataclasses.asdict(routers))
    part = " of a training checkpoint" if state.keys else ""
    kind = f"official state dict{' with routers' if routers else ''}{part}"
    module, texts = _filled(family, arch, tensors, path, routers)
    _report_classes(arch, stated.num_classes)
    if len(fit) > 1:
        print(f"assuming family {family.name} (give --family to say otherwise)", file=sys.stderr)
    inside = {"part": state.label} if state.keys or state.prefix else {}
    return LoadedModel(module, family, arch, facts, {"kind": kind, "path": str(path), **inside}, texts)


def _report_classes(arch: Any, num_classes: int | None) -> None:
    """Print what was assumed of a label table, and what a model without a null class cannot do."""
    null_class = getattr(arch, "null_class", None)
    if null_class and num_classes is None and arch.num_classes != _PUBLISHED_CLASSES:
        rows = arch.num_classes + 1
        print(f"assuming {arch.num_classes} classes and a null class, by {rows} rows of labels (--num-classes {rows}: no null class)",
              file=sys.stderr)  # fmt: skip
    elif null_class is False:
        print("without a null class: guidance is 1, and training drops no labels", file=sys.stderr)


def _families_of(tensors: Mapping[str, Tensor], offered: list[ModelFamily], path: Path) -> list[ModelFamily]:
    """The families that an official file may be of, by its tensors; the first is assumed. Raises UserError where there is none."""
    fit = [family for family in offered if family.mark in tensors]
    if not fit:
        marks = ", ".join(f"{each.mark} (family {each.name})" for each in offered)
        raise UserError(
            f"{path} is of no known family: wanted one of the tensors {marks}; got {', '.join(sorted(tensors)[:3])}"
        )
    return [each for each in fit if each.mark == fit[-1].mark]  # a later family may have the mark of an earlier one too


def _published_facts(arch: Any, family: ModelFamily) -> ModelFacts:
    """Of a file that says nothing about its images: the published latents are assumed where it has their channels."""
    latent = family.published_latent.get(arch.in_channels)
    if latent is None:
        return ModelFacts(image_size=arch.input_size)
    published = {"latent_scale": latent["latent_scale"], "latent_shift": 0.0, "vae": latent["vae"]}
    side = arch.input_size * latent["pixels_per_latent"]
    return ModelFacts(image_size=side, **published, assumed=["image_size", *published])
