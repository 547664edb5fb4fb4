"""What a training shows while it runs: trackers, pictures and small FIDs, and the page of a run that is still going."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from material import Cli
from PIL import Image
from test_encode import save_autoencoder
from test_interruption import killed_after
from test_verbs import PRUNE, RECOVER, RUN, TRAIN, done, lines_of

import tinyfusion.commands.evaluate
import tinyfusion.commands.prune
import tinyfusion.commands.report
import tinyfusion.commands.run
import tinyfusion.jobs.sampling_setup
import tinyfusion.jobs.training
from tinyfusion.config.recipe import Recipe, SampleSection, WatchSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.jobs.preview_drawing import FamilyPreviews, cheap_sampling
from tinyfusion.jobs.previews import Previews, check_previews
from tinyfusion.models.checkpoint import open_model
from tinyfusion.report.page import seconds_per_step

CHEAP = "--set sample.sampler=ddim --set sample.num_steps=2"
LOOKS = (
    f"{CHEAP} --set watch.grid_every_steps=1 --set watch.grid_images=20 --set watch.fid_every_steps=2 "
    "--set watch.fid_images=12"
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """accelerate keeps the state of a process for good."""
    yield
    if "accelerate" in sys.modules:
        from accelerate import PartialState

        PartialState._reset_state()


def log_lines(run: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(f"{run}/metrics.jsonl") if "watch" not in line]


def watch_lines(run: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(f"{run}/metrics.jsonl") if "watch" in line]


# --------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("command", [TRAIN, RECOVER], ids=["train", "recover"])
def test_watching_changes_no_bit_of_a_training(cli: Cli, work: Path, command: str) -> None:
    out = command.split("--out ")[1].split()[0]
    done(cli, f"{command} {LOOKS} --set watch.report_to=tensorboard")
    done(cli, command.replace(f"--out {out}", "--out plain"))
    spent = {"seconds", "waiting"}
    seen = [[{k: v for k, v in line.items() if k not in spent} for line in log_lines(run)] for run in (out, "plain")]
    assert seen[0] == seen[1]
    model = "model" if "train" in out else "student"
    files = [Path(run, model, "model.safetensors").read_bytes() for run in (out, "plain")]
    assert files[0] == files[1]
    assert not Path("plain/watch").exists()


def test_looks_are_pictures_and_lines_of_their_own(cli: Cli, work: Path) -> None:
    done(cli, f"{TRAIN} {LOOKS}")
    pictures = sorted(path.name for path in Path("trained/watch").iterdir())
    assert pictures == ["step-0000001.png", "step-0000002.png", "step-0000003.png"]
    with Image.open("trained/watch/step-0000003.png") as picture:
        assert picture.size == ((10 * 9 - 1) * 8, (2 * 9 - 1) * 8), "20 images in rows of ten"
    lines = watch_lines("trained")
    assert [line["step"] for line in lines] == [0, 1, 2], (
        "numbered as the other lines, so that a resumed run drops them alike"
    )
    assert [line["watch"]["made_steps"] for line in lines] == [1, 2, 3]
    assert [line["watch"].get("fid") is not None for line in lines] == [False, True, False]
    protocol = lines[1]["watch"]["protocol"]
    assert "digits-classifier" in protocol and "12 images | ddim 2 steps" in protocol and "digits " in protocol
    assert "ddim 2 steps" in Path("trained/log.txt").read_text(encoding="utf-8")
    record = json.loads(Path("trained/run.json").read_text(encoding="utf-8"))
    looked = sum(line["watch"]["seconds"] for line in lines)
    assert looked > 0
    assert record["seconds"] == pytest.approx(log_lines("trained")[-1]["seconds"], abs=1.0)


def test_a_watched_fid_is_that_of_the_same_images_evaluated(cli: Cli, work: Path) -> None:
    done(cli, f"{TRAIN} --set watch.fid_every_steps=3 --set watch.fid_images=12 {CHEAP}")
    done(cli, f"sample --model trained --num-images 12 --out drawn.npz {CHEAP}")
    done(cli, "evaluate --samples drawn.npz --reference digits --out evaluation.json")
    evaluation = json.loads(Path("evaluation.json").read_text(encoding="utf-8"))
    (line,) = watch_lines("trained")
    assert line["watch"]["fid"] == pytest.approx(evaluation["fid"], rel=1e-6)
    assert line["watch"]["protocol"] == evaluation["protocol"]


def test_the_same_look_draws_the_same_images(work: Path) -> None:
    recipe = dataclasses.replace(
        Recipe(),
        sample=SampleSection(sampler="ddim", num_steps=2, batch_size=7),
        watch=WatchSection(grid_every_steps=5, grid_images=10),
    )
    model = open_model("teacher")
    pixels = []
    for name, batch in (("one", 7), ("two", 3)):
        one = dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, batch_size=batch))
        run = RunDirectory(Path(name))
        run.begin("train", {})
        with Previews(one, run, model, "train", 0) as watch:
            for step in range(1, 11):
                assert watch.due(step) == (step % 5 == 0)
                watch.look(step, model.copy)
        pixels += [np.asarray(Image.open(run.watched / f"step-{step:07d}.png")) for step in (5, 10)]
    assert all(np.array_equal(pixels[0], other) for other in pixels)
    assert len(np.unique(pixels[0])) > 2


def test_looks_are_cheap_unless_the_recipe_is_cheaper(work: Path) -> None:
    model = open_model("teacher")
    assert (cheap_sampling(Recipe(), model).sampler, cheap_sampling(Recipe(), model).num_steps) == ("ddim", 50)
    few = dataclasses.replace(Recipe(), sample=SampleSection(sampler="ddpm", num_steps=20))
    assert cheap_sampling(few, model) == few.sample
    assert FamilyPreviews(Recipe(), model).grid_sampling().label_rule == "balanced", "ten classes fit in a grid"
    small = dataclasses.replace(Recipe(), watch=WatchSection(grid_images=5))
    assert FamilyPreviews(small, model).grid_sampling().label_rule == "uniform"


def test_a_process_that_does_not_write_gives_its_weights_and_draws_nothing(work: Path) -> None:
    """Sharded weights are gathered by all processes at once."""
    recipe = dataclasses.replace(Recipe(), watch=WatchSection(grid_every_steps=1, report_to=("tensorboard",)))
    model, called = open_model("teacher"), []
    run = RunDirectory(Path("quiet"), writes=False)
    with Previews(recipe, run, model, "train", 0) as watch:
        watch.log(0, {"loss": 1.0})
        watch.look(1, lambda: called.append(1) or model)
    assert called == [1] and not run.path.exists()


def test_no_memory_for_a_look_ends_the_looks_and_not_the_training(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(tinyfusion.jobs.sampling_setup, "draw_samples", full)
    outcome = done(cli, f"{TRAIN} {LOOKS}")
    assert outcome.err.count("no memory for pictures") == 1
    assert len(log_lines("trained")) == 3 and watch_lines("trained") == []


def test_a_resumed_training_looks_as_a_straight_one(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"{TRAIN} {LOOKS}"
    done(cli, command.replace("--out trained", "--out straight"))
    with monkeypatch.context() as patch:
        steps = tinyfusion.jobs.training.train_steps
        patch.setattr(tinyfusion.jobs.training, "train_steps", killed_after(steps, 1, signal.SIGTERM))
        assert cli(*shlex.split(command)).code == 128 + signal.SIGTERM
    Path("trained/watch/step-0000003.png").write_bytes(b"of a step that has not been made")
    foreign = [Path("trained/watch", name) for name in ("step-x.png", "step-9.png", f"step-{'9' * 5000}.png"[:200])]
    for file in foreign:
        file.write_bytes(b"of others")
    done(cli, command)
    assert all(file.is_file() for file in foreign)
    for name in ("step-0000001.png", "step-0000002.png", "step-0000003.png"):
        assert Path("trained/watch", name).read_bytes() == Path("straight/watch", name).read_bytes()
    found = [[(line["step"], line["watch"].get("fid")) for line in watch_lines(run)] for run in ("trained", "straight")]
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------------------- trackers


def events(run: str, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a curve in the event files of a run, as tensorboard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(f"{run}/watch/tensorboard")
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_gets_every_log_line(cli: Cli, work: Path) -> None:
    pytest.importorskip("tensorboard", reason="extra trackers is not installed")
    done(cli, f"{TRAIN} {LOOKS} --set watch.report_to=tensorboard")
    lines = log_lines("trained")
    for key in ("loss", "gradient_norm", "learning_rate"):
        wanted = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
        assert events("trained", key) == wanted
    assert events("trained", "watch/fid") == [(1, pytest.approx(watch_lines("trained")[1]["watch"]["fid"], rel=1e-6))]
    (settings,) = Path("trained/watch/tensorboard").glob("*/hparams.yml")
    assert "train.batch_size: 16" in settings.read_text(encoding="utf-8")


def test_tensorboard_goes_on_where_a_resumed_training_does(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="extra trackers is not installed")
    command = f"{TRAIN} --set watch.report_to=tensorboard"
    with monkeypatch.context() as patch:
        steps = tinyfusion.jobs.training.train_steps
        patch.setattr(tinyfusion.jobs.training, "train_steps", killed_after(steps, 1, signal.SIGTERM))
        assert cli(*shlex.split(command)).code == 128 + signal.SIGTERM
    done(cli, command)
    assert [step for step, _ in events("trained", "loss")] == [0, 1, 2]
    assert len(list(Path("trained/watch/tensorboard").glob("*/hparams.yml"))) == 1


def test_a_search_sends_its_lines_and_draws_nothing(cli: Cli, work: Path) -> None:
    pytest.importorskip("tensorboard", reason="extra trackers is not installed")
    done(cli, f"{PRUNE} {LOOKS} --set watch.report_to=tensorboard")
    assert [step for step, _ in events("pruned", "temperature")] == [0, 1]
    assert watch_lines("pruned") == [] and not list(Path("pruned/watch").glob("*.png"))


def test_wandb_offline_stays_in_the_run_folder(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(work / "home"))
    monkeypatch.delenv("WANDB_CACHE_DIR", raising=False)
    before = {path.name for path in work.iterdir()}
    done(cli, f"{TRAIN} --set watch.report_to=wandb")
    identity = json.loads(Path("trained/watch/trackers.json").read_text(encoding="utf-8"))["id"]
    (run,) = Path("trained/watch/wandb").glob("offline-run-*")
    assert run.name.endswith(identity) and (run / f"run-{identity}.wandb").stat().st_size > 0
    assert {path.name for path in work.iterdir()} == before | {"trained"}
    assert "WANDB_CACHE_DIR" not in os.environ


class FailingTracker:
    """A tracker whose network is gone after the first line."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append("log")
        if step > 0:
            raise ConnectionError("the network is gone\nand more")

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_tracker_that_fails_is_left_alone(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = FailingTracker()
    monkeypatch.setattr(Previews, "_started", lambda self, name: tracker)
    outcome = done(cli, f"{TRAIN} --set watch.report_to=tensorboard")
    warning = "warning: tensorboard failed (the network is gone): nothing more is sent there in this sitting"
    assert outcome.err.count(warning) == 1
    assert Path("trained/log.txt").read_text(encoding="utf-8").count(warning) == 1
    assert tracker.calls == ["log", "log"] and len(log_lines("trained")) == 3


def test_a_tracker_that_does_not_start_is_an_error_and_leaves_nothing(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no key")

    monkeypatch.setattr(Previews, "_opened", refuse)
    outcome = cli(*shlex.split(f"{TRAIN} --set watch.report_to=tensorboard"))
    assert outcome.code == 2
    assert "tensorboard does not start (no key)" in outcome.err
    assert not Path("trained").exists()


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("watch.report_to=tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ("watch.report_to=tensorboard,missing", "unknown tracker 'missing'"),
        ("watch.grid_every_steps=-1", "watch.grid_every_steps must be at least 0; got -1"),
        ("watch.grid_images=0", "watch.grid_images must be at least 1; got 0"),
        ("watch.fid_images=1", "watch.fid_images must be at least 2; got 1"),
        ("watch.fid_every_steps=1 --set evaluate.features=no-such", "unknown feature extractor 'no-such'"),
        ("watch.grid_every_steps=1 --set sample.guidance=0.5", "sample.guidance must be at least 1"),
    ],
)
@pytest.mark.parametrize("command", [TRAIN, RECOVER, RUN], ids=["train", "recover", "run"])
def test_what_cannot_be_watched_is_said_before_the_training(
    cli: Cli, work: Path, command: str, options: str, message: str
) -> None:
    before = sorted(work.rglob("*"))
    outcome = cli(*shlex.split(f"{command} --dry-run --set {options}"))
    assert outcome.code == 2 and message in outcome.err, outcome.err
    assert sorted(work.rglob("*")) == before


def test_a_tracker_that_is_not_there_says_how_to_get_it(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        empty = types.SimpleNamespace(origin=None)  # a folder of that name, such as wandb leaves
        return {"tensorboard": None, "wandb": empty}[name] if name in ("tensorboard", "wandb") else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    for name, extra in (("tensorboard", "trackers"), ("wandb", "wandb")):
        outcome = cli(*shlex.split(f"{PRUNE} --set watch.report_to={name}"))
        assert outcome.code == 2
        assert f"{name} is not installed: pip install 'tinyfusion[{extra}]'" in outcome.err
    assert not Path("pruned").exists()


def latent_data(folder: Path) -> None:
    """A tiny autoencoder `vae` of 16 pixels to 8 cells, pictures of ten classes, and `latents` made of them."""
    save_autoencoder(folder / "vae")
    for i in range(20):
        path = folder / "pictures" / f"class-{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


LATENT_TRAIN = TRAIN.replace("--out trained", "--data latents:latents --out trained") + " --set model.in_channels=4"


def test_latents_are_looked_at_as_pictures(cli: Cli, work: Path) -> None:
    """Decoded as `sample` decodes them, and scored alike; the training is the one without looks."""
    latent_data(work)
    done(cli, "encode --data pictures --vae vae --size 16 --out latents")
    looks = f"{CHEAP} --set watch.grid_every_steps=3 --set watch.grid_images=20"
    done(cli, f"{LATENT_TRAIN} {looks}")
    done(
        cli,
        f"sample --model trained --num-images 20 --set sample.label_rule=balanced --out drawn.npz --grid grid.png {CHEAP}",
    )
    with Image.open("trained/watch/step-0000003.png") as picture:
        assert picture.size == ((10 * 17 - 1) * 4, (2 * 17 - 1) * 4), "20 images of 16 pixels in rows of ten"
        seen = np.asarray(picture)[::4, ::4]
    with np.load("drawn.npz") as archive:
        assert np.array_equal(seen[:16, :16], archive["arr_0"][0]) and np.array_equal(
            seen[17:33, 17:33], archive["arr_0"][11]
        )
    done(cli, LATENT_TRAIN.replace("--out trained", "--out plain"))
    assert Path("trained/model/model.safetensors").read_bytes() == Path("plain/model/model.safetensors").read_bytes()


def test_without_an_autoencoder_nothing_begins(cli: Cli, work: Path) -> None:
    latent_data(work)
    done(cli, "encode --data pictures --vae vae --size 16 --out latents")
    Path("vae").rename("elsewhere")
    outcome = cli(*shlex.split(f"{LATENT_TRAIN} --set watch.grid_every_steps=2"))
    assert outcome.code == 2 and "no autoencoder at vae" in outcome.err
    assert not Path("trained").exists()
    done(cli, f"{LATENT_TRAIN} --set watch.grid_every_steps=3 --set sample.vae=elsewhere {CHEAP}")
    assert Path("trained/watch/step-0000003.png").is_file()


def test_a_model_that_names_no_autoencoder_is_not_looked_at(work: Path) -> None:
    model = open_model("teacher")
    latent = dataclasses.replace(model, facts=dataclasses.replace(model.facts, latent_scale=0.18))
    recipe = dataclasses.replace(Recipe(), watch=WatchSection(grid_every_steps=5))
    with pytest.raises(UserError, match="does not say which autoencoder"):
        check_previews(recipe, latent)
    check_previews(Recipe(), latent)
    check_previews(recipe, None)


# --------------------------------------------------------------------------------------------------- runs that still go


def page_of(cli: Cli, run: str) -> str:
    done(cli, f"report {run} --out {run}.html")
    return Path(f"{run}.html").read_text(encoding="utf-8")


def stages_on(page: str) -> dict[str, str]:
    """ "done", "now" or "open" of every stage of the banner."""
    listed = re.findall(r'<li class="(done|now|open)"[^>]*>(\w+)', page)
    return {"pictures" if name == "diagnostics" else name: place for place, name in listed}


def test_the_page_of_a_run_that_is_going_on(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages made from inside of every stage: what another terminal would see."""
    pages: dict[str, str] = {}
    seen = {
        "prune": (tinyfusion.commands.prune, "plan_of"), "recover": (tinyfusion.jobs.previews, "write_grid_png"),
        "sample": (tinyfusion.commands.run, "write_comparison"), "evaluate": (tinyfusion.commands.evaluate, "score"),
        "speed": (tinyfusion.commands.run, "interleaved"), "pictures": (tinyfusion.commands.run, "write_pictures"),
    }  # fmt: skip

    def looking(stage: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            outcome = inner(*arguments, **named) if stage == "recover" else None
            if stage not in pages and Path("whole/recover").exists() == (stage != "prune"):
                for metrics in Path("whole").glob("*/metrics.jsonl"):
                    with open(metrics, "a", encoding="utf-8") as file:
                        file.write('{"step": 1, "lo')  # the line that is being written
                pages[stage] = tinyfusion.commands.report.render_run(Path("whole"))
                for metrics in Path("whole").glob("*/metrics.jsonl"):
                    text = metrics.read_text(encoding="utf-8")
                    metrics.write_text(text.removesuffix('{"step": 1, "lo'), encoding="utf-8")
            return outcome if stage == "recover" else inner(*arguments, **named)

        return call

    for stage, (module, name) in seen.items():
        monkeypatch.setattr(module, name, looking(stage, getattr(module, name)))
    more = "--set recover.training.log_every_steps=1 --set watch.grid_every_steps=1 --set watch.grid_images=10"
    done(cli, f"{RUN} {more}")
    order = list(seen)
    assert list(pages) == order
    for i, (stage, page) in enumerate(pages.items()):
        assert "Running when this page was written" in page, stage
        if stage != "sample":  # the last images were just drawn
            places = {name: "done" if j < i else "now" if j == i else "open" for j, name in enumerate(order)}
            assert stages_on(page) == places, stage
    assert "step 2 of 2 (100 %)" in pages["prune"] and "Blocks that would be kept now" in pages["prune"]
    assert "step 1 of 2 (50 %)" in pages["recover"] and "left in this stage" in pages["recover"]
    assert "after 1 step" in pages["recover"] and "after 2 steps" not in pages["recover"]
    whole = Path("whole/report.html").read_text(encoding="utf-8")
    assert "Running when" not in whole and "after 2 steps" in whole


@pytest.mark.parametrize("command", [TRAIN, PRUNE, RECOVER], ids=["train", "prune", "recover"])
def test_the_page_of_a_stopped_training(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    out = command.split("--out ")[1].split()[0]
    steps = tinyfusion.jobs.training.train_steps
    monkeypatch.setattr(tinyfusion.jobs.training, "train_steps", killed_after(steps, 0, signal.SIGTERM))
    longer = command.replace("--steps 2", "--steps 4").replace("--steps 3", "--steps 4")
    assert cli(*shlex.split(longer)).code == 128 + signal.SIGTERM
    page = page_of(cli, out)
    assert "Interrupted; the same command continues it" in page
    assert "step 1 of 4 (25 %)" in page and "once it continues" in page


def test_a_run_without_a_logged_step_has_a_page(cli: Cli, work: Path) -> None:
    done(cli, PRUNE)
    record = json.loads(Path("pruned/run.json").read_text(encoding="utf-8"))
    Path("early").mkdir()
    Path("early/run.json").write_text(json.dumps({**record, "state": "running"}), encoding="utf-8")
    assert "no step of 2 logged yet" in page_of(cli, "early")
    Path("early/metrics.jsonl").write_text('{"step": 0, "seen', encoding="utf-8")
    assert "no step of 2 logged yet" in page_of(cli, "early")


def test_the_time_left_is_that_of_the_last_sitting() -> None:
    slow = [{"step": step, "seconds": 10.0 * (step + 1)} for step in range(5)]
    fast = [{"step": step, "seconds": 20.0 + step} for step in range(5, 10)]
    assert seconds_per_step(slow) == pytest.approx(10)
    assert seconds_per_step(slow + fast) == pytest.approx(1), "a clock that ran back began anew"
    assert seconds_per_step(slow[:1]) == pytest.approx(10)
    assert seconds_per_step([]) is None and seconds_per_step([{"step": 3}]) is None
