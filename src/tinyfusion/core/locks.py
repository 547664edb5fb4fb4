"""Locks of outputs: a lock file (flock) with a record of its holder, which decides on file systems without working locks."""

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
# file systems of one machine, and shared ones whose locks all machines see
_LOCAL = {
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay", "apfs", "hfs", "vfat",
    "exfat", "ntfs", "ntfs3",
}  # fmt: skip
_SHARING_LOCKS = {"nfs", "nfs4", "ceph", "gpfs", "cifs", "smb3", "lustre"}
# mount options that make locks local to a machine
_LOCKS_ALONE = {"nolock", "localflock", "nobrl", "local_lock=all", "local_lock=flock"}


class Locked(UserError):
    """Another process holds the lock, or may hold it."""


@dataclass(frozen=True)
class Lock:
    """A lock of this process, until `release` or the end of the process."""

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

    activity: of the holder, for messages, such as "writes run". sign: write the record of this process into the file.
    Raises Locked if another process has the lock, or may have it on a file system without working locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        lock = Lock(path, descriptor)
        try:
            granted = try_lock(descriptor)
            if granted is not False and not is_at(descriptor, path):  # the previous holder has just removed the file
                os.close(descriptor)
                continue
            holder = _holder(descriptor)
            state = "alive" if granted is False else _state(holder, path, granted is True)
        except BaseException:
            os.close(descriptor)
            raise
        if state != "dead":
            os.close(descriptor)
            raise Locked(_refusal(path, activity, holder, state))
        try:
            if sign:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_own_record()).encode(), 0)
        except BaseException:
            lock.release()
            raise
        return lock


def try_lock(opened: int | IO[bytes], wait: bool = False) -> bool | None:
    """Lock an open file until it is closed; `wait` for other processes. False: another has the lock; None: no file locks."""
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
    """Whether `path` still names this open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


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
    """The record in a lock file; empty in a new file or a damaged one."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("pid"), int) else {}


def _state(holder: dict[str, Any], path: Path, locks: bool) -> str:
    """Whether the process of a record is "alive", "dead" or "unknown". locks: the disk has locks, and this one is free."""
    here = _machine()
    if not holder or (locks and holder.get("boot") == here["boot"]):  # a kernel knows all locks of its own processes
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

    place = path.resolve()
    mounts = [disk for disk in psutil.disk_partitions(all=True) if place.is_relative_to(disk.mountpoint)]
    if not mounts:
        return False
    disk = max(reversed(mounts), key=lambda mount: len(mount.mountpoint))
    shared = disk.fstype in _SHARING_LOCKS and not _LOCKS_ALONE & set(disk.opts.split(","))
    return disk.fstype in _LOCAL or shared


def _refusal(path: Path, activity: str, holder: dict[str, Any], state: str) -> str:
    who = f" (process {holder['pid']} on {holder.get('host')}, since {holder.get('since')})" if holder else ""
    if state == "alive":
        return f"another process {activity} right now{who}: wait for it, or choose another --out"
    unknown = "and this disk does not show whether it still runs"
    return f"another process {activity}{who}, {unknown}: wait for it, or remove {path} where it has ended"
