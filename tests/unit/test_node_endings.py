"""Which node a failed training job blames: what its ranks wrote down, and what the job's shell makes of it."""

from __future__ import annotations

import os
import random
import subprocess
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


LOST = "3 100 node1 0 1 RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["1 300 node2 1 137 killed by SIGKILL", LOST, "2 200 node3 2 1 RuntimeError: x"], ("137", "node2", "1", "killed by SIGKILL")),
        (["2 300 node2 1 1 late", "2 200 node3 2 1 first", LOST], ("1", "node3", "2", "first")),
        (["0 900 node3 2 2 see the log", "1 100 node1 0 137 killed by SIGKILL"], ("2", "node3", "2", "see the log")),
        (
            [LOST, "3 101 node3 2 1 Connection closed"],
            ("1", "node2", "", "RuntimeError: Connection closed by peer"),
        ),  # node2 could say nothing
        ([LOST], ("1", "", "", "RuntimeError: Connection closed by peer")),  # node2 or node3: none is blamed
        ([], ("1", "", "", "")),
    ],
)
def test_the_first_cause_is_blamed(tmp_path: Path, rows: list[str], expected: tuple[str, str, str, str]) -> None:
    assert judge(tmp_path, list(rows)) == expected


def test_a_job_of_one_node_blames_it(tmp_path: Path) -> None:
    assert judge(tmp_path, [], nodes=1) == ("1", "node1", "", "")


def test_what_a_rank_notes_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_ENDINGS", f"{tmp_path}/endings")
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    note(Ending.FAILED, 5, 1, "RuntimeError: a\nlong\n\nstory")
    kind, _, node, rank, code, words = (tmp_path / "endings").read_text().rstrip("\n").split(" ", 5)
    assert (kind, node, rank, code, words) == ("2", "node2", "5", "1", "RuntimeError: a long story")
    monkeypatch.setenv("OPD_ENDINGS", "/nowhere/endings")
    note(Ending.FAILED, 5, 1, "nobody can read this")
