"""Which runs are seeds of one experiment, wherever their folders lie, and what each cost with what it shares with others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from unit.study_runs import PROMPTS, make_study_run, write_evaluation

from megatron_opd.recipe.files import read_tree
from megatron_opd.report.disagreements import disagreements
from megatron_opd.report.grouping import different_settings, group_runs
from megatron_opd.report.lineage_rows import mixed_groups, run_facts
from megatron_opd.report.runs import Run, read_runs
from megatron_opd.report.shared_cost import find_shared, whole_cost
from megatron_opd.report.tables import tables
from megatron_opd.report.verdict import verdicts

TOOLS = str(Path(__file__).parents[2] / "tools")
sys.path.insert(0, TOOLS)
try:
    from study.plan import Replicate, write_recipes
    from study.settings import Settings
    from study.subject import ARITHMETIC
finally:
    sys.path.remove(TOOLS)

RUN_DIR = "runs"  # the folder that the runs of a recipe lay in when it was kept


def fingerprint(name: str, weights: str = "", config: str = "c") -> dict[str, str]:
    return {"name": name, "config_sha256": config * 64, "weights_sha256": (weights or name)[-1] * 64}


def make_run(
    folder: Path, recipe: dict[str, Any], *, stages: tuple[dict[str, Any], ...] = (), lineage: dict[str, Any] | None = None
) -> str:
    """A run's folder as far as groups and costs need it."""
    (folder / "opd-hf").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    if lineage:
        (folder / "opd-hf" / "opd_lineage.json").write_text(json.dumps({"lineage": lineage}))
    rows = stages or (stage("train"),)
    (folder / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def stage(name: str, seconds: float = 10.0, *, gpus: int = 0, kwh: float | None = None) -> dict[str, Any]:
    row = {"stage": name, "seconds": seconds, "tokens": 1, "num_gpus": gpus, "gpu_hours": gpus * seconds / 3600}
    return row if kwh is None else row | {"energy_joules": kwh * 3.6e6}


def recipe_of(folder: str, *, seed: int = 0, teacher: str = "models/teacher", **train: Any) -> dict[str, Any]:
    return {"run_dir": f"{RUN_DIR}/{folder}", "models": {"teacher": teacher, "student": "models/base"}, "score": {"model": "{teacher}"}} | {
        "train": {"seed": seed, "init": "{run_dir}/sft-hf", "store": "{run_dir}/rollouts.opd.zarr", **train}
    }


def grouped(folders: list[str]) -> list[list[str]]:
    return [[run.label for run in members] for members in group_runs(read_runs(folders), None).values()]


def test_every_arm_of_the_study_is_a_group_of_its_seeds(tmp_path: Path) -> None:
    """Recipes as tools/study writes them: each seed has its own student, prompts and stores, in its own folder, and copies of the teachers."""
    folders = []
    for seed in range(2):
        replicate = Replicate(tmp_path / "study" / f"seed-{seed}", seed, Settings())
        write_recipes(replicate)
        for arm in ARITHMETIC.possible:
            folder = replicate.folder / arm.name
            teachers = {"sft_teacher": fingerprint(f"teacher-{arm.student}"), "opd_teacher": fingerprint(f"teacher-{arm.teacher}")}
            tree = read_tree(replicate.recipe(arm.name))
            folders.append(make_run(folder, tree, lineage={"base": fingerprint("student", str(seed)), **teachers}))
    groups = group_runs(read_runs(folders), None)
    assert {name: len(members) for name, members in groups.items()} == {arm.name: 2 for arm in ARITHMETIC.possible}
    assert mixed_groups(groups) == []
    pair = [members[0] for name, members in groups.items() if name in ("every-5-plain", "a-by-b-online-plain")]
    differing = different_settings(pair)
    assert sorted(differing["models.teacher"]) == ["teacher-a (aaaaaaaaaaaa)", "teacher-b (bbbbbbbbbbbb)"]
    assert not {"generate.model", "eval.addition.teacher", "eval.addition.prompts", "train.init"} & differing.keys()


def test_a_teacher_counts_by_its_weights(tmp_path: Path) -> None:
    """Two paths to the same weights are one setting, one path to two weights are two; without weights paths count."""

    def run(name: str, path: str, weights: str | None, seed: int) -> str:
        lineage = {} if weights is None else {"opd_teacher": fingerprint("t", weights)}
        return make_run(tmp_path / name, recipe_of(name, seed=seed, teacher=path), lineage=lineage)

    first, copied = run("first", "models/teacher", "1", 0), run("copied", "/data/copy", "1", 1)
    replaced, other, moved = run("replaced", "models/teacher", "2", 2), run("other", "/data/x", None, 3), run("moved", "/data/y", None, 4)
    assert grouped([first, copied, replaced]) == [["first", "copied"], ["replaced"]]
    assert different_settings(read_runs([first, replaced])) == {"models.teacher": ["t (111111111111)", "t (222222222222)"]}
    assert grouped([other, moved]) == [["other"], ["moved"]]
    unfinished = run("unfinished", "/data/copy", None, 5)  # knows no weights yet, but others know those of its path
    assert grouped([first, copied, unfinished]) == [["first", "copied", "unfinished"]]


def test_paths_of_other_data_count(tmp_path: Path) -> None:
    """Beside the folders of two experiments, under one name: with the same seeds in both it is no seed that they differ in."""
    folders = []
    for data in ("maths", "code"):
        for seed in (0, 1):
            name = f"{data}/s{seed}"
            folders.append(
                make_run(tmp_path / name, recipe_of(name, seed=seed) | {"rollout": {"prompts": f"{RUN_DIR}/{data}/prompts.jsonl"}})
            )
    assert grouped(folders) == [["maths/s0", "maths/s1"], ["code/s0", "code/s1"]]
    assert list(different_settings(read_runs(folders))) == ["rollout.prompts"]
    assert grouped([folders[0], folders[3]]) == [["s0", "s1"]], "what two runs alone can't tell apart"


def test_the_student_counts_by_its_architecture(tmp_path: Path) -> None:
    folders = []
    for seed, config in enumerate("aab"):
        tree = recipe_of(f"{seed}/run", seed=seed)
        tree["models"]["student"] = f"{RUN_DIR}/{seed}/student"
        folders.append(make_run(tmp_path / f"{seed}/run", tree, lineage={"base": fingerprint("student", str(seed), config)}))
    assert grouped(folders) == [["0/run", "1/run"], ["2/run"]]


def test_prompts_of_each_seed_are_paired_within_it(tmp_path: Path) -> None:
    runs = []
    for loss, solved in (("opd", 0.3), ("forward_kl", 0.9)):
        for seed in range(2):
            run = make_study_run(tmp_path / f"{loss}-s{seed}", loss, seed, solved)
            right = [(prompt + seed) % 10 < 10 * solved for prompt in range(PROMPTS)]
            write_evaluation(run, "sums", "opd", right, weights=f"{loss}{seed}", prompts_sha256=str(seed) * 64)
            write_evaluation(run, "sums", "sft", right[::-1], weights="s", prompts_sha256=str(seed) * 64)
            runs.append(str(run))
    groups = group_runs(read_runs(runs), "train.loss.name")
    results = {result.name: result for result in verdicts(groups, None)["sums"]}
    found = results["forward_kl"]
    assert found.num_prompts == 2 * PROMPTS
    assert found.difference is not None and found.difference["mean"] == pytest.approx(0.6)  # noqa: PT018
    assert found.seeds_how == "paired by seed"
    assert [member.run.label for member in results["sft"].members] == ["opd-s0", "opd-s1"], "one model, two sets of prompts"
    assert results["sft"].num_prompts == 2 * PROMPTS
    assert any("2 different sets of prompts" in note for result in results.values() for note in result.notes)
    apart = disagreements(list(results.values()))
    assert apart[0].total == 2 * PROMPTS * 0.6
    assert all(run in apart[0].commands[0] for run in ("opd-s", "forward_kl-s"))


def shared_runs(folder: Path) -> list[Run]:
    """A student and its rollouts in `base`; `first` had them scored and trains on them, `second` trains on them too."""
    base = {
        "run_dir": f"{RUN_DIR}/base",
        "generate": {"store": "{run_dir}/sft.opd.zarr"},
        "rollout": {"store": "{run_dir}/rollouts.opd.zarr"},
    }
    make_run(folder / "base", base, stages=(stage("generate", 1.0), stage("sft", 2.0, gpus=1, kwh=0.5), stage("rollout", 4.0, gpus=1)))
    store = f"{RUN_DIR}/base/rollouts.opd.zarr"
    for name, stages in {"first": (stage("score", 8.0), stage("train", 16.0)), "second": (stage("train", 32.0),)}.items():
        tree = recipe_of(name, init=f"{RUN_DIR}/base/sft-hf", store=store)
        tree["score"] |= {"store": store, "teacher": "t"}
        make_run(folder / name, tree, stages=stages)
    runs = read_runs([str(folder / name) for name in ("first", "second")])
    find_shared(runs)
    return runs


def test_what_runs_share_is_of_the_cost_of_each(tmp_path: Path) -> None:
    first, second = shared_runs(tmp_path)
    assert (first.cost()["seconds"], whole_cost(first)["seconds"]) == (24.0, 31.0)
    assert (second.cost()["seconds"], whole_cost(second)["seconds"]) == (32.0, 47.0), "base, and the scores that the first run made"
    assert whole_cost(second)["gpu_hours"] == pytest.approx(6 / 3600)
    assert whole_cost(second)["energy_kwh"] is None, "the rollouts' GPU was not measured"
    facts = {row[0]: row[1] for row in run_facts(second)}
    assert f"score in {tmp_path / 'first'}: 8.0 s" in facts["shared with others"]
    inside = recipe_of("inside", init=str(tmp_path / "inside" / "sft-hf"))  # its own folder, by another path
    own = read_runs([make_run(tmp_path / "inside", inside, stages=(stage("sft"), stage("train")))])
    find_shared(own)
    assert (own[0].shared, own[0].unknown) == ([], [])
    alone = read_runs([str(tmp_path / "second")])
    find_shared(alone)
    assert whole_cost(alone[0])["seconds"] is None
    assert alone[0].unknown == [f"score of {RUN_DIR}/base/rollouts.opd.zarr"]


def test_energy_that_some_stages_know_is_no_sum(tmp_path: Path) -> None:
    rows = {
        "part": (stage("rollout", gpus=1, kwh=0.25), stage("train", gpus=1), stage("eval grading")),
        "whole": (stage("rollout", gpus=1, kwh=0.25), stage("train", gpus=1, kwh=0.5), stage("eval grading")),
        "none": (stage("train", gpus=1), stage("eval grading")),
    }
    folders = [make_run(tmp_path / name, recipe_of(name, lr=number), stages=stages) for number, (name, stages) in enumerate(rows.items())]
    runs = read_runs(folders)
    assert [run.cost()["energy_kwh"] for run in runs] == [None, 0.75, None]
    said = "not known: train did not measure it (0.25 kWh in the others)"
    (stages,) = [cells for title, cells in tables(runs) if title == "Stages"]
    assert [row[-1] for row in stages if row[1] == "all"] == [said, "0.75", ""]
    assert [dict(run_facts(run)).get("energy of its GPUs, kWh") for run in runs] == [said, "0.75", None]
