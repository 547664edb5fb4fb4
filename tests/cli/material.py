"""What the tests of the command line work on: a tiny model, what was cut from it, and every kind of damaged file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from shared import random_model
from tinyfusion.jobs.web_runtime import FILES
from tinyfusion.models.checkpoint import LoadedModel, save_model
from tinyfusion.prune.criteria import by_indices

TINY = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=4, num_heads=2, num_classes=10)
Cli = Callable[..., "Outcome"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def last_json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


def done(cli: Cli, command: str) -> Outcome:
    """The outcome of a command that ends with 0."""
    outcome = cli(*shlex.split(command))
    assert outcome.code == 0, outcome.err
    return outcome


def refused(cli: Cli, command: str, *parts: str) -> str:
    """The last line of a command that ends with 2: an error that has all `parts`."""
    outcome = cli(*shlex.split(command))
    assert outcome.code == 2, outcome.err
    error = outcome.err.splitlines()[-1]
    assert error.startswith("error: "), outcome.err
    assert [part for part in parts if part not in error] == [], error
    return error


def pages_of_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of `demo` get a network and a runtime of a few bytes, and no browser opens them."""
    network = SimpleNamespace(SerializeToString=lambda: b"a network with gates")
    monkeypatch.setattr("tinyfusion.commands.demo.onnx_graph", lambda _, switches: network if switches else None)
    monkeypatch.setattr("tinyfusion.commands.demo.runtime_files", lambda _: dict.fromkeys(FILES, b"//"))


def tiny(seed: int = 0, **sizes: Any) -> LoadedModel:
    """A DiT whose every weight is random, so that every block matters."""
    return random_model(0.05, "dit", seed, **{**TINY, **sizes})


def tiny_sit(seed: int = 0, **sizes: Any) -> LoadedModel:
    """A SiT like that."""
    return random_model(0.05, "sit", seed, **{**TINY, **sizes})


def tiny_mar(seed: int = 0, **sizes: Any) -> LoadedModel:
    """A MAR like that, with four blocks in either stack and 16 tokens."""
    small = dict(patch_size=2, buffer_size=2, head_depth=1, head_width=16)
    return random_model(0.05, "mar", seed, **{**TINY, **small, **sizes})


def fill(folder: Path) -> None:
    """Put everything into `folder`."""
    teacher = tiny()
    save_model(teacher, folder / "teacher")
    save_model(tiny(1), folder / "other-teacher")
    save_model(tiny(2, depth=5), folder / "deeper")
    save_model(tiny(3, input_size=4), folder / "smaller-images")
    save_model(tiny(4, num_classes=5), folder / "five-classes")
    save_model(teacher.cut(by_indices(teacher, [0, 2], 0)), folder / "student")
    save_model(tiny_sit(), folder / "sit")
    save_model(tiny_mar(), folder / "mar")
    _texts(folder)
    _official_files(teacher, folder)
    _damaged_folders(folder)
    _image_files(folder)
    _outputs(folder)


def _texts(folder: Path) -> None:
    """Folders of diffusers that are PixArts: one without prompts, and one of 1,024 pixels; and an official file of one."""
    config = {"_class_name": "PixArtTransformer2DModel", "num_layers": 1, "num_attention_heads": 1, "patch_size": 2}
    config |= {"attention_head_dim": 8, "in_channels": 4, "sample_size": 4, "caption_channels": 8}
    for name, size in (("pixart", 4), ("pixart-1024", 128)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, "sample_size": size}))
        save_file({"proj_out.bias": torch.zeros(32)}, folder / name / "diffusion_pytorch_model.safetensors")
    torch.save({"t_block.1.weight": torch.zeros(48, 8)}, folder / "pixart.pth")


