"""Ports that processes of a test meet at."""

from __future__ import annotations

import itertools
import os
import re
import socket

# Below the ports that the system hands out by itself, so that no client of another test gets one between two lines; a
# thousand for every worker that runs tests, so that no two of them choose the same.
_FIRST, _EACH, _WORKERS = 20_000, 1_000, 12
_next = itertools.count(os.getpid() % _EACH)


def free_port() -> int:
    """A port on the loopback that nobody listens at, another one at every call."""
    worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0) % _WORKERS
    for number in itertools.islice(_next, _EACH):
        port = _FIRST + _EACH * worker + number % _EACH
        with socket.socket() as listening:
            try:
                listening.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
