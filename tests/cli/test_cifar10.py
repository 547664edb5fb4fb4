"""The CIFAR-10 recipes: the commands of their page, on a few pictures made here and with a few steps instead of many."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from material import Cli
from PIL import Image
from safetensors.torch import save_file

from tinyfusion.config.loading import load_recipe
from tinyfusion.evaluate.features import ClassifierArch, ClassifierFeatures, SmallClassifier
from tinyfusion.models.checkpoint import open_model

PAGE = Path(__file__).parents[2] / "docs" / "results" / "cifar10.md"
FILE = "train-00000-of-00001.parquet"
FEW = "steps=2 batch_size=4 ema_decay=0.5 warmup_steps=0 log_every_steps=1 dtype=float32"
SHORT = {
    "train": ["model.hidden_size=32", "model.num_heads=2", *(f"train.{item}" for item in FEW.split())],
    "run": [
        *(f"recover.training.{item}" for item in FEW.split()),
        *("sample.num_images=12", "sample.batch_size=12", "sample.num_steps=2", "speed.repeats=2", "speed.batch_size=2"),
        *("speed.steps_per_repeat=1", "speed.depths=0", "evaluate.features=classifier"),
    ],
}  # fmt: skip


def commands() -> list[list[str]]:
    """Those of the page, as words; blocks of their own, because the first ones want the hub."""
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("tinyfusion ")]


def pictures(path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(stream, format="PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    pq.write_table(pa.table({"img": rows, "label": [i % 10 for i in range(40)]}), path)


def classifier(folder: Path) -> None:
    """One of random weights, as `benchmarks/train_classifier.py` writes them."""
    arch = ClassifierArch(32, 3, (8, 8, 8), 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallClassifier(arch)
    extractor = ClassifierFeatures("cifar10-classifier", network, arch)
    folder.mkdir()
    save_file(dict(network.state_dict()), folder / "classifier.safetensors")
    record = {"name": "cifar10-classifier", "arch": dataclasses.asdict(arch), "hash": extractor.hash}
    (folder / "classifier.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("where", ["hub", "parquet"])
def test_teacher_student_samples_scores_and_page(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The block with `--data`, and the one without, whose default is the id of the hub; that is exchanged here."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / FILE)
    classifier(tmp_path / "classifier")
    wanted = [words for words in commands() if ("--data" in words) == (where == "parquet")]
    assert [words[0] for words in wanted] == ["train", "run"]
    for words in wanted:
        local = [f"data.name=parquet:{FILE}", f"evaluate.references=parquet:{FILE}"] if where == "hub" else []
        settings = [part for item in (*SHORT[words[0]], *local) for part in ("--set", item)]
        outcome = cli(*words, *settings)
        assert outcome.code == 0, f"{shlex.join(words)}\n{outcome.err}"
    teacher, student = open_model("runs/cifar10-teacher"), open_model("runs/cifar10")
    assert (teacher.arch.input_size, teacher.arch.in_channels, len(teacher.stack)) == (32, 3, 12)
    assert len(student.stack) == 6
    for name in ("teacher", "student"):
        with np.load(f"runs/cifar10/samples/{name}.npz") as archive:
            assert archive["arr_0"].shape == (12, 32, 32, 3) and archive["arr_0"].dtype == np.uint8
        (scores,) = Path("runs/cifar10/evaluations").glob(f"{name}*.json")
        scored = json.loads(scores.read_text())
        assert scored["fid"] > 0 and FILE in scored["protocol"] and "cifar10-classifier" in scored["protocol"]
    assert "CIFAR-10" in Path("runs/cifar10/report.html").read_text(encoding="utf-8")


def test_teacher_and_job_say_the_same_of_data_and_name_the_hub() -> None:
    teacher, job = load_recipe("cifar10-teacher"), load_recipe("cifar10")
    assert teacher.data == job.data and job.data.name == "hub:uoft-cs/cifar10"
    assert job.evaluate.references == (job.data.name,)
    assert teacher.minutes and job.minutes and teacher.minutes + job.minutes < 60
    assert not job.expected, "numbers that were not measured are not expected"
