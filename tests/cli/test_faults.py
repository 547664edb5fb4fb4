"""What happens to trainings: killed, out of disk or memory, without their folder, data or company, with bad numbers.

Each fault ends in a bounded time with one clear line, leaves the last checkpoint as it was, and the same command goes on to
what an undisturbed run gives, bit for bit. `benchmarks/fault_harness.py` does the kills at length.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import Cli, Outcome, tiny
from sittings import Sitting, Starter, until
from test_verbs import done

import tinyfusion.commands.prune
import tinyfusion.jobs.training
from tinyfusion.cli import main
from tinyfusion.core import rundir
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_metrics
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.models.checkpoint import save_model

STEPS = 16
SETTINGS = "batch_size=8 learning_rate=1e-3 ema_decay=0.9 log_every_steps=1 checkpoint_every_steps=4"


def settings(section: str) -> str:
    return " ".join(f"--set {section}.{setting}" for setting in [f"steps={STEPS}", *SETTINGS.split()])


LEARN = f"prune --teacher teacher --scheme 1:2 {settings('prune.training')} --out"
RECOVER = f"recover --teacher teacher --student student {settings('recover.training')} --out"
SMALL = "--set model.family=dit --set model.hidden_size=32 --set model.depth=2 --set model.num_heads=2"
TRAIN = f"train {SMALL} {settings('train')} --out"


def result(run: str | Path) -> dict[str, Any]:
    """All of a run that no clock decides."""
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "waiting")} for line in read_metrics(Path(run))]
    weights = {
        str(p.parent.name): hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(run).glob("*/model.safetensors")
    }
    plan = Path(run, "plan.json")
    decided = {k: v for k, v in json.loads(plan.read_text()).items() if k != "cost"} if plan.exists() else {}
    return {"metrics": lines, "plan": decided, **weights}


def checkpoints(run: str | Path) -> list[int]:
    """Steps of the finished ones, which are sound."""
    for path in Path(run, "checkpoints").glob("step-*"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=True)
    return sorted(int(path.name.removeprefix("step-")) for path in Path(run, "checkpoints").glob("step-*"))


def failed(outcome: Outcome, *message: str) -> None:
    last = outcome.err.splitlines()[-1]
    assert (outcome.code, "Traceback" in outcome.err) == (2, False), outcome.err
    assert outcome.err.count("error: ") == 1 and last.startswith("error: "), outcome.err
    assert all(part in last for part in message), last


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], None], written: str = "") -> None:
    """Do something when a step is made, before its caller hears of it. written: what a thread must have finished by then."""
    steps = tinyfusion.jobs.training.train_steps

    def acted(*given: Any, **named: Any) -> Iterator[Any]:
        for record in steps(*given, **named):
            if record.step == step:
                until(Path(written).exists)
                act()
            yield record

    patch.setattr(tinyfusion.jobs.training, "train_steps", acted)


@pytest.fixture(scope="module")
def undisturbed(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of both commands where nothing happens."""
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    with chdir(material):
        for command in (LEARN, RECOVER):
            assert main(shlex.split(f"{command} {folder / command[:3]}")) == 0
            found[command] = result(folder / command[:3])
    return found


# --------------------------------------------------------------------------------------------------- processes that are killed


