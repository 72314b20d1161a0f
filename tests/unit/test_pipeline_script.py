"""Which script, and how many nodes and ranks, slurm/pipeline.sh chooses; sbatch is a stand-in that writes its words down."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_opd.recipe_files import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def submitted(folder: Path, *words: str, **environment: str) -> dict[str, list[str]]:
    """The words of each job's sbatch, by the job's name."""
    program = folder / "sbatch"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/jobs\nwc -l < {folder}/jobs\n')
    program.chmod(0o755)
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "OPD_ENV": str(REPOSITORY / "slurm/env.sh"), **environment}
    run = subprocess.run([REPOSITORY / "slurm/pipeline.sh", *words], env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    jobs = [line.split() for line in (folder / "jobs").read_text().splitlines()]
    return {next(word for word in job if word.startswith("--job-name=")).removeprefix("--job-name="): job for job in jobs}


@pytest.mark.parametrize(
    ("recipe", "script", "nodes"),
    [("opd_32b_4nodes", "opd_32b_4nodes", 4), ("opd_8b", "opd_8b", 1), ("opd_30b_a3b.toml", "opd_30b_a3b", 1), ("mine.toml", "opd_8b", 1)],
)
def test_sft_and_train_get_the_nodes_that_the_recipe_needs(tmp_path: Path, recipe: str, script: str, nodes: int) -> None:
    jobs = submitted(tmp_path, recipe, "train.lr=1e-6")
    assert f"slurm/{script}.sh" in jobs["train"]
    for stage in ("sft", "train"):
        assert f"--nodes={nodes}" in jobs[stage]
    for check in ("inputs", "check-sft", "check"):
        assert jobs[check][-2:] == ["--ranks", str(8 * nodes)]
        assert "train.lr=1e-6" in jobs[check]


def test_a_recipe_without_a_script_may_be_given_nodes(tmp_path: Path) -> None:
    jobs = submitted(tmp_path, "mine.toml", NODES="2")
    assert "--nodes=2" in jobs["sft"]
    assert jobs["check"][-2:] == ["--ranks", "16"]


def test_every_shipped_training_script_has_a_layouts_ranks() -> None:
    for script in (REPOSITORY / "slurm").glob("opd_*.sh"):
        lines = dict(
            line.removeprefix("#SBATCH --").split("=", 1) for line in script.read_text().splitlines() if "#SBATCH" in line and "=" in line
        )
        recipe = load_recipe(script.stem)
        for stage in (recipe.sft, recipe.train):
            stage.parallel.check_ranks(int(lines["nodes"]) * int(lines["gpus-per-node"]))
