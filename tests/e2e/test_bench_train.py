"""tools/bench_train.py on a CPU, small: both sides make the same step, and the table has every number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_train.py"


def test_both_sides(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen3")
    sizes = [
        "--layers",
        "1",
        "--global-batch",
        "6",
        "--micro-batch-tokens",
        "128",
        "--longest",
        "48",
        "--steps",
        "2",
        "--recompute",
        "none",
    ]
    command = [sys.executable, str(TOOL), "--model", str(tmp_path / "model" / "config.json"), *sizes, "--json", str(tmp_path / "out.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    ours, reference = found["ours"], found["reference"]
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert ours["loss"] != 0
    for side in (ours, reference):
        assert set(side["split"]) == {"data", "forward", "head and loss", "backward", "optimizer"}
        assert sum(side["split"].values()) == pytest.approx(1)
        assert all(share > 0 for share in side["split"].values())
        assert len(side["step_seconds"]) == 2
    assert "speed-up" in run.stdout
