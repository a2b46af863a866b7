"""Headless Chromium over the DevTools protocol, through a pipe: no library, no port.

What a page asks for, writes to its console or throws is kept, so that a test can say that there was none of it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = "no Chromium on this machine (apt-get install chromium)"

_QUIET = (
    *("--headless=new", "--disable-gpu", "--no-first-run", "--no-default-browser-check", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--disable-default-apps",
        "--disable-extensions",
        "--mute-audio",
        "--hide-scrollbars",
    ),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)


def program() -> str | None:
    """The browser of this machine."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer, self._number, self._session = write, read, b"", 0, ""
        self.requests: list[str] = []
        """Addresses of everything that was asked for, the page itself included."""
        self.complaints: list[str] = []
        """Messages of the console, exceptions, and what the policy of the page refused."""
        self._loaded = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of one command; what happens meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self._number:
            self._note(found)
        assert "error" not in found, (method, found["error"])
        return found["result"]

    def show(self, path: Path, width: int = 1200, *, dark: bool = False) -> None:
        """Load a file at ``width`` CSS pixels; a phone's width is shown as a phone does."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=850, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        before = self._loaded
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self._loaded == before:
            self._note(self._next())
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is kept."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, height: int | None = None) -> None:
        """A PNG of the whole page, or of its first ``height`` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._read, 1 << 20)
            assert data, "the browser ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, found: dict[str, Any]) -> None:
        match found.get("method"), found.get("params", {}):
            case "Network.requestWillBeSent", {"request": request}:
                self.requests.append(request["url"])
            case "Runtime.consoleAPICalled", said:
                self.complaints.append(json.dumps(said["args"]))
            case "Runtime.exceptionThrown", thrown:
                self.complaints.append(json.dumps(thrown["exceptionDetails"]))
            case "Log.entryAdded", {"entry": entry}:
                self.complaints.append(entry["text"])
            case "Page.loadEventFired", _:
                self._loaded += 1
            case _:
                pass


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own in ``folder``, ended with all of its processes."""
    found = program()
    assert found, MISSING
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox in Chromium
    shell = f'exec "$@" 3<&{to_browser} 4>&{to_us}'
    command = ["bash", "-c", shell, "bash", found, *_QUIET, *sandbox, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        command,
        pass_fds=(to_browser, to_us),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_browser)
    os.close(to_us)
    try:
        yield Page(from_us, from_browser)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(from_us)
        os.close(from_browser)
