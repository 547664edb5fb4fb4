"""Guards of readers: special files, damaged text, and values that would not fit into memory are refused before they cost anything."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tinyfusion.core import reading
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory, check_plain, parse_toml, read_json, read_json_object


def test_special_files_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.path.relpath(tmp_path / "socket"))  # a socket's path is short
    listener.close()
    cases = {"pipe": "a pipe", "link": "a pipe", "socket": "a socket"}
    for path, kind in [*((tmp_path / name, kind) for name, kind in cases.items()), (Path(os.devnull), "a device")]:
        for refuses in (check_plain, read_json):
            with pytest.raises(UserError, match=f"is {kind}: wanted a regular file or a folder"):
                refuses(path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, tmp_path / "absent"):
        check_plain(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged: not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "wanted a JSON object, got a list"),
        (b"null", "wanted a JSON object, got null"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json_object(tmp_path / "x.json")


def test_missing_and_unreadable_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")

    def refused(*_args: object, **_kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UserError, match=r"cannot read .*x\.json: Permission denied"):
        read_json(tmp_path / "x.json")
    os.truncate(tmp_path / "x.json", 2**28 + 1)  # a file with a hole: no bytes on the disk
    with pytest.raises(UserError, match="too large for a text file: wanted at most 256 MiB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5_000, "a ="])
def test_damaged_toml_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"recipe x is not valid TOML"):
        parse_toml(text, "recipe x")


def test_memory_is_compared_with_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading.available_memory_bytes() > 2**20
    monkeypatch.setattr(reading, "available_memory_bytes", lambda: 10 * 2**30)
    check_memory(9 * 2**30, "arr_0 of x.npz")
    with pytest.raises(UserError, match=r"arr_0 of x\.npz would take 9\.1 GiB of memory, and 10\.0 GiB are available"):
        check_memory(int(9.1 * 2**30), "arr_0 of x.npz")


@pytest.mark.parametrize(
    ("prefix", "limit", "usage"), [("", "max", "current"), ("total_", "limit_in_bytes", "usage_in_bytes")]
)
def test_files_that_a_container_has_cached_count_as_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, limit: str, usage: str
) -> None:
    """Reading large files fills the limit of a container with pages that are given up on demand: 1000 - 990 + 700 + 200."""
    names = (f"memory.{limit}", f"memory.{usage}", prefix)
    monkeypatch.setattr(reading, "_CGROUPS", {str(tmp_path): names})
    (tmp_path / names[0]).write_text("1000\n")
    (tmp_path / names[1]).write_text("990\n")
    (tmp_path / "memory.stat").write_text(f"anon 90\n{prefix}active_file 200\n{prefix}inactive_file 700\n")
    assert reading.available_memory_bytes() == 910
    (tmp_path / names[0]).write_text("max\n")
    assert reading.available_memory_bytes() > 2**20
