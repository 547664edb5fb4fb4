"""A module from the tensors of a file, checked one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.conditioning.condition import Condition
from tinyfusion.conditioning.texts import text_table
from tinyfusion.core.errors import UserError
from tinyfusion.families.family import ModelFamily
from tinyfusion.families.tensor_checks import check_sizes, in_float32
from tinyfusion.models.loaded import make_trainable


def filled(
    family: ModelFamily, arch: Any, tensors: Mapping[str, Tensor], path: Path, routers: DynamicSettings | None = None
) -> tuple[nn.Module, Condition | None]:
    """A module with exactly these values, float32, in its own memory and in eval mode, and the texts among them.

    Raises UserError, naming the first few faults.
    """
    check_sizes(dataclasses.asdict(arch), tensors, str(path))
    what, texts, rules = f"{path} does not hold this {family.name}", None, family.texts
    if rules is not None and (shapes := rules.shapes(arch)):
        wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        own = in_float32({name: tensors[name] for name in wanted if name in tensors}, wanted, what)
        texts = text_table({ours: own[theirs] for ours, theirs in rules.names.items()})
        tensors = {name: tensor for name, tensor in tensors.items() if name not in own}
    try:
        with torch.device("meta"):
            module = family.build_with_routers(arch, routers)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"{path} has sizes that no {family.name} can have: {error}") from error
    module.load_state_dict(in_float32(tensors, module.state_dict(), what), assign=True)
    return make_trainable(module, family).eval(), texts
