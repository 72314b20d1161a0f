"""The system calls that a program may make: a seccomp filter, for x86-64 and AArch64.

What is not listed fails with ENOSYS, which libraries take for an old kernel. So a program is one process that may have threads: it can't
fork, run others, signal or trace anybody, open sockets, mount, or make objects that outlive it (shared memory, queues, keys).
The numbers are those of Linux's asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable

# name:x86-64:AArch64; the latter lacks what has a successor.
_PLAIN = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 preadv2:327:286
    pwritev2:328:287 close:3:57 close_range:436:436 lseek:8:62 mmap:9:222 munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233
    brk:12:214 mincore:27:232 msync:26:227 fstat:5:80 stat:4: lstat:6: newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44
    access:21: faccessat:269:48 faccessat2:439:439 readlink:89: readlinkat:267:78 getcwd:79:17 chdir:80:49 fchdir:81:50 getdents64:217:61
    fsync:74:82 fdatasync:75:83 dup:32:23 dup2:33: dup3:292:24 pipe:22: pipe2:293:59 poll:7: ppoll:271:73 select:23: pselect6:270:72
    epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232: epoll_pwait:281:22 epoll_pwait2:441:441 eventfd2:290:19 rt_sigaction:13:134
    rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132
    alarm:37: pause:34: setitimer:38:103 getitimer:36:102 nanosleep:35:101 clock_nanosleep:230:115 restart_syscall:219:128
    clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201: times:100:153 getrusage:98:165
    getpid:39:172 gettid:186:178
    getppid:110:173 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158 getresuid:118:148 getresgid:120:150
    getpgid:121:155 getpgrp:111: getsid:124:156 futex:202:98 futex_waitv:449:449 set_robust_list:273:99 get_robust_list:274:100
    set_tid_address:218:96 rseq:334:293 arch_prctl:158: membarrier:324:283 sched_yield:24:124 sched_getaffinity:204:123
    sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126 getpriority:140:141
    getcpu:309:168 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 uname:63:160 sysinfo:99:179 getrandom:318:278 getrlimit:97:163
    setrlimit:160:164 recvfrom:45:207 shutdown:48:210 getsockopt:55:209
    setsockopt:54:208 getsockname:51:204 getpeername:52:205
"""
_WRITING = """
    ftruncate:77:46 fallocate:285:47 mkdir:83: mkdirat:258:34 unlink:87: unlinkat:263:35 rmdir:84: rename:82: renameat:264:38
    renameat2:316:276 link:86: linkat:265:37 symlink:88: symlinkat:266:36 chmod:90: fchmod:91:52 fchmodat:268:53 utimensat:280:88
    umask:95:166
"""
_ARGUMENT = (
    "kill:62:129 tgkill:234:131 clone:56:220 prctl:157:167 prlimit64:302:261 ioctl:16:29 fcntl:72:25 open:2: openat:257:56 sendto:44:206"
    " socketpair:53:199"
)

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, and the kernel's AUDIT_ARCH
_X32 = 0x40000000  # numbers from here on are another table of x86-64
_LOAD, _EQUAL, _AT_LEAST, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ENOSYS, _EACCES, _EPERM = 38, 13, 1
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_UNIX = 1  # a family of sockets
_CLONE_THREAD = 0x10000
_CLONE_NEW = 0x7E020000 | 0x80  # every kind of namespace
_NAMING = (15, 16, 0x53564D41)  # prctl: names of threads and of memory
# fcntl: descriptors and flags. Not owners of signals: the kernel would send them to whoever is named.
_FCNTL = (0, 1, 2, 3, 4, 1030, 1032, 1034)
_OWNER_IOCTLS = (0x8901, 0x8902, 0x5412)  # FIOSETOWN, SIOCSPGRP; TIOCSTI types into a terminal
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def is_supported() -> bool:
    """Whether this machine is one whose numbers are known; that the kernel takes the filter shows when it is installed."""
    return platform.machine() in _MACHINES


def install(*, writes: bool) -> None:
    """Bind this process to the filter, for good. writes: files may be opened for writing. Raises OSError."""
    code = b"".join(struct.pack("HBBI", *each) for each in build(platform.machine(), os.getpid(), writes=writes))
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code) // 8, code)
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls (seccomp)")


def build(machine: str, pid: int, *, writes: bool) -> list[Instruction]:
    """The filter for the process `pid` on a machine of platform.machine()'s names."""
    column, arch = _MACHINES[machine]
    filter_: list[Instruction] = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":
        filter_ += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for low, high in _ranges(_numbers(_PLAIN + (_WRITING if writes else ""), column).values()):
        filter_ += [(_AT_LEAST, 0, 2, low), (_ABOVE, 1, 0, high), (_RETURN, 0, 0, _ALLOW)]
    number = _numbers(_ARGUMENT, column)
    for name, rule in _rules(pid, writes).items():
        if name in number:
            filter_ += [(_EQUAL, 0, len(rule), number[name]), *rule]
    return [*filter_, (_RETURN, 0, 0, _ERRNO | _ENOSYS)]


def _rules(pid: int, writes: bool) -> dict[str, list[Instruction]]:
    opening = {"open": 1, "openat": 2}  # which argument holds the flags
    read_only = {name: [_low(place), (_ANY_BIT, 0, 1, _WRITE_FLAGS), _fail(_EACCES), _ALLOWED] for name, place in opening.items()}
    return {
        "kill": _one_of(0, (pid, 0)),
        "tgkill": _one_of(0, (pid,)),
        "clone": [_low(0), (_ANY_BIT, 0, 2, _CLONE_THREAD), (_ANY_BIT, 1, 0, _CLONE_NEW), _ALLOWED, _fail(_EPERM)],
        "prctl": _one_of(0, _NAMING),
        "prlimit64": _one_of(0, (pid, 0)),
        "ioctl": [_low(1), *[each for value in _OWNER_IOCTLS for each in ((_EQUAL, 0, 1, value), _fail(_EPERM))], _ALLOWED],
        "fcntl": _one_of(1, _FCNTL),
        "socketpair": _one_of(0, (_UNIX,)),  # the kernel would load the module of another family
        # To the other end of a pair alone: an address would reach what listens outside.
        "sendto": [_low(4), (_EQUAL, 0, 2, 0), _high(4), (_EQUAL, 1, 0, 0), _fail(_EPERM), _ALLOWED],
        **({name: [_ALLOWED] for name in opening} if writes else read_only),
    }


_ALLOWED: Instruction = (_RETURN, 0, 0, _ALLOW)


def _fail(errno: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | errno)


def _low(argument: int) -> Instruction:
    """Load the lower half, on a little-endian machine, of an argument."""
    return (_LOAD, 0, 0, 16 + 8 * argument)


def _high(argument: int) -> Instruction:
    return (_LOAD, 0, 0, 20 + 8 * argument)


def _one_of(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    return [_low(argument), *[each for value in values for each in ((_EQUAL, 0, 1, value), _ALLOWED)], _fail(_EPERM)]


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = (entry.split(":") for entry in table.split())
    return {name: int(numbers[column]) for name, *numbers in rows if numbers[column]}


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of successive numbers, first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
