"""Routers put on a model from outside, and the ways in which its blocks then run. Model files know nothing of it.

`attach` adds the routers as submodules of every block and replaces the `forward` of the block object. What a block does is
then said by the current *way*: decide as at inference (the default), run everything (`complete`), run under drawn noise
(training, `dynamic/train.py`), or run sub-networks that were resolved before (`dynamic/subnetworks.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from tinyfusion.blocks.dynamics import BlockSizes, DynamicRules
from tinyfusion.blocks.routers import ROUTERS, DynamicSettings, initialise_routers, install_routers, is_router_key
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness

if TYPE_CHECKING:
    from tinyfusion.families.family import ModelFamily
    from tinyfusion.models.loaded import LoadedModel


class Way(Protocol):
    """How the blocks of a dynamic model run."""

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """The times (B,) of a forward pass and their embedding (B, D) are known."""
        ...

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """One block."""
        ...


class Complete:
    """Everything runs: the static model, bit for bit."""

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """Nothing to decide."""

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """The plain block."""
        return dynamic.forward(x, c)[0]


@dataclass(frozen=True)
class BlockMasks:
    """What was decided for one block: heads (B, H), groups (B, H), tokens (B, N), gate (B,); None: everything is on."""

    heads: Tensor | None = None
    groups: Tensor | None = None
    tokens: Tensor | None = None
    gate: Tensor | None = None


class Deciding:
    """Every image decides for itself, without noise, at full cost: the reference. `masks` are those of the last pass."""

    def __init__(self) -> None:
        self.embedding: Tensor | None = None
        self.masks: dict[int, BlockMasks] = {}

    def begin(self, t: Tensor, embedding: Tensor) -> None:
        """A pass begins."""
        self.embedding, self.masks = embedding, {}

    def noise(self, router: str, index: int) -> Tensor | None:
        """Noise of a router of block `index`; None decides as at inference, without gradients."""
        return None

    def run(self, dynamic: DynamicForward, x: Tensor, c: Tensor) -> Tensor:
        """The block with masks multiplied in."""
        if self.embedding is None or len(self.embedding) != len(x):  # a block by itself, which nothing was decided for
            return dynamic.forward(x, c)[0]
        index, masks = dynamic.index, dict[str, Tensor | None]()
        for name in ("attn_rate", "mlp_rate", "block_rate"):
            router = getattr(dynamic.block, name, None)
            masks[name] = None if router is None else router(self.embedding, self.noise(name, index))
        heads, groups, gate = masks["attn_rate"], masks["mlp_rate"], masks["block_rate"]
        selection = getattr(dynamic.block, "token_selection", None)
        out, tokens = dynamic.forward(x, c, heads, groups, selection, self.noise("token_selection", index))
        self.masks[index] = BlockMasks(heads, groups, tokens, gate)
        if gate is None:
            return out
        share = gate.to(out.dtype).view(-1, 1, 1)
        return share * out + (1 - share) * x


class Current:
    """The way of a model, shared by its embedders of time and label and all of its blocks."""

    def __init__(self) -> None:
        self.way: Way = Deciding()
        self.labels: Tensor | None = None  # their embeddings (B, D) in the present pass

    def labelled(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Hook on the label embedder."""
        self.labels = output.detach()

    def embedded(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook on the timestep embedder."""
        self.way.begin(args[0], output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Current:
        """A copy of a model decides as at inference; what a pass has left behind stays with the original."""
        memo[id(self)] = copied = Current()
        return copied


@dataclass(frozen=True)
class DynamicForward:
    """What stands in for the `forward` of block `index`. `forward`: the masked form, which may be recomputed or compiled."""

    index: int
    block: nn.Module
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    current: Current

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        """The residual stream (B, N, D)."""
        return self.current.way.run(self, x, c)


@dataclass(frozen=True)
class DynamicModel:
    """A view of a model with routers on it. Calling its module decides as at inference, at full cost."""

    loaded: LoadedModel

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.loaded.module

    @property
    def stack(self) -> BlockStack:
        """Its blocks."""
        return self.loaded.stack

    @cached_property
    def settings(self) -> DynamicSettings:
        """What is decided."""
        return settings_in(self.loaded.facts.dynamic or {})

    @property
    def rules(self) -> DynamicRules:
        """The family's."""
        return rules_of(self.loaded.family)

    @cached_property
    def sizes(self) -> BlockSizes:
        """Of its blocks."""
        return self.rules.sizes(self.loaded.arch)

    @cached_property
    def current(self) -> Current:
        """Which way its blocks run."""
        owners = (getattr(hook, "__self__", None) for hook in self.embedder._forward_hooks.values())
        return next(owner for owner in owners if isinstance(owner, Current))

    @property
    def embedder(self) -> nn.Module:
        """What makes the timestep embedding."""
        return self.module.get_submodule(self.rules.embedder)

    @contextmanager
    def using(self, way: Way) -> Iterator[None]:
        """Within the context blocks run in this way."""
        before, self.current.way = self.current.way, way
        try:
            yield
        finally:
            self.current.way = before

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
    """The settings of routers in what a model's facts say of them. Raises ValueError where they are none."""
    known = {field.name for field in dataclasses.fields(DynamicSettings)}
    return cast(
        DynamicSettings, build_known(DynamicSettings, {k: v for k, v in record.items() if k in known}, "dynamic")
    )


def rules_of(family: ModelFamily) -> DynamicRules:
    """The family's rules. Raises UserError where it has none."""
    if family.dynamic is None:
        raise UserError(f"models of the family {family.name} cannot be made dynamic")
    return family.dynamic


def check_attachable(model: LoadedModel, settings: DynamicSettings) -> BlockSizes:
    """The sizes of the model's blocks. Raises UserError where it cannot have these routers, or has some already."""
    if model.facts.dynamic is not None:
        raise UserError("this model has routers already")
    try:
        sizes = rules_of(model.family).sizes(model.arch)
    except ValueError as error:
        raise UserError(f"this model cannot be made dynamic: {error}") from error
    if settings.width and settings.forced_first and sizes.num_heads < 2:
        raise UserError("with one head there is no width to decide on: set forced_first to false, or width to false")
    return sizes


def attach(model: LoadedModel, settings: DynamicSettings, seed: int = 0) -> DynamicModel:
    """Put routers on `model`, in place. Their first values keep everything on; weights of `model` stay as they are.

    Raises UserError where the family or its sizes do not allow it, and where there are routers already.
    """
    sizes = check_attachable(model, settings)
    generator = torch.Generator().manual_seed(Randomness(seed).generator_seed("routers"))
    like = next(model.module.parameters())
    for block in model.stack:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            install_routers(block, sizes.width, sizes.num_heads, settings)
        initialise_routers(block, settings, generator)
        for name in ROUTERS:
            if hasattr(block, name):
                getattr(block, name).to(like.device).train(block.training)
    route(model.module, model.family)
    model.facts = dataclasses.replace(model.facts, dynamic=dataclasses.asdict(settings))
    return DynamicModel(model)


def build_with_routers(family: ModelFamily, arch: Any, settings: DynamicSettings | None) -> nn.Module:
    """The module of an arch, with the routers that `settings` asks for; values are to be loaded."""
    module = family.build(arch)
    if settings is None:
        return module
    sizes = rules_of(family).sizes(arch)
    for block in family.stack(module):
        install_routers(block, sizes.width, sizes.num_heads, settings)
    route(module, family)
    return module


def route(module: nn.Module, family: ModelFamily) -> None:
    """Let the blocks of a module that has routers run through a current way from now on."""
    rules, current = rules_of(family), Current()
    module.get_submodule(rules.embedder).register_forward_hook(current.embedded)
    module.get_submodule(rules.labels).register_forward_hook(current.labelled)
    for index, block in enumerate(family.stack(module)):
        vars(block)["forward"] = DynamicForward(index, block, MethodType(rules.masked, block), current)


def whole_layers(dynamic: DynamicModel) -> Iterator[nn.Module]:
    """The submodules of all blocks that sub-networks call as they are; of other layers they read parts."""
    return (block.get_submodule(dynamic.rules.modulation) for block in dynamic.stack)


def detached(dynamic: DynamicModel) -> LoadedModel:
    """A copy of the model without routers: the static model that it was made of, with its weights as they are now."""
    plain = dynamic.loaded.copy()
    for name in (dynamic.rules.embedder, dynamic.rules.labels):
        hooks = plain.module.get_submodule(name)._forward_hooks
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Current):
                del hooks[key]
    for block in plain.stack:
        vars(block).pop("forward", None)
        for name in ROUTERS:
            if hasattr(block, name):
                delattr(block, name)
    facts = dataclasses.replace(plain.facts, dynamic=None)
    return dataclasses.replace(plain, origin={}, facts=facts)
