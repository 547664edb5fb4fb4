"""`encode --pipeline`: captions and pictures through a pipeline's own models, of one process and four, killed or not; bad input."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
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
from safetensors.torch import load_file

import tinyfusion.commands.captioned
import tinyfusion.commands.encode
import tinyfusion.commands.encode_captions as captions_module
from prompt_pipelines import save_flux_pipeline, save_wan_pipeline
from tinyfusion.conditioning.texts import text_table
from tinyfusion.core import launch, rundir
from tinyfusion.core.rng import Randomness
from tinyfusion.data import prompts as prompts_module
from tinyfusion.data.buckets import BucketBatches, open_buckets
from tinyfusion.data.latents import MANIFEST, open_latents
from tinyfusion.data.picture import decode
from tinyfusion.data.prompts import read_texts

NUM, SIZE = 11, 16
CAPTIONS = ("a cat", "the sea at night", "a cat", "seven")
SET = "--set encode.shard_images=3 --set encode.batch_size=2"
ENCODE = f"encode --data pictures --pipeline flux --size {SIZE} --out set {SET}"
BUCKETS = f"encode --data pictures --pipeline flux --buckets 16x16,16x32,32x16 --out set {SET}"


def pixels(i: int) -> np.ndarray:
    height, width = ((20, 24), (18, 40), (40, 18))[i % 3]
    return Randomness(5).at(0, i, 1).integers("pixels", 256, (height, width, 3))[0].astype(np.uint8)


def encoded(i: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(i)).save(stream, format="PNG")
    return stream.getvalue()


def caption(i: int) -> str:
    return CAPTIONS[i % len(CAPTIONS)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures and captions as text files, JSON lines, parquet and tars, and two pipelines."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pictures", "listed"):
        (folder / name).mkdir()
        for i in range(NUM):
            (folder / name / f"{i:02d}.png").write_bytes(encoded(i))
    for i in range(NUM):
        (folder / "pictures" / f"{i:02d}.txt").write_text(f"{caption(i)}\n")
    lines = [json.dumps({"file_name": f"{i:02d}.png", "text": caption(i)}) for i in range(NUM)]
    (folder / "listed" / "metadata.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"image": f"listed/{i:02d}.png", "prompt": caption(i)}) for i in range(NUM)]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    table = pa.table({"image": [{"bytes": encoded(i)} for i in range(NUM)], "words": [caption(i) for i in range(NUM)]})
    pq.write_table(table, folder / "table.parquet", row_group_size=4)
    with tarfile.open(folder / "tar.tar", "w") as tar:
        for i in range(NUM):
            put(tar, f"{i:02d}.png", encoded(i))
            own = f"{i:02d}.txt", caption(i).encode()
            put(tar, *(own if i % 2 else (f"{i:02d}.json", json.dumps({"caption": caption(i)}).encode())))
    save_flux_pipeline(folder / "flux")
    return folder


@pytest.fixture
def plain(sources: Path, here: Path, cli: Cli) -> Path:
    """The set that ENCODE makes, which is made once."""
    if not (sources / "set").exists():
        done(cli, ENCODE)
        shutil.copytree(here / "set", sources / "set")
    return sources / "set"


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def here(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, as the current folder."""
    shutil.copytree(sources, tmp_path / "here", ignore=shutil.ignore_patterns("set"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def content(folder: str | Path) -> dict[str, bytes]:
    """All files but the record."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "run.json"}


# ------------------------------------------------------------------------------------------------------- what is in it


def test_prompts_are_those_of_the_pipeline_and_latents_of_its_autoencoder(cli: Cli, here: Path) -> None:
    from diffusers import FluxPipeline

    outcome = done(cli, ENCODE)
    assert "prompts" not in outcome.err
    texts, table, latents = (
        read_texts(Path("set")),
        text_table(load_file("set/prompts.safetensors")),
        open_latents(Path("set")),
    )
    assert texts == ("a cat", "the sea at night", "seven")
    assert latents.labels.tolist() == [texts.index(caption(i)) for i in range(NUM)]
    assert (len(table), latents.spec.classes) == (3, 3)
    pipeline = FluxPipeline.from_pretrained("flux")
    for row, text in enumerate((*texts, "")):
        wanted, pooled, _ = pipeline.encode_prompt(text, None, max_sequence_length=512)
        found = table.null_row if row == 3 else table.index(slice(row, row + 1)).tensors
        assert found is not None
        torch.testing.assert_close(found["embeddings"], wanted, rtol=1e-4, atol=1e-4)  # another batch size
        torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-4)
    x = np.stack([decode(encoded(i), "", SIZE).in_colour for i in range(NUM)]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.from_numpy(x).float() / 127.5 - 1).latent_dist
    stored = latents.gather(np.arange(NUM), np.zeros(NUM, bool))
    torch.testing.assert_close(stored, torch.cat([posterior.mean, posterior.logvar], 1), rtol=1e-4, atol=1e-5)
    config = pipeline.vae.config
    assert (latents.spec.scale, latents.spec.shift) == (config.scaling_factor, config.shift_factor)
    header = json.loads(prompts_module.read_metadata(Path("set/prompts.safetensors"))["tinyfusion"])
    assert (header["pipeline"], header["arguments"]) == ("FluxPipeline", {"max_sequence_length": 512})
    assert header["components"]["text_encoder_2"] == "T5EncoderModel"
    assert "is finished" in done(cli, ENCODE).err


@pytest.mark.parametrize("kind", ["mode", "samples"])
def test_one_value_per_picture_may_be_stored(cli: Cli, here: Path, plain: Path, kind: str) -> None:
    done(
        cli,
        f"{ENCODE.replace('--out set', '--out one')} --set encode.posterior={kind} --set encode.mirror=true --seed 4",
    )
    moments, one = open_latents(plain), open_latents(Path("one"))
    assert (one.spec.kind, one.spec.rows) == ("samples", 2)
    every = np.arange(NUM), np.zeros(NUM, bool)
    mean, log_variance = moments.gather(*every).chunk(2, dim=1)
    noise = torch.from_numpy(Randomness(4).at(0, 0, NUM).normal("posterior", (2, *one.spec.shape)))[:, 0]
    wanted = mean + (0.5 * log_variance).exp() * noise * (kind == "samples")
    torch.testing.assert_close(one.gather(*every), wanted * moments.spec.scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "source", ["listed", "lines.jsonl", "parquet:table.parquet --caption-column words", "webdataset:tar.tar"]
)
def test_every_source_gives_the_same_set(cli: Cli, here: Path, plain: Path, source: str) -> None:
    done(cli, ENCODE.replace("pictures", source).replace("--out set", "--out other"))
    first, other = content(plain), content("other")
    first.pop(MANIFEST), other.pop(MANIFEST)
    assert first == other


def test_encoders_keep_their_types(cli: Cli, here: Path) -> None:
    from transformers import T5EncoderModel

    T5EncoderModel.from_pretrained("flux/text_encoder_2").to(torch.bfloat16).save_pretrained("flux/text_encoder_2")
    Path("words.txt").write_text("a cat\n\nthe sea\na cat\n")
    done(cli, "encode --prompts words.txt --pipeline flux --out words")
    tensors = load_file("words/prompts.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "embeddings": torch.bfloat16,
        "pooled": torch.float32,
    }
    assert tensors["embeddings"].shape == (3, 512, 32)
    assert set(content("words")) == {"prompts.safetensors", "prompts.json"}
    assert "is finished" in done(cli, "encode --prompts words.txt --pipeline flux --out words").err


def test_captions_that_are_cut_off_are_counted(cli: Cli, here: Path) -> None:
    Path("words.jsonl").write_text('{"text": "a b c d e f g h i j"}\n{"text": "ab"}\n')
    outcome = done(cli, "encode --prompts words.jsonl --pipeline flux --out words --set encode.max_tokens=8 --json")
    Path("words.json").write_text('["a b c d e f g h i j", "ab", "ab"]')
    done(cli, "encode --prompts words.json --pipeline flux --out listed-words --set encode.max_tokens=8")
    assert content("listed-words") == content("words")
    assert "captions of more tokens than the encoder reads, whose ends are not read: 1 of 2" in outcome.err
    assert outcome.last_json["longer_prompts"] == 1
    assert load_file("words/prompts.safetensors")["embeddings"].shape == (3, 8, 32)


def test_chunks_are_joined(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("words.txt").write_text("".join(f"{'abcdefghij'[i]} word\n" for i in range(10)))
    monkeypatch.setattr(prompts_module, "CHUNK_ROWS", 4)
    done(cli, "encode --prompts words.txt --pipeline flux --out few --set encode.batch_size=2")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    done(cli, "encode --prompts words.txt --pipeline flux --out all --set encode.batch_size=2")
    assert content("few") == content("all")


# -------------------------------------------------------------------------------------------------------------- buckets


def test_buckets_have_pictures_of_their_shape(cli: Cli, here: Path) -> None:
    outcome = done(cli, BUCKETS)
    assert "pictures: pictures by bucket: 16x16 4, 16x32 4, 32x16 3" in outcome.err
    sets = open_buckets(Path("set"))
    texts = read_texts(Path("set"))
    assert {name: latents.spec.shape for name, latents in sets.items()} == {
        "bucket-16x16": (4, 16, 16),
        "bucket-16x32": (4, 16, 32),
        "bucket-32x16": (4, 32, 16),
    }
    for k, latents in enumerate(sets.values()):
        assert latents.labels.tolist() == [texts.index(caption(i)) for i in range(k, NUM, 3)]
    done(cli, ENCODE.replace(f"--size {SIZE}", "--buckets 16x32").replace("--out set", "--out wide"))
    wide = open_buckets(Path("wide"))["bucket-16x32"]
    rows, of_bucket = np.arange(1, NUM, 3), np.arange(4)
    alike = wide.gather(rows, np.zeros(4, bool)), sets["bucket-16x32"].gather(of_bucket, np.zeros(4, bool))
    torch.testing.assert_close(*alike, rtol=1e-4, atol=1e-5)
    assert "is finished, 5 shards" in done(cli, BUCKETS).err
    randomness = Randomness(0)
    batches = BucketBatches(sets, randomness, torch.device("cpu")).conditioned_on(
        text_table(load_file("set/prompts.safetensors"))
    )
    batch = batches(0, 2, randomness.at(0, 0, 2))
    assert batch.x.shape[1:] in {latents.spec.shape for latents in sets.values()}
    assert batch.condition["embeddings"].shape == (2, 512, 32)


def test_masks_are_learned_on_buckets_and_models_of_one_size_refuse_them(cli: Cli, here: Path) -> None:
    done(cli, BUCKETS)
    steps = "--set prune.training.steps=4 --set prune.training.batch_size=2 --set prune.training.ema_decay=0.1"
    done(cli, f"prune --teacher flux --data latents:set --out pruned --set 'prune.scheme=2:3;1:2' {steps} --device cpu")
    config = json.loads(Path("pruned/student/config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (2, 2)
    outcome = cli(*shlex.split("train --data latents:set --out run --set model.family=dit --set train.ema_decay=0.1"))
    assert outcome.code == 2
    assert "data latents:set has buckets of 3 sizes, and the model takes images of one size" in outcome.err


# --------------------------------------------------------------------------------------------------------------- videos


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan_pipeline(tmp_path_factory.mktemp("wan") / "wan")


def clips(here: Path) -> None:
    frames = [Image.fromarray(pixels(3 * i)) for i in range(6)]
    (here / "clips" / "sea").mkdir(parents=True)
    for i, frame in enumerate(frames):
        frame.save(here / "clips" / "sea" / f"{i + 5}.png")  # 5 to 10: numbers sort as numbers
    (here / "clips" / "sea.txt").write_text("the sea")
    frames[0].save(here / "clips" / "cat.webp", save_all=True, append_images=frames[1:], lossless=True)
    (here / "clips" / "cat.txt").write_text("a cat")


def test_clips_become_latents_of_a_video_pipeline(cli: Cli, here: Path, wan: Path) -> None:
    from diffusers import WanPipeline

    clips(here)
    done(cli, f"encode --data clips --pipeline {wan} --size 16 --frames 5 --out set")
    latents, pipeline = open_latents(Path("set")), WanPipeline.from_pretrained(wan)
    assert latents.spec.shape == (16, 2, 2, 2)
    both = latents.gather(np.arange(2), np.zeros(2, bool))
    torch.testing.assert_close(both[0], both[1])  # an animation and a folder of the same frames
    x = np.stack([decode(encoded(3 * i), "", 16).in_colour for i in range(5)]).transpose(3, 0, 1, 2)
    with torch.no_grad():
        mode = pipeline.vae.encode(torch.from_numpy(x)[None].float() / 127.5 - 1).latent_dist.mode()
    mean, std = (torch.tensor(pipeline.vae.config[name]).view(16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(both[0, :16], ((mode[0] - mean) / std), rtol=1e-4, atol=1e-5)
    table = text_table(load_file("set/prompts.safetensors"))
    wanted, null = pipeline.encode_prompt(["a cat"], max_sequence_length=512)
    torch.testing.assert_close(table["embeddings"][:1], wanted, rtol=1e-5, atol=1e-5)
    assert table.null_row is not None
    torch.testing.assert_close(table.null_row["embeddings"], null, rtol=1e-5, atol=1e-5)
    pictures = f"encode --data pictures --pipeline {wan} --size 16 --out one"
    done(cli, pictures)
    assert open_latents(Path("one")).spec.shape == (16, 1, 2, 2)


# ------------------------------------------------------------------------------------------------ processes and kills


def test_four_processes_make_the_bytes_of_one(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "CHUNK_ROWS", 2)
    done(cli, BUCKETS)
    one = content("set")
    modules = [tinyfusion.commands.encode, captions_module, tinyfusion.commands.captioned, launch]
    apart = [(captions_module, "opened_job"), (captions_module, "_write_chunks")]
    together(4, BUCKETS.replace("--out set", "--out four"), monkeypatch, modules, apart)
    monkeypatch.chdir(here)
    assert content("four") == one


POINTS: tuple[tuple[Any, str, int], ...] = (
    (prompts_module, "save_file", 1),
    (os, "fsync", 1),  # before the name of a file of prompts
    (prompts_module, "_copy", 2),  # in the join
    (captions_module, "write_texts", 0),
    (tinyfusion.commands.encode, "encoded_values", 0),
    (tinyfusion.commands.encode, "encoded_values", 3),
    (captions_module, "write_manifest", 1),
    (captions_module, "write_bucket_manifest", 0),
    (rundir.RunDirectory, "mark", 0),
)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_nine_moments_it_goes_on_to_the_same_bytes(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "CHUNK_ROWS", 2)
    done(cli, BUCKETS)
    whole, again = content("set"), BUCKETS.replace("--out set", "--out again")
    for point in POINTS:
        killed_at(*point, again)
    done(cli, again)
    assert content("again") == whole
    assert not list(Path("again").rglob(".*"))


# ------------------------------------------------------------------------------------------------------------ bad input


def text(name: str, value: str | bytes | None) -> Callable[[Path], object]:
    """A file with another content; None removes it."""

    def change(here: Path) -> None:
        path = here / name
        if value is None:
            path.unlink()
        elif isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(value)

    return change


def without(*names: str) -> Callable[[Path], object]:
    return lambda here: [text(name, None)(here) for name in names]


def index(**values: Any) -> Callable[[Path], object]:
    """Other entries in the index of the pipeline; None removes one."""

    def change(here: Path) -> None:
        path = here / "flux" / "model_index.json"
        known = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))

    return change


def vae_config(**values: Any) -> Callable[[Path], object]:
    def change(here: Path) -> None:
        path = here / "flux" / "vae" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def table(**columns: Any) -> Callable[[Path], object]:
    values = {"image": [{"bytes": encoded(0)}, {"bytes": encoded(1)}], **columns}
    return lambda here: pq.write_table(pa.table(values), here / "table.parquet")


def tar_of(**members: bytes) -> Callable[[Path], object]:
    def change(here: Path) -> None:
        with tarfile.open(here / "tar.tar", "w") as tar:
            for name, value in members.items():
                put(tar, name.replace("_", "."), value)

    return change


def weights(file: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def changed(here: Path) -> None:
        from safetensors.torch import save_file

        tensors = load_file(here / "flux" / file)
        change(tensors)
        save_file(tensors, here / "flux" / file, metadata={"format": "pt"})

    return changed


def first_to_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).fill_(float("nan"))


LISTED, LINES = ENCODE.replace("pictures", "listed"), ENCODE.replace("pictures", "lines.jsonl")
PARQUET, TAR = ENCODE.replace("pictures", "parquet:table.parquet"), ENCODE.replace("pictures", "webdataset:tar.tar")
WORDS = "encode --prompts words.txt --pipeline flux --out set"
VAE = "vae/diffusion_pytorch_model.safetensors"
ROWS: dict[str, tuple[str, Callable[[Path], object] | None, str]] = {
    "neither": ("encode --pipeline flux --out set", None, "wants either --data, pictures with captions, or --prompts"),
    "both": (f"{ENCODE} --prompts x.txt", None, "wants either --data, pictures with captions, or --prompts"),
    "no-pipeline": ("encode --prompts x.txt --data pictures --out set", None, "--prompts is for pictures with captions"),
    "buckets-of-classes": ("encode --data pictures --buckets 16x16 --out set", None, "encode.sizes is for pictures with captions"),
    "no-size": ("encode --data pictures --pipeline flux --out set", None, "wants the size of the pictures: either --size 1024"),
    "two-sizes": (f"{ENCODE} --buckets 16x16", None, "wants the size of the pictures: either --size 1024, or --buckets"),
    "own-vae": (f"{ENCODE} --vae flux", None, "a pipeline brings its own autoencoder"),
    "size": (ENCODE.replace("--size 16", "--size 17"), None,
             "encode.size 17 is no multiple of 2, the pixels of a token of flux: take 16 or 18"),
    "bucket-word": (BUCKETS.replace("16x32", "wide"), None, "wants sizes in pixels, HEIGHTxWIDTH, such as 832x1216; got 'wide'"),
    "bucket-size": (BUCKETS.replace("16x32", "16x33"), None, "encode.sizes 33 is no multiple of 2"),
    "frames": (f"{ENCODE} --frames 5", lambda h: clips(h) or shutil.copytree(h / "clips", h / "pictures" / "in"),
               "encode.frames is for videos, and a FluxPipeline draws images"),
    "tokens": (f"{ENCODE} --set encode.max_tokens=0", None, "max_tokens must be at least 1"),
    "pipeline-gone": (ENCODE.replace("flux", "none"), None, "no pipeline at none: no such folder, and it is no hub id"),
    "pipeline-part": (ENCODE.replace("flux", "flux/vae"), None, "flux/vae is no pipeline of diffusers"),
    "pipeline-class": (ENCODE, index(_class_name="DiTPipeline"), "what a DiTPipeline encodes of prompts is not known here"),
    "pipeline-code": (ENCODE, index(_class_name=["pipeline", "Own"]), "code of a model is never run"),
    "no-vae": (ENCODE, index(vae=[None, None]), "flux has no autoencoder (component vae): encode its prompts alone"),
    "vae-gone": (ENCODE, lambda h: shutil.rmtree(h / "flux" / "vae"), "flux/vae does not exist, and model_index.json names it"),
    "vae-class": (ENCODE, index(vae=["diffusers", "NoSuchVae"]), "has no autoencoder NoSuchVae, which flux names"),
    "vae-weights": (ENCODE, weights(VAE, first_to_nan), "the weights in flux/vae are damaged"),
    "vae-lacks": (ENCODE, weights(VAE, lambda t: t.pop("encoder.conv_in.weight")), "flux/vae"),
    "vae-scale": (ENCODE, vae_config(scaling_factor=-1.0), "config.json is damaged: scaling_factor is -1.0"),
    "vae-mean": (ENCODE, vae_config(latents_mean=[0.0], latents_std=[1.0]), "wanted one number of each of 4 channels"),
    "encoder-gone": (ENCODE, lambda h: shutil.rmtree(h / "flux" / "text_encoder_2"), "text_encoder_2 does not exist"),
    "encoder-none": (ENCODE, index(text_encoder=None, text_encoder_2=None), "flux has no text encoder: wanted a whole pipeline"),
    "encoder-torn": (ENCODE, text("flux/text_encoder/model.safetensors", b"1234567"), "is no readable safetensors file"),
    "encoder-nan": (ENCODE, weights("text_encoder_2/model.safetensors", lambda t: [v.fill_(float("nan")) for v in t.values()]),
                    "embeddings of prompts (number 0 of a batch) are not finite"),
    "encoder-lacks": (ENCODE, weights("text_encoder_2/model.safetensors", lambda t: t.pop(max(t))), "flux/text_encoder_2"),
    "no-data": (ENCODE.replace("pictures", "gone"), None, "no pictures at gone: wanted a folder of them, digits, a .jsonl file"),
    "a-file": (ENCODE.replace("pictures", "table.parquet"), None, "for a tar or parquet file say parquet:table.parquet"),
    "no-pictures": (ENCODE.replace("pictures", "empty"), lambda h: (h / "empty").mkdir(), "empty holds no pictures"),
    "no-caption": (ENCODE, without("pictures/03.txt"), "pictures: 03.png has no caption: wanted 03.txt next to it, or a metadata.jsonl"),
    "no-captions": (ENCODE, without("pictures/03.txt", "pictures/05.txt"), "(and so 2 of 11 pictures: 03.png, 05.png)"),
    "empty-caption": (ENCODE, text("pictures/03.txt", " \n"), "pictures/03.txt has an empty caption: write one"),
    "caption-bytes": (ENCODE, text("pictures/03.txt", b"\xff\xfe"), "pictures/03.txt is damaged: not UTF-8 text"),
    "caption-long": (ENCODE, text("pictures/03.txt", "x" * 500_000), "wanted a caption of at most 100,000 characters"),
    "line-damaged": (LISTED, text("listed/metadata.jsonl", '{"file_name": "00.png", "text": "a"}\n{"file_name":'),
                     "metadata.jsonl, line 2 is damaged: not valid JSON"),
    "line-list": (LISTED, text("listed/metadata.jsonl", "[1]"), "metadata.jsonl, line 1: wanted a JSON object; got [1]"),
    "line-nameless": (LINES, text("lines.jsonl", '{"text": "a"}'), "line 1 names no picture: wanted file_name or image or video"),
    "line-textless": (LINES, text("lines.jsonl", '{"image": "a.png"}'), "line 1 has no text or caption or prompt: it has image"),
    "line-number": (LINES, text("lines.jsonl", '{"image": "listed/00.png", "text": 3}'), "line 1: wanted a caption, a text; got int"),
    "line-twice": (LINES, text("lines.jsonl", '{"image": "listed/00.png", "text": "a"}\n' * 2), "named twice, also in lines.jsonl, line 1"),
    "line-picture": (LINES, text("lines.jsonl", '{"image": "none.png", "text": "a"}'), "none.png does not exist"),
    "lines-empty": (LINES, text("lines.jsonl", "\n"), "lines.jsonl holds no pictures with captions"),
    "column": (f"{PARQUET} --caption-column title", None, "has no column title; it has image, words: --caption-column names one"),
    "column-none": (PARQUET, None, "has no column text or caption or prompt; it has image, words"),
    "column-type": (PARQUET, table(text=[1, 2]), "column text is of the type int64: wanted texts"),
    "column-lists": (PARQUET, table(text=[["a"], ["b"]]), "wanted texts; --caption-column names another"),
    "column-null": (PARQUET, table(text=["a", None]), "table.parquet, row 1: wanted a caption, a text; got NoneType"),
    "column-empty": (PARQUET, table(text=["a", " "]), "table.parquet, row 1 has an empty caption"),
    "tar-caption": (TAR, tar_of(a_png=encoded(0)), "tar.tar/a has no caption: wanted NAME.txt, or NAME.json with a text"),
    "tar-json": (TAR, tar_of(a_png=encoded(0), a_json=b"{"), "tar.tar, a.json is damaged: not valid JSON"),
    "tar-pictures": (TAR, tar_of(a_txt=b"x"), "tar.tar holds no pictures"),
    "picture": (ENCODE.replace("--size 16", "--buckets 16x16"), text("pictures/03.png", b"\x89PNG"), "03.png cannot be decoded"),
    "prompts-gone": (WORDS, None, "words.txt does not exist"),
    "prompts-empty": (WORDS, text("words.txt", "\n \n"), "words.txt holds no prompts: wanted one a line"),
    "out-foreign": (ENCODE, lambda h: ((h / "set").mkdir(), (h / "set" / "x").touch()), "is not a tinyfusion run"),
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
    assert len(lines) == 1 or cause in ("picture",), outcome.err
    assert lines[-1].startswith("error: ")
    assert message in lines[-1], lines[-1]
    assert tree(here) == before


CLIPS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "short": ("--frames 9", lambda h: None, "has 6 frames: wanted at least 9"),
    "no-multiple": ("--frames 4", lambda h: None, "encodes 1 + 4 n frames; got encode.frames=4: take 1 or 5"),
    "no-decoder": ("--frames 5", lambda h: (text("clips/a.mp4", "x")(h), text("clips/a.txt", "x")(h)),
                   "nothing is installed that decodes videos"),
    "no-caption": ("--frames 5", without("clips/sea.txt"), "clips: sea has no caption: wanted sea.txt next to it"),
    "no-clips": ("--frames 5", lambda h: (shutil.rmtree(h / "clips"), (h / "clips").mkdir()), "clips holds no videos"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CLIPS)
def test_bad_clips(cli: Cli, here: Path, wan: Path, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyfusion.data import clips as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    given, prepare, message = CLIPS[cause]
    clips(here)
    prepare(here)
    outcome = cli(*shlex.split(f"encode --data clips --pipeline {wan} --size 16 {given} --out set"))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err.splitlines()[-1], outcome.err


def test_another_recipe_overwrite_and_damage(cli: Cli, here: Path) -> None:
    done(cli, ENCODE)
    refused = cli(*shlex.split(f"{ENCODE} --set encode.mirror=true"))
    assert "made with another recipe (encode.mirror: False there, True now)" in refused.err
    (here / "pictures" / "00.txt").write_text("another")
    refused = cli(*shlex.split(ENCODE))
    assert refused.code == 2
    assert "made with another recipe (data:" in refused.err
    own = here / "set" / "notes.txt"
    own.write_text("mine")
    done(cli, f"{ENCODE} --overwrite")
    assert read_texts(here / "set")[0] == "another"
    assert own.read_text() == "mine"
    path = here / "set" / "prompts.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused = cli(*shlex.split(ENCODE))
    assert refused.code == 2
    assert "prompts.safetensors is damaged: its SHA-256" in refused.err


def test_prompts_of_people_stay_when_classes_are_encoded_anew(cli: Cli, here: Path) -> None:
    """A file of prompts in a folder of `encode` without a pipeline is the user's."""
    command = f"encode --data pictures --vae flux --size {SIZE} --out set {SET}"
    done(cli, command)
    (here / "set" / "prompts.safetensors").write_bytes(b"mine")
    done(cli, f"{command} --overwrite --set encode.mirror=false")
    assert (here / "set" / "prompts.safetensors").read_bytes() == b"mine"


def test_dry_run_counts_and_writes_nothing(cli: Cli, here: Path) -> None:
    before = tree(here)
    outcome = done(cli, f"{BUCKETS} --dry-run --json")
    plan = outcome.last_json["plan"]
    assert plan["prompts"].startswith("3 of pictures, embeddings (512, 32), pooled (32,)")
    assert plan["bucket-16x32"].startswith("4 images, moments (1, 8, 16, 32) float32")
    assert plan["disk_mib"] == pytest.approx(
        (2 * 4 * (512 * 32 + 32) * 4 + 8 * 4 * (256 * 4 + 512 * 7)) / 2**20, rel=0.05
    )
    assert tree(here) == before
