"""`encode`: the same shards from one process and three, killed or not; every kind of source; and training on what it made."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kills import killed_at, together
from material import Cli, done
from PIL import Image

import tinyfusion.commands.encode as encode_module
from tinyfusion.core import rundir
from tinyfusion.core.rng import Randomness
from tinyfusion.data import latents
from tinyfusion.data.latents import MANIFEST, open_latents
from tinyfusion.data.picture import decode
from tinyfusion.models.autoencoder import open_autoencoder

NUM, CLASSES, SIZE = 22, 3, 16
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
SET = "--set encode.shard_images=4 --set encode.batch_size=3"
ENCODE = f"encode --data pictures --vae vae --size {SIZE} --out latents {SET}"
SHARDS = -(-NUM // 4)
QUICK = "--set train.ema_decay=0.1 --set model.family=dit --set model.hidden_size=16 --set model.num_heads=2"


def picture(i: int) -> Image.Image:
    pixels = Randomness(5).at(0, i, 1).integers("pixels", 256, (SIZE + i % 5, SIZE + i % 7, 3))[0]
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(i: int) -> bytes:
    stream = io.BytesIO()
    picture(i).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as a folder of classes, parquet, tars; and a tiny autoencoder."""
    folder = tmp_path_factory.mktemp("sources")
    numbers = sorted(range(NUM), key=lambda i: (i % CLASSES, f"{i:02d}"))  # in the order of the folder
    for i in numbers:
        path = folder / "pictures" / f"class-{i % CLASSES}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    table = pa.table({"image": [{"bytes": encoded(i)} for i in numbers], "label": [i % CLASSES for i in numbers]})
    (folder / "parquet").mkdir()
    pq.write_table(table.slice(0, 9), folder / "parquet" / "a.parquet", row_group_size=4)
    pq.write_table(table.slice(9), folder / "parquet" / "b.parquet", row_group_size=5)
    (folder / "tars").mkdir()
    for name, part in (("0.tar", numbers[:13]), ("1.tar", numbers[13:])):
        with tarfile.open(folder / "tars" / name, "w") as tar:
            for i in part:
                put(tar, f"x/{i:02d}.png", encoded(i))
                put(tar, f"x/{i:02d}.cls", str(i % CLASSES).encode())
    save_autoencoder(folder / "vae")
    return folder


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def save_autoencoder(folder: Path, **more: Any) -> None:
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=down, up_block_types=up, norm_num_groups=4, scaling_factor=0.3,
            **{"latent_channels": 4, **more},
        )  # fmt: skip
    vae.save_pretrained(folder)


