"""Starts the ranks of one node when nobody else (torchrun, Slurm) has; ends them all when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_opd.checkpoints.saved import last_saved
from megatron_opd.errors import INTERRUPTED, ConfigError
from megatron_opd.safety.processes import INTERRUPT, LISTENER, STOP_SIGNALS, end_with_parent, signal_name
from megatron_opd.train.stop import STOPPING, ended_at_once, not_started

RANKS_PER_CORE = 4  # started without being asked for, on a CPU
_LAUNCHED, _TELL = "OPD_LAUNCHED_BY", "OPD_LAUNCHER_PIPE"
_ALONE_THREADS = "OPD_THREADS_ALONE"
# `-m megatron_opd` would take whatever folder of that name lies where one stands: the ranks run the package that runs here.
_RANK = "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); from {module} import run; sys.exit(run())"


def is_rank() -> bool:
    """True in a process that torchrun, or `launch`, started."""
    return "RANK" in os.environ


def default_ranks(model_parallel: int) -> int:
    """Ranks to start on this node: one a GPU, or as few as the model-parallel layout needs on a CPU.

    Raises ConfigError where these would be many more than there are cores.
    """
    import torch

    cores = os.cpu_count() or 1
    if not torch.cuda.is_available() and model_parallel > RANKS_PER_CORE * cores:
        raise ConfigError(
            f"the layout takes {model_parallel} ranks, and this machine has no GPU and {cores} cores; run it where the GPUs are, make it smaller, "
            f"or say --nproc {model_parallel} to start as many here"
        )
    return torch.cuda.device_count() or model_parallel


def check_gpus(ranks: int) -> None:
    """Raise ConfigError where this node has GPUs, but fewer than `ranks`."""
    import torch

    if torch.cuda.is_available() and ranks > (count := torch.cuda.device_count()):
        raise ConfigError(f"--nproc {ranks}, but this node has {count} GPUs; start {count} ranks, or set CUDA_VISIBLE_DEVICES='' for CPUs")


def rank_command(module: str) -> list[str]:
    """The words that start a rank by `run` of a module of this package, before its arguments."""
    return [sys.executable, "-P", "-c", _RANK.format(module=module), str(Path(__file__).resolve().parents[2])]


class _Ranks:
    """The children, and what signals to this process mean for them. SIGINT must be blocked while they are started: they inherit it."""

    def __init__(self, arguments: list[str], ranks: int, output: str):
        self.output = output
        self.interrupted = False
        self.last_words: str | None = None  # of a Ctrl-C that ended the ranks at once
        self._heard, tell = os.pipe()
        os.set_blocking(self._heard, False)
        # torch would have the first rank listen for the others on every address of this machine, and at a port that was free a moment ago.
        meeting = socket.create_server(("127.0.0.1", 0), backlog=ranks)
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1])}
        environment = os.environ | world | {_LAUNCHED: str(os.getpid()), _TELL: str(tell), LISTENER: str(meeting.fileno())}
        environment[_ALONE_THREADS] = environment.get("OMP_NUM_THREADS", "")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        command = [*rank_command("megatron_opd.__main__"), *arguments]
        self.children = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                pass_fds=[tell] if rank else [tell, meeting.fileno()],
            )
            for rank in range(ranks)
        ]
        os.close(tell)
        meeting.close()

    def pass_on(self, number: int, frame: Any) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C asks the ranks to stop; a second one, or one that comes before all of them listen, ends them at once."""
        if self.interrupted or not self._listen():
            self.last_words = ended_at_once(self.output) if self.interrupted else not_started(self.output)
            self.pass_on(signal.SIGKILL, None)
        else:
            self.interrupted = True
            print(f"\n{STOPPING}", file=sys.stderr, flush=True)
            self.pass_on(INTERRUPT, None)

    def _listen(self) -> bool:
        try:
            return os.read(self._heard, 1) != b""
        except BlockingIOError:
            return False

    def wait(self) -> int:
        """The exit code: the first that is not 0, once one has failed or all have ended."""
        while True:
            codes = [child.poll() for child in self.children]
            if self.last_words is not None:
                print(f"\n{self.last_words}", file=sys.stderr, flush=True)
                return INTERRUPTED
            if any(code not in (None, 0, INTERRUPTED) for code in codes):
                time.sleep(1)  # let the others say what they have to say
                codes = [child.poll() for child in self.children]
                for rank, code in enumerate(codes):
                    if code is not None and code < 0:
                        print(
                            f"rank {rank} was ended by {signal_name(-code)}; {last_saved(self.output)}; the same command goes on",
                            file=sys.stderr,
                        )
                failed = [code for code in codes if code]
                # Rather our own word, or that one was killed, than what the others made of it (NCCL aborts).
                code = next((code for code in (2, -signal.SIGKILL) if code in failed), max(failed))
                return code if code > 0 else 128 - code
            if None not in codes:
                return max(code or 0 for code in codes)
            time.sleep(0.1)

    def end(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.kill()  # the others wait in a collective; what counts is on disk
            child.wait()
        os.close(self._heard)


def launch(arguments: list[str], ranks: int, output: str) -> int:
    """Run `megatron-opd ARGUMENTS`, a training that writes to `output`, as `ranks` processes of this node; returns their exit code.

    SIGTERM, SIGINT and SIGUSR1 are passed on. Should this process be killed, its ranks end too.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    started = _Ranks(arguments, ranks, output)
    before = {number: signal.signal(number, started.pass_on) for number in STOP_SIGNALS}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, started.interrupt)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        return started.wait()
    finally:
        started.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_launcher() -> None:
    """In a rank of ours: all of them listen to Ctrl-C from now on."""
    if (pipe := os.environ.pop(_TELL, None)) is not None:
        if os.environ["RANK"] == "0":
            os.write(int(pipe), b"!")
        os.close(int(pipe))


def threads_alone() -> int | None:
    """Threads that a rank of ours would have if it were the only process: what it may use while the others wait. None: as it has."""
    given = os.environ.get(_ALONE_THREADS)
    return None if given is None else int(given) if given.isdecimal() else os.cpu_count()


def end_with_launcher() -> None:
    """In a rank of ours: ask the kernel to end this process when its launcher ends (kill -9 included)."""
    launcher = os.environ.get(_LAUNCHED)
    if launcher is not None:
        end_with_parent(int(launcher))
