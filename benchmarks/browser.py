"""A headless browser, driven over a pipe by its DevTools protocol: no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def find_browser() -> str | None:
    """The first browser of `NAMES` on the path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab. errors: messages of the console and exceptions of the page so far."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer = commands, answers, b""
        self._number, self._session = 0, None
        self.errors: list[str] = []

    def call(self, method: str, timeout_s: float = 150.0, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout_s
        while True:
            answer = self._next(end - time.monotonic(), method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, timeout_s: float, method: str) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(end - time.monotonic(), 0))
            assert ready, f"the browser did not answer {method}"
            content = os.read(self._answers, 2**20)
            assert content, f"the browser ended at {method}"
            self._buffer += content
        text, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(text)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(value.get("value", value)) for value in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def attach(self) -> None:
        """Open a tab and follow its console."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, address: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=address)

    def evaluate(self, expression: str, timeout_s: float = 150.0) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        answer = self.call("Runtime.evaluate", timeout_s, expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 150.0) -> None:
        """Wait until an expression is true; a page that is not there yet has none."""
        end = time.monotonic() + timeout_s
        tried = f"(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()"
        while not self.evaluate(tried):
            assert time.monotonic() < end, f"{expression} did not become true; {self.errors}"
            time.sleep(0.05)

    def size(self, width: int, height: int, mobile: bool = False, scale: float = 1.0) -> None:
        """Give the view a size in CSS pixels. scale: pixels of a picture per CSS pixel."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def prefer(self, dark: bool = False, still: bool = False) -> None:
        """What the person prefers: dark colours, and (still) no motion."""
        features = {
            "color-scheme": "dark" if dark else "light",
            "reduced-motion": "reduce" if still else "no-preference",
        }
        named = [{"name": f"prefers-{name}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key: its name, its number, and the text that it types."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of the view, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A tab of a new browser with a profile of its own."""
    ours, theirs = os.pipe(), os.pipe()  # commands, answers
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the browser reads commands from descriptor 3 and answers on 4
        redirected = f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        command = ["bash", "-c", redirected, "browser", program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL)
        os.close(ours[0])
        os.close(theirs[1])
        try:
            page = Page(ours[1], theirs[0])
            page.attach()
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            os.close(ours[1])
            os.close(theirs[0])
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
