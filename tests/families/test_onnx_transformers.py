"""Graphs of transformers of diffusers: onnxruntime gives the numbers of the gated parent, at sizes that were not traced."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny, draw, mask, outputs
from tiny_images import IMAGES
from tiny_video import VIDEO

import tinyfusion
from prompt_pipelines import save_flux_pipeline
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.export.onnx_transformer import named_tensors
from tinyfusion.export.transformer import write_transformer
from tinyfusion.families.diffusers_classes.folder import TransformerFolder, open_transformer
from tinyfusion.families.diffusers_classes.rows import shipped_rows

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
Run = Callable[..., Any]


def tiny(name: str, tag: str = "") -> Tiny:
    return next(each for each in (*IMAGES, *VIDEO) if (each.name, each.tag) == (name, tag))


def with_short_texts(given: dict[str, Any]) -> dict[str, Any]:
    """The texts of a call with 7 tokens, three fewer than the traced ones."""
    texts = given["encoder_hidden_states"]
    return {**given, "encoder_hidden_states": draw(len(texts), 7, texts.shape[-1])}


def masked(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "encoder_attention_mask": mask(*given["encoder_hidden_states"].shape[:2])}


def pruned(opened: TransformerFolder, folder: Path) -> tuple[TransformerFolder, torch.Tensor]:
    """The student with the last block of every list, written; and the gates that remove the others of the parent."""
    kept = {path: [depth - 1] for path, depth in opened.depths.items()}
    student = opened.cut(PrunePlan(kept, dict(opened.depths), "indices"))
    write_transformer(student, folder, "student")
    gates = [float(i in kept[path]) for path, depth in opened.depths.items() for i in range(depth)]
    return student, torch.tensor([gates])


def found(folder: Path, given: dict[str, Any]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed, dtypes = dict(named_tensors(given)), {"tensor(float)": np.float32, "tensor(bool)": np.bool_}
    return session.run(
        None, {each.name: feed[each.name].numpy().astype(dtypes[each.type]) for each in session.get_inputs()}
    )


def close(found: np.ndarray, wanted: torch.Tensor) -> bool:
    scale = max(1.0, float(wanted.abs().max()))
    return found.shape == tuple(wanted.shape) and float(np.abs(found - wanted.numpy()).max()) <= 1e-4 * scale


SHORT = [
    (tiny("SD3Transformer2DModel"), with_short_texts),
    (tiny("SanaTransformer2DModel"), lambda given: masked(with_short_texts(given))),
    (tiny("WanTransformer3DModel"), with_short_texts),
]


@pytest.mark.parametrize(("model", "changed"), SHORT, ids=[each.title for each, _ in SHORT])
def test_the_graph_of_a_student_is_the_gated_parent(model: Tiny, changed: Any, run: Run, tmp_path: Path) -> None:
    """Three images, of a size and with texts of a length that were not traced."""
    model.model().save_pretrained(tmp_path / "parent")
    opened = open_transformer(tmp_path / "parent", shipped_rows())
    _, gates = pruned(opened, tmp_path / "student")
    made = run("export", "--model", tmp_path / "student", "--to", "onnx", "--out", tmp_path / "graph")
    assert made["largest_difference"] < 1e-4 and made["graphs"] == ["model"]
    given, parent = changed(model.given(3)), opened.module()
    assert made["inputs"]["hidden_states"]["shape"][-2:] == ["height", "width"]
    assert made["inputs"]["encoder_hidden_states"]["shape"][:2] == ["batch", "text_tokens"]
    with opened.stack(parent).gated(gates):
        (wanted,) = outputs(parent, given)
    assert not close(outputs(parent, given)[0].numpy(), wanted)
    assert close(found(tmp_path / "graph", given)[0], wanted)


def test_a_pipeline_draws_with_the_graph_of_flux(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page and the card of the folder say; what is finished stays."""
    from diffusers import FluxPipeline

    monkeypatch.chdir(tmp_path)
    save_flux_pipeline(Path("FLUX.1-dev"), num_layers=2, num_single_layers=2)
    run("prune", "--teacher", "FLUX.1-dev", "--keep", "0,3", "--out", "runs/flux")
    command = ["export", "--model", "runs/flux", "--to", "onnx", "--out", "made/flux"]
    dry = run(*command, "--dry-run")
    assert not Path("made").exists()
    made = run(*command)
    assert dry["model"] == made["model"] and made["largest_difference"] < 1e-4
    card = Path("made/flux/README.md").read_text()
    assert Path("made/flux/plan.png").is_file() and not list(Path("made").glob(".*"))
    monkeypatch.chdir("made/flux")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names := {})  # type: ignore[index]
    assert names["outputs"][0].shape == (2, 24, 16)
    monkeypatch.chdir(tmp_path)
    facts = json.loads(Path("made/flux/sampler.json").read_text())
    assert facts["prediction"] == "velocity: noise - data" and facts["time_scale"] == 1.0 and facts["guidance"] == 3.5
    assert facts["scheduler"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert facts["inputs"]["img_ids"] == {"shape": ["image_tokens", 3], "dtype": "float32"}
    before = Path("made/flux/model.onnx").stat().st_mtime_ns
    assert run(*command)["model"] == made["model"]
    assert Path("made/flux/model.onnx").stat().st_mtime_ns == before
    assert "made with another recipe (quantize:" in run(*command, "--quantize", "int8")
    code = next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "forward" in code)
    exec(code.replace("digits-flux", "FLUX.1-dev"), names := {})
    drawing = dict(prompt="ab", height=24, width=16, num_inference_steps=2, output_type="latent", guidance_scale=2.0)
    drawn = names["pipeline"](generator=torch.Generator().manual_seed(0), **drawing).images
    from diffusers import FluxTransformer2DModel

    student = FluxTransformer2DModel.from_pretrained("runs/flux/student")
    with_torch = FluxPipeline.from_pretrained("FLUX.1-dev", transformer=student)
    with_torch.set_progress_bar_config(disable=True)
    wanted = with_torch(generator=torch.Generator().manual_seed(0), **drawing).images
    assert close(drawn.numpy(), wanted)


