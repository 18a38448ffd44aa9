"""Open pages in a headless Chromium, told what to do through its own debugging pipe: no driver, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# It reads from 3 and writes to 4; what is there already is put out of the way first.
_EXEC = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.closerange(5, 10)
os.execv(sys.argv[3], sys.argv[3:])
"""


def found() -> str | None:
    """Return the path of a browser, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser.

    Attributes:
        errors: what its console was told as an error, what its scripts raised, and what its policy refused.
        requests: the URLs that it has asked for.
    """

    def __init__(self, out: int, into: int) -> None:
        self._out = os.fdopen(out, "wb", buffering=0)
        self._in = os.fdopen(into, "rb")
        self._number = 0
        self._session: str | None = None
        self._rest = b""
        self._seen: list[str] = []
        self.errors: list[str] = []
        self.requests: list[str] = []

    @classmethod
    @contextmanager
    def opened(cls, program: str, profile: Path) -> Iterator[Self]:
        """Start a browser with an empty profile, and end it."""
        (told, out), (into, answers) = os.pipe(), os.pipe()
        command = [sys.executable, "-c", _EXEC, str(told), str(answers), program, *FLAGS]
        command += [f"--user-data-dir={profile}", "about:blank"]
        with subprocess.Popen(
            command, pass_fds=(told, answers), stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        ) as process:
            os.close(told)
            os.close(answers)
            browser = cls(out, into)
            try:
                browser._begin()
                yield browser
            finally:
                with suppress(OSError):
                    browser._send("Browser.close")
                browser._out.close()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                browser._in.close()

    def _begin(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self._seen.clear()
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._read()

    def run(self, script: str) -> Any:
        """Return what a script says; what it raises is an error here."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def look(self, *, width: int, height: int, scheme: str) -> bytes:
        """Return a picture, a PNG, of the page as a window of that size has it, light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer; what happens meanwhile is noted."""
        number = self._send(method, **params)
        while (message := self._read()).get("id") != number:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def _send(self, method: str, **params: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None and not method.startswith("Browser."):
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        return self._number

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._in.fileno(), 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        one, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        self._seen.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
