"""ModelFamily: the one plug-in contract. What tinyfusion must know about an architecture, and nothing that it can see.

A new family is a file beside `dit.py` and one entry in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tinyfusion.models import dit
from tinyfusion.models.stack import BlockStack


@dataclass(frozen=True)
class ModelFamily:
    """One architecture: how to build it, where its blocks are, which process it belongs to."""

    name: str
    process: str  # key of the noising process, looked up where the job is put together
    arch_type: type
    build: Callable[[Any], nn.Module]
    initialise: Callable[[Any, int], None]
    arch_of_state_dict: Callable[[Mapping[str, Tensor], int | None], Any]
    block_lists: Mapping[str, str]  # name of a list of blocks -> the field of the arch that holds its depth
    guided_channels: int | None  # leading channels that published guidance touches; None: all
    computed: Mapping[
        str, Callable[[Any], Tensor]
    ]  # tensors that a formula gives, left out of the hash where they equal it
    published_latent: Mapping[int, Mapping[str, Any]]  # in_channels -> latent facts of the published files

    def stack(self, model: nn.Module) -> BlockStack:
        """The residual blocks of a model of this family."""
        return BlockStack(model, tuple(self.block_lists))

    def arch_with_depths(self, arch: Any, depths: Mapping[str, int]) -> Any:
        """The arch after cutting: `depths` blocks per list."""
        return dataclasses.replace(arch, **{self.block_lists[name]: depth for name, depth in depths.items()})


FAMILIES: dict[str, ModelFamily] = {
    "dit": ModelFamily(
        name="dit",
        process="gaussian",
        arch_type=dit.DiTArch,
        build=dit.DiT,
        initialise=dit.initialise,
        arch_of_state_dict=dit.arch_of_state_dict,
        block_lists={"blocks": "depth"},
        guided_channels=3,
        computed={"pos_embed": lambda arch: dit.position_table(arch.hidden_size, arch.input_size // arch.patch_size)},
        published_latent={4: {"latent_scale": 0.18215, "vae": "stabilityai/sd-vae-ft-ema", "pixels_per_latent": 8}},
    ),
}
