"""Progress in a log: whole lines now and then, no carriage returns; and readers that have read enough."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.cost.meter import StageCost, clock
from megatron_opd.serve.stage import Bar

STAGE = """
import sys, time
from megatron_opd.cost.meter import StageCost
from megatron_opd.serve.stage import Bar
with StageCost(sys.argv[1], "rollout", num_gpus=8) as cost, Bar("rollout", cost, total=2000, initial=500, unit="rollout", every=float(sys.argv[2])) as bar:
    for _ in range(1000):
        bar.update(1, tokens=3)
"""


def lines_of(tmp_path: Path, every: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", STAGE, str(tmp_path), every], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "\r" not in run.stderr
    return run.stderr.splitlines()


def test_a_pipe_gets_a_line_a_minute(tmp_path: Path) -> None:
    first, last = lines_of(tmp_path, "60")
    assert re.fullmatch(
        r"rollout: 501 of 2,000 rollouts \(25\.1%\), \S+ rollouts/s, \d+ tokens/s, 0\.\d\d GPU hours, \d+:\d\d:\d\d left", first
    )
    assert last.startswith("rollout: 1,500 of 2,000 rollouts (75.0%), ")


def test_the_lines_come_as_often_as_asked(tmp_path: Path) -> None:
    assert len(lines_of(tmp_path, "0")) == 1000


def test_the_end_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StageCost(tmp_path, "score") as cost, Bar("score", cost, total=10, initial=0, unit="token", every=0.0) as bar:
        bar.update(10, tokens=10)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"score: 10 of 10 tokens \(100\.0%\), \S+ tokens/s", line)


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3599.4, 3661, 360000)] == ["0:00:00", "0:01:00", "0:59:59", "1:01:01", "100:00:00"]


def test_a_reader_that_has_read_enough(tmp_path: Path) -> None:
    """As in `progress | head`: no advice to mend the pipe, and the shells' exit code for it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megatron_opd", "progress", "tiny", f"run_dir={tmp_path}"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")
