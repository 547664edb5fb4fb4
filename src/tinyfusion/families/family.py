"""ModelFamily: the one plug-in contract. What tinyfusion must know about an architecture, and nothing that it can see.

A new family is a file beside `dit.py` and one entry in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.dynamics import DynamicRules
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams
from tinyfusion.blocks.widths import WidthRules
from tinyfusion.families import pixart, sit
from tinyfusion.families.dit import model as dit
from tinyfusion.families.dit.dynamic import DIT_DYNAMIC
from tinyfusion.families.dit.width import DIT_WIDTHS, unfit_formats
from tinyfusion.families.mar import model as mar


@dataclass(frozen=True)
class DiffusersFolder:
    """How a folder of diffusers becomes a model of a family."""

    pipelines: tuple[str, ...]  # pipelines of diffusers whose transformer it is
    holds: Callable[[Mapping[str, Any]], bool]  # whether a config.json is of it
    # (config, tensors) -> arch and state dict. Raises UserError on what is not offered, ValueError on what is damaged
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Any, dict[str, Tensor]]]
    beside: str  # a safetensors file beside the weights, whose tensors `read` gets too, where there is one


@dataclass(frozen=True)
class ModelFamily:
    """One architecture: how to build it, where its blocks are, which process it belongs to."""

    name: str
    title: str  # what it is called in a sentence: "a " title " of 12 blocks"
    process: str  # key of the noising process, looked up where the job is put together
    arch_type: type
    build: Callable[[Any], nn.Module]
    initialise: Callable[[Any, int], None]
    # (tensors, heads, classes without the null class) -> arch; the numbers are None where nobody says them
    arch_of_state_dict: Callable[[Mapping[str, Tensor], int | None, int | None], Any]
    example: Callable[[Any, int], tuple[Tensor, ...]]  # (arch, samples) -> inputs of one forward pass, for their shapes
    block_lists: Mapping[str, str]  # name of a list of blocks -> the field of the arch that holds its depth
    mark: str  # name of a tensor by which its official files are known
    guided_channels: int | None  # leading channels that published guidance touches; None: all
    computed: Mapping[
        str, Callable[[Any], Tensor]
    ]  # tensors that a formula gives, left out of the hash where they equal it
    published_latent: Mapping[int, Mapping[str, Any]]  # in_channels -> latent facts of the published files
    published_license: str | None = None  # of the published weights, for the card of a model that knows none
    widths: WidthRules | None = None  # None where widths cannot be cut
    dynamic: DynamicRules | None = None  # None where width and tokens cannot be chosen by timestep
    # (arch, tensors) -> {format of others that cannot hold such a model: reason}
    unfit_formats: Callable[[Any, Mapping[str, Tensor]], dict[str, str]] | None = None
    # (name, parameter) -> whether published weight decay leaves it alone; None: it takes all alike
    undecayed: Callable[[str, Tensor], bool] | None = None
    streams: Mapping[str, Streams] = dataclasses.field(
        default_factory=dict
    )  # list of blocks -> what its blocks pass on
    diffusers: DiffusersFolder | None = None  # None where its folders are not opened, and for the first family

    def arch_of_sizes(self, sizes: Mapping[str, Any]) -> Any:
        """The arch of a recipe's section: "depth" counts the blocks of every list, and sizes that are None are not given.

        Raises ValueError on sizes that this family has not, and on those that do not fit together.
        """
        given = {name: value for name, value in sizes.items() if value is not None}
        depth = given.pop("depth", None)
        if depth is not None:
            given |= dict.fromkeys(self.block_lists.values(), depth)
        known = {field.name for field in dataclasses.fields(self.arch_type)}
        foreign = sorted(set(given) - known)
        if foreign:
            raise ValueError(f"a model of family {self.name} has no {', '.join(foreign)}: leave it out")
        return self.arch_type(**given)

    def shapes(self, arch: Any) -> dict[str, Tensor]:
        """The state dict of a model of these sizes, without values (on the meta device). Raises ValueError on sizes that overflow."""
        try:
            with torch.device("meta"):
                return dict(self.build(arch).state_dict())
        except (RuntimeError, OverflowError) as error:
            raise ValueError(f"a model of these sizes cannot be: {error}") from error

    def num_bytes(self, arch: Any) -> int:
        """Bytes of a model of these sizes in float32, counted from one block of every list. Raises ValueError on sizes that overflow."""
        shapes = self.shapes(self.arch_with_depths(arch, dict.fromkeys(self.block_lists, 1)))
        depths = {f"{name}.0.": getattr(arch, depth) for name, depth in self.block_lists.items()}
        return sum(
            4 * tensor.numel() * next((depth for start, depth in depths.items() if name.startswith(start)), 1)
            for name, tensor in shapes.items()
        )

    def stack(self, model: nn.Module) -> BlockStack:
        """The residual blocks of a model of this family."""
        return BlockStack(model, tuple(self.block_lists), self.streams)

    def arch_with_depths(self, arch: Any, depths: Mapping[str, int]) -> Any:
        """The arch after cutting: `depths` blocks per list."""
        return dataclasses.replace(arch, **{self.block_lists[name]: depth for name, depth in depths.items()})

    def differ_in_size_alone(self, arch: Any, other: Any, depths: Mapping[str, int]) -> bool:
        """Whether cutting depth and, where this family can, widths leads from one arch to the other; depths: of `other`."""
        deepened = self.arch_with_depths(arch, depths)
        if self.widths is None or deepened == other:
            return bool(deepened == other)
        sizes = {name: group.size for name, group in self.widths.groups(deepened).items()}
        try:
            return bool(self.widths.narrowed(other, sizes) == deepened)
        except ValueError:
            return False


DIT = ModelFamily(
    name="dit",
    title="diffusion transformer (DiT)",
    process="gaussian",
    arch_type=dit.DiTArch,
    build=dit.DiT,
    initialise=dit.initialise,
    arch_of_state_dict=dit.arch_of_state_dict,
    example=dit.example,
    block_lists={"blocks": "depth"},
    mark="x_embedder.proj.weight",
    guided_channels=3,
    computed={"pos_embed": lambda arch: dit.position_table(arch.hidden_size, arch.input_size // arch.patch_size)},
    published_latent={4: {"latent_scale": 0.18215, "vae": "stabilityai/sd-vae-ft-ema", "pixels_per_latent": 8}},
    published_license="CC-BY-NC-4.0",
    widths=DIT_WIDTHS,
    dynamic=DIT_DYNAMIC,
    unfit_formats=unfit_formats,
)
SIT = dataclasses.replace(
    DIT,
    name="sit",
    title="scalable interpolant transformer (SiT)",
    process="flow",
    build=sit.SiT,
    published_license="MIT",
    unfit_formats=sit.unfit_formats,
)
MAR = ModelFamily(
    name="mar",
    title="masked autoregressive model (MAR)",
    process="masked",
    arch_type=mar.MarArch,
    build=mar.Mar,
    initialise=mar.initialise,
    arch_of_state_dict=mar.arch_of_state_dict,
    example=mar.example_inputs,
    block_lists={"encoder_blocks": "encoder_depth", "decoder_blocks": "decoder_depth"},
    mark="z_proj.weight",
    guided_channels=None,
    computed={},
    published_latent={16: {"latent_scale": 0.2325, "vae": "mar-kl16", "pixels_per_latent": 16}},
    published_license="MIT",
    unfit_formats=mar.unfit_formats,
    undecayed=mar.undecayed,
)
PIXART = ModelFamily(
    name="pixart",
    title="text-conditioned diffusion transformer (PixArt-alpha)",
    process="gaussian",
    arch_type=pixart.PixArtArch,
    build=pixart.PixArt,
    initialise=pixart.initialise,
    arch_of_state_dict=pixart.arch_of_state_dict,
    example=dit.example,
    block_lists={"net.transformer_blocks": "depth"},
    mark="t_block.1.weight",
    guided_channels=None,
    computed={},
    published_latent=DIT.published_latent,
    published_license="OpenRAIL++",
    unfit_formats=lambda _arch, _tensors: dict(pixart.UNFIT),
    diffusers=DiffusersFolder(("PixArtAlphaPipeline",), pixart.is_config, pixart.from_diffusers, pixart.PROMPTS),
)
# where an official file fits several, the first is assumed
FAMILIES: dict[str, ModelFamily] = {family.name: family for family in (DIT, SIT, MAR, PIXART)}
