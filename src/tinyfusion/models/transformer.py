"""TransformerModel: a transformer of diffusers in memory, whose weights are always those of a `TransformerFolder`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.call_rows import CALLS
from tinyfusion.families.diffusers_classes.calls import CallContext, called, check_texts
from tinyfusion.families.diffusers_classes.cutting import UnitList
from tinyfusion.families.diffusers_classes.few_steps import FewStepDrawing, FoldedDrawing
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.families.diffusers_classes.weights import mapped_tensors
from tinyfusion.families.family import ModelFamily, TextRules
from tinyfusion.models.facts import ModelFacts
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.macs import macs_by_module
from tinyfusion.models.wrapped import NO_PROCESS

_PROBED_VALUES = 16  # of every tensor


@dataclass(frozen=True)
class TransformerArch:
    """What two models of a class share that differ in their blocks alone, and the number of blocks per list.

    sizes: config.json as text, without the fields that pruning rewrites. guided: whether guidance is an input of the network.
    """

    class_name: str
    sizes: str
    depths: tuple[tuple[str, int], ...]
    guided: bool

    @property
    def null_class(self) -> bool:
        """Whether sampling compares with the null text, so that training drops texts."""
        return not self.guided


@dataclass(frozen=True, kw_only=True)
class TransformerFamily(ModelFamily):
    """The models of one class of diffusers; they are built and written from their folders."""

    def arch_with_depths(self, arch: TransformerArch, depths: Mapping[str, int]) -> TransformerArch:
        """The arch after pruning."""
        return dataclasses.replace(arch, depths=tuple((name, depths[name]) for name, _ in arch.depths))


@dataclass
class TransformerModel(LoadedModel):
    """A transformer of diffusers with its weights, each in the type of its file, mapped from there.

    folder: whose weights the module has; `with_weights` and `cut` give models of other folders, whose tensors may be in memory
    alone until they are written. context: what its call depends on besides the batch. scheduler: scheduler_config.json of its
    pipeline, in the folder `pipeline`, where it is the `component`. latent_shape: (C, ..., h, w) of its training data, once they
    are open. example: arguments of a recorded call of one image, on the meta device, where it is trained on these.
    """

    folder: TransformerFolder = field(kw_only=True)
    context: CallContext = field(kw_only=True)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Path | None = None
    component: str = "transformer"
    latent_shape: tuple[int, ...] | None = None
    example: Mapping[str, Any] | None = None

    @property
    def distilled_guidance(self) -> bool:
        """Whether the network predicts under guidance by itself, by an input or folded in, so that data are no target for it."""
        return self.arch.guided or self.facts.folded_guidance is not None

    @property
    def units(self) -> list[UnitList]:
        """Blocks that can only be removed together, per list of gates."""
        return gate_units(self.folder)

    @property
    def of_latents(self) -> bool:
        """True: all of these classes take latents, of an autoencoder that the pipeline says."""
        return True

    @property
    def doubtful(self) -> list[str]:
        """Nothing: the latents are those of the pipeline."""
        return []

    def own_pipeline(self, why: str) -> Path:
        """The folder of its pipeline. Raises UserError where it is in none. why: the begin of that message."""
        if self.pipeline is None:
            raise UserError(
                f"{why}, and {self.folder.path} is in none: give the folder of the pipeline, or of its transformer in it"
            )
        return self.pipeline

    def copy(self) -> TransformerModel:
        """A copy whose weights are mapped anew, so that it takes no memory until it is changed."""
        self._check_unchanged()
        return dataclasses.replace(self, module=self.folder.module().train(self.module.training))

    def hash(self) -> str:
        """The hash of the folder: of its tensors as stored."""
        return self.folder.hash

    def with_weights(self, tensors: Mapping[str, Tensor]) -> TransformerModel:
        """The same model with other values, rounded to the types of its files."""
        return self._of(self.folder.with_tensors(tensors))

    def with_changed(self, tensors: Mapping[str, Tensor]) -> TransformerModel:
        """As `with_weights`: the others are those of the folder."""
        return self.with_weights(tensors)

    def cut(self, plan: PrunePlan, force: bool = False) -> TransformerModel:
        """The model without the blocks that the plan removes, trainable. Raises UserError as `TransformerFolder.cut`."""
        self._check_unchanged()
        self.check_plan(plan, force)
        return self._of(self.folder.cut(plan))

    def draw_by(self, drawing: FewStepDrawing | FoldedDrawing | None) -> None:
        """Make it a student of few steps, of folded guidance, or of neither, in its record too."""
        self.folder = self.folder.drawn_by(drawing)
        self.facts = dataclasses.replace(self.facts, **_drawn(self.folder))

    def share_data_of(self, model: TransformerModel) -> None:
        """Take texts, size of latents and recorded call from a model that is trained on the same data."""
        self.prompts, self.latent_shape, self.example = model.prompts, model.latent_shape, model.example

    def _check_unchanged(self) -> None:
        """Raise UserError if the module's weights are not the folder's, as far as a few values of every tensor tell."""
        stored = mapped_tensors(self.folder.weights)
        for name, tensor in self.module.state_dict().items():
            own = stored.get(name)
            if own is None or own.shape != tensor.shape or not own.numel():
                continue
            step = max(1, own.numel() // _PROBED_VALUES)
            if not torch.equal(tensor.detach().reshape(-1)[::step].to("cpu", own.dtype), own.reshape(-1)[::step]):
                raise UserError(
                    f"the {self.folder.class_name} was changed after it was opened ({name}), and its folder was not: use its "
                    "with_weights(STATE_DICT)"
                )

    def _of(self, folder: TransformerFolder) -> TransformerModel:
        model = opened(folder, self.context)
        known = ("prompts", "latent_shape", "scheduler", "pipeline", "component", "example")
        return dataclasses.replace(model, **{name: getattr(self, name) for name in known})

    def unfit_formats(self) -> dict[str, str]:
        """No official format."""
        return {"official": f"a {self.folder.class_name} has no such format"}

    def made_for(self, destination: str | None) -> TransformerModel:
        """Itself: such a model computes what diffusers computes. Raises UserError for another format."""
        self.folder.check_destination(destination)
        return self

    def macs(self) -> int:
        """Multiply-accumulates of a forward pass of one image of its training data, with one prompt."""
        module, call = self.folder.empty().to("meta").eval(), self.example
        if call is not None:
            return macs_by_module(module, lambda: module(**call))[""]
        if self.latent_shape is None or self.prompts is None:
            raise UserError(
                "the work of a transformer of diffusers depends on its data: give --data, or recorded --inputs"
            )
        one = self.prompts.index(slice(1)).to("meta")
        x, t = torch.zeros(1, *self.latent_shape, device="meta"), torch.ones(1, device="meta")
        return macs_by_module(module, lambda: self.family.call(module, x, t, one))[""]


def gate_units(folder: TransformerFolder) -> list[UnitList]:
    """The units of a model that gates may select freely: blocks behind which a hint is added stay, as two hints cannot share a place."""
    hinted = {(path, i) for name, path in folder.row.hints.items() for i in folder.config.get(name) or ()}

    def with_fixed(each: UnitList) -> UnitList:
        fixed = frozenset(i for i, unit in enumerate(each.units) if hinted & {*unit})
        return dataclasses.replace(each, fixed=each.fixed | fixed)

    return [with_fixed(each) for each in folder.units]


def opened(folder: TransformerFolder, context: CallContext | None = None) -> TransformerModel:
    """The model of a folder, in eval mode, trainable. Raises UserError where folder and class contradict each other.

    context: of the pipeline that it is for; None: what its own config says.
    """
    # float32 weights of norms under autocast: slower, not wrong
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
    guided = bool(folder.config.get("guidance_embeds"))
    arch = TransformerArch(folder.class_name, _sizes(folder), tuple(folder.depths.items()), guided)
    plan = plan_from_json(folder.record["plan"]) if folder.lineage else None
    facts = ModelFacts(
        image_size=0, license=folder.license, kept=folder.record.get("kept"), lineage=folder.lineage, plan=plan, **_drawn(folder)
    )  # fmt: skip
    origin = {"kind": f"{folder.class_name} of diffusers", "path": str(folder.path)}
    context = dataclasses.replace(context or CallContext({}), config=folder.config)
    return TransformerModel(
        folder.module(), _family(folder, context), arch, facts, origin, folder=folder, context=context
    )


def _drawn(folder: TransformerFolder) -> dict[str, Any]:
    """The facts on how the model of a folder is drawn."""
    few, folded = folder.few_steps, folder.folded
    return {"few_steps": few and few.steps, "folded_guidance": folded and folded.guidance}


def _family(folder: TransformerFolder, context: CallContext) -> TransformerFamily:
    call = CALLS.get(folder.class_name)

    def check(_arch: Any, table: Condition) -> None:
        if call is not None:
            check_texts(call, context, table.tensors)

    return TransformerFamily(
        name=folder.class_name,
        title=folder.class_name,
        process=NO_PROCESS if call is None else call.process,
        arch_type=TransformerArch,
        build=_of_folders,
        example=_of_folders,
        block_lists=dict.fromkeys(folder.depths, "depths"),
        streams=folder.streams,
        forward=None if call is None else called(call, context),
        texts=TextRules({}, lambda _arch: {}, check, lambda _arch, _seed: None),
    )


def _of_folders(*_: Any) -> NoReturn:
    raise UserError("a transformer of diffusers is built from its folder, not from sizes")


def _sizes(folder: TransformerFolder) -> str:
    row = folder.row
    rewritten = {each.count for each in row.lists}
    rewritten |= {*row.indices, *row.per_block, *row.first, *row.last, *row.hints}
    sizes = {n: v for n, v in folder.config.items() if n not in rewritten and not n.startswith("_")}
    return json.dumps(sizes, sort_keys=True)
