"""Graphs give the numbers of the network, of the guided denoiser, and of blocks that are switched off."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import ROWS, tiny
from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.errors import UserError
from tinyfusion.export import onnx_folder
from tinyfusion.export.onnx_graph import OPSET, denoiser, exported, onnx_graph
from tinyfusion.export.onnx_int8 import FORMS, outside_lists, quantized
from tinyfusion.models.attach import attach
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.sample.drive import guided

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def fed(model: LoadedModel, num: int, seed: int = 0) -> dict[str, Any]:
    """Random x, t and condition of `num` images, by the names of the graph's inputs."""
    generator = torch.Generator().manual_seed(seed)
    arch, table = model.arch, model.conditions
    x = torch.randn(num, arch.in_channels, arch.input_size, arch.input_size, generator=generator)
    rows = torch.randint(len(table), (num,), generator=generator)
    return {"x": x, "t": torch.rand(num, generator=generator) * 999, "condition": table.index(rows)}


def graph_inputs(model: LoadedModel, values: dict[str, Any], **more: torch.Tensor) -> dict[str, np.ndarray]:
    condition: Condition = values["condition"]
    tensors = {"x": values["x"], "t": values["t"], **model.family.inputs(condition), **more}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def session(graph: Any) -> Any:
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def close(found: np.ndarray, wanted: torch.Tensor) -> bool:
    scale = max(1.0, float(wanted.abs().max()))
    return found.shape == tuple(wanted.shape) and float(np.abs(found - wanted.numpy()).max()) <= 1e-4 * scale


@torch.no_grad()
def test_a_graph_gives_the_numbers_of_the_guided_denoiser_with_blocks_switched_off() -> None:
    model = tiny("dit")
    graph = onnx_graph(model, guided=True, switches=True)
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", OPSET)]
    runner = session(graph)
    for num, scale, gates in ((1, 1.0, [1, 1, 1, 1]), (3, 2.5, [1, 0, 1, 0.5])):
        values, switched = fed(model, num), torch.tensor([gates], dtype=torch.float32)
        more = {"guidance": torch.tensor([scale]), "gates": switched[0]}
        with model.stack.gated(switched):
            wanted = guided(model, values["condition"], scale, model.guided_channels)(values["x"], values["t"])
        assert close(runner.run(["output"], graph_inputs(model, values, **more))[0], wanted)


@torch.no_grad()
def test_the_plain_graph_has_the_documented_inputs_and_names_no_file_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("dit")
    graph = onnx_graph(model)
    runner = session(graph)
    assert [(each.name, each.shape, each.type) for each in runner.get_inputs()] == [
        ("x", ["batch", 2, 4, 4], "tensor(float)"), ("t", ["batch"], "tensor(float)"), ("y", ["batch"], "tensor(int64)")
    ]  # fmt: skip
    assert [(each.name, each.shape) for each in runner.get_outputs()] == [("output", ["batch", 4, 4, 4])]
    assert b".py" not in graph.SerializeToString()
    assert any(node.name.startswith("network.blocks.3.attn.qkv.MatMul_") for node in graph.graph.node)
    values = fed(model, 2)
    wanted = model.module(values["x"], values["t"], **model.family.inputs(values["condition"]))
    assert close(runner.run(["output"], graph_inputs(model, values))[0], wanted)
    stage = denoiser(model)
    monkeypatch.setattr(onnx_folder, "EXTERNAL_BYTES", 1000)
    path = tmp_path / "model.onnx"
    onnx_folder.save_graph(graph, path)
    assert 0 < path.stat().st_size < path.with_name("model.onnx.data").stat().st_size
    assert onnx_folder.check_graph(path, stage) < onnx_folder.TOLERANCE
    again = onnx_folder.read_graph(path)
    assert not path.with_name("model.onnx.data").exists()
    monkeypatch.undo()
    # with AVX2 alone, onnxruntime adds pairs of products of bytes in 16 bits, which overflow: 0.14
    narrow = torch.backends.cpu.get_cpu_capability() == "AVX2"
    largest = {"int8": 0.2 if narrow else 0.05, "int8-weights": 0.05}
    for form in FORMS:
        small = quantized(copy.deepcopy(again), form, [outside_lists(model.module)])
        onnx_folder.save_graph(small, path)
        assert onnx_folder.TOLERANCE < onnx_folder.differences(path, stage)[1] < largest[form]
        whole = {each.name.rpartition(".MatMul")[0] for each in small.graph.initializer if each.name.endswith("_int8")}
        assert "network.blocks.0.mlp.fc1" in whole and not any("final_layer" in name for name in whole)


def test_models_that_are_no_single_network_are_refused_with_the_reason() -> None:
    routed = attach(new_model("dit", dict(ROWS["dit"], hidden_size=32, num_heads=4), 0), DynamicSettings())
    with pytest.raises(UserError, match="routers choose heads, channels and tokens anew at every timestep"):
        onnx_graph(routed.loaded)
    with pytest.raises(UserError, match="in stages"):
        onnx_graph(tiny("mar"))


def test_an_error_of_the_exporter_is_told_in_one_line() -> None:
    stage = denoiser(tiny("dit"))

    def by_value(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(UserError, match="torch's exporter does not take this network: ."):
        exported(dataclasses.replace(stage, run=by_value))
