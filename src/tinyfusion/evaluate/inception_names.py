"""Tensor names of the TorchScript translation of the Inception network, which follow the nodes of the graph.

Layers are `conv`, `conv_1`, ..., `mixed`, ..., `mixed_10`, with `conv`, `tower`, `tower_1`, ... inside a block; a norm without
a weight has weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_STEM = {
    "conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3", "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}  # fmt: skip
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")  # mixed, mixed_1, ..., mixed_10


def _chain(tower: str, *names: str) -> dict[str, str]:
    """tower_conv, tower_conv_1, ... in turn."""
    return {f"{tower}_conv" + (f"_{i}" if i else ""): name for i, name in enumerate(names)}


_A = {
    "conv": "branch1x1",
    **_chain("tower", "branch5x5_1", "branch5x5_2"),
    **_chain("tower_1", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    **_chain("tower_2", "branch_pool"),
}
_B = {"conv": "branch3x3", **_chain("tower", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")}
_C = {
    "conv": "branch1x1",
    **_chain("tower", "branch7x7_1", "branch7x7_2", "branch7x7_3"),
    **_chain("tower_1", *(f"branch7x7dbl_{i}" for i in range(1, 6))),
    **_chain("tower_2", "branch_pool"),
}
_D = {
    **_chain("tower", "branch3x3_1", "branch3x3_2"),
    **_chain("tower_1", *(f"branch7x7x3_{i}" for i in range(1, 5))),
}
_E = {
    "conv": "branch1x1",
    **_chain("tower", "branch3x3_1"),
    **_chain("tower_mixed", "branch3x3_2a", "branch3x3_2b"),
    **_chain("tower_1", "branch3x3dbl_1", "branch3x3dbl_2"),
    **_chain("tower_1_mixed", "branch3x3dbl_3a", "branch3x3dbl_3b"),
    **_chain("tower_2", "branch_pool"),
}
_BLOCKS = (_A, _A, _A, _B, _C, _C, _C, _C, _D, _E, _E)
_ROLES = {
    "bn.running_mean": ("running_mean", "mean", "moving_mean"),
    "bn.running_var": ("running_var", "var", "variance", "moving_variance"),
    "bn.bias": ("bias", "beta", "offset"),
    "bn.weight": ("weight", "gamma", "scale"),
}


def layer_names() -> dict[str, str]:
    """Map layer names of the graph, with "_" for ".", to ours: "mixed_6_conv" to "Mixed_6d.branch1x1"."""
    layers = dict(_STEM)
    for i, (suffix, block) in enumerate(zip(_MIXED, _BLOCKS, strict=True)):
        graph = f"mixed_{i}" if i else "mixed"
        layers |= {f"{graph}_{theirs}": f"Mixed_{suffix}.{ours}" for theirs, ours in block.items()}
    return layers


def ours_from_graph_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the translation (`layers.LAYER...`, `output.weight`, `output.bias`) to the 472 names used here.

    Within a layer the kernel is recognised by its four dimensions, other tensors by the last component of the name. Raises
    ValueError on unknown layers and tensors.
    """
    names = layer_names()
    layers: dict[str, dict[str, Tensor]] = {}
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        if path == "output" and last in ("weight", "bias"):
            renamed[f"fc.{last}"] = value
        elif last != "num_batches_tracked" and name.startswith("layers."):
            layer = _layer(path.removeprefix("layers.").replace(".", "_"), names)
            role = next((role for role, spellings in _ROLES.items() if last in spellings), None)
            role = "conv.weight" if value.dim() == 4 else role
            if layer is None or role is None:
                raise ValueError(f"tensor {name} {tuple(value.shape)} has no place in the network")
            layers.setdefault(layer, {})[role] = value
    for layer, roles in layers.items():
        if "conv.weight" in roles:
            roles.setdefault("bn.weight", torch.ones(len(roles["conv.weight"])))
        renamed |= {f"{layer}.{role}": value for role, value in roles.items()}
    return renamed


def _layer(path: str, names: Mapping[str, str]) -> str | None:
    """The layer at `path`, or the layer whose convolution or norm is at `path`."""
    for ending in ("", "_conv", "_bn"):
        if path.endswith(ending) and (layer := names.get(path.removesuffix(ending))) is not None:
            return layer
    return None
