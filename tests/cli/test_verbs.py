"""Every verb on a tiny model and real digits: what it writes, says and returns, and how it stops and goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import Cli, done, refused
from PIL import Image
from safetensors.torch import load_file

from tinyfusion.commands.evaluate import score_lines
from tinyfusion.core import progress
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.inception import INCEPTION
from tinyfusion.jobs import driving
from tinyfusion.options import VERBS
from tinyfusion.report.format import significant
from tinyfusion.training.loop import StepRecord

FAST = "--set prune.training.ema_decay=0.5 --set prune.training.batch_size=16 --set prune.training.log_every_steps=1"
PRUNE = f"prune --teacher teacher --scheme 1:2 --steps 2 {FAST} --out pruned"
RECOVER = (
    "recover --teacher teacher --student student --steps 2 --out recovered --set recover.training.batch_size=16"
    " --set recover.training.ema_decay=0.5 --set recover.training.log_every_steps=1"
)
TRAIN = (
    "train --data digits --steps 3 --out trained --set train.batch_size=16 --set train.ema_decay=0.5 --set model.hidden_size=32"
    " --set model.family=dit --set model.patch_size=4 --set model.depth=4 --set train.log_every_steps=1"
)
SAMPLE = "sample --model teacher --num-images 6 --sampler ddim --num-steps 5 --out drawn/samples.npz"
EVALUATE = "evaluate --samples images.npz --reference digits:heldout --out scores/evaluation.json"
RUN = (
    f"run --recipe good.toml --scheme 1:2 {FAST} --set recover.training.steps=2 --set recover.training.batch_size=16"
    " --set recover.training.ema_decay=0.5 --set sample.num_images=8 --set sample.sampler=ddim --set sample.num_steps=3"
    " --set sample.batch_size=8 --set speed.repeats=2 --set speed.batch_size=4 --set speed.steps_per_repeat=1 --out whole"
).replace(" --scheme 1:2", "")
WRITING = {"prune": PRUNE, "recover": RECOVER, "train": TRAIN, "sample": SAMPLE, "evaluate": EVALUATE}


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[str, str]:
    """Name and hash of every file below."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


# -------------------------------------------------------------------------------------------------------- the verbs


@pytest.mark.parametrize("update", ["lora", "full", "frozen"])
def test_prune_learned(cli: Cli, work: Path, update: str) -> None:
    outcome = done(cli, f"{PRUNE} --update {update} --json")
    plan = json.loads(Path("pruned/plan.json").read_text(encoding="utf-8"))
    first, second = plan["kept"]["blocks"]
    assert (first // 2, second // 2) == (0, 1), "one block of each pair"
    assert outcome.last_json["kept"] == plan["kept"]
    assert plan["criterion"] == "learned"
    assert plan["groups"] == {"blocks": [[1, 2], [1, 2]]}
    assert all(abs(sum(p) - 1) < 1e-5 for p in plan["scores"]["blocks"])
    log = lines_of("pruned/metrics.jsonl")
    assert [line["step"] for line in log] == [0, 1]
    assert [line["temperature"] for line in log] == [4.0, 0.1], "the schedule is exact at both ends"
    assert {"loss", "kept", "confidence", "seen_images", "gradient_norm"} <= set(log[0])
    said = re.search(r"([\d.]+)% of the teacher's parameters", outcome.err)
    assert said is not None
    share = float(said[1])
    position_table = 4 * 32
    trained = {"lora": 8 * 3456, "full": 89_120 - position_table, "frozen": 0}[update]  # rank 8 on every linear layer
    assert share == pytest.approx(100 * trained / 89_120, abs=1e-3)
    assert json.loads(Path("pruned/run.json").read_text(encoding="utf-8"))["state"] == "done"
    kept = load_file("pruned/student/model.safetensors")["blocks.1.mlp.fc1.weight"]
    assert kept.equal(load_file("teacher/model.safetensors")[f"blocks.{second}.mlp.fc1.weight"]), (
        "cut from the untouched teacher"
    )


def test_a_recipe_that_keeps_updates_serves_criteria_without_any(cli: Cli, work: Path) -> None:
    done(cli, "prune --recipe digits --teacher teacher --criterion bi --out scored")
    done(cli, "prune --teacher teacher --criterion bi --out plain")
    scored, plain = (files(Path(name) / "student")["model.safetensors"] for name in ("scored", "plain"))
    assert scored == plain


def test_prune_indices(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --criterion indices --keep 3,0 --out pruned")
    facts = done(cli, "inspect pruned --json").last_json
    assert facts["kept"] == {"blocks": [0, 3]}
    assert facts["depth"] == 2


CALIBRATED = " --set prune.calibration_images=24 --set prune.calibration_batch_size=10"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ("bi", None), ("bi --set prune.bi_inputs=clean", None), ("flux-lite", None), ("sensitivity", None),
        ("sensitivity --set prune.sensitivity_order=greedy", None), ("bk-sdm", [0, 3]), ("first", [0, 1]),
        ("last", [2, 3]), ("uniform", [0, 3]), ("random --seed 3", None), ("first --num-keep 3 --protect 3", [0, 1, 3]),
    ],
)  # fmt: skip
def test_prune_without_training(cli: Cli, work: Path, options: str, kept: list[int] | None) -> None:
    calibrated = CALIBRATED if kept is None and "random" not in options else ""
    command = f"prune --teacher teacher --criterion {options}{calibrated} --out pruned --json"
    dry = done(cli, f"{command} --dry-run")
    assert dry.last_json["plan"]["criterion"].startswith(options.split()[0])
    assert not Path("pruned").exists()
    outcome = done(cli, command)
    plan = json.loads(Path("pruned/plan.json").read_text(encoding="utf-8"))
    assert outcome.last_json["kept"] == plan["kept"]
    assert kept in (None, plan["kept"]["blocks"])
    assert plan["scores"].get("calibration", {}).get("images", 24) == 24
    assert done(cli, "inspect pruned --json").last_json["kept"] == plan["kept"]
    assert not list(Path("pruned").rglob("step-*"))


