"""`explain` as it is typed: its files and page, the same command again, beside a run, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import Cli, done, refused, tiny

from tinyfusion.commands import explain as command
from tinyfusion.jobs.so_far import SoFar
from tinyfusion.models.checkpoint import save_model

SMALL = (
    "--data images.npz --num-images 20 --drawn 3 --set explain.passes=2 --set explain.bins=4 --set explain.most_steps=2"
)
EXPLAIN = f"explain teacher --out explained {SMALL}"


def record_of(folder: str) -> Any:
    return json.loads((Path(folder) / "explain.json").read_text(encoding="utf-8"))


def files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_what_explain_writes(cli: Cli, work: Path) -> None:
    outcome = done(cli, f"{EXPLAIN} --json")
    assert files("explained") == ["drawn.npz", "explain.json", "report.html", "run.json"]
    record = record_of("explained")
    assert outcome.last_json["added_loss"] == [block["added_loss"]["mean"] for block in record["blocks"]]
    assert len(record["blocks"]) == 4 and len(record["blocks"][0]["added_loss"]["by_noise"]) == 4
    assert record["noise"] == {"name": "timestep", "edges": [1000, 750, 500, 250, 0]}
    assert "20 images of images.npz, each noised 2 times" in record["protocol"]
    assert "no class has enough" in record["not_measured"]["by_class"]
    with np.load("explained/drawn.npz") as drawn:
        assert drawn["arr_0"].shape == (5 * 3, 8, 8, 1) and drawn["arr_1"].tolist() == [0, 3, 6] * 5
        rows = drawn["arr_0"].reshape(5, 3, -1).astype(float)
    assert record["drawn"]["difference"] == pytest.approx(
        (np.abs(rows[1:] - rows[0]) / 255).mean(axis=(1, 2)), rel=1e-5
    )
    page = Path("explained/report.html").read_text(encoding="utf-8")
    for title in (
        "What it draws without each block",
        "When each block matters",
        "Which blocks are alike",
        "Share of attention",
    ):
        assert title in page
    assert "Not measured: no class has enough" in page


def test_drawn_images_are_those_of_sample(cli: Cli, work: Path) -> None:
    """The whole model's row is what `sample` draws; a row without a block what the pruned model draws."""
    done(cli, EXPLAIN)
    how = "--num-images 3 --labels 0,3,6 --sampler ddim --num-steps 2"
    done(cli, f"sample --model teacher --out whole.npz {how}")
    done(cli, "prune --teacher teacher --criterion indices --keep 0,1,3 --out cut")
    done(cli, f"sample --model cut --out without-2.npz {how}")
    with np.load("explained/drawn.npz") as drawn, np.load("whole.npz") as whole, np.load("without-2.npz") as without:
        rows = drawn["arr_0"].reshape(5, 3, 8, 8, 1)
        assert np.array_equal(rows[0], whole["arr_0"])
        assert np.abs(rows[3].astype(int) - without["arr_0"]).max() <= 1


def test_the_same_command_again(cli: Cli, work: Path) -> None:
    done(cli, EXPLAIN)
    before = {name: Path("explained", name).read_bytes() for name in ("run.json", "explain.json", "drawn.npz")}
    assert "is finished; --overwrite starts anew" in done(cli, EXPLAIN).err
    Path("explained/report.html").unlink()
    done(cli, f"{EXPLAIN} --set explain.batch_size=7")  # which changes no result
    assert {name: Path("explained", name).read_bytes() for name in before} == before
    assert Path("explained/report.html").is_file(), "the page is written again"
    refused(cli, EXPLAIN.replace("--num-images 20", "--num-images 10"), "made with another recipe (explained.images")
    done(cli, EXPLAIN.replace("--num-images 20", "--num-images 10") + " --overwrite")
    assert "10 images" in record_of("explained")["protocol"]


