"""A hub of data sets on the loopback: listings, whole files and ranges of them, as much as its client asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback_http import HubAnswers, answering

COMMIT, NEXT, CONVERSION = "a" * 40, "b" * 40, "c" * 40
MAIN, CONVERTED = "main", "refs/convert/parquet"


@dataclass
class DataSet:
    """branches: revision -> file -> content. card: what its README says to machines. gated: files want a login."""

    branches: dict[str, dict[str, bytes]]
    card: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    commits: dict[str, str] = field(default_factory=lambda: {MAIN: COMMIT, "v1": COMMIT, CONVERTED: CONVERSION})

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or commit."""
        for name, commit in self.commits.items():
            if revision in (name, commit) and name in self.branches:
                return commit, self.branches[name]
        return None


@dataclass
class DataHub:
    """queries: listings; whole, ranges: files that were read whole, and in parts. failures: answers 503 so many times.
    shift: how far the ranges that it says are from those that were queries for.
    """

    sets: dict[str, DataSet]
    queries: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int]] = field(default_factory=list)
    failures: int = 0
    shift: int = 0
    address: str = ""


@contextmanager
def data_hub(sets: dict[str, DataSet]) -> Iterator[DataHub]:
    """A hub with these data sets, for the block."""
    hub = DataHub(sets)

    class Handler(_Handler):
        served = hub

    with answering(Handler) as hub.address:
        yield hub


class _Handler(HubAnswers, BaseHTTPRequestHandler):
    served: DataHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)(?:/revision/(.+))?", path):
            self._listing(found[1], found[2] or MAIN)
        elif found := re.fullmatch(r"/datasets/([\w.-]+/[\w.-]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self.refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _listing(self, name: str, revision: str) -> None:
        self.served.queries.append(f"{name}@{revision}")
        known = self.served.sets.get(name)
        if known is None:
            self.refuse(404, "RepoNotFound")
        elif (found := known.files(revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            commit, files = found
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            told = {"id": name, "sha": commit, "siblings": siblings, "cardData": known.card}
            self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, path: str) -> None:
        known = self.served.sets[name]
        commit, files = known.files(revision) or ("", {})
        if known.gated:
            self.refuse(403, "GatedRepo")
        elif path not in files:
            self.refuse(404, "EntryNotFound")
        elif self.served.failures:
            self.served.failures -= 1
            self.refuse(503, "Busy")
        else:
            content, wanted = files[path], self.headers.get("Range")
            about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            if not wanted:
                if self.command == "GET":
                    self.served.whole.append(path)
                self.send(200, content, about)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            self.served.ranges.append((path, len(part)))
            end = int(first) + len(part) - 1
            sent = f"bytes {int(first) + self.served.shift}-{end + self.served.shift}/{len(content)}"
            self.send(206, part, {**about, "Content-Range": sent})
