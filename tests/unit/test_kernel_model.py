"""The predictions of tools/model_kernels.py: what they are made of, and that the machine code they count is that of the kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton's compiler (Linux, not its interpreter)"
)


@pytest.fixture(scope="module")
def model() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        import kernel_model
    finally:
        sys.path.remove(str(TOOLS))
    return kernel_model


def code_of(model: ModuleType, **fields: Any) -> Any:
    """The forward with made-up machine code: 256 exponentials and 256 multiply-adds a turn of its loop, nothing else."""
    measured = {"registers": 64, "spill_stores": 0, "spill_loads": 0, "stack": 0, "shared": 32, "warps": 8} | dict.fromkeys(
        ("instructions", "loop_instructions", "wide_loads", "wide_stores", "loads", "stores", "exponentials", "barriers"), 0
    )
    for name in measured.keys() & fields.keys():
        measured[name] = fields.pop(name)
    loop = Counter({"exponential": 256, "fma": 256})
    made = {"name": "stats_kernel", "measured": model.compiler.Compiled(**measured), "once": Counter(), "loop": loop, "last": Counter()}
    return model.Code(**(made | {"unrolled": 1, "load_bytes": 64} | fields))


def test_the_slowest_of_memory_and_pipes_is_the_time(model: ModuleType) -> None:
    gpu, reached = model.GPUS["H200"], model.Reached(bandwidth=1.0, clock=1.0)
    rows, vocab = 1000, 10 * 8192
    found = model.predict(code_of(model), gpu, rows, vocab, 1, 2 * rows * vocab, reached)
    assert found.seconds["memory"] == pytest.approx(2 * rows * vocab / 4.8e12)
    # 1000 programs of 8 warps of 10 turns; 16 exponentials and 128 multiply-adds a clock and multiprocessor.
    lanes = 1000 * 8 * 10 * 256 * 32
    assert found.seconds["exponential"] == pytest.approx(lanes / 16 / 132 / gpu.clock)
    assert found.seconds["fma"] == pytest.approx(lanes / 128 / 132 / gpu.clock)
    assert found.bound == "exponential"
    assert found.total == found.seconds["exponential"]
    assert found.per_element["exponential"] == pytest.approx(8.0)


def test_too_few_loads_under_way_cost_bandwidth(model: ModuleType) -> None:
    gpu, reached = model.GPUS["H200"], model.Reached()
    few, many = (model.predict(code_of(model, load_bytes=size), gpu, 1000, 8192, 1, 10**9, reached) for size in (4, 64))
    assert few.seconds["memory"] == pytest.approx(10**9 * model.LATENCY / (4 * 8 * 32 * 4 * 132))
    assert many.seconds["memory"] == pytest.approx(10**9 / (0.9 * 4.8e12))


def test_occupancy_names_what_limits_it(model: ModuleType) -> None:
    for fields, expected in (
        ({}, (4, "registers")),
        ({"registers": 32}, (8, "registers")),
        ({"registers": 24}, (8, "warps")),
        ({"registers": 24, "warps": 1}, (32, "programs")),
        ({"shared": 100 << 10}, (2, "shared memory")),
    ):
        assert code_of(model, **fields).programs_at_once() == expected


def test_instructions_of_the_real_kernels(model: ModuleType) -> None:
    """One exponential a logit in the loop of the forward; the backward takes the short side of its branch where all columns are real."""
    forward = model.Code.of(model.compiler.Variant("stats_kernel", "bf16", 1, True, False), 90)
    elements = model.compiler.kernels.FORWARD_TILE * 8 / (32 * model.compiler.kernels.FORWARD_WARPS)
    # One for each logit, and one a load for the decay of the sums.
    assert forward.loop["exponential"] == elements * 9 / 8
    backward = model.Code.of(model.compiler.Variant("gradient_kernel", "bf16", 1, True, False), 90)
    whole = backward.instructions(10 * model.compiler.kernels.BACKWARD_BLOCK, 1)
    part = backward.instructions(model.compiler.kernels.BACKWARD_BLOCK // 2, 1)
    assert whole["exponential"] == part["exponential"] == 16
    assert sum(whole.values()) < 0.9 * sum(part.values())


def test_the_command_predicts_and_writes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(TOOLS / "model_kernels.py"),
        "--tokens",
        "4096",
        "--vocab",
        "16384",
        "--hidden",
        "1024",
        "--chunk",
        "2048",
    ]
    done = subprocess.run([*command, "--gpus", "H200", "--ops", "--output", str(tmp_path / "model.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "model.json").read_text())
    assert [row["kernel"] for row in record["kernels"]] == [
        "stats_kernel",
        "gradient_kernel",
        "chosen_kernel",
        "stats_kernel",
        "chosen_kernel",
    ]
    # Three products of 2 N H V at 80 % of 989 TFLOP/s are the least that the head takes.
    for row in record["heads"]:
        assert row["seconds"]["products"] >= 6 * 4096 * 1024 * 16384 / (0.8 * 989e12)
        assert row["total"] == pytest.approx(sum(row["seconds"].values()))
    assert "| gradient_kernel | 1 |" in done.stdout