def test_prune_by_calibration_loss_leaves_all_losses(cli: Cli, work: Path) -> None:
    done(cli, f"prune --teacher teacher --criterion median-loss {CALIBRATED} --protect 2 --out pruned")
    table = json.loads(Path("pruned/calibration.json").read_text(encoding="utf-8"))
    plan = json.loads(Path("pruned/plan.json").read_text(encoding="utf-8"))
    assert table["masks"] == ["1010", "0110", "0011"], "in lexicographic order of the kept blocks"
    assert sorted(table["losses"])[1] == plan["scores"]["loss"] == table["loss"]
    assert {"bi", "flux-lite", "sensitivity", "bk-sdm", "first", "last", "uniform"} == set(table["marks"])
    assert table["calibration"]["distinct_images"] == 24


def test_a_stopped_mask_search_goes_on(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the second of three batches: the sums so far are kept, and the outcome is that of one sitting."""
    command = f"prune --teacher teacher --criterion min-loss {CALIBRATED} --out pruned"
    done(cli, command.replace("pruned", "whole"))
    monkeypatch.setattr("tinyfusion.jobs.so_far.SAVED_EVERY_S", 0.0)
    saved: list[object] = []

    def save_and_stop(*arguments: object) -> None:
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    from tinyfusion.jobs.so_far import SoFar

    save: Any = SoFar.save
    monkeypatch.setattr(SoFar, "save", save_and_stop)
    stopped = cli(*shlex.split(command))
    assert stopped.code == 128 + signal.SIGTERM
    assert [p.name for p in Path("pruned/checkpoints").iterdir()] == ["step-0000002"]
    done(cli, command)
    assert len(saved) == 2, "the third batch is the last, and the first two were not done again"
    tables = [json.loads(Path(f"{run}/calibration.json").read_text(encoding="utf-8")) for run in ("pruned", "whole")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("masked-kd", {"mse", "kd_loss", "feat_loss", "beta"}),
        ("rep-kd", {"mse", "kd_loss", "feat_loss", "beta"}),
        ("logits-kd", {"mse", "kd_loss"}),
        ("finetune", {"mse"}),
    ],
)
def test_recover(cli: Cli, work: Path, method: str, terms: set[str]) -> None:
    command = RECOVER.replace("--teacher teacher ", "") if method == "finetune" else RECOVER
    done(cli, f"{command} --method {method}")
    log = lines_of("recovered/metrics.jsonl")
    assert len(log) == 2
    assert terms == {"mse", "kd_loss", "feat_loss", "beta"} & set(log[0])
    averaged, raw = (load_file(f"recovered/{name}/model.safetensors") for name in ("student", "student-raw"))
    assert not averaged["blocks.0.mlp.fc1.weight"].equal(raw["blocks.0.mlp.fc1.weight"])
    ema, other = (done(cli, f"inspect recovered --json {w}").last_json["hash"] for w in ("", "--weights raw"))
    assert ema != other
    assert done(cli, "inspect recovered --json").last_json["kept"] == {"blocks": [0, 2]}


SEARCHED = (
    "recover --teacher teacher --search-share 0.5 --scheme 1:2 --steps 4 --out searched"
    " --set recover.training.batch_size=16 --set recover.training.ema_decay=0.5 --set recover.training.log_every_steps=1"
)


@pytest.mark.parametrize("more", ["", "--method finetune", "--set recover.update=lora --set recover.lora_rank=2"])
def test_recover_chooses_the_blocks_of_a_whole_model(cli: Cli, work: Path, more: str) -> None:
    outcome = done(cli, f"{SEARCHED} {more} --json")
    record = json.loads(Path("searched/run.json").read_text(encoding="utf-8"))
    assert record["recipe"]["recover"]["method"] == ("finetune" if "finetune" in more else "logits-kd")
    plan = json.loads(Path("searched/plan.json").read_text(encoding="utf-8"))
    assert outcome.last_json["kept"] == plan["kept"] and len(plan["kept"]["blocks"]) == 2
    assert plan["cost"] == {"images": 32.0}, "two of four steps searched"
    log = lines_of("searched/metrics.jsonl")
    assert [line["fixed"] for line in log] == [False, False, True, True]
    assert "probability of each group's choice" in outcome.err and "(chance 0.50)" in outcome.err
    teacher, student = (done(cli, f"inspect {name} --json").last_json for name in ("teacher", "searched"))
    assert student["kept"] == plan["kept"] and student["depth"] == 2 and plan["teacher"] == teacher["hash"]
    done(cli, "recover --teacher teacher --student searched --steps 1 --out more --set recover.training.ema_decay=0")
    replayed = done(cli, "replay searched --step 3")
    assert f"logged {log[3]['loss']:.6g}" in replayed.out
    shown = re.search(r"loss ([\d.e-]+), logged", replayed.out)
    assert shown is not None and float(shown[1]) == pytest.approx(log[3]["loss"], rel=1e-4)
    done(cli, "report searched --out page.html")
    assert "4 blocks to 2" in Path("page.html").read_text(encoding="utf-8")


TRIED = (
    f"{SEARCHED} --set recover.search_candidates=3 --set recover.search_trial_steps=2 --set recover.search_trial_batch_size=8"
    " --set prune.scaling=1,1 --set recover.training.checkpoint_every_steps=1 --set recover.training.checkpoints_limit=9"
)


def test_a_search_within_goes_on_where_it_stopped(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before, and after, the blocks are fixed, and while choices are tried: the same weights, the same plan."""
    said = done(cli, TRIED.replace("--out searched", "--out whole")).err
    tried = re.findall(r"^  ([\d ]+): (\d\.\d+)(, kept)?$", said, re.MULTILINE)
    kept = json.loads(Path("whole/plan.json").read_text())["kept"]["blocks"]
    lowest = min(float(loss) for _, loss, _ in tried)
    assert [(blocks, float(loss)) for blocks, loss, mark in tried if mark] == [(" ".join(map(str, kept)), lowest)]
    assert len(tried) == 3
    wanted = {name: value for name, value in files(Path("whole")).items() if "student" in name or "plan" in name}
    assert len(wanted) > 2
    assert json.loads(Path("whole/run.json").read_text())["seen_images"] == 4 * 16 + 3 * 2 * 8
    done(cli, TRIED.replace("trial_batch_size=8", "trial_batch_size=99").replace("--out searched", "--out large"))
    assert (
        json.loads(Path("large/run.json").read_text())["seen_images"] == 4 * 16 + 3 * 2 * 16
    )  # no larger than in training
    for step in (1, 2, 3):
        out = f"from-{step}"
        done(cli, TRIED.replace("--out searched", f"--resume whole/checkpoints/step-{step:07d} --out {out}"))
        assert {name: files(Path(out))[name] for name in wanted} == wanted, step

    log = driving._Sitting.log

    def stopping(sitting: Any, record: StepRecord, bar: Any) -> None:
        log(sitting, record, bar)
        if record.trial == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(driving._Sitting, "log", stopping)
        assert cli(*TRIED.split()).code == 128 + signal.SIGTERM
    assert [path.name for path in Path("searched/checkpoints").iterdir()][-1:] == ["step-0000002"]
    done(cli, TRIED)
    assert {name: files(Path("searched"))[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("recover --teacher teacher --out x", ("--student", "--search-share")),
        (SEARCHED.replace("--teacher teacher ", ""), ("--teacher",)),
        (f"{SEARCHED} --method masked-kd", ("recover.search_share", "masked-kd", "logits-kd")),
        (SEARCHED.replace("0.5", "1.5", 1), ("search_share", "1.5")),
        (SEARCHED.replace("0.5", "0", 1), ("search_share", "0")),
        (SEARCHED.replace("--scheme 1:2", "--scheme 1:3"), ("1:3", "4")),
        (f"{SEARCHED} --set recover.training.batch_size=6 --set prune.distribution=subset --set prune.subset_estimator=score"
         " --set compute.gradient_accumulation_steps=4", ("recover.training.batch_size", "8")),
    ],
)  # fmt: skip
def test_a_search_within_refuses(command: str, parts: tuple[str, ...], cli: Cli, work: Path) -> None:
    refused(cli, command, *parts)
    assert not Path("searched").exists() and not Path("x").exists()


def test_a_pruned_student_is_not_searched_again(cli: Cli, work: Path) -> None:
    refused(cli, f"{RECOVER} --method logits-kd --search-share 0.5", "--search-share is for whole models")
    Path("search.toml").write_text("[recover]\nsearch_share = 0.5\n", encoding="utf-8")
    outcome = done(cli, f"{RECOVER} --method logits-kd --recipe search.toml")
    assert "recover.search_share is left out" in outcome.err
    assert not Path("recovered/plan.json").exists()


def test_a_start_says_in_one_line_what_memory_it_needs(cli: Cli, work: Path) -> None:
    table = "recover: memory of one process at its peak"
    lines = done(cli, RECOVER).err.splitlines()
    needs = [line for line in lines if "GiB" in line]
    assert len(needs) == 1 and re.fullmatch(
        r"recover: needs about 0\.00\d+ of [\d.,]+ GiB of memory \(details: --dry-run\)", needs[0]
    )
    log = Path("recovered/log.txt").read_text(encoding="utf-8")
    assert needs[0] in log and table not in log
    assert table in done(cli, f"{RECOVER} --overwrite --dry-run").out


def test_progress_lines_have_the_loss_of_the_last_logged_step(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    outcome = done(cli, RECOVER.replace("--steps 2", "--steps 3").replace("log_every_steps=1", "log_every_steps=2"))
    shown = [line for line in outcome.err.splitlines() if " images, " in line]
    logged_lines = {line["step"]: line for line in lines_of("recovered/metrics.jsonl")}
    assert len(shown) == 3 and sorted(logged_lines) == [0, 2]
    for line, step in zip(shown, (0, 0, 2), strict=True):
        loss, norm, rate = (logged_lines[step][name] for name in ("loss", "gradient_norm", "learning_rate"))
        assert re.search(r" of 48 images, [\d.,]+/s, \d+ s left  ", line)
        assert f"left  loss {loss:.4f}, gradient norm {norm:.3g}, learning rate {rate:.2g}" in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (99, "99 s"), (600, "10 min"), (5_940, "99 min"), (12_000, "3 h 20 min")]
)
def test_remaining_time_has_a_unit_for_people(seconds: float, text: str) -> None:
    assert progress._time(seconds) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone", "no checkpoint at gone: no such folder; wanted a folder such as RUN/checkpoints/step-0001000"),
        ("images.npz", "no checkpoint at images.npz: it is a file; wanted a folder"),
        ("thesis", "thesis is not a checkpoint; wanted a folder such as RUN/checkpoints/step-0001000"),
        ("other", "other is not a checkpoint; the newest in it is other/checkpoints/step-0000002"),
        (
            "other/checkpoints",
            "other/checkpoints is not a checkpoint; the newest in it is other/checkpoints/step-0000002",
        ),
    ],
)
def test_resume_names_what_is_no_checkpoint(given: str, message: str, cli: Cli, work: Path) -> None:
    done(cli, RECOVER.replace("--out recovered", "--out other"))
    outcome = cli(*shlex.split(f"{RECOVER} --resume {given}"))
    assert outcome.code == 2 and f"error: {message}" in outcome.err
    assert not Path("recovered").exists()


