"""Run folders under failure, kill and signal: the old or the new, never neither, never a mixture."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyfusion.config.loading import to_plain
from tinyfusion.config.process_sections import ShiftFields
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.locks import LOCK, acquire
from tinyfusion.core.records import check_same, stamp
from tinyfusion.core.rundir import RunDirectory, atomic_write, read_metrics, write_text
from tinyfusion.core.signals import Interrupted, SignalWatch

RECIPE = {"seed": 0, "prune": {"scheme": "1:2", "training": {"steps": 5, "log_every_steps": 1}}}
OTHER = {**RECIPE, "seed": 1}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_folder(path: Path, content: str, name: str = "content") -> None:
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / name).write_text(content)


# ------------------------------------------------------------------------------------------------ files and folders


def leftover(folder: Path, name: str, pid: int = 1) -> Path:
    """What a process that was killed leaves of an unfinished output."""
    left = folder / f".{name}.{pid}.part"
    left.mkdir(parents=True)
    (left / LOCK).touch()
    (left / name).write_text("half")
    return left


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_killed_processes_do_no_harm(tmp_path: Path, kind: str) -> None:
    for pid in (os.getpid(), 1, 2**22):
        leftover(tmp_path, "out", pid)
    live = acquire(leftover(tmp_path, "out", 2) / LOCK, "writes")
    (tmp_path / ".out.3.part").write_text("of others")
    (tmp_path / ".out.4.part").mkdir()
    (tmp_path / ".out.4.part" / "thesis").write_text("of others")
    if kind == "folder":
        write_folder(tmp_path / "out", "new")
        assert names(tmp_path / "out") == ["content"]
    else:
        write_text(tmp_path / "out", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.2.part", ".out.3.part", ".out.4.part", "out"]
    live.release()


def test_outputs_with_similar_names_are_not_leftovers_of_each_other(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "out.png") as temporary:
        temporary.write_text("picture")
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
    assert any(path.endswith(".part/out/content") for path in before)
    assert after == [str(tmp_path)]


# ----------------------------------------------------------------------------------------------------- --overwrite


def finished(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    with run.writing("prune", RECIPE):
        (path / "plan.json").write_text("old")
        run.mark("done")
    return run


def test_overwriting_removes_the_previews_of_the_run_and_not_pictures_of_others(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.watched.mkdir()
    for name in ("step-0000009.png", "step-9.png", "step-x.png"):
        (run.watched / name).write_text("picture")
    with run.writing("prune", RECIPE, overwrite=True):
        run.mark("done")
    assert names(run.path) == ["run.json", "watch", "watch/step-9.png", "watch/step-x.png"]


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
            assert (run.path / ".tinyfusion.old" / "plan.json").is_file(), "nothing worth keeping yet"
            write_text(run.checkpoints / "step-0000001" / "state.json", "{}")
            run.mark("running", seconds=2.0)
            assert not (run.path / ".tinyfusion.old").exists()
            raise Interrupted(signal.SIGINT)

    pytest.raises(Interrupted, stop)
    assert run.record()["state"] == "interrupted"
    assert run.check("prune", OTHER, False) == "continue"


def in_a_child(act: Callable[[], None], kill_at: int) -> bool:
    """`act` in a process that is killed at its rename number `kill_at`; whether it came that far."""
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, itertools.count()

        def killing(source: Any, target: Any) -> None:
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = killing  # type: ignore[assignment]
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("end", ["saves", "fails"])
def test_overwriting_that_is_killed_at_any_rename_is_settled_at_the_next_start(tmp_path: Path, end: str) -> None:
    """Old or new, whole, with what others put there; a look in between touches nothing."""
    seen = set()
    for moment in itertools.count():
        run = RunDirectory(tmp_path / str(moment) / "run")
        with run.writing("prune", RECIPE):
            write_folder(run.path / "student", "old", "model.json")
            write_text(run.path / "plan.json", "old")
            run.mark("done")
        (run.path / "student" / "notes.txt").write_text("mine")
        (run.path / "thesis").write_text("mine")

        def overwrite(run: RunDirectory = run) -> None:
            with run.writing("prune", OTHER, overwrite=True):
                write_text(run.path / "plan.json", "new")
                if end == "fails":
                    raise UserError("bad")
                write_folder(run.checkpoints / "step-0000001", "{}", "state.json")
                run.mark("done")

        killed = in_a_child(overwrite, moment)
        before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
        answer = None
        with contextlib.suppress(UserError):
            answer = run.check("prune", RECIPE, False)
        run.check("prune", RECIPE, True)
        assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
        old = answer is not None
        with run.writing("prune", RECIPE if old else OTHER) as mode:
            seen.add(mode if old else f"new {mode}")
        if old:
            assert (run.path / "plan.json").read_text() == "old"
            wanted = ["plan.json", "run.json", "student", "student/model.json", "student/notes.txt", "thesis"]
        else:
            assert (run.path / "plan.json").read_text() == "new"
            wanted = ["checkpoints", "checkpoints/step-0000001", "checkpoints/step-0000001/state.json", "plan.json"]
            wanted += ["run.json", "student", "student/notes.txt", "thesis"]
        assert names(run.path.parent) == ["run", *(f"run/{name}" for name in wanted)], moment
        if not killed:
            break
    assert moment > 5 and seen == {
        "finished",
        "continue",
        *(["new continue", "new finished"] if end == "saves" else []),
    }


def test_a_foreign_folder_in_the_place_of_a_run_is_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")

    def swap() -> None:
        with run.writing("prune", RECIPE):
            write_text(run.path / "plan.json", "{}")
            run.path.rename(tmp_path / "moved")
            run.path.mkdir()
            for name in ("plan.json", "run.json", "thesis"):
                (run.path / name).write_text("mine")
            for write in (lambda: run.note("line"), lambda: run.mark("done")):
                with pytest.raises(UserError, match="was removed, moved or emptied"):
                    write()
            raise UserError("bad")

    pytest.raises(UserError, swap)
    assert names(run.path) == ["plan.json", "run.json", "thesis"]
    assert (run.path / "plan.json").read_text() == "mine"
    with pytest.raises(UserError):
        run.check("prune", RECIPE, True)


def test_the_current_folder_is_overwritten_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with RunDirectory(Path()).writing("prune", OTHER, True) as mode:
        assert mode == "new"
    assert names(tmp_path) == ["run", "run/run.json"]


def test_continuing_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin("prune", RECIPE)
    leftover(run.checkpoints, "step-0000003")
    student = leftover(run.path, "student")
    (student / ".tinyfusion.old").mkdir()
    live = acquire(leftover(run.path, "plan.json") / LOCK, "writes")
    assert run.begin("prune", RECIPE) == "continue"
    assert sorted(p.name for p in run.path.iterdir()) == [".plan.json.1.part", "checkpoints", "run.json", "student"]
    assert list(run.checkpoints.iterdir()) == []
    live.release()


# ------------------------------------------------------------------------------------------------ files of others


@pytest.mark.parametrize(
    "place", ["notes.txt", "student/notes.txt", "checkpoints/step-0000001/notes.txt", "log.txt", "new/"]
)
def test_what_others_put_into_a_run_that_fails_stays_alone_in_it(tmp_path: Path, place: str) -> None:
    run = RunDirectory(tmp_path / "above" / "run")

    def fail() -> None:
        with run.writing("prune", RECIPE):
            run.note("ours")
            run.log({"step": 0})
            write_text(run.path / "plan.json", "{}")
            (run.path / place).parent.mkdir(parents=True, exist_ok=True)
            if place.endswith("/"):
                (run.path / place).mkdir()
            else:
                (run.path / place).write_text("mine")
            raise UserError("bad")

    pytest.raises(UserError, fail)
    kept = [str(folder) for folder in Path(place).parents if str(folder) != "."]
    assert names(run.path) == sorted([*kept, place.rstrip("/")])
    if not place.endswith("/"):
        assert (run.path / place).read_text() == "mine"


def test_a_run_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "above" / "run")

    def fail() -> None:
        with run.writing("recover", RECIPE):
            run.note("ours")
            (run.watched / "tensorboard" / "logs").mkdir(parents=True)
            (run.watched / "tensorboard" / "logs" / "events.0").write_text("of a tracker")
            leftover(run.checkpoints, "step-0000001")
            raise UserError("bad")

    pytest.raises(UserError, fail)
    assert names(tmp_path) == []


def test_files_of_others_in_a_folder_that_is_replaced_stay(tmp_path: Path) -> None:
    for name in ("config.json", "former.json", "notes.txt", "more/notes.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    with atomic_write(tmp_path / "out", r"config\.json|former\.json") as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text("new")
    assert names(tmp_path) == ["out", "out/config.json", "out/more", "out/more/notes.txt", "out/notes.txt"]
    assert (tmp_path / "out" / "config.json").read_text() == "new"


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


@pytest.mark.parametrize(
    "cut",
    [
        '{"step": 2, "kept": {"blocks": [1]}',
        '{"step": 2, "lo',
        "7",
        "\x00\x00",
        "[" * 100_000,
        "9" * 5_000,
        '{"step": "2"',
    ],
)
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


def test_records_from_before_shifts_are_of_the_same_recipe_without_one(tmp_path: Path) -> None:
    """As tinyfusion 0.4.0 wrote them with samples."""
    now = to_plain(Recipe().sample)
    shifts = {field.name for field in dataclasses.fields(ShiftFields)}
    older = {**now, "flow": {name: value for name, value in now["flow"].items() if name not in shifts}}
    record = stamp("sample", {"sample": older}, "done")
    check_same(record, "sample", {"sample": now}, tmp_path / "x.npz")
    shifted = {**now, "flow": {**now["flow"], "shift": 3.0}}
    with pytest.raises(UserError, match=r"sample\.flow\.shift: 1\.0 there, 3\.0 now"):
        check_same(record, "sample", {"sample": shifted}, tmp_path / "x.npz")


def test_a_run_of_0_6_0_is_the_same_command(tmp_path: Path) -> None:
    """Fields were renamed, and `destination` was not there."""
    recipe = to_plain(Recipe())
    recipe["dynamic"]["in_run"] = True
    former = {"auxiliary": "beside", "auxiliary_steps": "beside_steps", "auxiliary_weight": "beside_weight"}
    then = recipe | {"dynamic": {former.get(name, name): value for name, value in recipe["dynamic"].items()}}
    del then["destination"]
    record = stamp("run", then, "interrupted")
    check_same(record, "run", recipe, tmp_path)
    record["recipe"]["dynamic"]["beside_steps"] += 1
    with pytest.raises(UserError, match="dynamic.auxiliary_steps: 30001 there, 30000 now"):
        check_same(record, "run", recipe, tmp_path)


def test_sections_of_stages_that_a_run_leaves_out_are_of_no_account(tmp_path: Path) -> None:
    """So that a version with a new stage, or new fields of one, finds the finished runs of older ones."""
    now = to_plain(Recipe())
    record = stamp("run", {name: value for name, value in now.items() if name != "distill_steps"}, "done")
    check_same(record, "run", now, tmp_path)
    asked = {**now, "distill_steps": {**now["distill_steps"], "in_run": True}}
    with pytest.raises(UserError, match="distill_steps"):
        check_same(record, "run", asked, tmp_path)
    older = stamp(
        "run", {**asked, "distill_steps": {k: v for k, v in asked["distill_steps"].items() if k != "end_power"}}, "done"
    )
    with pytest.raises(UserError, match=r"distill_steps\.end_power: 0\.0 there, 1\.0 now"):
        check_same(older, "run", asked, tmp_path)


def test_recoveries_of_before_trials_are_found(tmp_path: Path) -> None:
    now = to_plain(Recipe())
    recover = {
        name: value for name, value in now["recover"].items() if not name.startswith(("search_cand", "search_trial"))
    }
    assert len(recover) == len(now["recover"]) - 4
    older = stamp("recover", {**now, "recover": recover}, "interrupted")
    check_same(older, "recover", now, tmp_path)
    with pytest.raises(UserError, match=r"recover\.search_candidates: 1 there, 2 now"):
        check_same(older, "recover", {**now, "recover": {**now["recover"], "search_candidates": 2}}, tmp_path)
