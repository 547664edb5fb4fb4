"""What surrounds a command: closed and full standard streams, a launcher's variables, threads that cannot be started, odd names."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from material import Cli
from PIL import Image
from test_verbs import PRUNE, SAMPLE, TRAIN, done

import tinyfusion.training.engine
from tinyfusion.config.recipe import ComputeSection
from tinyfusion.core.errors import UserError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def shell(command: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tinyfusion COMMAND`, which may redirect."""
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.quote(sys.executable)} -m tinyfusion {command}"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@needs_full
@pytest.mark.parametrize("command", ["--version", "--help", "recipes", "recipes --list-fields", "recipes --json"])
def test_an_answer_that_cannot_be_written_is_an_error(command: str) -> None:
    code, _, err = shell(f"{command} >/dev/full")
    assert (code, err) == (2, "error: cannot write standard output: no space left on the disk\n")


@needs_full
@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_messages_that_cannot_be_written_are_dropped(streams: str) -> None:
    code, out, _ = shell(f"recipes {streams}")
    assert code == 0 and "digits" in out
    assert shell(f"recipes nothing {streams}") == (2, "", "")


def test_a_verb_without_any_stream_leaves_whole_files(cli: Cli, work: Path) -> None:
    """Files that it opens must not take the numbers of the streams, where libraries print."""
    assert shell(f"{SAMPLE} <&- >&- 2>&-") == (0, "", "")
    without = Path("drawn/samples.npz").read_bytes()
    done(cli, f"{SAMPLE} --overwrite")
    assert Path("drawn/samples.npz").read_bytes() == without


@needs_full
@pytest.mark.parametrize("streams", ["full", "none"])
def test_every_message_of_a_verb_may_be_lost(work: Path, monkeypatch: pytest.MonkeyPatch, streams: str) -> None:
    from tinyfusion.cli import main

    # what it never wrote would fail again when it is closed
    with contextlib.suppress(OSError), FULL.open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full if streams == "full" else None)
        assert main(shlex.split(PRUNE)) == 0
        assert main(shlex.split(SAMPLE)) == 0
        assert main(["inspect", "nothing"]) == 2
        assert sys.stderr is (full if streams == "full" else None)
        reached = True
    assert reached


# ------------------------------------------------------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("RANK=-1", "RANK is a whole number from 0 to 1048575; got '-1'"),
        ("RANK=first", "RANK is a whole number from 0 to 1048575; got 'first'"),
        ("RANK=²", "RANK is a whole number from 0 to 1048575; got '²'"),
        (f"RANK=1{'0' * 5000}", "RANK is a whole number from 0 to 1048575; got '1000"),
        ("RANK=1", "RANK 1 of WORLD_SIZE 1: processes are numbered from 0, below their number"),
        ("RANK=2 WORLD_SIZE=2", "RANK 2 of WORLD_SIZE 2: processes are numbered from 0, below their number"),
        ("WORLD_SIZE=0", "WORLD_SIZE is a whole number from 1 to 1048575; got '0'"),
        ("WORLD_SIZE=1.5", "WORLD_SIZE is a whole number from 1 to 1048575; got '1.5'"),
        ("LOCAL_RANK=-1", "LOCAL_RANK is a whole number from 0 to 0; got '-1'"),
        ("LOCAL_RANK=2 WORLD_SIZE=2", "LOCAL_RANK is a whole number from 0 to 1; got '2'"),
        ("WORLD_SIZE=2", "WORLD_SIZE is 2, and the environment variable MASTER_ADDR is not set"),
        ("WORLD_SIZE=2 MASTER_ADDR=localhost", "WORLD_SIZE is 2, and the environment variable MASTER_PORT is not set"),
        ("WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=http", "MASTER_PORT is a whole number from 1 to 65535; got 'http'"),
        ("WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=65536", "MASTER_PORT is a whole number from 1 to 65535"),
    ],
)  # fmt: skip
def test_variables_of_a_launcher(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, variables: str, message: str
) -> None:
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    outcome = cli(*shlex.split(SAMPLE))
    assert outcome.code == 2
    assert message in outcome.err and outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    assert not Path("drawn").exists()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tinyfusion.training.engine, "choose_device", torch.device)
    with pytest.raises(UserError, match="process 1 of this machine has no GPU: there are 1"):
        tinyfusion.training.engine.open_engine("cuda", ComputeSection())