def recorded(model: Tiny, folder: Path) -> Path:
    """A saved model, and three calls of it in `calls.safetensors`."""
    module = model.model()
    module.save_pretrained(folder)
    with torch.no_grad(), tinyfusion.record_inputs(module, folder.parent / "calls.safetensors"):
        for _ in range(3):
            module(**model.given(1))
    return folder


def test_recorded_calls_give_the_sizes_of_a_class_that_no_row_calls(run: Run, tmp_path: Path) -> None:
    """Quantized: the float32 form is compared before."""
    whole = tiny("DreamLiteTransformer2DModel")
    model = dataclasses.replace(whole, config={**whole.config, "num_layers": 1})
    command = ["export", "--model", recorded(model, tmp_path / "m"), "--to", "onnx", "--out", tmp_path / "graph"]
    assert "is not known how pipelines call a DreamLiteTransformer2DModel: give recorded calls, --inputs" in run(
        *command
    )
    made = run(*command, "--inputs", tmp_path / "calls.safetensors", "--quantize", "int8")
    assert made["inputs"]["hidden_states"]["shape"] == ["batch", 8, 4, 4]
    assert made["largest_difference"] < 1e-4 < made["quantized_error"] < 0.1
    assert "Its weights have 8 bits (int8)" in (tmp_path / "graph" / "README.md").read_text()
    given = model.given(3)
    wanted = outputs(model.model(), given)[0].numpy()
    assert np.square(found(tmp_path / "graph", given)[0] - wanted).mean() < 0.01 * np.square(wanted).mean()


REFUSED = [
    ("LTXVideoTransformer3DModel", [], "have one size of frames, height, width: give recorded calls of that size, --inputs"),
    ("LTXVideoTransformer3DModel", ["--guided"], "mixes its guidance: leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_what_has_no_graph_without_more_is_refused(
    name: str, options: list[str], said: str, run: Run, tmp_path: Path
) -> None:
    tiny(name).model().save_pretrained(tmp_path / "m")
    assert said in run("export", "--model", tmp_path / "m", "--to", "onnx", "--out", tmp_path / "graph", *options)
    assert not (tmp_path / "graph").exists()


def test_what_the_exporter_does_not_take_is_one_line(run: Run, tmp_path: Path) -> None:
    model = recorded(tiny("QwenImage21Transformer2DModel"), tmp_path / "m")
    command = ["export", "--model", model, "--to", "onnx", "--out", tmp_path / "graph"]
    said = run(*command, "--inputs", tmp_path / "calls.safetensors")
    assert "torch's exporter does not take this network: Could not guard on data-dependent expression" in said
    assert not (tmp_path / "graph").exists()