def test_a_chain_learns_from_parent_grandparent_and_aunt(cli: Cli, work: Path) -> None:
    half = "recover --teacher teacher --student student --steps 2 --out half --set recover.training.ema_decay=0.5"
    done(cli, f"{half} --set recover.training.batch_size=8")
    done(cli, "prune --teacher half --criterion indices --keep 1 --out quarter")
    done(cli, "prune --teacher teacher --criterion indices --keep 0,1,3 --out three")
    for student, teacher in (("quarter", "half"), ("quarter", "teacher"), ("three", "half")):
        out = f"{student}-from-{teacher}"
        options = half.replace("--student student", f"--student {student}").replace("--out half", f"--out {out}")
        done(cli, options.replace("--teacher teacher", f"--teacher {teacher}"))
        assert "feat_loss" in lines_of(f"{out}/metrics.jsonl")[0], out


@pytest.mark.parametrize(
    ("command", "section"), [(RECOVER, "recover.training"), (PRUNE, "prune.training"), (TRAIN, "train")]
)
def test_an_average_that_is_too_slow_is_warned_of(command: str, section: str, cli: Cli, work: Path) -> None:
    """The warning's own advice, typed as it stands, silences it."""
    outcome = done(cli, f"{command} --set {section}.ema_decay=0.9999 --dry-run")
    (advice,) = re.findall(rf"warning: the moving average .*: (--set {section}\.ema_decay=\S+) or less", outcome.err)
    assert "warning" not in done(cli, f"{command} {advice} --dry-run").err


