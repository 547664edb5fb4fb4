"""Inputs that a command does not name: teacher and data of the run that wrote the model, else an error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from material import Cli, done, refused, tiny

from tinyfusion.core.fetching import WouldFetch
from tinyfusion.models.checkpoint import open_model, save_model

FAST = "--set {0}.batch_size=4 --set {0}.ema_decay=0.5 --set {0}.log_every_steps=1"
RECOVER = f"recover --student cut --steps 1 --out back {FAST.format('recover.training')}"


def job(run: str) -> dict[str, object]:
    record: dict[str, dict[str, object]] = json.loads(Path(run, "run.json").read_text(encoding="utf-8"))
    return record["job"]


@pytest.fixture
def own(work: Path) -> Path:
    """A teacher of one's own colour pictures, `mine`, and its data `mine.npz`, of 3 classes."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(work / "mine.npz", images, np.arange(12) % 3)
    save_model(tiny(in_channels=3, num_classes=3), work / "mine")
    return work


# ---------------------------------------------------------------------------------------------------- teacher and data


def test_recover_takes_teacher_and_data_from_the_students_run(cli: Cli, own: Path) -> None:
    done(cli, f"prune --teacher mine --data mine.npz --scheme 1:2 --steps 1 --out cut {FAST.format('prune.training')}")
    said = done(cli, RECOVER).err
    assert f"teacher {own / 'mine'}, as in cut" in said and f"data {own / 'mine.npz'}, as in cut" in said
    assert job("back")["data"] == str(own / "mine.npz")
    assert open_model("back").facts.lineage[0]["hash"] == open_model("mine").hash()
    for student in ("cut/student", "back", "back/student-raw"):
        shutil.rmtree("again", ignore_errors=True)
        done(cli, RECOVER.replace("--student cut", f"--student {student}").replace("--out back", "--out again"))
    export = "export --model back --to official --out x.pt"
    done(cli, export)
    steps = json.loads(Path("x.json").read_text(encoding="utf-8"))["history"]
    assert [step.rpartition(" on ")[2] for step in steps] == ["4 images drawn from `mine.npz`."] * 2
    record = Path("back/run.json")
    for seen in ("NaN", "Infinity", "-5", "1" + "0" * 400, '"many"'):
        damaged = re.sub(r'"seen_images": [^,\n]+', f'"seen_images": {seen}', record.read_text(encoding="utf-8"))
        record.write_text(damaged, encoding="utf-8")
        done(cli, f"{export} --overwrite")
        assert json.loads(Path("x.json").read_text(encoding="utf-8"))["history"][1].endswith("that are not recorded.")