class _Touch:
    """Pickles to a call that would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch code-has-run",)


def _official_files(teacher: LoadedModel, folder: Path) -> None:
    """Official files: a good one, and one for each fault."""
    weights = dict(teacher.module.state_dict())

    def save(name: str, content: Any) -> None:
        torch.save(content, folder / name)

    save("good.pt", {"model": weights, "ema": weights, "args": argparse.Namespace(model="tiny")})
    save("gap.pt", {k: v for k, v in weights.items() if not k.startswith("blocks.1.")})
    save(
        "missing.pt",
        {k: v for k, v in weights.items() if k not in ("x_embedder.proj.bias", "blocks.2.attn.qkv.weight")},
    )
    save("unexpected.pt", {**weights, "blocks.0.attn.extra": torch.zeros(3)})
    save("width.pt", {**weights, "blocks.3.mlp.fc1.weight": torch.zeros(64, 16)})
    save("nan.pt", {**weights, "blocks.0.mlp.fc1.bias": torch.full((128,), float("nan"))})
    save("number.pt", {"step": 3})
    save("list.pt", [1, 2, 3])
    save("malicious.pt", {"model": weights, "opt": _Touch()})
    (folder / "malicious-bare.pt").write_bytes(pickle.dumps({"model": _Touch()}))
    whole = (folder / "good.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("These are not the weights you are looking for.\n" * 20, encoding="utf-8")
    Image.new("L", (8, 8)).save(folder / "picture.pt", format="PNG")
    with zipfile.ZipFile(folder / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    tensors = (folder / "teacher" / "model.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(tensors[:-100])


def _damaged_folders(folder: Path) -> None:
    """Model folders of ours with one fault each."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "teacher", folder / name))

    def rewrite(name: str, **fields: Any) -> None:
        path = copy(name) / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")

    rewrite("newer", format_version=99)
    rewrite("other-family", family="ditt")
    rewrite("wrong-depth", arch={**TINY, "depth": 3})
    rewrite("odd-sizes", arch={**TINY, "num_heads": 5})
    (copy("torn-json") / "model.json").write_text('{"format_version": 1, "fam', encoding="utf-8")
    (copy("no-tensors") / "model.safetensors").unlink()
    changed = copy("changed") / "model.safetensors"
    tensors = load_file(changed)
    tensors["blocks.0.mlp.fc1.bias"][0] += 1
    save_file(tensors, changed)


def _image_files(folder: Path) -> None:
    """Data sets, samples and references with one fault each."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 10
    floats = images.astype(np.float32) / 127.5 - 1
    floats[3, 2, 1, 0] = np.nan
    np.savez(folder / "images.npz", images, labels)
    np.savez(folder / "nan.npz", floats, labels)
    np.savez(folder / "large.npz", np.repeat(np.repeat(images, 2, 1), 2, 2), labels)
    np.savez(folder / "many-classes.npz", images, np.arange(40))
    np.savez(folder / "unlabelled.npz", images)
    np.savez(folder / "negative.npz", images, labels - 1)
    np.savez(folder / "nothing.npz", images[:0], labels[:0])
    np.savez(folder / "few.npz", images[:2], labels[:2])
    np.savez(folder / "named.npz", pictures=images)
    np.savez(folder / "pickled.npz", np.array([_Touch()], dtype=object), labels)
    whole = (folder / "images.npz").read_bytes()
    (folder / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.npz").write_text("no images here", encoding="utf-8")
    (folder / "no-pictures").mkdir()


def _outputs(folder: Path) -> None:
    """Files and folders of others, and recipes."""
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter-1.txt").write_text("In the beginning", encoding="utf-8")
    (folder / "thesis" / "run.json").write_text('{"made_by": "somebody"}', encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "notes.json").write_text('{"mine": true}', encoding="utf-8")
    (folder / "notes.html").write_text("<p>mine</p>", encoding="utf-8")
    (folder / "photo.png").write_bytes((folder / "picture.pt").read_bytes())
    (folder / "broken.toml").write_text("[prune\nscheme = 1:2\n", encoding="utf-8")
    (folder / "typo.toml").write_text('[prune]\nshceme = "1:2"\n', encoding="utf-8")
    (folder / "kind.toml").write_text("[prune]\nscheme = [1, 2]\n", encoding="utf-8")
    (folder / "good.toml").write_text('teacher = "teacher"\n[prune.training]\nsteps = 2\n', encoding="utf-8")
