"""What fits on which card: counts of published models on the meta device, and fake measurements that are the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import IMAGES
from torch import nn

import tinyfusion as tf
from tinyfusion.blocks.forwards import standing_in
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams
from tinyfusion.conditioning.condition import Condition
from tinyfusion.jobs.cards import WAYS, Counted, card_lines, counted, lines_of_large, way_plan
from tinyfusion.jobs.footprint import LiveBytes, _block_bytes, _StandIn
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.training.lora import add_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
ROPE = {"image_rotary_emb": None}
TEXT_FIRST = Streams(
    ("hidden_states", "encoder_hidden_states"), ("encoder_hidden_states", "hidden_states"), "hidden_states", ROPE
)
ONE = Streams(("hidden_states",), axes={"rotary_emb": None})
Model = tuple[Callable[[], tuple[nn.Module, BlockStack]], Callable[[nn.Module], Any]]


def flux(double: int = 19, single: int = 38, tokens: int = 4096, texts: int = 512, **sizes: Any) -> Model:
    def build() -> tuple[nn.Module, BlockStack]:
        from diffusers import FluxTransformer2DModel

        module = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True, **sizes)
        lists = {"transformer_blocks": TEXT_FIRST, "single_transformer_blocks": TEXT_FIRST}
        return module, BlockStack(module, list(lists), lists)

    def run(module: nn.Module) -> Any:
        return module(
            hidden_states=torch.zeros(1, tokens, 64), encoder_hidden_states=torch.zeros(1, texts, 4096),
            pooled_projections=torch.zeros(1, 768), timestep=torch.ones(1), guidance=torch.ones(1),
            img_ids=torch.zeros(tokens, 3), txt_ids=torch.zeros(texts, 3), return_dict=False,
        )  # fmt: skip

    return build, run


def qwen(depth: int = 60, side: int = 64, texts: int = 256) -> Model:
    def build() -> tuple[nn.Module, BlockStack]:
        from diffusers import QwenImageTransformer2DModel

        module = QwenImageTransformer2DModel(num_layers=depth)
        return module, BlockStack(module, ["transformer_blocks"], {"transformer_blocks": TEXT_FIRST})

    def run(module: nn.Module) -> Any:
        return module(
            hidden_states=torch.zeros(1, side * side, 64), encoder_hidden_states=torch.zeros(1, texts, 3584),
            timestep=torch.ones(1), img_shapes=[[(1, side, side)]], return_dict=False,
        )  # fmt: skip

    return build, run


def wan(depth: int = 40, latent: tuple[int, int, int] = (21, 60, 104)) -> Model:
    def build() -> tuple[nn.Module, BlockStack]:
        from diffusers import WanTransformer3DModel

        module = WanTransformer3DModel(num_layers=depth)
        return module, BlockStack(module, ["blocks"], {"blocks": ONE})

    def run(module: nn.Module) -> Any:
        return module(
            hidden_states=torch.zeros(1, 16, *latent), timestep=torch.ones(1),
            encoder_hidden_states=torch.zeros(1, 512, 4096), return_dict=False,
        )  # fmt: skip

    return build, run


SMALL = dict(num_attention_heads=2, attention_head_dim=128, tokens=64, texts=32)


@pytest.fixture(scope="module")
def fake() -> Counted:
    """1 + 1 narrow blocks, counted and measured without memory."""
    return counted(*flux(1, 1, **SMALL))


@pytest.mark.parametrize("update", ["full", "lora"])
def test_fake_tensors_measure_what_real_ones_take(fake: Counted, update: str) -> None:
    """The same small model, once faked and once run: retained, transient and passing bytes of both kinds of blocks."""
    build, run = flux(1, 1, **SMALL)
    module, stack = build()
    if update == "lora":
        low(module)
        add_lora(module, 64, 1.0, 0)
    low(module)
    meter = LiveBytes()
    recorded = [_StandIn(block, streams, meter) for block, streams in zip(stack, stack.streams(), strict=True)]
    with contextlib.ExitStack() as undo:
        for stand_in in recorded:
            undo.enter_context(standing_in(stand_in.block, stand_in))
        with meter, torch.autocast("cpu", torch.bfloat16):
            result = run(module)
    assert fake.measured[update].blocks == _block_bytes(recorded, "bfloat16", as_recorded=True, trains=True)
    assert fake.measured[update].before == recorded[-1].live
    assert fake.measured[update].after == max(meter.now - recorded[-1].live, 0)
    del result


def low(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()


def test_published_sizes_are_counted_on_the_meta_device() -> None:
    sizes = {"flux": flux(), "qwen": qwen(), "wan": wan()}
    numbers = {}
    for name, (build, _) in sizes.items():
        with torch.device("meta"):
            numbers[name] = sum(p.numel() for p in build()[0].parameters())
    assert numbers == {"flux": 11_901_408_320, "qwen": 20_430_401_088, "wan": 14_288_491_584}


def test_the_table_of_flux() -> None:
    """Weights and states against a sum by hand, and what fits where."""
    model = counted(*flux(1, 1)).repeated({"transformer_blocks": 19, "single_transformer_blocks": 38})
    kept = {"transformer_blocks": 8, "single_transformer_blocks": 20}
    assert model.numbers == 11_901_408_320
    student = 8 * model.blocks[0] + 20 * model.blocks[19] + sum(model.outside)
    lean = way_plan(model, kept, next(way for way in WAYS if way.update == "full" and way.storage == "own"))
    assert lean.sizes["trained_weights"] == lean.sizes["gradients"] == 2 * student
    assert lean.sizes["teacher"] == 2 * model.numbers and lean.sizes["moving_average"] == 0
    assert 2 * student < lean.sizes["optimizer"] < 2.05 * student
    plain = way_plan(model, kept, WAYS[-1])
    assert [plain.sizes[name] for name in ("trained_weights", "moving_average")] == [4 * student] * 2
    lines = {
        line[2:64].strip(): [cell.strip() for cell in line[64:].split("  ") if cell.strip()]
        for line in card_lines(model, kept)[2:]
    }
    assert all(len(cells) == 4 for cells in lines.values()) and len(lines) == len(WAYS)
    fitting = {title: [cell != "does not fit" for cell in cells[1:]] for title, cells in lines.items()}
    assert fitting["recover low-rank updates, teacher shared, float8"] == [True, True, True]
    assert fitting["recover low-rank updates, teacher shared"] == [False, True, True]
    assert fitting["recover all weights, bfloat16, 8-bit moments, teacher streamed"] == [False, True, True]
    assert fitting["recover all weights in float32"] == [False, False, False]


def test_a_dry_run_shows_the_ways_of_a_large_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = next(each for each in IMAGES if each.name == "FluxTransformer2DModel")
    tiny.model().save_pretrained(tmp_path / "flux")
    model, call = tf.open_model(tmp_path / "flux"), tiny.given(1)
    assert isinstance(model, TransformerModel)
    config = model.folder.config
    model.latent_shape = (config["in_channels"] // 4, 4, 4)
    model.prompts = Condition({"embeddings": call["encoder_hidden_states"], "pooled": call["pooled_projections"]})
    kept = dict.fromkeys(model.stack.depths(), 1)
    assert lines_of_large(model, kept) == [], "a small one"
    monkeypatch.setattr("tinyfusion.jobs.cards.LARGE", 0)
    by_data = lines_of_large(model, kept)
    assert len(by_data) == 3 + len(WAYS) and by_data[0].startswith("ways to train it")
    assert all(line.split()[-1] != "fit" for line in by_data[3:]), "a tiny one fits everywhere"
    model.example = {name: value for name, value in call.items() if name != "return_dict"}
    by_call = lines_of_large(model, kept)
    assert len(by_call) == len(by_data)
