"""A real headless browser, driven over the W3C WebDriver protocol with the standard library alone."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1180,860",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key the W3C WebDriver standard gives element ids


class Browser:
    """One window of a headless chromium."""

    def __init__(self, driver: str) -> None:
        """Args: driver: address of a running chromedriver and the session's path in it."""
        self._driver = driver

    def go(self, url: str) -> None:
        """Open a page."""
        self.call("/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("/execute/sync", {"script": f"return {script};", "args": []})

    def click(self, selector: str) -> None:
        """Click an element as a user would: it must be visible and enabled."""
        self.call(f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace an input's text with key presses."""
        element = self._find(selector)
        self.call(f"/element/{element}/clear", {})
        self.call(f"/element/{element}/value", {"text": text})

    def text(self, selector: str) -> str:
        """An element's visible text."""
        return self.call(f"/element/{self._find(selector)}/text")

    def wait_until(self, condition: str, timeout_s: float = 60.0) -> Any:
        """The value of a JavaScript expression once it is truthy; fails with the page's text when that takes long."""
        end = time.monotonic() + timeout_s
        while not (value := self.run(condition)):
            assert time.monotonic() < end, f"{condition} stayed {value!r}; the page:\n{self.text('body')}"
            time.sleep(0.03)
        return value

    def errors(self) -> list[str]:
        """What went wrong on the page since the last call, by the console."""
        entries = self.call("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        """Save the window as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("/screenshot")))

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One command of the protocol; the test fails with the browser's message."""
        return command(self._driver + path, body)

    def _find(self, selector: str) -> str:
        return self.call("/element", {"using": "css selector", "value": selector})[_ELEMENT]


def command(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    """One request of the WebDriver protocol: its value."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {json.loads(error.read())['value']['message']}") from error


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A fresh browser with a profile of its own; `make test-browser` installs what it needs."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver, "chromedriver must be on PATH; `make test-browser` installs it"
    assert chromium, "chromium must be on PATH; `make test-browser` installs it"
    profile = tmp_path_factory.mktemp("profile")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    options = {"binary": chromium, "args": [*_ARGUMENTS, f"--user-data-dir={profile}"]}
    capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    session = None
    try:
        wait_for_driver(address)
        value = command(f"{address}/session", {"capabilities": {"alwaysMatch": capabilities}})
        session = f"{address}/session/{value['sessionId']}"
        yield Browser(session)
    finally:
        if session is not None:
            command(session, method="DELETE")
        process.terminate()
        process.wait(timeout=30)


def wait_for_driver(address: str, timeout_s: float = 60.0) -> None:
    """Block until chromedriver answers."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            if command(f"{address}/status")["ready"]:
                return
        except urllib.error.URLError:
            assert time.monotonic() < end, f"chromedriver at {address} did not answer in {timeout_s:g} s"
        time.sleep(0.1)
