"""What slurm/pipeline.sh asks sbatch for; sbatch is a stand-in that writes its words down."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.cli import main
from megatron_opd.errors import ConfigError, UserError
from megatron_opd.pipeline.slurm import Cluster, Job, describe, job_states, plan_jobs, read_jobs, read_rows, select_stages
from megatron_opd.pipeline.stages import list_stages
from megatron_opd.recipe.files import load_recipe, shipped_recipes

REPOSITORY = Path(__file__).resolve().parents[2]


MATHS = ("aime24", "aime25", "hmmt25")
NO_CODE = ["eval.lcb_v5=null", "eval.lcb_v6=null"]  # which are refused until they are allowed


def pipeline(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = folder / "sbatch"
    program.write_text(
        f'#!/bin/bash\nprintf "%s\\0" "$@" >> {folder}/jobs\nprintf "\\n" >> {folder}/jobs\n'
        f'[ "$(wc -l < {folder}/jobs)" != "$SBATCH_REFUSES" ] || exit 1\n'
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
    jobs = submitted(
        tmp_path, "--from", "score", "opd_32b_4nodes", "train.lr=1e-6", *words, *NO_CODE, "slurm.environment.NCCL_DEBUG=INFO", **site
    )
    jobs = {label.removeprefix("opd_32b_4nodes-"): job for label, job in jobs.items()}
    evaluations = [f"eval-{name}-{model}" for model in ("teacher", "sft", "opd") for name in MATHS]
    assert list(jobs) == ["score", "engines", "check", "train", "opd-hf", *evaluations, "report"]
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
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"OPD_SET_NCCL_DEBUG=INFO", "OPD_SET_RANKS_PER_NODE=8", f"OPD_RUN_DIR={tmp_path}/run"} <= set(environment)
    assert list(read_jobs(tmp_path / "run").values()) == [[str(number)] for number in range(1, len(jobs) + 1)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["opd_8b", "sft.parallel.tp=16"], "slurm.nodes = 1 of 8 ranks each: sft.parallel: 8 ranks do not fit tp=16"),
        (["opd_32b_4nodes", "slurm.nodes=1"], "sft.parallel: 8 ranks do not fit tp=8 pp=2"),
        (["opd_8b", "engine.launch.teacher.dp=8"], "engine.launch for the teacher: servers * tp * dp = 1 * 2 * 8 = 16 GPUs"),
        (["opd_8b", "engine.launch=null"], "engine.kind = 'sglang', but no servers"),
        (
            ["opd_8b", "slurm.nodes=100"],
            "global_batch_tokens = 2097152 is less than a micro-batch of 20480 for each of 200 data-parallel ranks",
        ),
        (["opd_8b", "slurm.environment.HF_TOKEN=$NO_SUCH_TOKEN"], "environment variable NO_SUCH_TOKEN, which is not set"),
        (["opd_8b", "slurm.nodez=2"], "did you mean 'nodes'?"),
    ],
)
def test_what_can_be_known_is_refused(words: list[str], expected: str) -> None:
    def plan(name: str, *overrides: str) -> None:
        recipe = load_recipe(name, [*NO_CODE, *overrides])
        cluster = Cluster(recipe.slurm)
        plan_jobs(recipe, name, list(overrides), cluster)
        cluster.variables(recipe)

    with pytest.raises(ConfigError, match=re.escape(expected)):
        plan(*words)


def test_the_engines_have_one_gpu_whatever_the_recipe_says() -> None:
    given = ["engine.launch.student.tp=2", "engine.launch.servers=2", "slurm.venv_serve=serve"]
    recipe = load_recipe("opd_8b", given)
    (job,) = plan_jobs(recipe, "opd_8b", given, Cluster(recipe.slurm), first="engines", last="engines")
    launch = load_recipe(job.words[1], list(job.words[2:-1])).engine.launch
    assert launch is not None
    student = launch.serving("student")
    assert (student.servers, student.tp, student.dp) == (1, 1, 1)
    assert student.command == [f"{os.getcwd()}/serve/bin/python", "-m", "sglang.launch_server"]


def test_engines_are_left_out_where_the_training_image_has_no_sglang() -> None:
    def jobs(*words: str, **sections: str | None) -> dict[str, Job]:
        recipe = load_recipe("opd_8b", ["slurm.image_train=train", "slurm.image_serve=serve", *NO_CODE, *words])
        planned = plan_jobs(recipe, "opd_8b", list(words), Cluster(recipe.slurm), **sections)
        said = describe(planned, recipe, Cluster(recipe.slurm))
        assert any("no job engines" in line for line in said) is not any(job.label == "engines" for job in planned)
        return {job.label: job for job in planned}

    assert jobs()["check"].after == ("score",)
    for other in (
        "slurm.image_engines=both",
        "engine.launch.command=['/opt/python','-m','sglang.launch_server']",
        "engine.urls=['http://a:1']",
    ):
        assert jobs(other)["check"].after == ("engines",)
    with pytest.raises(ConfigError, match="IMAGE_ENGINES"):
        jobs(first="engines")


@pytest.mark.parametrize(
    "word",
    [
        "-N4",
        "-N",
        "--arr=0-9",
        "--time=1",
        "-t1",
        "--signal=USR1@5",
        "--no-requeue",
        "--gpus-per-node=1",
        "--gres=gpu:1",
        "-n2",
        "--ntasks-per-core=1",
    ],
)
def test_options_that_would_get_around_what_was_checked_are_refused(word: str) -> None:
    for field in ("options", "gpu_options"):
        with pytest.raises(ConfigError, match="is set by the pipeline itself"):
            load_recipe("opd_8b", [f"slurm.{field}=['{word}']"])


def test_other_options_are_taken() -> None:
    words = ["--constraint=ib", "--mem=0", "--exclusive", "--time-min=10", "-wnode1", "--nodelist=node1", "--gres-flags=enforce-binding"]
    assert load_recipe("opd_8b", [f"slurm.options={words}"]).slurm.options == words


def test_jobs_that_could_not_be_cancelled_are_named(tmp_path: Path) -> None:
    (tmp_path / "scancel").write_text('#!/bin/sh\n[ "$1" != 1 ]\n')
    (tmp_path / "scancel").chmod(0o755)
    run = pipeline(tmp_path, "--from", "train", "opd_8b", *NO_CODE, SBATCH_REFUSES="3")
    assert run.returncode == 2
    assert "not submitted" in run.stderr
    assert "could not cancel 1, which still stand" in run.stderr
    rows = read_rows(tmp_path / "run")
    assert [(row["event"], row["job"]) for row in rows] == [("submitted", "1"), ("submitted", "2"), ("cancelled", "2")]


def test_a_path_with_an_equals_sign_is_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "lr=1e-6"
    folder.mkdir()
    path = folder / "recipe.toml"
    path.write_text(load_recipe("opd_8b", ["name=mine"]).to_toml())
    assert "--job-name=mine-check" in pipeline(tmp_path, "--dry-run", "--from", "check", "--until", "train", str(path)).stdout
    assert "--job-name=opd_8b-check" in pipeline(tmp_path, "--dry-run", "--from", "check", "train.lr=1e-6", *NO_CODE).stdout
    script = f'source {REPOSITORY}/slurm/lib.sh; for word; do with_recipe opd_8b "$word"; echo "${{arguments[0]}}"; done'
    settings = {"SLURM_JOB_ID": "7", "OPD_ENV": f"{REPOSITORY}/slurm/env.sh"}
    words = [str(path), "lr=1e-6", "train.lr=1e-6", "--round"]
    run = subprocess.run(["bash", "-c", script, "bash", *words], env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == [str(path), "lr=1e-6", "opd_8b", "opd_8b"]


def test_a_program_that_is_to_start_servers_is_looked_for_without_gpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def look(*words: str) -> int:
        return main(["slurm-servers", "opd_8b", *words])

    assert look("engine.launch=null") == 0
    assert look(f"engine.launch.command=['{sys.executable}']") == 0
    assert look("engine.launch.command=['/nowhere/python','-m','sglang.launch_server']") == 2
    assert "/nowhere/python: no such program" in capfd.readouterr().err
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without packages
    program.chmod(0o755)
    assert look(f"engine.launch.command=['{program}','-m','sglang.launch_server']") == 2
    assert f"{program}: the Python that was to run the server has no SGLang" in capfd.readouterr().err


def test_stages_that_are_not_there_are_refused() -> None:
    stages = list_stages(load_recipe("opd_8b"))
    assert [stage.label for stage in select_stages(stages, "check-sft", "sft-hf")] == ["sft", "sft-hf"]
    with pytest.raises(UserError, match="no stage 'nowhere' in this recipe; there are: inputs, generate"):
        select_stages(stages, "nowhere", None)
    with pytest.raises(UserError, match="stage 'sft' comes before 'train'"):
        select_stages(stages, "train", "sft")


def test_nothing_is_submitted_of_a_recipe_that_is_refused(tmp_path: Path) -> None:
    run = pipeline(tmp_path, "opd_32b_4nodes", "slurm.nodes=1")
    assert (run.returncode, run.stdout) == (2, "")
    assert "sft.parallel: 8 ranks do not fit" in run.stderr
    assert "nothing was submitted" in run.stderr
    assert not (tmp_path / "jobs").exists()


def test_programs_of_models_are_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    run = pipeline(tmp_path, "opd_8b")
    assert run.returncode == 2
    assert "to allow it: eval.lcb_v5.allow_code_execution=true eval.lcb_v6.allow_code_execution=true" in run.stderr
    assert "nothing was submitted" in run.stderr
    recipe = load_recipe("opd_8b")
    assert plan_jobs(recipe, "opd_8b", [], Cluster(recipe.slurm), last="train"), "no program runs until there"
    allowed = load_recipe("opd_8b", [f"eval.{name}.allow_code_execution=true" for name in ("lcb_v5", "lcb_v6")])
    assert (
        plan_jobs(allowed, "opd_8b", [], Cluster(allowed.slurm), first="eval-lcb_v5", last="eval-lcb_v6")[0].label == "eval-lcb_v5-teacher"
    )


def test_a_dry_run_prints_sbatch_lines_and_no_secrets(tmp_path: Path) -> None:
    run = pipeline(
        tmp_path, "--dry-run", "opd_8b", *NO_CODE, "engine.launch.environment.HF_TOKEN=hf_abc", "slurm.environment.API_KEY=hf_abc"
    )
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert [line.split()[1] for line in lines if not line.startswith(("settings", " "))] == ["sbatch"] * 21
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
            recipe = load_recipe(name, NO_CODE)
            assert plan_jobs(recipe, name, [], Cluster(recipe.slurm))


def test_every_shipped_training_script_has_the_nodes_of_its_recipe() -> None:
    for script in (REPOSITORY / "slurm").glob("opd_*.sh"):
        lines = dict(
            line.removeprefix("#SBATCH --").split("=", 1) for line in script.read_text().splitlines() if "#SBATCH" in line and "=" in line
        )
        cluster = load_recipe(script.stem).slurm
        assert (int(lines["nodes"]), int(lines["gpus-per-node"])) == (cluster.nodes, cluster.gpus_per_node)


def test_rounds_are_submitted_one_after_the_other() -> None:
    recipe = load_recipe("opd_8b", ["rounds.count=2", "eval.aime24.models=['sft','round-1','opd']", *NO_CODE])
    jobs = {job.label: job for job in plan_jobs(recipe, "opd_8b", ["rounds.count=2"], Cluster(recipe.slurm), first="rollout")}
    assert jobs["rollout@2"].after == ("opd-hf@1",)
    assert jobs["train@2"].after == ("check@2",)
    assert jobs["train@2"].words[-2:] == ("--round", "2")
    assert jobs["eval-aime24-opd"].after == ("opd-hf@2", "eval-aime24-sft")
    assert jobs["eval-aime24-round-1"].after == ("opd-hf@1", "eval-aime24-sft")
    assert jobs["report"].after == ("opd-hf@2", *(label for label in jobs if label.startswith("eval-")))
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
