"""A job that failed by the fault of a node is tried again without it, a bounded number of times; in images of Apptainer."""

from __future__ import annotations

import pytest
from site_folder import Site
from slurm_cluster import wait_for

from megatron_opd.pipeline.slurm import read_jobs, read_rows

pytestmark = pytest.mark.slurm

ENDLESS = 1_000_000
RANK = "from megatron_opd.rank import run;"


def test_a_rank_that_is_killed_costs_its_node_and_not_the_run(site: Site) -> None:
    cluster, run_dir = site.cluster, site.folder / "runs/faulty"
    train = {"init": f"{site.folder}/student", "store": f"{site.folder}/store"}
    recipe = site.write_recipe("faulty", train=train | {"steps": ENDLESS, "save_every": 2}, slurm={"nodes": 2})
    image = site.folder / "train.sif"
    image.touch()
    env = site.write_env("apptainer", IMAGE_TRAIN=str(image), IMAGE_SERVE=str(image), VENV_TRAIN="/nowhere", VENV_SERVE="/nowhere")
    # The list of jobs is made in the image, too: there is no other megatron-opd on this path.
    path = f"{site.apptainer()}:/usr/sbin:/usr/bin:/sbin:/bin"
    jobs = site.pipeline("--from", "train", "--until", "train", recipe, env=env, PATH=path)
    assert list(jobs) == ["check", "train"]
    job = jobs["train"]

    wait_for(lambda: len(site.metrics(run_dir / "opd")) >= 3, 120, "three steps", lambda: site.log(jobs["check"]) + site.log(job))
    bad = cluster.ask("scontrol", "show", "hostnames", cluster.field(job, "NodeList")).split()[-1]
    steps = len(site.metrics(run_dir / "opd")) + 10
    site.write_recipe("faulty", train=train | {"steps": steps, "save_every": 2}, slurm={"nodes": 2})
    cluster.kill(bad, RANK)
    log = site.complete(job)

    assert cluster.field(job, "Restarts") == "1"
    assert cluster.field(job, "ExcNodeList") == bad
    assert bad not in cluster.ask("scontrol", "show", "hostnames", cluster.field(job, "NodeList")).split()
    assert f"failed on {bad}: rank 1, exit code 137, killed by SIGKILL; try 1 of 2 again" in log
    rows = [row for row in read_rows(run_dir) if row["job"] == job]
    assert [row["event"] for row in rows] == ["submitted", "started", "retried", "started"]
    assert (rows[2]["excluded"], rows[2]["code"]) == (bad, "137")
    assert read_jobs(run_dir) == {label: [number] for label, number in jobs.items()}
    words = (site.folder / "apptainer.log").read_text().splitlines()
    ranks = [line for line in words if "slurm-ranks" in line]
    assert len(ranks) == 4, "on two nodes, twice"
    assert all(f"exec --pwd {site.folder} --nv {image} megatron-opd" in line and f"{site.folder}:{site.folder}," in line for line in ranks)


def test_retries_are_bounded_and_a_mistake_is_not_tried_again(site: Site) -> None:
    train = {"init": f"{site.folder}/student", "store": f"{site.folder}/store", "steps": ENDLESS}
    recipe, output = site.write_recipe("unlucky", train=train), site.folder / "runs/unlucky/opd"
    job = site.sbatch("slurm/opd_8b.sh", recipe, env=site.write_env("no-retries", RETRIES="0"), OPD_CHECKED="yes")
    mistaken = site.write_recipe("mistaken", train=train | {"store": "/nowhere"})
    wrong = site.sbatch("slurm/opd_8b.sh", mistaken, OPD_CHECKED="yes")  # only the ranks can find out
    wait_for(lambda: len(site.metrics(output)) >= 1, 120, "a step", lambda: site.log(job))
    site.cluster.kill(site.cluster.field(job, "BatchHost"), RANK)
    assert site.wait(job) == "FAILED"
    assert "tried again 0 times already (RETRIES=0)" in site.log(job)
    assert site.wait(wrong) == "FAILED"
    assert "/nowhere" in site.log(wrong)
    assert "exit code 2; the reason is above" in site.log(wrong)
    assert site.cluster.field(wrong, "Restarts") == "0"