def test_a_dry_run_writes_nothing(cli: Cli, work: Path) -> None:
    plan = done(cli, f"{EXPLAIN} --dry-run --json").last_json["plan"]
    assert "3 images by the whole model and without each block" in plan["draws"] and plan["minutes"] >= 0
    assert not Path("explained").exists()


@pytest.mark.parametrize("family", ["sit", "mar"])
def test_other_families(cli: Cli, work: Path, family: str) -> None:
    done(cli, f"explain {family} --out explained {SMALL}")
    record = record_of("explained")
    assert record["noise"]["name"] == {"sit": "time", "mar": "share of hidden tokens"}[family]
    assert all(block["attention_share"]["mean"] is not None for block in record["blocks"])
    assert ("similarity" in record["not_measured"]) == (family == "mar")
    assert "What it draws without each block" in Path("explained/report.html").read_text(encoding="utf-8")


def test_a_student_beside_its_teacher(cli: Cli, work: Path) -> None:
    done(cli, f"explain student --teacher teacher --out explained {SMALL} --drawn 0")
    record = record_of("explained")
    assert record["similarity"]["origins"] == [0, 2] and np.shape(record["similarity"]["matrix"]) == (2, 4)
    assert record["drawn"] is None and "no images were asked for" in record["not_measured"]["drawn"]
    assert "What its blocks have grown into" in Path("explained/report.html").read_text(encoding="utf-8")


