"""Runs a subcommand for each line on stdin, {"command": [...], "announcement": regex, "disk": folder, "log": path}, in a fork of this process.

The moment the announcement is printed, the power of the disk is cut. Answers each line with whether it came to that. A fork a
command saves the imports, which take longer than the command.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import sys
from typing import Any

EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # linux/fs/ext4/ext4.h: what the journal holds in memory alone is lost too
IS_CUT = 77


def cut_power(disk: str) -> None:
    """Of what the file system at `disk` has not made safe, nothing is left."""
    folder = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(folder)


class Announced:
    """A stdout that cuts the power, and ends the process, at the words that it waits for."""

    def __init__(self, stream: Any, announcement: str, disk: str):
        self.stream, self.announcement, self.disk = stream, announcement, disk

    def write(self, text: str) -> int:
        self.stream.write(text)
        if re.search(self.announcement, text):
            cut_power(self.disk)
            self.stream.flush()
            os._exit(IS_CUT)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(order: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = Announced(sys.stdout, order["announcement"], order["disk"])
    from megatron_opd.cli import main

    code = main(order["command"])
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    import megatron_opd.convert.commands
    import megatron_opd.evaluate.run
    import megatron_opd.serve.transformers_engine
    import megatron_opd.train.loop  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"group": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
