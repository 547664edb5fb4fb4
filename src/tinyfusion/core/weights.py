"""Known weights: a table of addresses and checksums by name, which a file of the user can extend, and their download.

A file is downloaded once, to `tinyfusion/` in the cache of the Hugging Face libraries (`HF_HOME`, else
`~/.cache/huggingface`), with a file of its SHA-256. The checksum is compared with the table, or recorded where the table has
none, and verified at every use. An interrupted download is resumed if the server supports it.
"""

from __future__ import annotations

import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import unquote, urlsplit

from tinyfusion.config.loading import build, nearest
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.fetching import WouldFetch, fetching_forbidden
from tinyfusion.core.files import check_space, check_writable, sha256_of, write_text
from tinyfusion.core.locks import is_at, try_lock
from tinyfusion.core.progress import progress
from tinyfusion.core.reading import parse_toml, read_text

_READ_BYTES = 1 << 20
_ATTEMPTS = 5  # consecutive connections without new bytes before giving up
_TIMEOUT_S = 30.0
_LONGEST_NAME = 200  # bytes of a name in the cache; partial files have longer ones
_HEAD_TIMEOUT_S = 5.0  # of a dry run, which requests only the size


@dataclass(frozen=True)
class KnownWeights:
    """One entry of the table, `[name]` in TOML."""

    address: str  # http or https
    sha256: str | None = None  # hexadecimal, or its first digits; None: recorded at the first download
    license: str | None = None
    kind: Literal["model", "inception", "autoencoder"] = "model"  # inception: the network of the FID
    family: str | None = None  # where the tensors of the file fit several
    about: str = ""
    name: str = ""

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return unquote(urlsplit(self.address).path.rpartition("/")[2])


def user_table() -> Path:
    """The user's own table, which takes precedence."""
    return Path.home() / ".config" / "tinyfusion" / "weights.toml"


def known_weights() -> dict[str, KnownWeights]:
    """All entries by name, shipped and the user's. Raises UserError if the user's file is invalid."""
    shipped = Path(str(resources.files("tinyfusion"))) / "assets" / "weights.toml"
    entries: dict[str, KnownWeights] = {}
    for path in (shipped, user_table()):
        if not path.is_file():
            continue
        table = parse_toml(read_text(path), str(path))
        entries |= {name: _entry(name, values, path) for name, values in table.items()}
    return entries


def _entry(name: str, values: Any, path: Path) -> KnownWeights:
    fields = {**values, "name": name} if isinstance(values, dict) else values
    with prefixed(path):
        entry: KnownWeights = build(KnownWeights, fields, name)
    plain = "wanted 1 to 200 bytes that do not begin with a dot, without slashes and control characters"
    problem = ""
    if not is_plain_name(name):
        problem = f"[{name!r}] names a folder of the cache: {plain}"
    elif not _is_address(entry.address):
        problem = f"{name}.address wants the http address of a file; got {entry.address!r}"
    elif not is_plain_name(entry.file_name):
        problem = f"{name}.address ends with the name of a file of the cache: {plain}; got {entry.file_name!r}"
    elif entry.sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", entry.sha256):
        problem = f"{name}.sha256 wants 8 to 64 hexadecimal digits, small letters; got {entry.sha256!r}"
    if problem:
        raise UserError(f"{path}: {problem}")
    return entry


def is_plain_name(name: str) -> bool:
    """Whether an untrusted name can be a file or folder of the cache: a single path component and no special one."""
    if not name or name.startswith(".") or any(letter in "/\\" or not letter.isprintable() for letter in name):
        return False
    return len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME


def _is_address(text: str) -> bool:
    """Whether a text is the http or https address of a file, in printable ASCII."""
    try:
        address = urlsplit(text)
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
    except ValueError:  # brackets, ports
        return False
    return (
        valid and not text.endswith("/") and bool(address.path.strip("/")) and re.fullmatch(r"[!-~]+", text) is not None
    )


