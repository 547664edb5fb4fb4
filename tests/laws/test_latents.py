"""Latents: the published crop, shards that others can read, and batches that are a function of their address."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scipy.special import ndtr

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.latents import (
    MANIFEST,
    LatentBatches,
    LatentSpec,
    encoded_values,
    images_in_part,
    open_latents,
    posterior_noise,
    unfinished_shard,
    write_manifest,
)
from tinyfusion.data.picture import decode

CPU = torch.device("cpu")
NUM, SHAPE = 23, (3, 4, 4)


# ---------------------------------------------------------------------------------------------------------------- crop


def resampling(size: int, wanted: int, kernel: Callable[[np.ndarray], np.ndarray], reach: float) -> np.ndarray:
    """(wanted, size): weights of a filter that is stretched where it makes smaller."""
    scale = size / wanted
    stretch = max(scale, 1.0)
    matrix = np.zeros((wanted, size))
    for i in range(wanted):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - reach * stretch + 0.5), 0), min(int(centre + reach * stretch + 0.5), size)
        weights = kernel((np.arange(low, high) + 0.5 - centre) / stretch)
        matrix[i, low:high] = weights / weights.sum()
    return matrix


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resized(pixels: np.ndarray, height: int, width: int, kernel: Callable, reach: float) -> np.ndarray:
    """To whole levels after each direction, as 8-bit pictures are: columns first."""
    across = np.clip(
        np.floor(0.5 + np.einsum("wx,hxc->hwc", resampling(pixels.shape[1], width, kernel, reach), pixels)), 0, 255
    )
    return np.clip(
        np.floor(0.5 + np.einsum("hy,ywc->hwc", resampling(pixels.shape[0], height, kernel, reach), across)), 0, 255
    )


def reference_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    pixels = pixels.astype(float)
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resized(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    factor = size / min(pixels.shape[:2])
    pixels = resized(pixels, round(pixels.shape[0] * factor), round(pixels.shape[1] * factor), bicubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("height", "width"), [(16, 16), (16, 27), (37, 21), (64, 33), (65, 130), (9, 12), (131, 77), (17, 300)]
)
def test_the_crop_is_the_published_one(height: int, width: int) -> None:
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (3 + c) + y / (5 - c)) + 20 * ((x * 7 + y * 13 + c) % 2) for c in range(3)]
    pixels = np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8)
    found = decode(encoded(Image.fromarray(pixels)), "a picture", 16).in_colour.astype(float)
    away = np.abs(found - reference_crop(pixels, 16))
    assert found.shape == (16, 16, 3)
    assert away.max() <= 1, "rounding at most"
    assert away.mean() < 0.05


def test_the_crop_is_the_middle_and_odd_rests_go_to_the_bottom_and_right() -> None:
    pixels = np.zeros((8, 13, 3), np.uint8)
    pixels[:, :, 0] = np.arange(13)
    assert decode(encoded(Image.fromarray(pixels)), "", 8).pixels[0, :, 0].tolist() == list(range(2, 10))
    assert decode(encoded(Image.fromarray(pixels.transpose(1, 0, 2))), "", 8).pixels[:, 0, 0].tolist() == list(
        range(2, 10)
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "LA"])
def test_every_opaque_picture_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    found = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), "a picture", 8).in_colour
    assert found.shape == (8, 8, 3)
    assert found.min() >= 250


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 254))), "partly transparent"),
        (encoded(Image.new("I;16", (8, 8)), "TIFF"), "mode I;16: wanted 8 bits"),
        (encoded(Image.new("RGB", (64, 64), (9, 8, 7)))[:-30], "cannot be decoded as a picture"),
        (encoded(Image.new("RGB", (1, 60_000))), "too narrow for a crop"),
        (b"no picture", "cannot be decoded"),
        (None, "wanted an encoded picture (bytes); got NoneType"),
    ],
    ids=["transparent", "16-bit", "cut-short", "narrow", "text", "none"],
)
def test_what_is_no_picture_is_named(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=r"^there") as caught:
        decode(content, "there", 256)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the files


def specified(kind: str = "moments", dtype: str = "float32", rows: int = 2, **more: object) -> LatentSpec:
    values = dict(num_images=NUM, shard_images=7, classes=5, scale=0.5, shift=0.25, shape=SHAPE)
    return LatentSpec(kind=kind, dtype=dtype, rows=rows, **{**values, **more})


def stored(spec: LatentSpec) -> torch.Tensor:
    values = torch.from_numpy(Randomness(1).at(0, 0, spec.num_images).normal("stored", spec.values))
    return values.to(torch.bfloat16).float() if spec.dtype == "bfloat16" else values


def made(folder: Path, spec: LatentSpec, values: torch.Tensor | None = None) -> Path:
    """A set of `stored` values; labels are the numbers of images, modulo 5."""
    folder.mkdir(parents=True, exist_ok=True)
    values = stored(spec) if values is None else values
    labels = np.arange(spec.num_images) % 5
    for shard in range(spec.shards):
        first, num = spec.bounds(shard)
        with unfinished_shard(folder, spec, shard, labels[first : first + num], 0) as append:
            append(encoded_values(values[first : first + num], spec.dtype))
    write_manifest(folder, spec, {})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["moments", "samples"])
@pytest.mark.parametrize("rows", [1, 2])
def test_shards_are_safetensors_files(tmp_path: Path, kind: str, dtype: str, rows: int) -> None:
    spec = specified(kind, dtype, rows)
    folder, read, labels = made(tmp_path / "set", spec), [], []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.get_tensor(kind).dtype == getattr(torch, dtype)
            read.append(opened.get_tensor(kind).float())
            labels.append(opened.get_tensor("labels"))
    assert torch.equal(torch.cat(read), stored(spec))
    assert torch.cat(labels).tolist() == [i % 5 for i in range(NUM)]
    opened_set = open_latents(folder)
    rows_of, mirrored = np.array([22, 0, 7, 6, 13]), np.array([True, False, False, True, True]) & (rows == 2)
    expected = stored(spec)[rows_of, mirrored.astype(int)]
    assert torch.equal(opened_set.gather(rows_of, mirrored), expected)


def test_a_part_goes_on_and_another_sets_part_does_not(tmp_path: Path) -> None:
    spec, labels = specified(), np.arange(7)
    whole = made(tmp_path / "whole", specified(num_images=7))
    one = encoded_values(stored(specified())[:1], "float32")
    with pytest.raises(RuntimeError), unfinished_shard(tmp_path, spec, 1, labels, 0) as append:
        append(one * 3 + one[:100])
    assert images_in_part(tmp_path, spec, 1, labels) == 3
    assert images_in_part(tmp_path, spec, 1, labels + 1) == 0
    assert images_in_part(tmp_path, spec, 0, labels) == 0
    with unfinished_shard(tmp_path, spec, 1, labels, 2) as append:
        append(one * 5)
    assert (tmp_path / spec.file_name(1)).stat().st_size == spec.shard_bytes(1)
    assert not list(tmp_path.glob(".*part"))
    assert whole.is_dir()


def test_two_processes_do_not_write_one_shard(tmp_path: Path) -> None:
    spec, labels = specified(), np.arange(7)
    with (
        pytest.raises(UserError, match="another process writes"),
        unfinished_shard(tmp_path, spec, 0, labels, 0),
        unfinished_shard(tmp_path, spec, 0, labels, 0),
    ):
        pass


def test_a_pipe_in_the_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    spec, labels = specified(), np.arange(7)
    for name in (spec.file_name(0), f".{spec.file_name(0)}.part"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="is a pipe"), unfinished_shard(tmp_path, spec, 0, labels, 0):
            raise AssertionError("never reached")
        if name.startswith("."):
            with pytest.raises(UserError, match="is a pipe"):
                images_in_part(tmp_path, spec, 0, labels)
        (tmp_path / name).unlink()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda f: flip_byte(shard_of(f, 2)), "shard-00002-of-00004.safetensors is damaged: its SHA-256"),
    "cut": (lambda f: shard_of(f, 1).write_bytes(shard_of(f, 1).read_bytes()[:-1]), "shard-00001-of-00004.safetensors is damaged: it has"),
    "missing": (lambda f: shard_of(f, 0).unlink(), "shard-00000-of-00004.safetensors is missing"),
    "other-header": (lambda f: swap_header(f), "shard-00003-of-00004.safetensors is damaged: its header"),
    "no-manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json: wanted a folder of"),
    "newer": (lambda f: change(f, format_version=2), "format_version 2; this version reads 1: upgrade"),
    "foreign": (lambda f: change(f, made_by="x"), "is no manifest of latents"),
    "numbers": (lambda f: change(f, num_images=22), "do not go together"),
    "field": (lambda f: change(f, shape=None), "manifest.json is damaged"),
    "many-images": (lambda f: change(f, num_images=10**12), "num_images must be at least 1 and at most 1,000,000,000"),
    "many-shards": (lambda f: change(f, num_images=10**9, shard_images=1), "do not go together"),
    "text-scale": (lambda f: change(f, scale="x"), "manifest.json is damaged: scale wants a number; got 'x'"),
    "nan-scale": (lambda f: change(f, scale=math.nan), "manifest.json is damaged: scale wants a finite number; got nan"),
    "negative-scale": (lambda f: change(f, scale=-1.0), "do not go together"),
    "true-rows": (lambda f: change(f, rows=True), "manifest.json is damaged: rows wants a whole number; got True"),
    "text-size": (lambda f: change(f, size="16"), "manifest.json is damaged: size wants a whole number; got '16'"),
    "negative-size": (lambda f: change(f, size=-8), "size must be at least 1; got -8"),
    "list-vae": (lambda f: change(f, vae=[1]), "manifest.json is damaged: vae wants a text; got [1]"),
    "other-dtype": (lambda f: change(f, dtype="float64"), "do not go together"),
    "shards-text": (lambda f: change(f, shards=["x"]), "manifest.json is damaged: shards"),
    "shards-twice": (lambda f: change(f, shards=[dict(file=shard_of(f, 0).name, bytes=1, sha256="")] * 4), "do not go together"),
    "escape": (lambda f: change(f, shards=[{"file": "../x.safetensors", "bytes": 1, "sha256": ""}] * 4), "do not go together"),
    "cut-to-odd-bytes": (lambda f: shard_of(f, 1).write_bytes(shard_of(f, 1).read_bytes()[:259]), "it has 259 bytes, wanted"),
    "labels": (lambda f: change(f, classes=3), "is damaged: labels 0 to 4 of 3 classes"),
}  # fmt: skip


def shard_of(folder: Path, shard: int) -> Path:
    return folder / specified().file_name(shard)


def swap_header(folder: Path) -> None:
    path = shard_of(folder, 3)
    path.write_bytes(path.read_bytes().replace(b'"moments"', b'"momentz"', 1))


def change(folder: Path, **values: object) -> None:
    about = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**about, **values}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    folder = made(tmp_path / "set", specified())
    DAMAGES[damage][0](folder)
    with pytest.raises(UserError) as caught:
        open_latents(folder)
    assert DAMAGES[damage][1] in str(caught.value)


def test_numbers_that_are_not_finite_name_their_shard(tmp_path: Path) -> None:
    values = stored(specified())
    values[9, 1, 2, 3, 3] = math.nan
    latents = open_latents(made(tmp_path / "set", specified(), values))
    with pytest.raises(
        UserError, match=r"shard-00001-of-00004.safetensors is damaged: image 9 has values that are not finite"
    ):
        latents.gather(np.array([3, 9]), np.array([True, True]))
    latents.gather(np.array([3, 9]), np.array([True, False]))


# ----------------------------------------------------------------------------------------------------------- the batches


def batches(folder: Path, flip: float = 0.0, seed: int = 3) -> LatentBatches:
    return LatentBatches(open_latents(folder), Randomness(seed), CPU, flip)


def test_an_epoch_has_every_image_once_whatever_the_batch(tmp_path: Path) -> None:
    values = torch.arange(NUM * 2 * 3 * 16).reshape(NUM, 2, 3, 4, 4).float()
    source = batches(made(tmp_path / "set", specified("samples"), values))
    draws = Randomness(3)
    seen = [source(step, 5, draws.at(step, 0, 5)).x[:, 0, 0, 0] for step in range(23)]
    numbers = (torch.cat(seen) / 96).long()
    for epoch in range(5):
        assert sorted(numbers[epoch * NUM : (epoch + 1) * NUM].tolist()) == list(range(NUM))
    assert not torch.equal(numbers[:NUM], numbers[NUM : 2 * NUM])
    other = torch.cat([source(step, 23, draws.at(step, 0, 23)).x[:, 0, 0, 0] for step in range(5)])
    assert torch.equal((other / 96).long(), numbers)
    labels = torch.cat([source(step, 5, draws.at(step, 0, 5)).condition["labels"] for step in range(23)])
    assert torch.equal(labels, numbers % 5)


@pytest.mark.parametrize("kind", ["moments", "samples"])
def test_slices_of_a_batch_are_the_batch(tmp_path: Path, kind: str) -> None:
    folder, draws = made(tmp_path / "set", specified(kind)), Randomness(3)
    whole = batches(folder, flip=0.5)(11, 12, draws.at(11, 0, 12))
    slices = [batches(folder, flip=0.5)(11, 12, draws.at(11, first, num)) for first, num in ((0, 5), (5, 1), (6, 6))]
    assert torch.equal(torch.cat([piece.x for piece in slices]), whole.x)
    assert torch.equal(torch.cat([piece.condition["labels"] for piece in slices]), whole.condition["labels"])
    again = batches(folder, flip=0.5)(12, 12, draws.at(12, 0, 12))
    assert not torch.equal(again.x, whole.x)


def test_mirrored_copies_come_as_often_as_asked(tmp_path: Path) -> None:
    values = torch.zeros(NUM, 2, 3, 4, 4)
    values[:, 1] = 1
    folder, draws = made(tmp_path / "set", specified("samples"), values), Randomness(3)
    for flip, low, high in ((0.0, 0, 0), (0.5, 0.46, 0.54), (1.0, 1, 1)):
        source = batches(folder, flip)
        share = float(torch.stack([source(s, 50, draws.at(s, 0, 50)).x.mean() for s in range(50)]).mean())
        assert low <= share <= high
    single = made(tmp_path / "single", specified(rows=1))
    with pytest.raises(UserError, match="has no mirrored copies"):
        batches(single, flip=0.5)


def test_the_posterior_is_sampled_anew(tmp_path: Path) -> None:
    """Mean, deviation and shape of what comes, over 3,000 readings of two images."""
    spec = specified(num_images=2, rows=1)
    values = stored(spec)
    source = batches(made(tmp_path / "set", spec, values))
    draws, order = Randomness(3), []
    seen = torch.stack([source(s, 2, draws.at(s, 0, 2)).x for s in range(3000)])
    for step in range(3000):
        order.append(source.picked(2 * step, 2))
    sorted_seen = torch.stack([x[torch.argsort(o)] for x, o in zip(seen, order, strict=True)])
    mean, log_variance = values[:, 0].chunk(2, dim=1)
    z = ((sorted_seen / spec.scale + spec.shift) - mean) / torch.exp(0.5 * log_variance)
    sure = 5 / math.sqrt(3000)
    assert float(z.mean(0).abs().max()) < sure
    assert float((z.var(0) - 1).abs().max()) < sure * math.sqrt(2)
    assert float(z.mean()) == pytest.approx(0, abs=5 / math.sqrt(z.numel()))
    assert float((z**4).mean()) == pytest.approx(3, abs=0.1)
    assert float((z[1:] * z[:-1]).mean()) == pytest.approx(0, abs=5 / math.sqrt(z.numel())), "steps are independent"
    assert torch.allclose(source.rows(0, 2)[0], ((mean - spec.shift) * spec.scale)[source.picked(0, 2)])


def noise(step: int, first: int, num: int, shape: tuple[int, ...]) -> torch.Tensor:
    return posterior_noise(Randomness(0).at(step, first, num), shape)(num)


def test_posterior_noise_is_addressed_and_normal() -> None:
    whole = noise(4, 0, 40, (3, 5, 5))
    assert torch.equal(whole[7:19], noise(4, 7, 12, (3, 5, 5)))
    in_turn = posterior_noise(Randomness(0).at(4, 0, 40), (3, 5, 5))
    assert torch.equal(torch.cat([in_turn(num) for num in (1, 7, 32)]), whole)
    many = np.sort(noise(0, 0, 50, (4, 32, 32)).double().flatten().numpy())
    assert abs(many.mean()) < 5 / math.sqrt(len(many))
    assert many.var() == pytest.approx(1, abs=5 * math.sqrt(2 / len(many)))
    assert (many**4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / len(many)))
    steps = np.arange(len(many) + 1) / len(many)
    apart = np.maximum(steps[1:] - ndtr(many), ndtr(many) - steps[:-1]).max()
    assert apart * math.sqrt(len(many)) < 1.95, "Kolmogorov-Smirnov, one in a thousand"


def test_a_batch_is_that_of_its_parts(tmp_path: Path) -> None:
    """Moments are sampled a few images at a time: neither that nor the part that a process wants may be seen in what comes."""
    spec = specified(num_images=90, shard_images=64)
    folder, address = made(tmp_path / "set", spec), Randomness(3)
    whole = batches(folder, flip=0.5)(2, 80, address.at(2, 0, 80))
    slices = [batches(folder, flip=0.5)(2, 80, address.at(2, first, 16)) for first in range(0, 80, 16)]
    assert torch.equal(torch.cat([piece.x for piece in slices]), whole.x)
    assert torch.equal(torch.cat([piece.condition["labels"] for piece in slices]), whole.condition["labels"])
