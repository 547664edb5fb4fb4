"""TinyMAR-D16: the recipe says what the paper says, and two steps of it run at the published depths.

Source: TinyFusion, arXiv 2412.01199, tables 2 and 6; what they leave open is marked in the recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tinyfusion.blocks.plan import plan_from_json
from tinyfusion.blocks.scheme import parse_scheme
from tinyfusion.cli import main
from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.config.loading import flatten, load_recipe, to_plain
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import new_model, open_model, save_model
from tinyfusion.recover.align import block_pairs

PUBLISHED = {
    "prune.scheme": "1:2",
    "prune.update": "lora",
    "recover.method": "masked-kd",
    "recover.alpha_kd": 0.9,
    "recover.beta": [1e-2, 0.0],
    "recover.training.learning_rate": 2e-4,
    "recover.training.learning_rate_end_share": 0.5,
    "recover.training.weight_decay": 0.0,
    "recover.training.clip_norm": 1.0,
    "recover.training.label_drop": 0.1,
    "masked.mask_ratio_min": 0.7,
    "masked.mask_ratio_std": 0.25,
    "masked.diffusion_batch_mul": 4,
    "masked.kl_at_zero": "data",
    "sample.sampler": "masked",
    "sample.num_steps": 256,
    "sample.num_images": 50_000,
    "sample.guidance": 3.0,
    "sample.label_rule": "balanced",
    "sample.masked.head_steps": 100,
    "sample.masked.temperature": 1.0,
    "sample.masked.guidance_schedule": "linear",
}
EXPECTED = {"student": (2.28, 283.4), "teacher": (1.78, 296.0)}
SIZES = dict(input_size=4, patch_size=1, in_channels=16, hidden_size=32, depth=16, num_heads=2, num_classes=10,
             buffer_size=2, head_depth=1, head_width=16)  # fmt: skip


def test_every_value_is_the_published_one() -> None:
    recipe = load_recipe("mar-l-d16")
    values = flatten(to_plain(recipe))
    assert {path: values[path] for path in PUBLISHED} == PUBLISHED
    epochs = values["recover.training.steps"] * values["recover.training.batch_size"] / 1_281_167
    assert epochs == pytest.approx(40, rel=1e-3)
    reference = recipe.evaluate.references[0]
    found = {(item.metric.partition(".")[0], item.metric.rpartition(".")[2]): item.value for item in recipe.expected}
    for model, (fid, score) in EXPECTED.items():
        assert (found[model, "fid"], found[model, "inception_score"]) == (fid, score)
    assert all(reference in item.metric for item in recipe.expected if item.metric != "speedup")


def test_its_scheme_takes_half_of_either_stack() -> None:
    depths = {"encoder_blocks": 16, "decoder_blocks": 16}
    groups = parse_scheme(load_recipe("mar-l-d16").prune.scheme, depths)
    assert {name: sum(group.keep for group in listed) for name, listed in groups.items()} == dict.fromkeys(depths, 8)


def test_two_steps_of_search_and_recovery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(new_model("mar", SIZES, 0), tmp_path / "teacher")
    latents = np.random.default_rng(0).standard_normal((8, 4, 4, 16), dtype=np.float32)
    np.savez(tmp_path / "latents.npz", latents, np.arange(8) % 10)
    short = {
        "teacher": tmp_path / "teacher",
        "data.name": tmp_path / "latents.npz",
        "data.flip": 0,
    }  # the data has no mirrored copies
    for stage in ("prune", "recover"):
        short |= {f"{stage}.training.stop_after": 2, f"{stage}.training.batch_size": 4}
    settings = [f"{path}={value}" for path, value in short.items()]
    options = [word for setting in settings for word in ("--set", setting)]
    recipe = load_recipe("mar-l-d16", settings)
    assert main(["prune", "--recipe", "mar-l-d16", *options, "--out", str(tmp_path / "dry"), "--dry-run"]) == 0
    assert "checked" in capsys.readouterr().err
    prune(recipe, RunOptions(tmp_path / "cut"))
    recover(recipe, RunOptions(tmp_path / "back"), tmp_path / "cut")
    plan = plan_from_json(json.loads((tmp_path / "cut" / "plan.json").read_text()))
    assert block_pairs(plan) == [(i, 2 * i + 1) for i in range(16)]
    student = open_model(tmp_path / "back")
    assert (student.arch.encoder_depth, student.arch.decoder_depth) == (8, 8)
    assert student.facts.kept == plan.kept
    lines = [json.loads(line) for line in (tmp_path / "back" / "metrics.jsonl").read_text().splitlines()]
    assert [line["applied"] for line in lines] == [True, True]
    assert (lines[0]["beta"], lines[0]["learning_rate"]) == (1e-2, 2e-4)
    assert {"kd_loss", "vb_kd", "feat_loss", "gt", "mse", "vb"} <= set(lines[0])
