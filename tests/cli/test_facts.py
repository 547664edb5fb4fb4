"""Facts of a model's latents: from its file, its training data and settings; and errors where they are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli, done, refused, tiny
from PIL import Image

from tinyfusion.models.checkpoint import open_model, save_model

SIDE = 16  # of the pictures; latents are half as wide
PUBLISHED = {"latent_scale": 0.18215, "latent_shift": 0.0, "vae": "stabilityai/sd-vae-ft-ema"}
TRAINING = "batch_size=4 ema_decay=0.5 log_every_steps=1"


def save_autoencoder(folder: Path, channels: int, **more: Any) -> None:
    """A tiny one with two pixels to a latent cell."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoencoderKL(  # type: ignore[no-untyped-call]
            block_out_channels=(4, 4), norm_num_groups=2, latent_channels=channels, **kinds, **more
        )
        made.save_pretrained(folder)


def brought(folder: Path, channels: int, **vae: Any) -> None:
    """What a user brings: pictures, an autoencoder `vae`, and `official.pt`, which says nothing of its latents."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        path = folder / "pictures" / f"class-{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    save_autoencoder(folder / "vae", channels, **vae)
    torch.save(tiny(in_channels=channels).module.state_dict(), folder / "official.pt")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def facts_of(folder: str) -> dict[str, Any]:
    record = json.loads(Path(folder, "model.json").read_text(encoding="utf-8"))
    return {name: record[name] for name in ("latent_scale", "latent_shift", "vae", "image_size", "assumed")}


def settings(section: str) -> str:
    return " ".join(f"--set {section}.{item}" for item in TRAINING.split())


ENCODE = f"encode --data pictures --vae vae --size {SIDE} --out latents"
TEACHER = "--teacher official.pt --num-heads 2 --data latents:latents"
SAMPLE = "sample --num-images 3 --num-steps 2 --out drawn.npz"
OF_DATA = {"latent_scale": 0.3, "latent_shift": 0.1, "vae": "vae", "image_size": SIDE, "assumed": []}


# ------------------------------------------------------------------------------------------------------- from the data


@pytest.mark.parametrize("channels", [16, 32])
def test_the_facts_of_the_data_become_those_of_the_model(cli: Cli, here: Path, channels: int) -> None:
    brought(here, channels, scaling_factor=0.3, shift_factor=0.1)
    done(cli, ENCODE)
    done(cli, f"prune {TEACHER} --scheme 1:2 --steps 1 --out cut {settings('prune.training')}")
    assert facts_of("cut/student") == OF_DATA
    recover = f"recover {TEACHER} --student cut --steps 1 {settings('recover.training')}"
    done(cli, f"{recover} --out back --set watch.grid_every_steps=1 --set sample.num_steps=2")
    assert facts_of("back/student") == OF_DATA
    with Image.open("back/watch/step-0000001.png") as grid:
        assert grid.mode == "RGB", "pictures while training are decoded"
    done(cli, f"{SAMPLE} --model back")
    with np.load("drawn.npz") as drawn:
        assert (drawn["arr_0"].shape, drawn["arr_0"].dtype) == ((3, SIDE, SIDE, 3), np.uint8)


def test_a_cut_without_images_learns_the_facts_when_it_is_recovered(cli: Cli, here: Path) -> None:
    brought(here, 16, scaling_factor=0.3, shift_factor=0.1)
    done(cli, "prune --teacher official.pt --num-heads 2 --keep 0,2 --out cut")
    assert facts_of("cut/student")["latent_scale"] is None
    done(cli, ENCODE)
    done(cli, f"recover {TEACHER} --student cut --steps 1 --out back {settings('recover.training')}")
    assert facts_of("back/student") == OF_DATA


def test_facts_of_the_same_numbers_are_no_longer_assumed(cli: Cli, here: Path) -> None:
    brought(here, 4, scaling_factor=0.18215)
    assert done(cli, "inspect official.pt --num-heads 2 --json").last_json["assumed"] == ["image_size", *PUBLISHED]
    done(cli, ENCODE)
    done(cli, f"prune {TEACHER} --scheme 1:2 --steps 1 --out cut {settings('prune.training')}")
    assert facts_of("cut/student") == {**PUBLISHED, "vae": "vae", "image_size": SIDE, "assumed": []}


def test_latents_of_another_scale_or_shift_are_refused(cli: Cli, here: Path) -> None:
    brought(here, 4, scaling_factor=0.18215, shift_factor=0.5)
    done(cli, ENCODE)
    prune = f"prune {TEACHER} --scheme 1:2 --steps 1 --out cut {settings('prune.training')}"
    refused(cli, prune, "made for the shift 0.5", "0 is assumed", "--set sample.latent_shift=0.5")
    done(cli, f"{prune} --set sample.latent_shift=0.5")
    assert facts_of("cut/student")["latent_shift"] == 0.5
    cut = open_model("cut")
    save_model(cut.with_known(), here / "other")
    record = json.loads((here / "other/model.json").read_text())
    (here / "other/model.json").write_text(json.dumps({**record, "latent_shift": 0.25}))
    again = "recover --method finetune --student other --data latents:latents --steps 1 --out back"
    refused(cli, again, "made for the shift 0.5", "the model was trained with 0.25")


# --------------------------------------------------------------------------------------------------- from the settings


@pytest.mark.parametrize("channels", [16, 32])
def test_where_nothing_is_known_it_is_asked(cli: Cli, here: Path, channels: int) -> None:
    brought(here, channels, scaling_factor=0.3, shift_factor=0.1)
    sample = f"{SAMPLE} --model official.pt --num-heads 2"
    refused(cli, sample, f"{channels} channels", "--set sample.vae=", "sample.latent_scale=", "sample.decode=false")
    answer = done(cli, f"{sample} --vae vae").err
    assert "assuming scale 0.3 and shift 0.1 of vae" in answer
    with np.load("drawn.npz") as drawn:
        assert (drawn["arr_0"].shape, drawn["arr_0"].dtype) == ((3, SIDE, SIDE, 3), np.uint8)
    done(cli, f"{sample.replace('drawn', 'raw')} --set sample.decode=false")
    with np.load("raw.npz") as drawn:
        assert (drawn["arr_0"].shape, drawn["arr_0"].dtype) == ((3, 8, 8, channels), np.float32)


def test_settings_state_what_an_official_file_does_not(cli: Cli, here: Path) -> None:
    """Four channels at another scale than the published one: assumed, said to be so, and corrected."""
    brought(here, 4, scaling_factor=0.3)
    sample = f"{SAMPLE} --model official.pt --num-heads 2 --vae vae"
    refused(cli, sample, "0.18215 is assumed for the model, whose file gives none", "--set sample.latent_scale=0.3")
    done(cli, f"{sample} --set sample.latent_scale=0.3")
    assert "at scale 0.3 and shift 0" in json.loads(Path("drawn.json").read_text())["protocol"]
    keep = "prune --teacher official.pt --num-heads 2 --keep 0,2 --out cut"
    done(cli, f"{keep} --set sample.latent_scale=0.3 --set sample.latent_shift=0 --set sample.vae=vae")
    wanted = {"latent_scale": 0.3, "latent_shift": 0.0, "vae": "vae"}
    assert {name: facts_of("cut/student")[name] for name in wanted} == wanted
    assert facts_of("cut/student")["assumed"] == ["image_size"]
    done(cli, f"{SAMPLE.replace('drawn', 'cut')} --model cut")
    with np.load("cut.npz") as drawn:
        assert drawn["arr_0"].shape == (3, SIDE, SIDE, 3)


def test_a_setting_does_not_contradict_what_a_file_states(cli: Cli, here: Path) -> None:
    brought(here, 16, scaling_factor=0.3, shift_factor=0.1)
    stated = "--set sample.latent_scale=0.3 --set sample.latent_shift=0.1 --set sample.vae=vae"
    done(cli, f"prune --teacher official.pt --num-heads 2 --keep 0,2 --out cut {stated}")
    done(cli, f"{SAMPLE} --model cut {stated}")
    refused(cli, f"{SAMPLE} --model cut --set sample.latent_scale=0.5", "it is 0.5", "the model was trained with 0.3")
    refused(cli, f"{SAMPLE} --model cut --set sample.latent_scale=0", "sample.latent_scale must be above 0")


def test_three_channels_are_pixels_until_a_scale_is_stated(cli: Cli, here: Path) -> None:
    brought(here, 3, scaling_factor=0.3)
    sample = f"{SAMPLE} --model official.pt --num-heads 2"
    done(cli, sample)
    with np.load("drawn.npz") as drawn:
        assert (drawn["arr_0"].shape, drawn["arr_0"].dtype) == ((3, 8, 8, 3), np.uint8)
    refused(cli, f"{sample} --vae vae --overwrite", "this model draws pixels")
    done(cli, f"{sample.replace('drawn', 'decoded')} --vae vae --set sample.latent_scale=0.3")
    with np.load("decoded.npz") as drawn:
        assert drawn["arr_0"].shape == (3, SIDE, SIDE, 3)


# -------------------------------------------------------------------------------------------------- files and exports


def test_an_older_model_file_opens(here: Path) -> None:
    model = tiny(in_channels=4).with_known(latent_scale=0.5, vae="somewhere")
    save_model(model, here / "old")
    record = json.loads((here / "old/model.json").read_text())
    for name in ("latent_shift", "assumed"):
        del record[name]
    (here / "old/model.json").write_text(json.dumps(record))
    facts = open_model("old").facts
    assert (facts.latent_scale, facts.latent_shift, facts.vae, facts.assumed) == (0.5, None, "somewhere", [])


def test_a_pipeline_folder_states_scale_and_shift(cli: Cli, here: Path) -> None:
    save_model(tiny(in_channels=4, num_classes=1000), here / "own")
    save_autoencoder(here / "vae", 4, scaling_factor=0.3)
    export = "export --model own --to diffusers --pipeline --out pipeline"
    refused(cli, export, "which autoencoder", "--vae")
    done(cli, f"{export} --vae vae")
    assert "for latents of an autoencoder" in Path("pipeline/README.md").read_text()
    opened = open_model("pipeline").facts
    assert (opened.latent_scale, opened.latent_shift, opened.image_size, opened.assumed) == (0.3, 0.0, SIDE, [])
    config = json.loads(Path("pipeline/vae/config.json").read_text())
    Path("pipeline/vae/config.json").write_text(json.dumps({**config, "shift_factor": 0.1}))
    assert open_model("pipeline").facts.latent_shift == 0.1


def test_a_pipeline_that_would_not_undo_the_shift_is_refused(cli: Cli, here: Path) -> None:
    save_model(tiny(in_channels=4, num_classes=1000), here / "own")
    save_autoencoder(here / "vae", 4, scaling_factor=0.3, shift_factor=0.1)
    export = "export --model own --to diffusers --pipeline --vae vae --out pipeline"
    refused(cli, export, "shifted by 0.1, which DiTPipeline does not undo")
    refused(cli, f"{export} --set sample.latent_scale=0.3 --set sample.latent_shift=0.1", "shifted by 0.1")
