"""Image data sets of the Hugging Face hub by id: their parquet files, downloaded once or read remotely in ranges.

A name is `ORG/NAME[@REVISION][:CONFIG][:SPLIT]`. Files are those of the repository, or the hub's conversions of other public
image sets (branch `refs/convert/parquet`), so no code of a repository is run. The files of a name are cached with their commit:
without a revision the hub is queried once, so that a run that continues later, or offline, sees the same images.
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

CONVERTED = "refs/convert/parquet"  # branch with the hub's conversions of other formats
DEFAULT_SPLIT = "train"
_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<first>[^:@]+))?(:(?P<second>[^:@]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(?P<split>\w[\w.]*)-\d+-of-\d+")
SPLIT_WORDS = {  # words for splits in file names
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(eq=False)
class HubFile:
    """A file of a data set at one commit. footer: its parquet metadata after the first read."""

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
        """The file in the cache of the hub's client, downloaded if missing. Raises UserError, in a dry run WouldFetch."""
        from huggingface_hub import hf_hub_download  # late: only hub ids need it

        if fetching_forbidden():
            if (cached := self._in_cache()) is None:
                raise WouldFetch(f"{self} from the hub", self.size)
            return cached
        with _explained(self.repository, f"{self} is not in the cache and cannot be fetched"):
            return Path(hf_hub_download(self.repository, self.path, repo_type="dataset", revision=self.commit))

    def open(self) -> BinaryIO:
        """Open the cached file, else the remote file, of which only the ranges that are read are downloaded."""
        cached = self._in_cache()
        return open(cached, "rb") if cached else cast(BinaryIO, _Ranges(self))

    def _in_cache(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, self.path, revision=self.commit, repo_type="dataset")
        return Path(cached) if isinstance(cached, str) else None


