"""The machine code of the kernels, compiled ahead of time, and the benchmark at a size for a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton's compiler (Linux, not its interpreter)"
)


@pytest.fixture(scope="module")
def compiler() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        import compile_kernels
    finally:
        sys.path.remove(str(TOOLS))
    return compile_kernels


@needs_compiler
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_of_real_use_spill_nothing_and_load_widely(compiler: ModuleType, arch: int) -> None:
    """bf16 with entropy and mask, K of 1 and 65."""
    variants = list(compiler.variants(fast=True))
    assert {variant.kernel for variant in variants} == {"stats_kernel", "gradient_kernel", "chosen_kernel"}
    for variant in variants:
        assert compiler.faults(variant, compiler.compile_variant(variant, arch)) == []


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_variant_spills_nothing_and_loads_widely(compiler: ModuleType, arch: int) -> None:
    variants = list(compiler.variants(fast=False))
    assert len(variants) == 2 * 2 * 2 * (2 * 2 + 1)
    for variant in variants:
        assert compiler.faults(variant, compiler.compile_variant(variant, arch)) == []


@needs_compiler
def test_the_check_sees_spills_and_narrow_loads(compiler: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = compiler.Variant("stats_kernel", "bf16", 65, True, True)
    assert any("spills" in fault for fault in compiler.faults(stats, compiler.compile_variant(stats, 90, maxnreg=32)))
    monkeypatch.setattr(compiler, "_ALIGNED", set())  # rows of a width that does not divide by 16
    gradient = compiler.Variant("gradient_kernel", "bf16", 1, True, True)
    for variant, kinds in ((stats, {"has no 16-byte loads"}), (gradient, {"has no 16-byte loads", "has no 16-byte stores"})):
        assert set(compiler.faults(variant, compiler.compile_variant(variant, 90))) == kinds


@needs_compiler
def test_the_loop_of_the_forward_is_short_and_has_no_barrier(compiler: ModuleType) -> None:
    """Threads meet after it: a barrier for each of the reductions of the end, none that depends on the vocabulary."""
    found = compiler.compile_variant(compiler.Variant("stats_kernel", "bf16", 1, True, False), 90)
    assert 0 < found.barriers <= 8
    # More than 13 instructions an element take longer than reading it (4.3 TB/s, 132 x 128 lanes at 1.7 GHz).
    elements = compiler.kernels.FORWARD_TILE * 8 / (32 * compiler.kernels.FORWARD_WARPS)
    assert 0 < found.loop_instructions / elements < 11


def test_the_benchmark_names_everybody(tmp_path: Path) -> None:
    """A small size on a CPU: each contestant is measured or absent with a reason, and those measured are right."""
    command = [sys.executable, str(TOOLS / "bench_loss.py"), "--output", str(tmp_path / "bench"), "--shards", "1", "4", "--repeats", "1"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    rows = record["rows"]
    names = {row["contestant"] for row in rows}
    assert len(names) == 6 + 8 - 2  # eager and torch.compile take part at both levels
    assert len(rows) == (6 + 8) * 2 * 2 * 2
    measured = [row for row in rows if "absent" not in row]
    assert {"opd_kernels", "opd_kernels whole", "opd_kernels chunks of 16", "PyTorch eager", "Megatron native"} <= {
        r["contestant"] for r in measured
    }
    for row in rows:
        if "absent" in row:
            assert row["absent"]
            assert f"absent: {row['absent']}" in done.stdout
        else:
            assert row["milliseconds"] > 0
            products = row["contestant"] == "three matrix products"  # no loss, so nothing to compare
            assert (row["gradient_error"] is None) == (row["logp_error"] is None) == products
            assert products or (row["gradient_error"] < 0.03 and row["logp_error"] < 0.01), row
