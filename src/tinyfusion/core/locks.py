"""Locks of outputs: a file that the system locks, with a record of its holder for disks whose locks cannot be trusted."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tinyfusion.core.errors import UserError

LOCK = ".tinyfusion.lock"  # name of the lock file in a folder that is being written

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# disks that no second machine mounts at the same time, and disks whose locks all machines see
_LOCAL = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay", "apfs", "hfs", "vfat",
    "exfat", "ntfs", "ntfs3",
}  # fmt: skip
_SHARING_LOCKS = {"nfs", "nfs4", "ceph", "gpfs", "cifs", "smb3", "lustre"}
_LOCKS_ALONE = {
    "nolock",
    "localflock",
    "nobrl",
    "local_lock=all",
    "local_lock=flock",
}  # options by which each machine does


class Locked(UserError):
    """Another process holds the lock, or may hold it."""


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds until `release`, or until the process ends."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Release the lock, and remove its file unless another one has taken its place."""
        if is_at(self.descriptor, self.path):
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self.descriptor)


def acquire(path: Path, activity: str, sign: bool = True) -> Lock:
    """Lock the file `path`, created where it is missing.

    activity: what its holder does, such as "writes run". sign: whether to write the record of this process into it.

    Raises Locked where another process holds it, or may hold it and the disk cannot tell; OSError where the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            granted = try_lock(descriptor)
            removed = granted is not False and not is_at(descriptor, path)  # by its former holder, just now
            holder = {} if removed else _holder(descriptor)
            state = "alive" if granted is False else _state(holder, path, granted is True)
            if not removed and state != "dead":
                raise Locked(_refusal(path, activity, holder, state))
        except BaseException:
            os.close(descriptor)
            raise
        lock = Lock(path, descriptor)
        if removed:
            lock.release()
            continue
        try:
            if sign:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_own_record()).encode(), 0)
        except BaseException:
            lock.release()
            raise
        return lock


def try_lock(opened: int | IO[bytes], wait: bool = False) -> bool | None:
    """Lock a file that is open for writing, until it is closed: False where another process holds it, None without locks.

    wait: until the other process gives it back.
    """
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except ImportError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------------------------------------------------- holders


@functools.cache
def _machine() -> dict[str, str]:
    """Identity of this machine, of its current boot, and of the pid namespace of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        import psutil

        boot, namespace = f"{psutil.boot_time():.0f}", ""
    return {"host": platform.node(), "boot": boot, "namespace": namespace}


def _own_record() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"made_by": "tinyfusion", **_machine(), "pid": pid, "started": _started(pid), "since": since}


def _holder(descriptor: int) -> dict[str, Any]:
    """The record in a lock file; empty where there is none, as of a file that is new."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("pid"), int) else {}


def _state(holder: dict[str, Any], path: Path, locks: bool) -> str:
    """Whether the process that a record names is "alive", "dead" or "unknown"; locks: the disk has them, and it is free."""
    here = _machine()
    if not holder or (locks and holder.get("boot") == here["boot"]):  # one system knows all its locks
        return "dead"
    if locks:
        return "dead" if _all_see_locks(path) else "unknown"
    if any(holder.get(name) != here[name] for name in ("boot", "namespace")):
        return "unknown"
    return "alive" if holder.get("started") == _started(holder["pid"]) else "dead"


def _started(pid: int) -> str | None:
    """Start time of a process of this machine, as process ids are reused. None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    import psutil

    try:
        return str(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return None


def _all_see_locks(path: Path) -> bool:
    """Whether locks on the file system of `path` hold for every machine that mounts it."""
    import psutil

    place = os.path.realpath(path)
    mounts = [
        disk
        for disk in psutil.disk_partitions(all=True)
        if place.startswith(disk.mountpoint.rstrip("/") + "/") or place == disk.mountpoint
    ]
    if not mounts:
        return False
    disk = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))
    shared = disk.fstype in _SHARING_LOCKS and not _LOCKS_ALONE & set(disk.opts.split(","))
    return disk.fstype in _LOCAL or shared


def _refusal(path: Path, activity: str, holder: dict[str, Any], state: str) -> str:
    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    if state == "alive":
        named = f" ({who})" if holder else ""
        return f"another process {activity} right now{named}: wait for it, or choose another --out"
    return (
        f"another process {activity} ({who}), and this disk cannot tell whether it still runs: wait for it, or remove {path} "
        "where it has ended"
    )
