"""A page in a real browser: headless Chromium, driven through its DevTools protocol. Debian's package `chromium` is enough."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
_SECONDS = 60.0  # for the browser to start, and for an answer
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9, "Home": 36, "End": 35, "Escape": 27, "Enter": 13}


class Page:
    """One tab. `said`: what the browser logged: errors of scripts, and what the page's policy refused."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse):
        self._loop, self._socket, self._numbers = loop, socket, itertools.count(1)
        self.said: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), _SECONDS))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.said.append(message["params"]["exceptionDetails"]["exception"]["description"])
            elif message.get("method") == "Log.entryAdded":
                self.said.append(message["params"]["entry"]["text"])
            elif message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    def show(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size in CSS pixels, and what the reader prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, path: Path) -> float:
        """Open a file; returns the seconds until it is loaded and its scripts have run."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + _SECONDS
        while not self.run("document.readyState === 'complete' && location.href !== 'about:blank'"):
            assert time.monotonic() < deadline, f"{path} was not loaded"
        return self.run("(performance.getEntriesByType('navigation')[0].loadEventEnd || performance.now()) / 1000")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            code = _KEYS.get(key, ord(key[0].upper()))
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}))

    def picture(self) -> bytes:
        """PNG of what the window shows."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


class Browser:
    """A context manager that gives a Page, and ends the browser that it started."""

    def __init__(self, profile: Path):
        self._profile = profile
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Page:
        assert CHROMIUM is not None
        words = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._profile}",
            "about:blank",
        ]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        loop = asyncio.new_event_loop()
        self._stack.callback(loop.close)
        session = loop.run_until_complete(_session())
        self._stack.callback(lambda: loop.run_until_complete(session.close()))
        url = loop.run_until_complete(asyncio.wait_for(_tab(session, self._profile / "DevToolsActivePort", process), _SECONDS))
        socket = loop.run_until_complete(session.ws_connect(url, max_msg_size=0))
        self._stack.callback(lambda: loop.run_until_complete(socket.close()))
        return Page(loop, socket)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(trust_env=False)


async def _tab(session: aiohttp.ClientSession, file: Path, process: subprocess.Popen[bytes]) -> str:
    """Address of the first tab, when the browser has one."""
    while True:
        assert process.poll() is None, f"Chromium ended with exit code {process.returncode}"
        with contextlib.suppress(OSError, ValueError, IndexError, StopIteration, aiohttp.ClientError):
            port = int(file.read_text().splitlines()[0])
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                return next(tab["webSocketDebuggerUrl"] for tab in await answer.json() if tab["type"] == "page")
        await asyncio.sleep(0.05)
