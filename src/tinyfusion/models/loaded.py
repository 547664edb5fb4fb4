"""LoadedModel: a model in memory with its family, sizes and facts; cutting, copying and hashing it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.routers import unfit_official
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.widths import sliced
from tinyfusion.config.loading import nearest
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory
from tinyfusion.families.family import FAMILIES, ModelFamily
from tinyfusion.models.attach import DynamicModel, build_with_routers

_NO_ROUTERS = "it has routers, for which diffusers has no class: its transformer would run everything"
PIXEL_CHANNELS = (1, 3)  # of the input of a model that states no latents: with any other number it takes latents
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """What a model carries beside its tensors.

    image_size: side of its images in pixels. latent_scale, latent_shift: models of latents see (z - shift) x scale of a
    latent z of the autoencoder `vae`; None for a pixel-space model and where unknown. assumed: names of facts that no file
    and nobody stated, taken from the published models. kept: indices into the direct parent per list, None for an uncut
    model. lineage: parents, oldest first, each with hash, depth and kept, where it was cut in width the residual channels of
    its own parent that it kept, and its arch where its child was. seen_images: images that a model trained from nothing saw;
    None for cut models and where unknown. process_settings: of its process, that it was trained with and has to be sampled
    with, where the process has such. dynamic: of a model with routers, their settings (`DynamicSettings`) and what they reach.
    """

    image_size: int
    latent_scale: float | None = None
    latent_shift: float | None = None
    vae: str | None = None
    assumed: list[str] = field(default_factory=list)
    license: str | None = None
    kept: dict[str, list[int]] | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    plan: PrunePlan | None = None
    seen_images: int | None = None
    process_settings: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, Any] | None = None

    def unlike(self, words: str, name: str, value: float) -> str | None:
        """Why latents of this "latent_scale" or "latent_shift" are not the model's; None where they are, or may be.

        words: what they are of, as in "it scales latents by".
        """
        own = getattr(self, name)
        if own is None or math.isclose(own, value, rel_tol=1e-6, abs_tol=1e-9):
            return None
        if name not in self.assumed:
            return f"{words} {value:g}, and the model was trained with {own:g}"
        return (
            f"{words} {value:g}, and {own:g} is assumed for the model, whose file gives none: where it was trained on such "
            f"latents, add --set sample.{name}={value:g}"
        )


@dataclass
class LoadedModel:
    """A model in memory: the module with its family, sizes and facts.

    origin: where it was opened from, for people: kind of file, path, and what is known of its name; empty for one made here.
    """

    module: nn.Module
    family: ModelFamily
    arch: Any
    facts: ModelFacts
    origin: dict[str, str] = field(default_factory=dict)

    @cached_property
    def stack(self) -> BlockStack:
        """Its residual blocks; one object, as what was compiled hangs on it."""
        return self.family.stack(self.module)

    @property
    def dynamic(self) -> DynamicModel | None:
        """The same model as one with routers, where it has them."""
        return None if self.facts.dynamic is None else DynamicModel(self)

    @property
    def null_class(self) -> bool:
        """Whether it has a class for no label, which guidance and label dropout need."""
        return bool(getattr(self.arch, "null_class", True))

    @property
    def of_latents(self) -> bool:
        """Whether it takes the latents of an autoencoder, of which it may not know the scale."""
        return takes_latents(self.arch, self.facts)

    @property
    def doubtful(self) -> list[str]:
        """Names of the facts of its latents that are assumed or unknown."""
        facts = self.facts
        unknown = [name for name in ("latent_scale", "latent_shift", "vae") if getattr(facts, name) is None]
        side = ["image_size"] if facts.latent_scale is None else []
        return list(dict.fromkeys([*facts.assumed, *side, *unknown]))

    def with_known(self, **known: Any) -> LoadedModel:
        """The same model with these facts where it has none, or an assumed one; a value of None states nothing."""
        facts, doubtful = self.facts, self.doubtful
        stated = {name: value for name, value in known.items() if value is not None and name in doubtful}
        if not stated:
            return self
        assumed = [name for name in doubtful if name not in stated and getattr(facts, name) is not None]
        return dataclasses.replace(self, facts=dataclasses.replace(facts, **stated, assumed=assumed))

    def copy(self) -> LoadedModel:
        """An independent copy."""
        return dataclasses.replace(self, module=copy.deepcopy(self.module))

    def with_weights(self, tensors: Mapping[str, Tensor]) -> LoadedModel:
        """The same model with other values: a new module, on the CPU, that holds a copy of every tensor of `tensors`."""
        with torch.device("meta"):
            module = build_with_routers(self.family, self.arch, None if self.dynamic is None else self.dynamic.settings)
        module.load_state_dict(
            {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, assign=True
        )
        make_trainable(module, self.family)
        return dataclasses.replace(self, module=module.train(self.module.training))

    def with_formulas(self) -> LoadedModel:
        """The same model with the tensors that a formula gives as it gives them in float32; itself where they are so already."""
        held = self.module.state_dict()
        exact = {name: formula(self.arch) for name, formula in self.family.computed.items()}
        if all(torch.equal(held[name].cpu(), tensor) for name, tensor in exact.items()):
            return self
        return self.with_weights({**held, **exact})

    def hash(self) -> str:
        """SHA-256 over the tensors sorted by official name, and over unpublished rules; see `hash_tensors`."""
        return hash_tensors(self.module.state_dict(), self.family, self.arch)

    def unfit_formats(self) -> dict[str, str]:
        """Formats of others that cannot hold this model, each with the reason: what an export must refuse."""
        reasons = self.family.unfit_formats
        found = reasons(self.arch, self.module.state_dict()) if reasons else {}
        if self.dynamic is None:
            return found
        more = {"official": unfit_official(self.dynamic.settings), "diffusers": [_NO_ROUTERS]}
        return {
            name: "; ".join([*([found[name]] if name in found else []), *more.get(name, [])])
            for name in dict.fromkeys([*found, *more])
            if name in found or more[name]
        }

    def cut(self, plan: PrunePlan, force: bool = False) -> LoadedModel:
        """A new, trainable model with only the plan's blocks and channels; this one stays as it is.

        Raises UserError where the plan was made for another model (unless `force`) or does not fit its depth or widths.
        """
        if self.facts.dynamic is not None:
            raise UserError("a model with routers cannot be cut: cut first, recover, and make the student dynamic")
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
        if self.facts.seen_images is not None:
            parent["seen_images"] = self.facts.seen_images  # it was trained from nothing
        if plan.kept_widths is not None:
            parent["arch"] = dataclasses.asdict(self.arch)
        if self.facts.plan and self.facts.plan.kept_widths:
            parent["residual"] = self.facts.plan.kept_widths.get("residual")  # so that a grandchild finds its features
        if self.facts.plan and self.facts.plan.pairing_groups:
            parent["groups"] = (
                self.facts.plan.pairing_groups
            )  # a grandchild is paired with this model's parent through them
        lineage = [*self.facts.lineage, parent]
        student.origin = {}
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


def takes_latents(arch: Any, facts: ModelFacts) -> bool:
    """Whether a model of these sizes and facts takes latents: it states a scale, or its channels are not those of pixels."""
    return facts.latent_scale is not None or arch.in_channels not in PIXEL_CHANNELS


def hash_tensors(tensors: Mapping[str, Tensor], family: ModelFamily, arch: Any, rules: bool = True) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name; formula tensors are left out if equal.

    rules: then also over what the sizes say that the model computes otherwise than the published one (`arch.rules`): such a
    model is another one with the same tensors. Published rules add nothing.
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
    for name, value in sorted(getattr(arch, "rules", {}).items()) if rules else ():
        digest.update(f"{name}\0{value!r}\0".encode())
    return digest.hexdigest()


def make_trainable(module: nn.Module, family: ModelFamily) -> nn.Module:
    """Gradients for every parameter that no formula gives."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in family.computed)
    return module


def new_model(family_name: str, arch_values: Mapping[str, Any], seed: int) -> LoadedModel:
    """A freshly initialised model that knows nothing of its images but their size. Raises UserError on sizes that do not fit."""
    if family_name not in FAMILIES:
        raise UserError(f"unknown family {family_name!r}{nearest(family_name, FAMILIES)}")
    family = FAMILIES[family_name]
    try:
        arch = family.arch_of_sizes(arch_values)
        num_bytes = family.num_bytes(arch)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    check_memory(num_bytes, "a new model of these sizes")
    with torch.random.fork_rng(devices=[]):  # new layers fill themselves from the global generator: not ours to move
        module = family.build(arch)
    family.initialise(module, seed)
    return LoadedModel(module, family, arch, ModelFacts(image_size=arch.input_size))
