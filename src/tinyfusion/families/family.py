"""ModelFamily, the contract of an architecture: how to build it, where its blocks are, how its files are read and written.

Families are registered in `families/registry.py`; docs/adding-a-family.md explains every field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.dynamics import DynamicRules, route
from tinyfusion.blocks.routers import DynamicSettings, install_routers
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams
from tinyfusion.blocks.widths import WidthRules
from tinyfusion.conditioning.classes import class_inputs
from tinyfusion.conditioning.condition import Condition, ModelCall, ModelInputs, calling
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError
from tinyfusion.core.tensors import digest_of
from tinyfusion.families.stage import Stage

# our record in a config.json of diffusers, whose readers ignore names that begin with "_"
DIFFUSERS_RECORD = "_tinyfusion"


@dataclass(frozen=True)
class DiffusersPipeline:
    """What a pipeline folder of diffusers has apart from its transformer, and the models that its class can draw with."""

    model_index: Mapping[str, Any]  # model_index.json, without class names of labels
    scheduler: Mapping[str, Any]  # scheduler_config.json
    # (arch, shift of the latents) -> why the pipeline class cannot draw with such a model; None where it can
    unfit: Callable[[Any, float | None], str | None]
    # (arch, name of the folder, whether it is drawn under guidance) -> Markdown for the model card
    usage: Callable[[Any, str, bool], str]

    @property
    def name(self) -> str:
        """Its class."""
        return str(self.model_index["_class_name"])


@dataclass(frozen=True)
class DiffusersExport:
    """How a model of a family becomes a folder of diffusers."""

    config: Callable[[Any], dict[str, Any]]  # arch -> config.json
    # (state dict of ours, arch) -> that of diffusers' class; views, nothing is copied
    tensors: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    # (arch, name of the folder, whether it is drawn under guidance) -> Markdown for the model card
    usage: Callable[[Any, str, bool], str]
    pipeline: DiffusersPipeline | None = None  # None where no pipeline class draws with such models


@dataclass(frozen=True)
class DiffusersFolder:
    """How folders of diffusers are recognised, read and written as models of a family."""

    classes: tuple[str, ...]  # class names of its own models, for messages
    holds: Callable[[Mapping[str, Any]], bool]  # config.json -> whether it describes a model of the family
    # (config.json, tensors) -> arch and state dict of ours. Raises UserError, completing "FOLDER ...", on a model that is not
    # supported, ValueError on a damaged config.json
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Any, dict[str, Tensor]]]
    extra_file: str | None = None  # a safetensors file in the folder whose tensors `read` gets too, where it exists
    export: DiffusersExport | None = None  # None where models are read only


def image_inputs(arch: Any, num: int) -> tuple[Tensor, ...]:
    """x, t and y of one forward pass of `num` images, on the default device."""
    x = torch.zeros(num, arch.in_channels, arch.input_size, arch.input_size)
    return x, torch.zeros(num, dtype=torch.int64), torch.zeros(num, dtype=torch.int64)


@dataclass(frozen=True)
class TextRules:
    """How models of a family take texts, and how their files name the tensors of texts of their own."""

    names: Mapping[str, str]  # tensor of a condition -> its name in model files, and in the hash
    # arch -> shapes of the texts of its own, by these names; {} for none
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    check: Callable[[Any, Condition], None]  # (arch, table): raises ValueError on texts that such a model cannot take
    # (arch, seed) -> texts of a new model; None where it has none of its own
    initial: Callable[[Any, int], Condition | None]


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """One architecture: how to build it, where its blocks are, which process it belongs to, how its files are read and written."""

    name: str
    process: str  # "gaussian", "flow" or "masked": the noising process, looked up where the job is put together
    arch_type: type  # frozen dataclass of its sizes
    build: Callable[[Any], nn.Module]  # arch -> module
    block_lists: Mapping[str, str]  # path of a list of blocks in the module -> the field of the arch that is its length
    title: str = "model"  # what it is called in a sentence: "a " title " of 12 blocks"
    initialise: Callable[[Any, int], None] | None = None  # (module, seed), in place; None: as the constructor does
    example: Callable[[Any, int], tuple[Tensor, ...]] = image_inputs  # (arch, images) -> inputs of one forward pass
    # list of blocks -> streams, where its blocks are not one stream in, the same out
    streams: Mapping[str, Streams] = dataclasses.field(default_factory=dict)
    guided_channels: int | None = None  # leading channels that published guidance touches; None: all
    # tensors that a formula gives: frozen, and left out of the hash where they equal it
    computed: Mapping[str, Callable[[Any], Tensor]] = dataclasses.field(default_factory=dict)
    opened_in_float32: bool = True  # whatever the type of its files; else in the type that they have
    # (name, parameter) -> whether published weight decay leaves it alone; None: it takes all alike
    undecayed: Callable[[str, Tensor], bool] | None = None
    # module of a block whose input is the stream between its attention and its MLP, such as "norm2"; None where there is no such place
    mlp_norm: str | None = None
    widths: WidthRules | None = None  # None where widths cannot be pruned
    dynamic: DynamicRules | None = None  # None where width and tokens cannot be chosen by timestep
    # keyword arguments of the module, in addition to x and t, for the condition of a batch
    inputs: ModelInputs = class_inputs
    forward: ModelCall | None = None  # how the model is called; None: with x, t and `inputs`
    texts: TextRules | None = None  # None where labels are classes
    # module -> its stages by name, where samplers call parts of the network; None: they call the whole
    stages: Callable[[Any], dict[str, Stage]] | None = None

    # published files
    mark: str | None = None  # name of a tensor by which official files are known; None where there are none
    # (tensors, heads, classes without the null class) -> arch; the numbers are None if they are not given
    arch_of_state_dict: Callable[[Mapping[str, Tensor], int | None, int | None], Any] | None = None
    # in_channels -> latent facts
    published_latent: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    published_license: str | None = None  # of the published weights, for the card of a model that knows none
    diffusers: DiffusersFolder | None = None  # None where no folders of diffusers hold such models
    # (arch, tensors) -> {"official" or "diffusers": why that format cannot hold such a model}
    unfit_formats: Callable[[Any, Mapping[str, Tensor]], dict[str, str]] | None = None
    # (module, arch, format) -> what readers of "official" or "diffusers" compute otherwise with the same tensors, in sentences
    differences: Callable[[nn.Module, Any, str], list[str]] | None = None
    # format -> (arch -> the arch with which the same tensors compute what readers of that format compute)
    arch_for: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)

    @property
    def call(self) -> ModelCall:
        """How the model is called: (model, x, t, condition) -> output."""
        return self.forward or calling(self.inputs)

    def arch_of_sizes(self, sizes: Mapping[str, Any]) -> Any:
        """The arch of a recipe's section `model`: "depth" counts the blocks of every list, "sizes" are those of this family alone.

        Sizes that are None are not given. Raises ValueError on sizes that this family does not have, and on those that do not fit
        together.
        """
        listed = {**sizes, **(sizes.get("sizes") or {}), "sizes": None}
        given = {name: value for name, value in listed.items() if value is not None}
        depth = given.pop("depth", None)
        if depth is not None:
            given |= dict.fromkeys(self.block_lists.values(), depth)
        known = {field.name for field in dataclasses.fields(self.arch_type)}
        foreign = sorted(set(given) - known)
        if foreign:
            raise ValueError(
                f"a model of family {self.name} has no {', '.join(foreign)}: leave it out; it has {', '.join(sorted(known))}"
            )
        return build_known(self.arch_type, given, "")

    def shapes(self, arch: Any) -> dict[str, Tensor]:
        """The state dict of a model of these sizes, without values (on the meta device). Raises ValueError on sizes that overflow."""
        try:
            with torch.device("meta"):
                return dict(self.build(arch).state_dict())
        except (RuntimeError, OverflowError) as error:
            raise ValueError(f"a model of these sizes cannot be: {error}") from error

    def dynamic_rules(self) -> DynamicRules:
        """How width and tokens are chosen by timestep. Raises UserError where they cannot be."""
        if self.dynamic is None:
            raise UserError(f"models of the family {self.name} cannot be made dynamic")
        return self.dynamic

    def build_with_routers(self, arch: Any, settings: DynamicSettings | None) -> nn.Module:
        """The module of an arch, with the routers of `settings`; values are to be loaded."""
        module = self.build(arch)
        if settings is None:
            return module
        rules, stack = self.dynamic_rules(), self.stack(module)
        sizes = rules.sizes(arch)
        for block in stack:
            install_routers(block, sizes.width, sizes.num_heads, settings)
        route(module, rules, stack)
        return module

    def num_bytes(self, arch: Any) -> int:
        """Bytes of a model of these sizes in float32, counted from one block of every list. Raises ValueError on sizes that overflow."""
        shapes = self.shapes(self.arch_with_depths(arch, dict.fromkeys(self.block_lists, 1)))
        depths = {f"{name}.0.": getattr(arch, depth) for name, depth in self.block_lists.items()}
        return sum(
            4 * tensor.numel() * next((depth for start, depth in depths.items() if name.startswith(start)), 1)
            for name, tensor in shapes.items()
        )

    def hash(self, tensors: Mapping[str, Tensor], arch: Any, rules: bool = True) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name; formula tensors are left out if equal.

        rules: then also over what the sizes say that the model computes otherwise than the published one (`arch.rules`): such a
        model is another one with the same tensors. Published rules add nothing.
        It is the hash of the values in float32 where that is the type of opened models, whatever the type in memory or in their file.
        """
        if self.opened_in_float32:
            tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        formulas = {name: formula(arch) for name, formula in self.computed.items() if name in tensors}
        equal = {
            name for name, value in formulas.items() if torch.equal(tensors[name].cpu(), value.to(tensors[name].dtype))
        }
        digest = digest_of({name: tensor for name, tensor in tensors.items() if name not in equal})
        for name, value in sorted(getattr(arch, "rules", {}).items()) if rules else ():
            digest.update(f"{name}\0{value!r}\0".encode())
        return digest.hexdigest()

    def stack(self, model: nn.Module) -> BlockStack:
        """The residual blocks of a model of this family."""
        return BlockStack(model, tuple(self.block_lists), self.streams)

    def arch_with_depths(self, arch: Any, depths: Mapping[str, int]) -> Any:
        """The arch after pruning: `depths` blocks per list."""
        return dataclasses.replace(arch, **{self.block_lists[name]: depth for name, depth in depths.items()})

    def differ_in_size_alone(self, arch: Any, other: Any, depths: Mapping[str, int]) -> bool:
        """Whether pruning depth and, where this family can, widths leads from one arch to the other; depths: of `other`.

        Models made for different formats (`arch_for`) do not differ by that.
        """
        for convert in self.arch_for.values():
            arch, other = convert(arch), convert(other)
        deepened = self.arch_with_depths(arch, depths)
        if self.widths is None or deepened == other:
            return bool(deepened == other)
        sizes = {name: group.size for name, group in self.widths.groups(deepened).items()}
        try:
            return bool(self.widths.narrowed(other, sizes) == deepened)
        except ValueError:
            return False
