"""Whole pipelines of diffusers: cut, exported, and drawn with by diffusers alone; LoRAs of the uncut model go on acting."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES, TinyPipeline
from torch import Tensor, nn

from tinyfusion import cli
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.jobs.transformer_sources import transformer_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
Draw = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def diffusers_alone() -> Iterator[Draw]:
    """A process that cannot import tinyfusion, and draws what it is given."""
    command = [sys.executable, "-I", tiny_pipelines.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        source, sink = process.stdout, process.stdin

        def draw(**job: Any) -> dict[str, Any]:
            sink.write(json.dumps(job | {"threads": torch.get_num_threads()}, default=str) + "\n")
            sink.flush()
            answer: dict[str, Any] = json.loads(source.readline())
            assert "error" not in answer, answer["error"]
            return answer

        yield draw
        sink.close()


def run(*arguments: Any) -> None:
    assert cli.main([*map(str, arguments)]) == 0


def kept_of(family: TinyPipeline, opened: TransformerFolder) -> list[int]:
    """Blocks that stay, counted through the lists."""
    blocks = [(path, i) for path, depth in opened.depths.items() for i in range(depth)]
    return [number for number, (path, i) in enumerate(blocks) if i not in family.tiny.removed.get(path, ())]


def gated(family: TinyPipeline, opened: TransformerFolder, pipeline: Any) -> Tensor:
    """What the uncut pipeline draws with the blocks switched off that the cut removes."""
    stack = opened.stack(pipeline.transformer)
    gates = torch.zeros(1, len(stack))
    gates[0, kept_of(family, opened)] = 1
    with stack.gated(gates):
        return family.drawn(pipeline)


def add_lora(pipeline: Any, opened: TransformerFolder, folder: Path) -> Path:
    """The file of a LoRA made by peft on every linear layer of the blocks, saved by diffusers; it stays on the pipeline."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = pipeline.transformer
    lists = tuple(f"{path}." for path in opened.depths)
    layers = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name.startswith(lists)]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=layers))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    metadata = _collate_lora_metadata({"transformer": model})
    type(pipeline).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model), **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", PIPELINES, ids=lambda family: family.name)
def test_a_cut_pipeline_is_the_gated_one_in_diffusers(
    family: TinyPipeline, diffusers_alone: Draw, tmp_path: Path
) -> None:
    """Bit for bit, without a tensor too few or too many; with a LoRA of the uncut model to 1e-5, without a warning."""
    source, out, lora = tmp_path / "source", tmp_path / "out", None
    family.build().save_pretrained(source)
    pipeline = family.build()
    opened = transformer_of(str(source), None)
    assert opened is not None
    keep = ",".join(map(str, kept_of(family, opened)))
    run("prune", "--teacher", source, "--keep", keep, "--out", tmp_path / "run")
    run("export", "--model", tmp_path / "run", "--to", "diffusers", "--pipeline", "--out", out)
    whole, wanted = family.drawn(pipeline), {"cut": gated(family, opened, pipeline)}
    assert torch.isfinite(whole).all() and not torch.equal(whole, wanted["cut"]), "the blocks matter"
    if family.lora:
        file, lora = add_lora(pipeline, opened, tmp_path / "lora"), tmp_path / "light.safetensors"
        run("lora", file, "--model", tmp_path / "run", "--out", lora)
        wanted["lora"] = gated(family, opened, pipeline)
        assert not torch.allclose(wanted["lora"], wanted["cut"], atol=1e-3), "the LoRA matters"
    answer = diffusers_alone(name=family.name, folder=out, lora=lora, out=tmp_path / "drawn.safetensors")
    assert answer["class"] == family.name
    assert not any(answer["loading"].values()), answer["loading"]
    assert answer["said"] == []
    drawn = load_file(tmp_path / "drawn.safetensors")
    assert torch.equal(drawn.pop("cut"), wanted.pop("cut"))
    assert drawn.keys() == wanted.keys()
    for name, image in drawn.items():
        torch.testing.assert_close(image, wanted[name], rtol=1e-5, atol=1e-5)


def test_fifteen_families_load_loras() -> None:
    assert sum(family.lora for family in PIPELINES) >= 15
