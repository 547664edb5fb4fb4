"""Networks as ONNX graphs, written by torch's exporter and run by onnxruntime.

Shapes: B images, C channels, L blocks. The exporter is the one of `torch.export` (`dynamo=True`): it names weights as the module
does, keeps LayerNormalization and Gelu as one node each, and is not deprecated, as the tracer is; the tracer's graphs have twice as
many nodes. Both give the same numbers.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyfusion.core.errors import UserError
from tinyfusion.core.version import __version__
from tinyfusion.families.stage import Stage
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import mix_guidance

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20  # the first with Gelu, which browsers and phones run too
_SCOPES = (
    "pkg.torch.onnx.name_scopes"  # of a node in the exporter's notes: the modules that made it, the innermost last
)
_BATCH = "batch"
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_TAKEN_FOR_0 = 1e-7  # the optimiser's rules compare constants to within 1e-8
EXAMPLES = 2  # rows of an example; one alone would become a constant


def onnx_module(name: str) -> Any:
    """A module of the extra `onnx`. Raises UserError where it is not installed."""
    # else onnxruntime writes an id into the home folder, and may report to its maker
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        importlib.import_module("onnxscript")  # which torch's exporter needs
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"graphs need the packages onnx, onnxscript and onnxruntime, got none named {error.name}: pip install tinyfusion[onnx]"
        ) from error


class _Called(nn.Module):
    """A stage as a module of positional tensors, which is what is exported."""

    def __init__(self, stage: Stage, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.run, self.names = stage.network, stage.run, names

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with _TinySums():
            return self.run(**dict(zip(self.names, tensors, strict=True)))


class _TinySums(TorchFunctionMode):
    """Additions of tiny numbers as those of a tensor with one axis: onnxscript takes the numbers for 0, and x / (x + 1e-15) is NaN at 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SUMS and isinstance(args[1], float) and 0 < abs(args[1]) < _TAKEN_FOR_0 and args[0].ndim:
            args = (args[0], args[0].new_full((1,), args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def onnx_graph(model: LoadedModel, *, guided: bool = False, switches: bool = False) -> ModelProto:
    """The network of a model of images as one graph, weights included. Serialise graphs below 2 GB with `SerializeToString()`.

    Inputs: x (B, C, H, W) float32, t (B,) float32 as the network takes it (original steps 0 to 999, or times of a flow), y (B,)
    int64 in 0..K, K the null class. Models of texts have embeddings (B, N, E) float32 and mask (B, N) float32 instead of y.
    Output: `output` (B, C_out, H, W) float32, as the network gives it. guided: also the input `guidance` (1,) float32, and the output
    under classifier-free guidance as `sample` computes it, at twice the work. switches: also the input `gates` (L,) float32, by which
    the update of every block is multiplied: 1 runs it, 0 leaves it out (as `BlockStack.gated`). B may differ from call to call.
    Raises UserError for models with routers, for models that draw in stages, without a null class if guided, where the exporter
    fails, and without the packages of the extra `onnx`.
    """
    return exported(denoiser(model, guided=guided, switches=switches))


def stages_of(model: LoadedModel, *, guided: bool = False) -> dict[str, Stage]:
    """The graphs of a model by name: `model` alone, or the stages of its family. Raises UserError as `onnx_graph` does."""
    if model.family.stages is None:
        return {"model": denoiser(model, guided=guided)}
    if guided:
        raise UserError(
            "its guidance differs from round to round, and is mixed between its two graphs: leave out --guided"
        )
    return model.family.stages(model.module)


def denoiser(model: LoadedModel, *, guided: bool = False, switches: bool = False) -> Stage:
    """What `onnx_graph` exports. Raises UserError for models that are no single network, and without a null class if guided."""
    if model.dynamic is not None:
        raise UserError(
            "its routers choose heads, channels and tokens anew at every timestep, which one graph cannot; the graph of everything "
            "would draw other images, at the cost of the teacher: export the static model that it was made from"
        )
    if model.family.stages is not None:
        raise UserError(
            f"samplers call models of the family {model.family.name} in stages: one graph cannot draw with it"
        )
    arch, module, table = model.arch, model.module, model.conditions
    null = dict(model.family.inputs(table.index(slice(1)).null())) if guided else {}

    def example(num: int, generator: torch.Generator) -> dict[str, Tensor]:
        labels = torch.randint(len(table), (num,), generator=generator)
        t = torch.rand(num, generator=generator)  # half as in a flow, half as original steps
        tensors = {
            "x": torch.randn(num, arch.in_channels, arch.input_size, arch.input_size, generator=generator),
            "t": torch.where(torch.arange(num) % 2 == 0, t, t * 999),
            **{name: value for name, value in model.family.inputs(table.index(labels)).items() if value is not None},
        }
        tensors |= {"guidance": 1 + torch.rand(1, generator=generator)} if guided else {}
        return tensors | ({"gates": torch.rand(len(model.stack), generator=generator)} if switches else {})

    def run(
        x: Tensor, t: Tensor, guidance: Tensor | None = None, gates: Tensor | None = None, **condition: Tensor
    ) -> Tensor:
        for tensor in (t, *condition.values()):
            torch._check(tensor.shape[0] == x.shape[0])  # else the exporter takes them for sizes of their own
        with contextlib.nullcontext() if gates is None else model.stack.gated(gates.unsqueeze(0)):
            if guidance is None:
                return module(x, t, **condition)
            doubled = {name: torch.cat([value, null[name].expand_as(value)]) for name, value in condition.items()}
            both = module(torch.cat([x, x]), torch.cat([t, t]), **doubled)
            return mix_guidance(both, guidance, model.guided_channels)

    of_images = ("x", "t", *model.family.inputs(table.index(slice(1))), "output")
    return Stage(module, run, example, {name: {0: _BATCH} for name in of_images})


def exported(stage: Stage, all_vary: bool = True) -> ModelProto:
    """The graph of a function. Raises UserError where the exporter does not take it, with its reason.

    all_vary: False: axes of `varying` whose length the exporter makes a constant are no error, and have that length in the graph.
    """
    onnx_module("onnx")
    inputs = stage.example(EXAMPLES, torch.Generator().manual_seed(0))
    kind = torch.export.Dim.DYNAMIC if all_vary else torch.export.Dim.AUTO
    dynamic = [dict.fromkeys(stage.varying.get(name, {}), kind) for name in inputs]
    was_training = stage.network.training
    stage.network.eval()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Called(stage, list(inputs)).eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(stage.outputs),
                dynamic_shapes=(tuple(each or None for each in dynamic),),
                verbose=False,
            )
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"torch's exporter does not take this network: {reason_of(error)}") from error
    finally:
        stage.network.train(was_training)
    assert program is not None
    return _plain(program.model_proto, stage.varying)


