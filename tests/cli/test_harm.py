"""Nothing that is not ours comes to harm: special files, files of others in our folders, and runs of other processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import Cli, Outcome
from test_bad_input import EVALUATE, INDICES, PRUNE, RECOVER, SAMPLE, tree_hash
from test_verbs import done

import tinyfusion.cli
import tinyfusion.commands.prune
import tinyfusion.core.files
import tinyfusion.export.folder
import tinyfusion.jobs.sampling_setup
from tinyfusion.core.errors import UserError
from tinyfusion.core.locks import LOCK, acquire

EXPORT = "export --model teacher --to"


def refused(outcome: Outcome, *message: str) -> None:
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2 and len(lines) == 1 and "Traceback" not in outcome.err, outcome.err
    assert all(part in lines[0] for part in message), lines[0]


def names(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# ---------------------------------------------------------------------------------------------------------- special files


OUTPUTS = [
    f"{EXPORT} tinyfusion --out pipe",
    f"{EXPORT} diffusers --out pipe",
    f"{EXPORT} diffusers --out pipe/below",
    f"{EXPORT} official --out pipe.pt",
    f"{EXPORT} official --out beside.pt",
    f"{INDICES} --keep 0,2".replace("--out run", "--out pipe"),
    f"{INDICES} --keep 0,2 --overwrite".replace("--out run", "--out pipe"),
    RECOVER.replace("--out run", "--out pipe"),
    f"{RECOVER} --resume pipe",
    "train --data digits --set model.family=dit --out pipe",
    SAMPLE.replace("made/samples.npz", "pipe.npz"),
    SAMPLE.replace("made/samples.npz", "beside.npz"),
    SAMPLE.replace("made/samples.npz", "parts.npz"),
    f"{SAMPLE} --grid pipe.png",
    f"{SAMPLE} --png pipe",
    EVALUATE.replace("made/evaluation.json", "pipe") + " --samples images.npz",
    "report pipe --out page.html",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", OUTPUTS)
def test_a_pipe_is_refused_wherever_something_would_be_written(cli: Cli, work: Path, command: str) -> None:
    for name in ("pipe", "pipe.pt", "pipe.npz", "pipe.png", "beside.json", "parts.npz.parts"):
        os.mkfifo(name)
    before = tree_hash(work)
    refused(cli(*shlex.split(command)), "pipe" if "parts" not in command else "parts.npz.parts")
    assert tree_hash(work) == before
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)


def test_a_pipe_that_comes_meanwhile_is_not_replaced(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = tinyfusion.export.folder.save_model

    def late(*given: Any) -> None:
        save(*given)
        os.mkfifo("out")

    monkeypatch.setattr(tinyfusion.export.folder, "save_model", late)
    refused(cli(*shlex.split(f"{EXPORT} tinyfusion --out out")), "out is a pipe")
    assert stat.S_ISFIFO(Path("out").stat().st_mode)


# ------------------------------------------------------------------------------------------------------- files of others


def failing(act: Callable[[], None]) -> Callable[..., None]:
    def save(*_: Any) -> None:
        act()
        raise UserError("bad")

    return save


def test_notes_in_a_run_that_fails_stay(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = failing(lambda: None if Path("run/notes.txt").write_text("mine") else None)
    monkeypatch.setattr(tinyfusion.commands.prune, "save", note)
    refused(cli(*shlex.split(f"{INDICES} --keep 0,2")), "bad")
    assert names("run") == ["notes.txt"]
    assert Path("run/notes.txt").read_text() == "mine"


def test_a_foreign_folder_in_the_place_of_a_moved_run_stays(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move() -> None:
        Path("run").rename("moved")
        Path("thesis").rename("run")

    before = names("thesis")
    monkeypatch.setattr(tinyfusion.commands.prune, "save", failing(move))
    refused(cli(*shlex.split(f"{INDICES} --keep 0,2")), "the run folder run was removed, moved or emptied")
    assert names("run") == before


@pytest.mark.parametrize("made", ["prune", "export", "png"])
def test_notes_in_an_output_that_is_overwritten_stay(cli: Cli, work: Path, made: str) -> None:
    first, again, folder, mine, ours = {
        "prune": (f"{INDICES} --keep 0,2", f"{INDICES} --keep 1,3 --overwrite", "run", "student/notes.txt", "plan.json"),
        "export": (f"{EXPORT} diffusers --out out", f"{EXPORT} tinyfusion --out out --overwrite", "out", "notes.txt", "model.json"),
        "png": (f"{SAMPLE} --png png", f"{SAMPLE} --png png --seed 1 --overwrite", "png", "notes.txt", "000003.png"),
    }[made]  # fmt: skip
    done(cli, first)
    former = set(names(folder))
    Path(folder, mine).write_text("mine")
    done(cli, again)
    assert Path(folder, mine).read_text() == "mine"
    assert Path(folder, ours).is_file()
    assert not any(name.startswith(".") or "/." in name for name in names(folder))
    if made == "export":
        assert not former & set(names(folder)) - {"README.md", "tinyfusion.json"}, "nothing of the former export"


def test_what_came_to_an_output_meanwhile_is_not_replaced(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = tinyfusion.jobs.sampling_setup.draw_samples

    def late(*given: Any) -> Iterator[Any]:
        yield from drawn(*given)
        Path("made/samples.npz").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.jobs.sampling_setup, "draw_samples", late)
        refused(cli(*shlex.split(SAMPLE)), "made/samples.npz exists and was not made by tinyfusion")
    assert Path("made/samples.npz").read_text() == "mine"
    Path("made/samples.npz").unlink()
    assert "4 of 4 images are there" in done(cli, SAMPLE).err


# ---------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("there", ["file", "folder", "empty"])
def test_a_foreign_folder_of_parts_is_refused(cli: Cli, work: Path, there: str) -> None:
    parts = Path("made/samples.npz.parts")
    if there == "file":
        parts.parent.mkdir()
        parts.write_text("mine")
    else:
        parts.mkdir(parents=True)
        if there == "folder":
            (parts / "images-0000000.npy").write_text("mine")
    before = tree_hash(work)
    for command in (SAMPLE, f"{SAMPLE} --overwrite"):
        refused(cli(*shlex.split(command)), "samples.npz.parts", "was not made by tinyfusion: move it away")
    assert tree_hash(work) == before


def test_notes_in_a_folder_of_parts_stay_alone_in_it(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = tinyfusion.jobs.sampling_setup.draw_samples

    def late(*given: Any) -> Iterator[Any]:
        Path("made/samples.npz.parts/notes.txt").write_text("mine")
        yield from drawn(*given)

    monkeypatch.setattr(tinyfusion.jobs.sampling_setup, "draw_samples", late)
    done(cli, SAMPLE)
    assert names("made/samples.npz.parts") == ["notes.txt"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_parts_left_by_a_kill_after_the_npz_go_with_the_next_call(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(
                "tinyfusion.jobs.sharded_output.ImageShards.remove", lambda _: os.kill(os.getpid(), signal.SIGKILL)
            )
            tinyfusion.cli.main(shlex.split(SAMPLE))
        finally:
            os._exit(77)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert Path("made/samples.npz").is_file() and Path("made/samples.npz.parts/sampling.json").is_file()
    before = tree_hash(work)
    done(cli, f"{SAMPLE} --dry-run")
    assert tree_hash(work) == before
    assert "finished" in done(cli, SAMPLE).err
    assert names("made") == ["samples.json", "samples.npz"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("command", "made"),
    [
        (f"{INDICES} --keep 0,2", "run"),
        (f"{EXPORT} tinyfusion --out out", "."),
        (f"{EXPORT} official --out out.pt", "."),
        (EVALUATE.replace("made/", "") + " --samples images.npz", "."),
    ],
)
def test_what_a_kill_leaves_after_the_last_rename_goes_with_the_next_call(
    cli: Cli, work: Path, command: str, made: str
) -> None:
    """The output is whole, and the folder that it was written in is still there."""
    child = os.fork()
    if child == 0:
        try:
            end = tinyfusion.core.files._end

            def killing(folder: Path, lock: Any) -> None:
                last = "run.json" if made == "run" else command.split("--out ")[1].split()[0]
                done = made != "run" or '"done"' in Path("run/run.json").read_text()
                if folder.name.startswith(f".{last}.") and done and not folder.parent.name.endswith(".part"):
                    os.kill(os.getpid(), signal.SIGKILL)
                end(folder, lock)

            tinyfusion.core.files._end = killing
            tinyfusion.cli.main(shlex.split(command))
        finally:
            os._exit(77)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    hidden = [path for path in Path(made).iterdir() if path.name.startswith(".")]
    assert len(hidden) == (2 if made == "run" else 1)
    before = tree_hash(work)
    done(cli, f"{command} --dry-run")
    assert tree_hash(work) == before
    assert "finished" in done(cli, command).err
    assert not any(path.exists() for path in hidden)


# ------------------------------------------------------------------------------------------------- other processes, disks


def test_a_dry_run_touches_nothing_of_a_run_that_is_being_overwritten(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run while the old run is set aside and the new one has saved nothing yet."""
    done(cli, f"{INDICES} --keep 0,2")
    looked = []

    def look(*_: Any) -> None:
        before = tree_hash(work)
        for more in ("--keep 1 --overwrite --dry-run", "--keep 0,2 --dry-run"):
            looked.append(cli(*shlex.split(f"{INDICES} {more}")).code)
        refused(cli(*shlex.split(f"{INDICES} --keep 1 --overwrite")), "another process writes run right now")
        assert tree_hash(work) == before
        raise UserError("bad")

    with monkeypatch.context() as patch:
        patch.setattr(tinyfusion.commands.prune, "save", look)
        refused(cli(*shlex.split(f"{INDICES} --keep 1,3 --overwrite")), "bad")
    assert looked == [0, 0]
    assert done(cli, "inspect run --json").last_json["kept"] == {"blocks": [0, 2]}
    assert not list(Path("run").rglob(".*"))


