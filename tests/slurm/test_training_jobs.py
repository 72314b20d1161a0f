"""Training jobs on the real Slurm: several nodes, containers, and every way of being stopped."""

from __future__ import annotations

import re

import pytest
from site_folder import Site
from slurm_cluster import wait_for

pytestmark = pytest.mark.slurm

ENDLESS = 1_000_000


def test_a_job_stopped_in_every_way_ends_like_an_undisturbed_one(site: Site) -> None:
    """The signal before the trainer listens, the time limit, a preemption, a node that is lost; then the same run in a container."""
    cluster, store = site.cluster, {"init": f"{site.folder}/student", "store": f"{site.folder}/store"}
    recipe = site.write_recipe("stopped", train=store | {"steps": ENDLESS})
    output = site.folder / "runs/stopped/opd"
    job = site.sbatch("--nodes=2", "slurm/opd_8b.sh", recipe, "train.seed=3")

    def restarts() -> int:
        return int(cluster.field(job, "Restarts"))

    def wait_for_restart(number: int) -> None:
        """Restart `number` has trained five steps that the one before had not."""
        wait_for(lambda: restarts() == number, 120, f"restart {number}", lambda: site.log(job))

        def trains() -> bool:  # from its checkpoint, or from the start if it was stopped before the first step
            return re.search(r"^step +\d+/", site.log(job).rpartition(f"(restart {number})")[2], re.MULTILINE) is not None

        wait_for(trains, 120, f"restart {number} to train", lambda: site.log(job))
        first = len(site.metrics(output))
        wait_for(lambda: len(site.metrics(output)) >= first + 5, 120, "five steps", lambda: site.log(job))

    wait_for(lambda: cluster.run("scontrol", "show", "step", f"{job}.2").returncode == 0, 60, "the ranks' step", lambda: site.log(job))
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for_restart(1)

    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")  # --signal=B:USR1@600: at once
    wait_for(lambda: restarts() == 2, 120, "the time limit", lambda: site.log(job))
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for_restart(2)

    urgent = cluster.ask("sbatch", "--parsable", "-p", "urgent", "--nodes=3", "--exclusive", "-o", "/dev/null", "--wrap", "true").strip()
    assert cluster.wait(urgent, seconds=120, show=lambda: site.log(job)) == "COMPLETED"
    wait_for_restart(3)

    saved = int((output / "checkpoints/latest").read_text().removeprefix("step_"))
    lost = cluster.ask("scontrol", "show", "hostnames", cluster.field(job, "NodeList")).split()[-1]
    cluster.cut_off(lost)
    steps = len(site.metrics(output)) + 10
    site.write_recipe("stopped", train=store | {"steps": steps})
    log = site.complete(job)
    cluster.bring_back(lost)

    assert restarts() == 4
    assert log.count("ready to train") == 1, "checked before the first start alone"
    assert log.count("back into the queue") in (2, 3), "after a node failure Slurm does it, and after a preemption if its grace is over"
    assert f"going on after step {saved} " in log.rpartition("(restart 4)")[2]
    assert log.count(" as asked; the same command goes on from ") == 3, "saved at each stop"
    assert "Traceback" not in log.partition("(restart 3)")[0]
    stopped = site.metrics(output)
    assert [row["step"] for row in stopped] == list(range(1, steps + 1))

    container = site.write_env("container", IMAGE_TRAIN=str(site.image()), MOUNTS=site.mounts(), VENV_TRAIN="/nowhere")
    recipe = site.write_recipe("whole", train=store | {"steps": steps})
    whole = site.sbatch("--nodes=2", "slurm/opd_8b.sh", recipe, "train.seed=3", env=container)
    log = site.complete(whole)
    assert f"{steps} steps of 8 rollouts; tp 1 x pp 1 x cp 1 x dp 2 on 2 rank(s)" in log
    image_steps = [line.split()[0] for line in (cluster.folder / "containers.log").read_text().splitlines()]
    assert sorted(image_steps) == [f"{whole}.{step}" for step in (0, 1, 2, 2, 3)], "check, progress, a task on each node, progress"
    undisturbed = site.metrics(site.folder / "runs/whole/opd")
    for field in ("loss", "grad_norm", "learning_rate"):
        assert [row[field] for row in stopped] == [row[field] for row in undisturbed]


def test_a_stop_by_hand_is_no_success_and_restarts_are_bounded(site: Site) -> None:
    train = {"init": f"{site.folder}/student", "store": f"{site.folder}/store", "steps": ENDLESS}
    recipe, output = site.write_recipe("by-hand", train=train), site.folder / "runs/by-hand/opd"
    env = site.write_env("bounded", MAX_RESTARTS="0")

    def submit(signal: list[str]) -> str:
        """The log of a job that is signalled when it has trained five more steps; it must fail."""
        first = len(site.metrics(output))
        job = site.sbatch("slurm/opd_8b.sh", recipe, env=env, OPD_CHECKED="yes")
        wait_for(lambda: len(site.metrics(output)) >= first + 5, 120, "five steps", lambda: site.log(job))
        site.cluster.ask("scancel", *signal, job)
        assert site.wait(job) == "FAILED", site.log(job)
        return site.log(job)

    log = submit(["--signal=USR1"])  # the steps alone, not the job's shell
    assert "stopped before the last step, and not by Slurm" in log
    log = submit(["--batch", "--signal=USR1"])
    assert "going on after step" in log
    assert "stopped after 0 restarts" in log
    assert not site.finished(recipe, "--stage", "train")