def test_sample(cli: Cli, work: Path) -> None:
    outcome = done(cli, f"{SAMPLE} --labels 3,7 --grid drawn/grid.png --json")
    stored = np.load("drawn/samples.npz")
    assert stored["arr_0"].shape == (6, 8, 8, 1)
    assert stored["arr_0"].dtype == np.uint8
    assert stored["arr_1"].tolist() == [3, 7, 3, 7, 3, 7]
    assert stored["arr_1"].dtype == np.int64
    record = json.loads(Path("drawn/samples.json").read_text(encoding="utf-8"))
    assert record["protocol"] == outcome.last_json["protocol"]
    assert "ddim 5 steps" in record["protocol"]
    with Image.open("drawn/grid.png") as grid:
        assert grid.size[0] > grid.size[1] / 8 > 0
    done(cli, f"{SAMPLE.replace('drawn', 'other')} --labels 3,7 --seed 1")
    assert not np.array_equal(np.load("other/samples.npz")["arr_0"], stored["arr_0"])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_do_not_depend_on_the_batch_size(cli: Cli, work: Path, sampler: str) -> None:
    for size in (1, 4, 6):
        done(cli, f"{SAMPLE.replace('drawn', f'by-{size}')} --sampler {sampler} --batch-size {size}")
    one, four, six = (np.load(f"by-{size}/samples.npz") for size in (1, 4, 6))
    for other in (four, six):
        assert np.array_equal(one["arr_1"], other["arr_1"])
        assert np.abs(one["arr_0"].astype(int) - other["arr_0"].astype(int)).max() <= 1


