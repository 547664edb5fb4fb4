"""A file server on the loopback that can break off, know no ranges, or change its file: what downloads meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from loopback_http import answering


@dataclass
class Served:
    """What the server gives for any path. breaks: bytes after which each connection in turn is cut; ranges: whether it knows them."""

    content: bytes
    tag: str | None = '"one"'
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    status: int = 200
    says_length: bool = True
    requests: list[str | None] = field(default_factory=list)  # the Range of every request, or HEAD
    address: str = ""


@contextmanager
def serving(content: bytes) -> Iterator[Served]:
    """A server of one file, for the block."""
    served = Served(content)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            served.requests.append("HEAD")
            self.send_response(served.status)
            if served.says_length:
                self.send_header("Content-Length", str(len(served.content)))
            self.end_headers()
            self.close_connection = True

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            served.requests.append(wanted)
            if served.status != 200:
                self.send_error(served.status)
                return
            first = 0
            if wanted and served.ranges and self.headers.get("If-Range") in (None, served.tag):
                first = int(wanted.removeprefix("bytes=").partition("-")[0])
                if first >= len(served.content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(served.content) - 1}/{len(served.content)}")
            else:
                self.send_response(200)
            rest = served.content[first:]
            if served.says_length:
                self.send_header("Content-Length", str(len(rest)))
            if served.tag:
                self.send_header("ETag", served.tag)
            self.end_headers()
            self.wfile.write(rest[: served.breaks.pop(0)] if served.breaks else rest)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with answering(Handler) as address:
        served.address = f"{address}/files/weights%20one.pt"
        yield served
