"""What the README says, small: the demo through the real command, its files, its report, and that it goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import fingerprint_model, read_lineage

SMALL = [
    "generate.num_prompts=24", "sft.steps=6", "sft.save_every=6", "rollout.num_prompts=16", "eval.addition.num_prompts=16",
    "train.steps=3", "train.global_batch=8", "train.save_every=3",
]  # fmt: skip


def demo(folder: Path) -> str:
    command = [sys.executable, "-m", "megatron_opd", "demo", "--run-dir", str(folder), *SMALL]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_the_whole_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = demo(folder)
    for stage in ("check", "generate", "sft", "convert trained", "rollout", "score", "train", "eval", "report"):
        assert f"$ megatron-opd {stage}" in output
    table = output[output.rindex("\nevaluation ") :]
    assert all(f"\naddition    {name} " in table for name in ("teacher", "sft", "opd"))
    assert all(f"\n{name} " in table for name in ("generate", "rollout", "score", "train"))

    evaluations = {name: json.loads((folder / "eval" / "addition" / f"{name}.json").read_text()) for name in ("teacher", "sft", "opd")}
    assert abs(evaluations["teacher"]["reverse_kl"]["mean"]) < 1e-4
    assert evaluations["teacher"]["accuracy"]["mean"] > 0.8
    against = evaluations["opd"]["against"]
    assert (against["name"], against["num_prompts"]) == ("sft", 16)
    for figure in ("accuracy", "reverse_kl"):
        change = evaluations["opd"][figure]["mean"] - evaluations["sft"][figure]["mean"]
        assert against[figure]["mean"] == pytest.approx(change, abs=1e-9)
        assert against[figure]["low"] <= change <= against[figure]["high"]
    assert "addition opd against sft, paired over 16 prompts" in output
    page = (folder / "report" / "report.html").read_text()
    assert page.count("<figure>") > 10
    for name in ("results", "training-opd", "training-sft", "cost"):
        assert all((folder / "report" / f"{name}.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))

    teacher = fingerprint_model(folder / "teacher")
    lineage = read_lineage(folder / "opd-hf")
    assert lineage is not None
    assert lineage.sft_teacher == lineage.opd_teacher == teacher
    assert lineage.overrides == []
    reader = StoreReader(str(folder / "rollouts.opd.zarr"))
    assert reader.verify() == []
    assert reader.manifest.lineage.sft_teacher == teacher

    again = demo(folder)
    assert "$ megatron-opd" not in again, "nothing was left to do"
    assert again.count("step ") == 0 or "step     1/" not in again
