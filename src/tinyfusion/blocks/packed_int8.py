"""Inference-only linear layers of whole numbers: int8 weights, prepacked for oneDNN, and inputs quantized at every call (CPU).

torchao computes the same products step by step outside of a compiled graph, at several times the cost of float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_LARGEST, _ZERO = 127, 128
_SMALLEST = 2**10  # weights of a layer


class Int8Linear(nn.Module):
    """x (..., in) -> (..., out) as `nn.Linear`, without a weight to train, prune or save.

    Weights have a scale per output channel, inputs one per row, so that an image does not depend on others of its batch; both are
    symmetric around 0, and the largest value is 127.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        self.scale = (weight.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        whole = (weight / self.scale.unsqueeze(1)).round().to(torch.int8)
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(whole, None)
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)
        bias: Tensor | None = layer.bias  # None is missing in torch's annotation
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @property
    def num_bytes(self) -> int:
        return self.in_features * self.out_features + 4 * self.out_features * (1 + (self.bias is not None))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = (rows.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        whole = (rows / scale).round_().add_(_ZERO).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, _ZERO, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        out = product.mul_(scale) if self.bias is None else torch.addcmul(self.bias, product, scale)
        return out.view(*x.shape[:-1], self.out_features)


def can_quantize(device: torch.device) -> bool:
    """Whether such layers run on a device."""
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")
    )


def quantize(modules: Iterable[nn.Module]) -> None:
    """Replace the linear layers inside of `modules`, but for the smallest ones. Only the modules' own `forward` may read them."""
    for module in modules:
        for parent in list(module.modules()):
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and layer.weight.numel() >= _SMALLEST:
                    setattr(parent, name, Int8Linear(layer))
