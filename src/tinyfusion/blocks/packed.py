"""Inference-only linear layers with weights prepacked for oneDNN (bfloat16 on CPU).

torch packs a bfloat16 weight in every call, which takes a fifth of a product of the published sizes, and computes a GELU in a
separate pass, which takes as long as the product before it. Here both are oneDNN's, in one call.
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

from tinyfusion.blocks.packed_int8 import Int8Linear

_SMALLEST = 2**18  # weights of a layer; for fewer, the call costs more than it saves
_TILE = 32  # inner size of a matrix unit: other sizes take up to twice as long, so weights are padded with zeros
_TILE_ROWS = 16
_ROW_COUNTS = 32  # different numbers of rows that a layer may get
_ROWS_AT_ONCE = 256
_FEW_THREADS = 4
_PACKED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_NUMBERS = count()
_NAMESPACE = "tinyfusion"


class PackedLinear(nn.Module):
    """x (..., in) -> (..., out) as `nn.Linear`, in its dtype, without a weight to train, prune or save.

    The compiler accepts no tensor in oneDNN's layout, so the operator gets its number, and blocks share a compilation.
    """

    number: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        number = next(_NUMBERS)
        weight = F.pad(layer.weight.detach(), (0, -layer.in_features % _TILE))
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        _PACKED[number] = self.packed  # for the lifetime of this layer
        self.register_buffer("number", torch.tensor(number))
        bias: Tensor | None = layer.bias  # None is missing in torch's annotation
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.operator = _operator()

    @property
    def num_bytes(self) -> int:
        rows = _TILE * math.ceil(self.in_features / _TILE) + (self.bias is not None)
        return rows * self.out_features * self.packed.element_size()

    def forward(self, x: Tensor, activation: str = "none", kind: str = "") -> Tensor:
        """The output of the layer, after an activation by oneDNN's names."""
        out: Tensor = self.operator(x, self.number, self.bias, self.out_features, activation, kind)
        return out


def gelu_linear(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """GELU of the output of a linear layer, "none" or "tanh" as in `F.gelu`; a packed layer computes both at once."""
    if isinstance(layer, PackedLinear):
        return layer.forward(x, "gelu", approximate)
    return F.gelu(layer(x), approximate=approximate)


def row_step(layer: nn.Module, most: int) -> int:
    """The multiple to which a varying number of input rows of a layer, at most `most`, should be rounded up.

    oneDNN generates code for every number of rows of a packed layer, which takes several times as long as the product.
    """
    return _TILE_ROWS * math.ceil(most / (_ROW_COUNTS * _TILE_ROWS)) if isinstance(layer, PackedLinear) else 1


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layers of this dtype run here: bfloat16, on a CPU for which oneDNN supports it."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(layer: nn.Module, smallest: int | None = None) -> nn.Module:
    """A `PackedLinear` for a linear layer with `smallest` weights or more; any other module itself."""
    if type(layer) is nn.Linear and layer.weight.numel() >= (_SMALLEST if smallest is None else smallest):
        return PackedLinear(layer)
    return layer


def pack(modules: Iterable[nn.Module], smallest: int | None = None) -> None:
    """Replace the layers inside of `modules` by `packed` ones. Only the modules' own `forward` may read them."""
    for module in modules:
        for parent in list(module.modules()):
            for name, layer in parent.named_children():
                setattr(parent, name, packed(layer, smallest))


def held_bytes(module: nn.Module) -> int:
    """Bytes of all weights of a module, with packed ones."""
    plain = sum(p.numel() * p.element_size() for p in module.parameters())
    return plain + sum(layer.num_bytes for layer in module.modules() if isinstance(layer, PackedLinear | Int8Linear))


@cache
def _operator() -> torch._ops.OpOverloadPacket:
    """The product as an operator of torch, for compiled graphs."""
    library = torch.library.Library(_NAMESPACE, "DEF")
    library.define(
        "packed_linear(Tensor x, Tensor number, Tensor? bias, int out_features, str activation, str kind) -> Tensor"
    )
    library.impl("packed_linear", _packed_linear, "CPU")
    torch.library.register_fake(f"{_NAMESPACE}::packed_linear", _shape, lib=library)
    _LIBRARIES.append(library)
    operator: torch._ops.OpOverloadPacket = getattr(torch.ops, _NAMESPACE).packed_linear
    return operator


_LIBRARIES: list[torch.library.Library] = []  # operators are removed with the object that defined them


def _packed_linear(
    x: Tensor, number: Tensor, bias: Tensor | None, out_features: int, activation: str, kind: str
) -> Tensor:
    weight = _PACKED[int(number)]
    x = F.pad(x, (0, -x.shape[-1] % _TILE)) if x.shape[-1] % _TILE else x

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)
        return out

    rows = x.numel() // x.shape[-1]
    if not _should_split(rows, x.shape[-1], out_features):
        return product(x)
    at_once = _TILE_ROWS * math.ceil(rows / math.ceil(rows / _ROWS_AT_ONCE) / _TILE_ROWS)
    return torch.cat([product(some) for some in x.reshape(rows, -1).split(at_once)]).view(*x.shape[:-1], out_features)


def _should_split(rows: int, inner: int, columns: int) -> bool:
    """Whether oneDNN leaves half of the CPU idle in a product of this size, and is faster with fewer rows at a time.

    Measured on two cores with torch 2.13, widths of 768 to 2304: 1.1 to 1.9 TFLOP/s in this range, 2.2 to 3.8 around it. Many
    threads would have too little work with fewer rows.
    """
    if not 512 <= rows <= 1280 or columns >= 1536 or not 1 < torch.get_num_threads() <= _FEW_THREADS:
        return False
    return columns < 1024 or 660_000 <= rows * inner <= 1_500_000


def _shape(x: Tensor, _number: Tensor, _bias: Tensor | None, out_features: int, _activation: str, _kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
