"""Signals and kills at awkward moments, in this process: what is said, what is kept, and that it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import Cli, tiny
from test_distill_steps import made_by
from test_encode import encoded, save_autoencoder
from test_faults import at_step, failed, result
from test_folded import MADE as FOLDED
from test_making_dynamic import MADE as ROUTED
from test_verbs import EVALUATE, PRUNE, RUN, SAMPLE, done

import tinyfusion.commands.encode
import tinyfusion.commands.evaluate
import tinyfusion.commands.inspect
import tinyfusion.commands.prune
import tinyfusion.commands.sample
import tinyfusion.commands.stages
import tinyfusion.jobs.sampling_setup
import tinyfusion.jobs.training
import tinyfusion.sample.drive
import tinyfusion.training.loop
from tinyfusion.core.signals import Interrupted, SignalWatch, check_stop
from tinyfusion.models.checkpoint import save_model

# a training, and an option that makes it another one
TRAININGS = {
    "dynamic": (ROUTED, "--target 0.7"),
    "folded guidance": (f"{FOLDED} --out", "--guidance 3"),
    **{method: (f"{made_by(method)} --out", "--guidance 3") for method in ("consistency", "matching")},
}


def record_of(run: str) -> Any:
    return json.loads(Path(run, "run.json").read_text(encoding="utf-8"))


def killed_after(function: Callable[..., Iterator[Any]], index: int, *signals: int) -> Callable[..., Iterator[Any]]:
    """The generator `function`, with signals to this process when it has made item `index`."""

    def made(*arguments: Any, **named: Any) -> Iterator[Any]:
        for i, item in enumerate(function(*arguments, **named)):
            if i == index:
                for signum in signals:
                    os.kill(os.getpid(), signum)
            yield item

    return made


def test_a_signal_in_the_last_step_of_a_stage_ends_the_run(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        steps = tinyfusion.jobs.training.train_steps
        patch.setattr(tinyfusion.jobs.training, "train_steps", killed_after(steps, 1, signal.SIGTERM))
        stopped = cli(*shlex.split(RUN))
    assert stopped.code == 128 + signal.SIGTERM
    assert stopped.err.splitlines()[-1] == "interrupted by SIGTERM; saved, the same command continues"
    assert not Path("whole/recover").exists()
    assert record_of("whole")["state"] == record_of("whole/prune")["state"] == "interrupted"
    spent = record_of("whole")["stages"]["prune"]
    assert spent > 0
    done(cli, RUN)
    assert record_of("whole")["state"] == "done"
    assert record_of("whole")["stages"]["prune"] > spent, "of both sittings"

    Path("whole/report.html").unlink()  # killed after the last stage, before the page
    done(cli, RUN)
    assert Path("whole/report.html").is_file()


@pytest.mark.parametrize("training", TRAININGS)
def test_stopped_and_continued_is_the_same(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, training: str
) -> None:
    save_model(tiny(num_heads=8), Path("wide"))
    made, other = TRAININGS[training]
    done(cli, f"{made} whole")
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        stopped = cli(*shlex.split(f"{made} part"))
    assert stopped.code == 130 and "the same command continues" in stopped.err
    failed(cli(*shlex.split(f"{made} part {other}")), "made with another recipe", other.split()[0].strip("-"))
    done(cli, f"{made} part")
    assert result("part") == result("whole")
    assert "is finished" in done(cli, f"{made} part").err
    replayed = done(cli, "replay whole --step 7 --json").last_json
    last = json.loads(Path("whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert replayed["step"] == 7 and len(replayed["samples"]) == last["seen_images"] / (last["step"] + 1)


def test_a_signal_between_the_stages_ends_the_run(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any, **_named: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.commands.stages, "evaluate", evaluate)
        stopped = cli(*shlex.split(RUN))
    assert stopped.code == 130, stopped.err
    assert "the same command continues" in stopped.err.splitlines()[-1]
    assert record_of("whole")["state"] == "interrupted"
    assert {"prune", "recover", "sample", "evaluate"} == set(record_of("whole")["stages"])


def test_a_request_to_save_is_harmless_everywhere(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = tinyfusion.commands.evaluate.score

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return score(*arguments)

    monkeypatch.setattr(tinyfusion.commands.evaluate, "score", signalled)
    done(cli, "evaluate --samples images.npz --reference digits:heldout --out evaluation.json")


def test_sampling_stopped_in_its_first_part_leaves_no_trace(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(work.rglob("*"))
    drawn = tinyfusion.jobs.sampling_setup.draw_samples
    with monkeypatch.context() as patch:
        patch.setattr(
            tinyfusion.jobs.sampling_setup, "draw_samples", killed_after(drawn, 0, signal.SIGUSR1, signal.SIGINT)
        )
        stopped = cli(*shlex.split(f"{SAMPLE} --batch-size 2"))
    assert stopped.code == 130
    assert "no image of drawn/samples.npz was finished" in stopped.err
    assert sorted(work.rglob("*")) == before
    done(cli, SAMPLE)


@pytest.mark.parametrize("left", ["others", "none", "half"])
def test_a_record_without_its_images_is_not_finished(cli: Cli, work: Path, left: str) -> None:
    """What a kill between the two renames leaves."""
    done(cli, SAMPLE)
    path = Path("drawn/samples.npz")
    whole = path.read_bytes()
    if left == "others":
        arrays = dict(np.load(path))
        arrays["arr_0"] = 255 - arrays["arr_0"]
        np.savez(path, **arrays)
    elif left == "half":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    assert "finished" not in done(cli, SAMPLE).err
    assert path.read_bytes() == whole
    assert "finished" in done(cli, SAMPLE).err


def test_another_batch_size_is_the_same_job(cli: Cli, work: Path) -> None:
    done(cli, f"{SAMPLE} --batch-size 2")
    assert "finished" in done(cli, f"{SAMPLE} --batch-size 3").err
    done(cli, PRUNE)
    assert "finished" in done(cli, f"{PRUNE} --set prune.training.checkpoints_limit=5").err


def test_overwriting_with_a_job_that_fails_keeps_the_old(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --criterion indices --keep 0 --out pruned")
    failing = f"{PRUNE} --steps 40 --overwrite --set prune.training.max_bad_steps=2"
    outcome = cli(*shlex.split(f"{failing} --update full --set prune.training.learning_rate=1e30"))
    assert outcome.code == 2
    assert "non-finite" in outcome.err
    assert done(cli, "inspect pruned --json").last_json["kept"] == {"blocks": [0]}
    assert list(work.glob(".*")) == []


# ------------------------------------------------------------------------------------------------------- dropped exceptions


class Dying:
    """Sends a signal to this process while Python runs its `__del__`, where an exception is dropped."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def __del__(self) -> None:
        os.kill(os.getpid(), self.signum)


