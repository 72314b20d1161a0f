"""A place for the programs of one answer, seen from outside: it is started, told what to run, watched, and ended whole."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import tempfile
import time
from typing import Any

from megatron_opd.evaluate.code import isolation
from megatron_opd.evaluate.code.inside import kernel, wire
from megatron_opd.recipe.code_limits import CodeLimits, Mode

_START_SECONDS = 60.0
_END_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
_TICK = 0.02  # seconds between two looks at what a program takes
_PACKET = 1 << 16
_ERRORS_KEPT = 4000  # bytes of stderr
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # of a memfd: no more seals, no shrinking, growing, writing
_CPU_CLOCK = 2  # of a process: clock_getcpuclockid(3) is (~pid << 3) | 2
_numbers = itertools.count()


class SandboxError(Exception):
    """The isolation can't be made, or broke: no fault of the program."""


class Sandbox:
    """One isolation, in which one run goes after another. Close it, whatever happens. Raises SandboxError if it can't start."""

    def __init__(self, mode: Mode, interpreter: isolation.Interpreter, limits: CodeLimits, *, prelude: bool = False):
        self.limits = limits
        self._folder = tempfile.TemporaryDirectory(prefix="code-")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with theirs:
            settings = isolation.config(
                mode, interpreter, limits, folder=self._folder.name, control=theirs.fileno(), number=next(_numbers), prelude=prelude
            )
            os.chmod(self._folder.name, 0o755)
            try:
                self._process = subprocess.Popen(
                    isolation.command(mode, interpreter, settings),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env=isolation.environment(kernel.FOLDER if mode != "plain" else self._folder.name),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except BaseException as error:
                self._control.close()
                self._folder.cleanup()
                if isinstance(error, OSError):
                    raise SandboxError(str(error)) from None
                raise
        try:
            self.features = self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> dict[str, Any]:
        self._control.settimeout(_START_SECONDS)
        try:
            answer = json.loads(self._control.recv(_PACKET) or b"{}")
        except TimeoutError:
            raise SandboxError(f"it did not start within {_START_SECONDS:.0f} s") from None
        if "ready" in answer:
            return answer["ready"]
        if "failed" in answer:
            raise SandboxError(answer["failed"])
        assert self._process.stderr is not None
        self._process.kill()
        raise SandboxError(self._process.stderr.read()[-500:].decode(errors="replace").strip() or "it ended at its start")

    def start(
        self, kind: str, given: dict[str, Any], *, stdin: str = "", cpu_seconds: float, channels: tuple[socket.socket, ...] = ()
    ) -> Run:
        """Start a run: "main", "serve" or "asserts" of inside/serve.py. `channels` are given away. Raises SandboxError."""
        outputs, errors = os.pipe(), os.pipe()
        files = [_memory_file(stdin.encode("utf-8", "surrogatepass"))]
        try:
            files.append(_memory_file(json.dumps(given).encode()))
            request = json.dumps({"run": kind, "cpu": int(cpu_seconds) + 2}).encode()
            descriptors = [files[0], outputs[1], errors[1], files[1], *(channel.fileno() for channel in channels)]
            self._control.settimeout(_START_SECONDS)
            try:
                socket.send_fds(self._control, [request], descriptors)
                process = self._await_hello()
            except (OSError, SandboxError) as error:
                os.set_blocking(errors[0], False)
                with contextlib.suppress(OSError):
                    error = SandboxError(f"{error} {os.read(errors[0], 1000).decode(errors='replace')}")
                raise SandboxError(f"a run can't start: {error}") from None
        except BaseException:
            os.close(outputs[0])
            os.close(errors[0])
            raise
        finally:
            for descriptor in (*files, outputs[1], errors[1]):
                os.close(descriptor)
            for channel in channels:
                channel.close()
        return Run(self, self._control, process, outputs[0], errors[0])

    def _await_hello(self) -> int:
        """The number of the new process, which the kernel writes on what it sends."""
        data, ancillary, *_ = self._control.recvmsg(_PACKET, socket.CMSG_SPACE(struct.calcsize("3i")))
        if data != b"hello":
            raise SandboxError("it ended before the program")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                return struct.unpack("3i", content[: struct.calcsize("3i")])[0]
        raise SandboxError("the kernel names no process")

    def close(self) -> None:
        """End everything in it."""
        self._control.close()  # its first process ends when this does, and with that one all others
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._folder.cleanup()

    def kill(self) -> None:
        """From another thread: whoever waits for it gets a SandboxError."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)


class Run:
    """A process in a sandbox. `fault`: which limit it ran into, None for none."""

    def __init__(self, sandbox: Sandbox, control: socket.socket, process: int, output: int, errors: int):
        self._limits = sandbox.limits
        self._control = control
        self._process = process
        self._pipes = {output: bytearray(), errors: bytearray()}
        self._output, self._errors = output, errors
        self._taken = 0
        self._clock = (~process << 3) | _CPU_CLOCK
        self.fault: str | None = None
        self.ended = False
        self.stopped = False  # by `close`, though it was within its limits
        self.status: int | None = None
        self.seconds = 0.0
        self._selector = selectors.DefaultSelector()
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ)
        self._selector.register(control, selectors.EVENT_READ)
        self.begin_test()

    def begin_test(self) -> None:
        """From here on the limits of time count anew."""
        self._cpu_begin, self._wall_begin = self._cpu_seconds(), time.monotonic()

    def descriptor(self) -> int:
        """Readable when `step` has something to do."""
        return self._selector.fileno()  # type: ignore[attr-defined]

    def step(self, timeout: float = 0.0) -> None:
        """Take what there is of the run, waiting at most `timeout` seconds for it, and end it if it is over a limit. Raises SandboxError."""
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._control:
                self._take_message()
            else:
                self._drain(key.fd)
        if not self.ended and self.fault is None:
            self.fault = self._over_limit()
            if self.fault is not None:
                self.kill()

    def wait(self) -> None:
        """Until the run has ended. Raises SandboxError."""
        while not self.ended:
            self.step(_TICK)

    def settle(self) -> None:
        """Wait a moment for a run that says no more to end, so that it is known how."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not self.ended and time.monotonic() < deadline:
            self.step(_TICK)

    def kill(self) -> None:
        """Ask for its end; `wait` for it."""
        with contextlib.suppress(OSError):
            self._control.send(b'{"kill": true}')

    def close(self) -> None:
        """End it, and let its pipes go. Raises SandboxError if the sandbox is broken."""
        try:
            if not self.ended:
                self.stopped = True
                self.kill()
                self.wait()
        finally:
            self._selector.close()
            for pipe in self._pipes:
                with contextlib.suppress(OSError):
                    os.close(pipe)

    @property
    def output(self) -> str:
        return self._pipes[self._output].decode("utf-8", "replace")

    @property
    def errors(self) -> str:
        return self._pipes[self._errors].decode("utf-8", "replace").strip()

    def _take_message(self) -> None:
        try:
            answer = json.loads(self._control.recv(_PACKET) or b"{}")
        except (OSError, ValueError):
            answer = {}
        if answer.get("ended"):
            self.seconds = self._cpu_seconds()
            for pipe in self._pipes:
                self._drain(pipe)
            self._control.send(b'{"reap": true}')
        elif "status" in answer:
            self.ended, self.status = True, answer["status"]
            self._selector.unregister(self._control)
        else:
            raise SandboxError("the isolation's first process is gone")

    def _drain(self, pipe: int) -> None:
        kept = self._pipes[pipe]
        while self.fault is None:
            try:
                data = os.read(pipe, 1 << 18)
            except BlockingIOError:
                return
            if not data:
                break
            self._taken += len(data)
            kept += data
            if pipe == self._errors:
                del kept[:-_ERRORS_KEPT]
            if self._taken > self._limits.output_mib << 20:
                self.fault = "output limit"
                self.kill()
        with contextlib.suppress(KeyError):
            self._selector.unregister(pipe)

    def count_output(self, size: int) -> None:
        """Of what it says over a channel."""
        self._taken += size

    def _cpu_seconds(self) -> float:
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0

    def _over_limit(self) -> str | None:
        if self._cpu_seconds() - self._cpu_begin > self._limits.seconds or time.monotonic() - self._wall_begin > self._limits.wall_seconds:
            return "timeout"
        if self._taken > self._limits.output_mib << 20:
            return "output limit"
        try:
            with open(f"/proc/{self._process}/stat", encoding="ascii", errors="replace") as file:
                threads = int(file.read().rpartition(")")[2].split()[17])
        except (OSError, ValueError, IndexError):
            return None
        return "threads" if threads > self._limits.threads + 1 else None


def signal_of(status: int) -> str | None:
    """The name of the signal that ended a process, from what `wait` gave."""
    if not os.WIFSIGNALED(status):
        return None
    try:
        return signal.Signals(os.WTERMSIG(status)).name
    except ValueError:
        return f"signal {os.WTERMSIG(status)}"


def _memory_file(content: bytes) -> int:
    """A file that only its descriptor names, and that nobody can change any more."""
    descriptor = os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class TooLong(Exception):
    """A message has more bytes than can be of use."""


class Conversation:
    """Messages with a run over a socket, while the runs that take part are kept within their limits."""

    def __init__(self, channel: socket.socket, speaker: Run, *others: Run):
        self._channel, self._speaker, self._runs = channel, speaker, (speaker, *others)
        self._unsent, self._received = bytearray(), bytearray()
        channel.setblocking(False)

    def send(self, message: wire.Message) -> None:
        """Before `receive`, which sends it."""
        self._unsent += wire.to_line(message)

    def receive(self, longest: int) -> wire.Message | None:
        """The next message; None if none comes any more, as a run is over a limit or has ended.

        Raises SandboxError, TooLong for one of more than `longest` bytes, ValueError for what is no message.
        """
        while b"\n" not in self._received:
            if len(self._received) > longest:
                raise TooLong
            if any(run.fault for run in self._runs):
                return None
            poll = select.poll()
            poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            for run in self._runs:
                if not run.ended:
                    poll.register(run.descriptor(), select.POLLIN)
            ready = dict(poll.poll(1000 * _TICK))
            for run in self._runs:
                if not run.ended:
                    run.step()
            if self._channel.fileno() in ready and not self._exchange():
                return None
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        return wire.from_line(bytes(line))

    def _exchange(self) -> bool:
        """Send and receive what goes now. False where the other side has ended."""
        try:
            if self._unsent:
                with contextlib.suppress(BlockingIOError):
                    del self._unsent[: self._channel.send(self._unsent[: 1 << 18])]
            with contextlib.suppress(BlockingIOError):
                data = self._channel.recv(1 << 18)
                self._speaker.count_output(len(data))
                self._received += data
                return bool(data)
        except OSError:
            return False
        return True