def test_data_of_a_run_are_found_from_another_folder(
    cli: Cli, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = "prune --teacher mine --data mine.npz --scheme 1:2 --steps 1 --out cut --set data.orientation=ignore"
    done(cli, f"{prune} --set data.augment=0.25 {FAST.format('prune.training')}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recover = RECOVER.replace("--student cut", f"--student {own / 'cut'}")
    done(cli, f"{recover} --set data.flip=0.5")
    data = job("back")["recipe"]["data"]  # type: ignore[index]
    settings = {"name": str(own / "mine.npz"), "orientation": "ignore", "augment": 0.25, "flip": 0.5}
    assert {name: data[name] for name in settings} == settings


def test_a_typed_setting_that_is_the_default_wins_over_the_runs(cli: Cli, own: Path) -> None:
    prune = "prune --teacher mine --data mine.npz --scheme 1:2 --steps 1 --out cut --set data.augment=0.25"
    done(cli, f"{prune} --set data.flip=0.5 {FAST.format('prune.training')}")
    done(cli, f"{RECOVER} --set data.flip=0")
    data = job("back")["recipe"]["data"]  # type: ignore[index]
    assert (data["augment"], data["flip"]) == (0.25, 0.0)


def test_a_shipped_name_wins_over_a_folder_of_that_name(cli: Cli, work: Path) -> None:
    prune = "prune --teacher digits --keep 0,2,4 --out digits"
    done(cli, prune)
    assert "digits is the shipped model; ./digits is the folder" in done(cli, prune).err, "the same command again"
    assert job("digits")["teacher"] == "digits"
    depths = [done(cli, f"inspect {name} --json").last_json["depth"] for name in ("digits", "./digits")]
    assert depths == [12, 3]
    done(cli, RECOVER.replace("--student cut", "--student digits"))
    assert job("back")["teacher"] == "digits"


def test_a_training_of_ones_own_gives_its_data_to_the_prune(cli: Cli, own: Path) -> None:
    sizes = "--set model.family=dit --set model.in_channels=3 --set model.num_classes=3 --set model.hidden_size=32 --set model.depth=4"
    done(cli, f"train --data mine.npz --steps 1 --out trained {sizes} {FAST.format('train')}")
    said = done(cli, f"prune --teacher trained --scheme 1:2 --steps 1 --out cut {FAST.format('prune.training')}").err
    assert f"data {own / 'mine.npz'}, as in trained" in said
    assert f"data {own / 'mine.npz'}, as in" in done(cli, "dynamic --model trained --steps 3 --out dry --dry-run "
        f"--set dynamic.finish_steps=1 {FAST.format('dynamic.training')}").err  # fmt: skip


def test_the_heads_of_an_official_teacher_come_with_it(cli: Cli, work: Path) -> None:
    for criterion in ("--keep 0,2", "--criterion width --set prune.width_threshold=1"):
        shutil.rmtree("cut", ignore_errors=True)
        shutil.rmtree("back", ignore_errors=True)
        done(cli, f"prune --teacher good.pt --num-heads 2 {criterion} --set prune.calibration_images=8 --out cut")
        done(cli, RECOVER)


def test_a_damaged_record_tells_nothing(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --keep 0,2 --out cut")
    record = json.loads(Path("cut/run.json").read_text(encoding="utf-8"))
    jobs: list[object] = [None, 3, {}, {"recipe": 3}, {"recipe": {"teacher": 5, "data": 7}}, {"teacher": ["x"]}]
    for damaged in jobs:
        Path("cut/run.json").write_text(json.dumps({**record, "job": damaged}), encoding="utf-8")
        refused(cli, RECOVER, "recover needs --teacher")
        assert not Path("back").exists()
    Path("cut/run.json").write_text("{", encoding="utf-8")
    refused(cli, RECOVER, "recover needs --teacher")
    done(cli, f"{RECOVER} --teacher teacher --data digits")
    done(cli, "export --model back --to tinyfusion --out card")


def test_what_no_run_tells_is_asked(cli: Cli, own: Path) -> None:
    refused(cli, RECOVER.replace("cut", "student"), "recover needs --teacher", "student has no record")
    refused(cli, "prune --keep 0,2 --out cut", "prune needs --teacher")
    refused(cli, "prune --teacher mine --scheme 1:2 --out cut", "no data set is named: give --data", "digits")
    refused(cli, "train --steps 1 --out run", "no data set is named: give --data")
    Path("bare.toml").write_text("[prune]\nscheme = '1:2'\n", encoding="utf-8")
    refused(cli, "run --recipe bare.toml --out run", "run needs --teacher")
    done(cli, "prune --teacher mine --keep 0,2 --out cut")
    refused(cli, RECOVER, "no data set is named: give --data")
    done(cli, f"{RECOVER} --data mine.npz")


def test_digits_are_taken_where_they_fit_and_said(cli: Cli, work: Path) -> None:
    prune = f"prune --teacher teacher --scheme 1:2 --steps 1 --out cut {FAST.format('prune.training')}"
    assert "data digits, as no set is named" in done(cli, f"{prune} --dry-run").err
    assert "no set is named" not in done(cli, f"{prune} --data digits").err


def test_another_teacher_is_told_which_one_was_expected(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --keep 0,2 --out cut")
    expected = f"{open_model('teacher').hash()[:12]} ({work / 'teacher'}, by the record of cut)"
    refused(cli, f"{RECOVER} --teacher other-teacher --data digits", expected, "the teacher other-teacher is")


# ----------------------------------------------------------------------------------------------- features and references


def test_features_and_reference_of_own_pictures_are_asked(cli: Cli, own: Path) -> None:
    evaluate = "evaluate --samples mine.npz --out fid.json"
    refused(cli, evaluate, "no reference is named", "--reference")
    choices = ("--set evaluate.features=", "inception (weights downloaded once", "dinov2:FOLDER", "classifier.json")
    refused(cli, f"{evaluate} --reference mine.npz", "no features are named for mine.npz", "(8, 8, 3)", *choices)
    named = f"{evaluate} --reference mine.npz --set evaluate.features=digits-classifier"
    refused(cli, named, "height, width, channels (8, 8, 1)", *choices)
    said = done(cli, "evaluate --samples images.npz --out fid.json").err
    assert "evaluation by features digits-classifier against digits, digits:heldout" in said


RUN = (
    f"run --recipe good.toml --out whole --set teacher=mine --data mine.npz {FAST.format('prune.training')}"
    f" {FAST.format('recover.training')} --set recover.training.steps=1 --set sample.num_images=8 --set sample.num_steps=2"
)


def test_a_dry_run_shows_its_plan_without_the_feature_network(
    cli: Cli, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cli, f"{RUN} --dry-run", "no features are named for images of the teacher", "--set evaluate.features=")

    def missing(name: str) -> Path:
        raise WouldFetch(f"the weights {name}", 95_628_359)

    monkeypatch.setattr("tinyfusion.evaluate.extractors.fetch_weights", missing)
    outcome = done(cli, f"{RUN} --set evaluate.features=inception --dry-run --json")
    assert "against mine.npz" in outcome.out and "minutes" in outcome.out
    assert "not checked: images and references of the evaluation (would fetch the weights" in outcome.err
    assert outcome.last_json["would_fetch"]["bytes"] == 95_628_359
    assert outcome.last_json["plan"]["evaluate"] == "against mine.npz"
    assert not Path("whole").exists()
