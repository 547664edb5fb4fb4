"""`run` of a transformer of diffusers, killed in one stage after the other: it ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sittings import Starter, until

from captioned_pictures import save_light_job

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
RUN = ["run", "--recipe", "light.toml", "--set", "pipeline.num_images=6", "--set", "evaluate.features=", "--out"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(save_light_job(tmp_path / "work", num=8))
    yield starter
    starter.clear()


def test_killed_in_every_stage_and_continued_is_as_if_never_killed(start: Starter) -> None:
    whole, killed = start.folder / "whole", start.folder / "killed"
    first = start(*RUN, "whole")
    for places in ("latents/prompts*.safetensors", "recover/checkpoints/step-*", "samples/teacher.npz"):
        sitting = start(*RUN, "killed", pace_s=0.2)
        until(lambda places=places: any(killed.glob(places)) or not sitting.process.is_alive())  # type: ignore[misc]  # noqa: B023
        sitting.send(signal.SIGKILL)
        assert sitting.end() == 137, sitting.said
        assert not (killed / "report.html").exists()
    last = start(*RUN, "killed")
    assert (first.end(), last.end()) == (0, 0), last.said
    for file in ("prompts.json", "latents/prompts.json"):
        assert (whole / file).read_bytes() == (killed / file).read_bytes()
    for file in ("latents/prompts", "latents/shard-00000-of-00001", "prune/student/diffusion_pytorch_model",
                 "recover/student/diffusion_pytorch_model"):  # fmt: skip
        one, other = (load_file(run / f"{file}.safetensors") for run in (whole, killed))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file
    for name in ("teacher", "pruned", "student"):
        with np.load(whole / f"samples/{name}.npz") as one, np.load(killed / f"samples/{name}.npz") as other:
            assert np.array_equal(one["arr_0"], other["arr_0"])
        scores = [json.loads((run / f"evaluations/{name}-prompts.json").read_text()) for run in (whole, killed)]
        assert scores[0]["clip_score"] == scores[1]["clip_score"]
    assert not [path.name for path in killed.rglob(".*") if path.name != ".tinyfusion.lock"], "what was begun is gone"
    assert set(json.loads((killed / "run.json").read_text())["stages"]) == {
        "encode", "prune", "recover", "sample", "evaluate", "speed",
    }  # fmt: skip
