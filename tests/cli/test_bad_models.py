"""Bad models from elsewhere, and exports that cannot be: exit code 2, one line, and not a byte changed anywhere."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from material import Cli, tiny
from safetensors.torch import load_file, save_file
from test_bad_input import Row, assert_one_error_line, row, tree_hash

from tinyfusion.families.dit import diffusers
from tinyfusion.models.checkpoint import save_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
OUT = "--out made/student"
PIPELINE = f"export --model imagenet --to diffusers --pipeline {OUT}"


def foreign(folder: Path) -> dict[str, Any]:
    """A folder as diffusers writes it, nothing wrong with it; its configuration."""
    model = tiny()
    folder.mkdir()
    tensors = diffusers.to_diffusers(model.module.state_dict(), model.arch.depth)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = diffusers.config_of_arch(model.arch)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def sharded(folder: Path, **weight_map: str) -> None:
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(names, "one.safetensors"), **weight_map}}))


def without_config_name(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def apart(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer_blocks.3.norm1.emb.class_embedder.embedding_table.weight"] += 1


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"step": 3}, folder / "diffusion_pytorch_model.bin")


def variant(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


# the change to a good folder, and what the line says
FOLDERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "not-diffusers": (without_config_name, ("config.json is not of a model of diffusers", "_class_name")),
    "other-class": (with_config(_class_name="UNet2DModel"), ("is a UNet2DModel of diffusers", "DiTTransformer2DModel")),
    "other-norm": (with_config(norm_type="layer_norm"), ("norm_type 'layer_norm'", "ada_norm_zero")),
    "affine-norm": (with_config(norm_elementwise_affine=True), ("norm_elementwise_affine True",)),
    "other-activation": (with_config(activation_fn="geglu"), ("activation_fn 'geglu'", "gelu-approximate")),
    "size-no-number": (with_config(sample_size="8"), ("sample_size '8'", "whole number")),
    "eps-no-number": (with_config(norm_eps="small"), ("norm_eps 'small'",)),
    "eps-negative": (with_config(norm_eps=-1.0), ("mlp_norm_eps must be above 0",)),
    "eps-no-value": (with_config(norm_eps=float("nan")), ("mlp_norm_eps must be above 0 and below 1; got nan",)),
    "odd-outputs": (with_config(out_channels=3), ("out_channels 3", "1, or 2")),
    "sizes-misfit": (with_config(sample_size=9), ("input_size 9 is not a multiple of patch_size 4",)),
    "deeper-than-its-weights": (with_config(num_layers=5), ("missing transformer_blocks.4.",)),
    "shallower-than-its-weights": (with_config(num_layers=3), ("unexpected transformer_blocks.3.",)),
    "narrower-than-its-weights": (with_config(num_attention_heads=1), ("pos_embed.proj.weight is (32, 1, 4, 4), wanted (16,",)),
    "own-record-damaged": (with_config(_tinyfusion={"image_size": "wide"}), ("config.json is damaged", "image_size")),
    "embedders-differ": (with_tensors(apart), ("transformer_blocks.3.norm1.emb.class_embedder", "differs from its copy in block 0")),
    "not-finite": (with_tensors(lambda t: t["proj_out_2.bias"].fill_(torch.inf)), ("final_layer.linear.bias is not finite",)),
    "whole-numbers": (with_tensors(lambda t: t.update({"proj_out_2.bias": t["proj_out_2.bias"].int()})), ("proj_out_2.bias is int32",)),
    "other-table": (with_tensors(lambda t: t.update({"pos_embed.pos_embed": torch.zeros(1, 4, 32)})), ("position table",)),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), ("holds no weights", "safetensors or .bin")),
    "only-a-variant": (variant, ("holds no weights", "diffusion_pytorch_model.fp16.safetensors")),
    "weights-truncated": (truncated, ("no readable safetensors file", "truncated")),
    "weights-without-tensors": (pickled, ("diffusion_pytorch_model.bin is no state dict of tensors", "'step'")),
    "shard-missing": (lambda f: sharded(f, proj="two.safetensors"), ("two.safetensors does not exist", "incomplete")),
    "shard-elsewhere": (lambda f: sharded(f, proj="../t.safetensors"), ("'../t.safetensors'", "no file in its folder")),
    "shards-disagree": (lambda f: sharded(f, proj="one.safetensors"), ("disagree about proj",)),
    "index-damaged": (lambda f: (sharded(f), (f / INDEX).write_text("{}")), (INDEX, "weight_map")),
}  # fmt: skip

ROWS: list[Row] = [
    *(row(f"folder-{name}", f"inspect {name}", name, *message) for name, (_, message) in FOLDERS.items()),
    row("folder-heads", "inspect good-folder --num-heads 4", "good-folder has 2 heads; --num-heads 4 contradicts it"),
    row("folder-family", "inspect good-folder --family dti", "good-folder is of family dit, not dti"),
    row("pipeline-other", "inspect other-pipeline", "StableDiffusionPipeline of diffusers without transformer", "DiTTransformer2DModel"),
    row("pipeline-without-transformer", "inspect empty-pipeline", "is a DiTPipeline of diffusers without transformer/config.json"),
    row("file-missing-published", "inspect DiT-XL-2-256x256.pt", "no model at DiT-XL-2-256x256.pt: no such file; dit-xl-2-256 fetches the"),
    row("file-missing-below", "inspect gone/SiT-XL-2-256.pt", "no such file; sit-xl-2-256 fetches the published file of that name"),
    row("file-missing-other", "inspect DiT-XL-2.safetensors", "no model at DiT-XL-2.safetensors: no such file"),
    row("name-of-other-size", "inspect DiT-XL-2-1024", "no model at DiT-XL-2-1024", "did you mean 'dit-xl-2-"),
    row("lora-folder", "inspect lora", "lora holds no model", "it is a LoRA, which changes a model and is none: merge it"),
    row("lora-file", "inspect lora/adapter.safetensors", "adapter.safetensors is a LoRA", "merge it into its model first"),
    row("diffusers-file", f"inspect good-folder/{WEIGHTS}", "has the names of diffusers: put it as", "config.json"),
    row("folder-of-files", "inspect downloaded", "downloaded holds no model", "give the file itself: downloaded/DiT.pt"),
    row("checkpoint-of-a-unet", "inspect unet-checkpoint", "is a UNet2DModel of diffusers"),
    row("record-lineage", "inspect odd-lineage", "odd-lineage/model.json is damaged: lineage[0]"),
    row("name-misspelt", "inspect tinydit-d41", "no model at tinydit-d41", "did you mean 'tinydit-d14'"),
    row("path-below-a-folder-is-no-hub-id", "inspect no-pictures/DiT", "no model at no-pictures/DiT: no such file or folder"),
    row("hub-not-there", "inspect some/model", "no model at some/model", "nothing of it is in the cache"),
    # --------------------------------------------------------------------------------------------------------- export
    row("export-without-model", f"export --to diffusers {OUT}", "export needs --model"),
    row("export-without-format", f"export --model teacher {OUT}", "export needs --to"),
    row("export-without-out", "export --model teacher --to diffusers", "export needs --out"),
    row("export-format-unknown", f"export --model teacher --to coreml {OUT}",
        "is one of diffusers, official, onnx, single-file, tinyfusion", "'coreml'"),
    row("export-model-missing", f"export --model gone --to diffusers {OUT}", "no model at gone"),
    row("export-official-suffix", f"export --model teacher --to official {OUT}", ".safetensors file, or a .pt file"),
    row("export-pixels-as-pipeline", f"export --model teacher --to diffusers --pipeline {OUT}", "a model of pixels"),
    row("export-null-class", f"export --model latent --to diffusers --pipeline {OUT}", "guides with class 1000", "null class is 10"),
    row("export-pipeline-of-official", "export --model teacher --to official --pipeline --out o.pt", "--pipeline is for --to diffusers"),
    row("export-vae-alone", f"export --model latent --to diffusers --vae vae {OUT}", "add --pipeline"),
    row("export-vae-missing", f"{PIPELINE} --vae gone", "no autoencoder at gone"),
    row("export-vae-empty", f"{PIPELINE} --vae no-pictures", "holds no autoencoder"),
    row("export-vae-other", f"{PIPELINE} --vae vae-other", "it is a VQModel, wanted an AutoencoderKL"),
    row("export-vae-channels", f"{PIPELINE} --vae vae-wide", "latents have 16 channels", "model 4"),
    row("export-vae-scale", f"{PIPELINE} --vae vae-scale", "scales latents by 0.3", "0.18215"),
    row("export-vae-weights", f"{PIPELINE} --vae vae-bare", "vae-bare holds no weights"),
    row("export-vae-not-reached", PIPELINE, "sd-vae-ft-ema", "cannot be reached"),
    row("export-width-diffusers", f"export --model narrow --to diffusers {OUT}", "exported to diffusers", "the format has one width"),
    row("export-width-official", "export --model narrow --to official --out o.safetensors", "cannot be exported to official"),
    row("export-push-official", "export --model teacher --to official --out o.pt --push-to-hub org/x", "--push-to-hub uploads a folder"),
    row("export-push-name", f"export --model teacher --to diffusers --push-to-hub mine {OUT}", "ORG/NAME; got 'mine'"),
    row("export-out-foreign", "export --model teacher --to diffusers --out thesis", "thesis exists and is not an export of tinyfusion"),
    row("export-out-foreign-overwrite", "export --model teacher --to diffusers --out thesis --overwrite", "is not an export"),
    row("export-out-model", "export --model teacher --to tinyfusion --out teacher", "teacher exists and is not an export"),
    row("export-out-file", "export --model teacher --to diffusers --out notes.txt", "notes.txt is a file"),
    row("export-out-foreign-file", "export --model teacher --to official --out good.pt", "good.pt exists and was not made by tinyfusion"),
    row("export-out-foreign-record", "export --model teacher --to official --out notes.pt", "notes.json exists and was not made by"),
]  # fmt: skip


def autoencoder(folder: Path, weights: bool = True, **config: Any) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4, **config}))
    if weights:
        save_file({"x": torch.zeros(1)}, folder / WEIGHTS)


@pytest.fixture(scope="session")
def elsewhere(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The material of all command line tests, and models from elsewhere with one fault each."""
    folder = tmp_path_factory.mktemp("elsewhere") / "work"
    shutil.copytree(material, folder)
    foreign(folder / "good-folder")
    for name, (change, _) in FOLDERS.items():
        change(Path(shutil.copytree(folder / "good-folder", folder / name)))
    shutil.copytree(folder / "other-class", folder / "unet-checkpoint" / "transformer")
    shutil.copytree(folder / "good-folder", folder / "checkpoint-500" / "transformer")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{}")
    save_file(
        {"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.zeros(2, 2)}, folder / "lora" / "adapter.safetensors"
    )
    (folder / "downloaded").mkdir()
    torch.save({}, folder / "downloaded" / "DiT.pt")
    shutil.copytree(folder / "teacher", folder / "odd-lineage")
    record = json.loads((folder / "odd-lineage" / "model.json").read_text())
    (folder / "odd-lineage" / "model.json").write_text(json.dumps({**record, "lineage": [{}]}))
    for name, kind in (("other-pipeline", "StableDiffusionPipeline"), ("empty-pipeline", "DiTPipeline")):
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    save_model(tiny(head_dim=8), folder / "narrow")
    for name, classes in (("latent", 10), ("imagenet", 1000)):
        model = tiny(in_channels=4, num_classes=classes)
        torch.save(dict(model.module.state_dict()), folder / f"{name}-file.pt")
        save_model(model, folder / name)
        record = json.loads((folder / name / "model.json").read_text())
        latent = {"latent_scale": 0.18215, "vae": "stabilityai/sd-vae-ft-ema"}
        (folder / name / "model.json").write_text(json.dumps({**record, **latent}))
    autoencoder(folder / "vae-other", _class_name="VQModel")
    autoencoder(folder / "vae-wide", latent_channels=16)
    autoencoder(folder / "vae-scale", scaling_factor=0.3)
    autoencoder(folder / "vae-bare", weights=False)
    return folder


@pytest.mark.parametrize("cause", ROWS, ids=[r.id for r in ROWS])
def test_bad_models(cause: Row, cli: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No row changes anything, so all share one folder."""
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    before = tree_hash(elsewhere)
    outcome = cli(*shlex.split(cause.arguments))
    assert_one_error_line(outcome.code, outcome.err, cause.message)
    assert tree_hash(elsewhere) == before


def test_rows_are_distinct() -> None:
    assert len({r.id for r in ROWS}) == len({r.arguments for r in ROWS}) == len(ROWS) >= 50


def test_the_folder_without_a_fault_opens(cli: Cli, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(elsewhere)
    assert cli("inspect", "good-folder").code == 0
    whole, inside = (cli("inspect", name, "--json").last_json for name in ("good-folder", "checkpoint-500"))
    assert inside["hash"] == whole["hash"] and inside["origin"]["path"] == "checkpoint-500/transformer"


@pytest.mark.parametrize(
    ("state", "message"),
    [("done", "that makes no model"), ("running", "that has not finished: the same command continues it")],
)
def test_a_run_without_a_model_is_named(cli: Cli, work: Path, state: str, message: str) -> None:
    Path("latents").mkdir()
    Path("latents/run.json").write_text(json.dumps({"made_by": "tinyfusion", "verb": "encode", "state": state}))
    outcome = cli("inspect", "latents")
    assert outcome.code == 2 and f"it is a run of `encode` {message}" in outcome.err
