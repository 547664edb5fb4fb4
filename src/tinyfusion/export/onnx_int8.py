"""Graphs with weights of 8 bits, in standard operators alone.

Every product with a matrix of weights gets int8 weights with one scale per output channel, symmetric around 0, the largest weight
being 127. `int8-weights` restores them to float32 before the product: a quarter of the file, at least the speed of float32. `int8` also
quantizes the other factor to 8 bits, at every call, with one scale and zero point for the whole tensor, and multiplies whole numbers:
a quarter of the file, and faster where the processor multiplies bytes. Products of two computed tensors (attention), convolutions,
tables and biases stay float32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch import nn

from tinyfusion.export.onnx_graph import onnx_module

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Int8Form = Literal["int8", "int8-weights"]
FORMS: tuple[str, ...] = get_args(Int8Form)
_LARGEST = 127


def outside_lists(network: nn.Module) -> str:
    """A regular expression of nodes outside of the network's lists of modules: embedders, first and last layers.

    They have few of the weights, and the error falls by a quarter without them (docs/results/onnx.md), so they stay float32.
    """
    lists = [re.escape(name) for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    return rf"^(?!network\.(?:{'|'.join(lists)})\.)" if lists else "(?!)"


def quantized(graph: ModelProto, form: Int8Form, in_float: Sequence[str] = ()) -> ModelProto:
    """The graph with quantized products; `graph` itself is changed. in_float: regular expressions of names of nodes that stay float32."""
    numpy_helper = onnx_module("onnx.numpy_helper")
    weights = {each.name: each for each in graph.graph.initializer}
    nodes: list[NodeProto] = []
    added: list[Any] = []
    for node in graph.graph.node:
        stays = any(re.search(pattern, node.name) for pattern in in_float)
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights or stays:
            nodes.append(node)
            continue
        transposed = any(each.name == "transB" and each.i for each in node.attribute)
        weight = numpy_helper.to_array(weights.pop(node.input[1]))
        weight = weight.T if transposed else weight
        scale = np.maximum(np.abs(weight).max(axis=0) / _LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
        whole = np.ascontiguousarray(np.rint(weight / scale).astype(np.int8))
        name = f"{node.name}.weight"
        added += [numpy_helper.from_array(whole, f"{name}_int8"), numpy_helper.from_array(scale, f"{name}_scale")]
        nodes += _product(node, name) if form == "int8" else _restored(node, name)
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)
    remaining = [*weights.values(), *added]
    graph.graph.ClearField("initializer")
    graph.graph.initializer.extend(remaining)
    return graph


def _restored(node: NodeProto, name: str) -> list[NodeProto]:
    """The product with weights restored to float32."""
    make = onnx_module("onnx.helper").make_node
    restored = make("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], name=f"{name}.restored", axis=1)
    return [restored, *_with_bias(node, make("MatMul", [node.input[0], name], ["?"], name=node.name))]


def _product(node: NodeProto, name: str) -> list[NodeProto]:
    """The product of whole numbers, with the scales of both sides."""
    make = onnx_module("onnx.helper").make_node
    x, x_scale, x_zero = (f"{node.name}.x_{what}" for what in ("int8", "scale", "zero"))
    scale, whole, as_float = f"{node.name}.scale", f"{node.name}.whole", f"{node.name}.float"
    float32 = int(onnx_module("onnx").TensorProto.FLOAT)
    return [
        make("DynamicQuantizeLinear", [node.input[0]], [x, x_scale, x_zero], name=f"{node.name}.x"),
        make("MatMulInteger", [x, f"{name}_int8", x_zero], [whole], name=whole),
        make("Cast", [whole], [as_float], name=as_float, to=float32),
        make("Mul", [x_scale, f"{name}_scale"], [scale], name=scale),
        *_with_bias(node, make("Mul", [as_float, scale], ["?"], name=node.name)),
    ]


def _with_bias(node: NodeProto, product: NodeProto) -> list[NodeProto]:
    """The last node of a product, and the bias of a Gemm after it."""
    if len(node.input) < 3:
        product.output[0] = node.output[0]
        return [product]
    product.output[0] = f"{node.name}.product"
    make = onnx_module("onnx.helper").make_node
    return [product, make("Add", [product.output[0], node.input[2]], list(node.output), name=f"{node.name}.bias")]
