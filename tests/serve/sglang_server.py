"""The real SGLang server as a child process on this machine's CPU, for tests (installed by tests/sglang_cpu/install.sh)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 600.0  # 30 to 60 s on an idle machine, minutes on a busy one
STOP_SECONDS = 30.0


class ServerError(RuntimeError):
    """The server died or did not come up in time; the message ends with the tail of its log."""


def sglang_python() -> Path | None:
    """Interpreter of an environment with SGLang: OPD_SGLANG_PYTHON, else .venv-sglang in the repository, else None."""
    named = os.environ.get("OPD_SGLANG_PYTHON")
    if named:
        if not Path(named).exists():
            raise ServerError(f"OPD_SGLANG_PYTHON={named}: no such file")
        return Path(named)
    python = REPOSITORY / ".venv-sglang" / "bin" / "python"
    return python if python.exists() else None


HOW_TO_INSTALL = "no environment with SGLang; run tests/sglang_cpu/install.sh .venv-sglang, or name its interpreter in OPD_SGLANG_PYTHON"


class SglangServer:
    """`with SglangServer(model, log_dir) as server:` starts one, waits until it answers, and ends it and its children."""

    def __init__(self, model: str | Path, log_dir: str | Path, *, options: tuple[str, ...] = (), environment: dict[str, str] | None = None):
        self.model = Path(model)
        self.log = Path(log_dir) / "sglang.log"
        self.options = options
        self.environment = environment or {}
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SglangServer:
        python = sglang_python()
        if python is None:
            raise ServerError(HOW_TO_INSTALL)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(python), "-m", "sglang.launch_server", "--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        # Without --max-total-tokens the KV cache takes most of the machine's memory.
        command += ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8192", *self.options]
        command += ["--sleep-on-idle"]  # its scheduler would keep a core busy while it waits for requests
        # PYTHONPATH would put this repository's packages, made for another environment, before the server's own.
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **self.environment,
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            self._wait_until_healthy(time.monotonic() + START_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_until_healthy(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if not self.alive():
                raise ServerError(
                    f"SGLang exited with {self.process.poll() if self.process else None} while starting; {self.log}:\n{self.log_tail()}"
                )
            try:
                if httpx.get(f"{self.url}/health", timeout=30.0, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(1.0)
        raise ServerError(f"SGLang did not answer within {START_SECONDS:.0f} s; {self.log}:\n{self.log_tail()}")

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log_tail(self, num_bytes: int = 4000) -> str:
        return self.log.read_bytes()[-num_bytes:].decode(errors="replace")

    def stop(self) -> None:
        """End the server: SIGTERM, on which it ends its own children; after a while SIGKILL to its session, which is ours alone."""
        if self.process is None:
            return
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # the whole session has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
