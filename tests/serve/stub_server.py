"""tools/stub_sglang.py as a child process, for tests of the client that need a server to fail in some way at some moment."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "stub_sglang.py"
LAUNCH_COMMAND = [sys.executable, str(SCRIPT)]
START_SECONDS = 120.0


class StubServer:
    """`with StubServer(model, "--poison", "7:none") as server:`; `port` keeps the address over restarts."""

    def __init__(self, model: str | Path, *options: str, port: int | None = None):
        self.model, self.options = model, options
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def start(self) -> None:
        command = [*LAUNCH_COMMAND, "--model-path", str(self.model), "--port", str(self.port), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, "the stub ended while it started"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise TimeoutError("the stub did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def facts(self) -> dict[str, Any]:
        """What it counted: num_posts, peak_tokens."""
        return httpx.get(f"{self.url}/stub", trust_env=False).json()

    def __enter__(self) -> StubServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
