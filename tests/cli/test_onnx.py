"""`export --to onnx` from the command line: folders that draw by themselves, what is refused, and what is left after an error."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from material import Cli, done, refused, tiny_mar, tiny_sit

from tinyfusion.config.process_sections import FlowSampleSection, MaskedSampleSection
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.rng import Randomness
from tinyfusion.export import onnx_folder
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.sample.drive import SampleDraws, sample

LABELS = [3, 1, 4]
EXPORT = "export --model {} --to onnx --out made/g"


def drawn(model: LoadedModel, settings: SampleSection) -> np.ndarray:
    """(B, C, S, S) by our own sampler, of seed 5."""
    return torch.cat([batch.x for batch in sample(model, LABELS, sampler_of(settings, model), seed=5)]).numpy()


def own_noise(model: LoadedModel, path: Path) -> Path:
    """The noise that `drawn` begins with, as a file."""
    np.save(path, SampleDraws(Randomness(5), 0, len(LABELS), torch.device("cpu")).images(model).numpy())
    return path


def run_script(folder: Path, *options: str) -> None:
    """sample.py in a process that cannot import torch or tinyfusion."""
    block = "import sys, runpy; sys.modules.update(torch=None, tinyfusion=None); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", block, str(folder / "sample.py"), *options]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("student", "--guided", SampleSection(sampler="ddim", num_steps=10, guidance=1.5)),
        ("sit", "", SampleSection(sampler="ode", num_steps=5, guidance=2.0, flow=FlowSampleSection(method="heun2"))),
    ],
)
def test_the_shipped_script_draws_the_same_images(
    cli: Cli, work: Path, name: str, options: str, settings: SampleSection
) -> None:
    if name == "sit":
        save_model(tiny_sit(), Path("sit"))
    done(cli, f"{EXPORT.format(name)} {options}")
    model = open_model(name)
    noise = own_noise(model, work / "noise.npy")
    given = ("--labels", "3,1,4", "--num-steps", str(settings.num_steps), "--guidance", str(settings.guidance))
    run_script(Path("made/g"), *given, "--noise", str(noise), "--out", "x.npy")
    wanted = drawn(model, settings)
    assert np.abs(np.load("x.npy") - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    run_script(Path("made/g"), "--labels", "0", "--num-steps", "2", "--out", "x.png")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_the_two_stages_of_a_masked_model_draw_the_same_images(cli: Cli, work: Path) -> None:
    save_model(tiny_mar(), Path("mar"))
    done(
        cli, f"{EXPORT.format('mar')} --set sample.masked.head_steps=4 --set sample.guidance=2 --set sample.num_steps=3"
    )
    model = open_model("mar")
    settings = SampleSection(num_steps=3, guidance=2.0, masked=MaskedSampleSection(head_steps=4))
    draws = SampleDraws(Randomness(5), 0, len(LABELS), torch.device("cpu"))
    order = draws.at(-1).uniform("sample-order", (model.arch.num_tokens,)).argsort(axis=1)
    script: dict[str, Callable[..., Any]] = runpy.run_path("made/g/sample.py")
    found = script["draw"](np.array(LABELS), order, lambda at, shape: draws.normal(at, shape).numpy(), 3, 2.0)
    wanted = drawn(model, settings)
    assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    run_script(Path("made/g"), "--labels", "0,1", "--num-steps", "2", "--out", "x.npy")
    assert np.isfinite(np.load("x.npy")).all()


def test_a_folder_says_what_a_sampler_needs_and_again_over_and_dry(cli: Cli, work: Path) -> None:
    command = f"{EXPORT.format('student')} --json"
    assert done(cli, f"{command} --dry-run").last_json["bytes"] > 10_000 and not Path("made").exists()
    made = done(cli, command).last_json
    student = open_model("student")
    facts = json.loads(Path("made/g/sampler.json").read_text())
    assert made["model"] == facts["model"] == student.hash() and facts["kept"] == student.facts.kept
    assert (
        facts["graphs"] == {"model": "model.onnx"}
        and facts["null_label"] == 10
        and len(facts["alphas_cumprod"]) == 1000
    )
    assert facts["recommended"] == {"sampler": "ddim", "num_steps": 50, "guidance": 1.5}
    assert "python sample.py" in Path("made/g/README.md").read_text() and Path("made/g/plan.png").is_file()
    before = Path("made/g/model.onnx").stat().st_mtime_ns
    assert "is finished" in done(cli, command).err and Path("made/g/model.onnx").stat().st_mtime_ns == before
    refused(cli, f"{command} --guided", "made with another recipe (guided:")
    Path("made/g/mine.txt").write_text("mine")
    done(cli, f"{command} --guided --overwrite")
    assert Path("made/g/mine.txt").read_text() == "mine" and not list(Path("made").glob(".*"))
    assert [each.name for each in onnx.load("made/g/model.onnx").graph.input] == ["x", "t", "y", "guidance"]


def test_weights_above_the_limit_are_in_a_file_of_their_own(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_folder, "EXTERNAL_BYTES", 1000)
    done(cli, EXPORT.format("student"))
    assert Path("made/g/model.onnx").stat().st_size < Path("made/g/model.onnx.data").stat().st_size
    run_script(Path("made/g"), "--labels", "0", "--num-steps", "1", "--out", "x.npy")


def test_a_graph_that_differs_is_an_error_and_nothing_is_left(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = onnx_folder.exported

    def wrong(stage: Any) -> Any:
        graph = exported(stage)
        graph.graph.initializer[0].raw_data = bytes(len(graph.graph.initializer[0].raw_data))
        return graph

    monkeypatch.setattr(onnx_folder, "exported", wrong)
    refused(cli, EXPORT.format("student"), "gives other numbers than the network")
    assert not Path("made").exists()


def test_what_cannot_be_a_graph_is_refused_with_its_reason(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cli, "export --model student --to tinyfusion --out x --guided", "--guided is for --to onnx")
    refused(cli, "export --model student --to official --out x.pt --quantize int8", "--quantize is for --to onnx")
    save_model(tiny_mar(), Path("mar"))
    refused(cli, f"{EXPORT.format('mar')} --guided", "leave out --guided")
    refused(cli, f"{EXPORT.format('student')} --set sample.num_steps=300", "no integer stride", "250 and 334")
    refused(cli, f"{EXPORT.format('student')} --set sample.sampler=ddpm", "sample.py draws by ddim")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(cli, EXPORT.format("student"), "pip install tinyfusion[onnx]")
