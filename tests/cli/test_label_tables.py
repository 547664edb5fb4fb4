"""Label tables with a null class and without one: said where the model is opened, and kept from there on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli, tiny, tiny_mar, tiny_sit
from safetensors.torch import load_file

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model

STEPS = "--set", "prune.training.steps=2", "--set", "prune.training.batch_size=4", "--set", "prune.training.ema_decay=0"


def official(model: LoadedModel, path: Path) -> Path:
    torch.save(dict(model.module.state_dict()), path)
    return path


@pytest.mark.parametrize(("make", "family"), [(tiny, "dit"), (tiny_sit, "sit")])
def test_the_user_says_how_many_classes_there_are(
    make: Any, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of 10 rows: 9 classes and the null class, or 10 classes."""
    path = official(make(num_classes=9), tmp_path / "ten-rows.pt")

    def opened(**said: Any) -> tuple[LoadedModel, str]:
        capsys.readouterr()
        return open_model(path, num_heads=2, family=family, **said), capsys.readouterr().err

    assumed, said = opened()
    assert (assumed.arch.num_classes, assumed.null_class) == (9, True)
    assert "assuming 9 classes and a null class, by 10 rows of labels (--num-classes 10: no null class)" in said
    agreed, said = opened(num_classes=9)
    assert agreed.arch == assumed.arch and said == "" and agreed.hash() == make(num_classes=9).hash()
    ten, said = opened(num_classes=10)
    assert (ten.arch.num_classes, ten.null_class) == (10, False)
    assert said == "without a null class: guidance is 1, and training drops no labels\n"
    assert ten.hash() != assumed.hash()
    save_model(ten, tmp_path / "ours")
    again = open_model(tmp_path / "ours")
    assert again.arch == ten.arch and again.hash() == ten.hash() and not again.null_class
    x, t, y = torch.randn(10, 1, 8, 8), torch.full((10,), 3), torch.arange(10)
    with torch.no_grad():
        assert torch.equal(again.module(x, t, y), assumed.module(x, t, y))
    for number in (8, 11):
        with pytest.raises(
            UserError,
            match=rf"has 10 rows, so there are 9 classes and a null class, or 10 .*; --num-classes {number} is",
        ):
            opened(num_classes=number)
    with pytest.raises(UserError, match="ours has 10 classes; --num-classes 9 contradicts it"):
        open_model(tmp_path / "ours", num_classes=9)
    assert objective_for(ten, 0.1, Recipe()).label_drop == 0.0  # type: ignore[attr-defined]
    assert objective_for(assumed, 0.1, Recipe()).label_drop == 0.1  # type: ignore[attr-defined]


def test_a_table_of_one_row_is_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = dict(tiny(num_classes=9).module.state_dict())
    tensors["y_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"][:1].clone()
    torch.save(tensors, tmp_path / "one.pt")
    for said in (None, 1):
        model = open_model(tmp_path / "one.pt", num_heads=2, family="dit", num_classes=said)
        assert (model.arch.num_classes, model.null_class) == (1, False)
        assert "assuming" not in capsys.readouterr().err


def test_a_table_of_published_size_needs_no_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_model(official(tiny(num_classes=1000), tmp_path / "m.pt"), num_heads=2, family="dit")
    assert capsys.readouterr().err == ""


def test_a_table_that_never_has_a_null_row(tmp_path: Path) -> None:
    path = official(tiny_mar(decoder_width=None), tmp_path / "mar.pt")
    with pytest.raises(UserError, match="the class table has 10 rows, one per class; --num-classes 9 contradicts it"):
        open_model(path, num_heads=2, num_classes=9)


def test_every_verb_takes_the_number_and_the_student_keeps_it(cli: Cli, work: Path) -> None:
    official(tiny(num_classes=9), work / "ten-rows.pt")
    said = "--num-heads", "2", "--num-classes", "10"
    shown = cli("inspect", "ten-rows.pt", *said, "--json").last_json
    assert shown["arch"]["num_classes"] == 10 and shown["arch"]["null_class"] is False
    assert "always has a row" in shown["unfit_formats"]["diffusers"]
    drawn = ("sample", "--num-images", "20", "--num-steps", "2", "--set", "sample.label_rule=balanced")
    outcome = cli(*drawn, "--model", "ten-rows.pt", *said, "--out", "a.npz")
    assert outcome.code == 2 and "--guidance 1.5 compares with a class for no label" in outcome.err
    assert cli(*drawn, "--model", "ten-rows.pt", *said, "--guidance", "1", "--out", "a.npz").code == 0
    assert set(np.load("a.npz")["arr_1"].tolist()) == set(range(10))
    assert cli(*drawn, "--model", "ten-rows.pt", "--num-heads", "2", "--guidance", "1", "--out", "b.npz").code == 0
    assert set(np.load("b.npz")["arr_1"].tolist()) == set(range(9))
    refused = cli(
        "prune",
        "--teacher",
        "ten-rows.pt",
        "--num-heads",
        "2",
        "--scheme",
        "1:2",
        "--out",
        "run",
        *STEPS,
        "--set",
        "data.name=digits",
    )
    assert refused.code == 2 and "10 classes" in refused.err
    pruned = cli(
        "prune",
        "--teacher",
        "ten-rows.pt",
        *said,
        "--scheme",
        "1:2",
        "--out",
        "run",
        *STEPS,
        "--set",
        "data.name=digits",
    )
    assert pruned.code == 0, pruned.err
    student = json.loads(Path("run/student/model.json").read_text())
    assert student["arch"]["null_class"] is False and student["arch"]["num_classes"] == 10
    assert cli("replay", "run", "--step", "1").code == 0
    exported = cli("export", "--model", "run", "--to", "diffusers", "--out", "d")
    assert exported.code == 2 and "has no null class, for which its class always has a row" in exported.err
    assert cli("export", "--model", "run", "--to", "official", "--out", "o.safetensors").code == 0
    assert len(load_file("o.safetensors")["y_embedder.embedding_table.weight"]) == 10
    assert cli("bench", "ten-rows.pt", *said, "--dry-run", "--set", "sample.guidance=1").code == 0
    assert cli("bench", "ten-rows.pt", *said, "--dry-run").code == 2
