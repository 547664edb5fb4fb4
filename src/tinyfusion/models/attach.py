"""Sort the units of a model, add routers in place, and remove them from a copy; model files do not know routers."""

from __future__ import annotations

import dataclasses

import torch

from tinyfusion.blocks.dynamics import BlockSizes, Current, check_one_stream, route
from tinyfusion.blocks.routers import ROUTERS, DynamicSettings, initialise_routers, install_routers
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.rng import Randomness
from tinyfusion.models.loaded import DynamicModel, LoadedModel


def check_attachable(model: LoadedModel, settings: DynamicSettings) -> BlockSizes:
    """The sizes of the model's blocks. Raises UserError if it cannot have these routers, or has some already."""
    if model.facts.dynamic is not None:
        raise UserError("this model has routers already")
    check_one_stream(model.stack)
    with prefixed("this model cannot be made dynamic", ValueError):
        sizes = model.family.dynamic_rules().sizes(model.arch)
    if settings.width and settings.forced_first and sizes.num_heads < 2:
        raise UserError("with one head there is no width to decide on: set forced_first to false, or width to false")
    return sizes


def attach(model: LoadedModel, settings: DynamicSettings, seed: int = 0) -> DynamicModel:
    """Add routers to `model`, in place, with initial values that keep everything on. Raises UserError as `check_attachable`."""
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


def detached(dynamic: DynamicModel) -> LoadedModel:
    """A copy of the model without routers, with its present weights."""
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


def order_by_importance(model: LoadedModel) -> list[tuple[list[int], list[int]]]:
    """Sort heads and hidden channels of every block by importance, in place, without changing the output of the model.

    Returns the original indices of both per block, strongest first. Done before routers are trained, because the first unit of
    each kind is always on. The score of a unit is the sum of its
    absolute weights; hidden channels are sorted before they are grouped, so group 0 has the strongest. The paper
    (arXiv 2410.03456) ranks by magnitude; its release does not sort.
    """
    rules = model.family.dynamic_rules()
    sizes = rules.sizes(model.arch)
    orders = []
    for block in model.stack:
        heads, hidden = (s.argsort(descending=True, stable=True) for s in rules.scores(block, sizes))
        rules.reorder(block, heads, hidden, sizes)
        orders.append((heads.tolist(), hidden.tolist()))
    return orders
