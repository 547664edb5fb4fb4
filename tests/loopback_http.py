"""Servers on the loopback that stand in for others: what all of them do alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that `handler` answers for, for the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class HubAnswers(BaseHTTPRequestHandler):
    """Answers as a hub gives them, without a log. Handlers have `BaseHTTPRequestHandler` as a base too, and say what to answer."""

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """An answer; of a HEAD without its content."""
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        """An error by the hub's own code."""
        self.send(status, b"", {"X-Error-Code": code})

    def log_message(self, *_: object) -> None:
        pass
