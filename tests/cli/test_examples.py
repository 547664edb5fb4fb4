"""Every example runs, with small arguments, and does what it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from material import Cli
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "own_model.py": ("--steps", "2"),
    "prune_and_recover.py": ("--steps", "2", "--batch-size", "8"),
    "sample_grid.py": ("--per-class", "1", "--num-steps", "2", "--out", "grid.png"),
    "custom_plan.py": ("--keep", "0,3", "--out", "cut"),
    "gate_a_model.py": ("--num-images", "4"),
}
SAYS = {
    "own_model.py": "6 blocks became 3",
    "prune_and_recover.py": "4 blocks became 2",
    "sample_grid.py": "10 images of 4 blocks",
    "custom_plan.py": "kept {'blocks': [0, 3]}",
    "gate_a_model.py": "noise error without it",
}


def test_every_example_is_here() -> None:
    found = sorted(EXAMPLES.glob("*.py"))
    assert sorted(ARGUMENTS) == sorted(SAYS) == [p.name for p in found]
    assert all(len(p.read_text(encoding="utf-8").splitlines()) <= 60 for p in found)


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_example(name: str, work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    model = () if name == "own_model.py" else ("--model", "teacher")
    monkeypatch.setattr(sys, "argv", [name, *model, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capfd.readouterr().out


def test_what_the_examples_write(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("sample_grid.py", "custom_plan.py"):
        monkeypatch.setattr(sys, "argv", [name, "--model", "teacher", *ARGUMENTS[name]])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "on another model: the plan was made for the model" in capfd.readouterr().out
    with Image.open("grid.png") as grid:
        assert grid.size == (4 * (10 * 9 - 1), 4 * 8)
    assert cli("inspect", "cut", "--json").last_json["kept"] == {"blocks": [0, 3]}
