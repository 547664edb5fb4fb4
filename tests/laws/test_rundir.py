"""Run folders under failure, kill and signal: the old or the new, never neither, never a mixture."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import RunDirectory, read_metrics, write_text, written_beside
from tinyfusion.core.signals import Interrupted, SignalWatch

RECIPE = {"seed": 0, "prune": {"scheme": "1:2", "training": {"steps": 5, "log_every_steps": 1}}}
OTHER = {**RECIPE, "seed": 1}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_folder(path: Path, content: str) -> None:
    with written_beside(path) as beside:
        beside.mkdir()
        (beside / "content").write_text(content)


@pytest.fixture(scope="session")
def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# ------------------------------------------------------------------------------------------------ files and folders


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_killed_processes_do_no_harm(tmp_path: Path, dead: int, kind: str) -> None:
    for pid in (os.getpid(), dead, os.getppid()):
        left = tmp_path / f".out.{pid}.part"
        if kind == "folder":
            left.mkdir()
            (left / "junk").write_text("x")
        else:
            left.write_text("x")
    if kind == "folder":
        write_folder(tmp_path / "out", "new")
        assert names(tmp_path / "out") == ["content"]
    else:
        write_text(tmp_path / "out", "new")
    assert [p.name for p in tmp_path.iterdir() if p.name != "out"] == [f".out.{os.getppid()}.part"], "of a live process"


def test_outputs_with_similar_names_are_not_leftovers_of_each_other(tmp_path: Path) -> None:
    with written_beside(tmp_path / "out.png") as beside:
        beside.write_text("picture")
        write_text(tmp_path / "out", "text")
    assert names(tmp_path) == ["out", "out.png"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    write_folder(tmp_path / "out", "old")
    replace, calls = os.replace, []

    def broken(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "input or output")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="input or output"):
        write_folder(tmp_path / "out", "new")
    assert len(calls) >= failing
    assert names(tmp_path) == ["out", "out/content"]
    assert (tmp_path / "out" / "content").read_text() == "old"


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, events = os.fsync, []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), synced(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    write_folder(tmp_path / "out", "new")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert any(path.endswith(".part/content") for path in before)
    assert after == [str(tmp_path)]


# ----------------------------------------------------------------------------------------------------- --overwrite


def finished(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    with run.writing("prune", RECIPE):
        (path / "plan.json").write_text("old")
        run.mark("done")
    return run


@pytest.mark.parametrize(
    "error", [UserError("bad"), ValueError("bug"), Interrupted(signal.SIGTERM), KeyboardInterrupt()]
)
def test_overwriting_that_comes_to_nothing_brings_the_old_run_back(tmp_path: Path, error: BaseException) -> None:
    run = finished(tmp_path / "run")

    def fail() -> None:
        with run.writing("prune", OTHER, overwrite=True):
            run.log({"step": 0})
            assert not (run.path / "plan.json").exists()
            raise error

    pytest.raises(type(error), fail)
    assert names(tmp_path) == ["run", "run/plan.json", "run/run.json"]
    assert run.check("prune", RECIPE, False) == "finished"


def test_the_old_run_goes_with_the_first_checkpoint_of_the_new(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")

    def stop() -> None:
        with run.writing("prune", OTHER, overwrite=True):
            run.mark("running", seconds=1.0)
            assert len(list(tmp_path.iterdir())) == 2, "nothing worth keeping yet"
            (run.checkpoints / "step-0000001").mkdir(parents=True)
            run.mark("running", seconds=2.0)
            assert len(list(tmp_path.iterdir())) == 1
            raise Interrupted(signal.SIGINT)

    pytest.raises(Interrupted, stop)
    assert run.record()["state"] == "interrupted"
    assert run.check("prune", OTHER, False) == "continue"


@pytest.mark.parametrize("saved", [False, True])
def test_overwriting_that_was_killed_is_settled_at_the_next_start(tmp_path: Path, dead: int, saved: bool) -> None:
    finished(tmp_path / "old")
    run = RunDirectory(tmp_path / "run")
    run.begin("prune", OTHER)
    if saved:
        (run.checkpoints / "step-0000001").mkdir(parents=True)
    os.replace(tmp_path / "old", tmp_path / f".run.{dead}.old")
    if saved:
        assert run.check("prune", OTHER, False) == "continue"
    else:
        with pytest.raises(UserError, match="another recipe"):
            run.check("prune", OTHER, False)
        assert run.check("prune", RECIPE, False) == "finished"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_foreign_folder_in_the_place_of_a_run_is_left_alone(tmp_path: Path, dead: int) -> None:
    run = finished(tmp_path / "run")
    os.replace(run.path, tmp_path / f".run.{dead}.old")
    run.path.mkdir()
    (run.path / "thesis").write_text("mine")
    with pytest.raises(UserError, match="not a tinyfusion run"):
        run.check("prune", RECIPE, True)
    assert names(run.path) == ["thesis"]


def test_the_current_folder_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(UserError, match="current folder"):
        RunDirectory(Path()).begin("prune", RECIPE, True)
    assert RunDirectory(Path()).begin("prune", RECIPE) == "finished"


def test_continuing_clears_what_a_killed_process_left(tmp_path: Path, dead: int) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin("prune", RECIPE)
    (run.checkpoints / f".step-0000003.{dead}.part").mkdir(parents=True)
    (run.path / f".student.{dead}.old").mkdir()
    (run.path / f".plan.json.{os.getppid()}.part").write_text("of a live process")
    assert run.begin("prune", RECIPE) == "continue"
    assert names(run.path) == [f".plan.json.{os.getppid()}.part", "checkpoints", "run.json", "student"]


# ------------------------------------------------------------------------------------------------ records and lines


def test_knobs_that_change_no_result_make_no_other_recipe(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    old = {"sample": {"batch_size": 8}, "train": {"batch_size": 8, "checkpoints_limit": 2}, "speed": {"repeats": 3}}
    new = {"sample": {"batch_size": 9}, "train": {"batch_size": 8, "checkpoints_limit": 1}, "speed": {"repeats": 4}}
    run.begin("run", old)
    assert run.begin("run", new) == "continue"
    assert run.record()["recipe"] == new
    with pytest.raises(UserError, match=r"another recipe \(train.batch_size: 8 there, 9 now\)"):
        run.check("run", {**new, "train": {"batch_size": 9}}, False)


@pytest.mark.parametrize("more", [{}, {"verb": "prune"}, {"verb": 3, "recipe": {}}, {"format_version": "1"}])
def test_a_record_with_gaps_is_an_error_for_people(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"made_by": "tinyfusion", **more}))
    with pytest.raises(UserError, match="damaged record"):
        RunDirectory(tmp_path).check("prune", RECIPE, False)
    assert RunDirectory(tmp_path).check("prune", RECIPE, True) == "new"


@pytest.mark.parametrize("cut", ['{"step": 2, "kept": {"blocks": [1]}', '{"step": 2, "lo', "7", "\x00\x00"])
def test_a_line_cut_short_is_left_out(tmp_path: Path, cut: str) -> None:
    run = RunDirectory(tmp_path)
    for step in range(2):
        run.log({"step": step})
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write(cut)
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]
    run.truncate_metrics(1)
    run.log({"step": 1, "again": True})
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1, "again": True}]


# ---------------------------------------------------------------------------------------------------------- signals


def kill(signum: int) -> None:
    os.kill(os.getpid(), signum)


def test_signals_end_a_verb_at_once_and_a_training_between_steps() -> None:
    reached = []

    def verb() -> None:
        with SignalWatch(patient=False):
            kill(signal.SIGUSR1)
            reached.append("after a request to save")
            with SignalWatch() as inner:
                kill(signal.SIGUSR1)
                kill(signal.SIGTERM)
                kill(signal.SIGTERM)
                reached.append("patient")
                assert inner.save and inner.stop == signal.SIGTERM
            reached.append("never")

    stop = pytest.raises(Interrupted, verb)
    assert reached == ["after a request to save", "patient"]
    assert stop.value.signum == signal.SIGTERM


def test_what_is_being_cleared_up_is_not_disturbed_but_by_a_second_sigint() -> None:
    cleared = []

    def verb() -> None:
        with SignalWatch(patient=False):
            try:
                with SignalWatch():
                    kill(signal.SIGINT)
            finally:
                kill(signal.SIGTERM)
                cleared.append(True)
                kill(signal.SIGINT)
                cleared.append(False)

    pytest.raises(KeyboardInterrupt, verb)
    assert cleared == [True]


def test_handlers_are_put_back_and_other_errors_come_through() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]

    def fail() -> None:
        with SignalWatch():
            kill(signal.SIGINT)
            raise UserError("other")

    pytest.raises(UserError, fail)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_run_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunDirectory(run).writing("train", {"steps": 1}):
        (run / "model").mkdir()
        (run / "model" / "model.json").touch()
        for overwrite in (False, True):
            with (
                pytest.raises(UserError, match="another process writes"),
                RunDirectory(run).writing("train", {"steps": 1}, overwrite),
            ):
                raise AssertionError("never reached")
        assert (run / "model" / "model.json").is_file()
    with RunDirectory(run).writing("train", {"steps": 1}) as mode:
        assert mode == "continue"
