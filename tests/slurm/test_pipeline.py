"""The whole chain on two nodes, array jobs that fail and are submitted again, and what is refused before GPUs are held."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from site_folder import Site

from megatron_opd.pipeline.slurm import read_jobs, read_rows

pytestmark = pytest.mark.slurm

STAGES = ["inputs", "generate", "check-sft", "sft", "sft-hf", "rollout", "score", "engines", "check", "train", "opd-hf"]
STAGES += ["eval-held_out-teacher", "eval-held_out-sft", "eval-held_out-opd", "report"]


@pytest.fixture(scope="module")
def recipe(site: Site) -> Path:
    slurm = {
        "nodes": 2,
        "shards": {"rollout": 2, "score": 2},
        "gpus": "--gres=gpu:h100:{n}",
        "prologue": ["export GREETING='from the prologue'", 'echo "$GREETING"'],
        "environment": {"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "TRACE"},
    }
    return site.write_recipe("chain", sft={"steps": 3}, train={"steps": 3}, slurm=slurm)


def test_the_whole_pipeline_then_a_scoring_array_with_a_failed_task(site: Site, recipe: Path) -> None:
    run_dir = site.folder / "runs/chain"
    jobs = site.pipeline(recipe, "train.lr=1e-4")
    assert list(jobs) == STAGES
    names = {label: site.cluster.field(job, "JobName") for label, job in jobs.items()}
    assert names == {label: f"chain-{label}" for label in STAGES}
    for label, job in jobs.items():
        assert site.wait(job) == "COMPLETED", f"{label}\n{site.log(job)}"
    assert site.finished(recipe, "train.lr=1e-4")
    resolved = (run_dir / "opd/recipe.toml").read_text()
    assert "lr = 0.0001" in resolved, "overrides are passed on"
    for label in ("sft", "train"):
        assert "dp 2 on 2 rank(s)" in site.log(jobs[label])
        assert "ready to" not in site.log(jobs[label]), "checked without GPUs, not again with them"
    assert "ready to train" in site.log(jobs["check"])
    assert "from the prologue" in site.log(jobs["inputs"])
    assert {path.stem for path in (run_dir / "eval" / "held_out").glob("*.json")} == {"teacher", "sft", "opd"}
    assert (run_dir / "report/report.html").exists()
    assert "gres:gpu:h100:8" in site.cluster.field(jobs["train"], "TresPerNode")
    assert not re.search("TresPerNode|gres/gpu", site.cluster.ask("scontrol", "show", "job", jobs["check"])), "needs no GPU"
    assert read_jobs(run_dir) == {label: [job] for label, job in jobs.items()}
    after = {row["label"]: row["after"] for row in read_rows(run_dir) if row["event"] == "submitted"}
    assert after["eval-held_out-teacher"] == [jobs["inputs"]], "beside the chain"
    assert after["eval-held_out-opd"] == [jobs["opd-hf"], jobs["eval-held_out-sft"]], "its model, and what it is compared with"

    again = site.sbatch("slurm/opd_8b.sh", recipe, "train.lr=1e-4", OPD_CHECKED="yes")

    # Another teacher's scores; a part of task 1 can't be read.
    others = ["score.teacher=again", "train.teacher=again"]
    part = run_dir / "rollouts.opd.zarr/parts/000001"
    (part / "tokens").rename(part / "lost")
    jobs = site.pipeline("--from", "score", "--until", "opd-hf", recipe, *others)
    assert site.wait(f"{jobs['score']}_0") == "COMPLETED"
    assert site.wait(f"{jobs['score']}_1") == "FAILED"
    for label in ("engines", "check", "train", "opd-hf"):
        assert site.wait(jobs[label]) == "CANCELLED"
    assert "000001" in site.log(f"{jobs['score']}_1")
    assert not site.finished(recipe, *others, "--stage", "score")

    log = site.complete(again)
    assert "nothing is left to do" in log
    assert "rank(s)" not in log, "no rank was started"

    (part / "lost").rename(part / "tokens")
    refused = site.sbatch("--array=1", "slurm/score_8b.sh", recipe, *others)
    retried = site.sbatch("--array=1", "slurm/score_8b.sh", recipe, *others, SHARDS="2")
    assert site.wait(refused) == "FAILED"
    assert "SHARDS=N" in site.log(refused)
    site.complete(retried)
    assert site.finished(recipe, *others, "--stage", "score")


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
    jobs = site.pipeline("--from", "train", "--until", "opd-hf", recipe, nowhere)
    plain = site.sbatch("slurm/opd_8b.sh", recipe, nowhere)
    assert site.wait(jobs["check"]) == "FAILED"
    assert "nowhere/" in site.log(jobs["check"])
    assert site.wait(jobs["train"]) == "CANCELLED"
    assert site.log(jobs["train"]) == "", "never started"
    assert site.wait(plain) == "FAILED"
    assert "nowhere/" in site.log(plain)
    assert "slurm-ranks" not in site.log(plain)
    assert [path.name for path in (site.folder / "runs/nowhere").iterdir()] == ["slurm_jobs.jsonl"]

    image = site.write_env("no-image", IMAGE_TRAIN="/nowhere/train.sqsh")
    refused = site.run("slurm/pipeline.sh", recipe, env=image)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no image /nowhere/train.sqsh" in refused.stderr
    job = site.sbatch("slurm/opd_8b.sh", recipe, env=image)
    assert site.wait(job) == "FAILED"
    assert "no image /nowhere/train.sqsh" in site.log(job)


def test_a_layout_that_does_not_fit_never_holds_a_gpu(site: Site, recipe: Path) -> None:
    """What needs no model is refused at once, the rest by the first job."""
    refused = site.run("slurm/pipeline.sh", recipe, "slurm.nodes=3", "train.parallel.tp=2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "slurm.nodes = 3 of 1 ranks each: train.parallel: 3 ranks do not fit tp=2" in refused.stderr
    assert "nothing was submitted" in refused.stderr

    heads = ["slurm.nodes=3", "sft.parallel.tp=3", "train.parallel.tp=3", f"run_dir={str(site.folder / 'runs/heads')!r}"]
    jobs = site.pipeline(recipe, *heads)
    assert site.wait(jobs["inputs"]) == "FAILED"
    assert "tp=3" in site.log(jobs["inputs"])
    for label in STAGES[1:]:
        assert site.wait(jobs[label]) == "CANCELLED"
        assert site.log(jobs[label]) == "", "never started"


def test_a_wrong_partition_leaves_nothing_in_the_queue(site: Site, recipe: Path) -> None:
    refused = site.run("slurm/pipeline.sh", recipe, SBATCH_PARTITION="nowhere")
    assert refused.returncode != 0
    assert "invalid partition" in refused.stderr.lower()
    # The fourth job is refused: those before it must not stay.
    part = ["--from", "rollout", "--until", "opd-hf", recipe, "slurm.cpu_partition=nowhere", f"run_dir={str(site.folder / 'runs/wrong')!r}"]
    refused = site.run("slurm/pipeline.sh", *part)
    assert refused.returncode != 0
    jobs = re.findall(r"^\w+ +(\d+)", refused.stdout, flags=re.MULTILINE)
    assert len(jobs) == 3
    for job in jobs:
        assert site.wait(job) == "CANCELLED"
    assert read_jobs(site.folder / "runs/wrong") == {}


def test_rounds_follow_each_other(site: Site) -> None:
    stages = {"rollout": {"model": "{student}", "sft_teacher": "{teacher}"}, "train": {"init": "{student}", "steps": 4}}
    recipe = site.write_recipe("rounds", rounds={"count": 2}, **stages)
    jobs = site.pipeline("--from", "rollout", "--until", "train", recipe)
    labels = ["rollout@1", "score@1", "engines", "check@1", "train@1", "opd-hf@1", "rollout@2", "score@2", "check@2", "train@2"]
    assert list(jobs) == labels
    for label, job in jobs.items():
        assert site.wait(job) == "COMPLETED", f"{label}\n{site.log(job)}"
    assert site.finished(recipe, "--stage", "train@2")