class _Ranges(io.RawIOBase):
    """A seekable remote file of the hub. Each read is a request, repeated on temporary failures of the network."""

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
        """Read into `buffer`. Raises UserError where the hub does not send the range."""
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

        wanted = f"bytes={first}-{first + num - 1}"
        headers = {**build_hf_headers(), "Range": wanted, "Accept-Encoding": "identity"}
        with _explained(self._file.repository, f"{self._file} cannot be read"):
            response = http_backoff("GET", self._address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(response)
            status, length = response.status_code, len(response.content)
            part = response.headers.get("Content-Range", "").strip()
            given = (status, part.rpartition("/")[0].replace(" ", "="), length)
            if given != (206, wanted, num) or response.headers.get("Content-Encoding", "identity") != "identity":
                answer = f"got {length} with status {status}, range {part[:60]!r}"
                raise OSError(f"requested {num} bytes from {first} on, {answer}")
            return bytes(response.content)


@dataclass(frozen=True)
class HubSet:
    """The files of one split of a data set, in order, at one commit."""

    name: str
    repository: str
    commit: str
    config: str
    split: str
    files: tuple[HubFile, ...]


def open_hub(name: str) -> HubSet:
    """Resolve a name to the files of a data set, without reading them.

    Without a revision, or with a full commit, the hub is queried once and the answer cached; a branch or tag is resolved again
    whenever the hub can be reached. Raises UserError on anything unknown, a required login, a set without parquet files, and an
    unreachable hub for a name that is not cached.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name!r} is no data set of the hub: wanted ORG/NAME[@REVISION][:CONFIG][:SPLIT]")
    revision, names = match["revision"] or "", [part for part in (match["first"], match["second"]) if part]
    config, split = names if len(names) == 2 else ("", names[0] if names else DEFAULT_SPLIT)
    record = cache_folder() / "hub" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    cached = _cached(record, name)
    if cached and (not revision or _COMMIT.fullmatch(revision)):
        return cached
    try:
        answer = _resolved(name, match["repository"], revision, config, split)
    except _Unreachable:
        if cached:
            return cached
        raise
    _cache(record, answer)
    print(f"{name}: {len(answer.files)} files of {answer.split} at commit {answer.commit[:12]}", file=sys.stderr)
    return answer


def _cached(record: Path, name: str) -> HubSet | None:
    """The cached answer for a name; None where there is none or it is damaged."""
    if not record.is_file():
        return None
    try:
        content = read_json(record)
        if content["name"] != name:
            return None
        repository, commit = str(content["repository"]), str(content["commit"])
        files = tuple(HubFile(repository, commit, str(path), int(size)) for path, size in content["files"])
        if not all(_is_listed_file(file.path, file.size) for file in files):
            return None
        return HubSet(name, repository, commit, str(content["config"]), str(content["split"]), files)
    except (UserError, KeyError, TypeError, ValueError):
        return None


def _cache(record: Path, answer: HubSet) -> None:
    """Cache an answer; a cache that cannot be written is reported and costs another request."""
    content = {name: getattr(answer, name) for name in ("name", "repository", "commit", "config", "split")}
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {**content, "files": [[file.path, file.size] for file in answer.files]})
    except (OSError, UserError) as error:
        reason = disk_reason(error) if isinstance(error, OSError) else str(error)
        print(f"the commit of {answer.name} is not cached: {record}: {reason}", file=sys.stderr)


class _Unreachable(UserError):
    """The hub cannot be reached."""


@contextmanager
def _explained(repository: str, what: str) -> Iterator[None]:
    """Turn errors of the hub's client into UserError. what: the failed action, for an unreachable hub."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        advice = "accept them on its page, then `hf auth login`"
        raise UserError(f"the hub gives {repository} only after its terms were accepted: {advice}") from error
    except errors.RevisionNotFoundError:
        raise
    except errors.RepositoryNotFoundError as error:
        missing = f"the hub has no data set {repository} that may be read without logging in"
        raise UserError(f"{missing} (`hf auth login` logs you in)") from error
    except Exception as error:  # the client raises errors of several libraries without a network
        reason = str(error).partition("\n")[0].strip() or type(error).__name__
        raise _Unreachable(f"{what}: {reason}") from error


def _resolved(name: str, repository: str, revision: str, config: str, split: str) -> HubSet:
    """Query the hub for the files of a name."""
    commit, sizes, card = _listing(repository, revision)
    entries = _entries(sizes, card, config)
    if not entries and not revision:
        commit, sizes, _ = _listing(repository, CONVERTED)
        entries = _converted(sizes)
    if not entries and not revision:
        raise UserError(f"{repository} has no parquet files")
    if not entries:
        advice = "leave the revision out for those that the hub makes of other formats"
        raise UserError(f"{repository} at revision {revision} has no parquet files: {advice}")
    config = _config(name, sorted({c for c, _ in entries}), config, card)
    if (config, f"partial-{split}") in entries:
        partial = f"{name} is so large that the hub converts only a part of it to parquet"
        raise UserError(f"{partial}: download the set and give its folder to `encode`")
    if (config, split) not in entries:
        splits = ", ".join(sorted(s for c, s in entries if c == config))
        raise UserError(f"{name}: {config} has the splits {splits}, not {split!r}: wanted {repository}:CONFIG:SPLIT")
    files = tuple(HubFile(repository, commit, path, sizes[path]) for path in entries[config, split])
    return HubSet(name, repository, commit, config, split, files)


def _listing(repository: str, revision: str) -> tuple[str, dict[str, int], Mapping[str, Any]]:
    """Commit, sizes of the parquet files by path, and the metadata of the card."""
    from huggingface_hub import HfApi, errors

    try:
        with _explained(repository, f"the hub cannot be queried for {repository}, and no earlier answer is cached"):
            info = HfApi().dataset_info(repository, revision=revision or None, files_metadata=True)
    except errors.RevisionNotFoundError as error:
        problem = f"the hub has no revision {revision!r} of {repository}"
        if revision == CONVERTED:
            advice = "download it, and give its folder to `encode`"
            problem = f"{repository} has no parquet files, and the hub has made none of it: {advice}"
        raise UserError(problem) from error
    sizes = {s.rfilename: s.size for s in info.siblings or () if s.rfilename.endswith(".parquet")}
    if lacking := next((path for path, size in sizes.items() if size is None), None):
        raise UserError(f"the hub does not say how large {repository}/{lacking} is")
    if odd := next((path for path, size in sizes.items() if not _is_listed_file(path, size)), None):
        raise UserError(
            f"the hub lists {odd[:200]!r} of {repository}: wanted a path inside the repository and its size"
        )
    card: Mapping[str, Any] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
    return str(info.sha), {path: int(size or 0) for path, size in sizes.items()}, card


def _is_listed_file(path: str, size: Any) -> bool:
    """Whether a path of a listing is inside its repository, and its size a possible one."""
    return type(size) is int and 0 <= size < 2**63 and all(map(is_plain_name, path.split("/")))


def _config(name: str, configs: Sequence[str], wanted: str, card: Mapping[str, Any]) -> str:
    """The requested configuration, else the card's default, else the only one."""
    existing = f"{name}: there are the configurations {', '.join(configs)}"
    if wanted:
        if wanted not in configs:
            raise UserError(f"{existing}, not {wanted!r}")
        return wanted
    declared = [str(c.get("config_name")) for c in _configs(card) if c.get("default")]
    for config in (*declared, "default"):
        if config in configs:
            return config
    if len(configs) > 1:
        raise UserError(f"{existing}: name one, as ORG/NAME:{configs[0]}:SPLIT")
    return configs[0]


def _entries(paths: Mapping[str, int], card: Mapping[str, Any], wanted: str) -> dict[tuple[str, str], list[str]]:
    """Sorted files by configuration and split, as the card declares them, else by their names."""
    declared = _configs(card)
    if any("data_files" in c or "data_dir" in c for c in declared):
        entries: dict[tuple[str, str], list[str]] = {}
        for config in declared:
            inside = str(config.get("data_dir") or "").strip("./")
            below = [path for path in sorted(paths) if path.startswith(f"{inside}/" if inside else "")]
            for split, patterns in _declared(config.get("data_files")) or _named(below):
                matched = [path for path in below if any(_matches(path, pattern, inside) for pattern in patterns)]
                if matched:
                    entries[str(config.get("config_name", "default")), split] = matched
        return entries
    below = [path for path in sorted(paths) if not wanted or path.startswith(f"{wanted}/")]
    return {(wanted or "default", split): files for split, files in _named(below)}


def _configs(card: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations that a card declares; entries of another form are ignored."""
    declared = card.get("configs")
    return [config for config in declared if isinstance(config, Mapping)] if isinstance(declared, list) else []


def _converted(paths: Mapping[str, int]) -> dict[tuple[str, str], list[str]]:
    """Files by configuration and split on the hub's branch of conversions: CONFIG/SPLIT/0000.parquet."""
    entries: dict[tuple[str, str], list[str]] = {}
    for path in sorted(paths):
        folders = path.split("/")
        if len(folders) == 3:
            entries.setdefault((folders[0], folders[1]), []).append(path)
    return entries


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
    patterns = (pattern, f"{inside}/{pattern}" if inside else pattern)
    return path == pattern or any(fnmatch.fnmatchcase(path, each) for each in patterns)


def _named(paths: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(split, files) by file names; files without a split in their names are for training."""
    entries: dict[str, list[str]] = {}
    for path in paths:
        entries.setdefault(_split_of(path), []).append(path)
    return sorted(entries.items())


def _split_of(path: str) -> str:
    for part in reversed(path.removesuffix(".parquet").split("/")):
        if shard := _SHARD.fullmatch(part):
            return shard["split"]
        words = re.split(r"[^a-z]+", part.lower())
        for split, names in SPLIT_WORDS.items():
            if any(name in words for name in names):
                return split
    return DEFAULT_SPLIT
