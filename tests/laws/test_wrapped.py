"""State dicts as training code leaves them: nested, wrapped, prefixed, next to averages: the network is found in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.core.errors import UserError
from tinyfusion.models.attach import attach
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model

Tensors = dict[str, Tensor]
PREFIXES = (
    "module.", "model.", "net.", "ema_model.", "transformer.", "model.diffusion_model.", "base_model.model.",
    "_orig_mod.", "_fsdp_wrapped_module.", "_orig_mod.module.", "module._orig_mod.model.net.", "anything.at.all.",
)  # fmt: skip
KEYS = (
    "state_dict", "model", "ema", "model_ema", "ema_state_dict", "model_state_dict", "params", "params_ema", "module",
    "net", "weights", "whatever",
)  # fmt: skip


@pytest.fixture
def model(tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    return tiny_model(depth=2)


def tensors_of(model: LoadedModel) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def opened(content: Any, path: Path, **more: Any) -> LoadedModel:
    torch.save(content, path / "m.pt")
    return open_model(path / "m.pt", num_heads=2, **more)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def inside(tensors: Tensors, wrapper: str) -> Tensors:
    """A wrapper around every block and, in one of them, around its attention."""
    named = {name.replace("blocks.0.", f"blocks.0.{wrapper}"): tensor for name, tensor in tensors.items()}
    return {name.replace("blocks.1.attn.", f"blocks.1.attn.{wrapper}"): tensor for name, tensor in named.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(model: LoadedModel, tmp_path: Path, prefix: str) -> None:
    assert opened(under(prefix, tensors_of(model)), tmp_path).hash() == model.hash()
    save_file(under(prefix, tensors_of(model)), tmp_path / "m.safetensors")
    assert open_model(tmp_path / "m.safetensors", num_heads=2).hash() == model.hash()


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module._orig_mod."]
)
def test_wrappers_inside_of_names(model: LoadedModel, tmp_path: Path, wrapper: str) -> None:
    wrapped = under("_orig_mod.net.", inside(tensors_of(model), wrapper))
    assert opened({"state_dict": wrapped}, tmp_path).hash() == model.hash()


@pytest.mark.parametrize("key", KEYS)
def test_keys_around(model: LoadedModel, tmp_path: Path, key: str) -> None:
    assert opened({key: tensors_of(model), "epoch": 3}, tmp_path).hash() == model.hash()
    nested = {
        "checkpoint": {key: under("model.", tensors_of(model))},
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    }
    assert opened(nested, tmp_path).hash() == model.hash()


@pytest.mark.parametrize(
    "ema", [{}, None, {"decay": 0.999}, {"decay": 0.999, "shadow": {"modelblocks0attn": torch.zeros(3)}},
            {"decay": 0.999, "shadow": {}}, {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.zeros(3)]}],
)  # fmt: skip
def test_averages_that_name_nothing_leave_the_model(
    model: LoadedModel, tmp_path: Path, ema: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened({"model": tensors_of(model), "ema": ema}, tmp_path).hash() == model.hash()
    said = capsys.readouterr().err
    assert ("taking model, as its averaged weights have no names of this model" in said) is isinstance(ema, dict)


@pytest.mark.parametrize("layout", ["ema", "shadow", "listed", "listed without the table", "prefixes"])
def test_of_two_the_chosen_is_taken_and_the_other_is_named(
    model: LoadedModel,
    tiny_model: Callable[..., LoadedModel],
    tmp_path: Path,
    layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    average = tiny_model(7, depth=2)
    raw, mean = tensors_of(model), tensors_of(average)
    contents: dict[str, Any] = {
        "ema": {"model": raw, "ema": mean},
        "shadow": {"model": raw, "ema": {"decay": 0.999, "shadow": under("module.", mean)}},
        "listed": {"model": raw, "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(mean.values())}},
        "listed without the table": {
            "model": raw,
            "ema": {"decay": 0.9, "shadow_params": [t for name, t in mean.items() if name != "pos_embed"]},
        },
        "prefixes": {"state_dict": {**under("model.", raw), **under("ema_model.", mean)}},
    }
    assert opened(contents[layout], tmp_path).hash() == average.hash()
    assert "--weights raw takes" in capsys.readouterr().err
    assert opened(contents[layout], tmp_path, weights="raw").hash() == model.hash()
    assert "--weights ema takes" in capsys.readouterr().err


def test_tensors_beside_a_prefix_are_left_and_counted(
    model: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        **under("model.diffusion_model.", tensors_of(model)),
        "betas": torch.zeros(3),
        "vae.conv": torch.zeros(2),
    }
    assert opened({"state_dict": content}, tmp_path).hash() == model.hash()
    assert "leaving 2 tensors that do not begin with model.diffusion_model." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("net.blocks.0.mlp.fc1.bias"), r"missing blocks\.0\.mlp\.fc1\.bias"),
        (lambda t: t.update({"net.more": torch.zeros(1)}), "unexpected more"),
        (lambda t: t.update({"net.note": "text"}), r"no state dict of tensors \(it holds 'net.note'\)"),
        (lambda t: t.update({"net.module.pos_embed": t["net.pos_embed"]}), "holds net.pos_embed twice"),
        (lambda t: t.update({"net.blocks.0.mlp.fc1.bias": torch.zeros(1)}), r"fc1\.bias is \(1,\), wanted \(64,\)"),
    ],
)
def test_what_is_found_is_read_strictly(model: LoadedModel, tmp_path: Path, change: Any, message: str) -> None:
    tensors: dict[str, Any] = under("net.", tensors_of(model))
    change(tensors)
    with pytest.raises(UserError, match=message):
        opened({"state_dict": tensors}, tmp_path)


def test_other_families_and_routers(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    sizes = dict(input_size=4, patch_size=1, in_channels=2, hidden_size=16, encoder_depth=2, decoder_depth=1, num_heads=2,
                 num_classes=5, buffer_size=2, head_depth=1, head_width=8)  # fmt: skip
    mar = new_model("mar", sizes, 0)
    wrapped = {"model": {"_orig_mod.x": 1}, "model_ema": under("module._orig_mod.", tensors_of(mar))}
    assert opened(wrapped, tmp_path).hash() == mar.hash()
    routed = tiny_model(depth=2)
    attach(routed, DynamicSettings())
    found = opened({"params": inside(under("module.", tensors_of(routed)), "_orig_mod.")}, tmp_path)
    assert found.hash() == routed.hash() and found.facts.dynamic is not None
    sit = new_model(
        "sit", dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=5), 0
    )
    assert opened({"net": under("net.", tensors_of(sit))}, tmp_path, family="sit").hash() == sit.hash()


def test_a_content_that_holds_itself_ends(model: LoadedModel, tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": tensors_of(model)}
    content["self"] = content
    assert opened(content, tmp_path).hash() == model.hash()


OTHERS = {
    "is a LoRA, .* merge it": ["transformer.blocks.0.attn.qkv.lora_A.weight", "lora_unet_blocks_0.lora_down.weight"],
    "is a LightningDiT": ["x_embedder.proj.weight blocks.0.mlp.w12.weight"],
    r"trained with REPA: remove its tensors projectors\.\*": ["x_embedder.proj.weight projectors.0.0.weight"],
    r"names of diffusers: put it as diffusion_pytorch_model\.bin into a folder with the config\.json": [
        "transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"],
    "is a transformer of text and image streams": ["double_blocks.0.img_attn.qkv.weight"],
    "is a U-Net": ["model.diffusion_model.input_blocks.0.0.weight"],
    "is an autoencoder: give it as --vae": ["decoder.conv_in.weight", "first_stage_model.decoder.up.0.block.0.norm1.weight"],
    r"the published state dict has no prompts.*give the folder of diffusers": [
        "x_embedder.proj.weight t_block.1.weight y_embedder.y_proj.fc1.weight"],
    r"is of no known family: wanted one of the tensors .*; got blocks\.0\.attn\.qkv\.weight": ["blocks.0.attn.qkv.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("message", "names"), [(m, names) for m, all_names in OTHERS.items() for names in all_names])
def test_files_of_other_kinds_are_named(tmp_path: Path, message: str, names: str) -> None:
    with pytest.raises(UserError, match=message):
        opened({"state_dict": {name: torch.zeros(2) for name in names.split()}}, tmp_path)