def test_grid_of_finished_samples_is_drawn_later(cli: Cli, work: Path) -> None:
    done(cli, SAMPLE)
    before = files(work / "drawn")
    done(cli, f"{SAMPLE} --grid drawn/grid.png")
    after = files(work / "drawn")
    assert after.pop("grid.png")
    assert after["samples.npz"] == before["samples.npz"] and after.keys() == before.keys()
    done(cli, f"{SAMPLE} --grid drawn/grid.png")  # the record knows it as its own


def test_evaluate(cli: Cli, work: Path) -> None:
    done(cli, SAMPLE)
    outcome = done(cli, "evaluate --samples drawn/samples.npz --reference digits:heldout --out evaluation.json --json")
    printed = outcome.last_json
    record = json.loads(Path("evaluation.json").read_text(encoding="utf-8"))
    wanted = {"fid", "sfid", "inception_score", "precision", "recall", "num_images", "features", "protocol"}
    assert wanted <= set(record)
    assert record["num_images"] == 6
    assert printed["fid"] == record["fid"] > 0
    assert "ddim 5 steps" in record["protocol"]
    assert "digits:heldout" in record["protocol"]
    rows = {line[:20].strip(): line[20:] for line in outcome.err.splitlines()}
    assert rows["FID"] == (
        f"{significant(record['fid'])}   (features of digits-classifier: no FID of Inception features compares; "
        "6 images and 360 reference images: biased upward, compare only at equal counts)"
    )
    assert rows["sFID"] == significant(record["sfid"])
    assert rows["Inception Score"] == significant(record["inception_score"])
    assert rows["precision, recall"] == f"{significant(record['precision'])}, {significant(record['recall'])}"
    assert rows["images"] == "6 of drawn/samples.npz, against 360 of digits:heldout"
    assert rows["protocol"] == record["protocol"]
    again = done(cli, "evaluate --samples drawn/samples.npz --reference digits:heldout --out evaluation.json")
    assert {line[:20].strip(): line[20:] for line in again.err.splitlines()} | rows == rows | {
        "evaluation.json is f": "inished; --overwrite starts anew"
    }, "a finished evaluation prints its numbers again"


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({}, ""),
        ({"num_images": 9_999}, "9,999 images: biased upward, compare only at equal counts"),
        (
            {"reference": {"name": "real", "count": 500}},
            "500 reference images: biased upward, compare only at equal counts",
        ),
        ({"reference": {"name": "real", "count": 500}, "protocol": "real 500 with stored moments"}, ""),
        (
            {"features": {"name": "digits-classifier"}},
            "features of digits-classifier: no FID of Inception features compares",
        ),
    ],
)
def test_what_limits_an_fid_stands_beside_it(changes: dict[str, Any], remark: str) -> None:
    record = {
        "fid": 12.34, "sfid": None, "inception_score": 9.0, "precision": 0.5, "recall": 0.25, "num_images": 50_000,
        "features": {"name": INCEPTION}, "reference": {"name": "real", "count": 10_000}, "protocol": "p",
    }  # fmt: skip
    lines = score_lines(record | changes, "s.npz")
    assert lines[0] == f"{'FID':20}12.3" + (f"   ({remark})" if remark else "")
    assert lines[1] == f"{'sFID':20}–", "what was not measured has no number"
    assert score_lines({}, "s.npz")[0].startswith("images"), "a record that lost its numbers is no traceback"
    dino = score_lines(record | {"features": {"name": "dinov2"}, "protocol": "dinov2 0a1b | p"}, "s.npz")
    assert dino[0].startswith("FD-DINOv2 "), "the distance is named by its features, as on the page"


