"""Files that claim more than they hold: sizes, block numbers, records and storages. Refused before anything is built of them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyfusion.core import reading
from tinyfusion.core.errors import UserError
from tinyfusion.core.tensors import read_pickle, read_safetensors
from tinyfusion.core.torchscript import is_torchscript, read_torchscript
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.families.dit import diffusers
from tinyfusion.models.autoencoder import open_autoencoder
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
HUGE = (10**9, 10**12, 10**18, 10**30)


@pytest.fixture
def model(tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    return tiny_model(depth=2)


def refused(call: Callable[[], Any], message: str, seconds: float = 5, mib: float = 300) -> None:
    """The call is refused at once, in the words of `message`, and takes no memory to speak of."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=message):
        call()
    assert time.monotonic() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < mib * 2**10


def with_record(folder: Path, **fields: Any) -> Path:
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**record, **fields}))
    return folder


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "size",
    [
        "input_size",
        "patch_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "num_classes",
        "head_dim",
        "mlp_hidden",
    ],
)
def test_sizes_of_our_folder(model: LoadedModel, tmp_path: Path, size: str, value: int) -> None:
    save_model(model, tmp_path / "m")
    with_record(tmp_path / "m", arch={**dataclasses.asdict(model.arch), size: value})
    refused(lambda: open_model(tmp_path / "m"), "damaged|beyond its weights")


@pytest.mark.parametrize("value", [100, 2_000, 100_000])
def test_plausible_sizes_are_compared_with_the_tensors(model: LoadedModel, tmp_path: Path, value: int) -> None:
    """Small enough to be built, without values; beyond the weights all the same."""
    save_model(model, tmp_path / "m")
    for size in ("hidden_size", "depth", "num_classes", "mlp_hidden"):
        with_record(tmp_path / "m", arch={**dataclasses.asdict(model.arch), size: value})
        refused(
            lambda: open_model(tmp_path / "m"),
            f"has {size} {value}, which is beyond|{size} must be at most|does not hold",
        )


@pytest.mark.parametrize("field", ["num_layers", "sample_size", "num_attention_heads", "attention_head_dim",
                                   "in_channels", "patch_size", "num_embeds_ada_norm"])  # fmt: skip
