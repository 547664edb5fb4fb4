"""`export --to onnx` from the command line: folders that draw by themselves, what is refused, and what is left after an error."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli, done, refused, tiny_mar, tiny_sit

import families
from tinyfusion.config.process_sections import FlowSampleSection, MaskedSampleSection
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.rng import Randomness
from tinyfusion.export import onnx_folder
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.processes.noising import FewSteps
from tinyfusion.sample.drive import SampleDraws, sample

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
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
    block = (
        "import sys, runpy; sys.modules.update(torch=None, tinyfusion=None); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", block, str(folder / "sample.py"), *options]
    ran = at_home(command)
    assert ran.returncode == 0, ran.stderr
    assert not any(Path("home").iterdir()), "onnxruntime leaves an id there, unless it is told not to"


def at_home(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with an empty home folder."""
    home = Path("home").absolute()
    home.mkdir(exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    }
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, "HOME": str(home)})


def test_the_runtime_leaves_nothing_in_the_home_folder(work: Path) -> None:
    code = "from tinyfusion.export.onnx_graph import onnx_module; onnx_module('onnxruntime')"
    ran = at_home([sys.executable, "-c", code])
    assert ran.returncode == 0, ran.stderr
    assert not [path for path in Path("home").rglob("*") if "Microsoft" in path.parts]


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("student", "--guided", SampleSection(sampler="ddim", num_steps=10, guidance=1.5)),
        ("pixart", "", SampleSection(sampler="ddim", num_steps=4, guidance=2.0)),
        ("sit", "", SampleSection(sampler="ode", num_steps=5, guidance=2.0, flow=FlowSampleSection(method="heun2"))),
    ],
)
def test_the_shipped_script_draws_the_same_images(
    cli: Cli, work: Path, name: str, options: str, settings: SampleSection
) -> None:
    if name != "student":
        save_model(tiny_sit() if name == "sit" else families.tiny(name, std=0.05), Path(name))
    done(cli, f"{EXPORT.format(name)} {options}")
    model = open_model(name)
    noise = own_noise(model, work / "noise.npy")
    given = ("--labels", "3,1,4", "--num-steps", str(settings.num_steps), "--guidance", str(settings.guidance))
    run_script(Path("made/g"), *given, "--noise", str(noise), "--out", "x.npy")
    wanted = drawn(model, settings)
    assert np.abs(np.load("x.npy") - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())
    run_script(Path("made/g"), "--labels", "0", "--num-steps", "2", "--out", "x.png")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["student", "sit"])
def test_a_student_of_few_steps_is_drawn_in_them(cli: Cli, work: Path, name: str) -> None:
    model = tiny_sit() if name == "sit" else open_model(name)
    few = FewSteps("consistency", (1.0, 0.5), 2.0, fresh_noise=False)
    save_model(dataclasses.replace(model, facts=dataclasses.replace(model.facts, few_steps=few)), Path("few"))
    done(cli, EXPORT.format("few"))
    model = open_model("few")
    noise = own_noise(model, work / "noise.npy")
    run_script(Path("made/g"), "--labels", "3,1,4", "--noise", str(noise), "--out", "x.npy")
    wanted = drawn(model, SampleSection())
    assert np.abs(np.load("x.npy") - wanted).max() <= 1e-3 * max(1.0, np.abs(wanted).max())
    refused = cli(*shlex.split(f"{EXPORT.format('few').replace('made', 'other')} --guided"))
    assert refused.code == 2 and "this one is drawn without" in refused.err


def test_the_two_stages_of_a_masked_model_draw_the_same_images(cli: Cli, work: Path) -> None:
    save_model(tiny_mar(encoder_depth=1, decoder_depth=1), Path("mar"))
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
    run_script(Path("made/g"), "--labels", "0,1", "--num-steps", "1", "--out", "x.npy")
    assert np.isfinite(np.load("x.npy")).all()


def test_a_folder_after_a_kill_says_what_a_sampler_needs_and_again_over_and_dry(cli: Cli, work: Path) -> None:
    command = f"{EXPORT.format('student')} --json"
    assert done(cli, f"{command} --dry-run").last_json["bytes"] > 10_000 and not Path("made").exists()
    killing = (
        "import os, signal, sys\nfrom tinyfusion.cli import main\nfrom tinyfusion.export import onnx_folder\n"
        "onnx_folder.exported = lambda stage: os.kill(os.getpid(), signal.SIGKILL)\nmain(sys.argv[1:])"
    )
    killed = subprocess.run(
        [sys.executable, "-c", killing, *command.split()], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("made/g").exists() and list(Path("made").glob(".g.*.part"))
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


def test_what_cannot_be_a_graph_is_refused_with_its_reason(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cli, "export --model student --to tinyfusion --out x --guided", "--guided is for --to onnx")
    refused(cli, "export --model student --to official --out x.pt --quantize int8", "--quantize is for --to onnx")
    save_model(tiny_mar(), Path("mar"))
    refused(cli, f"{EXPORT.format('mar')} --guided", "leave out --guided")
    refused(cli, f"{EXPORT.format('student')} --set sample.num_steps=300", "no integer stride", "250 and 334")
    refused(cli, f"{EXPORT.format('student')} --set sample.sampler=ddpm", "sample.py draws by ddim")
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, 1, None) for name in ("x", "t", "output")]
    values.append(helper.make_tensor_value_info("y", 7, None))
    twice = helper.make_graph(
        [helper.make_node("Concat", ["x", "x"], ["output"], axis=1)], "g", [*values[:2], values[3]], [values[2]]
    )
    wrong = helper.make_model(twice, opset_imports=[helper.make_opsetid("", 20)])
    monkeypatch.setattr(onnx_folder, "exported", lambda stage: wrong)
    refused(cli, EXPORT.format("student"), "model.onnx gives other numbers than the network")
    assert not Path("made").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(cli, EXPORT.format("student"), "pip install tinyfusion[onnx]")


def test_sampling_with_int8_products(cli: Cli, work: Path) -> None:
    draw = "sample --model teacher --set sample.num_images=4 --num-steps 2 --sampler ddim --out {}.npz"
    for name in ("plain", "int8"):
        done(cli, draw.format(name) + (" --quantize int8" if name == "int8" else ""))
    plain, whole = (np.load(f"{name}.npz")["arr_0"].astype(float) for name in ("plain", "int8"))
    assert 0 < np.abs(plain - whole).max() < 64
    assert "| int8 |" in json.loads(Path("int8.json").read_text())["protocol"]
    done(cli, "bench teacher --quantize int8 --repeats 1 --batch-size 1 --set bench.product_size=64")
    refused(cli, draw.format("x") + " --quantize int8 --dtype bfloat16", "leave --dtype bfloat16 away")
    refused(cli, draw.format("x") + " --quantize int8 --compile", "leave --compile away")
    refused(cli, draw.format("x") + " --quantize int4", "quantize")


def test_a_quantized_folder_is_small_and_says_how_far_it_is_from_float32(cli: Cli, work: Path) -> None:
    made = done(cli, f"{EXPORT.format('student')} --quantize int8 --json").last_json
    assert made["largest_difference"] < 1e-4 < made["quantized_error"] < 0.05
    assert "its weights have 8 bits (int8)" in Path("made/g/README.md").read_text()
    run_script(Path("made/g"), "--labels", "0", "--num-steps", "1", "--out", "x.npy")