def cache_folder() -> Path:
    """The folder of downloaded files."""
    from huggingface_hub import constants  # late: costs time, and knows the folder that the user chose for big files

    return Path(constants.HF_HOME) / "tinyfusion"


def fetch_weights(name: str) -> Path:
    """The file of known weights, from the cache or downloaded; its checksum is verified.

    Raises UserError on an unknown name, a wrong checksum or a failed download; WouldFetch in a dry run.
    """
    known = known_weights()
    if name not in known:
        raise UserError(f"no known weights {name!r}{nearest(name, known)}")
    entry = known[name]
    path = cache_folder() / name / entry.file_name
    record = path.with_name(f"{path.name}.sha256")
    recorded = read_text(record).split()[:1] if record.is_file() else []
    expected = {"the table": entry.sha256 or "", f"{record}": recorded[0] if recorded else ""}
    if not path.is_file():
        if fetching_forbidden():
            raise WouldFetch(f"{name} from {entry.address}", _size_of(entry))
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(entry, path, expected)
    elif wrong := _contradiction(digest := sha256_of(path), expected):
        raise UserError(f"{path} is damaged: it has the SHA-256 {digest}, {wrong}; remove it to have it fetched again")
    elif not recorded:
        write_text(record, f"{digest}  {path.name}\n")
    return path


def _size_of(entry: KnownWeights) -> int | None:
    """Bytes of the file as the server reports; None where it does not."""
    request = urllib.request.Request(entry.address, headers={"User-Agent": "tinyfusion"}, method="HEAD")
    try:
        with _opener().open(request, timeout=_HEAD_TIMEOUT_S) as response:
            return _length(response)
    except (OSError, http.client.HTTPException, ValueError):  # URLError among them
        return None


def _contradiction(digest: str, expected: Mapping[str, str]) -> str:
    """The first expected checksum (source -> first digits, "" for none) that `digest` contradicts, in words; "" if none."""
    return next((f"and {who} says {sum}" for who, sum in expected.items() if not digest.startswith(sum)), "")


