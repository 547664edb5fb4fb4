"""Small valid inputs of every format for `fuzz.py`, and the commands that read each of them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from shared import random_model
from tinyfusion.models.checkpoint import save_model

Call = Callable[[str, Path], None]  # (command line, current folder): runs it, and raises where it fails
NUM, CLASSES, SIDE, LATENT_SCALE = 16, 4, 16, 0.3
PIXELS = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=4, num_heads=2, num_classes=10)
LATENTS = dict(input_size=8, patch_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=1000)
TRAINING = (
    "--set {0}.training.steps=3 "
    "--set {0}.training.batch_size=4 --set {0}.training.ema_decay=0.5 --set {0}.training.checkpoint_every_steps=1"
)
PRUNE = f"prune --teacher {{m}}/teacher --scheme 1:2 {TRAINING.format('prune')} --set prune.lora_rank=2"
SAMPLE = "--num-images 4 --num-steps 2 --out made/x.npz"
EVALUATE = "evaluate --out made/x.json"
ENCODE = f"encode --vae {{m}}/vae --size {SIDE} --out made"
AGAIN = f"encode --vae {{m}}/vae --size {SIDE} --out OUT --data {{m}}/pictures --set encode.shard_images=6"
EXPLAIN = (
    "explain {m}/teacher --data digits --num-images 8 --drawn 2 --set explain.passes=1 --set explain.bins=2 --set explain.most_steps=2 "
    "--out OUT"
)
BI = "prune --criterion bi --set prune.calibration_images=4 --out made"
TRAIN = "train --set model.family=dit --set train.steps=1 --set train.batch_size=4 --set model.depth=1 --out made"
READ = ("inspect {i}", "inspect {i} --json", f"sample --model {{i}} {SAMPLE}", "bench {i} --dry-run")
CUT = ("prune --teacher {i} --criterion indices --keep 0 --out made", "export --model {i} --to tinyfusion --out made")
OPENED = (
    *READ,
    *CUT,
    "export --model {i} --to official --out made/x.pt",
    "export --model {i} --to diffusers --out made",
)
OFFICIAL = tuple(f"{command} --num-heads 2" for command in OPENED)


@dataclass(frozen=True)
class Kind:
    """A kind of input. path: part of the material that is copied and damaged; commands: {i} is the copy, {m} the material.

    files: patterns of the files to damage, if `path` is a folder. own: the commands write into {i}.
    """

    name: str
    path: str
    commands: tuple[str, ...]
    files: tuple[str, ...] = ("**/*",)
    own: bool = False


KINDS = (
    Kind("images npz", "images.npz", (
        f"{BI} --teacher {{m}}/teacher --data {{i}}", f"{TRAIN} --data {{i}} --dry-run", f"{EVALUATE} --reference digits --samples {{i}}",
        f"{EVALUATE} --samples {{m}}/images.npz --reference {{i}}",
    )),
    Kind("float npz", "floats.npz", (f"{BI} --teacher {{m}}/teacher --data {{i}}",)),
    Kind("moments npz", "moments.npz", (f"{EVALUATE} --samples {{m}}/images.npz --reference {{i}}",)),
    Kind("samples npz", "drawn", (
        f"{EVALUATE} --reference digits --samples {{i}}/x.npz",
        f"{EVALUATE} --reference digits --samples {{m}}/drawn/x.npz --against {{i}}/x.npz",
        "sample --model {m}/teacher --num-images 4 --num-steps 2 --out {i}/x.npz",
    ), own=True),
    Kind("parquet", "pictures.parquet", (
        f"{BI} --teacher {{m}}/colour --data parquet:{{i}}", f"{BI} --teacher {{m}}/colour --data parquet-stream:{{i}}",
        f"{ENCODE} --data parquet:{{i}}",
    )),
    Kind("tar", "pictures.tar", (f"{ENCODE} --data webdataset:{{i}}",)),
    Kind("pictures", "pictures", (
        f"{ENCODE} --data {{i}}", f"{BI} --teacher {{m}}/colour --data {{i}}",
    )),
    Kind("evaluated pictures", "grey", (
        f"{EVALUATE} --reference digits --samples {{i}}", f"{EVALUATE} --reference {{i}} --samples {{m}}/images.npz",
    )),
    Kind("latents", "latents", (
        f"{BI} --teacher {{m}}/latent --data latents:{{i}}", f"{TRAIN} --data latents:{{i}} --set model.in_channels=4 --dry-run",
    )),
    Kind("encoded again", "latents", (AGAIN.replace("OUT", "{i}"),), own=True),
    Kind("features", "features", (f"{ENCODE} --data features:{{i}}",)),
    Kind("model", "teacher", OPENED),
    Kind("student", "student", (*OPENED, "recover --teacher {m}/teacher --student {i} --steps 1 --out made --dry-run")),
    Kind("model SiT", "sit", (*(c.replace("--num-steps", "--set sample.flow.method=euler --num-steps") for c in READ), *CUT)),
    Kind("model MAR", "mar", (*READ, CUT[1])),
    Kind("model dynamic", "dynamic/student", (*READ, CUT[1])),
    Kind("model of few steps", "few", (*READ, CUT[1], "export --model {i} --to onnx --out made"), ("*.json", "student/*")),
    Kind("explained", "why", ("report {m}/run {i} --out page.html", EXPLAIN.replace("OUT", "{i}")), ("*.json", "*.npz"), own=True),
    Kind("official pt", "good.pt", OFFICIAL),
    Kind("official safetensors", "good.safetensors", OFFICIAL),
    Kind("diffusers", "diffusers", OPENED),
    Kind("diffusers pipeline", "pipeline", OPENED),
    Kind("PixArt", "pixart", (*(c.replace("--num-steps", "--set sample.decode=false --num-steps") for c in READ), CUT[0])),
    Kind("autoencoder", "vae", (
        f"encode --vae {{i}} --size {SIDE} --out made --data {{m}}/pictures", f"sample --model {{m}}/latent --vae {{i}} {SAMPLE}",
        "export --model {m}/latent --to diffusers --pipeline --vae {i} --out made",
    )),
    Kind("classifier", "classifier", (f"{EVALUATE} --reference digits --samples {{m}}/images.npz --set evaluate.features={{i}}",)),
    Kind("DINOv2", "dino", (f"{EVALUATE} --reference digits --samples {{m}}/images.npz --set evaluate.features=dinov2:{{i}}",)),
    Kind("CLIP", "clip", (f"{EVALUATE} --samples {{m}}/prompted/x.npz --clip {{i}}",)),
    Kind("samples of prompts", "prompted", (f"{EVALUATE} --samples {{i}}/x.npz --clip {{m}}/clip --against {{m}}/prompted/x.npz",)),
    Kind("TorchScript", "net.pt", (f"{EVALUATE} --reference digits --samples {{m}}/images.npz --set evaluate.features={{i}}",)),
    Kind("run", "run", (
        "report {i} --out page.html", "report {i} {m}/run --out page.html", "replay {i} --step 1",
        "sample --model {i} --weights raw " + SAMPLE,
        "recover --teacher {m}/teacher --student {i} --steps 1 --out made --dry-run", "export --model {i} --to tinyfusion --out made",
    ), ("*.json*", "*/*.json", "*.txt", "checkpoints/*/*")),
    Kind("resume", "run", (f"{PRUNE} --out {{i}}", f"{PRUNE} --out {{i}} --dry-run", f"{PRUNE} --out {{i}} --overwrite --dry-run",
        f"{PRUNE} --resume {{i}}/checkpoints/step-0000002 --out made"), ("checkpoints/*/*", "run.json", "metrics.jsonl"), own=True),
    Kind("recipe", "recipe.toml", ("run --recipe {i} --dry-run --out made", f"{BI} --recipe {{i}} --dry-run")),
    Kind("weights table", "home/.config/tinyfusion/weights.toml", ("inspect mine", f"sample --model mine {SAMPLE} --dry-run")),
    Kind("class names", "names.json", ("export --model {m}/latent --to diffusers --pipeline --vae {m}/vae --out made --labels {i}",)),
)  # fmt: skip

NEVER_WHOLE = ("TorchScript", "weights table")  # small ones are refused, and nothing is fetched


def fill(folder: Path, call: Call) -> None:
    """Create all inputs in `folder`; `call` runs the trainings in a separate process."""
    save_model(random_model(0.05, **PIXELS), folder / "teacher")
    save_model(random_model(0.05, **{**PIXELS, "in_channels": 3, "input_size": SIDE}), folder / "colour")
    latent = random_model(0.05, **LATENTS)
    facts = dataclasses.replace(latent.facts, latent_scale=LATENT_SCALE, image_size=SIDE)
    save_model(dataclasses.replace(latent, facts=facts), folder / "latent")
    save_model(random_model(0.05, "sit", **PIXELS), folder / "sit")
    mar = {**PIXELS, "patch_size": 2, "buffer_size": 2, "head_depth": 1, "head_width": 16}
    save_model(random_model(0.05, "mar", **mar), folder / "mar")
    save_model(random_model(0.05, "pixart", **LATENTS, caption_tokens=3, caption_channels=8), folder / "pixart")
    _arrays(folder)
    _pictures(folder)
    _networks(folder)
    (folder / "recipe.toml").write_text(
        'teacher = "digits"\nseed = 3\n[data]\nname = "digits"\nflip = 0.5\n[prune]\nscheme = "1:2"\n'
        "keep = [0, 2]\ntemperature = [4.0, 0.1]\n"
        "[prune.training]\nsteps = 2\nbatch_size = 4\nlearning_rate = 1e-3\n[recover.training]\nsteps = 2\nema_decay = 0.0\n[sample]\n"
        'num_images = 8\nlabels = [1, 2]\nsampler = "ddim"\n[evaluate]\nreferences = ["digits"]\n',
        encoding="utf-8",
    )
    table = folder / "home" / ".config" / "tinyfusion" / "weights.toml"
    table.parent.mkdir(parents=True)
    table.write_text(
        '[mine]\naddress = "http://127.0.0.1:9/mine.pt"\nsha256 = "0123456789abcdef"\nlicense = "MIT"\nkind = "model"\n',
        encoding="utf-8",
    )
    names = {str(i): f"class {i}" for i in range(LATENTS["num_classes"])}
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")
    for command in (
        f"{PRUNE} --out {{m}}/run",
        "prune --teacher {m}/teacher --criterion indices --keep 0,2 --out {m}/cut",
        AGAIN.replace("OUT", "{m}/latents"),
        "export --model {m}/teacher --to diffusers --out {m}/diffusers",
        "export --model {m}/teacher --to official --out {m}/good.safetensors",
        "export --model {m}/latent --to diffusers --pipeline --vae {m}/vae --labels {m}/names.json --out {m}/pipeline",
        "sample --model {m}/teacher --num-images 4 --num-steps 2 --out {m}/drawn/x.npz",
        f"distill-steps --model {{m}}/teacher --teacher {{m}}/teacher {TRAINING.format('distill_steps')} --num-steps 2 --out {{m}}/few",
        EXPLAIN.replace("OUT", "{m}/why"),
        "dynamic --model {m}/teacher --set dynamic.training.steps=3 --set dynamic.training.batch_size=4 --set dynamic.finish_steps=1 "
        "--set dynamic.calibration_images=4 --set dynamic.training.ema_decay=0 --set sample.sampler=ddim --set sample.num_steps=2 "
        "--out {m}/dynamic",
    ):
        call(command.format(m=folder), folder)
    shutil.copytree(folder / "cut" / "student", folder / "student")


def _arrays(folder: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (NUM, 8, 8, 1), dtype=np.uint8), np.arange(NUM) % CLASSES
    np.savez(folder / "images.npz", images, labels)
    np.savez_compressed(folder / "floats.npz", images.astype(np.float32) / 127.5 - 1, labels)
    mean, covariance = rng.normal(size=8), np.eye(8)
    np.savez(folder / "moments.npz", arr_0=images, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    (folder / "prompted").mkdir()
    np.savez(folder / "prompted" / "x.npz", rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8), np.arange(3))
    record = {"protocol": "3 images | seed 0", "num_images": 3, "prompts": ["a", "b c", "cab"]}
    (folder / "prompted" / "x.json").write_text(json.dumps(record), encoding="utf-8")
    for name in ("features", "labels"):
        (folder / "features" / f"small_{name}").mkdir(parents=True)
    for i in range(NUM):
        latent = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
        np.save(folder / "features" / "small_features" / f"{i}.npy", latent)
        np.save(folder / "features" / "small_labels" / f"{i}.npy", np.array([i % CLASSES]))


def _pictures(folder: Path) -> None:
    rng = np.random.default_rng(1)
    (folder / "grey").mkdir()
    for i in range(NUM):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / "grey" / f"{i:02d}.png")
    encoded = []
    for i in range(NUM):
        path = folder / "pictures" / "abcd"[i % CLASSES] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        encoded.append(path.read_bytes())
    labels = [i % CLASSES for i in range(NUM)]
    pq.write_table(
        pa.table({"image": [{"bytes": e} for e in encoded], "label": labels}),
        folder / "pictures.parquet",
        row_group_size=6,
    )
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for i, content in enumerate(encoded):
            for name, value in ((f"{i:02d}.png", content), (f"{i:02d}.cls", str(labels[i]).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))


def _networks(folder: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
    )
    AutoencoderKL(**blocks, norm_num_groups=4, scaling_factor=LATENT_SCALE).save_pretrained(folder / "vae")
    shutil.copytree(Path(str(resources.files("tinyfusion"))) / "assets" / "digits-classifier", folder / "classifier")
    teacher = random_model(0.05, **PIXELS)
    weights = dict(teacher.module.state_dict())
    torch.save({"model": weights, "ema": dict(weights), "args": argparse.Namespace(model="tiny")}, folder / "good.pt")
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))).save(folder / "net.pt")
    try:
        from transformers import Dinov2Config, Dinov2Model

        _clip(folder / "clip")
    except ImportError:  # the kinds then show what is said without it
        (folder / "clip").mkdir()
        (folder / "clip" / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
        (folder / "dino").mkdir()
        (folder / "dino" / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
        return
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(folder / "dino")
    save_file({"proj_out.bias": torch.zeros(32)}, folder / "other.safetensors")


def _clip(folder: Path) -> None:
    """A CLIP model of three letters for pictures of 16 pixels."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    words = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>"]
    text = dict(vocab_size=8, max_position_embeddings=8, bos_token_id=6, eos_token_id=7, pad_token_id=7)
    vision = dict(image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=8)).save_pretrained(
        folder
    )
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
