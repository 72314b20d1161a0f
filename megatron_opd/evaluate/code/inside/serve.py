"""The first program within the isolation: it isolates itself further, then forks a process for each run that it is asked for.

    python -s -S -P start.py CONFIG      CONFIG: JSON of `isolation.config`

Messages with the starter, over the socket `control`, each one packet:

    out   {"ready": {...what there is}} | {"failed": reason}
    in    {"run": "main" | "serve" | "asserts", "cpu": seconds} with descriptors: stdin, stdout, stderr, source, and channels
    out   "hello", by the new process itself when it is bound, so that the kernel tells its number; {"ended": true} when it has ended
    in    {"kill": true}: end it. {"reap": true}: let its number go
    out   {"status": that of waitpid}

When the starter is gone, the socket ends, and this process with all that is in the isolation.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

from megatron_opd.evaluate.code.inside import asserts, kernel, program, seccomp, wire

_PACKET = 1 << 16  # bytes
_MOST_DESCRIPTORS = 8
_SOURCE, _HIGH = 3, 64  # descriptors: that of the source, and one above all of a run


def main() -> None:
    """Serve until the starter is gone."""
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control"])
    sys.path += config["path"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    try:
        found = _isolate(config)
    except OSError as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    control.send(json.dumps({"ready": found}).encode())
    _serve(control, config)


def _isolate(config: dict[str, Any]) -> dict[str, Any]:
    """Give up what the mode takes away; says which user namespace, user and Landlock there are."""
    kernel.end_with_parent()
    if config["mode"] != "bubblewrap" and os.getppid() != config["parent"]:
        raise OSError("the process that started this one has ended")
    user = config["user"] if os.geteuid() == 0 and kernel.can_become(config["user"]) else None
    found: dict[str, Any] = {}
    if config["mode"] == "namespaces":
        if user is not None:
            try:
                kernel.unshare(user)
            except PermissionError:
                user = None
        if user is None:
            kernel.unshare(None)
        _fork_first_process()
        kernel.end_with_parent()
        kernel.change_root(config["folder"], config["readable"], config["hidden"], config["packages"], config["disk"])
        kernel.drop_privileges(user)
        found = {"own_user": True}
    elif config["mode"] == "bubblewrap":
        kernel.unshare_mounts()
        kernel.mount_folder(kernel.FOLDER, config["disk"])
        os.chdir(kernel.FOLDER)
        kernel.drop_privileges(user)
        found = {"own_user": user is not None}
    else:
        os.chdir(_arrange_folder(config))
        if user is not None and not kernel.can_become(user, config["readable"]):
            user = None
        landlock = kernel.restrict_files([*config["readable"], *config["packages"], config["folder"]], config["hidden"])
        kernel.drop_privileges(user)
        found = {"own_user": user is not None, "landlock": landlock}
    kernel.end_with_parent()  # a change of user takes this back
    kernel.set_dumpable(False)
    config["own_user"] = found["own_user"]
    if config["prelude"]:
        program.import_prelude()
    return found


def _fork_first_process() -> None:
    """The parent waits for the first process of the new namespace, which returns."""
    first = os.fork()
    if first:
        kernel.end_with_parent()
        os.waitpid(first, 0)
        os._exit(0)


def _arrange_folder(config: dict[str, Any]) -> str:
    """An empty folder to work in; beside it one that holds the packages alone, as their own can't be listed."""
    empty, packages = os.path.join(config["folder"], "box"), os.path.join(config["folder"], "packages")
    os.mkdir(empty, 0o755)
    os.mkdir(packages, 0o755)
    for path in config["packages"]:
        os.symlink(path, os.path.join(packages, os.path.basename(path)))
    sys.path[:] = [packages if path in config["path"] else path for path in sys.path]
    return empty


def _serve(control: socket.socket, config: dict[str, Any]) -> None:
    while True:
        data, descriptors, *_ = socket.recv_fds(control, _PACKET, _MOST_DESCRIPTORS)
        if not data:
            return
        request = json.loads(data)
        child = os.fork()
        if child == 0:
            _run(request, descriptors, control, config)
        for descriptor in descriptors:
            os.close(descriptor)
        _watch(control, child)


def _watch(control: socket.socket, child: int) -> None:
    """Wait for a run's end, or for the starter's, which ends this process. The child's number stays taken until the starter lets it go."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    for descriptor in (ended, control.fileno()):
        poll.register(descriptor, select.POLLIN)
    told = False
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == ended:
                control.send(b'{"ended": true}')
                poll.unregister(ended)
                told = True
                continue
            data = control.recv(_PACKET)
            if not data or b"kill" in data:
                if not told:
                    os.kill(child, signal.SIGKILL)
                if not data:
                    os.waitpid(child, 0)
                    os._exit(0)
            elif told:  # "reap"
                os.close(ended)
                control.send(json.dumps({"status": os.waitpid(child, 0)[1]}).encode())
                return


def _run(request: dict[str, Any], descriptors: list[int], control: socket.socket, config: dict[str, Any]) -> NoReturn:
    """In the fork: the program, or the tests. Does not return."""
    try:
        os.setsid()
        kernel.end_with_parent()
        channels, link = _arrange(descriptors, control)
        with open(_SOURCE, "rb") as file:
            given = json.load(file)
        kernel.set_dumpable(request["run"] != "asserts")  # where a program might be the same user's, it reads no memory of the tests
        kernel.limit_resources({**config, "cpu": request["cpu"]})
        seccomp.install(writes=config["mode"] != "plain")
        link.send(b"hello")
        link.close()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    if request["run"] == "main":
        program.run_main(given, prelude=config["prelude"])
    elif request["run"] == "serve":
        program.serve(given, channels[0], prelude=config["prelude"])
    else:
        asserts.run(given["before"], given["cases"], given["function"], *channels)
    os._exit(0)


def _arrange(descriptors: list[int], control: socket.socket) -> tuple[list[wire.Channel], socket.socket]:
    """The run's descriptors from 0 on, and none but them and, for a last word, the socket to the starter."""
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD, _HIGH) for each in (*descriptors, control.fileno())]
    for number, descriptor in enumerate(moved):
        os.dup2(descriptor, number)
    control.detach()
    os.closerange(len(moved), 2 * _HIGH)
    return [wire.Channel(number) for number in range(_SOURCE + 1, len(descriptors))], socket.socket(fileno=len(descriptors))
