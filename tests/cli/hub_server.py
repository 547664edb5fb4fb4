"""A hub on the loopback: repositories of files to read, and uploads to look at. As much of it as its client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback_http import HubAnswers, answering

COMMIT = "a" * 40


@dataclass
class Hub:
    """repositories: id -> file -> content. pushed: the same, of what was uploaded. read: files that were fetched."""

    repositories: dict[str, dict[str, bytes]]
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def hub_of(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """A hub with these repositories, for the block."""
    hub = Hub(repositories)

    class Handler(_Handler):
        served = hub

    with answering(Handler) as hub.address:
        yield hub


class _Handler(HubAnswers, BaseHTTPRequestHandler):
    served: Hub

    def do_GET(self) -> None:
        if found := re.match(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/([\w.-]+)", self.path):
            self._facts(*found.groups())
        elif found := re.match(r"/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.+)", self.path):
            self._file(*found.groups())
        else:
            self.refuse(404, "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            self.served.pushed.setdefault(name, {})
            self._json({"url": f"{self.served.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            listed = [entry["path"] for entry in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in listed]})
        elif found := re.match(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.served.pushed[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.served.address}/{found[1]}/commit/{COMMIT}"}
            )
        else:
            self.refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _facts(self, name: str, what: str, revision: str) -> None:
        files = self.served.repositories.get(name)
        if files is None:
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif what == "tree":
            self._json([{"type": "file", "path": path, "size": len(c), "oid": _sum(c)} for path, c in files.items()])
        else:
            self._json(
                {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            )

    def _file(self, name: str, path: str) -> None:
        content = self.served.repositories.get(name, {}).get(path)
        if content is None:
            self.refuse(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.served.read.append(path)
        self.send(200, content, {"ETag": f'"{_sum(content)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _sum(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