def _fetch(entry: KnownWeights, path: Path, expected: Mapping[str, str]) -> None:
    """Download to a partial file, or continue one, verify its checksum, and rename it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    with _locked(partial, path) as file:
        if path.is_file():  # another process has just fetched it
            partial.unlink(missing_ok=True)
            return
        _transfer(entry, file, partial)
        file.flush()
        os.fsync(file.fileno())
        digest = sha256_of(partial)
        if wrong := _contradiction(digest, expected):
            partial.unlink()
            raise UserError(
                f"{entry.address} gave a file with the SHA-256 {digest}, {wrong}: it was changed at its source or in transit; "
                "nothing was saved"
            )
        write_text(path.with_name(f"{path.name}.sha256"), f"{digest}  {path.name}\n")
        os.replace(partial, path)
    _tag_of(partial).unlink(missing_ok=True)


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[IO[bytes]]:
    """Open the partial file at its end and lock it. Waits while another process downloads it, until `path` exists."""
    while True:
        with open(partial, "ab") as file:
            granted = try_lock(file)
            if granted is False:
                print(f"waiting for another process that downloads {path.name}", file=sys.stderr)
                granted = try_lock(file, wait=True)
            if granted is None or path.is_file() or is_at(file.fileno(), partial):
                yield file
                return
        # the other process failed and removed the partial file: open a new one


def _tag_of(partial: Path) -> Path:
    """The file with the version (ETag) of a partial file."""
    return partial.with_name(f"{partial.name}.tag")


def _transfer(entry: KnownWeights, file: IO[bytes], partial: Path) -> None:
    """Download to the end of `file`; a broken connection is retried as long as it brings new bytes."""
    barren = most = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        most = max(most, before)  # bytes that are fetched again are not new
        try:
            if _connection(entry, file, partial):
                return
            reason = "the connection broke"
        except urllib.error.HTTPError as error:
            error.close()
            answered = f"{error.code} {str(error.reason).partition(chr(10))[0]}"
            if error.code != 416 or not before:
                raise UserError(f"cannot fetch {entry.name}: {entry.address} answers {answered}") from error
            file.truncate(0)  # it is longer than the file of the server
            reason = f"it answers {answered}"
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError among them
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        have = file.seek(0, os.SEEK_END)
        barren = 0 if have > most else barren + 1
        if barren >= (_ATTEMPTS if most else 1):
            rest = f" after {have / 2**20:.1f} MiB, which are retained: the same command resumes there" if have else ""
            raise UserError(f"cannot fetch {entry.name} from {entry.address}: {reason}{rest}")


def _connection(entry: KnownWeights, file: IO[bytes], partial: Path) -> bool:
    """Do one request. Returns whether the file is complete after it."""
    have, tag = file.seek(0, os.SEEK_END), _tag_of(partial)
    headers = {"User-Agent": "tinyfusion", "Accept-Encoding": "identity"}
    if have and tag.is_file():
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text(encoding="utf-8")}
    with _opener().open(urllib.request.Request(entry.address, headers=headers), timeout=_TIMEOUT_S) as answer:
        length = _length(answer)
        try:
            whole = _whole_length(answer, have, length, "Range" in headers)
        except ValueError:
            file.truncate(0)
            raise
        if answer.status == 200:
            file.truncate(0)  # the server sends the whole file: it supports no ranges, or the file has changed
            have = 0
        if version := answer.headers.get("ETag") or answer.headers.get("Last-Modified"):
            write_text(tag, version)
        else:
            tag.unlink(missing_ok=True)
        check_space(partial, (whole or have) - have)
        end = have
        with progress(f"fetch {entry.name}", whole or 0, "B", have) as advance:
            while content := answer.read(_READ_BYTES):
                file.write(content)
                end += len(content)
                advance(end)
        if length is not None and end > have + length:
            file.truncate(0)
            raise ValueError(f"it says {length} bytes and sends {end - have}")
        return end == whole if whole is not None else end > 0


def _length(answer: Any) -> int | None:
    """Content-Length of a response, None without one. Raises ValueError where it is no number."""
    text = answer.headers.get("Content-Length")
    if text is not None and not re.fullmatch(r"[0-9]{1,18}", text.strip()):
        raise ValueError(f"it says Content-Length {text[:40]!r}")
    return None if text is None else int(text)


def _whole_length(answer: Any, have: int, length: int | None, is_range: bool) -> int | None:
    """Bytes of the whole file, of which `have` exist; None where the server does not report it.

    Raises ValueError on a response that is neither the whole file nor (`is_range`) the requested rest of it.
    """
    if (encoding := answer.headers.get("Content-Encoding", "identity").strip().lower()) not in ("", "identity"):
        raise ValueError(f"it sends the file in the encoding {encoding!r}, which was not requested")
    if answer.status == 200 and length == 0:
        raise ValueError("it sends an empty file")
    if answer.status == 200:
        return length
    text = str(answer.headers.get("Content-Range", ""))
    if answer.status != 206 or not is_range:
        raise ValueError(f"it answers {answer.status} {text}".rstrip() + ", and the whole file was requested")
    part = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", text.strip())
    first, last = (int(part[1]), int(part[2])) if part else (-1, -1)
    total = last + 1 if part is None or part[3] == "*" else int(part[3])
    if first != have or not first <= last < total or length not in (None, last + 1 - first):
        raise ValueError(f"it answers with the part {text!r}, and bytes from {have} on were requested")
    return total


def _opener() -> urllib.request.OpenerDirector:
    """An opener of http and https alone, also after redirects."""
    opener = urllib.request.OpenerDirector()
    for kind in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
        opener.add_handler(getattr(urllib.request, f"{kind}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    return opener
