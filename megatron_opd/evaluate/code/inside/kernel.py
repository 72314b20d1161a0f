"""What the kernel is asked to take away: namespaces, a root folder of one's own, rights to files (Landlock), capabilities, resources."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import stat
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

_NEW_USER = 0x10000000
_NEW_MOUNTS = 0x00020000
_NEW_OTHERS = _NEW_MOUNTS | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000  # pid, net, ipc, uts, cgroup
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
# statvfs's flags are mount's; a user namespace can't take any of these from a mount that it did not make.
_KEPT_FLAGS = 1 | 2 | 4 | 8 | 1024 | 2048 | (1 << 21)  # the last three: noatime, nodiratime, relatime
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_LANDLOCK_RIGHTS, _READ_FILE, _READ_FOLDER = 0x1FFF, 1 << 2, 1 << 3  # all rights of its first version
_PDEATHSIG, _DUMPABLE, _NO_NEW_PRIVILEGES, _DROP_FROM_BOUNDING = 1, 4, 38, 24
NOBODY = 65534
FOLDER = "/box"  # where a program works
_INODES = 4096  # files and folders that a program may have at a time
_STACK = 8 << 20  # bytes of the main thread's stack, and of a thread's that asks for none
_FILES = 64  # open descriptors
DEVICES = ("null", "zero", "full", "random", "urandom")
STREAMS = (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"))  # in /dev, links to /proc/self


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if each is None else os.fsencode(each) for each in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount on {target}")


def control(option: int, value: int) -> None:
    """prctl(option, value). Raises OSError."""
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def end_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends."""
    control(_PDEATHSIG, 9)


def set_dumpable(on: bool) -> None:
    """Off: other processes of the user can neither trace this one nor read its memory."""
    control(_DUMPABLE, int(on))


def can_become(user: int, readable: list[str] | None = None) -> bool:
    """Whether this process may become another user, who can read `readable`; tried in a fork."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os._exit(0 if all(os.access(path, os.R_OK) for path in readable or []) else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def unshare(user: int | None) -> None:
    """Leave every namespace; the next fork is the first process of its own. user: become that one later; None: a namespace of users too."""
    outer_user, outer_group = os.geteuid(), os.getegid()
    _check(_libc.unshare(_NEW_OTHERS | (_NEW_USER if user is None else 0)), "unshare")
    if user is None:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {outer_user} 1"), ("gid_map", f"{NOBODY} {outer_group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)


def change_root(folder: str, readable: list[str], hidden: list[str], packages: list[str], disk: int) -> None:
    """Make `folder` the root, with nothing but what is `readable`, without what is `hidden` in it, but with `packages`.

    disk: bytes that FOLDER, the one place to write to, may hold.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for path in readable:
        if os.path.islink(path):
            os.makedirs(folder + os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(path), folder + path)
        else:
            _bind(path, folder + path)
    covers = [folder + path for path in hidden if os.path.isdir(folder + path)]
    for cover in covers:
        _mount("tmpfs", cover, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64k,nr_inodes=256,mode=755")
    for path in packages:
        _bind(path, folder + path)
    os.mkdir(folder + "/dev")
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            _bind(f"/dev/{name}", f"{folder}/dev/{name}", _MS_NOSUID | _MS_NOEXEC)
    for name, target in STREAMS:
        os.symlink(f"/proc/self/{target}", f"{folder}/dev/{name}")
    os.mkdir(folder + "/proc")
    with contextlib.suppress(OSError):  # a container may cover parts of its own; programs then lack /dev/stdin
        _mount("proc", folder + "/proc", "proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.mkdir(folder + FOLDER)
    mount_folder(folder + FOLDER, disk)
    if not os.path.exists(folder + "/tmp"):  # a Python may lie there
        os.symlink(FOLDER, folder + "/tmp")
    for place in (*covers, folder):
        _mount("none", place, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(folder)
    # The new root over the old one, and the old one away: pivot_root(2).
    _check(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir(FOLDER)


def unshare_mounts() -> None:
    """Leave the namespace of mounts, which another user namespace may own: bubblewrap makes two."""
    _check(_libc.unshare(_NEW_MOUNTS), "unshare")


def mount_folder(path: str, disk: int) -> None:
    """An empty folder in memory that everybody may write to."""
    _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={disk},nr_inodes={_INODES},mode=1777")


def _bind(path: str, target: str, flags: int = _MS_NOSUID | _MS_NODEV) -> None:
    """Show a file or folder at `target`, read-only."""
    if stat.S_ISDIR(os.stat(path).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND)
    _mount("none", target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | flags | os.statvfs(path).f_flag & _KEPT_FLAGS)


def restrict_files(readable: list[str], hidden: list[str]) -> bool:
    """From now on only what is `readable` and not `hidden` can be opened, and nothing written. False where the kernel has no Landlock."""
    rights = ctypes.c_uint64(_LANDLOCK_RIGHTS)
    rules = _libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rights), ctypes.sizeof(rights), 0)
    if rules < 0:
        return False
    for path in (*_without(readable, hidden), *(f"/dev/{name}" for name in DEVICES)):
        _allow_reading(rules, path)
    control(_NO_NEW_PRIVILEGES, 1)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock")
    os.close(rules)
    return True


def _without(paths: list[str], hidden: list[str]) -> list[str]:
    """`paths`, and in the place of a folder that holds something hidden what else it holds: Landlock can only allow."""
    found = []
    for path in paths:
        inner = [each for each in hidden if each == path or each.startswith(path + "/")]
        if path in inner:
            continue
        found += _without([os.path.join(path, name) for name in os.listdir(path)], inner) if inner else [path]
    return found


def _allow_reading(rules: int, path: str) -> None:
    class Rule(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))

    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    rule = Rule(_READ_FILE | _READ_FOLDER if folder else _READ_FILE, descriptor)
    _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, ctypes.byref(rule), 0), f"landlock for {path}")
    os.close(descriptor)


def drop_privileges(user: int | None) -> None:
    """Become `user`, if one is given, and give up every capability for good."""
    for capability in range(64):
        if _libc.prctl(_DROP_FROM_BOUNDING, capability, 0, 0, 0):
            break
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    control(_NO_NEW_PRIVILEGES, 1)


def limit_resources(limits: dict[str, Any]) -> None:
    """Limits of a program's process: bytes of memory and of a file, threads, seconds of CPU time (whole ones, as a last resort)."""
    for which, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_CPU, limits["cpu"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 1),  # 0 would still start a program that takes cores: core(5)
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        *(((resource.RLIMIT_NPROC, limits["threads"]),) if limits["own_user"] else ()),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    most = limits["memory"] if hard == resource.RLIM_INFINITY else min(limits["memory"], hard)
    resource.setrlimit(resource.RLIMIT_STACK, (min(_STACK, most), most))