def test_a_damaged_record_of_scores_is_named(cli: Cli, work: Path) -> None:
    done(cli, EVALUATE)
    path = Path("scores/evaluation.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    for field, value in (("fid", "2.5"), ("reference", {"name": "digits", "count": "many"}), ("features", 3)):
        path.write_text(json.dumps({**record, field: value}), encoding="utf-8")
        refused(cli, EVALUATE, f"{path} is damaged: {field}", "correct or remove it")


def test_train(cli: Cli, work: Path) -> None:
    done(cli, TRAIN)
    assert [line["step"] for line in lines_of("trained/metrics.jsonl")] == [0, 1, 2]
    facts = done(cli, "inspect trained --json").last_json
    assert facts["depth"] == 4
    assert facts["kept"] is None
    assert Path("trained/model-raw/model.safetensors").is_file()


def test_inspect(cli: Cli, work: Path) -> None:
    facts = done(cli, "inspect student --json").last_json
    assert {"family", "depth", "num_parameters", "macs", "kept", "lineage", "hash"} <= set(facts)
    assert facts["family"] == "dit"
    assert facts["num_parameters"] == sum(t.numel() for t in load_file("student/model.safetensors").values())
    parent = done(cli, "inspect teacher --json").last_json
    assert facts["lineage"] == [{"hash": parent["hash"], "depth": {"blocks": 4}, "kept": None}]
    official = done(cli, "inspect good.pt --num-heads 2 --json").last_json
    assert official["hash"] == parent["hash"], "the same model, whatever the file"
    text = done(cli, "inspect student").out
    assert "51,296" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "kept.blocks [0, 2]" in lines
    assert f"parent {parent['hash'][:12]} 4 blocks, not pruned" in lines
    done(cli, "prune --teacher student --criterion indices --keep 1 --out quarter")
    lines = [" ".join(line.split()) for line in done(cli, "inspect quarter").out.splitlines()]
    assert f"parent {facts['hash'][:12]} 2 blocks, which are 0, 2 of its own parent" in lines


def test_recipes(cli: Cli) -> None:
    listed = done(cli, "recipes --json").last_json
    assert {"digits", "digits-teacher"} <= set(listed)
    assert listed["digits"]["minutes"] > 0
    assert "digits" in done(cli, "recipes").out


def test_recipes_are_told_in_two_lines_and_one_of_them_in_full(cli: Cli) -> None:
    whole = done(cli, "recipes").out
    listed = done(cli, "recipes --json").last_json
    lines = [line for line in whole.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == list(listed)
    assert len(whole.splitlines()) == len(listed) + sum(bool(values["expected"]) for values in listed.values())
    assert "expected: FID 2.86 +- 0.15, speedup 1.96 +- 0.1, 5 more in `tinyfusion recipes dit-xl-d14`" in whole
    one = done(cli, "recipes dit-xl-d14").out
    for number in listed["dit-xl-d14"]["expected"]:
        assert (
            f"expected {number['metric']} {number['value']:g} +- {number['tolerance']:g} {number['note']}".rstrip()
            in one
        )
    assert done(cli, "recipes dit-xl-d14 --json").last_json == {"dit-xl-d14": listed["dit-xl-d14"]}
    outcome = cli("recipes", "dgits")
    assert outcome.code == 2 and "no shipped recipe 'dgits'; did you mean 'digits'?" in outcome.err


def test_report(cli: Cli, work: Path) -> None:
    done(cli, PRUNE)
    done(cli, "report pruned --out page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert done(cli, "report pruned --out page.html").code == 0, "a page of ours is written anew"


def test_run(cli: Cli, work: Path) -> None:
    open_extractor.cache_clear()
    outcome = done(cli, f"{RUN} --device cpu --json")
    assert open_extractor.cache_info().currsize == 1, "every stage opens the extractor on the recipe's device"
    for name in (
        "prune/plan.json",
        "recover/student/model.json",
        "samples/student.npz",
        "evaluation.json",
        "speed.json",
        "report.html",
    ):
        assert Path("whole", name).is_file(), name
    assert outcome.last_json["report"] == "whole/report.html"
    with np.load("whole/samples/real.npz") as real:
        assert real["arr_0"].shape == (40, 8, 8, 1) and real["arr_0"].dtype == np.uint8
        assert len(np.unique(real["arr_0"], axis=0)) == 40, "spread over the set, not one image again"
    assert 'alt="real images"' in Path("whole/report.html").read_text(encoding="utf-8")
    before = files(work / "whole")
    again = done(cli, f"{RUN} --device cpu")
    assert "finished" in again.err
    assert files(work / "whole") == before


# -------------------------------------------------------------------------------------------------- common to all verbs


def test_run_in_one_training(cli: Cli, work: Path) -> None:
    """The blocks are chosen within the recovery: no pruned model before it, one training, the whole page."""
    searching = '[recover]\nsearch_share = 0.5\nmethod = "logits-kd"\n'
    Path("good.toml").write_text('teacher = "teacher"\n' + searching, encoding="utf-8")
    searched = RUN.replace(FAST, "--set evaluate.checkpoints=2 --set recover.training.checkpoint_every_steps=1")
    planned = done(cli, f"{searched} --dry-run --json").last_json["plan"]
    assert "1 steps of the recovery" in planned["prune"] and not Path("whole").exists()
    outcome = done(cli, f"{searched} --json")
    kept = json.loads(Path("whole/recover/plan.json").read_text(encoding="utf-8"))["kept"]
    assert outcome.last_json["kept"] == kept
    assert not Path("whole/prune").exists()
    assert sorted(path.stem for path in Path("whole/samples").glob("*.npz")) == ["real", "student", "teacher"]
    assert set(json.loads(Path("whole/run.json").read_text(encoding="utf-8"))["stages"]) >= {
        "recover",
        "sample",
        "evaluate",
    }
    curve = json.loads(Path("whole/fid_steps.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in curve] == [1, 2], (
        "the student that the first step's averages would give, and the last"
    )
    page = Path("whole/report.html").read_text(encoding="utf-8")
    assert "4 blocks to 2" in page and "pruned, before recovery" not in page
    assert "recover.search_share" not in done(cli, f"{searched} --set prune.criterion=bi --out by-score").err
    assert Path("by-score/prune/plan.json").exists(), "a criterion without training prunes first"


@pytest.mark.parametrize("verb", [*WRITING, "run", "report"])
def test_dry_run_writes_nothing(cli: Cli, work: Path, verb: str) -> None:
    if verb == "report":
        done(cli, "prune --teacher teacher --criterion indices --keep 1 --out pruned")
    before = files(work)
    folders = {p for p in work.rglob("*") if p.is_dir()}
    command = {**WRITING, "run": RUN, "report": "report pruned --out page.html"}[verb]
    outcome = done(cli, f"{command} --dry-run --json")
    assert files(work) == before
    assert {p for p in work.rglob("*") if p.is_dir()} == folders
    assert outcome.last_json["state"] == "checked"
    if verb not in ("report", "evaluate"):
        assert outcome.last_json["plan"]["minutes"] >= 0
        assert outcome.last_json["plan"]["memory_gib"] > 0
        assert "minutes" in outcome.out
        assert "GiB" in outcome.out


@pytest.mark.parametrize("verb", WRITING)
def test_the_same_command_again_is_finished(cli: Cli, work: Path, verb: str) -> None:
    done(cli, WRITING[verb])
    before = files(work)
    again = done(cli, WRITING[verb])
    assert "is finished; --overwrite starts anew" in again.err
    assert files(work) == before


def test_overwrite_starts_anew(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --criterion indices --keep 0 --out pruned")
    Path("pruned/extra").write_text("mine", encoding="utf-8")
    Path("pruned/calibration.json").write_text("{}", encoding="utf-8")  # of the first run
    done(cli, "prune --teacher teacher --criterion indices --keep 1,2 --out pruned --overwrite")
    assert done(cli, "inspect pruned --json").last_json["kept"] == {"blocks": [1, 2]}
    assert Path("pruned/extra").read_text(encoding="utf-8") == "mine"
    assert not Path("pruned/calibration.json").exists()
    assert sorted(p.name for folder in (work, Path("pruned")) for p in folder.glob(".*")) == []
    done(cli, SAMPLE)
    before = files(work / "drawn")
    done(cli, f"{SAMPLE} --seed 5 --overwrite")
    assert files(work / "drawn")["samples.npz"] != before["samples.npz"]


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, cli: Cli) -> None:
    outcome = done(cli, f"{verb} --help")
    assert f"tinyfusion {verb}" in outcome.out
    assert ("--dry-run" in outcome.out) == (verb not in ("inspect", "recipes"))


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        (
            "inspect",
            {"--weights", "--num-heads", "--num-classes", "--family", "--blocks", "--inputs", "--json", "--debug"},
        ),
        ("recipes", {"--list-fields", "--json", "--debug"}),
    ],
)
def test_help_of_verbs_that_write_nothing_shows_what_can_matter(verb: str, options: set[str], cli: Cli) -> None:
    shown = set(re.findall(r"--[a-z-]+", done(cli, f"{verb} --help").out))
    assert shown == {*options, "--help"}
    outcome = cli(verb, "--seed", "3")
    assert outcome.code == 2 and f"{verb} has no option --seed" in outcome.err


MAIN = "import sys\nfrom tinyfusion.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code\n"


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["recipes"]], ids=" ".join)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    heavy = "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'PIL'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", MAIN + heavy, *arguments], check=True, capture_output=True)


