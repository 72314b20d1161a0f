"""Programs that do what they must not: each costs its own limit, scores 0, and leaves no process, no file and no object of the kernel."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opd.errors import UserError
from megatron_opd.evaluate.code.cases import AssertCase, CallCase, CodeTests, StdinCase
from megatron_opd.evaluate.code.isolation import MODES
from megatron_opd.evaluate.code.pool import CodePool, find_isolation
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.recipe.code_limits import CodeLimits, Mode

SECRET = "the answer is 8191"
LIMITS = CodeLimits(seconds=0.2, wall_seconds=1.0, memory_mib=256, disk_mib=2, output_mib=1, threads=8)
PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/", "/root", "/etc", "/run", "/proc/sys/kernel")

# What a program does, and how it may end. @FILE@: a file that holds the right output; @PORT@: where somebody listens; @PID@: the grader's.
HOSTILE: dict[str, tuple[str, set[str]]] = {
    "endless loop": ("while True: pass", {"timeout"}),
    "sleeps": ("import time\ntime.sleep(1000)", {"timeout"}),
    "waits for a lock": ("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", {"timeout"}),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    "ignores signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        {"timeout"},
    ),
    "catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", {"timeout"}),
    "one step of C that takes for ever": ("print(len(str(7 ** (10 ** 9))))", {"timeout", "memory"}),
    "a regular expression that takes for ever": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", {"timeout"}),
    "loops at its end": ("import atexit\n@atexit.register\ndef loop():\n    while True: pass", {"timeout"}),
    "loops in many threads": (
        "import threading\ndef loop():\n    while True: pass\nfor _ in range(6): threading.Thread(target=loop).start()",
        {"timeout"},
    ),
    "leaves threads behind": (
        f"import threading, time\nthreading.Thread(target=lambda: time.sleep(100), daemon=True).start()\nprint('not {SECRET}')",
        {"wrong output"},
    ),
    "fills the memory": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory", "timeout"}),
    "fills it with maps": (
        "import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 24))\n    x[-1].write(b'x' * (1 << 24))",
        {"exception", "timeout"},
    ),
    "asks for everything at once": ("x = 'x' * (1 << 40)", {"memory"}),
    "recurses": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f() + 1\nf()", {"memory", "killed", "timeout"}),
    "recurses in C": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x)",
        {"memory", "killed", "timeout"},
    ),
    "crashes": ("import ctypes\nctypes.string_at(0)", {"killed"}),
    "kills itself": ("import os\nos.abort()", {"killed"}),
    "floods its output": ("while True: print('x' * 10_000)", {"output limit"}),
    "floods its errors": ("import sys\nwhile True: sys.stderr.write('x' * 10_000)", {"output limit"}),
    "floods without end of line": ("import os\nwhile True: os.write(1, b'y' * 65536)", {"output limit"}),
    "forks": ("import os\nos.fork()\nprint(open('@FILE@').read())", {"exception"}),
    "is a fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout"},
    ),
    "makes a daemon": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\nos._exit(0)",
        {"exception"},
    ),
    "makes processes in C": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint([libc.fork(), libc.vfork(), libc.syscall(57), libc.syscall(58), libc.syscall(435, 0, 0)])",
        {"wrong output"},
    ),
    "runs commands": ("import subprocess\nprint(subprocess.run(['cat', '@FILE@'], capture_output=True).stdout)", {"exception"}),
    "runs another program in its place": ("import os\nos.execv('/bin/cat', ['cat', '@FILE@'])", {"exception"}),
    "uses multiprocessing": ("import multiprocessing\nprint(multiprocessing.Pool(4).map(abs, range(9)))", {"exception"}),
    "makes many threads": (
        "import threading, time\nthreading.stack_size(65536)\nfor _ in range(10_000): threading.Thread(target=time.sleep, args=(50,)).start()",
        {"exception", "threads", "memory"},
    ),
    "kills its parent": (
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        {"exception"},
    ),
    "kills everybody": (
        "import os\nfor pid in (-1, 1, 2, os.getppid(), @PID@):\n    try: os.kill(pid, 9)\n    except OSError: pass\nprint('survived')",
        {"wrong output", "killed"},  # 2 may be itself
    ),
    "kills its group": ("import os\nos.killpg(0, 9)", {"killed"}),
    "sends signals by files": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETOWN, @PID@)\nprint('set')",
        {"exception"},
    ),
    "traces its parent": (
        "import ctypes, os\nprint(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0), ctypes.CDLL(None).ptrace(16, @PID@, 0, 0))",
        {"wrong output"},
    ),
    "reads the tests' file": ("print(open('@FILE@').read())", {"exception"}),
    "looks for the tests' file": (
        "import os\nfor folder, _, names in os.walk('/'):\n    for name in names:\n"
        "        if 'answers' in name: print(open(os.path.join(folder, name)).read())",
        {"wrong output", "exception", "timeout"},
    ),
    "reads the memory of others": (
        "import os\nfor pid in (os.getppid(), 1, @PID@):\n    for name in ('mem', 'environ', 'maps', 'cmdline'):\n"
        "        try: print(open(f'/proc/{pid}/{name}', 'rb').read(100))\n        except OSError: pass",
        {"wrong output"},
    ),
    "looks into the frames and objects of its process": (
        "import gc, sys\nframe = sys._getframe()\nwhile frame:\n    print(frame.f_locals.keys())\n    frame = frame.f_back\n"
        f"print([x for x in gc.get_objects() if isinstance(x, list) and {SECRET[:-1]!r} + '1' in map(repr, x[:50])])",
        {"wrong output", "timeout"},
    ),
    "uses every descriptor": (
        "import os\nfor n in range(3, 300):\n    for f in (lambda: os.read(n, 10), lambda: os.write(n, b'1'), lambda: os.close(n)):\n"
        "        try: f()\n        except OSError: pass\nprint('done')",
        {"wrong output"},
    ),
    "opens files without end": ("x = []\nwhile True: x.append(open('/dev/null'))", {"exception"}),
    "fills the disk": (
        "import os\nfor n in range(10 ** 9):\n    with open(str(n), 'wb') as f: f.write(b'x' * (1 << 20))",
        {"exception"},
    ),
    "makes a huge file": ("f = open('x', 'wb')\nf.truncate(1 << 40)\nf.seek(1 << 40)\nf.write(b'x')\nf.flush()", {"exception"}),
    "makes files without end": ("for n in range(10 ** 9): open(str(n), 'w').close()", {"exception", "timeout"}),
    "makes folders without end": ("import os\nwhile True:\n    os.mkdir('x')\n    os.chdir('x')", {"exception", "timeout"}),
    "writes to every place": (
        "for place in ('', '/tmp', '/var/tmp', '/dev/shm', '/root', '/etc', '/proc/sys/kernel', '..', '/run'):\n"
        "    try:\n        with open(place + '/opd_was_here', 'w') as f: f.write('x')\n    except OSError: pass\nprint('done')",
        {"wrong output"},
    ),
    "changes the kernel's settings": (
        "import os\nfor path in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/drop_caches', '/proc/sysrq-trigger', '/proc/self/oom_score_adj'):\n"
        "    try: os.open(path, os.O_WRONLY)\n    except OSError: continue\n    os.abort()\nraise ValueError",
        {"exception"},
    ),
    "connects": (
        "import socket\nsocket.create_connection(('127.0.0.1', @PORT@)).sendall(b'x')",
        {"exception"},
    ),
    "sends datagrams": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '@SOCKET@')\nprint('sent')",
        {"exception"},
    ),
    "keeps shared memory": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.shmget(4711, 1 << 20, 0o1666), libc.msgget(4711, 0o1666), libc.semget(4711, 1, 0o1666),"
        " libc.memfd_create(b'x', 0))",
        {"wrong output"},
    ),
    "asks for new rights": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.unshare(0x10000000), libc.setuid(0), libc.mount(b'none', b'/', None, 32, None),"
        " libc.chroot(b'/'), libc.personality(0x40000), libc.prctl(1, 0), libc.prctl(4, 1))",
        {"wrong output"},
    ),
    "raises its limits": (
        "import resource\nfor which in range(16):\n    try: resource.setrlimit(which, (-1, -1))\n    except (OSError, ValueError): pass\n"
        "x = bytearray(1 << 29)",
        {"memory"},
    ),
    "calls the kernel by another table": (
        "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)",
        {"killed", "exception", "wrong output"},
    ),
    "prints at its end, by another exit": (
        "import atexit, os\natexit.register(lambda: (os.write(1, open('@FILE@', 'rb').read()), os._exit(0)))",
        {"exception", "wrong output"},
    ),
    "closes what it has": ("import os\nfor n in range(3): os.close(n)\nprint('x')", {"exception", "wrong output"}),
    "puts other files in the place of its own": (
        "import os\nos.dup2(os.open('/dev/null', os.O_RDONLY), 1)\nprint('x', flush=True)",
        {"exception", "wrong output"},
    ),
    "rewrites its input": ("import os\nos.ftruncate(0, 0)\nos.write(0, b'x')", {"exception"}),
    "patches the interpreter": (
        "import builtins, sys, os\nbuiltins.compile = builtins.exec = builtins.open = print = lambda *a, **k: 1\nsys.modules.clear()\n"
        "os.write(1, b'1')\nsys.stdout = None",
        {"wrong output", "exception"},
    ),
    "ends its main thread alone": (
        "import ctypes, threading\ndef loop():\n    while True: pass\nthreading.Thread(target=loop).start()\nctypes.CDLL(None).pthread_exit(0)",
        {"timeout"},
    ),
    "closes everything and sleeps": ("import os, time\nos.closerange(0, 64)\ntime.sleep(1000)", {"timeout"}),
    "stops its group": ("import os, signal\nos.killpg(0, signal.SIGSTOP)", {"timeout"}),
    "raises what can't be told": (
        "class M(type):\n    def __getattribute__(c, n): raise SystemExit(0)\nclass E(BaseException, metaclass=M): pass\nraise E()",
        {"exception"},
    ),
    "raises half of a surrogate pair": ("raise ValueError('\\ud800' * 10_000)", {"exception"}),
    "makes sockets of every family": (
        "import ctypes\nlibc, pair = ctypes.CDLL(None), (ctypes.c_int * 2)()\n"
        "print([f for f in range(2, 46) for t in (1, 2, 3, 5) if libc.socketpair(f, t, 0, pair) == 0 or libc.socket(f, t, 0) >= 0])",
        {"wrong output"},
    ),
    "takes terminals": ("import os\nos.openpty()", {"exception"}),
    "touches a device": ("import os\nopen('/dev/null', 'w').write('x')\nos.utime('/dev/null')", {"exception"}),
    "keeps descriptors on their way": (
        "import socket\na, b = socket.socketpair()\nwhile True: socket.send_fds(a, [b'x'], [0, 1, 2])",
        {"exception"},
    ),
    "keeps long links": ("import os\nfor n in range(10 ** 9): os.symlink('x' * 4000, str(n))", {"exception", "timeout"}),
    "writes for its own process's settings": (
        "import os\nfor name in ('oom_score_adj', 'coredump_filter', 'uid_map', 'setgroups', 'timens_offsets', 'clear_refs', 'autogroup'):\n"
        "    try: os.open('/proc/self/' + name, os.O_WRONLY)\n    except OSError: continue\n    os.abort()\nraise ValueError",
        {"exception"},
    ),
    "looks for the answer in its memory": (
        "import re\nfor line in open('/proc/self/maps'):\n    found = re.match('([0-9a-f]+)-([0-9a-f]+) rw', line)\n    if found:\n"
        "        memory = open('/proc/self/mem', 'rb')\n        memory.seek(int(found[1], 16))\n"
        "        for x in re.findall(b'the answer is [0-9]+', memory.read(int(found[2], 16) - int(found[1], 16))): print(x.decode())",
        {"wrong output", "exception", "memory"},
    ),
    "is no text": ("\0", {"exception"}),
    "is nested without end": ("(" * 100_000, {"exception", "memory"}),
    "is signs without end": ("-" * 300_000 + "1", {"exception", "memory", "killed", "timeout"}),
}


# What a program says in the place of its process, on every descriptor and before it is asked.
SAID = r"""
import json, os
def say(line):
    for n in range(3, 12):
        try: os.write(n, line)
        except OSError: pass
