"""Image sets of the hub by their id: which files they are, fetched once or read in ranges where they lie.

A name is `ORG/NAME[@REVISION][:CONFIG][:SPLIT]`. Files are parquet: those of the repository, or those that the hub itself
makes of every other public image set, on the branch `refs/convert/parquet`. So one reader serves all, and no code of a
repository is ever run. What a name stands for is kept with its commit: without a revision it is asked once, so that a run that
goes on tomorrow, or without a network, sees the same images.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, fetching_forbidden
from tinyfusion.core.files import disk_reason, write_json
from tinyfusion.core.rundir import read_json
from tinyfusion.core.weights import cache_folder, is_plain_name

CONVERTED = "refs/convert/parquet"  # where the hub keeps what it made of other formats
DEFAULT_SPLIT = "train"
_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<first>[^:@]+))?(:(?P<second>[^:@]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(?P<split>\w[\w.]*)-\d+-of-\d+")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # how file names say their split, where nothing else does


@dataclass(eq=False)
class HubFile:
    """A file of a data set at one commit. footer: its parquet metadata, once somebody has read it."""

    repository: str
    commit: str
    path: str
    size: int
    footer: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def name(self) -> str:
        """Without its folders."""
        return self.path.rpartition("/")[2]

    def fetched(self) -> Path:
        """The file in the cache of the hub's client, fetched where it is not there.

        Raises UserError where it cannot be, WouldFetch where nothing is to be fetched.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache  # late: only hub ids need it

        if fetching_forbidden():
            found = try_to_load_from_cache(self.repository, self.path, revision=self.commit, repo_type="dataset")
            if not isinstance(found, str):
                raise WouldFetch(f"{self} from the hub", self.size)
            return Path(found)
        with _explained(self.repository, f"{self} is not in the cache and cannot be fetched"):
            return Path(hf_hub_download(self.repository, self.path, repo_type="dataset", revision=self.commit))

    def open(self) -> BinaryIO:
        """The cached file where there is one, else the one on the hub, of which just the ranges that are read are sent."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.path, revision=self.commit, repo_type="dataset")
        return open(found, "rb") if isinstance(found, str) else cast(BinaryIO, _Ranges(self))


class _Ranges(io.RawIOBase):
    """A file of the hub as one that can be sought in. Every read is a request, repeated where the network fails for a moment."""

    def __init__(self, file: HubFile) -> None:
        super().__init__()
        from huggingface_hub import hf_hub_url

        self._file, self._at = file, 0
        self._address = hf_hub_url(file.repository, file.path, repo_type="dataset", revision=file.commit)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Raises UserError where the hub does not give the range."""
        num = max(min(len(buffer), self._file.size - self._at), 0)
        if num:
            buffer[:num] = self._range(self._at, num)
        self._at += num
        return num

    def _range(self, first: int, num: int) -> bytes:
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, though marked for no type checker
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        asked = f"bytes={first}-{first + num - 1}"
        headers = {**build_hf_headers(), "Range": asked, "Accept-Encoding": "identity"}
        with _explained(self._file.repository, f"{self._file} cannot be read"):
            answer = http_backoff("GET", self._address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(answer)
            part = answer.headers.get("Content-Range", "").strip()
            given = (answer.status_code, part.rpartition("/")[0].replace(" ", "="), len(answer.content))
            if given != (206, asked, num) or answer.headers.get("Content-Encoding", "identity") != "identity":
                raise OSError(
                    f"asked for {num} bytes from {first} on, got {len(answer.content)} with status {answer.status_code}, "
                    f"range {part[:60]!r}"
                )
            return bytes(answer.content)


@dataclass(frozen=True)
class HubSet:
    """What a name stands for: the files of one split, in their order, at one commit."""

    name: str
    repository: str
    commit: str
    config: str
    split: str
    files: tuple[HubFile, ...]


def open_hub(name: str) -> HubSet:
    """The set of a name. Nothing of its content is read.

    Without a revision, or with a full commit, the hub is asked once and the answer kept; a branch or tag is asked for every
    time the hub can be reached. Raises UserError on no such repository, revision, configuration or split, on one that wants a
    login, on no parquet files, and where the hub cannot be reached and the name was never asked for.
    """
    found = _NAME.fullmatch(name)
    if not found:
        raise UserError(f"{name!r} is no data set of the hub: wanted ORG/NAME[@REVISION][:CONFIG][:SPLIT]")
    revision, parts = found["revision"] or "", [part for part in (found["first"], found["second"]) if part]
    config, split = parts if len(parts) == 2 else ("", parts[0] if parts else DEFAULT_SPLIT)
    record = cache_folder() / "hub" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    kept = _kept(record, name)
    if kept and (not revision or _COMMIT.fullmatch(revision)):
        return kept
    try:
        made = _asked(name, found["repository"], revision, config, split)
    except _Unreachable:
        if kept:
            return kept
        raise
    _keep(record, made)
    print(f"{name}: {len(made.files)} files of {made.split} at commit {made.commit[:12]}", file=sys.stderr)
    return made


def _kept(record: Path, name: str) -> HubSet | None:
    """What was answered before; None where nothing was, or the record is damaged."""
    if not record.is_file():
        return None
    try:
        told = read_json(record)
        if told["name"] != name:
            return None
        repository, commit = str(told["repository"]), str(told["commit"])
        files = tuple(HubFile(repository, commit, str(path), int(size)) for path, size in told["files"])
        if not all(_is_listed_file(file.path, file.size) for file in files):
            return None
        return HubSet(name, repository, commit, str(told["config"]), str(told["split"]), files)
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _keep(record: Path, made: HubSet) -> None:
    """Keep an answer; a cache that cannot be written is said, and costs another request."""
    told = {name: getattr(made, name) for name in ("name", "repository", "commit", "config", "split")}
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {**told, "files": [[file.path, file.size] for file in made.files]})
    except (OSError, UserError) as error:
        reason = disk_reason(error) if isinstance(error, OSError) else str(error)
        print(f"the commit of {made.name} is not kept: {record}: {reason}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- asking the hub


class _Unreachable(UserError):
    """There is no network, or no hub at the other end."""


@contextmanager
def _explained(repository: str, what: str) -> Iterator[None]:
    """What the hub's client says, for people. what: fails, in the case that the hub is not to be reached."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"the hub gives {repository} only to those who accepted its terms: do so on its page, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError:
        raise
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no data set {repository} that may be read without logging in (`hf auth login` makes you known)"
        ) from error
    except Exception as error:  # its client has errors of several libraries for a net that is not there
        reason = str(error).partition("\n")[0].strip() or type(error).__name__
        raise _Unreachable(f"{what}: {reason}") from error


def _asked(name: str, repository: str, revision: str, config: str, split: str) -> HubSet:
    """Ask the hub what a name stands for."""
    commit, sizes, card = _listing(repository, revision)
    entries = _entries(sizes, card, config)
    if not entries and not revision:
        commit, sizes, _ = _listing(repository, CONVERTED)
        entries = _converted(sizes)
    if not entries:
        where = f"at revision {revision} " if revision else ""
        raise UserError(
            f"{repository} {where}has no parquet files"
            + (": leave the revision out for those that the hub makes of other formats" if revision else "")
        )
    config = _config(name, sorted({c for c, _ in entries}), config, card)
    if (config, f"partial-{split}") in entries:
        raise UserError(
            f"{name} is too large for the hub to make all of it parquet, and what it made is only a part: download the "
            "set and give its folder to `encode`"
        )
    if (config, split) not in entries:
        splits = ", ".join(sorted(s for c, s in entries if c == config))
        raise UserError(f"{name}: {config} has the splits {splits}, not {split!r}: wanted {repository}:CONFIG:SPLIT")
    files = tuple(HubFile(repository, commit, path, sizes[path]) for path in entries[config, split])
    return HubSet(name, repository, commit, config, split, files)


def _listing(repository: str, revision: str) -> tuple[str, dict[str, int], Mapping[str, Any]]:
    """Commit, sizes of the parquet files by path, and what the card says to machines."""
    from huggingface_hub import HfApi, errors

    try:
        with _explained(
            repository, f"the hub cannot be asked for {repository}, and this name was never asked for before"
        ):
            info = HfApi().dataset_info(repository, revision=revision or None, files_metadata=True)
    except errors.RevisionNotFoundError as error:
        if revision == CONVERTED:
            raise UserError(
                f"{repository} has no parquet files, and the hub has made none of it: download it, and give its folder to "
                "`encode`"
            ) from error
        raise UserError(f"the hub has no revision {revision!r} of {repository}") from error
    sizes = {s.rfilename: s.size for s in info.siblings or () if s.rfilename.endswith(".parquet")}
    if lacking := next((path for path, size in sizes.items() if size is None), None):
        raise UserError(f"the hub does not say how large {repository}/{lacking} is")
    if odd := next((path for path, size in sizes.items() if not _is_listed_file(path, size)), None):
        raise UserError(
            f"the hub lists {odd[:200]!r} of {repository}: wanted a path inside the repository, and its size"
        )
    card: Mapping[str, Any] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
    return str(info.sha), {path: int(size or 0) for path, size in sizes.items()}, card


def _is_listed_file(path: str, size: Any) -> bool:
    """Whether a path of a listing leads to a file inside its repository, of a size that a file can have."""
    return type(size) is int and 0 <= size < 2**63 and all(map(is_plain_name, path.split("/")))


def _config(name: str, configs: Sequence[str], wanted: str, card: Mapping[str, Any]) -> str:
    """The configuration that is meant: the named one, the only one, or the one that the card makes the default."""
    if wanted:
        if wanted not in configs:
            raise UserError(f"{name}: there are the configurations {', '.join(configs)}, not {wanted!r}")
        return wanted
    declared = [str(c.get("config_name")) for c in _configs(card) if c.get("default")]
    for one in (*declared, "default"):
        if one in configs:
            return one
    if len(configs) > 1:
        raise UserError(
            f"{name}: there are the configurations {', '.join(configs)}: name one, as ORG/NAME:{configs[0]}:SPLIT"
        )
    return configs[0]


# ------------------------------------------------------------------------------------------------------------ file names


def _entries(paths: Mapping[str, int], card: Mapping[str, Any], wanted: str) -> dict[tuple[str, str], list[str]]:
    """Files by configuration and split: as the card declares them, else by their names; sorted."""
    declared = _configs(card)
    if any("data_files" in c or "data_dir" in c for c in declared):
        found: dict[tuple[str, str], list[str]] = {}
        for one in declared:
            inside = str(one.get("data_dir") or "").strip("./")
            below = [path for path in sorted(paths) if path.startswith(f"{inside}/" if inside else "")]
            for split, patterns in _declared(one.get("data_files")) or _named(below):
                matched = [path for path in below if any(_matches(path, pattern, inside) for pattern in patterns)]
                if matched:
                    found[str(one.get("config_name", "default")), split] = matched
        return found
    below = [path for path in sorted(paths) if not wanted or path.startswith(f"{wanted}/")]
    return {(wanted or "default", split): files for split, files in _named(below)}


def _configs(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations that a card declares; entries of another form are none."""
    declared = card.get("configs")
    return [config for config in declared if isinstance(config, Mapping)] if isinstance(declared, list) else []


def _converted(paths: Mapping[str, int]) -> dict[tuple[str, str], list[str]]:
    """As `_entries`, of the branch that the hub makes: CONFIG/SPLIT/0000.parquet."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(paths):
        folders = path.split("/")
        if len(folders) == 3:
            found.setdefault((folders[0], folders[1]), []).append(path)
    return found


def _declared(data_files: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns) of a card's `data_files`, which may be a pattern, a list of them, or patterns by split."""
    if not data_files:
        return []
    if isinstance(data_files, str):
        return [(DEFAULT_SPLIT, [data_files])]
    if isinstance(data_files, Mapping):
        return [(str(split), _several(patterns)) for split, patterns in data_files.items()]
    if not isinstance(data_files, list):
        return []
    if all(isinstance(entry, Mapping) for entry in data_files):
        return [(str(e.get("split", DEFAULT_SPLIT)), _several(e.get("path"))) for e in data_files]
    return [(DEFAULT_SPLIT, _several(data_files))]


def _several(patterns: Any) -> list[str]:
    return [str(pattern) for pattern in patterns] if isinstance(patterns, list) else [str(patterns or "")]


def _matches(path: str, pattern: str, inside: str) -> bool:
    """Whether a path is of a pattern, which may be relative to a folder; `*` goes over slashes too."""
    pattern = pattern.removeprefix("./")
    return path == pattern or any(
        fnmatch.fnmatchcase(path, f"{folder}{pattern}") for folder in ("", f"{inside}/" if inside else "")
    )


def _named(paths: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(split, files) by what the names say; those that say nothing are for training."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_split_of(path), []).append(path)
    return sorted(found.items())


def _split_of(path: str) -> str:
    for part in reversed(path.removesuffix(".parquet").split("/")):
        if shard := _SHARD.fullmatch(part):
            return shard["split"]
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLIT_WORDS.items():
            if any(name in words for name in names):
                return split
    return DEFAULT_SPLIT
