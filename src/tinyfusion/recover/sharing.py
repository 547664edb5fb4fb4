"""Tensors of a student that are its teacher's as long as they do not train, and low-rank updates merged into a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tinyfusion.core.tensors import bytes_of
from tinyfusion.training.lora import ADAPTER
from tinyfusion.training.packed import PackedLinear

_PROBED = 16  # values of a tensor that are compared before all of them are


def borrowed(module: nn.Module) -> nn.Module:
    """A frozen copy of a module's structure, on the same memory: moving or replacing its tensors leaves the original's."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, memo)


def equal_tensors(student: nn.Module, teacher: nn.Module, lists: Sequence[str]) -> dict[str, str]:
    """{name of a student's parameter: name of the teacher's that has its values}, for those that have one.

    Blocks of a list may have other numbers in the two, so a parameter of any block is compared with those of the same name in
    every block of the teacher, a few values first. No record of how the student was made is needed.
    """
    of_teacher: dict[tuple[object, ...], list[tuple[str, Tensor]]] = {}
    for name, value in teacher.named_parameters():
        of_teacher.setdefault(_likeness(name, value, lists), []).append((name, value))
    found = {}
    for name, value in student.named_parameters():
        for theirs, other in of_teacher.get(_likeness(name, value, lists), ()):
            if torch.equal(value.detach(), other.detach()):
                found[name] = theirs
                break
    return found


def _likeness(name: str, value: Tensor, lists: Sequence[str]) -> tuple[object, ...]:
    for listed in lists:
        name = re.sub(rf"^{re.escape(listed)}\.\d+\.", f"{listed}.*.", name)
    some = value.detach().reshape(-1)[:: max(1, value.numel() // _PROBED)]
    return name, tuple(value.shape), value.dtype, bytes(bytes_of(some))


def share(student: nn.Module, teacher: nn.Module, equal: Mapping[str, str], device: torch.device) -> int:
    """Let parameters of a `borrowed` student be the teacher's, by `equal_tensors` before it was stored. Returns their number.

    Packed layers become the teacher's own layer; what the teacher has elsewhere than on `device` (streamed blocks) is not shared.
    """
    named, shared = dict(student.named_parameters()), 0
    theirs = dict(teacher.named_parameters())
    for name, other in equal.items():
        owner, _, attribute = other.rpartition(".")
        layer = teacher.get_submodule(owner)
        if isinstance(layer, PackedLinear):
            mine = name.rpartition(".")[0]
            if attribute != "weight" or (f"{mine}.bias" in named and equal.get(f"{mine}.bias") != f"{owner}.bias"):
                continue
            student.set_submodule(mine, layer)
            shared += layer.in_features * layer.out_features
        elif theirs[other].device.type == device.type:
            named[name].data = theirs[other].data
            shared += named[name].numel()
    return shared


class MergedUpdates(Mapping[str, Tensor]):
    """Weights W + scale * B A by name, each made on access: the whole model need not be there twice.

    weights: of the model without updates. factors: (averaged) low-rank factors, by their names in the trained module.
    """

    def __init__(self, weights: Mapping[str, Tensor], factors: Mapping[str, Tensor], scale: float) -> None:
        self.weights, self.factors, self.scale = weights, factors, scale
        suffix = f".lora_A.{ADAPTER}.weight"
        self.layers = {
            f"{n.removesuffix(suffix)}.weight": n.removesuffix(suffix) for n in factors if n.endswith(suffix)
        }

    def __getitem__(self, name: str) -> Tensor:
        layer, weight = self.layers[name], self.weights[name].detach()
        a, b = (self.factors[f"{layer}.lora_{side}.{ADAPTER}.weight"].to(weight.device).float() for side in "AB")
        return (weight.float() + self.scale * b @ a).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def lora_tensors(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Low-rank updates as a LoRA that diffusers and peft load onto the student as it was before recovery.

    Keys are `transformer.LAYER.lora_A.weight`; the scale is inside of B, so readers that take alpha for the rank, as they do
    without metadata, get the strength right.
    """
    tensors = {}
    for name, value in factors.items():
        layer, _, side = name.removesuffix(f".{ADAPTER}.weight").rpartition(".lora_")
        own = value.detach().float().cpu() * (scale if side == "B" else 1.0)
        tensors[f"transformer.{layer}.lora_{side}.weight"] = own.contiguous()
    return tensors
