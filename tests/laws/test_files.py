"""Files and locks: files of others stay, the record of a lock names its holder, and permissions are the usual ones."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tinyfusion.core import locks
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import atomic_write, check_writable, remove_written, write_json, write_text
from tinyfusion.core.locks import LOCK, Locked, acquire
from tinyfusion.core.ranks import complete_file, wait_for_files
from tinyfusion.core.rundir import RunDirectory

RECIPE = {"seed": 0}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.relpath(path))  # a socket's path is short
        listener.close()
    else:
        path.symlink_to(os.devnull)


# -------------------------------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_special_files_are_refused_at_the_beginning_and_at_the_rename(tmp_path: Path, kind: str) -> None:
    special(tmp_path / "there", kind)
    before = (tmp_path / "there").stat()
    for write in (
        check_writable,
        lambda path: write_text(path, "x"),
        lambda path: RunDirectory(path).check("a", {}, True),
    ):
        with pytest.raises(UserError, match=f"there is a {kind}: wanted a regular file or a folder"):
            write(tmp_path / "there")
    assert (tmp_path / "there").stat() == before

    def late() -> None:
        with atomic_write(tmp_path / "late") as temporary:
            temporary.write_text("x")
            special(tmp_path / "late", kind)

    with pytest.raises(UserError, match=f"late is a {kind}"):
        late()
    assert names(tmp_path) == ["late", "there"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_file_does_not_replace_a_folder_nor_the_other_way(tmp_path: Path, there: str) -> None:
    def write() -> None:
        with atomic_write(tmp_path / "out") as temporary:
            if there == "file":
                temporary.mkdir()
                (tmp_path / "out").write_text("mine")
            else:
                temporary.write_text("new")
                (tmp_path / "out").mkdir()

    with pytest.raises(UserError, match=f"it is a {there}, wanted a"):
        write()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").is_file() == (there == "file")


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "x.json").write_text("{}")
    (tmp_path / "x.json").symlink_to("disk/x.json")
    write_json(tmp_path / "x.json", [1])
    assert (tmp_path / "x.json").is_symlink()
    assert json.loads((tmp_path / "disk" / "x.json").read_text()) == [1]
    assert names(tmp_path) == ["disk", "disk/x.json", "x.json"]


def test_files_of_others_in_a_replaced_folder_and_links_do_not_count_as_written(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "samples"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("of another program")
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        (temporary / "model.json").write_text("{}")
    (tmp_path / "run" / "x.json").symlink_to(tmp_path / "disk.json")
    write_json(tmp_path / "run" / "x.json", [1])
    remove_written(tmp_path / "run")
    assert names(tmp_path) == ["disk.json", "run", "run/samples", "run/samples/notes.txt", "run/x.json"]


def test_a_file_of_a_rank_is_complete_or_absent(tmp_path: Path) -> None:
    def write(fail: bool) -> None:
        with complete_file(tmp_path / "out" / "x") as temporary:
            temporary.write_text("whole")
            assert names(tmp_path / "out") == [".x.part"]
            if fail:
                raise ValueError

    with pytest.raises(UserError, match="out was removed while it was being written: start the same command again"):
        write(False)
    (tmp_path / "out").mkdir()
    pytest.raises(ValueError, write, True)
    assert names(tmp_path / "out") == []
    write(False)
    assert (tmp_path / "out" / "x").read_text() == "whole"


def test_files_of_other_ranks_are_waited_for_while_they_grow(tmp_path: Path) -> None:
    def write() -> None:
        with complete_file(tmp_path / "b") as temporary:
            for _ in range(10):
                with open(temporary, "a") as file:
                    file.write("x")
                time.sleep(0.2)

    (tmp_path / "a").touch()
    thread = threading.Thread(target=write)
    thread.start()
    wait_for_files({tmp_path / "a": 0, tmp_path / "b": 1}, 2, timeout_s=1.5)
    thread.join()
    with pytest.raises(UserError, match=r"1 of 2 files are missing \(.*/c\) .* for 0.1 s: process 1 of 2 has ended"):
        wait_for_files({tmp_path / "a": 0, tmp_path / "c": 1}, 2, timeout_s=0.1)
    with pytest.raises(UserError, match="gone was removed"):
        wait_for_files({tmp_path / "gone" / "c": 1}, 2, timeout_s=0.1)


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def write() -> None:
        with atomic_write(Path()) as temporary:
            temporary.mkdir()

    with pytest.raises(UserError, match="cannot replace the current folder"):
        write()
    assert names(tmp_path) == ["here"]


def test_what_may_not_be_looked_into_is_not_called_missing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user is needed")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for folder in (folder for folder in (tmp_path, *tmp_path.parents) if "pytest" in str(folder)):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="cannot write .*closed/run: Permission denied"):
            RunDirectory(closed / "run").check("prune", RECIPE, False)
        with pytest.raises(UserError, match="cannot write .*: .* is read-only for you"):
            check_writable(tmp_path / "new")
    finally:
        os.seteuid(0)


# ------------------------------------------------------------------------------------------- permissions, and full disks


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    former = os.umask(umask)
    try:
        with atomic_write(tmp_path / "model") as temporary:
            temporary.mkdir()
            save_file({"x": torch.zeros(2)}, temporary / "model.safetensors")
            write_json(temporary / "model.json", {})
        with atomic_write(tmp_path / "x.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
    finally:
        os.umask(former)
    for name in ("model/model.safetensors", "model/model.json", "x.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


@pytest.mark.parametrize("kind", ["safetensors", "text"])
def test_a_file_that_is_too_large_names_itself_and_leaves_nothing(
    tmp_path: Path, largest_file: Callable[[int], None], kind: str
) -> None:
    largest_file(2**16)

    def write() -> None:
        with atomic_write(tmp_path / "above" / "out") as temporary:
            if kind == "text":
                temporary.write_text("x" * 2**17)
            else:
                save_file({"x": torch.zeros(2**17)}, temporary)

    error = pytest.raises(OSError, write).value  # noqa: PT011 (its number is checked)
    assert (error.errno, error.filename) == (errno.EFBIG, str(tmp_path / "above" / "out"))
    assert names(tmp_path) == []


def test_names_that_are_no_utf8_can_be_written_down(tmp_path: Path) -> None:
    write_text(tmp_path / "page.html", os.fsdecode(b"folder \xff"))
    assert (tmp_path / "page.html").read_text() == "folder \\udcff"
    run = RunDirectory(tmp_path / "run")
    with run.writing("prune", RECIPE):
        run.note(os.fsdecode(b"folder \xff"))
        run.mark("done")
    assert (run.path / "log.txt").read_text() == "folder \\udcff\n"


# --------------------------------------------------------------------------------------------------------------- locks


HOLD = """
import sys, time
from pathlib import Path
from tinyfusion.core.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])).writing("prune", {"seed": 0}):
    print("locked", flush=True)
    time.sleep(60)
