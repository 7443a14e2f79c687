"""A headless Chromium for tests, driven by its DevTools protocol over two pipes; standard library only.

What a page did is seen from outside: what it asked the network for, what it complained about, what its pixels are.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
)
# Chromium reads from descriptor 3 and writes to 4; a launcher puts the pipes there, whatever numbers they have here.
LAUNCHER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 60.0


def find_chromium() -> str | None:
    """The first Chromium on the search path."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason=f"no browser found: none of {', '.join(PROGRAMS)} is on the search path"
)
"""Skips a test where there is no Chromium."""


@dataclass
class Visit:
    """What a page did while it was open: errors, warnings and dialogs in words, and addresses it asked for."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@final
class Browser:
    """One Chromium with one tab; a context manager."""

    def __init__(self) -> None:
        program = find_chromium()
        assert program is not None, "guard the test with needs_chromium"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs_in, self._out), (self._in, theirs_out) = _pipe(), _pipe()
        command = [sys.executable, "-c", LAUNCHER, str(theirs_in), str(theirs_out), program, *OPTIONS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._profile.name}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session, self._visit = b"", 0, "", Visit()
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        try:
            self._call("Browser.close")
            self._process.wait(PATIENCE)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, page: Path, *, width: int = 900, height: int = 800, dark: bool = False, media: str = "") -> Visit:
        """Opens a file as a person would who double-clicks it, and waits until it is loaded."""
        self._visit, self._loaded = Visit(), False
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        address = page.resolve().as_uri()
        self._call("Page.navigate", url=address)
        while not self._loaded:
            self._receive()
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self._visit.requests = [url for url in self._visit.requests if url != address]
        return self._visit

    def settle(self) -> None:
        """Waits until the page says that it has drawn everything."""
        deadline = time.monotonic() + PATIENCE
        while self.evaluate("document.querySelector('[aria-busy=true]') !== null"):
            if time.monotonic() > deadline:
                raise TimeoutError("the page does not finish drawing")
            time.sleep(0.02)

    def press(self, key: str, text: str = "") -> None:
        """Presses and releases a key, as a person does who uses no mouse."""
        code = {"Enter": 13, "Tab": 9, " ": 32}[key]
        for kind in ("keyDown", "keyUp"):
            event = {
                "key": key,
                "windowsVirtualKeyCode": code,
                **({"text": text} if text and kind == "keyDown" else {}),
            }
            self._call("Input.dispatchKeyEvent", type=kind, **event)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, selector: str = "html") -> bytes:
        """The element as a PNG, all of it."""
        box = f"(e => e ? e.getBoundingClientRect().toJSON() : null)(document.querySelector({json.dumps(selector)}))"
        area = self.evaluate(box)
        assert area is not None, f"the page has no {selector}"
        clip = {name: area[name] for name in ("x", "y", "width", "height")} | {"scale": 1}
        answer = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """The page as it would be printed."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=False)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, parameters)
        while (message := self._receive()).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._number

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._in, 1 << 16) if ready else b""
            if not chunk:
                raise TimeoutError("Chromium does not answer")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, details: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent" and not details["request"]["url"].startswith("data:"):
            self._visit.requests.append(details["request"]["url"])
        elif event == "Page.javascriptDialogOpening":
            self._visit.complaints.append(f"dialog: {details['message']}")
            self._send("Page.handleJavaScriptDialog", {"accept": True})
        elif event in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self._visit.complaints.append(json.dumps(details))


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are out of the way of descriptors 3 and 4."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends[0], ends[1]
