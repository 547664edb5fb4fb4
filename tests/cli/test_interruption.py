"""Signals and kills at awkward moments, in this process: what is said, what is kept, and that it goes on."""

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
from material import Cli
from test_verbs import PRUNE, RUN, SAMPLE, done

import tinyfusion.jobs.drawing
import tinyfusion.jobs.evaluate
import tinyfusion.jobs.run
import tinyfusion.jobs.training


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


def test_a_signal_between_the_stages_ends_the_run(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.jobs.run, "evaluate", evaluate)
        stopped = cli(*shlex.split(RUN))
    assert stopped.code == 130, stopped.err
    assert "the same command continues" in stopped.err.splitlines()[-1]
    assert record_of("whole")["state"] == "interrupted"
    assert {"prune", "recover", "sample", "evaluate"} == set(record_of("whole")["stages"])


def test_a_request_to_save_is_harmless_everywhere(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = tinyfusion.jobs.evaluate.score

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return score(*arguments)

    monkeypatch.setattr(tinyfusion.jobs.evaluate, "score", signalled)
    done(cli, "evaluate --samples images.npz --reference digits:heldout --out evaluation.json")


def test_sampling_stopped_in_its_first_part_leaves_no_trace(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(work.rglob("*"))
    drawn = tinyfusion.jobs.drawing.draw_samples
    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.jobs.drawing, "draw_samples", killed_after(drawn, 0, signal.SIGUSR1, signal.SIGINT))
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