# --------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("which", ["batches ahead", "checkpoint", "ThreadPoolExecutor"])
def test_no_thread_can_be_started(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    began: Callable[..., None] = threading.Thread.start

    def start(self: threading.Thread, *given: Any) -> None:
        if self.name.startswith(which):
            raise RuntimeError("can't start new thread")
        began(self, *given)

    command = f"{SAMPLE} --png pictures" if which == "ThreadPoolExecutor" else PRUNE
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        outcome = cli(*shlex.split(command))
    assert outcome.code == 2, outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: the system starts no more threads for this user") and "Traceback" not in outcome.err
    done(cli, command)


# ----------------------------------------------------------------------------------------------------------------- names

ODD = os.fsdecode(b"n\xff")  # bytes that are no UTF-8


@pytest.fixture
def odd(work: Path) -> Path:
    """Material under names that are not UTF-8."""
    if sys.platform == "darwin":
        pytest.skip("the disk takes names in UTF-8 alone")
    Path("good.pt").rename(f"{ODD}.pt")
    Path("good.toml").rename(f"{ODD}.toml")
    Path("images.npz").rename(f"{ODD}.npz")
    Path(ODD, ODD).mkdir(parents=True)
    shutil.copytree("teacher", f"teacher{ODD}")
    for index in range(12):
        Image.new("L", (8, 8), 20 * index).save(Path(ODD, ODD, f"{index}{ODD}.png"))
    return work


WORKS = {  # command -> files that it leaves
    "sample": (f"sample --model teacher --num-images 2 --sampler ddim --num-steps 2 --out {ODD}/x.npz --png {ODD}/png --grid {ODD}/g.png",
               ("x.npz", "x.json", "g.png", "png/000001.png")),
    "evaluate": (f"evaluate --samples {ODD}.npz --reference digits:heldout --out {ODD}/e.json", ("e.json",)),
    "train": (f"{TRAIN} --data {ODD}", ()),
    "recipe": (f"prune --recipe {ODD}.toml --set data.name={ODD}.npz --keep 0,1 --out pruned", ()),
    "export": (f"export --model teacher --to diffusers --out {ODD}/exported", ("exported/README.md",)),
}  # fmt: skip


@pytest.mark.parametrize("what", WORKS)
def test_names_that_are_not_utf_8(cli: Cli, odd: Path, what: str) -> None:
    command, left = WORKS[what]
    done(cli, command)
    assert all(Path(ODD, name).is_file() for name in left)


def test_a_page_and_a_record_of_names_that_are_not_utf_8(cli: Cli, odd: Path) -> None:
    done(cli, f"{TRAIN} --data {ODD}")
    assert json.loads(Path("trained/run.json").read_text(encoding="utf-8"))["recipe"]["data"]["name"] == ODD
    Path("trained").rename(f"trained{ODD}")
    done(cli, f"report trained{ODD} --out {ODD}.html")
    page = Path(f"{ODD}.html").read_text(encoding="utf-8")
    assert r"trainedn\udcff" in page


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{PRUNE}{ODD}", r"prunedn\udcff is not UTF-8, and safetensors and torch open no such file"),
        (f"inspect {ODD}.pt --num-heads 2", r"n\udcff.pt is not UTF-8, and safetensors and torch open no such file"),
        (f"inspect teacher{ODD}", r"teachern\udcff/model.safetensors is not UTF-8, and safetensors and torch"),
        (f"inspect {ODD}nothing", r"no model at n\udcffnothing"),
        (f"prune --teacher teacher --data hub:org/{ODD} --out pruned", r"'org/n\udcff' is no data set of the hub"),
        (f"prune --teacher teacher --data parquet:{ODD} --out pruned", r"no parquet data at n\udcff"),
        (f"{PRUNE} --set {ODD}=1", r"unknown field 'n\udcff'"),
        (f"{PRUNE} --scheme {ODD}", r"n\udcff"),
        (f"{PRUNE} --{ODD}", r"prune has no option --n\udcff"),
        (ODD, r"unknown verb 'n\udcff'"),
    ],
)  # fmt: skip
def test_names_that_are_not_utf_8_in_messages(cli: Cli, odd: Path, command: str, message: str) -> None:
    outcome = cli(*shlex.split(command))
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith("error: ")
    assert message in outcome.err and "Traceback" not in outcome.err
