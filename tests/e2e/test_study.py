"""tools/study: a study of tiny sizes through the real stages, killed and taken up again; its tables and figures are whole."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import Ending, Job, shared_server

ROOT = Path(__file__).parents[2]
SIZES = (
    "sft_prompts=16",
    "sft_steps=2",
    "sft_b_prompts=16",
    "sft_b_steps=2",
    "prompts=16",
    "samples=2",
    "steps=4",
    "batch=8",
    "eval_prompts=8",
)
ARMS = ("offline-reverse-kl", "offline-plain", "every-1-plain", "a-by-b-residual", "naive-plain")


class Study:
    """A study in `folder`, run as `python -m study` does."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "study.log"
        self.script = folder / "study.py"
        self.script.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT / 'tools')!r})\nfrom study.__main__ import main\nsys.exit(main())\n"
        )

    def run(self, *words: str, sizes: tuple[str, ...] = SIZES, kill_at: int | None = None) -> Ending:
        self.log.write_text("")
        words = ("--folder", str(self.folder / "runs"), *words, "--sizes", *sizes)
        return shared_server().run(
            Job(words, str(self.log), script=str(self.script), below=str(self.folder / "runs/jobs"), kill_at=kill_at)
        )[0]

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "runs/results/results.json").read_text())


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study(tmp_path_factory.mktemp("study"))
    killed = study.run("--seeds", "0", "--only", *ARMS, kill_at=25)
    assert killed.killed
    done = sorted((study.folder / "runs/jobs").rglob("*.json"))
    before = {path: path.read_bytes() for path in done}
    assert study.run("--seeds", "0", "--only", *ARMS).code == 0, study.log.read_text()[-3000:]
    assert done
    assert {path: path.read_bytes() for path in done} == before  # what was done was not done again
    return study


def test_all_arms_have_their_figures_after_a_kill(study: Study) -> None:
    arms = study.results["arms"]
    assert set(arms) == {"sft-a", *ARMS}
    for name in ARMS:
        assert arms[name]["accuracy"]["covers"] == "prompts"
        assert arms[name]["reverse_kl"]["mean"] > 0
        assert arms[name]["steps"] == 4
        # each rollout is trained on once
        assert arms[name]["trained_tokens"] == arms[name]["scored_tokens"] > 0
        assert arms[name]["sampled_tokens"] == (0 if name == "naive-plain" else arms[name]["scored_tokens"])
    assert arms["offline-plain"]["cpu_seconds"]["train"] > 0
    assert arms["every-1-plain"]["cpu_seconds"]["rounds"] == arms["every-1-plain"]["teacher_seconds"] > 0
    assert {(row["arm"], row["against"]) for row in study.results["differences"]} >= {
        ("offline-reverse-kl", "offline-plain"),
        ("a-by-b-residual", "sft-a"),
    }


def test_the_tables_say_the_same_and_the_figures_are_there(study: Study) -> None:
    results = study.folder / "runs/results"
    rows = list(csv.DictReader((results / "runs.csv").open()))
    assert [(row["arm"], row["seed"]) for row in rows] == [("sft-a", "0"), *((arm, "0") for arm in _in_the_study_s_order())]
    report = (results / "report.md").read_text()
    for row in rows:
        assert f"| `{row['arm']}` |" in report
        assert float(row["reverse_kl"]) == pytest.approx(study.results["arms"][row["arm"]]["reverse_kl"]["mean"], rel=1e-5)
    assert all((results / name).read_bytes().startswith(b"\x89PNG") for name in ("arms.png", "cost.png"))


def test_a_part_reports_all_that_is_done_and_of_which_commits(study: Study) -> None:
    """Nothing is left to do here: the results are written again."""
    record = study.folder / "runs/jobs/seed-0/offline-plain/train.json"
    before = record.read_text()
    record.write_text(json.dumps(json.loads(before) | {"commits": ["f" * 40]}))
    try:
        assert study.run("--seeds", "0", "--only", "offline-plain").code == 0, study.log.read_text()[-3000:]
        assert set(study.results["arms"]) == {"sft-a", *ARMS}
        assert "**The jobs were run by the code of 2 commits**" in (study.folder / "runs/results/report.md").read_text()
        rows = csv.DictReader((study.folder / "runs/results/runs.csv").open())
        assert [row["arm"] for row in rows if "f" * 40 in row["commits"]] == ["offline-plain"]
    finally:
        record.write_text(before)


@pytest.mark.parametrize("arm", ["offline-reverse-kl", "a-by-b-residual"])
def test_a_recipe_of_the_study_is_one_that_run_finds_done(arm: str, study: Study, capfd: pytest.CaptureFixture[str]) -> None:
    """All but what the study leaves out."""
    from megatron_opd.cli import main

    main(["progress", str(study.folder / f"runs/seed-0/{arm}/arm.toml")])
    states = {line.split()[0]: line for line in capfd.readouterr().out.splitlines() if line.strip()}
    for stage in ("generate", "sft", "sft-hf", "rollout", "score", "train", "opd-hf", "eval-addition-opd", "eval-drift-opd"):
        assert " done" in states[stage], states[stage]


def test_a_folder_keeps_its_sizes(study: Study) -> None:
    assert study.run("--only", "offline-plain", sizes=(*SIZES, "eval_prompts=9")).code == 2
    assert "give another --folder" in study.log.read_text()
    assert study.run("--only", "offline-plain", sizes=("steps=7",)).code == 2
    assert "each rollout is to be trained on once" in study.log.read_text()
    assert study.run("--only", "offline").code == 2
    assert "'offline' is no arm" in study.log.read_text()


def _in_the_study_s_order() -> list[str]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from study.arms import ARMS as known
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return [arm.name for arm in known if arm.name in ARMS]


def test_a_command_has_one_thread(tmp_path: Path) -> None:
    """What is imported before the number of threads is set must not bring torch; a fork of many threads would only wait."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import study.__main__; assert 'torch' not in sys.modules\n"
        "from study import forks; forks.load(); import torch; assert torch.get_num_threads() == 1"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", code, str(ROOT / "tools")], env=environment, check=True, timeout=300)
