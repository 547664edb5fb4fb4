"""LoadedModel: a model in memory with its family, sizes and facts; pruning, copying and hashing it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tinyfusion.blocks.dynamics import BlockExecutor, BlockSizes, Complete, Current, DynamicRules
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.routers import DynamicSettings, is_router_key, unfit_official
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.widths import sliced
from tinyfusion.conditioning.classes import class_table
from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError
from tinyfusion.core.tensors import bytes_of
from tinyfusion.families.diffusers_classes.cutting import UnitList
from tinyfusion.families.family import DiffusersExport, ModelFamily
from tinyfusion.models.facts import ModelFacts
from tinyfusion.models.macs import macs_of_sizes
from tinyfusion.training.shards import whole

_State = list[tuple[str, int, int, bytes]]
_PROBED_VALUES = 16  # of every tensor
_NO_ROUTERS = "it has routers, for which diffusers has no class: its transformer would run everything"
PIXEL_CHANNELS = (1, 3)  # of the input of a model that states no latents: with any other number it takes latents


@dataclass
class LoadedModel:
    """A model in memory: the module with its family, sizes and facts.

    origin: kind and path of the file it was opened from, and known facts of its name, for messages; empty for a new model.
    texts: the table of a text model's own file, part of its hash. prompts: a table of its data, used in place of its own.
    """

    module: nn.Module
    family: ModelFamily
    arch: Any
    facts: ModelFacts
    origin: dict[str, str] = field(default_factory=dict)
    texts: Condition | None = None
    prompts: Condition | None = None

    @cached_property
    def stack(self) -> BlockStack:
        """Its residual blocks; one object, which caches compilations."""
        return self.family.stack(self.module)

    @property
    def distilled_guidance(self) -> bool:
        """Whether the network predicts under guidance by itself, by an input or folded in, so that data are no target for it."""
        return self.facts.folded_guidance is not None

    @property
    def units(self) -> list[UnitList] | None:
        """Blocks that can only be removed together, per list of gates; None where every block can be removed alone."""
        return None

    @property
    def dynamic(self) -> DynamicModel | None:
        """The model as a `DynamicModel`, if it has routers."""
        return None if self.facts.dynamic is None else DynamicModel(self)

    @property
    def null_class(self) -> bool:
        """Whether it has a class for no label, for guidance and label dropout."""
        return bool(getattr(self.arch, "null_class", True))

    @property
    def takes_guidance(self) -> bool:
        """Whether it is drawn under guidance: it has a class for no label, and has folded none in."""
        facts = self.facts
        return self.null_class and facts.few_steps is None and facts.folded_guidance is None

    @property
    def guided_channels(self) -> int:
        """Leading output channels under published guidance, never those of the variance."""
        channels, published = int(self.arch.in_channels), self.family.guided_channels
        return channels if published is None else min(published, channels)

    @property
    def conditions(self) -> Condition:
        """The conditions by label: its classes, or texts. Raises UserError if it takes texts and has none."""
        if self.family.texts is None:
            return class_table(self.arch.num_classes)
        table = self.texts if self.prompts is None else self.prompts
        if table is None:
            raise UserError(
                "the model takes texts, and has none of its own: give a file of encoded prompts, --set data.prompts=FILE"
            )
        return table

    def with_prompts(self, table: Condition) -> LoadedModel:
        """The same model with `table` as conditions by label. Raises UserError if it cannot take them."""
        if self.family.texts is None:
            raise UserError(f"prompts are for models of texts, and one of family {self.family.name} takes classes")
        try:
            self.family.texts.check(self.arch, table)
        except ValueError as error:
            raise UserError(str(error)) from error
        return dataclasses.replace(self, prompts=table)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its file and its hash: the state dict, and texts of its own."""
        tensors = dict(self.module.state_dict())
        if self.texts is not None and self.family.texts is not None:
            own, null = self.texts.tensors, self.texts.null_row or {}
            tensors |= {theirs: torch.cat([own[o], null[o]]) for o, theirs in self.family.texts.names.items()}
        return tensors

    @property
    def of_latents(self) -> bool:
        """Whether it takes the latents of an autoencoder, maybe of unknown scale."""
        return self.facts.latent_scale is not None or self.arch.in_channels not in PIXEL_CHANNELS

    @property
    def doubtful(self) -> list[str]:
        """Names of assumed or unknown facts of its latents."""
        facts = self.facts
        unknown = [name for name in ("latent_scale", "latent_shift", "vae") if getattr(facts, name) is None]
        side = ["image_size"] if facts.latent_scale is None else []
        return list(dict.fromkeys([*facts.assumed, *side, *unknown]))

    def with_known(self, **known: Any) -> LoadedModel:
        """The same model with these facts for unknown or assumed ones; None states nothing."""
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
        """The same model with other values: a new module, on the CPU, with copies of `tensors`."""
        with torch.device("meta"):
            module = self.family.build_with_routers(self.arch, None if self.dynamic is None else self.dynamic.settings)
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        module.load_state_dict(copies, assign=True)
        make_trainable(module, self.family)
        return dataclasses.replace(self, module=module.train(self.module.training))

    def with_changed(self, tensors: Mapping[str, Tensor]) -> LoadedModel:
        """The same model with other values of these tensors, as `with_weights`; sharded ones are gathered, so every rank must call."""
        state = self.module.state_dict()
        return self.with_weights({n: tensors[n] if n in tensors else whole(t) for n, t in state.items()})

    def macs(self) -> int:
        """Multiply-accumulates of one unguided forward pass of one image."""
        return macs_of_sizes(self.family.name, self.arch)

    def with_formulas(self) -> LoadedModel:
        """The same model with formula tensors computed in float32; itself if they are equal already."""
        state = self.module.state_dict()
        exact = {name: formula(self.arch) for name, formula in self.family.computed.items()}
        if all(torch.equal(state[name].cpu(), tensor) for name, tensor in exact.items()):
            return self
        return self.with_weights({**state, **exact})

    def hash(self) -> str:
        """SHA-256 of tensors and unpublished rules, see `ModelFamily.hash`; cached until a tensor is replaced or changed."""
        state = _state_of(self.module)
        cached = _HASHES.get(self.module)
        if cached is not None and state is not None and cached[:4] == (state, self.family.name, self.arch, self.texts):
            return cached[4]
        digest = self.family.hash(self.tensors(), self.arch)
        if state is not None:
            _HASHES[self.module] = (state, self.family.name, self.arch, self.texts, digest)
        return digest

    def unfit_formats(self) -> dict[str, str]:
        """The export formats that cannot represent this model, each with the reason."""
        reasons: dict[str, list[str]] = {"official": [], "diffusers": []}
        if self.family.unfit_formats is not None:
            for name, reason in self.family.unfit_formats(self.arch, self.module.state_dict()).items():
                reasons[name].append(reason)
        if self.dynamic is not None:
            reasons["official"] += unfit_official(self.dynamic.settings)
            reasons["diffusers"].append(_NO_ROUTERS)
        if not reasons["official"] and self.family.arch_of_state_dict is None:
            reasons["official"].append(f"the family {self.family.name} has no published files")
        if not reasons["diffusers"] and (self.family.diffusers is None or self.family.diffusers.export is None):
            reasons["diffusers"].append(
                f"models of the family {self.family.name} have no class of diffusers to be written for"
            )
        return {name: "; ".join(each) for name, each in reasons.items() if each}

    def made_for(self, destination: str | None) -> LoadedModel:
        """The same tensors as a model that computes what readers of a format compute, "diffusers" or "official", so that its export
        is exact; itself for None.

        Where that differs from what the weights were trained with, train afterwards: `prune --for` does it before recovery. Raises
        UserError where the format cannot hold such a model.
        """
        if destination is None:
            return self
        if reason := self.unfit_formats().get(destination):
            raise UserError(f"the model cannot be made for {destination}: {reason}")
        convert = self.family.arch_for.get(destination)
        if convert is None or convert(self.arch) == self.arch:
            return self
        return dataclasses.replace(self, arch=convert(self.arch)).with_weights(self.module.state_dict())

    def diffusers_export(self) -> DiffusersExport:
        """The family's export to diffusers. Raises UserError if this model cannot be exported."""
        folder, unfit = self.family.diffusers, self.unfit_formats().get("diffusers")
        if unfit is not None or folder is None or folder.export is None:
            raise UserError(f"the model cannot be exported to diffusers: {unfit}")
        return folder.export

    def cut(self, plan: PrunePlan, force: bool = False) -> LoadedModel:
        """A new, trainable model with only the plan's blocks and channels.

        Raises UserError if the plan is for another model (unless `force`) or does not fit the depth or widths.
        """
        if self.facts.dynamic is not None:
            raise UserError("a model with routers cannot be pruned: prune first, recover, and make the student dynamic")
        if self.facts.few_steps is not None:
            raise UserError(
                "a model of few steps cannot be pruned: prune its teacher, recover, and distil the student's steps"
            )
        own = self.check_plan(plan, force)
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
            parent["seen_images"] = self.facts.seen_images  # it was trained from scratch
        if plan.kept_widths is not None:
            parent["arch"] = dataclasses.asdict(self.arch)
        if self.facts.plan and self.facts.plan.kept_widths:
            parent["residual"] = self.facts.plan.kept_widths.get("residual")  # for the features of a grandchild
        if self.facts.plan and self.facts.plan.pairing_groups:
            parent["groups"] = self.facts.plan.pairing_groups  # they pair a grandchild with this model's parent
        lineage = [*self.facts.lineage, parent]
        student.origin = {}
        student.facts = dataclasses.replace(self.facts, kept=kept, lineage=lineage, plan=plan, seen_images=None)
        return student

    def check_plan(self, plan: PrunePlan, force: bool) -> str:
        """The hash of the model. Raises UserError if the plan is for another one, unless `force`."""
        own = self.hash()
        if plan.teacher and plan.teacher != own and not force:
            raise UserError(
                f"the plan was made for the model {plan.teacher[:12]}, this one is {own[:12]}: give the model of the plan"
            )
        return own

    def _narrowed(self, kept_widths: Mapping[str, Any]) -> LoadedModel:
        if self.family.widths is None:
            raise ValueError(f"widths of the family {self.family.name} cannot be pruned")
        arch, tensors = sliced(self.family.widths, self.arch, self.module.state_dict(), kept_widths)
        with torch.device("meta"):
            module = self.family.build(arch)
        module.load_state_dict(tensors, assign=True)
        return dataclasses.replace(self, module=module.train(self.module.training), arch=arch)


