"""Linear layers of a model that is only run, their weights laid out once as the processor's matrix units read them.

torch lays a bfloat16 weight out anew in every call, which takes a fifth of a product of the published sizes, and computes a
GELU in a pass of its own, which takes as long as the product before it. Here both are oneDNN's, in one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from itertools import count
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALLEST = 2**18  # weights of a layer; below, the call costs more than is won
# Inner size of a matrix unit: products of others take up to twice as long, so zeros are put in their place.
_TILE = 32
_TILE_ROWS = 16
_ROW_COUNTS = 32  # different numbers of rows that a layer may meet
_ROWS_AT_ONCE = 256
_FEW_THREADS = 4
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
        weight = F.pad(layer.weight.detach(), (0, -layer.in_features % _TILE))
        self.laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        _LAID_OUT[number] = self.laid_out  # for as long as this layer lives
        self.register_buffer("number", torch.tensor(number))
        bias: Tensor | None = layer.bias  # torch's own types forget that a layer may have none
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.operator = _operator()

    @property
    def num_bytes(self) -> int:
        """Of its weight, as it is laid out, and bias."""
        rows = _TILE * math.ceil(self.in_features / _TILE) + (self.bias is not None)
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


def row_step(layer: nn.Module, most: int) -> int:
    """To a multiple of what to round up a changing number of rows, at most `most`, that are given to a layer.

    oneDNN makes code for every number of rows that a packed layer meets, which takes several times as long as the product.
    """
    return _TILE_ROWS * math.ceil(most / (_ROW_COUNTS * _TILE_ROWS)) if isinstance(layer, PackedLinear) else 1


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layers of this type run here: bfloat16, on a processor for which oneDNN has it."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(layer: nn.Module, smallest: int | None = None) -> nn.Module:
    """A `PackedLinear` in the place of a linear layer with `smallest` weights or more; any other module as it is."""
    if type(layer) is nn.Linear and layer.weight.numel() >= (_SMALLEST if smallest is None else smallest):
        return PackedLinear(layer)
    return layer


def pack(modules: Iterable[nn.Module], smallest: int | None = None) -> None:
    """Put what `packed` gives in the place of every layer in `modules`, themselves left out.

    For modules that nothing but their own `forward` reads; see `can_pack`.
    """
    for module in modules:
        for parent in list(module.modules()):
            for name, layer in parent.named_children():
                setattr(parent, name, packed(layer, smallest))


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


_LIBRARIES: list[torch.library.Library] = []  # operators go with the object that defined them


def _packed_linear(
    x: Tensor, number: Tensor, bias: Tensor | None, out_features: int, activation: str, kind: str
) -> Tensor:
    weight = _LAID_OUT[int(number)]
    x = F.pad(x, (0, -x.shape[-1] % _TILE)) if x.shape[-1] % _TILE else x

    def product(part: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(part, weight, bias, activation, [], kind)
        return out

    rows = x.numel() // x.shape[-1]
    if not _shared_badly(rows, x.shape[-1], out_features):
        return product(x)
    at_once = _TILE_ROWS * math.ceil(rows / math.ceil(rows / _ROWS_AT_ONCE) / _TILE_ROWS)
    return torch.cat([product(part) for part in x.reshape(rows, -1).split(at_once)]).view(*x.shape[:-1], out_features)


def _shared_badly(rows: int, inner: int, columns: int) -> bool:
    """Whether oneDNN leaves half of the processor idle in a product of this size, and is faster with fewer rows at a time.

    Measured on two cores with torch 2.13, widths of 768 to 2304: 1.1 to 1.9 TFLOP/s in this range, 2.2 to 3.8 around it. Many
    threads would have too little to do with fewer rows.
    """
    if not 512 <= rows <= 1280 or columns >= 1536 or not 1 < torch.get_num_threads() <= _FEW_THREADS:
        return False
    return columns < 1024 or 660_000 <= rows * inner <= 1_500_000


def _shape(x: Tensor, _number: Tensor, _bias: Tensor | None, out_features: int, _activation: str, _kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


__all__ = ["PackedLinear", "can_pack", "gelu_linear", "held_bytes", "pack", "packed", "row_step"]