def reply(value): say(b'{"value": %s, "changed": [null]}\n' % value)
say(b'{"loaded": ["f"]}\n')
"""
REPLIES = {
    "an infinite number": r"""reply(b'{"object": Infinity}')""",
    "a number too large for a complex one": r"""reply(b'{"complex": [1%s, 2]}' % (b'0' * 400))""",
    "half of a surrogate pair": r"""reply(b'"\\ud800"')""",
    "an error that is no text": r"""say(b'{"error": {"a": [1]}, "name": [[[]]], "text": "\\ud800"}\n')""",
    "lists in lists": r"""reply(b'[' * 30_000 + b']' * 30_000)""",
    "numbers of one hash": r"""reply(json.dumps({"set": [n * (2 ** 61 - 1) for n in range(1, 40_000)]}).encode())""",
    "a range without end": r"""reply(b'{"range": [0, 1%s, 1]}' % (b'0' * 30))""",
    "bytes that are no text": r"""reply(b'"\xff\xfe"')""",
    "no end of line": r"""while True: say(b'x' * 60_000)""",
    "drop by drop": r"""while True: say(b'x')""",
    "nothing but ends of lines": r"""while True: say(b'\n' * 60_000)""",
    "that tests have passed": r"""say(b'{"passed": 0}\n{"passed": 1}\n{"passed": 2}\n')""",
    "that its arguments are others": r"""say(b'{"value": 4, "changed": [[1], [2], [3]]}\n' * 9)""",
}


# What a mode's own means prevent: these are tried in each mode, the others in the first that works.
BY_MODE = {
    "fills the disk", "makes a huge file", "makes files without end", "makes folders without end", "keeps long links", "makes many threads",
    "writes to every place", "changes the kernel's settings", "writes for its own process's settings", "asks for new rights",
    "makes sockets of every family", "takes terminals", "touches a device", "kills its group", "is a fork bomb", "stops its group", "rewrites its input",
}  # fmt: skip


def working_modes() -> list[Mode]:
    """Those that this machine has."""
    found: list[Mode] = []
    for mode in MODES:
        with contextlib.suppress(UserError):
            found.append(find_isolation(CodeLimits(isolation=mode)).mode)
    return found


def grade(mode: Mode, items: list[tuple[CodeTests, str]], **others: float) -> list[Verdict]:
    limits = LIMITS.model_copy(update={"isolation": mode, **others})
    with CodePool(limits, workers=3) as pool:
        return list(pool.grade_with([(tests, f"so:\n```python\n{program}\n```\n") for tests, program in items]))


def left_over() -> set[str]:
    """Files of the places where anybody may write, objects of System V, and processes of ours."""
    found = {f"{place}/{name}" for place in PLACES if os.access(place, os.R_OK) for name in os.listdir(place) if name == "opd_was_here"}
    for kind in ("shm", "msg", "sem"):
        found |= set(Path("/proc/sysvipc", kind).read_text().splitlines()[1:]) if Path("/proc/sysvipc", kind).exists() else set()
    me = str(os.getpid())
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "inside/start.py" in command and f'"parent": {me}' in command:
            found.add(f"{folder.name}: {command[:100]}")
    return found


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the grader's user that programs try to end."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("place", range(len(MODES)))
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hostile_programs(
    place: int, every: bool, tmp_path: Path, victim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = working_modes()
    if place >= len(modes) or (every and place == 0):
        pytest.skip(f"modes that work here: {', '.join(modes)}" if not every else "all programs are tried in the first mode anyway")
    mode = modes[place]
    tried = {name: each for name, each in HOSTILE.items() if every or place == 0 or name in BY_MODE or "@" in each[0]}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(SECRET)
    before = left_over()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        path = str(tmp_path / "socket")
        datagrams.bind(path)
        replacements = {"@FILE@": str(answers), "@PORT@": str(server.getsockname()[1]), "@PID@": str(victim.pid), "@SOCKET@": path}
        programs = []
        for source, _ in tried.values():
            for name, value in replacements.items():
                source = source.replace(name, value)
            programs.append(source)
        tests = CodeTests((StdinCase("", SECRET),))
        verdicts = grade(mode, [(tests, program) for program in programs])
        # On a busy machine a program may wait for a second until it is its turn.
        late = [
            place
            for place, ((_, allowed), verdict) in enumerate(zip(tried.values(), verdicts, strict=True))
            if verdict.detail.get("how") == "timeout" and "timeout" not in allowed
        ]
        for place, verdict in zip(late, grade(mode, [(tests, programs[place]) for place in late], wall_seconds=20.0), strict=True):
            verdicts[place] = verdict
        for asked in (server, datagrams):
            asked.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(BlockingIOError):
            datagrams.recv(1)
    assert victim.poll() is None
    assert sorted(os.listdir(tmp_path)) == ["answers.jsonl", "socket"]
    assert left_over() == before
    wrong = {
        name: (verdict.outcome, verdict.reason)
        for (name, (_, allowed)), verdict in zip(tried.items(), verdicts, strict=True)
        if verdict.score != 0 or verdict.detail.get("how") not in allowed
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_replies_that_no_program_gives() -> None:
    """They score nothing, are no error of the grader, and take little of its time."""
    calls = CodeTests((CallCase((5,), list(range(100_000))), CallCase((7,), 7)), function="f")
    asserts = CodeTests((AssertCase("assert f([7]) == sum([3, 4])"), AssertCase("assert f([1]) == 1")), before="def f(x):\n    pass\n")
    programs = [f"{SAID}{source}\ndef f(x): return 5" for source in REPLIES.values()]
    with CodePool(LIMITS, workers=2) as pool:
        begin = time.process_time()
        for tests in (calls, asserts):
            verdicts = pool.grade_with([(tests, f"```python\n{program}\n```") for program in programs])
            for name, verdict in zip(REPLIES, verdicts, strict=True):
                assert verdict.score == 0.0, name
                assert verdict.outcome in ("wrong", "timeout"), (name, verdict)
                json.dumps([verdict.reason, verdict.detail], ensure_ascii=False).encode()
        assert time.process_time() - begin < 5.0
