"""`sample` across processes: image i is the same on any rank and after any kill; errors for invalid settings."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli, tiny
from sittings import Sitting, Starter, until
from test_interruption import killed_after

import tinyfusion.jobs.sampling_setup
from ports import free_port
from tinyfusion.models.checkpoint import save_model

SAMPLE = "sample --model teacher --num-images 20 --num-steps 3 --out drawn/x.npz"


@pytest.fixture
def start(work: Path) -> Iterator[Starter]:
    starter = Starter(work)
    yield starter
    starter.clear()


def launch(start: Starter, arguments: str, world: int) -> list[Sitting]:
    """`world` processes of one sampling, as a launcher starts them."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(*shlex.split(arguments), RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", **place)
        for rank in range(world)
    ]


def arrays(path: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as archive:
        return archive["arr_0"], archive["arr_1"]


def test_three_processes_draw_what_one_draws(cli: Cli, work: Path, start: Starter) -> None:
    """Measured at batch 7 and 64; labels bit-equal, pixels to rounding; nothing else is left."""
    assert cli(*shlex.split(SAMPLE), "--batch-size", "7").code == 0
    alone, labels = arrays("drawn/x.npz")
    answer = json.loads(Path("drawn/x.json").read_text())
    for name, batch in (("seven", 7), ("many", 64)):
        sittings = launch(start, f"{SAMPLE} --batch-size {batch}".replace("/x.npz", f"/{name}.npz"), 3)
        assert [sitting.end() for sitting in sittings] == [0, 0, 0], [sitting.said for sitting in sittings]
        assert [bool(sitting.said) for sitting in sittings] == [True, False, False], "only the first one speaks"
        images, drawn = arrays(f"drawn/{name}.npz")
        assert np.array_equal(drawn, labels)
        assert np.abs(images.astype(int) - alone).max() <= 1
        assert json.loads(Path(f"drawn/{name}.json").read_text())["protocol"] == answer["protocol"]
    assert sorted(p.name for p in Path("drawn").iterdir()) == sorted(
        f"{n}.{s}" for n in ("x", "seven", "many") for s in ("npz", "json")
    )


def test_noise_is_bit_equal_for_any_parts_of_the_images(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first inputs of the model, by batch size."""
    first_inputs: dict[int, list[torch.Tensor]] = {}
    drawn = tinyfusion.jobs.sampling_setup.draw_samples

    def watched(model: Any, *arguments: Any) -> Any:
        batch = arguments[3]

        def note(_module: Any, inputs: Any) -> None:
            if int(inputs[1][0]) == 999:
                first_inputs.setdefault(batch, []).append(inputs[0][: len(inputs[0]) // 2].clone())

        handle = model.module.register_forward_pre_hook(note)
        yield from drawn(model, *arguments)
        handle.remove()

    monkeypatch.setattr(tinyfusion.jobs.sampling_setup, "draw_samples", watched)
    for batch in (7, 64):
        assert cli(*shlex.split(SAMPLE.replace("x.npz", f"{batch}.npz")), "--batch-size", str(batch)).code == 0
    assert len(first_inputs[7]) == 3 and len(first_inputs[64]) == 1
    assert torch.equal(torch.cat(first_inputs[7]), first_inputs[64][0])


def test_a_killed_sampling_goes_on_with_another_number_of_processes(cli: Cli, work: Path, start: Starter) -> None:
    slow = SAMPLE.replace("--num-steps 3", "--num-steps 100") + " --batch-size 1"
    processes = launch(start, slow, 2)
    parts = Path("drawn/x.npz.parts")
    until(lambda: len(list(parts.glob("images-*.npy"))) >= 3)
    for sitting in processes:
        sitting.send(signal.SIGKILL)
        sitting.end()
    there = list(parts.glob("images-*.npy"))
    assert 3 <= len(there) < 20 and not Path("drawn/x.npz").exists()
    outcome = cli(*shlex.split(slow))
    assert outcome.code == 0, outcome.err
    assert f"{len(there)} of 20 images are there" in outcome.err
    assert not parts.exists()
    assert cli(*shlex.split(slow.replace("x.npz", "y.npz"))).code == 0
    for ours, whole in zip(arrays("drawn/x.npz"), arrays("drawn/y.npz"), strict=True):
        assert np.abs(ours.astype(int) - whole).max() <= 1


def test_an_interrupted_sampling_keeps_its_parts_and_says_so(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, calls = tinyfusion.jobs.sampling_setup.draw_samples, []

    def second(*arguments: Any) -> Any:
        calls.append(arguments[5:])
        return (killed_after(drawn, 0, signal.SIGTERM) if len(calls) == 3 else drawn)(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.jobs.sampling_setup, "draw_samples", second)
        stopped = cli(*shlex.split(SAMPLE), "--batch-size", "6")
        assert stopped.code == 128 + signal.SIGTERM
        assert "12 of 20 images of drawn/x.npz are saved, the same command continues" in stopped.err
        other = cli(*shlex.split(SAMPLE), "--seed", "1")
        assert other.code == 2 and "made with another recipe" in other.err
        calls.clear()
        assert cli(*shlex.split(SAMPLE), "--batch-size", "64").code == 0
    assert calls == [(12, 18), (18, 20)], "only missing shards were drawn"
    assert cli(*shlex.split(SAMPLE.replace("x.npz", "y.npz"))).code == 0
    assert np.abs(arrays("drawn/x.npz")[0].astype(int) - arrays("drawn/y.npz")[0]).max() <= 1


def test_one_process_at_a_time_draws_into_an_output(cli: Cli, work: Path, start: Starter) -> None:
    slow = SAMPLE.replace("--num-steps 3", "--num-steps 100") + " --batch-size 1"
    drawing = start(*shlex.split(slow), OMP_NUM_THREADS="1")
    parts = Path("drawn/x.npz.parts")
    until(lambda: len(list(parts.glob("images-*.npy"))) >= 1)
    for second in (slow, f"{slow} --overwrite"):
        outcome = cli(*shlex.split(second))
        assert outcome.code == 2, outcome.err
        assert "another process draws the images of drawn/x.npz right now" in outcome.err
    assert cli(*shlex.split(SAMPLE.replace("x.npz", "y.npz"))).code == 0, "another output is free"
    assert drawing.end() == 0, drawing.said
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["x.json", "x.npz", "y.json", "y.npz"]


def test_overwriting_drops_the_parts_of_another_recipe(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tinyfusion.jobs.sampling_setup.draw_samples
    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.jobs.sampling_setup, "draw_samples", killed_after(drawn, 1, signal.SIGTERM))
        patch.setattr("tinyfusion.jobs.drawn_output.shard_images", lambda *_: 6)
        cli(*shlex.split(SAMPLE), "--batch-size", "6")
    assert cli(*shlex.split(SAMPLE), "--seed", "1", "--overwrite").code == 0
    assert cli(*shlex.split(SAMPLE.replace("x.npz", "y.npz")), "--seed", "1").code == 0
    assert np.array_equal(arrays("drawn/x.npz")[0], arrays("drawn/y.npz")[0])


def test_pngs_and_grid_come_with_the_images_or_later(cli: Cli, work: Path) -> None:
    assert cli(*shlex.split(SAMPLE)).code == 0
    assert cli(*shlex.split(SAMPLE), "--png", "drawn/png", "--grid", "drawn/grid.png").code == 0
    assert len(list(Path("drawn/png").iterdir())) == 20 and Path("drawn/grid.png").is_file()
    shutil.rmtree("drawn/png")
    assert cli(*shlex.split(SAMPLE), "--png", "drawn/png").code == 0
    assert len(list(Path("drawn/png").iterdir())) == 20
    refused = cli(*shlex.split(SAMPLE.replace("x.npz", "y.npz")), "--png", "drawn/png")
    assert refused.code == 2 and "does not belong to drawn/y.npz" in refused.err


# --------------------------------------------------------------------------------------------------------------- latents


def latent_folder(work: Path, **facts: Any) -> None:
    model = tiny(in_channels=4)
    about = {"image_size": 16, "latent_scale": 0.18215, **facts}
    save_model(dataclasses.replace(model, facts=dataclasses.replace(model.facts, **about)), work / "latent")


def vae_folder(folder: Path, **changed: Any) -> None:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, **kinds, **changed}
    torch.manual_seed(0)
    AutoencoderKL(**sizes).save_pretrained(folder)  # type: ignore[no-untyped-call]


LATENT = "sample --model latent --num-images 3 --num-steps 2 --out drawn/x.npz"


def test_latents_are_decoded_or_kept(cli: Cli, work: Path) -> None:
    latent_folder(work)
    vae_folder(work / "vae")
    assert cli(*shlex.split(LATENT), "--vae", "vae", "--png", "drawn/png").code == 0
    pixels, _ = arrays("drawn/x.npz")
    assert pixels.shape == (3, 16, 16, 3) and pixels.dtype == np.uint8
    assert " | vae " in json.loads(Path("drawn/x.json").read_text())["protocol"]
    assert cli(*shlex.split(LATENT.replace("x.npz", "z.npz")), "--set", "sample.decode=false").code == 0
    latents, _ = arrays("drawn/z.npz")
    assert latents.shape == (3, 8, 8, 4) and latents.dtype == np.float32


BAD = [
    (
        "interval-falling",
        f"{SAMPLE} --set sample.guidance_interval=0.8,0.1",
        ("sample.guidance_interval", "got 0.8 and 0.1"),
    ),
    ("interval-outside", f"{SAMPLE} --set sample.guidance_interval=0,1.5", ("sample.guidance_interval", "1.5")),
    ("solver-clip", f"{SAMPLE} --sampler unipc --set sample.clip=true", ("sample.clip is for ddpm and ddim", "unipc")),
    ("solver-eta", f"{SAMPLE} --sampler dpm-solver++ --set sample.eta=0.5", ("sample.eta is for ddim", "dpm-solver++")),
    (
        "solver-steps",
        SAMPLE.replace("--num-steps 3", "--num-steps 1000 --sampler unipc"),
        ("1 to 999 steps", "got 1000"),
    ),
    ("sampler-unknown", f"{SAMPLE} --sampler euler", ("--sampler is one of", "dpm-solver++", "'euler'")),
    ("dtype-unknown", f"{SAMPLE} --dtype int8", ("--dtype is one of", "bfloat16", "'int8'")),
    ("decode-batch", f"{SAMPLE} --set sample.decode_batch_size=0", ("decode_batch_size", "at least 1", "0")),
    ("png-suffix", f"{SAMPLE} --png pictures.png", ("--png is a folder", "pictures.png")),
    ("png-others", f"{SAMPLE} --png teacher", ("--png teacher exists and does not belong to",)),
    ("pixels-vae", f"{SAMPLE} --vae somewhere", ("--vae", "this model draws pixels")),
    ("pixels-decode", f"{SAMPLE} --set sample.decode=false", ("sample.decode=false", "this model draws pixels")),
    ("latent-no-vae", LATENT, ("does not say which autoencoder", "--vae")),
    ("latent-vae-missing", f"{LATENT} --vae nowhere/at/all", ("no autoencoder at nowhere/at/all",)),
    ("latent-vae-empty", f"{LATENT} --vae no-pictures", ("no-pictures holds no autoencoder", "config.json")),
    ("latent-vae-channels", f"{LATENT} --vae wide", ("8 channels", "the model 4")),
    ("latent-vae-scale", f"{LATENT} --vae scaled", ("scales latents by 0.5", "0.18215")),
    ("latent-vae-size", f"{LATENT} --vae large", ("decodes to 32 pixels", "have 16")),
    ("latent-grid", f"{LATENT} --set sample.decode=false --grid g.png", ("--grid shows images", "latents")),
    ("parts-of-others", f"{SAMPLE.replace('drawn/x.npz', 'taken.npz')}", ("taken.npz.parts", "not made by tinyfusion")),
]


@pytest.mark.parametrize(("arguments", "wanted"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(cli: Cli, work: Path, arguments: str, wanted: tuple[str, ...]) -> None:
    if "latent" in arguments:
        latent_folder(work)
    for name, sizes in (("wide", {"latent_channels": 8}), ("scaled", {"scaling_factor": 0.5}), ("large", {})):
        if f"--vae {name}" in arguments:
            three = {"block_out_channels": (4, 4, 4), "down_block_types": ("DownEncoderBlock2D",) * 3}
            more = {**three, "up_block_types": ("UpDecoderBlock2D",) * 3} if name == "large" else {}
            vae_folder(work / name, **sizes, **more)
    (work / "taken.npz.parts").mkdir()
    (work / "taken.npz.parts" / "mine.txt").write_text("mine")
    before = sorted(work.rglob("*"))
    outcome = cli(*shlex.split(arguments))
    assert outcome.code == 2, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in outcome.err
    for part in wanted:
        assert part in errors[0]
    assert sorted(work.rglob("*")) == before
