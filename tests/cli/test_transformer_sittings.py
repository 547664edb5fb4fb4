"""Trainings of a transformer of diffusers that are killed and continued, and two processes of one: the same weights."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sittings import Starter, until

from captioned_set import save_set
from prompt_pipelines import save_flux_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
STEPS = ["--steps", "6", "--set"]
LEARN = [
    "prune", "--teacher", "flux", "--data", "latents:set", "--scheme", "2:3;1:2", *STEPS, "prune.training.batch_size=4",
    "--set", "prune.training.ema_decay=0.3", "--set", "prune.training.checkpoint_every_steps=2", "--set", "prune.keep_deltas=true",
]  # fmt: skip
RECOVER = [
    "recover", "--data", "latents:set", *STEPS, "recover.training.batch_size=4", "--set", "recover.training.ema_decay=0.3",
    "--set", "recover.training.checkpoint_every_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sittings") / "work"
    place.mkdir()
    save_flux_pipeline(place / "flux")
    save_set(place / "set", pooled=32)
    return place


@pytest.fixture
def start(folder: Path) -> Iterator[Starter]:
    starter = Starter(folder)
    yield starter
    starter.clear()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "diffusion_pytorch_model.safetensors")


def test_killed_and_continued_is_as_if_never_killed(folder: Path, start: Starter) -> None:
    within = [*RECOVER, "--teacher", "flux", "--search-share", "0.5", "--scheme", "2:3;1:2", "--method", "logits-kd"]
    jobs = {"cut": LEARN, "back": [*RECOVER, "--student", "whole-cut"], "within": within}
    for verb, command in jobs.items():
        whole = start(*command, "--out", f"whole-{verb}")
        assert whole.end() == 0, whole.said
        killed = start(*command, "--out", f"killed-{verb}", pace_s=0.2)
        until(lambda verb=verb: any((folder / f"killed-{verb}" / "checkpoints").glob("step-*")))  # type: ignore[misc]
        killed.send(signal.SIGKILL)
        assert killed.end() == 137
        assert not (folder / f"killed-{verb}" / "student").exists()
        again = start(*command, "--out", f"killed-{verb}")
        assert again.end() == 0, again.said
        first, second = weights(folder / f"whole-{verb}"), weights(folder / f"killed-{verb}")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), verb


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_equal_one(way: str, folder: Path, start: Starter) -> None:
    """The plan of learned masks, and the weights of a student that starts from their updates."""
    if not (folder / "alone").exists():
        alone = start(*LEARN, "--out", "alone")
        assert alone.end() == 0, alone.said
    for sitting in start.two(*LEARN, "--set", f"compute.parallel={way}", "--out", f"two-{way}"):
        assert sitting.end() == 0, sitting.said
    plans = [json.loads((folder / name / "plan.json").read_text())["kept"] for name in ("alone", f"two-{way}")]
    assert plans[0] == plans[1]
    first, second = weights(folder / "alone"), weights(folder / f"two-{way}")
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-6) for name in first)
