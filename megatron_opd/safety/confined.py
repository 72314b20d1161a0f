"""Programs of others that run in this process (chat templates), in a fork of it that time and memory limits can end."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from megatron_opd.errors import UserError
from megatron_opd.safety.untrusted import check_characters

SECONDS = 5  # of CPU time, for one item
PATIENCE = 120  # seconds by the clock, should the fork wait for something
MEMORY = 2 << 30  # bytes on top of what the process has
LARGEST_TEXT = 1 << 23  # characters of one result

T = TypeVar("T")
_REFUSED = b'{"refused": '
_confined = False  # in the fork


class Ended(UserError):
    """The fork was ended, by a limit or a crash."""


def run_confined(function: Callable[[T], str], items: Iterable[T], what: Callable[[T], str]) -> Iterator[str]:
    """`function` of every item, in their order, computed in one fork; within a fork simply called, with SECONDS of its own.

    Raises the UserError that `function` raises, and Ended, which names `what(item)`, if an item takes more than SECONDS or crashes.
    """
    if _confined:
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            yield function(item)
        return
    items = list(items)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _serve(function, items, theirs)  # does not return
    os.close(theirs)
    answered = 0
    try:
        with os.fdopen(ours, "rb") as replies:
            while answered < len(items) and (line := replies.readline(6 * LARGEST_TEXT)).endswith(b"\n"):
                reply = json.loads(line)
                if "refused" in reply:
                    raise UserError(reply["refused"])
                answered += 1
                yield reply["text"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answered < len(items):
        late = ended in (-signal.SIGPROF, -signal.SIGALRM, -signal.SIGXCPU)
        raise Ended(
            f"{what(items[answered])}: {f'it takes more than {SECONDS} s' if late else f'its process ended with code {ended}'}; fix the template, or leave that out"
        )


def _serve(function: Callable[[T], str], items: list[T], descriptor: int) -> None:
    """In the fork: a line a result. Ends the process."""
    global _confined
    _confined = True
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who ends this process
        for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            with open("/proc/self/statm", encoding="ascii") as file:
                limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        with os.fdopen(descriptor, "wb") as replies:
            for item in items:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                signal.setitimer(signal.ITIMER_REAL, PATIENCE)
                reply = _reply(function, item)
                for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                    signal.setitimer(timer, 0)
                replies.write(reply)
                replies.flush()  # of a crash it is known at which item it was
                if reply.startswith(_REFUSED):
                    break
        code = 0
    finally:
        os._exit(code)


def _reply(function: Callable[[T], str], item: T) -> bytes:
    try:
        text = function(item)
        if len(text) > LARGEST_TEXT:
            raise UserError(f"it makes a text of {len(text)} characters, {LARGEST_TEXT} are the most; fix the template, or leave that out")
        check_characters(text, "what it makes")
        return json.dumps({"text": text}).encode() + b"\n"
    except UserError as error:
        return _REFUSED + json.dumps(str(error)).encode() + b"}\n"
