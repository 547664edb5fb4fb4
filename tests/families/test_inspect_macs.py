"""Multiply-accumulates of a recorded call, per list of blocks, counted without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import Tiny
from tiny_images import IMAGES
from tiny_video import VIDEO

from tinyfusion import record_inputs
from tinyfusion.commands.transformers import inspect_transformer, prune_transformer
from tinyfusion.config.recipe import PruneSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.transformer_sources import transformer_of
from tinyfusion.models.macs import macs_by_module

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
NAMES = ("FluxTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel", "ZImageTransformer2DModel")
BY_VALUES = ("QwenImage21Transformer2DModel", "HiDreamImageTransformer2DModel", "MochiTransformer3DModel")


@pytest.mark.parametrize("name", [*NAMES, *BY_VALUES])
def test_counted_on_shapes_as_on_real_tensors(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each list's share is that of its blocks, and what a student saves is what its removed blocks had."""
    tiny = _tiny(name)
    model, call = tiny.model(), tiny.given(2)
    model.save_pretrained(tmp_path / "model")
    with record_inputs(model, tmp_path / "inputs.safetensors"), torch.no_grad():
        model(**call)
    opened = transformer_of(str(tmp_path / "model"), None)
    assert opened is not None
    facts = inspect_transformer(opened, tmp_path / "inputs.safetensors")
    real = macs_by_module(model, lambda: model(**call))
    assert facts["macs"] == real[""] > 0
    assert ("depends on values: counting on one call" in capsys.readouterr().err) == (name in BY_VALUES)
    for path, each in facts["lists"].items():
        blocks = [real[f"{path}.{i}"] for i in range(each["blocks"])]
        assert (
            each["macs"] == sum(blocks) and min(blocks) > 0 and each["macs_per_block"] == each["macs"] // each["blocks"]
        )
    assert sum(each["macs_share"] for each in facts["lists"].values()) < 1
    recipe = Recipe(teacher=str(tmp_path / "model"), prune=PruneSection(criterion="first"))
    prune_transformer(recipe, RunOptions(tmp_path / "cut"), opened)
    student = transformer_of(str(tmp_path / "cut"), None)
    assert student is not None
    less = inspect_transformer(student, tmp_path / "inputs.safetensors")
    removed = {path: each["blocks"] - less["lists"][path]["blocks"] for path, each in facts["lists"].items()}
    if name not in (
        "SD3Transformer2DModel",
        *BY_VALUES,
    ):  # their blocks differ: the last has no text side, texts are added
        saved = sum(removed[path] * each["macs_per_block"] for path, each in facts["lists"].items())
        assert any(removed.values()) and less["macs"] == facts["macs"] - saved


def test_half_precision_is_counted_on_shapes_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = _tiny("FluxTransformer2DModel")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, call = tiny.model().to(dtype), tiny.given(1)
        call = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in call.items()}
        model.save_pretrained(folder := tmp_path / str(dtype))
        with record_inputs(model, tmp_path / f"{dtype}.safetensors"), torch.no_grad():
            model(**call)
        opened = transformer_of(str(folder), None)
        assert opened is not None
        found.append(inspect_transformer(opened, tmp_path / f"{dtype}.safetensors")["macs"])
    assert found[0] == found[1] > 0 and "depends on values" not in capsys.readouterr().err


def test_inputs_of_another_class_are_refused(tmp_path: Path) -> None:
    flux, qwen = (_tiny(name) for name in ("FluxTransformer2DModel", "QwenImage21Transformer2DModel"))
    for each in (flux, qwen):
        model = each.model()
        model.save_pretrained(tmp_path / each.name)
        with record_inputs(model, tmp_path / f"{each.name}.safetensors"), torch.no_grad():
            model(**each.given(1))
    opened = transformer_of(str(tmp_path / flux.name), None)
    assert opened is not None
    with pytest.raises(
        UserError, match="recorded on a QwenImage21Transformer2DModel, and .* is a FluxTransformer2DModel"
    ):
        inspect_transformer(opened, tmp_path / f"{qwen.name}.safetensors")


def _tiny(name: str) -> Tiny:
    return next(each for each in [*IMAGES, *VIDEO] if each.name == name)
