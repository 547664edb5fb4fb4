"""Linear layers of a model that is only run, their weights laid out once as the processor's matrix units read them.

torch lays a bfloat16 weight out anew in every call, which takes a fifth of a product of the published sizes, and computes a
GELU in a pass of its own, which takes as long as the product before it. Here both are oneDNN's, in one call.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import count
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST = 2**18  # weights of a layer; below, the call costs more than is won
_LAID_OUT: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_NUMBERS = count()
_NAMESPACE = "tinyfusion"


class PackedLinear(nn.Module):
    """x (..., in) -> (..., out) as `nn.Linear`, in its type; for running alone: it has no weight to train, cut or save.

    The compiler can take no tensor in oneDNN's layout, so the operator is given its number, and blocks share a compilation.
    """

    number: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        number = next(_NUMBERS)
        self.laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        _LAID_OUT[number] = self.laid_out  # for as long as this layer lives
        self.register_buffer("number", torch.tensor(number))
        bias: Tensor | None = layer.bias  # torch's own types forget that a layer may have none
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.operator = _operator()

    @property
    def num_bytes(self) -> int:
        """Of its weight and bias."""
        rows = self.in_features + (self.bias is not None)
        return rows * self.out_features * self.laid_out.element_size()

    def forward(self, x: Tensor) -> Tensor:
        return self.followed_by(x, "none", "")

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU of what the layer gives, "none" or "tanh" as in `F.gelu`."""
        return self.followed_by(x, "gelu", approximate)

    def followed_by(self, x: Tensor, activation: str, kind: str) -> Tensor:
        """An elementwise function of what the layer gives, by oneDNN's names."""
        out: Tensor = self.operator(x, self.number, self.bias, self.out_features, activation, kind)
        return out


def gelu_linear(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """GELU of what a linear layer gives; a packed one computes both at once."""
    if isinstance(layer, PackedLinear):
        return layer.gelu(x, approximate)
    return F.gelu(layer(x), approximate=approximate)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layers of this type run here: bfloat16, on a processor for which oneDNN has it."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(blocks: Iterable[nn.Module], smallest: int = _SMALLEST) -> None:
    """Put a `PackedLinear` in the place of every linear layer in `blocks` with `smallest` weights or more.

    For blocks that nothing but their own `forward` reads; see `can_pack`.
    """
    for block in blocks:
        for parent in list(block.modules()):
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and layer.weight.numel() >= smallest:
                    setattr(parent, name, PackedLinear(layer))


def held_bytes(module: nn.Module) -> int:
    """Bytes of all weights of a module, packed ones too."""
    plain = sum(p.numel() * p.element_size() for p in module.parameters())
    return plain + sum(layer.num_bytes for layer in module.modules() if isinstance(layer, PackedLinear))


@cache
def _operator() -> torch._ops.OpOverloadPacket:
    """The product as an operator of torch, which compiled graphs call."""
    library = torch.library.Library(_NAMESPACE, "DEF")
    library.define(
        "packed_linear(Tensor x, Tensor number, Tensor? bias, int out_features, str activation, str kind) -> Tensor"
    )
    library.impl("packed_linear", _packed_linear, "CPU")
    torch.library.register_fake(f"{_NAMESPACE}::packed_linear", _shape, lib=library)
    _LIBRARIES.append(library)
    operator: torch._ops.OpOverloadPacket = getattr(torch.ops, _NAMESPACE).packed_linear
    return operator


_LIBRARIES: list[torch.library.Library] = []  # operators go with the object that made them


def _packed_linear(
    x: Tensor, number: Tensor, bias: Tensor | None, _out_features: int, activation: str, kind: str
) -> Tensor:
    weight = _LAID_OUT[int(number)]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)
    return out


def _shape(x: Tensor, _number: Tensor, _bias: Tensor | None, out_features: int, _activation: str, _kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


__all__ = ["PackedLinear", "can_pack", "gelu_linear", "held_bytes", "pack"]
