"""Guards for reading files of users: kind of file, size of texts, and memory that the content would take.

Every reader of a file goes through these guards before it trusts a number or a structure in it.
"""

from __future__ import annotations

import errno
import json
import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError

TEXT_LIMIT_BYTES = 2**28  # of a JSON or TOML file; ours are far below
_MEMORY_SHARE = 0.9  # of the available memory that a value may take
UNCHECKED_BYTES = 2**20  # that are read without a check of the available memory, which would take longer
_CGROUPS = {  # folder of the container that this process runs in -> names of its limit and usage, prefix in memory.stat
    "/sys/fs/cgroup": ("memory.max", "memory.current", ""),
    "/sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def check_plain(path: Path) -> None:
    """Raise UserError where `path` exists and is neither a regular file nor a folder, links followed.

    Opening a pipe waits for a writer, and a device may never end.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # missing or unreadable: the reader reports it
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")
        raise UserError(f"{path} is {kind}: wanted a regular file or a folder")


def check_utf8(path: Path) -> None:
    """Raise UserError where a name in `path` is not UTF-8: safetensors opens no such file, nor does torch map one."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        reason = "is not UTF-8, and safetensors and torch open no such file"
        raise UserError(f"{path} {reason}: choose another name") from error


@contextmanager
def explained(problem: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn exceptions of these kinds within the block into UserError: the problem, and the exception's own message."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{problem}: {' '.join(str(error).split()) or type(error).__name__}") from error


def unreadable(path: Path, error: OSError | ValueError) -> UserError:
    """The error of a file that cannot be opened, with the file system's reason."""
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return UserError(f"{path} does not exist")
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(f"cannot read {path}: {reason}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file of at most 256 MiB. Raises UserError where it cannot be read."""
    check_plain(path)
    try:
        size, text = path.stat().st_size, ""
        if size <= TEXT_LIMIT_BYTES:
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: not UTF-8 text ({error})") from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if size > TEXT_LIMIT_BYTES:
        raise UserError(f"{path} is too large for a text file: wanted at most {TEXT_LIMIT_BYTES / 2**20:.0f} MiB")
    return text


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text. Raises UserError that names `source` on damaged text."""
    return _parse(json.loads, text, f"{source} is damaged: not valid JSON")


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The table of a TOML text. Raises UserError that names `source` on invalid text."""
    return dict(_parse(tomllib.loads, text, f"{source} is not valid TOML"))


def _parse(parse: Callable[[str], Any], text: str, problem: str) -> Any:
    try:
        return parse(text)
    except RecursionError as error:
        raise UserError(f"{problem}: nested too deeply") from error
    except ValueError as error:  # also of whole numbers of too many digits
        raise UserError(f"{problem}: {error}") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError if it is missing or damaged."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it is missing, damaged or another kind of value."""
    value = read_json(path)
    if not isinstance(value, dict):
        kinds = {type(None): "null", bool: "a boolean", str: "a string", list: "a list"}
        raise UserError(f"{path} is damaged: wanted a JSON object, got {kinds.get(type(value), 'a number')}")
    return value


def available_memory_bytes() -> int:
    """Bytes of memory that this process can still take without swapping: of the machine, or of its container."""
    import psutil  # late: --help does not need it

    available = int(psutil.virtual_memory().available)
    for folder, (limit_name, usage_name, prefix) in _CGROUPS.items():
        try:
            limit, usage = (int(Path(folder, name).read_text()) for name in (limit_name, usage_name))
            counts = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            # usage includes cached files, which the system gives up when memory is short
            cached = sum(int(counts[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        except (OSError, ValueError, KeyError):  # no such container, or "max": no limit
            continue
        available = min(available, max(limit - usage + cached, 0))
    return available


def check_memory(num_bytes: int, what: str) -> None:
    """Raise UserError where `what` (a noun phrase that names the file) needs more memory than is available."""
    if num_bytes <= UNCHECKED_BYTES:
        return
    available = available_memory_bytes()
    if num_bytes > _MEMORY_SHARE * available:
        needed = f"{what} would take {num_bytes / 2**30:,.1f} GiB of memory"
        raise UserError(f"{needed}, and {available / 2**30:.1f} GiB are available")


def license_in(card: Path) -> str | None:
    """The licence that a model card names in its head; None for "unknown", which the hub has for none."""
    if not card.is_file():
        return None
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    license = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return license[1] if license and license[1] != "unknown" else None
