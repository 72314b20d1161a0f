"""A training whose logger takes nothing: it ends as it would without one, and its account says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from fork_server import Job, shared_server
from stores import make_scored_store
from tiny_models import make_model

from megatron_opd.checkpoints.saved import latest_checkpoint
from megatron_opd.cost.meter import read_stages


def test_a_logger_that_fails_ends_no_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    make_model(tmp_path / "student", "qwen3", seed=5)
    make_scored_store(tmp_path / "store", sampler=tmp_path / "student", teacher=tmp_path / "student", sampler_role="teacher")
    output = tmp_path / "sft"
    output.mkdir()
    (output / "tensorboard").touch()  # no folder can be made here
    paths = {"run_dir": tmp_path, "sft.init": tmp_path / "student", "sft.store": tmp_path / "store", "sft.output": output}
    settings = [
        "sft.loggers=['tensorboard']",
        "sft.steps=3",
        "sft.global_batch=4",
        "sft.schedule.warmup_steps=0",
        "sft.micro_batch_tokens=100",
    ]
    overrides = [*settings, *(f"{key}={str(path)!r}" for key, path in paths.items())]
    (ending,) = shared_server().run(Job(["sft", "tiny", "generate=null", *overrides], str(tmp_path / "log")))
    said = (tmp_path / "log").read_text()
    assert ending.code == 0, said
    assert said.count("WARNING: loggers: tensorboard did not take step 1: ") == 1
    assert said.count("WARNING: loggers: ") == 2
    assert "WARNING: loggers: 3 of 3 rows did not reach tensorboard; metrics.jsonl has them all" in said
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 3
    assert latest_checkpoint(output) is not None
    (account,) = read_stages(tmp_path / "stages.jsonl")
    assert account["rows_not_sent"] == {"tensorboard": 3}