@pytest.fixture
def here(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, as the current folder."""
    shutil.copytree(sources, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def content(folder: str | Path) -> dict[str, bytes]:
    """Shards and manifest."""
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "run.json"}
    assert set(found) == {MANIFEST, *(f"shard-{k:05d}-of-{SHARDS:05d}.safetensors" for k in range(SHARDS))}
    return found


# ------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("kind", ["moments", "samples"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_those_of_the_autoencoder(cli: Cli, here: Path, kind: str, dtype: str) -> None:
    done(cli, f"{ENCODE} --set encode.posterior={kind} --set encode.dtype={dtype} --seed 9")
    latents, vae = open_latents(here / "latents"), open_autoencoder("vae")
    assert latents.labels.tolist() == sorted(i % CLASSES for i in range(NUM))
    assert latents.about["class_names"] == ["class-0", "class-1", "class-2"]
    assert latents.about["vae_hash"] == vae.hash()
    files = sorted((here / "pictures").rglob("*.png"))
    pixels = np.stack([decode(file.read_bytes(), "", SIZE).in_colour for file in files]).transpose(0, 3, 1, 2)
    x = torch.from_numpy(pixels).float() / 127.5 - 1
    both = torch.stack([vae.moments(x), vae.moments(x.flip(-1))], 1)
    if kind == "samples":
        noise = torch.from_numpy(Randomness(9).at(0, 0, NUM).normal("posterior", (2, 4, 8, 8)))
        mean, log_variance = both.chunk(2, dim=2)
        both = (mean + (0.5 * log_variance).exp() * noise) * 0.3
    every = np.arange(NUM)
    for row in (0, 1):
        found = latents.gather(every, np.full(NUM, bool(row)))
        near = dict(rtol=1e-4, atol=1e-4) if dtype == "float32" else dict(rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(found, both[:, row], **near)
    assert float((both[:, 0] - both[:, 1]).abs().mean()) > 0.05, "mirrored pictures have other latents"


@pytest.mark.parametrize("source", ["parquet:parquet", "webdataset:tars"])
def test_every_source_gives_the_same_latents(cli: Cli, here: Path, source: str) -> None:
    done(cli, ENCODE)
    done(cli, ENCODE.replace("--data pictures --vae vae", f"--data {source} --vae vae").replace("latents", "other"))
    first, other = content("latents"), content("other")
    assert {k: v for k, v in first.items() if k != MANIFEST} == {k: v for k, v in other.items() if k != MANIFEST}


def test_a_training_takes_them(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    sizes = (
        "model.family=dit model.hidden_size=32 model.depth=2 model.num_heads=2"  # the others are those of the latents
    )
    steps = "train.steps=3 train.batch_size=4 train.ema_decay=0.5 train.log_every_steps=1 data.flip=0.5"
    settings = " ".join(f"--set {item}" for item in f"{sizes} {steps}".split())
    done(cli, f"train --data latents:latents --out run {settings}")
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    about = json.loads(Path("run/model/model.json").read_text())
    assert (about["latent_scale"], about["vae"], about["image_size"]) == (0.3, "vae", SIZE)
    assert {name: about["arch"][name] for name in ("input_size", "in_channels", "num_classes")} == {
        "input_size": 8,
        "in_channels": 4,
        "num_classes": 3,
    }
    refused = {
        "--set model.in_channels=3": "has images (4, 8, 8), the model takes (3, 8, 8): --set model.in_channels=4",
        "--set model.num_classes=2": "has 3 classes, the model knows 2: --set model.num_classes=3",
        "--set data.augment=0.5": "are latents, which cannot be turned",
    }
    for change, message in refused.items():
        outcome = cli(*shlex.split(f"train --data latents:latents --out other {settings} {change}"))
        assert outcome.code == 2
        assert message in outcome.err


# ------------------------------------------------------------------------------------------------ processes and kills


def test_three_processes_make_the_shards_of_one(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(cli, ENCODE)
    out = ENCODE.replace("--out latents", f"--out {here / 'three'}")
    assert out != ENCODE
    folder = here
    together(
        3,
        out.replace("--data pictures --vae vae", f"--data {folder / 'pictures'} --vae {folder / 'vae'}"),
        monkeypatch,
        [encode_module],
        [(encode_module, "open_autoencoder")],
    )
    one, three = content(folder / "latents"), content(folder / "three")
    about = [json.loads(files.pop(MANIFEST)) for files in (one, three)]
    assert one == three
    assert {**about[0], "vae": None} == {**about[1], "vae": None}


POINTS: dict[str, tuple[Any, str, int]] = {
    **{f"batch-{k}": (encode_module, "encoded_values", k) for k in (0, 1, 2, 5, 8)},
    "before-the-name-of-a-shard": (os, "fsync", 2),
    "after-the-name-of-a-shard": (os, "fsync", 5),
    "before-the-manifest": (encode_module, "write_manifest", 0),
    "in-the-manifest": (latents, "write_json", 0),
    "before-the-end": (rundir.RunDirectory, "mark", 0),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_ten_moments_it_goes_on_to_the_same_shards(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    whole = content("latents")
    assert len(POINTS) == 10
    for point in POINTS:
        command = ENCODE.replace("--out latents", f"--out {point}")
        killed_at(*POINTS[point], command)
        assert json.loads(Path(point, "run.json").read_text())["state"] == "running", point
        done(cli, command)
        assert content(point) == whole, point
        assert "is finished, 6 shards are as they were" in done(cli, command).err, point


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_again_and_again_in_one_folder(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(cli, ENCODE)
    whole = content("latents")
    command = ENCODE.replace("--out latents", "--out again")
    for point in ("batch-1", "batch-1", "before-the-name-of-a-shard", "batch-5", "in-the-manifest"):
        killed_at(*POINTS[point], command)
    made = 0
    original = encode_module.encoded_values

    def counted(*arguments: Any) -> bytes:
        nonlocal made
        made += 1
        return original(*arguments)

    monkeypatch.setattr(encode_module, "encoded_values", counted)
    done(cli, command)
    assert made == 0, "all shards were there"
    assert content("again") == whole


def test_a_signal_ends_it_with_what_is_whole(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(cli, ENCODE)
    whole = content("latents")
    command, calls = ENCODE.replace("--out latents", "--out other"), itertools.count()
    original = encode_module.encoded_values

    def signalled(*arguments: Any) -> bytes:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "encoded_values", signalled)
        stopped = cli(*shlex.split(command))
    assert stopped.code == 128 + signal.SIGTERM
    assert "the same command continues" in stopped.err.splitlines()[-1]
    assert json.loads(Path("other/run.json").read_text())["state"] == "interrupted"
    unfinished = cli(*shlex.split("train --data latents:other --out run"))
    assert "`encode` has not finished it, the same command continues" in unfinished.err
    done(cli, command)
    assert content("other") == whole


def test_what_is_lost_is_made_again(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    whole = content("latents")
    shard = Path("latents/shard-00003-of-00006.safetensors")
    shard.write_bytes(whole[shard.name][:-2] + b"xx")
    refused = cli(*shlex.split(ENCODE))
    assert refused.code == 2
    assert f"{shard} is damaged" in refused.err
    shard.unlink()
    done(cli, ENCODE)
    assert content("latents") == whole


def test_a_process_that_is_gone_is_named(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    outcome = cli(*shlex.split(f"{ENCODE} --set compute.timeout_s=0.5"))
    assert outcome.code == 2
    assert re.search(
        r"4 of 6 files are missing .* nothing was written for 0\.5 s: process 1, 2 of 3 has ended", outcome.err
    )
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name)
    done(cli, ENCODE)  # with another number of processes
    assert len(open_latents(here / "latents")) == NUM


def test_a_process_without_a_first_one_says_so(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    outcome = cli(*shlex.split(f"{ENCODE} --set compute.timeout_s=0.3"))
    assert outcome.code == 2
    assert "process 0 did not begin latents within 0.3 s" in outcome.err
    monkeypatch.setenv("RANK", "2")
    outcome = cli(*shlex.split(ENCODE))
    assert outcome.code == 2
    assert "RANK 2 of WORLD_SIZE 2: processes are numbered from 0" in outcome.err
    assert not Path("latents").exists()


# ---------------------------------------------------------------------------------------------------- published layout


def published(folder: Path, num: int = 12) -> np.ndarray:
    values = Randomness(2).at(0, 0, num).normal("published", (2, 4, 8, 8))
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for i in range(num):
        np.save(folder / "imagenet256_features" / f"{i}.npy", values[i])
        np.save(folder / "imagenet256_labels" / f"{i}.npy", np.array([i % 7]))
    return values


def test_the_published_layout_is_converted_by_number(cli: Cli, here: Path) -> None:
    values = published(here / "old")
    done(cli, f"encode --data features:old --out latents {SET}")
    latents = open_latents(here / "latents")
    assert latents.labels.tolist() == [i % 7 for i in range(12)]
    assert (latents.spec.kind, latents.spec.scale, latents.spec.rows) == ("samples", 0.18215, 2)
    for row in (False, True):
        assert np.array_equal(latents.gather(np.arange(12), np.full(12, row)).numpy(), values[:, int(row)])


def test_the_published_layout_of_another_autoencoder_has_its_facts(cli: Cli, here: Path) -> None:
    values = published(here / "old")
    command = f"encode --data features:old --vae vae --out latents {SET}"
    done(cli, command)
    latents = open_latents(here / "latents")
    assert (latents.spec.scale, latents.about["vae"], latents.about["size"]) == (0.3, "vae", 16)
    assert latents.about["vae_hash"] == open_autoencoder("vae").hash()
    assert np.array_equal(latents.gather(np.arange(12), np.zeros(12, bool)).numpy(), values[:, 0])
    assert "is finished" in done(cli, command).err
    refused = cli(*shlex.split(command.replace("--vae vae ", "")))
    assert refused.code == 2
    assert "made with another recipe" in refused.err
    done(cli, f"train --data latents:latents --out run --steps 1 --set model.depth=1 --set train.batch_size=2 {QUICK}")
    about = json.loads(Path("run/model/model.json").read_text())
    assert (about["latent_scale"], about["vae"], about["image_size"]) == (0.3, "vae", 16)


def test_the_published_layout_and_an_autoencoder_of_other_channels(cli: Cli, here: Path) -> None:
    published(here / "old")
    save_autoencoder(here / "three", latent_channels=3)
    outcome = cli(*shlex.split(f"encode --data features:old --vae three --out latents {SET}"))
    assert outcome.code == 2
    assert (
        "has latents of 4 channels, and the autoencoder three makes 3: give their autoencoder as --vae" in outcome.err
    )
    assert not Path("latents").exists()


# --------------------------------------------------------------------------------------------------------- orientation


def turned(here: Path) -> None:
    """One picture gets an orientation tag."""
    path = here / "pictures" / "class-1" / "07.png"
    exif = Image.Exif()
    exif[274] = 6
    picture(7).save(path, exif=exif.tobytes())


def test_orientation_tags_are_followed_unless_told_not_to(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    plain = content("latents")
    turned(here)
    ignoring = ENCODE.replace("--out latents", "--out ignored --set encode.orientation=ignore")
    done(cli, ignoring)
    outcome = done(cli, ENCODE.replace("--out latents", "--out followed"))
    assert f"pictures: pictures turned as their orientation tags say: 1 of {NUM}" in outcome.err
    ignored, followed = content("ignored"), content("followed")
    about = {name: json.loads(files.pop(MANIFEST)) for name, files in (("ignored", ignored), ("followed", followed))}
    plain.pop(MANIFEST)
    assert ignored == plain
    assert followed != plain
    assert {name: found["orientation"] for name, found in about.items()} == {"ignored": "ignore", "followed": "follow"}
    refused = cli(*shlex.split(ignoring.replace("--out ignored", "--out followed")))
    assert "made with another recipe (encode.orientation: 'follow' there, 'ignore' now)" in refused.err


def test_latents_from_before_orientation_tags_were_followed_remain_valid(cli: Cli, here: Path) -> None:
    ignoring = f"{ENCODE} --set encode.orientation=ignore"
    done(cli, ignoring)
    for name, section in (("run.json", "recipe"), (MANIFEST, None)):
        path = here / "latents" / name
        record = json.loads(path.read_text())
        (record[section]["encode"] if section else record).pop("orientation")
        path.write_text(json.dumps(record))
    assert "is finished" in done(cli, ignoring).err
    assert len(open_latents(here / "latents")) == NUM
    refused = cli(*shlex.split(ENCODE))
    assert "made with another recipe (encode.orientation: 'ignore' there, 'follow' now)" in refused.err


def test_a_folder_without_classes_is_encoded_as_one(cli: Cli, here: Path) -> None:
    outcome = done(cli, ENCODE.replace("--data pictures", "--data pictures/class-0"))
    assert "pictures/class-0: no class folders, so its pictures are one class (8)" in outcome.err
    latents = open_latents(here / "latents")
    assert (latents.spec.classes, len(latents)) == (1, 8)


# ------------------------------------------------------------------------------------------------------------ bad input


def first_picture(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda here: change(here / "pictures" / "class-1" / "07.png")


def bad_config(**values: Any) -> Callable[[Path], object]:
    def change(here: Path) -> None:
        path = here / "vae" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def columnless(here: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), here / "p.parquet")


def old(name: str, array: np.ndarray | None) -> Callable[[Path], object]:
    """The published layout with one file changed or, None, removed."""

    def change(here: Path) -> None:
        published(here / "old")
        path = here / "old" / f"imagenet256_{name}"
        path.unlink() if array is None else np.save(path, array)

    return change


def bad_weights(here: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = here / WEIGHTS
    tensors = load_file(path)
    tensors["encoder.conv_in.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def retarred(**members: bytes) -> Callable[[Path], object]:
    def change(here: Path) -> None:
        with tarfile.open(here / "odd.tar", "w") as tar:
            for name, value in members.items():
                put(tar, name.replace("_", "."), value)

    return change


ALONE = ENCODE.replace("shard_images=4", "shard_images=99")  # nothing is whole before the damage is met
ODD = ENCODE.replace("--data pictures", "--data webdataset:odd.tar")
OLD = "encode --data features:old --out latents --set encode.shard_images=99"
ROWS: dict[str, tuple[str, Callable[[Path], object] | None, str]] = {
    "no-source": (ENCODE.replace("pictures", "gone"), None, "no pictures at gone: wanted a folder of pictures or of class folders"),
    "no-data": (f"encode --out latents {SET}", None, "encode needs --data"),
    "a-file": (ENCODE.replace("pictures", "parquet/a.parquet"), None, "for a tar or parquet file say parquet:parquet/a.parquet"),
    "no-pictures": (ENCODE, lambda h: (h / "pictures" / "class-9").mkdir(), "class-9 holds no pictures"),
    "cut-short": (ALONE, first_picture(lambda p: p.write_bytes(p.read_bytes()[:-200])), "07.png cannot be decoded as a picture"),
    "transparent": (ALONE, first_picture(lambda p: Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(p)), "07.png is partly transparent"),
    "sixteen-bits": (ALONE, first_picture(lambda p: Image.new("I;16", (9, 9)).save(p, format="TIFF")), "mode I;16: wanted 8 bits"),
    "size": (ENCODE.replace(f"--size {SIZE}", "--size 17"), None, "encode.size 17 is no multiple of 2", ),
    "size-zero": (ENCODE.replace(f"--size {SIZE}", "--size 0"), None, "size must be at least 1"),
    "shards-zero": (f"{ENCODE} --set encode.shard_images=0", None, "shard_images must be at least 1"),
    "vae-gone": (ENCODE.replace("--vae vae", "--vae no-vae"), None, "no autoencoder at no-vae"),
    "vae-empty": (ENCODE.replace("--vae vae", "--vae pictures"), None, "pictures holds no autoencoder: wanted config.json"),
    "vae-class": (ENCODE, bad_config(_class_name="VQModel"), "vae is a VQModel, wanted an AutoencoderKL"),
    "vae-normal": (ENCODE, bad_config(latents_mean=[0.0] * 4), "latents_mean"),
    "vae-weights": (ENCODE, lambda h: (h / WEIGHTS).unlink(), "vae holds no weights"),
    "vae-torn": (ENCODE, lambda h: (h / WEIGHTS).write_bytes(b"12345678x"), "is no readable safetensors file"),
    "vae-nan": (ENCODE, bad_weights, "encoder.conv_in.weight is not finite"),
    "vae-shape": (ENCODE, bad_config(latent_channels=3), "vae"),
    "tar-gone": (ODD, None, "no tars at odd.tar"),
    "tar-torn": (ODD, lambda h: (h / "odd.tar").write_bytes((h / "tars" / "0.tar").read_bytes()[:900]), "odd.tar is damaged: x/00.png has"),
    "tar-text": (ODD, lambda h: (h / "odd.tar").write_text("x" * 2000), "odd.tar cannot be read as a tar"),
    "tar-no-label": (ODD, retarred(a_png=encoded(0)), "odd.tar, a has no label: wanted a.cls"),
    "tar-label": (ODD, retarred(a_png=encoded(0), a_cls=b"cat"), "a.cls: wanted a label, a whole number from 0 to 2,147,483,647; got"),
    "tar-no-pictures": (ODD, retarred(a_txt=b"x"), "odd.tar holds no pictures"),
    "parquet-gone": (ENCODE.replace("pictures", "parquet:none"), None, "no parquet data at none"),
    "parquet-column": (ENCODE.replace("pictures", "parquet:p.parquet"), columnless, "wanted img or image"),
    "out-foreign": (ENCODE, lambda h: ((h / "latents").mkdir(), (h / "latents" / "x").touch()), "is not a tinyfusion run"),
    "out-file": (ENCODE, lambda h: (h / "latents").touch(), "--out latents is a file"),
    "out-pipe": (ENCODE, lambda h: os.mkfifo(h / "latents"), "latents is a pipe: wanted a regular file or a folder"),
    "features-none": (OLD, None, "old: wanted one folder NAME_features"),
    "features-gap": (OLD, old("features/3.npy", None), "has gaps: 3.npy of 12 missing"),
    "features-label": (OLD, old("labels/11.npy", None), "wanted one label per file"),
    "features-shape": (OLD, old("features/5.npy", np.zeros((2, 4, 8, 9), np.float32)), "5.npy is float32 (2, 4, 8, 9)"),
    "features-nan": (OLD, old("features/5.npy", np.full((2, 4, 8, 8), np.nan, np.float32)), "5.npy has values that are not finite"),
    "features-name": (OLD, old("features/x.npy", np.zeros(1)), "holds x.npy: wanted 0.npy"),
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("cause", ROWS)
def test_bad_input(cli: Cli, here: Path, cause: str) -> None:
    command, prepare, message = ROWS[cause]
    if prepare:
        prepare(here)
    before = tree(here)
    outcome = cli(*shlex.split(command))
    assert outcome.code == 2, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert tree(here) == before


def test_another_recipe_and_overwrite(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(cli, ENCODE)
    before = tree(here)
    other = f"{ENCODE} --set encode.mirror=false"
    refused = cli(*shlex.split(other))
    assert refused.code == 2
    assert "made with another recipe (encode.mirror: True there, False now)" in refused.err
    assert tree(here) == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = cli(*shlex.split(f"{other} --overwrite"))
    assert refused.code == 2
    assert "--overwrite of several processes" in refused.err
    monkeypatch.delenv("WORLD_SIZE")
    done(cli, f"{other} --overwrite")
    assert open_latents(here / "latents").spec.rows == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_overwriting_that_is_killed_loses_neither_set(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    whole, other = content("latents"), f"{ENCODE} --set encode.mirror=false"
    for point in ("batch-0", "before-the-name-of-a-shard"):
        killed_at(*POINTS[point], f"{other} --overwrite")
        before = tree(here)
        done(cli, f"{ENCODE} --dry-run")
        assert tree(here) == before, "a look touches nothing"
        done(cli, ENCODE)
        assert "is finished, 6 shards are as they were" in done(cli, ENCODE).err, point
        assert content("latents") == whole and not list((here / "latents").glob(".*")), point
    killed_at(*POINTS["before-the-end"], f"{other} --overwrite")
    done(cli, other)
    assert open_latents(here / "latents").spec.rows == 1
    assert not list((here / "latents").glob(".*")) and not list(here.glob(".*"))


def test_dry_run_counts_and_writes_nothing(cli: Cli, here: Path) -> None:
    before = tree(here)
    outcome = done(cli, f"{ENCODE} --dry-run --json")
    plan = outcome.last_json["plan"]
    assert plan["shards"].startswith("6 of 4 images, 6 to be made")
    assert plan["disk_mib"] == pytest.approx(NUM * 2 * 8 * 64 * 4 / 2**20, rel=0.05)
    assert tree(here) == before


def test_a_damaged_picture_may_be_put_right_on_the_way(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    whole = content("latents")
    picture_file = here / "pictures" / "class-2" / "20.png"
    right = picture_file.read_bytes()
    picture_file.write_bytes(right[:-200])
    command = ENCODE.replace("--out latents", "--out other")
    assert cli(*shlex.split(command)).code == 2
    picture_file.write_bytes(right)
    done(cli, command)
    assert content("other") == whole
