"""`sft` and `train` from the recipe to their last checkpoint, and on from one, on a simulated GPU: a tiny model's real files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cases import NEWEST, OLDEST
from simulator import Simulators
from stores import make_scored_store
from tiny_models import make_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # what FP8 and the kernels can take


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model", "qwen3", layers=4, **SIZES)
    for stage, role in (("sft", "teacher"), ("train", "student")):
        make_scored_store(folder / f"{stage}-store", sampler=folder / "model", teacher=folder / "model", top_k=8, sampler_role=role)
    return folder


def recipe(files: Path, run_dir: Path, stage: str, **fields: Any) -> dict[str, Any]:
    model = str(files / "model")
    section = {
        "init": model,
        "store": str(files / f"{stage}-store"),
        "output": str(run_dir / stage),
        "global_batch": 8,
        "micro_batch_tokens": 256,
        "save_every": 1,
    }
    section |= {"max_engine_gap": 10.0} if stage == "train" else {}
    return {"name": "tiny", "run_dir": str(run_dir), "models": {"student": model, "teacher": model}, stage: section | fields}


RUNS = [
    ("train", {}, 0),
    ("train", {"parallel": {"tp": 2, "pp": 2, "vpp": 2}}, 2),
    ("train", {"loss": {"name": "reverse_kl"}, "parallel": {"tp": 2, "cp": 2}}, 3),
    ("train", {"fp8": {"recipe": "blockwise", "parameters": True}, "recompute": "full"}, 0),
    ("sft", {"parallel": {"tp": 2}}, 0),
]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize(("stage", "fields", "rank"), RUNS, ids=["train", "train-vpp", "train-cp-top-k", "train-fp8", "sft"])
def test_a_run_from_its_start_to_its_end_and_on(
    version: str, stage: str, fields: dict[str, Any], rank: int, files: Path, tmp_path: Path, simulators: Simulators
) -> None:
    tree = recipe(files, tmp_path, stage, **fields)
    found = simulators(version).ask("whole_run", tree=tree, stage=stage, rank=rank, size=8, steps=[2, 3])
    # From the first step on, saves included, the host waits for each step's numbers alone, and no copy is slow.
    waits = [[(re.sub(r":\d+:", ":", where).partition(" < ")[0], count) for where, count in step.items()] for step in found]
    assert waits == [[("tolist  megatron_opd/train/update.py:update", 1)]] * 3
    output = tmp_path / stage
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not any(row["skipped"] for row in rows)
    assert (output / "checkpoints/latest").read_text() == "step_000003\n"