def _without_idle_squeezes(graph: ModelProto) -> None:
    """Let squeezes of axes longer than 1 do nothing, as in torch; in a graph they are an error. An axis of any length is no 1 in torch."""
    read = onnx_module("onnx.numpy_helper").to_array
    constants = {each.name: each for each in graph.graph.initializer}
    shapes = {each.name: each.type.tensor_type.shape.dim for each in graph.graph.value_info}
    for node in graph.graph.node:
        if (
            node.op_type == "Squeeze"
            and len(node.input) == 2
            and node.input[0] in shapes
            and node.input[1] in constants
        ):
            axes = read(constants[node.input[1]]).reshape(-1)
            squeezed = [shapes[node.input[0]][axis] for axis in axes]
            if any(axis.dim_param or axis.dim_value > 1 for axis in squeezed):
                node.op_type = "Identity"
                del node.input[1:]


def _with_choices_of_bytes(graph: ModelProto) -> None:
    """Let choices between booleans be choices between bytes: onnxruntime has no kernel of `Where` for booleans on a CPU."""
    types, make = onnx_module("onnx").TensorProto, onnx_module("onnx.helper").make_node
    kinds = {each.name: each.type.tensor_type.elem_type for each in graph.graph.value_info}
    nodes = []
    for node in graph.graph.node:
        if node.op_type != "Where" or kinds.get(node.output[0]) != types.BOOL:
            nodes.append(node)
            continue
        name = node.output[0]
        operands = [f"{name}.{number}" for number in (1, 2)]
        nodes += [make("Cast", [node.input[n]], [operands[n - 1]], to=types.UINT8) for n in (1, 2)]
        nodes.append(make("Where", [node.input[0], *operands], [f"{name}.byte"]))
        nodes[-1].metadata_props.extend(node.metadata_props)
        nodes.append(make("Cast", [f"{name}.byte"], [name], to=types.BOOL))
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)


def _plain(graph: ModelProto, varying: Mapping[str, Mapping[int, str]]) -> ModelProto:
    """The graph without the exporter's notes, which name source files of this machine. Nodes are named by module, such as
    `network.blocks.3.attn.qkv.MatMul_81`, and varying axes by `varying`.
    """
    _without_idle_squeezes(graph)
    _with_choices_of_bytes(graph)
    graph.producer_name, graph.producer_version = "tinyfusion", __version__
    for number, node in enumerate(graph.graph.node):
        scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), "[]")
        modules = [name for name in ast.literal_eval(scopes) if name.startswith("network")]
        node.name = f"{(modules or ['sampler'])[-1]}.{node.op_type}_{number}"
    for noted in (graph, graph.graph, *graph.graph.node):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    graph.graph.ClearField("value_info")
    graph.graph.name = "network"
    for value in (*graph.graph.input, *graph.graph.output):
        value.ClearField("metadata_props")
        for axis, name in varying.get(value.name, {}).items():
            if value.type.tensor_type.shape.dim[axis].dim_param:
                value.type.tensor_type.shape.dim[axis].dim_param = name
    return graph


def reason_of(error: Exception) -> str:
    """The innermost message of an exporter's error, in one line."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return lines[0] if lines else type(inner).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings about packages and classes that are not ours."""
    loggers: Sequence[logging.Logger] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
