"""Training jobs on the real Slurm: several nodes, containers, and every way of being stopped."""

from __future__ import annotations

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
    job = site.sbatch("--nodes=2", "--gpus-per-node=1", "slurm/opd_8b.sh", recipe, "train.seed=3")

    def restarts() -> int:
        return int(cluster.field(job, "Restarts"))

    def wait_for_restart(number: int) -> None:
        """Restart `number` has trained five steps that the one before had not."""
        wait_for(lambda: restarts() == number, 120, f"restart {number}", lambda: site.log(job))
        site.wait_for_log(job, f"(restart {number})")
        first = len(site.metrics(output))
        wait_for(lambda: len(site.metrics(output)) >= first + 5, 120, "five steps", lambda: site.log(job))

    site.wait_for_log(job, "ready to train")  # the checks are over, torchrun starts
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
    assert log.count("back into the queue") == 3, "after a node failure Slurm does it"
    assert f"going on after step {saved} " in log.rpartition("(restart 4)")[2]
    assert "Traceback" not in log
    stopped = site.metrics(output)
    assert [row["step"] for row in stopped] == list(range(1, steps + 1))

    container = site.write_env("container", IMAGE_TRAIN=str(site.image()), MOUNTS=site.mounts(), VENV_TRAIN="/nowhere")
    recipe = site.write_recipe("whole", train=store | {"steps": steps})
    whole = site.sbatch("--nodes=2", "--gpus-per-node=1", "slurm/opd_8b.sh", recipe, "train.seed=3", env=container)
    log = site.complete(whole)
    assert f"{steps} steps of 8; tp 1 x pp 1 x dp 2 on 2 rank(s)" in log
    image_steps = [line.split()[0] for line in (cluster.folder / "containers.log").read_text().splitlines()]
    assert sorted(image_steps) == [f"{whole}.0", f"{whole}.1", f"{whole}.1", f"{whole}.2"], "check, a task on each node, progress"
    undisturbed = site.metrics(site.folder / "runs/whole/opd")
    for field in ("loss", "grad_norm", "learning_rate"):
        assert [row[field] for row in stopped] == [row[field] for row in undisturbed]


def test_restarts_are_bounded_and_a_stop_by_hand_is_no_success(site: Site) -> None:
    store = {"init": f"{site.folder}/student", "store": f"{site.folder}/store", "steps": ENDLESS}
    recipe = site.write_recipe("bounded", train=store)
    output = site.folder / "runs/bounded/opd"
    env = site.write_env("bounded", MAX_RESTARTS="0")
    job = site.sbatch("--gpus-per-node=1", "slurm/opd_8b.sh", recipe, env=env, OPD_CHECKED="yes")
    wait_for(lambda: len(site.metrics(output)) >= 1, 120, "a step", lambda: site.log(job))
    site.cluster.ask("scancel", "--batch", "--signal=USR1", job)
    assert site.wait(job) == "FAILED"
    assert "stopped after 0 restarts" in site.log(job)
    assert (output / "checkpoints/latest").exists()