@pytest.mark.parametrize("value", [10**4, *HUGE])
def test_sizes_of_a_folder_of_diffusers(model: LoadedModel, tmp_path: Path, field: str, value: int) -> None:
    tensors = diffusers.to_diffusers(model.module.state_dict(), model.arch.depth)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    config = {**diffusers.config_of_arch(model.arch), field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(lambda: open_model(tmp_path), "damaged|beyond its weights|out_channels|patches along a side")


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(
    "field", ["num_layers", "sample_size", "num_attention_heads", "caption_channels", "patch_size"]
)
def test_sizes_of_a_folder_of_texts(tmp_path: Path, field: str, value: int) -> None:
    config = {"_class_name": "PixArtTransformer2DModel", "num_layers": 1, "num_attention_heads": 1, "patch_size": 2}
    config |= {"attention_head_dim": 8, "in_channels": 4, "sample_size": 4, "caption_channels": 8, field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {"proj_out.bias": torch.zeros(32), "captions": torch.zeros(2, 3, 8), "caption_mask": torch.ones(2, 3)},
        tmp_path / WEIGHTS,
    )
    refused(
        lambda: open_model(tmp_path),
        "damaged|beyond its weights|use_additional_conditions|interpolation_scale|must be at least",
    )


def test_texts_for_numbers_of_heads_are_not_multiplied(tmp_path: Path) -> None:
    config = {"_class_name": "PixArtTransformer2DModel", "num_attention_heads": "8", "attention_head_dim": 10**12}
    config |= {"num_layers": 1, "patch_size": 2, "in_channels": 4, "sample_size": 4, "caption_channels": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"proj_out.bias": torch.zeros(32)}, tmp_path / WEIGHTS)
    refused(lambda: open_model(tmp_path), "are no whole numbers")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_per_block": 10**12}, "layers_per_block 1000000000000, which is beyond"),
        ({"block_out_channels": [10**9]}, "block_out_channels 1000000000, which is beyond"),
        ({"block_out_channels": [8] * 10_000}, "no list of 1 to 16 whole numbers"),
        ({"block_out_channels": "8"}, "no list of 1 to 16 whole numbers"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 10_000}, "10000 down_block_types"),
        ({"latent_channels": 10**18}, "latent_channels 1000000000000000000, which is beyond"),
        ({"latent_channels": "four"}, "latent_channels is four, wanted a whole number"),
        ({"scaling_factor": "big"}, "scaling_factor is big, wanted a number"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan, wanted a number above 0"),
        ({"scaling_factor": 0}, "scaling_factor is 0, wanted a number above 0"),
        ({"scaling_factor": 10**400}, "scaling_factor is 1000"),
        ({"shift_factor": [1]}, r"shift_factor is \[1\], wanted a number"),
    ],
)
def test_sizes_and_factors_of_an_autoencoder(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    good = {"_class_name": "AutoencoderKL", "block_out_channels": [8], "latent_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps({**good, **config}))
    save_file({"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}, tmp_path / WEIGHTS)
    refused(lambda: open_autoencoder(str(tmp_path)), message)


@pytest.mark.parametrize("zeros", [6, 12, 18, 4999])
def test_block_numbers(model: LoadedModel, tmp_path: Path, zeros: int) -> None:
    tensors = {name.replace("blocks.1.", f"blocks.1{'0' * zeros}."): t for name, t in model.module.state_dict().items()}
    torch.save(tensors, tmp_path / "m.pt")
    refused(
        lambda: open_model(tmp_path / "m.pt", num_heads=2),
        r"gaps: \[1, 2, 3, 4\] missing of 0 to|unexpected blocks\.1000",
    )


@pytest.mark.parametrize("sizes", [{"depth": 10**9}, {"hidden_size": 4 * 10**9}, {"input_size": 10**6, "patch_size": 2},
                                   {"hidden_size": 2**19, "depth": 4000}])  # fmt: skip
def test_sizes_of_a_new_model(sizes: dict[str, int]) -> None:
    tiny = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=4, num_heads=2, num_classes=5)
    refused(
        lambda: new_model("dit", {**tiny, **sizes}, 0), "at most|a new model of these sizes would take .* GiB of memory"
    )


# ----------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lineage": [{}]}, r"damaged: lineage\[0\]"),
        ({"lineage": [{"hash": "a", "depth": 4, "kept": None}]}, r"lineage\[0\]\.depth wants names with values"),
        (
            {"lineage": [{"hash": "a", "depth": {"blocks": 2}, "kept": None}], "kept": {"blocks": [0, 5]}},
            "no rising blocks of a parent",
        ),
        (
            {"lineage": [{"hash": "a", "depth": {"blocks": 2}, "kept": None}], "kept": {"blocks": [1, 0]}},
            "no rising blocks",
        ),
        ({"kept": {"blocks": [0]}}, "kept names other numbers of blocks"),
        ({"image_size": 10**18}, "image_size must be at least 1 and at most"),
        ({"latent_scale": float("nan")}, "latent_scale wants a finite number"),
        ({"latent_scale": 10**400}, "latent_scale must be above 0 and at most 1e[+]06; got 1e[+]308"),
        ({"dynamic": {"ratio": "half"}}, "dynamic.ratio must be above 0"),
    ],
)
def test_records_of_our_folder(model: LoadedModel, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    save_model(model, tmp_path / "m")
    refused(lambda: open_model(with_record(tmp_path / "m", **fields)), message)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format_version": ' + "9" * 5000 + "}", "[1]", "\ud800"])
def test_odd_texts_of_a_record(model: LoadedModel, tmp_path: Path, text: str) -> None:
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / "model.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(lambda: open_model(tmp_path / "m"), "model.json is damaged")


# ------------------------------------------------------------------------------------------------------- torch files


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def test_zeros_by_their_number_are_not_made(tmp_path: Path) -> None:
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": _Call(bytearray, 3 * 2**30)}, protocol=2))
    torch.save({"a": _Call(bytearray, 3 * 2**30)}, tmp_path / "zip.pt")
    for name in ("bare.pt", "zip.pt"):
        refused(lambda name=name: read_pickle(tmp_path / name), r"foreign objects \(bytearray\)|is not a model file")


def test_compressed_and_overlapping_records(model: LoadedModel, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "good.pt")
    for kind, name in ((zipfile.ZIP_DEFLATED, "deflated.pt"), (zipfile.ZIP_STORED, "stored.pt")):
        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(tmp_path / name, "w", kind) as new:
            for entry in old.infolist():
                content = b"\0" * 2**28 if entry.filename.endswith("data/0") and kind else old.read(entry.filename)
                new.writestr(entry.filename, content)
    refused(lambda: read_pickle(tmp_path / "deflated.pt"), "is compressed, and torch stores its files as they are")
    assert torch.equal(read_pickle(tmp_path / "stored.pt")["a"], torch.zeros(1000))


def test_a_small_storage_is_not_a_large_tensor(model: LoadedModel, tmp_path: Path) -> None:
    tensors = dict(model.module.state_dict())
    tensors["blocks.0.mlp.fc1.weight"] = torch.zeros(1).expand(10**5, 10**5)
    torch.save(tensors, tmp_path / "m.pt")
    refused(lambda: open_model(tmp_path / "m.pt", num_heads=2), "its tensors would take 38,147 MiB, and it has 0.")


def test_files_larger_than_the_memory_are_refused(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(dict(model.module.state_dict()), tmp_path / "m.pt")
    monkeypatch.setattr("tinyfusion.core.reading.UNCHECKED_BYTES", 0)
    monkeypatch.setattr(reading, "available_memory_bytes", lambda: 1000)
    refused(lambda: open_model(tmp_path / "m.pt", num_heads=2), r"m\.pt in float32 would take .* GiB of memory")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1000000000000000000000000000000],"data_offsets":[0,4]}}',
        b"[" * 5000,
    ],
)
def test_safetensors_headers(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(lambda: read_safetensors(tmp_path / "m.safetensors"), "no readable safetensors file")
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**60) + header)
    refused(lambda: read_safetensors(tmp_path / "long.safetensors"), "no readable safetensors file")


