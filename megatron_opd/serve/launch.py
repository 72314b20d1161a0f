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
from megatron_opd.recipe.inference import EngineConfig, LaunchConfig
from megatron_opd.safety.redact import NOT_KEPT, secret_values
from megatron_opd.safety.untrusted import printable

STOP_SECONDS = 30.0
TAIL_BYTES = 3000
_NO_SGLANG = re.compile(r"No module named '?sglang'?(?![\w.])|No module named '?sglang\.launch_server'?")
_INSTALL_SGLANG = (
    "the Python that was to run the server has no SGLang; install it there, or say with engine.launch.command how a server is started "
    'where it is (for example engine.launch.command=\'[".venv-serve/bin/python", "-m", "sglang.launch_server"]\')'
)
# What a broken GPU, or the links between GPUs, look like in SGLang's log. The others are the recipe's fault on any node.
_GPU_FAULT = re.compile(
    r"CUDA error: (?!out of memory|invalid device ordinal|no kernel image)|CUDA unknown error|NCCL error|nccl(Unhandled|System|Internal|Remote)\w*Error"
    r"|\bECC error",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"out of memory|mem-fraction-static", re.IGNORECASE)
# SGLang kills itself whatever went wrong in one of its processes.
_OWN_END = re.compile(r"Received sigquit from a child|hit an exception")
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

    def __init__(self, config: EngineConfig, launch: LaunchConfig, model: Path, *, number: int, log_dir: Path, first_gpu: int = 0):
        self.config, self.launch, self.model, self.number = config, launch, model, number
        self.first_gpu = first_gpu + number * launch.tp * launch.dp
        self.log = log_dir / f"sglang-{socket.gethostname()}-{os.getpid()}-{self.first_gpu if first_gpu else number}.log"
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
        _find(command[0])
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
        words = words or _default_command()
        options = {"--model-path": self.model, "--host": "127.0.0.1", "--port": port, "--tp-size": launch.tp, "--dp-size": launch.dp}
        if self.first_gpu:
            options["--base-gpu-id"] = self.first_gpu
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
            return _INSTALL_SGLANG
        if code in _SHELL_CODES:
            return f"engine.launch.command names a program that {_SHELL_CODES[code]}"
        return None

    def node_failed(self) -> bool:
        """Whether it may live on another node: it was killed by a signal, or its log ends with an error of CUDA or NCCL. Once it has died."""
        code = None if self._process is None else self._process.poll()
        tail = self.tail()
        if code is None or self.hopeless() is not None or _OUT_OF_MEMORY.search(tail):
            return False
        return _GPU_FAULT.search(tail) is not None or ((code < 0 or code > 128) and _OWN_END.search(tail) is None)

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
        process = self._process  # two callers may end it at once
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._process is process:
            self._process = None


def check_program(launch: LaunchConfig) -> None:
    """Raise EngineError where the program that starts servers, or SGLang in its Python, is not there. Starts none, and needs no GPU."""
    words = launch.words()[0] or _default_command()
    _find(words[0])
    if words[1:] == _default_command()[1:]:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
        if subprocess.run([words[0], "-c", look], stdin=subprocess.DEVNULL).returncode:
            raise EngineError(f"{words[0]}: {_INSTALL_SGLANG}")


def _default_command() -> list[str]:
    return [sys.executable, "-m", "sglang.launch_server"]


def _find(program: str) -> None:
    if shutil.which(program) is None:
        raise EngineError(f"{program}: no such program; see engine.launch.command")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
