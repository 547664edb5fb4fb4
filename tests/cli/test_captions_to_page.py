"""A folder of 40 pictures with captions to a lighter FLUX, drawn, scored and shown, by one command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import Cli, done
from PIL import Image

from captioned_pictures import save_light_job
from tinyfusion.data.latents import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
RUN = "run --recipe light.toml --out runs/light"


def read(path: str) -> Any:
    return json.loads(Path("runs/light", path).read_text(encoding="utf-8"))


def check_models() -> None:
    """What was encoded, learned and recovered."""
    from diffusers import FluxTransformer2DModel

    texts = read("latents/prompts.json")
    assert len(texts) == 16 and {"a red square", "disc in yellow"} <= set(texts)
    spec, about = read_manifest(Path("runs/light/latents"))
    assert (spec.num_images, spec.classes, about["pipeline_class"]) == (40, 16, "FluxPipeline")
    assert read("prompts.json") == texts
    kept = read("prune/plan.json")["kept"]
    assert {name: len(listed) for name, listed in kept.items()} == {
        "transformer_blocks": 2,
        "single_transformer_blocks": 2,
    }
    for stage in ("prune", "recover"):
        model, info = FluxTransformer2DModel.from_pretrained(f"runs/light/{stage}/student", output_loading_info=True)
        assert not any(info.values())
        assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (2, 2)
        lines = Path(f"runs/light/{stage}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 4 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    assert read("recover/run.json")["recipe"]["recover"]["alpha_kd"] == 1, (
        "guidance is an input, so the teacher is the target"
    )


def check_numbers() -> None:
    """What was drawn, scored and timed."""
    drawn = {}
    for name in ("teacher", "pruned", "student"):
        with np.load(f"runs/light/samples/{name}.npz") as images:
            drawn[name], labels = images["arr_0"], images["arr_1"]
        assert drawn[name].shape == (16, 16, 16, 3) and labels.tolist() == list(range(16))
        assert read(f"samples/{name}.json")["prompts"] == read("prompts.json")
        scores = read(f"evaluations/{name}-photos.json")
        assert scores["fid"] > 0 and -100 <= scores["clip_score"] <= 100
        assert (scores["num_images"], scores["reference"]["count"]) == (16, 40)
        assert ("against" in scores) == (name != "teacher")
    assert not np.array_equal(drawn["teacher"], drawn["pruned"])
    difference = (drawn["teacher"].astype(float) - drawn["student"]) ** 2
    psnr_db = float(np.mean(10 * np.log10(255**2 / difference.mean((1, 2, 3)))))
    assert read("evaluation.json")["against"]["psnr_db"] == pytest.approx(psnr_db, rel=1e-6)
    speed = read("speed.json")
    assert {name: model["depth"] for name, model in speed["models"].items()} == {"teacher": 7, "student": 4}
    assert speed["models"]["student"]["macs"] * speed["macs_ratio"] == pytest.approx(speed["models"]["teacher"]["macs"])
    with Image.open("runs/light/samples/comparison.png") as picture:
        assert picture.size == (8 * 3 * 17 - 3, 3 * 3 * 17 - 3)


def test_captions_to_page(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_light_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = done(cli, f"{RUN} --json")
    numbers = outcome.last_json
    assert numbers["kept"] == read("prune/plan.json")["kept"]
    assert numbers["psnr_db"] > 0 and numbers["fid"] > 0 and numbers["clip_score"] is not None
    record = read("run.json")
    assert record["state"] == "done" and list(record["stages"]) == [
        "encode",
        "prune",
        "recover",
        "sample",
        "evaluate",
        "speed",
    ]
    check_models()
    check_numbers()

    page = Path("runs/light/report.html").read_text(encoding="utf-8")
    assert "light: 7 blocks to 4" in page and "A lighter FLUX" in page
    shown = re.findall(r"<figcaption>([^<]+)</figcaption>\s*</figure>", page)
    assert [text for text in shown if text in read("prompts.json")] == read("prompts.json")[:12]
    assert page.count('alt="student, recovered: ') == page.count('alt="teacher: ') == 12
    kept = "; ".join(f"{name} {', '.join(map(str, listed))}" for name, listed in numbers["kept"].items())
    assert f"Kept: {kept}" in page
    for words in (
        "FD-DINOv2 against photos",
        "CLIP score ↑",
        "PSNR in dB ↑",
        "speed-up of a denoising step",
        "Real images",
        "encode",
    ):
        assert words in page, words
    student = read("evaluations/student-photos.json")
    assert student["protocol"] in page and f"{student['clip_score']:.3g}" in page
    assert "the same starting noise and the same label" not in page, (
        "the only samples outside of the prompts are real ones"
    )

    done(cli, "report runs/light --out page.html")
    assert "Kept: " in Path("page.html").read_text(encoding="utf-8")
    done(
        cli,
        "sample --model runs/light --prompts runs/light/prompts.json --num-images 1 --num-steps 1 --height 16 --width 16 --out one.npz",
    )
    again = done(cli, RUN)
    assert "is finished" in again.err and "of 40" not in again.err
