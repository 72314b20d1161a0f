"""The folder that a cluster user submits from: the repository's job scripts, a site file, tiny models and a recipe for them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w
from slurm_cluster import Cluster, wait_for
from stores import make_scored_store
from tiny_models import make_model, write_prompts

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM = ("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/share", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/tmp")


class Site:
    """Submits the real scripts with a recipe for models that train on a CPU in seconds."""

    def __init__(self, cluster: Cluster, folder: Path, *, pythonpath: str):
        self.cluster, self.folder = cluster, folder
        (folder / "slurm").symlink_to(REPOSITORY / "slurm")
        (folder / "logs").mkdir()
        make_model(folder / "teacher", seed=6)
        make_model(folder / "student", seed=5)
        write_prompts(folder / "prompts.jsonl", 48)
        make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
        self.environment = {"PYTHONPATH": pythonpath, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        self.bare = self.write_env("bare")

    def write_env(self, name: str, **settings: str) -> Path:
        """A copy of slurm/env.sh with settings changed as a user would change them."""
        software = {"VENV_TRAIN": sys.prefix, "VENV_SERVE": sys.prefix, "RANKS_PER_NODE": "1"}
        text = (REPOSITORY / "slurm/env.sh").read_text()
        for key, value in (software | settings).items():
            text, count = re.subn(rf"^{key}=.*$", f"{key}={value}", text, flags=re.MULTILINE)
            assert count == 1, f"slurm/env.sh has no setting {key}"
        path = self.folder / f"{name}.sh"
        path.write_text(text)
        return path

    def write_recipe(self, name: str, **sections: Any) -> Path:
        """A recipe of its own run_dir, on the site's models and prompts."""
        shared = {"lr": 1e-2, "global_batch": 8, "micro_batch_tokens": 256, "save_every": 1000}
        sampled = {"prompts": f"{self.folder}/prompts.jsonl", "prompts_per_part": 12, "sampling": {"max_new_tokens": 12}}
        tree: dict[str, Any] = {
            "name": name,
            "run_dir": f"{self.folder}/runs/{name}",
            "models": {"teacher": f"{self.folder}/teacher", "student": f"{self.folder}/student"},
            "generate": sampled,
            "sft": shared,
            "rollout": sampled,
            "train": shared,
            "eval": {"held_out": {"prompts": f"{self.folder}/prompts.jsonl", "sampling": {"max_new_tokens": 12}, "grader": "none"}},
            "rounds": {},
            "slurm": {},
        }
        for section, values in sections.items():
            tree[section] = tree[section] | values
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    def image(self) -> Path:
        """A container image (a directory) that holds the two programs which the jobs start, and is otherwise this machine."""
        image = self.folder / "image"
        programs = image / "usr/local/bin"
        programs.mkdir(parents=True)
        for program in ("megatron-opd", "torchrun"):
            (programs / program).write_text(f'#!/bin/sh\nexec {sys.prefix}/bin/{program} "$@"\n')
            (programs / program).chmod(0o755)
        return image

    def apptainer(self) -> Path:
        """A folder for PATH with a program that stands for apptainer, which can't be installed here: it notes its words down and runs the
        command outside of any container, with PATH as an image would have it."""
        folder = self.folder / "apptainer-bin"
        folder.mkdir()
        program = folder / "apptainer"
        program.write_text(
            f"""#!/bin/bash
echo "$APPTAINER_BIND $*" >> {self.folder}/apptainer.log
[[ $1 == exec ]] || exit 64
shift
while [[ $1 == --* ]]; do
    case $1 in
    --pwd) cd "$2" || exit 64; shift 2 ;;
    --bind) shift 2 ;;
    --nv) shift ;;
    *) echo "apptainer: no option $1" >&2; exit 64 ;;
    esac
done
[[ $1 == *.sif && -e $1 ]] || exit 64
export PATH={sys.prefix}/bin:/usr/bin:/bin
exec "${{@:2}}"
"""
        )
        program.chmod(0o755)
        return folder

    def mounts(self) -> str:
        """What must be seen in a container for that image to work."""
        folders = [*SYSTEM, sys.prefix, sys.base_prefix, str(REPOSITORY), *filter(None, self.environment["PYTHONPATH"].split(":"))]
        return ",".join(dict.fromkeys(folder for folder in folders if Path(folder).is_dir()))

    def run(self, *command: str | Path, env: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command in the site's folder."""
        return self.cluster.run(*command, cwd=self.folder, **self.environment, OPD_ENV=str(env or self.bare), **environment)

    def sbatch(self, *words: str | Path, env: Path | None = None, **environment: str) -> str:
        """`sbatch WORDS`; returns the job's id."""
        result = self.run("sbatch", "--parsable", *words, env=env, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def pipeline(self, *words: str | Path, env: Path | None = None, **environment: str) -> dict[str, str]:
        """`slurm/pipeline.sh WORDS`; returns the job ids by name."""
        result = self.run("slurm/pipeline.sh", *words, env=env, **environment)
        assert result.returncode == 0, result.stderr
        return dict(re.findall(r"^(\S+) +(\d+)", result.stdout, flags=re.MULTILINE))

    def wait(self, job: str, *, seconds: float = 240) -> str:
        """The last state of a job."""
        return self.cluster.wait(job, seconds=seconds, show=lambda: self.log(job))

    def complete(self, job: str, *, seconds: float = 240) -> str:
        """Wait for a job that must succeed; returns its log."""
        state = self.wait(job, seconds=seconds)
        assert state == "COMPLETED", f"{state}\n{self.log(job)}"
        return self.log(job)

    def log(self, job: str) -> str:
        """What a job (every task of an array) has printed."""
        paths = sorted((self.folder / "logs").glob(f"*-{job}.out")) + sorted((self.folder / "logs").glob(f"*-{job}_*.out"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths)

    def wait_for_log(self, job: str, text: str, *, seconds: float = 120) -> None:
        """Wait until a job has printed `text`."""
        wait_for(lambda: text in self.log(job), seconds, f"{text!r} in the log of job {job}", lambda: self.log(job))

    def metrics(self, output: Path) -> list[dict[str, Any]]:
        """The rows of a training run."""
        path = output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def finished(self, recipe: Path, *words: str) -> bool:
        """What `megatron-opd progress` says."""
        return self.run(Path(sys.prefix, "bin/megatron-opd"), "progress", recipe, *words).returncode == 0
