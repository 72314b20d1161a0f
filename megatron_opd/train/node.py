"""One node's part of a training on several: torchrun starts its ranks, and how they ended is written down for the job to judge.

torchrun's own exit code is 1 whatever happened. A job that shall try again elsewhere must know whether a rank refused to go on (what the
user can mend), was killed, failed by itself, or only lost one of the others; and on which node that was first.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from enum import IntEnum

from megatron_opd.errors import INTERRUPTED
from megatron_opd.safety.processes import signal_name
from megatron_opd.train.launch import rank_command

ENDINGS = "OPD_ENDINGS"  # variable with the file, which all nodes see; a row an ending: KIND NANOSECONDS NODE RANK CODE WORDS
REFUSALS = (2, 3, INTERRUPTED)  # exit codes that another node would not change
_SENT = (signal.SIGTERM, signal.SIGINT)  # by torchrun, to the others
# What a rank says when another one, or its node, is gone (gloo, NCCL, the store of the rendezvous).
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process|ncclRemoteError|socket (closed|timeout)|timed out|no route to host",
    re.IGNORECASE,
)


class Ending(IntEnum):
    """How a rank ended; the smallest number says what a run's end was about, and of equals the earliest."""

    REFUSED = 0
    KILLED = 1
    FAILED = 2
    ABORTED = 3  # SIGABRT: NCCL's watchdog ends a healthy rank so when it has lost another one, or waited for too long
    LOST_OTHERS = 4


def run_ranks(words: list[str], *, per_node: int, leader: str, port: int) -> int:
    """Run `megatron-opd WORDS` as `per_node` ranks of this node of a Slurm step; returns their exit code, 128 + N for signal N."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    place = [f"--nnodes={os.environ['SLURM_NNODES']}", f"--node-rank={os.environ['SLURM_NODEID']}", f"--nproc-per-node={per_node}"]
    meeting = ["--max-restarts=0", "--monitor-interval=0.5", f"--master-addr={leader}", f"--master-port={port}"]
    python, *flags = rank_command("megatron_opd.rank")
    arguments = torchrun.parse_args([*place, *meeting, "--no-python", python, "-u", *flags, *words])
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            number = -failure.exitcode
            if number > 0 and number not in _SENT:
                kind = Ending.ABORTED if number == signal.SIGABRT else Ending.KILLED
                note(kind, rank, 128 + number, f"killed by {signal_name(number)}")
        codes = [failure.exitcode for failure in error.failures.values()]
        own = [code for code in codes if -code not in _SENT] or codes
        code = next((code for code in codes if code in REFUSALS), min(own))
        print(f"ranks of {node_name()} ended: {_describe(codes)}", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code
    return 0


def note(kind: Ending, rank: int, code: int, words: str) -> None:
    """Write down how a rank of this node ended, if somebody wants to know."""
    if path := os.environ.get(ENDINGS):
        row = f"{int(kind)} {time.time_ns()} {node_name()} {rank} {code} {' '.join(words.split())[:300]}\n"
        with contextlib.suppress(OSError), open(path, "ab") as file:  # the log has it too
            file.write(row.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())


def node_name() -> str:
    """As Slurm calls this node; in a container the host's name may be another."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def classify(error: BaseException) -> Ending:
    """Whether an exception that ends a rank is of its own making."""
    import torch.distributed as dist

    lost = (dist.DistNetworkError, dist.DistStoreError, ConnectionError)
    return Ending.LOST_OTHERS if isinstance(error, lost) or _LOST.search(str(error)) else Ending.FAILED


def _describe(codes: list[int]) -> str:
    return ", ".join(f"exit code {code}" if code > 0 else signal_name(-code) for code in codes)