def dropped_before(patch: pytest.MonkeyPatch, module: Any, name: str, signum: int) -> None:
    """The first call of a function of a module comes after such a signal."""
    function, due = getattr(module, name), [True]

    def called(*given: Any, **named: Any) -> Any:
        if due.pop() if due else False:
            Dying(signum)
        return function(*given, **named)

    patch.setattr(module, name, called)


LATENTS = "encode --data pictures --vae vae --size 16 --batch-size 2 --out latents"
DROPPED = {  # the function before which the signal comes, the command, what it leaves
    "prune, in the training": (tinyfusion.training.loop, "_forward_backward", PRUNE, ["pruned"]),
    "prune, before the training": (tinyfusion.commands.prune, "open_teacher", PRUNE, []),
    "sample, between steps": (tinyfusion.sample.drive, "SampleDraws", SAMPLE, []),
    "sample, while the model is opened": (tinyfusion.commands.sample, "open_stated", SAMPLE, []),
    "encode, in a batch": (tinyfusion.commands.encode, "encoded_values", LATENTS, []),
    "evaluate": (tinyfusion.commands.evaluate, "score", EVALUATE, []),
    "inspect": (tinyfusion.commands.inspect, "inspect", "inspect teacher", []),
}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", DROPPED)
def test_a_signal_inside_a_destructor_is_obeyed(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, where: str, signum: signal.Signals
) -> None:
    module, name, command, left = DROPPED[where]
    if command == LATENTS:
        Path("pictures/class").mkdir(parents=True)
        for index in range(6):
            Path(f"pictures/class/{index}.png").write_bytes(encoded(index))
        save_autoencoder(Path("vae"))
    before = {path.name for path in work.iterdir()}
    with monkeypatch.context() as patch:
        dropped_before(patch, module, name, signum)
        stopped = cli(*shlex.split(command))
    assert stopped.code == 128 + signum, stopped.err
    assert stopped.err.splitlines()[-1].startswith(f"interrupted by {signum.name}; ")
    assert "Traceback" not in stopped.err and "Exception ignored" not in stopped.err
    assert sorted({path.name for path in work.iterdir()} - before) == left
    done(cli, command)


def watched(block: Callable[[], object], expected: type[BaseException], message: str | None = None) -> None:
    """A block within a watch ends with this exception."""
    with pytest.raises(expected, match=message), SignalWatch(patient=False):
        block()


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_a_dropped_stop_is_raised_by_the_next_signal_the_next_check_or_at_the_end() -> None:
    reached = []

    def at_the_end() -> None:
        Dying(signal.SIGINT)
        reached.append("the end")

    def at_the_next_signal() -> None:
        Dying(signal.SIGTERM)
        send(signal.SIGINT)
        raise AssertionError("went on")

    def at_the_next_check() -> None:
        Dying(signal.SIGTERM)
        check_stop()
        raise AssertionError("went on")

    def before_a_training() -> None:
        Dying(signal.SIGTERM)
        with SignalWatch():
            raise AssertionError("a training began")

    watched(at_the_end, Interrupted, "by SIGINT")
    assert reached == ["the end"]
    watched(at_the_next_signal, Interrupted, "by SIGTERM")
    watched(at_the_next_check, Interrupted, "by SIGTERM")
    watched(before_a_training, Interrupted, "by SIGTERM")


@pytest.mark.parametrize(("again", "expected"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_second_signal_while_the_first_is_acted_on(again: int, expected: type[BaseException]) -> None:
    reached = []

    def block() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            check_stop()
            send(again)
            reached.append("saved")

    watched(block, expected)
    assert reached == (["saved"] if expected is Interrupted else [])


def test_an_error_that_foreign_code_made_of_a_stop_is_a_stop() -> None:
    def turned_into_another() -> None:
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)
        raise ImportError("multiarray failed to import")

    def not_cleaned_up() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            raise OSError("no space for the checkpoint")

    watched(turned_into_another, Interrupted, "by SIGTERM")
    watched(not_cleaned_up, OSError, "no space")


def test_other_dropped_exceptions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", errors.append)

    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    with SignalWatch(patient=False):
        Broken()
    assert len(errors) == 1
    assert sys.unraisablehook == errors.append