def test_a_run_of_another_machine_is_not_taken_for_dead(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(cli, f"{INDICES} --keep 0,2")
    lock = acquire(Path("run", LOCK), "writes run")
    record = json.loads(Path("run", LOCK).read_text())
    os.close(lock.descriptor)
    Path("run", LOCK).write_text(json.dumps({**record, "boot": "another", "host": "far"}))
    monkeypatch.setattr("tinyfusion.core.locks._all_see_locks", lambda _: False)
    before = tree_hash(work)
    overwrite = f"{INDICES} --keep 1,3 --overwrite"
    refused(cli(*shlex.split(overwrite)), f"process {record['pid']} on far", f"remove run/{LOCK} where it has ended")
    assert tree_hash(work) == before
    Path("run", LOCK).unlink()
    done(cli, overwrite)


TOO_LARGE = [
    f"{EXPORT} tinyfusion --out out",
    f"{EXPORT} diffusers --out out",
    f"{EXPORT} official --out out.pt",
    f"{EXPORT} official --out out.safetensors",
    f"{INDICES} --keep 0,2",
]


@pytest.mark.parametrize("command", TOO_LARGE)
def test_a_file_that_is_too_large_is_one_line_and_leaves_nothing(
    cli: Cli, work: Path, largest_file: Callable[[int], None], command: str
) -> None:
    largest_file(2**13)
    before = tree_hash(work)
    refused(cli(*shlex.split(command)), "File too large")
    assert tree_hash(work) == before


def test_an_npz_that_is_too_large_leaves_its_parts_alone(
    cli: Cli, work: Path, largest_file: Callable[[int], None]
) -> None:
    largest_file(2**13)
    refused(cli(*shlex.split(f"{SAMPLE} --num-images 200")), "File too large: made/samples.npz")
    assert {Path(name).parts[0] for name in names("made")} == {"samples.npz.parts"}


@pytest.mark.parametrize("verb", ["prune", "export", "sample"])
def test_all_files_of_an_output_follow_the_umask(cli: Cli, work: Path, verb: str) -> None:
    command = {"prune": PRUNE + " --steps 2 --set prune.training.batch_size=4", "export": f"{EXPORT} diffusers --out out",
               "sample": SAMPLE + " --grid made/grid.png"}[verb]  # fmt: skip
    before = set(work.rglob("*"))
    done(cli, command)
    made = [path for path in set(work.rglob("*")) - before if path.is_file()]
    assert len(made) >= 3
    umask = os.umask(0)
    os.umask(umask)
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in made} == {
        str(path): oct(0o666 & ~umask) for path in made
    }
    assert np.all([path.stat().st_uid == os.getuid() for path in made])
