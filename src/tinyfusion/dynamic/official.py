"""Published files of DyDiT: which keys are routers, which layout, and how a model with routers comes of them.

Layout 2 (current code): routers of width have H - 1 outputs and unit 0 always runs. Layout 1 (December 2024): H outputs, and
nothing is forced. Files may hold the weights under "ema" or "model", with names of a wrapper in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.models.attach import DynamicModel, attach, is_router_key
from tinyfusion.models.family import ModelFamily
from tinyfusion.models.loaded import LoadedModel, ModelFacts, make_trainable
from tinyfusion.models.routers import DynamicSettings

_WRAPPER = "module."


def tensors_in(content: Mapping[str, Any], weights: str = "ema") -> dict[str, Tensor]:
    """The state dict in the content of a file: that under `weights`, else under the other, else the content itself.

    weights: "ema" or "raw". A wrapper's `module.` goes. Raises UserError where there is anything but tensors.
    """
    order = ("ema", "model") if weights == "ema" else ("model", "ema")
    found: Mapping[str, Any] = next((content[key] for key in order if isinstance(content.get(key), Mapping)), content)
    odd = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if odd or not found:
        raise UserError(f"a state dict holds tensors alone; this one has {', '.join(odd[:3]) or 'nothing'}")
    return {str(name).removeprefix(_WRAPPER): value for name, value in found.items()}


def settings_of(tensors: Mapping[str, Tensor], num_heads: int) -> DynamicSettings:
    """What the router keys of a state dict say. Raises UserError where they are of no layout."""
    names = {part for name in tensors for part in name.split(".")}
    width, tokens, depth = "attn_rate" in names, "token_selection" in names, "block_rate" in names
    rows = {
        len(value)
        for name, value in tensors.items()
        if name.endswith("_rate.router.weight") and "block_rate" not in name
    }
    if not (width or tokens or depth):
        raise UserError("these tensors have no routers: it is a static model")
    if rows - {num_heads} and rows - {num_heads - 1}:
        raise UserError(
            f"routers of width have {num_heads} outputs (layout 1) or {num_heads - 1} (layout 2, the first always on) for "
            f"{num_heads} heads; got {', '.join(map(str, sorted(rows)))}"
        )
    return DynamicSettings(width=width, tokens=tokens, depth=depth, forced_first=rows != {num_heads})


def dynamic_from_tensors(
    tensors: Mapping[str, Tensor], family: ModelFamily, num_heads: int | None = None, facts: ModelFacts | None = None
) -> DynamicModel:
    """The dynamic model of a state dict with routers, in float32 and eval mode.

    num_heads: where the width is in no published table. facts: what else is known; else the published facts of latents.
    Raises UserError where anything is missing, too many or misshapen.
    """
    base = {name: value for name, value in tensors.items() if not is_router_key(name)}
    try:
        arch = family.arch_of_state_dict(base, num_heads)
    except ValueError as error:
        raise UserError(str(error)) from error
    settings = settings_of(tensors, arch.num_heads)
    with torch.random.fork_rng(devices=[]):
        module = family.build(arch)
    latent = family.published_latent.get(arch.in_channels, {})
    known = facts or ModelFacts(
        image_size=arch.input_size * latent.get("pixels_per_latent", 1),
        latent_scale=latent.get("latent_scale"),
        vae=latent.get("vae"),
    )
    dynamic = attach(LoadedModel(module, family, arch, known), settings)
    load_tensors(dynamic, tensors)
    make_trainable(dynamic.module, family)
    dynamic.module.eval()
    return dynamic


def load_tensors(dynamic: DynamicModel, tensors: Mapping[str, Tensor]) -> None:
    """Put these values into a dynamic model, in place. Raises UserError unless names and shapes are exactly its own."""
    own = dynamic.module.state_dict()
    for text, odd in (("missing", set(own) - set(tensors)), ("unexpected", set(tensors) - set(own))):
        if odd:
            raise UserError(f"{len(odd)} tensors are {text}, such as {', '.join(sorted(odd)[:3])}")
    wrong = sorted(name for name, value in tensors.items() if value.shape != own[name].shape)
    if wrong:
        name = wrong[0]
        raise UserError(f"{name} has the shape {tuple(tensors[name].shape)}; wanted {tuple(own[name].shape)}")
    bad = sorted(name for name, value in tensors.items() if not torch.isfinite(value).all())
    if bad:
        raise UserError(f"{bad[0]} holds values that are not finite")
    dynamic.module.load_state_dict({name: value.float() for name, value in tensors.items()})


def base_tensors(dynamic: DynamicModel) -> dict[str, Tensor]:
    """The state dict without routers: the static model's."""
    return {name: value for name, value in dynamic.module.state_dict().items() if not is_router_key(name)}


def record(dynamic: DynamicModel) -> dict[str, Any]:
    """What the folder of a dynamic model says of its routers, so that tensors need not be guessed at."""
    return {**dataclasses.asdict(dynamic.settings), "num_heads": dynamic.sizes.num_heads}
