# ruff: noqa: E501
"""`run` of a transformer of diffusers: dry runs, interruptions, other data and criteria, and what is refused before hours of work."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tinyfusion.commands.encode_captions
import tinyfusion.commands.recover
import tinyfusion.commands.stages
from captioned_pictures import LIGHT, save_light_job
from captioned_set import save_set
from prompt_pipelines import save_wan_pipeline
from tinyfusion import cli
from tinyfusion.core.rundir import read_json
from tinyfusion.report.load import read_run
from tinyfusion.report.page import progress_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
Command = Callable[[str], tuple[int, str, str]]
PLAIN = "run --recipe plain.toml"  # without networks of the evaluation
PAIR = "--set pipeline.num_images=2 --set recover.training.batch_size=4"
SMALL = f"{PAIR} --set prune.training.batch_size=4"


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, made the present one, with what the recipe names, and one finished run of it."""
    folder = save_light_job(tmp_path_factory.mktemp("run"), num=8)
    plain = LIGHT[: LIGHT.index("[evaluate]")] + LIGHT[LIGHT.index("[speed]") :]
    (folder / "plain.toml").write_text(plain, encoding="utf-8")
    (folder / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(shlex.split(f"{PLAIN} {SMALL} --out whole")) == 0
        yield folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command line: exit code, stdout, stderr."""

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(shlex.split(line))
        return code, *capsys.readouterr()

    return run


def same(first: str, second: str) -> None:
    """AssertionError unless two runs have the same plan, weights and images."""
    assert read_json(Path(first, "prune/plan.json"))["kept"] == read_json(Path(second, "prune/plan.json"))["kept"]
    for folder in ("prune/student", "recover/student"):
        one, other = (load_file(Path(run, folder, "diffusion_pytorch_model.safetensors")) for run in (first, second))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("teacher", "pruned", "student"):
        with np.load(Path(first, f"samples/{name}.npz")) as one, np.load(Path(second, f"samples/{name}.npz")) as other:
            assert np.array_equal(one["arr_0"], other["arr_0"])


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(command: Command) -> None:
    before = sorted(Path().rglob("*"))
    code, said, err = command(f"{PLAIN} --out dry --dry-run --json")
    assert code == 0, err
    assert "encode would do this" in said and "run would do this" in said
    plan = json.loads(said.splitlines()[-1])["plan"]
    assert plan["teacher"].startswith("FluxTransformer2DModel, 3 transformer_blocks, 4 single_transformer_blocks")
    assert plan["data"] == "photos, encoded by flux" and plan["prune"] == "learned 2:3;1:2, 4 steps"
    assert "encoding alone" in plan["basis"] and plan["minutes"] > 0
    code, said, err = command("run --recipe plain.toml --data latents:whole/latents --out dry --dry-run --json")
    assert code == 0, err
    measured = json.loads(said.splitlines()[-1])["plan"]
    assert "encode would do this" not in said and measured["minutes"] > 0
    assert [line for line in measured["memory_plan"] if "teacher" in line], "that of the recovery among them"
    assert sorted(Path().rglob("*")) == before


STOPS: dict[str, tuple[Any, str, list[str]]] = {
    "encode": (tinyfusion.commands.encode_captions, "_write_all_shards", ["encode"]),
    "recover": (tinyfusion.commands.recover.Recover, "perform", ["encode", "prune", "recover"]),
    "evaluate": (tinyfusion.commands.stages, "evaluate", ["encode", "prune", "recover", "sample", "evaluate"]),
}  # fmt: skip


def test_an_interrupted_run_continues_to_the_same_numbers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in one stage after the other, in one folder."""
    line = f"{PLAIN} {SMALL} --out stopped"
    for stage, (module, name, stages) in STOPS.items():

        def stop(*_: Any, **_named: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            code, _, err = command(line)
        assert code == 130, err
        assert list(read_json(Path("stopped/run.json"))["stages"]) == stages
        run = read_run(Path("stopped"))
        shown = progress_of(run)
        assert shown is not None and [name for name, state in shown.stages if state == "now"] == [stage]
        assert [name for name, _ in shown.stages] == ["encode", "prune", "recover", "sample", "evaluate", "speed"]
        code, said, _ = command(f"report stopped --out {stage}.html")
        assert code == 0 and "Interrupted; the same command continues it" in Path(f"{stage}.html").read_text()
    code, _, err = command(line)
    assert code == 0, err
    same("whole", "stopped")
    Path("stopped/report.html").unlink()  # killed after the last stage, before the page
    assert command(line)[0] == 0 and Path("stopped/report.html").is_file()
    assert command(f"{line} --set seed=1")[2].splitlines()[-1].startswith("error: ")


def test_latents_inputs_and_other_criteria(command: Command) -> None:
    """Latents that were made before; recorded calls alone; a rule, then recovery on data."""
    code, _, err = command(f"{PLAIN} {SMALL} --data latents:whole/latents --out made")
    assert code == 0, err
    same("whole", "made")
    assert "PSNR to the images of another model, in dB, higher is better" in Path("made/report.html").read_text(
        encoding="utf-8"
    )
    assert not Path("made/latents").exists() and "encode" not in read_json(Path("made/run.json"))["stages"]

    drawing = "--steps 2 --height 16 --width 16 --calls 2"
    assert command(f"record flux --prompts prompts.txt --out inputs.safetensors {drawing}")[0] == 0
    assert 'name = "photos"' in LIGHT
    code, _, err = command(
        f"{PLAIN} {PAIR} --set data.name= --inputs inputs.safetensors --prompts prompts.txt --set prune.criterion=bi "
        "--set prune.budgets=transformer_blocks=2,single_transformer_blocks=2 --out recorded"
    )
    assert code == 0, err
    record = read_json(Path("recorded/recover/run.json"))
    assert "inputs" in record["recipe"] and read_json(Path("recorded/prompts.json")) == ["a cat", "a dog"]
    assert read_json(Path("recorded/prune/plan.json"))["criterion"] == "bi"


def test_previews_of_a_training_are_drawn_by_its_pipeline(command: Command) -> None:
    """The captions in turn, by the averaged weights, which are those of a training without; none where nothing says what to draw."""
    line = f"recover --recipe plain.toml {PAIR} --teacher flux --student whole/prune --data latents:whole/latents"
    watched = "--set watch.grid_every_steps=2 --set watch.grid_images=3"
    code, _, err = command(f"{line} {watched} --out watched")
    assert code == 0, err
    assert command(f"{line} --out plain")[0] == 0
    one, other = (load_file(Path(run, "student/diffusion_pytorch_model.safetensors")) for run in ("watched", "plain"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (
        "watching the averaged weights: 3 images every 2 steps; FluxPipeline, 3 prompts in turn"
        in Path("watched/log.txt").read_text()
    )
    with Image.open("watched/watch/step-0000002.png") as early, Image.open("watched/watch/step-0000004.png") as late:
        pixels = [np.asarray(image) for image in (early, late)]
    assert pixels[0].shape == pixels[1].shape and not np.array_equal(*pixels)
    few = "--set distill_steps.training.steps=2 --set distill_steps.training.batch_size=4 --set distill_steps.training.ema_decay=.3"
    code, _, err = command(
        f"distill-steps --recipe plain.toml --teacher flux --model watched --data latents:whole/latents {few} {watched} --out few-watched"
    )
    assert code == 0, err
    assert [file.name for file in Path("few-watched/watch").iterdir()] == ["step-0000002.png"]
    drawing = "--steps 2 --height 16 --width 16 --calls 2"
    assert command(f"record flux --prompts prompts.txt --out calls.safetensors {drawing}")[0] == 0
    recorded = f"recover --recipe plain.toml {PAIR} --teacher flux --search-share .5 --set data.name= --inputs calls.safetensors {watched}"
    code, _, err = command(f"{recorded} --out bad")
    assert (code, err.splitlines()[-1].partition(": give")[0]) == (
        2,
        "error: previews draw prompts, and there are none in --inputs",
    )
    code, _, err = command(f"{recorded} --set watch.prompts=prompts.txt --set pipeline.frames=9 --out bad")
    assert code == 2 and "FluxPipeline has no num_frames" in err
    code, _, err = command(f"{recorded} --set watch.prompts=prompts.txt --out calls")
    assert code == 0 and Path("calls/watch/step-0000002.png").is_file(), err


FEW = (
    "--data latents:whole/latents --set prune.criterion=uniform --set prune.num_keep=2 --set distill_steps.in_run=true "
    "--set distill_steps.num_steps=1 --set distill_steps.training.steps=4 --set distill_steps.training.batch_size=4 "
    "--set distill_steps.training.ema_decay=.3 --set pipeline.num_images=4"
)


def test_a_run_distils_the_steps_of_its_student(command: Command) -> None:
    """The student of one step is drawn, timed and shown beside the other models; a dry run names the stage."""
    code, said, err = command(f"{PLAIN} {PAIR} {FEW} --out few --dry-run --json")
    assert code == 0, err
    plan = json.loads(said.splitlines()[-1])["plan"]
    assert plan["distill-steps"] == "consistency, 1 steps, 4 of training"
    assert plan["sample"] == "4 images by each of teacher, pruned, student, few-steps" and not Path("few").exists()
    code, said, err = command(f"{PLAIN} {PAIR} {FEW} --out few")
    assert code == 0, err
    assert list(read_json(Path("few/run.json"))["stages"]) == [
        "prune",
        "recover",
        "distill-steps",
        "sample",
        "evaluate",
        "speed",
    ]
    config = read_json(Path("few/distill-steps/student/config.json"))
    assert config["_tinyfusion"]["few_steps"]["levels"] == [1.0]
    with np.load("few/samples/student.npz") as many, np.load("few/samples/few-steps.npz") as one:
        assert one["arr_0"].shape == many["arr_0"].shape and not np.array_equal(one["arr_0"], many["arr_0"])
    models = read_json(Path("few/speed.json"))["models"]
    assert models["few-steps"]["drawing_speedup"] == 2 * models["few-steps"]["speedup"], "2 steps of the teacher"
    assert models["student"]["drawing_speedup"] == models["student"]["speedup"]
    page = Path("few/report.html").read_text(encoding="utf-8")
    assert "student of few steps" in page and "speed-up of a drawing" in page


def test_a_rule_and_other_sizes_in_place_of_a_finished_run(command: Command) -> None:
    """--overwrite replaces latents too; no masks are learned."""
    sizes = "--set encode.size=24 --set pipeline.height=24 --set pipeline.width=24"
    code, _, err = command(
        f"{PLAIN} {PAIR} {sizes} --set prune.criterion=uniform --set prune.num_keep=2 --out recorded --overwrite"
    )
    assert code == 0, err
    assert read_json(Path("recorded/latents/manifest.json"))["size"] == 24
    with np.load("recorded/samples/student.npz") as drawn:
        assert drawn["arr_0"].shape == (2, 24, 24, 3)
    assert read_json(Path("recorded/evaluations/student-prompts.json"))["against"]["psnr_db"] > 0
    assert "Kept: " in Path("recorded/report.html").read_text(encoding="utf-8")


BAD: dict[str, tuple[str, str]] = {
    "no-data": (f"{PLAIN} --set data.name=", "give --data, pictures with captions or latents:FOLDER, or --inputs FILE"),
    "no-pictures": (f"{PLAIN} --data nowhere", "no pictures at nowhere"),
    "no-size": (f"{PLAIN} --set encode.size=none", "wants the size of the pictures"),
    "captions": (f"{PLAIN} --data uncaptioned", "caption"),
    "scheme": (f"{PLAIN} --set prune.scheme=1:2", "3"),
    "dynamic": (f"{PLAIN} --set dynamic.in_run=true", "dynamic.in_run trains routers of models of families, and flux is a FluxTransformer2DModel"),
    "few-steps": (f"{PLAIN} --set data.name= --inputs inputs.safetensors --prompts prompts.txt --set distill_steps.in_run=true",
                  "distill_steps.in_run learns from encoded latents, and recorded inputs are none: give --data, or leave it out"),
    "fresh-noise": (f"{PLAIN} --set distill_steps.in_run=true --set distill_steps.method=matching", "set distill_steps.fresh_noise=false"),
    "official": (f"{PLAIN} --for official", "--for official is for models of classes"),
    "argument": (f"{PLAIN} --set pipeline.frames=9", "FluxPipeline has no num_frames"),
    "prompts": (f"{PLAIN} --prompts empty.txt", "empty.txt holds no prompts"),
    "no-texts": (f"{PLAIN} --data latents:silent", "latents:silent".removeprefix("latents:") + ", without prompts.json, has no texts to draw: give --prompts FILE"),
    "finetune": (f"{PLAIN} --set data.name= --inputs inputs.safetensors --prompts prompts.txt --set recover.method=finetune",
                 "recover.method=finetune learns from data"),
    "features": (f"{PLAIN} --set evaluate.references=photos", "no features are named to compare images with photos"),
    "size": ("run --recipe light.toml --set pipeline.height=24", "has images of 16 x 16, and 24 x 16 are drawn"),
    "few": ("run --recipe light.toml --data latents:whole/latents --set evaluate.references=photos --set pipeline.num_images=3",
            "a run that draws 3 images has 3 images: precision and recall with 3 neighbours need at least 4"),
    "clip": ("run --recipe light.toml --set evaluate.clip=dino", "dino is no CLIP model"),
    "videos": ("run --recipe light.toml --set teacher=wan/transformer --set prune.scheme=1:2 --set pipeline.height=none --set pipeline.width=none",
               "a WanPipeline draws videos, and distances to references are of images"),
    "alone": (f"{PLAIN} --set teacher=alone", "photos are pictures, which a pipeline encodes, and alone is in none"),
    "family": ("run --recipe digits --inputs prompts.txt", "--inputs is for transformers of diffusers, and digits is a model of a family"),
    "other-run": (f"{PLAIN} --out whole --data latents:whole/latents", "whole"),
    "storage": (f"{PLAIN} --data latents:whole/latents --set recover.teacher_storage=4bit", "4bit"),
}  # fmt: skip


def test_what_does_not_fit_is_said_in_a_line_and_leaves_nothing(command: Command, place: Path) -> None:
    save_wan_pipeline(Path("wan"))
    save_set(Path("silent"), pooled=32)
    (place / "empty.txt").write_text("\n", encoding="utf-8")
    (place / "uncaptioned").mkdir()
    (place / "uncaptioned" / "00.png").write_bytes(Path("photos/00.png").read_bytes())
    os.symlink(place / "flux" / "transformer", place / "alone")
    before, wrong = sorted(Path().rglob("*")), {}
    for cause, (line, message) in BAD.items():
        out = "" if "--out" in line else " --out bad"
        code, _, err = command(line + out)
        last = err.strip().splitlines()[-1]
        if code != 2 or not last.startswith("error: ") or message not in last:
            wrong[cause] = (code, last)
    assert wrong == {}
    assert sorted(Path().rglob("*")) == before