_HASHES: WeakKeyDictionary[nn.Module, tuple[_State, str, Any, Condition | None, str]] = WeakKeyDictionary()


def _state_of(module: nn.Module) -> _State | None:
    """A key that differs after a tensor was replaced or changed in place; None if torch counts no changes (inference tensors).

    Fused optimisers change weights without counting, hence a few values of every tensor.
    """

    def some_bytes(tensor: Tensor) -> bytes:
        values = tensor.detach().reshape(-1)
        some = values[:: max(1, len(values) // _PROBED_VALUES)]
        return bytes(bytes_of(some))

    tensors = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    if any(tensor.is_inference() for tensor in tensors.values()):
        return None
    return [(name, t.untyped_storage()._cdata, t._version, some_bytes(t)) for name, t in tensors.items()]


class DynamicModel:
    """A view of a model with routers on it. Calling its module decides as at inference, at full cost."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, self.module, self.stack = loaded, loaded.module, loaded.stack
        self.rules: DynamicRules = loaded.family.dynamic_rules()
        self.embedder = self.module.get_submodule(self.rules.embedder)  # of timesteps

    @cached_property
    def settings(self) -> DynamicSettings:
        """The kinds of its routers. Raises ValueError if the facts are damaged."""
        return settings_in(self.loaded.facts.dynamic or {})

    @cached_property
    def sizes(self) -> BlockSizes:
        """The sizes of its blocks."""
        return self.rules.sizes(self.loaded.arch)

    @cached_property
    def current(self) -> Current:
        """The holder of the executor that runs its blocks."""
        owners = (getattr(hook, "__self__", None) for hook in self.embedder._forward_hooks.values())
        return next(owner for owner in owners if isinstance(owner, Current))

    @contextmanager
    def using(self, executor: BlockExecutor) -> Iterator[None]:
        """Within the context `executor` runs the blocks."""
        before, self.current.executor = self.current.executor, executor
        try:
            yield
        finally:
            self.current.executor = before

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Within the context everything runs: the static model."""
        with self.using(Complete()):
            yield

    def routers(self) -> dict[str, nn.Parameter]:
        """Parameters of the routers, by name."""
        return {name: p for name, p in self.module.named_parameters() if is_router_key(name)}

    def copy(self) -> DynamicModel:
        """An independent copy."""
        return DynamicModel(self.loaded.copy())


def settings_in(record: Mapping[str, Any]) -> DynamicSettings:
    """The settings of routers in a model's facts. Raises ValueError if they are invalid."""
    known = {field.name for field in dataclasses.fields(DynamicSettings)}
    return cast(
        DynamicSettings, build_known(DynamicSettings, {k: v for k, v in record.items() if k in known}, "dynamic")
    )


def make_trainable(module: nn.Module, family: ModelFamily) -> nn.Module:
    """Require gradients for all parameters but formula tensors."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in family.computed)
    return module
