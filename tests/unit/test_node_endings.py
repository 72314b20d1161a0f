"""Which node a failed training job blames: what its ranks wrote down, and what the job's shell makes of it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.train.node import Ending, classify, note

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4242"), Ending.LOST_OTHERS),
        (RuntimeError("NCCL error: remote process exited or there was a network error, ncclRemoteError"), Ending.LOST_OTHERS),
        (ConnectionResetError("reset"), Ending.LOST_OTHERS),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Ending.FAILED),
        (ZeroDivisionError("division by zero"), Ending.FAILED),
    ],
)
def test_an_error_is_of_the_rank_itself_or_of_another(error: Exception, kind: Ending) -> None:
    assert classify(error) is kind


def judge(folder: Path, rows: list[str], *, nodes: int = 3) -> tuple[str, str, str, str]:
    """(code, node, rank, words) as slurm/lib.sh finds them in these rows, in whatever order."""
    (folder / "scontrol").write_text(f"#!/bin/sh\nseq -f node%g 1 {nodes}\n")
    (folder / "scontrol").chmod(0o755)
    random.shuffle(rows)
    (folder / "endings").write_text("".join(f"{row}\n" for row in rows))
    script = f'source {REPOSITORY}/slurm/lib.sh; OPD_ENDINGS={folder}/endings; code=1; judge; echo "$code|$node|$rank|$words"'
    (folder / "logs").mkdir(exist_ok=True)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node1" if nodes == 1 else f"node[1-{nodes}]"}
    environment = os.environ | slurm | {"PATH": f"{folder}:{os.environ['PATH']}", "OPD_ENV": f"{REPOSITORY}/slurm/env.sh"}
    run = subprocess.run(["bash", "-c", script], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    code, node, rank, words = run.stdout.strip().split("|")
    return code, node, rank, words


LOST = "4 100 node1 0 1 RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["1 300 node2 1 137 killed by SIGKILL", LOST, "2 200 node3 2 1 RuntimeError: x"], ("137", "node2", "1", "killed by SIGKILL")),
        (["2 300 node2 1 1 late", "2 200 node3 2 1 first", LOST], ("1", "node3", "2", "first")),
        (["0 900 node3 2 2 see the log", "1 100 node1 0 137 killed by SIGKILL"], ("2", "node3", "2", "see the log")),
        (
            [LOST, "4 101 node3 2 1 Connection closed"],
            ("1", "node2", "", "RuntimeError: Connection closed by peer"),
        ),  # node2 could say nothing
        # NCCL's watchdog aborted the healthy ones: node2 is gone.
        (["3 50 node3 2 134 killed by SIGABRT", LOST], ("134", "node2", "", "killed by SIGABRT")),
        (["3 50 node3 2 134 killed by SIGABRT", LOST, "1 300 node2 1 137 killed by SIGKILL"], ("137", "node2", "1", "killed by SIGKILL")),
        (["3 50 node3 2 134 killed by SIGABRT", LOST, "2 300 node2 1 1 ECC"], ("1", "node2", "1", "ECC")),
        ([f"3 5{n} node{n} {n} 134 killed by SIGABRT" for n in (1, 2, 3)], ("134", "", "", "killed by SIGABRT")),
        ([LOST], ("1", "", "", "RuntimeError: Connection closed by peer")),  # node2 or node3: none is blamed
        ([], ("1", "", "", "")),
    ],
)
def test_the_first_cause_is_blamed(tmp_path: Path, rows: list[str], expected: tuple[str, str, str, str]) -> None:
    assert judge(tmp_path, list(rows)) == expected


def test_a_job_of_one_node_blames_it(tmp_path: Path) -> None:
    assert judge(tmp_path, [], nodes=1) == ("1", "node1", "", "")
    assert judge(tmp_path, ["3 50 node1 2 134 killed by SIGABRT"], nodes=1) == ("134", "node1", "2", "killed by SIGABRT")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, "1 node1 1 137 SIGKILL"), (signal.SIGABRT, "3 node1 1 134 SIGABRT")])
def test_ranks_run_this_package_and_their_ending_is_noted(tmp_path: Path, number: int, expected: str) -> None:
    """Under torchrun, in a folder with another package of this name."""
    (tmp_path / "megatron_opd").mkdir()
    (tmp_path / "megatron_opd/__init__.py").write_text("raise SystemExit('a package of the working directory')")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), {int(number)})\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from megatron_opd.cli import main; sys.exit(main())"
    words = ["slurm-ranks", "--per-node", "2", "--leader", "127.0.0.1", "--port", str(port), "score", "--help"]
    slurm = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "node1", "OPD_ENDINGS": f"{tmp_path}/endings"}
    environment = os.environ | slurm | {"PYTHONPATH": f"{tmp_path}/site"}
    command = [sys.executable, "-P", "-c", start, str(REPOSITORY), *words]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 128 + number, run.stderr
    assert "a package of the working directory" not in run.stderr
    kind, _, node, rank, code, *words = (tmp_path / "endings").read_text().split()
    assert f"{kind} {node} {rank} {code} {words[-1]}" == expected


def test_what_a_rank_notes_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_ENDINGS", f"{tmp_path}/endings")
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    note(Ending.FAILED, 5, 1, "RuntimeError: a\nlong\n\nstory")
    kind, _, node, rank, code, words = (tmp_path / "endings").read_text().rstrip("\n").split(" ", 5)
    assert (kind, node, rank, code, words) == ("2", "node2", "5", "1", "RuntimeError: a long story")
    monkeypatch.setenv("OPD_ENDINGS", "/nowhere/endings")
    note(Ending.FAILED, 5, 1, "nobody can read this")