@pytest.fixture
def start(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    starter = Starter(work)
    yield starter
    starter.clear()


def steps_in(run: str) -> int:
    path = Path(run, "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def starts(run: str) -> list[int]:
    """The steps from which the sittings of a run went on."""
    log = Path(run, "log.txt")
    return (
        [int(line.split()[-1]) for line in log.read_text().splitlines() if "from step" in line] if log.exists() else []
    )


@contextmanager
def at_work(run: str) -> Iterator[None]:
    """Around the start of a sitting: then wait until it has made two steps by itself."""
    before = len(starts(run))
    yield
    until(lambda: len(starts(run)) > before and steps_in(run) >= starts(run)[-1] + 2)


def test_killed_twice_and_stopped_once(start: Starter, cli: Cli, undisturbed: dict[str, Any]) -> None:
    command = shlex.split(f"{LEARN} run")
    first = start(*command, pace_s=0.02)
    until(lambda: steps_in("run") > 5 and checkpoints("run"))  # a thread writes them, perhaps later
    first.send(signal.SIGKILL)
    assert first.end() == 128 + signal.SIGKILL
    assert set(checkpoints("run")) <= {4, 8}

    second = start(*command, pace_s=0.02)
    until(lambda: list(Path("run/checkpoints").glob(".step-*.part")))
    second.send(signal.SIGKILL)
    assert second.end() == 128 + signal.SIGKILL
    before = checkpoints("run")
    assert before

    with at_work("run"):
        third = start(*command, pace_s=0.02)
    third.send(signal.SIGTERM)
    assert third.end() == 128 + signal.SIGTERM
    assert third.said.splitlines()[-1] == "interrupted by SIGTERM; saved, the same command continues"
    assert checkpoints("run")[-1] == steps_in("run")

    done(cli, f"{LEARN} run")
    assert result("run") == undisturbed[LEARN]
    assert not list(Path("run").rglob(".*"))


def two_at_work(start: Starter, run: str, options: str = "") -> tuple[Sitting, Sitting]:
    """Two processes that have made at least two steps in `run` by themselves."""
    with at_work(run):
        return start.two(*shlex.split(f"{LEARN} {run} {options}"), pace_s=0.05)


def test_two_processes_lose_each_other(start: Starter) -> None:
    """One rank ends, hangs or gets a signal: the other does not wait for ever, and nothing is lost."""
    for one in start.two(*shlex.split(f"{LEARN} undisturbed")):
        assert one.end() == 0, one.said

    for victim in (1, 0):
        pair = two_at_work(start, "run")
        pair[victim].send(signal.SIGKILL)
        assert pair[victim].end() == 128 + signal.SIGKILL
        assert_lost(pair[1 - victim], 1 - victim)
    pair = two_at_work(start, "run", "--set compute.timeout_s=5")
    pair[1].send(signal.SIGSTOP)
    stopped = time.monotonic()
    assert_lost(pair[0], 0, "Timed out waiting 5000ms")
    assert time.monotonic() - stopped > 3
    pair[1].send(signal.SIGCONT)
    assert_lost(pair[1], 1)

    pair = two_at_work(start, "run")
    pair[1].send(signal.SIGTERM)
    assert [one.end() for one in pair] == [128 + signal.SIGTERM] * 2
    for one in pair:
        assert one.said.splitlines()[-1] == "interrupted by SIGTERM; saved, the same command continues"
    assert checkpoints("run")[-1] == steps_in("run")

    for one in start.two(*shlex.split(f"{LEARN} run")):
        assert one.end() == 0, one.said
    assert result("run") == result("undisturbed")


def assert_lost(survivor: Sitting, rank: int, *message: str) -> None:
    assert survivor.end() == 2, survivor.said
    last = survivor.said.splitlines()[-1]
    assert last.startswith(f"error: process {rank} of 2 has lost another one, which ended or hangs ("), survivor.said
    assert last.endswith("the same command continues from the last checkpoint")
    assert all(part in last for part in message), last
    assert "Traceback" not in survivor.said


def test_an_error_on_one_process_ends_the_other(start: Starter) -> None:
    """Before anything was said, and in the middle."""
    command = shlex.split(f"{LEARN} run")
    short = (*command, "--set", "compute.timeout_s=4")
    waiting, wrong = start.two(*short, other=(*short, "--teacher", "gone"))
    assert wrong.end() == 2
    assert wrong.said.splitlines()[-1].startswith("error: no model at gone")
    assert waiting.end() == 2
    assert_lost(waiting, 0)
    assert not Path("run").exists()

    waiting, wrong = start.two(*command, other=(*command, "--data", "large.npz"))
    assert (wrong.end(), waiting.end()) == (2, 2)
    assert "the model takes (1, 8, 8)" in wrong.said.splitlines()[-1]
    assert_lost(waiting, 0)
    assert not Path("run").exists()


def test_memory_that_is_really_not_there(start: Starter) -> None:
    started = start(*shlex.split(f"{TRAIN} run --data digits --set train.batch_size=40000"), memory_bytes=2**29)
    assert started.end() == 2, started.said
    last = started.said.splitlines()[-1]
    assert last.startswith(
        "error: out of memory: use a smaller batch; in training, --gradient-accumulation-steps and --gradient-checkpointing"
    )
    assert not Path("run").exists()


# ------------------------------------------------------------------------------------------------------ disk, folder, memory


@pytest.fixture
def disk(work: Path) -> Iterator[Path]:
    """A disk of 64 MiB of its own, in the current folder."""
    folder = work / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(disk: Path, leave: int = 0) -> None:
    """Leave so many bytes."""
    with open(disk / "ballast", "wb", buffering=0) as file:
        file.write(bytes(max(shutil.disk_usage(disk).free - leave, 0)))


FULL = {
    "checkpoint": ("cannot write checkpoint disk/run/checkpoints/step-0000012: no space left on the disk", "step-0000008, is as it was"),
    "record": ("cannot write disk/run/run.json: no space left on the disk", "the same command continues"),
    "student": ("no space left on the disk", "then the same command continues"),
    "log": ("cannot write disk/run/metrics.jsonl: no space left on the disk",),
}  # fmt: skip


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_up(
    cli: Cli, disk: Path, monkeypatch: pytest.MonkeyPatch, what: str, undisturbed: dict[str, Any]
) -> None:
    command = f"{LEARN} disk/run" + (" --set prune.training.checkpoint_every_steps=99" if what == "log" else "")
    with monkeypatch.context() as patch:
        if what == "student":
            write = tinyfusion.commands.prune.save

            def save(*given: Any) -> None:
                fill_up(disk)
                write(*given)

            patch.setattr(tinyfusion.commands.prune, "save", save)
        else:
            leave = {"checkpoint": 2**16, "record": 2**12, "log": 0}[what]  # a record has two pages of 4 KiB
            first = what == "log"
            written = "" if first else "disk/run/checkpoints/step-0000008"
            at_step(patch, 2 if first else 9, lambda: fill_up(disk, leave), written)
        failed(cli(*shlex.split(command)), *FULL[what])
    assert checkpoints("disk/run") == {"checkpoint": [4, 8], "record": [4, 8], "student": [12, 16], "log": []}[what]
    (disk / "ballast").unlink()
    done(cli, command)
    assert result("disk/run") == undisturbed[LEARN]


def test_a_disk_that_becomes_read_only(
    cli: Cli, disk: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    with monkeypatch.context() as patch:

        def refuse(file: Path, *_: Any, **__: Any) -> None:  # the kernel does not ask who has files open
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))

        at_step(
            patch, 9, lambda: patch.setattr(rundir, "open", refuse, raising=False), "disk/run/checkpoints/step-0000008"
        )
        failed(cli(*shlex.split(f"{LEARN} disk/run")), "cannot write disk/run/metrics.jsonl: Read-only file system")
    remount("ro")
    failed(cli(*shlex.split(f"{LEARN} disk/run")), "disk/run is read-only for you")
    remount("rw")
    assert checkpoints("disk/run") == [4, 8]
    done(cli, f"{LEARN} disk/run")
    assert result("disk/run") == undisturbed[LEARN]


@pytest.mark.parametrize("every", [1, 3])
def test_a_folder_that_is_moved_away(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, every: int, undisturbed: dict[str, Any]
) -> None:
    command = f"{LEARN} run --set prune.training.log_every_steps={every}"

    with monkeypatch.context() as patch:
        at_step(patch, 10, partial(os.rename, "run", "elsewhere"), "run/checkpoints/step-0000008")
        failed(cli(*shlex.split(command)), "the run folder run was removed, moved or emptied", "put it back")
    assert not Path("run").exists(), "nothing grows where it was"
    assert checkpoints("elsewhere") == [4, 8]
    Path("elsewhere").rename("run")
    done(cli, command)
    wanted = undisturbed[LEARN]
    logged = [line for line in wanted["metrics"] if line["step"] % every == 0 or line["step"] == STEPS - 1]
    assert result("run") == {**wanted, "metrics": logged}


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), UserError("cannot write checkpoint")])
def test_whatever_fails_first_in_a_folder_that_is_moved_away(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The thread that writes a checkpoint may hear of it before the log does."""

    def move() -> None:
        os.rename("run", "elsewhere")
        raise error

    with monkeypatch.context() as patch:
        at_step(patch, 10, move, "run/checkpoints/step-0000008")
        failed(cli(*shlex.split(f"{LEARN} run")), "the run folder run was removed, moved or emptied", "put it back")


@pytest.mark.parametrize("where", ["step", "data"])
def test_memory_that_runs_out(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, where: str, undisturbed: dict[str, Any]
) -> None:

    def exhaust() -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried\nframe #0"
        )

    with monkeypatch.context() as patch:
        if where == "step":
            at_step(patch, 9, exhaust)
        else:
            disturb_data(patch, 9, exhaust)
        failed(cli(*shlex.split(f"{RECOVER} run")), "out of memory: use a smaller batch", "--gradient-checkpointing")
    assert checkpoints("run") == [4, 8]
    done(cli, f"{RECOVER} run")
    assert result("run") == undisturbed[RECOVER]


def disturb_data(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something when the batch of a step is read, on the thread that reads it."""
    read = ShuffledBatches.__call__

    def reading(self: ShuffledBatches, number: int, *given: Any) -> Any:
        if number == step:
            act()
        return read(self, number, *given)

    patch.setattr(ShuffledBatches, "__call__", reading)


def test_data_that_does_not_come(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tinyfusion.core.ahead._CLOSING_S", 0.2)
        never = threading.Event()
        disturb_data(patch, 9, never.wait)
        stuck = cli(*shlex.split(f"{RECOVER} run --set compute.timeout_s=1"))
        never.set()
    failed(stuck, "the data of step 9 did not come within 1 s", "compute.timeout_s")
    assert checkpoints("run") == [4, 8]
    done(cli, f"{RECOVER} run")
    assert result("run") == undisturbed[RECOVER]


# ---------------------------------------------------------------------------------------------------------------- bad numbers


def spoil(name: str, rows: list[int]) -> None:
    """A data set with images that no loss survives: finite, but their squares are not."""
    data = np.load("images.npz")
    images = data["arr_0"].astype(np.float32) / 127.5 - 1
    images[rows] = 1e30
    np.savez(name, images, data["arr_1"])


VERBS = {"prune": LEARN, "recover": RECOVER, "train": TRAIN}


@pytest.mark.parametrize("verb", VERBS)
def test_bad_images_are_skipped_and_can_be_looked_at(cli: Cli, work: Path, verb: str) -> None:
    spoil("spoilt.npz", [7, 21])
    done(cli, f"{VERBS[verb]} run --data spoilt.npz")
    lines = read_metrics(Path("run"))
    bad = [line for line in lines if not line["applied"]]
    assert len(lines) == STEPS and 3 <= len(bad) <= 7  # 40 images: two of them in every five steps of 8
    assert sum(len(line["bad_samples"]) for line in bad) in (6, 7)
    assert all(
        line["loss"] is None and "bad_samples" not in other for line in bad for other in lines if other["applied"]
    )
    outcome = done(cli, f"replay run --step {bad[-1]['step']} --json").last_json
    assert [s["sample"] for s in outcome["samples"] if s["loss"] is None] == bad[-1]["bad_samples"]
    assert outcome["logged_loss"] is None
    good = next(line for line in reversed(lines) if line["applied"])
    outcome = done(cli, f"replay run --step {good['step']} --json").last_json
    assert outcome["from_checkpoint"] > 0
    assert outcome["logged_loss"] == good["loss"]
    assert math.isclose(sum(s["loss"] for s in outcome["samples"]) / 8, good["loss"], rel_tol=1e-6)
    assert math.isclose(outcome["gradient_norm"], good["gradient_norm"], rel_tol=1e-5)


@pytest.mark.parametrize("verb", VERBS)
def test_numbers_gone_bad_for_good_end_it_and_can_be_replayed(cli: Cli, work: Path, verb: str) -> None:
    spoil("spoilt.npz", list(range(40)))
    outcome = cli(
        *shlex.split(
            f"{VERBS[verb]} run --data spoilt.npz --set {verb}{'' if verb == 'train' else '.training'}.max_bad_steps=3"
        )
    )
    failed(
        outcome,
        "3 steps in a row had a non-finite loss",
        "the last at step 2 (images 16 to 23",
        "tinyfusion replay RUN --step 2",
    )
    assert [line["applied"] for line in read_metrics(Path("run"))] == [False] * 3
    shown = done(cli, "replay run --step 2")
    assert len(shown.out.splitlines()) == 10
    assert "step 2 (from the checkpoint of 0 steps): loss " in shown.out.splitlines()[-1]


def test_replay_says_what_it_cannot_do(cli: Cli, work: Path) -> None:
    done(cli, f"{LEARN} run")
    failed(cli(*shlex.split(f"replay run --step {STEPS}")), f"run has steps 0 to {STEPS - 1}; got --step {STEPS}")
    shutil.rmtree("teacher")
    save_model(tiny(8), Path("teacher"))
    failed(cli(*shlex.split("replay run --step 3")), "the teacher of run was", "restore the former")
    record = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    for part, value, message in (
        ("job", None, "job is a section"), ("job", {}, "job.recipe is missing"), ("recipe", None, "holds no training"),
        ("job", {**record["job"], "num_heads": "two"}, "job.num_heads wants a whole number"),
        ("job", {"recipe": {"train": {"learning_rate_end": 0.0}}}, "unknown field 'job.recipe.train.learning_rate_end'"),
    ):  # fmt: skip
        Path("run/run.json").write_text(json.dumps({**record, part: value}), encoding="utf-8")
        failed(cli(*shlex.split("replay run --step 3")), message)
    done(cli, "prune --teacher teacher --keep 0,2 --out named")
    failed(cli(*shlex.split("replay named --step 0")), "named was decided by indices, which trains nothing")
    failed(cli(*shlex.split("replay thesis --step 3")), "thesis")


def test_numbers_gone_bad_in_a_whole_run(cli: Cli, work: Path) -> None:
    spoil("spoilt.npz", list(range(40)))
    learning = "--set prune.training.steps=8 --set prune.training.batch_size=8 --set prune.training.max_bad_steps=3"
    others = "--set recover.training.steps=2 --set recover.training.ema_decay=0 --set sample.num_images=8 --set evaluate.references=digits"
    failed(
        cli(*shlex.split(f"run --recipe good.toml --out whole --set data.name=spoilt.npz {learning} {others}")),
        "the last at step 2",
    )
    failed(cli(*shlex.split("replay whole --step 2")), "several trainings: name whole/prune, whole/recover")
    assert done(cli, "replay whole/prune --step 2 --json").last_json["gradient_norm"] is None