def test_help_is_fast() -> None:
    """Seconds of a processor that a whole process takes; the best of three. Wall time is that of its neighbours too."""
    took, waited = [], []
    for _ in range(3):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", MAIN, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        waited.append(time.perf_counter() - began)
    assert min(took) <= 0.5
    assert min(waited) <= 10, "help waits for nothing"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As in `tinyfusion recipes --list-fields | head`."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys\nfrom tinyfusion.cli import main\nsys.exit(main(['recipes', '--list-fields']))"
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# ------------------------------------------------------------------------------------------------------- interruption

LONG = (
    "recover --student student --method finetune --steps 120 --set recover.training.batch_size=64"
    " --set recover.training.ema_decay=0.9 --set recover.training.log_every_steps=5 --set recover.training.checkpoint_every_steps=1000"
)


def start(command: str) -> subprocess.Popen[str]:
    code = "import sys, torch; torch.set_num_threads(1)\nfrom tinyfusion.cli import main\nsys.exit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *shlex.split(command)], stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logged(folder: str) -> int:
    path = Path(folder) / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def test_stopped_and_continued_is_the_same_as_never_stopped(cli: Cli, work: Path) -> None:
    first = start(f"{LONG} --out stopped")
    wait_for(lambda: logged("stopped") >= 2, first)
    first.send_signal(signal.SIGUSR1)
    wait_for(lambda: any(Path("stopped/checkpoints").glob("step-*")), first)
    seen = logged("stopped")
    wait_for(lambda: logged("stopped") > seen, first)  # it saved and went on
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, err
    assert "the same command continues" in err
    record = json.loads(Path("stopped/run.json").read_text(encoding="utf-8"))
    assert record["state"] == "interrupted"
    steps = [int(p.name.removeprefix("step-")) for p in Path("stopped/checkpoints").glob("step-*")]
    assert 0 < max(steps) < 120

    continued = done(cli, f"{LONG} --out stopped")
    assert f"recover: continues from step {max(steps)} of 120" in continued.err.splitlines()
    assert "continues" not in done(cli, f"{LONG} --out straight").err
    for name in ("student", "student-raw"):
        stopped, straight = (load_file(f"{run}/{name}/model.safetensors") for run in ("stopped", "straight"))
        assert all(stopped[key].equal(straight[key]) for key in straight)
    numbers = [
        [(line["step"], line["loss"]) for line in lines_of(f"{run}/metrics.jsonl")] for run in ("stopped", "straight")
    ]
    assert numbers[0] == numbers[1]
    finished = json.loads(Path("stopped/run.json").read_text(encoding="utf-8"))
    assert finished["state"] == "done"
    assert finished["seconds"] > record["seconds"], "the time of all sittings counts"