class _Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def test_programs_with_records_that_unpack_to_more(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the format is still that of published weights
        torch.jit.save(torch.jit.trace(_Two(), torch.zeros(1, 4)), str(tmp_path / "good.pt"))
    assert read_torchscript(tmp_path / "good.pt")["fc.weight"].shape == (3, 4)
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, b"\0" * 2**28 if "/data/" in entry.filename else old.read(entry.filename))
    refused(lambda: read_torchscript(tmp_path / "bomb.pt"), "is compressed")


# ----------------------------------------------------------------------------------------------------- special files


def test_pipes_and_devices_are_not_opened(model: LoadedModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "m" / "model.safetensors")
    (tmp_path / "n").mkdir()
    os.mkfifo(tmp_path / "n" / "model.json")
    (tmp_path / "null.pt").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "m", tmp_path / "n"):
        refused(lambda path=path: open_model(path), "is a pipe")
    refused(lambda: open_model(tmp_path / "null.pt"), "is a device")
    refused(lambda: is_torchscript(tmp_path / "pipe"), "is a pipe")
    refused(lambda: open_extractor.__wrapped__(str(tmp_path / "null.pt"), "cpu"), "is a device")


def test_what_cannot_be_read_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(lambda: open_model(tmp_path / "loop"), "cannot read .*loop: Too many levels of symbolic links")
    torch.save({"a": torch.zeros(1)}, tmp_path / "m.pt")

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused(lambda: open_model(tmp_path / "m.pt"), r"cannot read .*m\.pt: Permission denied")


def test_a_classifier_is_loaded_strictly(tmp_path: Path) -> None:
    from importlib.resources import files

    source = Path(str(files("tinyfusion"))) / "assets" / "digits-classifier"
    record, tensors = json.loads((source / "classifier.json").read_text()), load_file(source / "classifier.safetensors")
    first = next(iter(tensors))
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        f"missing {first}": ({}, {name: t for name, t in tensors.items() if name != first}),
        "unexpected more": ({}, {**tensors, "more": torch.zeros(1)}),
        f"{first} is not finite": ({}, {**tensors, first: torch.full_like(tensors[first], torch.nan)}),
        r"wanted \(1000000000, ": ({"arch": {**record["arch"], "widths": [10**9, 8, 8]}}, tensors),
        "do not fit": ({"arch": {**record["arch"], "widths": ["a", 8, 8]}}, tensors),
        "is damaged": ({"arch": [1]}, tensors),
    }
    for message, (fields, state) in cases.items():
        (tmp_path / "classifier.json").write_text(json.dumps({**record, **fields}))
        save_file(state, tmp_path / "classifier.safetensors")
        refused(lambda: open_extractor.__wrapped__(str(tmp_path), "cpu"), message)
