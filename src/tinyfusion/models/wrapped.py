"""A module of your own as a `LoadedModel`: criteria, masks, plans and distillation work on it as on a family's models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.streams import Streams
from tinyfusion.core.errors import UserError
from tinyfusion.families.family import ModelFamily
from tinyfusion.models.facts import ModelFacts
from tinyfusion.models.loaded import LoadedModel, make_trainable

NO_PROCESS = "none"  # of a wrapped module: its task says how it is trained


class WrappedModel(LoadedModel):
    """A module of your own: other weights are those of a copy, as no sizes say how to build another."""

    def with_weights(self, tensors: Mapping[str, Tensor]) -> LoadedModel:
        """The same model with other values, in a copy of the module."""
        other = self.copy()
        other.module.load_state_dict(dict(tensors))
        return other

    def cut(self, plan: PrunePlan, force: bool = False) -> LoadedModel:
        """As of every model; the frozen parameters of the blocks that stay are frozen under their new names."""
        student = super().cut(plan, force)
        renamed = {name: _after_cut(name, plan.kept) for name in self.family.computed}
        computed = {new: self.family.computed[name] for name, new in renamed.items() if new is not None}
        student.family = dataclasses.replace(self.family, computed=computed)
        make_trainable(student.module, student.family)
        return student


def _after_cut(name: str, kept: Mapping[str, Sequence[int]]) -> str | None:
    """The name of a parameter once only the blocks `kept` of every list are there; None for one of a removed block."""
    for blocks, indices in kept.items():
        if name.startswith(f"{blocks}."):
            number, _, rest = name.removeprefix(f"{blocks}.").partition(".")
            stays = sorted(indices)
            return f"{blocks}.{stays.index(int(number))}.{rest}" if int(number) in stays else None
    return name


def wrap_module(module: nn.Module, blocks: Sequence[str] | Mapping[str, Streams]) -> LoadedModel:
    """A `LoadedModel` around `module`, which is not copied.

    blocks: paths of its `nn.ModuleList`s of blocks in the order in which they run, such as ["layers"]; with a declaration if
    blocks are not one stream in, the same out: {"layers": Streams(("hidden",), axes={"rope": None})}. Parameters that do not
    require gradients stay frozen in mask learning and recovery, unless none requires any (a frozen teacher). The result has no
    file format and no sampler: it is pruned, recovered and used from Python, and you save `module`.
    Raises UserError if a path names no list of blocks, and on tied weights and blocks that are in the lists twice.
    """
    listed = dict(blocks) if isinstance(blocks, Mapping) else {name: Streams() for name in blocks}
    if not listed:
        raise UserError("wrap_module wants the path of at least one list of blocks, such as ['layers']")
    depths: dict[str, int] = {}
    for name in listed:
        try:
            blocks_of_list = module.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"the model has no submodule {name!r}{_lists_of(module)}") from error
        if not isinstance(blocks_of_list, nn.ModuleList) or not len(blocks_of_list):
            raise UserError(
                f"{name!r} is a {type(blocks_of_list).__name__}, not an nn.ModuleList with blocks{_lists_of(module)}"
            )
        depths[name] = len(blocks_of_list)
    _check_apart(module, list(listed))
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if len(frozen) == len(list(module.parameters())):
        frozen = []
    fields = {name: f"depth_{index}" for index, name in enumerate(listed)}
    arch_type = dataclasses.make_dataclass("Depths", [(field, int) for field in fields.values()], frozen=True)
    family = ModelFamily(
        name="module",
        title=type(module).__name__,
        process=NO_PROCESS,
        arch_type=arch_type,
        build=_unbuildable,
        example=_unbuildable,
        block_lists=fields,
        # frozen tensors have no formula, so they are part of the hash
        computed=dict.fromkeys(frozen, lambda _arch: torch.empty(0)),
        streams=listed,
        opened_in_float32=False,
    )
    arch = arch_type(**{fields[name]: depth for name, depth in depths.items()})
    return WrappedModel(
        module, family, arch, ModelFacts(image_size=0), {"kind": "module", "path": type(module).__name__}
    )


def _check_apart(module: nn.Module, lists: Sequence[str]) -> None:
    """Raise UserError where two blocks, or two parameters, are one object: neither could be removed or trained alone."""
    blocks: dict[int, str] = {}
    for path in lists:
        for index, block in enumerate(cast(nn.ModuleList, module.get_submodule(path))):
            other = blocks.setdefault(id(block), name := f"{path}.{index}")
            if other != name:
                raise UserError(
                    f"the blocks {other} and {name} are one module: give each weights of its own (copy.deepcopy)"
                )
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        if other != name:
            raise UserError(
                f"the weights {other} and {name} are tied, one tensor of two names: give each its own (clone)"
            )


def _lists_of(module: nn.Module) -> str:
    names = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    return f"; its lists are {', '.join(names)}" if names else "; it has no nn.ModuleList"


def _unbuildable(*_: Any) -> NoReturn:
    raise UserError("a wrapped module cannot be built from sizes: keep the class that it is of, and its state dict")