def test_the_teacher_of_the_run_that_made_the_student(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --criterion indices --keep 1,3 --data images.npz --out pruned")
    said = done(cli, f"explain pruned --out explained {SMALL}").err
    assert "as in pruned (--teacher names another)" in said
    assert record_of("explained")["similarity"]["origins"] == [1, 3]
    Path("teacher").rename("moved")
    said = done(cli, f"explain pruned --out again {SMALL}").err
    assert "cannot be opened: blocks are compared with each other" in said


def test_digits_are_measured_on_those_held_out(cli: Cli, work: Path) -> None:
    said = done(cli, "explain teacher --out explained --num-images 4 --drawn 0 --set explain.passes=1").err
    assert "measured on digits:heldout" in said.splitlines()
    assert "4 images of digits:heldout" in record_of("explained")["protocol"]


def test_the_page_of_a_run_shows_what_is_explained_beside_it(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --criterion indices --keep 1,3 --out pruned")
    done(cli, f"explain pruned --teacher teacher --out pruned/explain {SMALL}")
    done(cli, f"{EXPLAIN} --drawn 0")
    done(cli, "report pruned explained --out page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert "Kept and removed blocks" in page and "What its blocks have grown into" in page
    assert "What each block does: teacher" in page
    done(cli, "prune --teacher teacher --criterion indices --keep 0,3 --out pruned --overwrite")
    assert Path("pruned/explain/explain.json").is_file(), "another run's files are not touched"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("blocks", 3, "blocks: wanted a list"),
        ("similarity", {}, "similarity.with is missing"),
        ("classes", [1, 2], "do not fit together"),
        ("noise", {"name": "timestep", "edges": [1, 0]}, "do not fit together"),
        ("drawn", {"protocol": "", "labels": [0], "difference": [], "by_image": []}, "do not fit together"),
    ],
)
def test_a_damaged_record_is_one_error(cli: Cli, work: Path, field: str, value: object, words: str) -> None:
    done(cli, EXPLAIN)
    path = Path("explained/explain.json")
    path.write_text(json.dumps({**record_of("explained"), field: value}), encoding="utf-8")
    refused(cli, "report explained --out page.html", words)


def test_an_interruption_leaves_nothing_half_written(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(command, "drawn_without", stop)
        outcome = cli(*EXPLAIN.split())
        assert outcome.code == 128 + signal.SIGTERM
        assert (
            outcome.err.splitlines()[-1]
            == "interrupted by SIGTERM; no result was written, the same command begins anew"
        )
    assert not Path("explained").exists()
    done(cli, EXPLAIN)


@pytest.mark.parametrize("saves", [1, 3])
def test_an_interrupted_one_goes_on(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """After losses of the first batch of three, and while images are drawn: the outcome is that of one sitting."""
    small = f"{EXPLAIN} --set explain.batch_size=20"
    done(cli, small.replace("explained", "whole"))
    monkeypatch.setattr("tinyfusion.jobs.so_far.SAVED_EVERY_S", 0.0)
    save, saved = SoFar.save, list[int]()

    def stopping(self: SoFar, step: int, arrays: Any) -> None:
        save(self, step, arrays)
        saved.append(step)
        if len(saved) == saves:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(SoFar, "save", stopping)
    stopped = cli(*small.split())
    assert stopped.code == 128 + signal.SIGTERM and "the same command continues" in stopped.err
    assert not Path("explained/explain.json").exists()
    done(cli, small)
    assert saved == [20, 40, *(40 + models for models in range(1, 6))], "nothing was measured or drawn twice"
    for name in ("explain.json", "drawn.npz"):
        assert Path("explained", name).read_bytes() == Path("whole", name).read_bytes()
    assert files("explained") == ["drawn.npz", "explain.json", "report.html", "run.json"]


def test_what_a_killed_process_leaves_is_begun_anew(cli: Cli, work: Path) -> None:
    done(cli, EXPLAIN)
    whole = Path("explained/explain.json").read_bytes()
    run = json.loads(Path("explained/run.json").read_text(encoding="utf-8"))
    Path("explained/run.json").write_text(json.dumps({**run, "state": "running"}), encoding="utf-8")
    for name in ("explain.json", "report.html"):
        Path("explained", name).unlink()
    done(cli, "report explained --out page.html")
    assert "measuring what each block does" in Path("page.html").read_text(encoding="utf-8")
    done(cli, EXPLAIN)
    assert Path("explained/explain.json").read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("explain teacher --out thesis", "exists and is not a tinyfusion run"),
        ("explain teacher --out notes.txt", "is a file"),
        ("explain nothing --out x", "no model"),
        ("explain teacher --out x --data nan.npz", "nan.npz"),
        ("explain teacher --out x --labels 10", "--labels [10] out of range"),
        ("explain teacher --out x --guidance 0.5", "sample.guidance must be at least 1"),
        ("explain teacher --out x --num-images 0", "at least 1"),
        (
            "explain teacher --out x --teacher sit",
            "--teacher sit does not take the inputs of the model (it is of family sit)",
        ),
        ("explain teacher --out x --teacher five-classes", "its num_classes differs"),
        ("explain teacher", "--out"),
    ],
)
def test_refusals(cli: Cli, work: Path, arguments: str, words: str) -> None:
    before = files(".")
    outcome = cli(*arguments.split())
    assert outcome.code == 2 and words in outcome.err.splitlines()[-1], outcome.err
    assert files(".") == before


def test_models_that_are_not_measured_block_by_block(cli: Cli, work: Path) -> None:
    done(
        cli,
        "dynamic --model teacher --data images.npz --out routed --steps 1 --set dynamic.training.batch_size=4"
        " --set dynamic.training.ema_decay=0 --set dynamic.finish_steps=0 --set dynamic.auxiliary_steps=0 --set dynamic.ramp_steps=0"
        " --set dynamic.calibration_images=0 --set dynamic.training.warmup_steps=0",
    )
    refused(cli, "explain routed --out x --data images.npz", "has routers", "give the model that it was made from")
    refused(cli, "explain digits-flux --out x", "prune --criterion sensitivity --inputs")


def test_a_model_without_a_null_class_is_drawn_without_guidance(cli: Cli, work: Path) -> None:
    save_model(tiny(null_class=False), Path("no-null"))
    done(cli, f"explain no-null --out explained {SMALL}")
    assert "guidance 1 " in record_of("explained")["drawn"]["protocol"]
