"""Every example runs, with small arguments, and does what it says."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from material import Cli, tiny
from PIL import Image
from test_docs import save_autoencoder

from tinyfusion.models.checkpoint import open_model

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "own_model.py": ("--steps", "60"),  # as many as its moving average takes
    "prune_and_recover.py": ("--steps", "2", "--batch-size", "8"),
    "sample_grid.py": ("--per-class", "1", "--num-steps", "2", "--out", "grid.png"),
    "custom_plan.py": ("--keep", "0,3", "--out", "cut"),
    "gate_a_model.py": ("--num-images", "4"),
    "app.py": ("--once",),
}
SAYS = {
    "own_model.py": "6 blocks became 3",
    "prune_and_recover.py": "4 blocks became 2",
    "sample_grid.py": "10 images of 4 blocks",
    "custom_plan.py": "kept {'blocks': [0, 3]}",
    "gate_a_model.py": "noise error without it",
    "app.py": "teacher: 4 blocks, ",
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


def test_the_app_draws_the_same_noise_with_every_process(work: Path) -> None:
    """The functions of the page, without a server: rows of images at a legible size, the same again."""
    app = runpy.run_path(str(EXAMPLES / "app.py"))
    for name in ("teacher", "sit", "mar"):
        model = open_model(name)
        row, per_image_ms = app["draw"](model, [3, 7], 2, 1.5, 0)
        assert row.shape == (64, 129, 3) and row.dtype == np.uint8 and per_image_ms > 0
        assert np.array_equal(row, app["draw"](model, [3, 7], 2, 1.5, 0)[0])
        assert not np.array_equal(row, app["draw"](model, [3, 7], 2, 1.5, 1)[0])


def test_the_app_decodes_latents(work: Path) -> None:
    save_autoencoder(Path("vae"))
    model = tiny(in_channels=4).with_known(vae="vae", latent_scale=1.0, latent_shift=0.0)
    row, _ = runpy.run_path(str(EXAMPLES / "app.py"))["draw"](model, [3, 7], 2, 1.5, 0)
    assert row.shape == (64, 129, 3), "eight pixels to each of 8 x 8 cells"


PAGE = """
import runpy, sys
from tinyfusion import open_model

page = runpy.run_path(sys.argv[1])["app"]({name: open_model(name) for name in ("teacher", "student")})
assert [output.label for output in page.output_components] == ["teacher: 4 blocks", "student: 2 blocks"]
rows = page.fn("3, 7", 2, 1.5, 0)
assert [row["label"].partition(":")[0] for row in rows] == ["teacher", "student"]
assert rows[0]["value"].shape == (64, 129, 3)
"""


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed: pip install 'tinyfusion[demo]'")
def test_the_page_of_the_app(work: Path) -> None:
    """What a click calls, in gradio, which leaves sockets open: in a process of its own."""
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    subprocess.run([sys.executable, "-c", PAGE, str(EXAMPLES / "app.py")], check=True, env=environment)
