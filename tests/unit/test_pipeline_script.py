"""What slurm/pipeline.sh asks sbatch for; sbatch is a stand-in that writes its words down."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.errors import ConfigError, UserError
from megatron_opd.pipeline.slurm import Cluster, job_states, plan_jobs, read_jobs, read_rows, select_stages
from megatron_opd.pipeline.stages import list_stages
from megatron_opd.recipe_files import load_recipe, shipped_recipes

REPOSITORY = Path(__file__).resolve().parents[2]


def pipeline(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = folder / "sbatch"
    program.write_text(
        f'#!/bin/bash\nprintf "%s\\0" "$@" >> {folder}/jobs\nprintf "\\n" >> {folder}/jobs\n'
        f"env > {folder}/environment\nwc -l < {folder}/jobs\n"
    )
    program.chmod(0o755)
    site = (REPOSITORY / "slurm/env.sh").read_text().replace("VENV_TRAIN=.venv\n", f"VENV_TRAIN={sys.prefix}\n")
    (folder / "env.sh").write_text(site)
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "OPD_ENV": f"{folder}/env.sh", "PYTHONPATH": str(REPOSITORY), **environment}
    command = [str(REPOSITORY / "slurm/pipeline.sh"), *words, f"run_dir={folder}/run"]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


def submitted(folder: Path, *words: str, **environment: str) -> dict[str, list[str]]:
    """The words of each job's sbatch, by the job's name."""
    run = pipeline(folder, *words, **environment)
    assert run.returncode == 0, run.stderr
    jobs = [line.split("\0")[:-1] for line in (folder / "jobs").read_text().splitlines()]
    return {next(word for word in job if word.startswith("--job-name=")).removeprefix("--job-name="): job for job in jobs}


def option(job: list[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in job if word.startswith(f"--{name}=")), None)


def test_a_recipe_says_what_its_jobs_ask_for(tmp_path: Path) -> None:
    site = {"SBATCH_PARTITION": "gpu"}
    words = ["slurm.cpu_partition=cpu", "slurm.gpus=--gres=gpu:h100:{n}", "slurm.options=['--comment=two words']", "slurm.shards.score=3"]
    jobs = submitted(tmp_path, "--from", "score", "opd_32b_4nodes", "train.lr=1e-6", *words, "slurm.environment.NCCL_DEBUG=INFO", **site)
    jobs = {label.removeprefix("opd_32b_4nodes-"): job for label, job in jobs.items()}
    assert list(jobs) == ["score", "engines", "check", "train", "opd-hf", "eval-teacher", "eval-sft", "eval-opd", "report"]
    train, check, score, engines = (jobs[label] for label in ("train", "check", "score", "engines"))
    assert (option(train, "nodes"), option(train, "gres"), option(train, "dependency")) == ("4", "gpu:h100:8", "afterok:3")
    assert "--kill-on-invalid-dep=yes" in train
    assert option(train, "partition") is None, "sbatch reads SBATCH_PARTITION by itself"
    assert train[train.index("slurm/stage.sh") :][1:5] == ["train", "train", "train", "opd_32b_4nodes"]
    assert all("--comment=two words" in job for job in jobs.values())
    assert (option(check, "nodes"), option(check, "partition"), option(check, "gres")) == ("1", "cpu", None)
    assert check[-4:] == ["--stage", "train", "--ranks", "32"]
    assert "train.lr=1e-6" in check
    assert (option(score, "array"), option(score, "nodes")) == ("0-2", "1")
    assert option(engines, "gres") == "gpu:h100:1"
    assert {"engine.launch.tp=1", "engine.launch.student.tp=1", "engine.launch.student.dp=1"} <= set(engines), "one server on it"
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"OPD_SET_NCCL_DEBUG=INFO", "OPD_SET_RANKS_PER_NODE=8", f"OPD_RUN_DIR={tmp_path}/run"} <= set(environment)
    assert list(read_jobs(tmp_path / "run").values()) == [[str(number)] for number in range(1, 10)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["opd_8b", "sft.parallel.tp=16"], "slurm.nodes = 1 of 8 ranks each: sft.parallel: 8 ranks do not fit tp=16"),
        (["opd_32b_4nodes", "slurm.nodes=1"], "train.parallel: 8 ranks do not fit tp=8 pp=2"),
        (["opd_8b", "engine.launch.teacher.dp=8"], "engine.launch for the teacher: servers * tp * dp = 1 * 2 * 8 = 16 GPUs"),
        (["opd_8b", "engine.launch=null"], "engine.kind = 'sglang', but no servers"),
        (["opd_8b", "slurm.nodes=100"], "global_batch = 100 is smaller than 200 data-parallel ranks"),
        (["opd_8b", "slurm.environment.HF_TOKEN=$NO_SUCH_TOKEN"], "environment variable NO_SUCH_TOKEN, which is not set"),
        (["opd_8b", "slurm.nodez=2"], "did you mean 'nodes'?"),
    ],
)
def test_what_can_be_known_is_refused(words: list[str], expected: str) -> None:
    def plan(name: str, *overrides: str) -> None:
        recipe = load_recipe(name, list(overrides))
        cluster = Cluster(recipe.slurm)
        plan_jobs(recipe, name, list(overrides), cluster)
        cluster.variables(recipe)

    with pytest.raises(ConfigError, match=re.escape(expected)):
        plan(*words)


def test_stages_that_are_not_there_are_refused() -> None:
    stages = list_stages(load_recipe("opd_8b"))
    with pytest.raises(UserError, match="no stage 'nowhere' in this recipe; there are: inputs, generate"):
        select_stages(stages, "nowhere", None)
    with pytest.raises(UserError, match="stage 'sft' comes before 'train'"):
        select_stages(stages, "train", "sft")


def test_nothing_is_submitted_of_a_recipe_that_is_refused(tmp_path: Path) -> None:
    run = pipeline(tmp_path, "opd_32b_4nodes", "slurm.nodes=1")
    assert (run.returncode, run.stdout) == (2, "")
    assert "train.parallel: 8 ranks do not fit" in run.stderr
    assert "nothing was submitted" in run.stderr
    assert not (tmp_path / "jobs").exists()


def test_a_dry_run_prints_sbatch_lines_and_no_secrets(tmp_path: Path) -> None:
    run = pipeline(tmp_path, "--dry-run", "opd_8b", "engine.launch.environment.HF_TOKEN=hf_abc", "slurm.environment.API_KEY=hf_abc")
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert [line.split()[1] for line in lines if not line.startswith(("settings", " "))] == ["sbatch"] * 15
    assert "hf_abc" not in run.stdout
    assert "slurm/env.sh: gpus=--gpus-per-node={n}" in run.stdout, "says where settings come from"
    assert not (tmp_path / "jobs").exists()
    assert not (tmp_path / "run").exists()


def test_without_python_the_login_node_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text((REPOSITORY / "slurm/env.sh").read_text().replace("VENV_TRAIN=.venv\n", "VENV_TRAIN=/nowhere\n"))
    environment = {"PATH": "/usr/bin:/bin", "OPD_ENV": f"{tmp_path}/env.sh"}
    run = subprocess.run([REPOSITORY / "slurm/pipeline.sh", "opd_8b"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "neither /nowhere/bin/megatron-opd, nor on PATH, nor a training image" in run.stderr


def test_every_shipped_recipe_with_nodes_fits_them() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if recipe.engine.kind == "sglang":
            assert plan_jobs(recipe, name, [], Cluster(recipe.slurm))


def test_every_shipped_training_script_has_the_nodes_of_its_recipe() -> None:
    for script in (REPOSITORY / "slurm").glob("opd_*.sh"):
        lines = dict(
            line.removeprefix("#SBATCH --").split("=", 1) for line in script.read_text().splitlines() if "#SBATCH" in line and "=" in line
        )
        cluster = load_recipe(script.stem).slurm
        assert (int(lines["nodes"]), int(lines["gpus-per-node"])) == (cluster.nodes, cluster.gpus_per_node)


def test_rounds_are_submitted_one_after_the_other() -> None:
    recipe = load_recipe("opd_8b", ["rounds.count=2"])
    jobs = {job.label: job for job in plan_jobs(recipe, "opd_8b", ["rounds.count=2"], Cluster(recipe.slurm), first="rollout")}
    assert jobs["rollout@2"].after == ("opd-hf@1",)
    assert jobs["train@2"].after == ("check@2",)
    assert jobs["train@2"].words[-2:] == ("--round", "2")
    assert jobs["eval-opd"].after == ("opd-hf@2", "eval-sft")
    assert jobs["report"].after == ("opd-hf@2", "eval-teacher", "eval-sft", "eval-opd")
    only = plan_jobs(recipe, "opd_8b", [], Cluster(recipe.slurm), first="score@2", last="train")
    assert [job.label for job in only] == ["score@2", "check@2", "train@2"]


def test_records_survive_a_cut_row_and_states_come_from_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"event": "submitted", "label": "train", "job": "7"}
    rows = [row, row | {"job": "8"}, {"event": "cancelled", "job": "7"}, {"event": "retried", "job": "8", "excluded": "node2"}]
    (tmp_path / "slurm_jobs.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"event": "subm')
    assert read_jobs(tmp_path) == {"train": ["8"]}
    assert len(read_rows(tmp_path)) == 4
    assert read_jobs(tmp_path / "nowhere") == {}

    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho '8|RUNNING|node1'; echo '9|RUNNING|node2'; echo '9|PENDING|(Priority)'; echo '10|PENDING|(Dependency)'\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert job_states(["8", "9", "10", "11"]) == {"8": "RUNNING on node1", "9": "1 RUNNING, 1 PENDING", "10": "PENDING (Dependency)"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert job_states(["8"]) == {}


def test_secrets_of_the_section_are_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["export HF_TOKEN=hf_abc NCCL_DEBUG=INFO", "export API_KEY='hf_abc def'; module load cuda", "export HF_TOKEN=$HF_TOKEN"]
    given = [
        f"slurm.prologue={json.dumps(lines)}",
        "slurm.environment.API_KEY=hf_abc",
        "slurm.environment.B=c",
        "slurm.time.train=12:00:00",
    ]
    recipe = load_recipe("opd_8b", given)
    assert recipe.slurm.time.train == "12:00:00"
    written = recipe.to_toml()
    assert "hf_abc" not in written
    for kept in ("NCCL_DEBUG=INFO", "module load cuda", "HF_TOKEN=$HF_TOKEN", 'B = "c"'):
        assert kept in written
    cluster = Cluster(recipe.slurm)
    assert cluster.variables(recipe)["OPD_SET_API_KEY"] == "hf_abc", "the job gets it"
    with pytest.raises(ConfigError, match="not kept"):
        Cluster(load_recipe("opd_8b", [*given[2:], 'slurm.environment.API_KEY="(not kept)"']).slurm).variables(recipe)
    monkeypatch.setenv("MY_KEY", "from outside")
    assert load_recipe("opd_8b", ["slurm.environment.API_KEY=$MY_KEY"]).slurm.variables() == {"API_KEY": "from outside"}
