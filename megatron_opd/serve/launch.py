"""SGLang servers as children of this process: started, watched, started again, ended with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from megatron_opd.errors import EngineError
from megatron_opd.inference import EngineConfig, LaunchConfig
from megatron_opd.redact import NOT_KEPT, secret_values
from megatron_opd.untrusted import printable

STOP_SECONDS = 30.0
TAIL_BYTES = 3000
_NO_SGLANG = re.compile(r"No module named '?sglang'?(?![\w.])|No module named '?sglang\.launch_server'?")
_SHELL_CODES = {126: "can't be run", 127: "is not there"}  # what shells say of a command in them
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# A child of a process that was killed must not go on holding GPUs: the kernel ends it with the thread that started it. The check
# closes the gap between fork and prctl. exec keeps the setting.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


class ServerProcess:
    """One server: a command, a log file (appended to at each start) and, while it runs, an address."""

    def __init__(self, config: EngineConfig, launch: LaunchConfig, model: Path, *, number: int, log_dir: Path):
        self.config, self.launch, self.model, self.number = config, launch, model, number
        self.log = log_dir / f"sglang-{socket.gethostname()}-{os.getpid()}-{number}.log"
        self.url = ""
        self.starts = 0
        self._secrets: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it on a free port. Raises EngineError if the command can't be run."""
        self.stop()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # SGLang then gives log-probs of sampled tokens at temperature 1 (the client verifies it).
        variables = self.launch.variables()
        environment = os.environ | {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"} | variables
        command = self.command(port)
        self._secrets = secret_values(variables, command)
        if shutil.which(command[0]) is None:
            raise EngineError(f"{command[0]}: no such program; see engine.launch.command")
        if sys.platform == "linux":
            command = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.starts += 1

    def command(self, port: int) -> list[str]:
        """The words of the command line."""
        config, launch = self.config, self.launch
        words, further = launch.words()
        words = words or [sys.executable, "-m", "sglang.launch_server"]
        options = {"--model-path": self.model, "--host": "127.0.0.1", "--port": port, "--tp-size": launch.tp, "--dp-size": launch.dp}
        if self.number:
            options["--base-gpu-id"] = self.number * launch.tp * launch.dp
        if config.dtype != "auto":
            options["--dtype"] = config.dtype
        if config.context_length is not None:
            options["--context-length"] = config.context_length + 7  # the server keeps 7 for itself
        return [*words, *(str(word) for option in options.items() for word in option), *further]

    def death(self) -> str | None:
        """None while it runs; else how it ended, with the last lines of its log."""
        if self._process is None:
            return "it was stopped, as it did not answer"
        code = self._process.poll()
        return None if code is None else f"it exited with code {code}; the end of {self.log}:\n{self.tail()}"

    def hopeless(self) -> str | None:
        """Why another start would end as this one did; None if it may not. Once it has died."""
        code = None if self._process is None else self._process.poll()
        if _NO_SGLANG.search(self.tail()):
            return (
                "the Python that was to run the server has no SGLang; install it there, or say with engine.launch.command how a server is started "
                'where it is (for example engine.launch.command=\'[".venv-serve/bin/python", "-m", "sglang.launch_server"]\')'
            )
        if code in _SHELL_CODES:
            return f"engine.launch.command names a program that {_SHELL_CODES[code]}"
        return None

    def tail(self) -> str:
        try:
            with self.log.open("rb") as log:
                window = TAIL_BYTES + 4 * max(map(len, self._secrets), default=0)  # none is cut in two
                log.seek(max(0, log.seek(0, os.SEEK_END) - window))
                text = log.read(window).decode(errors="replace")
        except OSError:
            return "(no log)"
        for secret in self._secrets:  # SGLang logs its own arguments
            text = text.replace(secret, NOT_KEPT)
        return printable(_COLOURS.sub("", text[-TAIL_BYTES:]).replace("\r", "\n").strip())

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """SIGTERM, on which SGLang ends its own children; then SIGKILL to what is left of its session, which is ours alone."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