# --------------------------------------------------------------------------------------------- going on with something else

FINETUNE = (
    "recover --student student --method finetune --set recover.training.ema_decay=0.5"
    " --set recover.training.log_every_steps=1"
)


@pytest.mark.parametrize(
    ("batch", "seen", "position"),
    [
        (32, 3 * 24 + 32, "at image 96 (24 images are left out)"),
        (8, 3 * 24 + 8, "at image 24 (48 images are seen again)"),
    ],
)
def test_resuming_with_another_batch_size_counts_the_images(
    cli: Cli, work: Path, batch: int, seen: int, position: str
) -> None:
    done(cli, f"{FINETUNE} --steps 3 --set recover.training.batch_size=24 --out first")
    resumed = f"{FINETUNE} --steps 4 --resume first/checkpoints/step-0000003 --out second"
    said = done(cli, f"{resumed} --set recover.training.batch_size={batch}").err
    assert f"72 images were seen in 3 steps, which had another batch size than {batch}" in said
    assert position in said
    assert [line["seen_images"] for line in lines_of("second/metrics.jsonl")] == [seen]
    assert json.loads(Path("second/run.json").read_text(encoding="utf-8"))["seen_images"] == seen


def test_more_steps_are_another_folder_that_resumes(cli: Cli, work: Path) -> None:
    done(cli, f"{FINETUNE} --steps 3 --set recover.training.batch_size=24 --out first")
    more = f"{FINETUNE} --steps 5 --set recover.training.batch_size=24"
    refused = cli(*shlex.split(f"{more} --out first"))
    assert refused.code == 2
    way = "to train on to 5 steps, continue from its checkpoint in another folder: --resume first/checkpoints/step-0000003"
    assert way in refused.err
    said = done(cli, f"{more} --resume first/checkpoints/step-0000003 --out second").err
    assert "images were seen in" not in said, "nothing jumps"
    assert "of a training with other settings; here recover.training.steps 5 instead of 3\n" in said
    assert [line["seen_images"] for line in lines_of("second/metrics.jsonl")] == [96, 120]
    fewer = cli(*shlex.split(f"{FINETUNE} --steps 2 --set recover.training.batch_size=24 --out first"))
    other = cli(*shlex.split(f"{FINETUNE} --steps 3 --set recover.training.batch_size=25 --out first"))
    assert (fewer.code, other.code) == (2, 2) and "--resume" not in fewer.err + other.err


@pytest.mark.parametrize(("command", "steps"), [(TRAIN, 3), (PRUNE, 2)])
def test_the_way_to_more_steps_of_other_trainings(cli: Cli, work: Path, command: str, steps: int) -> None:
    done(cli, command)
    refused = cli(*shlex.split(command.replace(f"--steps {steps}", "--steps 4")))
    assert refused.code == 2 and f"/checkpoints/step-000000{steps} --out OTHER" in refused.err
