"""What comes after routers are trained: gates of whole blocks, the official layout, replay, the page, and the whole job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from material import Cli, tiny
from test_docs import TRAINING
from test_faults import failed
from test_making_dynamic import MADE, STEPS
from test_verbs import done

from tinyfusion.models.checkpoint import open_model, save_model


@pytest.fixture
def wide(work: Path) -> Path:
    """The material, and a model of eight heads."""
    save_model(tiny(num_heads=8), work / "wide")
    return work


def test_whole_blocks_are_gated_by_timestep(cli: Cli, wide: Path) -> None:
    """dynamic.depth: what is off is not run, and no published format holds it."""
    done(cli, f"{MADE} run --set dynamic.depth=true --set dynamic.forced_first=false")
    record = json.loads(Path("run/kept.json").read_text())
    assert len(record["shares"]["gate"]) == 4 and len(record["shares"]["gate"][0]) == len(record["times"]) == 10
    done(cli, "sample --model run --num-images 3 --sampler ddim --num-steps 4 --out a.npz")
    ran = json.loads(Path("a.json").read_text())["dynamic"]
    assert 0 < ran["macs_ratio"] < 1 and 0 <= ran["mean_blocks"] <= 1
    assert done(cli, "inspect run --json").last_json["dynamic"]["depth"] is True
    failed(cli("export", "--model", "run", "--to", "official", "--out", "made.pt"), "decide on whole blocks")


def test_the_official_layout_comes_back(cli: Cli, wide: Path) -> None:
    """What is exported is opened through any model option, and draws the same images."""
    save_model(tiny(num_heads=4), Path("four"))
    done(
        cli,
        f"{MADE.replace('--model wide', '--model four')} run --set dynamic.forced_first=false --set dynamic.calibration_images=0",
    )
    done(cli, "export --model run --to official --out made.pt")
    made, own = open_model("made.pt", num_heads=4, family="dit"), open_model("run")
    assert made.hash() == own.hash() and made.dynamic is not None and not made.dynamic.settings.forced_first
    opening = "--num-heads 4 --family dit"
    facts = done(cli, f"inspect made.pt {opening} --json").last_json
    assert facts["dynamic"]["forced_first"] is False and "routers" in facts["origin"]["kind"]
    for name, source in (("a", "run"), ("b", f"made.pt {opening}")):
        done(cli, f"sample --model {source} --num-images 3 --sampler ddim --num-steps 4 --out {name}.npz")
    assert np.array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])
    done(cli, f"bench made.pt {opening} --batch-size 2 --repeats 2 --set bench.product_size=64")
    failed(cli("export", "--model", "run", "--to", "diffusers", "--out", "made"), "has routers")


def test_replay_gives_the_step_that_was_logged(cli: Cli, wide: Path) -> None:
    done(cli, f"{MADE} run")
    for step in (3, STEPS - 2):  # with noise, and without it in the finish
        found = done(cli, f"replay run --step {step} --json").last_json
        mean = sum(sample["loss"] for sample in found["samples"]) / len(found["samples"])
        assert found["logged_loss"] == pytest.approx(mean, rel=1e-4)
        assert {"budget_loss", "ratio"} <= set(found["samples"][0])


def test_the_page_of_a_dynamic_run(cli: Cli, wide: Path) -> None:
    done(cli, f"{MADE} run")
    record = json.loads(Path("run/kept.json").read_text())
    assert set(record["shares"]) == {"heads", "groups", "tokens"} and len(record["maps"]["images"]) == 4
    assert all(0 <= share <= 1 for rows in record["shares"].values() for row in rows for share in row)
    assert record["macs"] < record["static_macs"] and 0 < record["ratio"] < 1
    done(cli, "report run --out page.html")
    page = Path("page.html").read_text()
    for words in (
        "Executed attention heads",
        "Executed groups of hidden channels",
        "Processed tokens per image",
        "Executed share",
    ):
        assert words in page, words


def test_a_run_prunes_recovers_and_makes_dynamic(cli: Cli, wide: Path) -> None:
    trained = " ".join(
        f"--set {stage}.{setting}" for stage in ("recover.training", "dynamic.training") for setting in TRAINING.split()
    )
    command = (
        f"run --recipe digits-shallow-dynamic --set teacher=wide {trained} --set sample.num_images=8 --set sample.num_steps=3 "
        "--set sample.batch_size=8 --set speed.repeats=2 --set speed.batch_size=2 --set speed.depths=0 "
        '--set dynamic.finish_steps=0 --set dynamic.calibration_images=0 --set evaluate.references=["digits"] --out whole'
    )
    answer = done(cli, f"{command} --dry-run")
    assert "dynamic" in answer.out + answer.err and not Path("whole").exists()
    done(cli, command)
    assert open_model("whole/dynamic").dynamic is not None
    speed = json.loads(Path("whole/speed.json").read_text())["models"]
    assert set(speed) == {"teacher", "student", "dynamic"} and speed["dynamic"]["depth"] == 2
    drawn = {file.stem for file in Path("whole/samples").glob("*.npz")}
    assert drawn == {"teacher", "student", "dynamic", "real"}, "the blocks were chosen within the recovery"
    assert Path("whole/evaluations/dynamic-digits.json").is_file()
    page = Path("whole/report.html").read_text()
    assert "Executed attention heads" in page and "Processed tokens per image" in page
    assert "is finished" in done(cli, command).err