"""
OVERWRITE = """
import sys
from pathlib import Path
from tinyfusion.core.rundir import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
assert run.check("prune", {"seed": 1}, True) == "new"
with run.writing("prune", {"seed": 1}, overwrite=True):
    print("never")
"""


def test_a_live_run_is_respected_from_another_process_namespace(tmp_path: Path) -> None:
    """As from another container: the number of the process that writes means nothing there."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
            before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
            inner = [sys.executable, "-c", OVERWRITE, str(tmp_path / "run")]
            apart = ["unshare", "--pid", "--fork", "--"] if os.geteuid() == 0 else []
            probe = subprocess.run([*apart, "true"], check=False, capture_output=True)
            done = subprocess.run([*(apart if probe.returncode == 0 else []), *inner], capture_output=True, text=True)
            assert "another process writes" in done.stderr.splitlines()[-1]
            assert f"process {holder.pid} on " in done.stderr
            assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        finally:
            holder.kill()
    with RunDirectory(tmp_path / "run").writing("prune", RECIPE) as mode:
        assert mode == "continue", "the lock has gone with its holder"
    assert names(tmp_path) == ["run", "run/run.json"]


def sign(path: Path, **changed: Any) -> None:
    """Write a lock file without the lock."""
    path.write_text(json.dumps({**locks._own_record(), **changed}))


NO_LOCKS, LOCKS = "no locks", "locks"
ELSEWHERE = {"boot": "other", "host": "there"}
CASES = [  # locks of the disk, what is different in the record, type and an option of the disk, and what follows
    (LOCKS, {}, "ext4", "taken"),
    (LOCKS, {"boot": "other"}, "ext4", "taken"),
    (LOCKS, ELSEWHERE, "nfs4", "taken"),
    (LOCKS, ELSEWHERE, "nfs local_lock=all", "unknown"),
    (LOCKS, ELSEWHERE, "lustre flock", "taken"),
    (LOCKS, ELSEWHERE, "lustre localflock", "unknown"),
    (LOCKS, ELSEWHERE, "cifs nobrl", "unknown"),
    (LOCKS, ELSEWHERE, "fuse.sshfs", "unknown"),
    (LOCKS, {"namespace": "other"}, "fuse.sshfs", "taken"),
    (NO_LOCKS, {}, "fuse.sshfs", "alive"),
    (NO_LOCKS, {"started": "1"}, "fuse.sshfs", "taken"),
    (NO_LOCKS, {"pid": 2**22, "started": "1"}, "fuse.sshfs", "taken"),
    (NO_LOCKS, {"namespace": "other"}, "ext4", "unknown"),
    (NO_LOCKS, ELSEWHERE, "nfs4", "unknown"),
]


@pytest.mark.parametrize(("kind", "changed", "disk", "outcome"), CASES)
def test_a_lock_that_cannot_tell_asks_the_record_of_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changed: dict[str, Any], disk: str, outcome: str
) -> None:
    kind_of_disk, _, option = disk.partition(" ")
    mount = type("Mount", (), {"mountpoint": "/", "fstype": kind_of_disk, "opts": f"rw,{option or 'local_lock=none'}"})
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: [mount])
    if kind == NO_LOCKS:

        def flock(*_: Any) -> None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(fcntl, "flock", flock)
    sign(tmp_path / LOCK, **changed)
    record = json.loads((tmp_path / LOCK).read_text())
    if outcome == "taken":
        acquire(tmp_path / LOCK, "writes run").release()
        assert names(tmp_path) == []
        return
    with pytest.raises(Locked) as refused:
        acquire(tmp_path / LOCK, "writes run")
    said = str(refused.value)
    assert f"process {record['pid']} on {record['host']}, since {record['since']}" in said
    assert ("right now" in said) == (outcome == "alive")
    assert (f"remove {tmp_path / LOCK} where it has ended" in said) == (outcome == "unknown")
    assert json.loads((tmp_path / LOCK).read_text()) == record


def test_a_lock_that_cannot_be_signed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for write in (
        lambda: acquire(tmp_path / LOCK, "writes run"),
        lambda: write_text(tmp_path / "above" / "x", "x"),
        lambda: RunDirectory(tmp_path / "above" / "run").writing("prune", RECIPE).__enter__(),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert names(tmp_path) == []


def test_a_lock_file_that_goes_while_it_is_waited_for_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / LOCK, fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    lock = acquire(path, "writes run")
    with pytest.raises(Locked):
        acquire(path, "writes run")
    lock.release()
    assert names(tmp_path) == []
