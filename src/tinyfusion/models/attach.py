"""Routers put on a model in place, and taken off a copy of it. Model files know nothing of routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from tinyfusion.blocks.dynamics import BlockSizes
from tinyfusion.blocks.routed import Current, route
from tinyfusion.blocks.routers import ROUTERS, DynamicSettings, initialise_routers, install_routers
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.loaded import DynamicModel, LoadedModel


def check_attachable(model: LoadedModel, settings: DynamicSettings) -> BlockSizes:
    """The sizes of the model's blocks. Raises UserError where it cannot have these routers, or has some already."""
    if model.facts.dynamic is not None:
        raise UserError("this model has routers already")
    try:
        sizes = model.family.dynamic_rules().sizes(model.arch)
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
    route(model.module, model.family.dynamic_rules(), model.stack)
    model.facts = dataclasses.replace(model.facts, dynamic=dataclasses.asdict(settings))
    return DynamicModel(model)


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
