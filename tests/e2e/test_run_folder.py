"""A run that is gone on with by its folder alone, and settings that a stage refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_models import make_model, write_prompts

from megatron_opd.checkpoints.saved import latest_checkpoint
from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader

BRANCH = "for a run of its own: megatron-opd recipe new NAME --like RECIPE"


def test_a_run_is_gone_on_with_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "teacher", seed=6)
    make_model(tmp_path / "student", seed=5)
    write_prompts(tmp_path / "prompts.jsonl", 16)
    words = ["models.teacher=teacher", "models.student=student", "sft.global_batch=4", "sft.steps=1", "generate.sampling.max_new_tokens=4"]
    for name in ("generate", "rollout"):
        words.append(f"{name}.prompts_per_part=8")
    run, stored = Path("runs/tiny"), Path("runs/tiny/recipe.toml")

    assert main(["generate", "tiny", "models.teacher=nowhere", *words[1:]]) == 2
    assert not run.exists()
    assert main(["generate", "tiny", *words, "--shard", "0/2"]) == 0
    first = stored.read_text()
    assert main(["generate", "runs/tiny", "--shard", "1/2"]) == 0
    StoreReader("runs/tiny/sft.opd.zarr").check_complete()
    assert stored.read_text() == first
    capsys.readouterr()
    assert main(["generate", "runs/tiny", "generate.sampling.temperature=0.5"]) == 2
    printed = capsys.readouterr()
    assert printed.err.rstrip().endswith(BRANCH)
    assert "sampling is {temperature: 1.0} there, {temperature: 0.5} now" in printed.err
    assert "recipe.toml: as it was before this command" in printed.out
    assert stored.read_text() == first

    # Two ranks, which read the folder's recipe while the process that started them has kept what is new.
    train = [sys.executable, "-m", "megatron_opd", "sft", "runs/tiny", "sft.lr=1e-4", "engine.device=cpu", "--nproc", "2"]
    ranks = subprocess.run(train, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert ranks.returncode == 0, ranks.stderr
    assert ranks.stdout.count("recipe.toml: ") == 1
    assert "recipe.toml: sft.lr 0.001 -> 0.0001" in ranks.stdout
    tree = tomllib.loads(stored.read_text())
    assert (tree["sft"]["lr"], tree["engine"]["device"], tree["run_dir"]) == (1e-4, "auto", "runs/{name}")
    assert latest_checkpoint(run / "sft") is not None
    own = tomllib.loads((run / "sft/recipe.toml").read_text())
    assert (own["sft"]["output"], own["engine"]["device"], own["models"]["teacher"]) == ("{run_dir}/sft", "cpu", "teacher")

    after = stored.read_text()
    assert main(["sft", "runs/tiny", "sft.seed=7", "sft.steps=2"]) == 2
    assert capsys.readouterr().err.rstrip().endswith(BRANCH)
    assert stored.read_text() == after
    assert main(["recipe", "new", "second", "--like", "runs/tiny", "sft.seed=7"]) == 0
    assert main(["check", "second.toml", "--stage", "sft"]) == 2  # a run of its own, with nothing in it
    assert "runs/second/sft.opd.zarr" in capsys.readouterr().err
