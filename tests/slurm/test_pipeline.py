"""The whole chain, array jobs that fail and are submitted again, and what is refused before GPUs are held."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from site_folder import Site

pytestmark = pytest.mark.slurm

STAGES = ["inputs", "generate", "check-sft", "sft", "sft-hf", "rollout", "score", "check", "train", "opd-hf", "eval"]


@pytest.fixture(scope="module")
def recipe(site: Site) -> Path:
    return site.write_recipe("chain", sft={"steps": 3}, train={"steps": 3})


def test_the_whole_pipeline_then_a_scoring_array_with_a_failed_task(site: Site, recipe: Path) -> None:
    env = site.bare
    jobs = site.pipeline(recipe, "train.lr=1e-4", env=env, SHARDS="2")
    assert list(jobs) == STAGES
    for name, job in jobs.items():
        assert site.wait(job) == "COMPLETED", f"{name}\n{site.log(job)}"
    assert site.finished(recipe)
    resolved = (site.folder / "runs/chain/opd/recipe.toml").read_text()
    assert "lr = 0.0001" in resolved, "overrides are passed on"
    assert "(restart 0)" in site.log(jobs["train"])
    assert "ready to train" in site.log(jobs["check"])
    assert "ready to train" not in site.log(jobs["train"]), "checked without GPUs, not again with them"

    # Another teacher's scores; a part of task 1 can't be read.
    again = ["score.teacher=again", "train.teacher=again"]
    part = site.folder / "runs/chain/rollouts.opd.zarr/parts/000001"
    (part / "tokens").rename(part / "lost")
    jobs = site.pipeline("--from", "score", recipe, *again, env=env, SHARDS="2")
    assert site.wait(f"{jobs['score']}_0") == "COMPLETED"
    assert site.wait(f"{jobs['score']}_1") == "FAILED"
    for name in ("check", "train", "opd-hf", "eval"):
        assert site.wait(jobs[name]) == "CANCELLED"
    assert "000001" in site.log(f"{jobs['score']}_1")
    assert not site.finished(recipe, *again, "--stage", "score")

    (part / "lost").rename(part / "tokens")
    refused = site.sbatch("--array=1", "slurm/score_8b.sh", recipe, *again, env=env)
    retried = site.sbatch("--array=1", "slurm/score_8b.sh", recipe, *again, env=env, SHARDS="2")
    assert site.wait(refused) == "FAILED"
    assert "SHARDS=N" in site.log(refused)
    site.complete(retried)
    assert site.finished(recipe, *again, "--stage", "score")


def test_a_task_of_an_array_that_is_signalled_goes_back_into_the_queue_alone(site: Site, recipe: Path) -> None:
    job = site.sbatch(
        "--array=0-1", "slurm/rollout_8b.sh", recipe, "rollout.model={student}", f"run_dir={str(site.folder / 'runs/array')!r}"
    )
    for task in (f"{job}_1", f"{job}_0"):  # task 1, the last, has the id of the array as its own
        site.wait_for_log(task, "(restart 0)")
        if task == f"{job}_1":
            site.cluster.ask("scancel", "--batch", "--signal=USR1", task)
    assert [site.wait(f"{job}_{task}") for task in (0, 1)] == ["COMPLETED", "COMPLETED"]
    assert "back into the queue" in site.log(f"{job}_1")
    assert site.cluster.field(f"{job}_0", "Restarts") == "0"
    assert site.cluster.field(f"{job}_1", "Restarts") == "1"


def test_what_is_missing_is_refused_before_gpus_are_held(site: Site, recipe: Path) -> None:
    nowhere = f"run_dir={str(site.folder / 'runs/nowhere')!r}"
    jobs = site.pipeline("--from", "train", recipe, nowhere)
    plain = site.sbatch("slurm/opd_8b.sh", recipe, nowhere)
    assert site.wait(jobs["check"]) == "FAILED"
    assert "nowhere/" in site.log(jobs["check"])
    assert site.wait(jobs["train"]) == "CANCELLED"
    assert site.log(jobs["train"]) == "", "never started"
    assert site.wait(plain) == "FAILED"
    assert "nowhere/" in site.log(plain)
    assert "torchrun" not in site.log(plain)
    assert not (site.folder / "runs/nowhere").exists()

    image = site.write_env("no-image", IMAGE_TRAIN="/nowhere/train.sqsh")
    refused = site.run("slurm/pipeline.sh", recipe, env=image)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no image /nowhere/train.sqsh" in refused.stderr
    job = site.sbatch("slurm/opd_8b.sh", recipe, env=image)
    assert site.wait(job) == "FAILED"
    assert "no image /nowhere/train.sqsh" in site.log(job)


def test_a_wrong_partition_leaves_nothing_in_the_queue(site: Site, recipe: Path) -> None:
    refused = site.run("slurm/pipeline.sh", recipe, SBATCH_PARTITION="nowhere")
    assert refused.returncode != 0
    assert "invalid partition" in refused.stderr.lower()
    # The third job is refused: the two before it must not stay.
    refused = site.run("slurm/pipeline.sh", "--from", "rollout", recipe, env=site.write_env("no-partition", CPU_PARTITION="nowhere"))
    assert refused.returncode != 0
    jobs = re.findall(r"^\w+ +(\d+)", refused.stdout, flags=re.MULTILINE)
    assert len(jobs) == 2
    for job in jobs:
        assert site.wait(job) == "CANCELLED"
