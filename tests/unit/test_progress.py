"""`progress` and `check --stage inputs` say what is on disk; job scripts go by their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import edit_state
from stores import make_scored_store
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.pipeline.plan import NOT_FINISHED


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of the recipe 'tiny' that name what a user brings."""
    folder = tmp_path_factory.mktemp("inputs")
    models = [f"models.{role}={str(make_model(folder / role, seed=seed))!r}" for seed, role in enumerate(("teacher", "student"))]
    prompts = str(write_prompts(folder / "prompts.jsonl"))
    return ["tiny", *models, *(f"{stage}.prompts={prompts!r}" for stage in ("generate", "rollout", "eval.held_out"))]


def write_checkpoint(output: Path, step: int) -> None:
    folder = output / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "opd_state.json").write_text(json.dumps({"step": step}))
    (output / "checkpoints" / "latest").write_text(folder.name)


def test_progress_counts_parts_and_steps(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [*inputs, f"run_dir={str(tmp_path)!r}", "train.global_batch=6"]  # 20 rollouts: 4 steps
    recipe += [
        "rollout.prompts=/nowhere",
        "rollout.prompts_per_part=4",
        "rollout.sampling.max_new_tokens=60",
    ]  # as make_scored_store has it
    assert main(["progress", *recipe]) == NOT_FINISHED
    assert capsys.readouterr().out.count("not started") == 13
    folder = Path(inputs[1].split("'")[1]).parent
    store = make_scored_store(tmp_path / "rollouts.opd.zarr", sampler=folder / "student", teacher=folder / "teacher")
    assert [main(["progress", *recipe, "--stage", stage]) for stage in ("rollout", "score", "train")] == [0, 0, NOT_FINISHED]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:6] for line in lines[:2]] == [[stage, "done", "3", "of", "3", "parts"] for stage in ("rollout", "score")]
    assert lines[2].split()[:7] == ["train", "not", "started", "0", "of", "4", "steps"]

    write_checkpoint(tmp_path / "opd", 3)
    assert main(["progress", *recipe, "--stage", "train"]) == NOT_FINISHED
    write_checkpoint(tmp_path / "opd", 4)
    assert main(["progress", *recipe, "--stage", "train"]) == 0
    assert main(["progress", *recipe, "--stage", "train", "train.steps=5"]) == NOT_FINISHED

    state = tmp_path / "opd/checkpoints/step_000004/opd_state.json"
    state.write_text(json.dumps({"step": 4, "steps": 4}))
    assert main(["progress", *recipe, "--stage", "train", "train.store=/nowhere"]) == 0, "a finished run needs its store no more"
    assert "4 of 4 steps" in capsys.readouterr().out.splitlines()[-1]

    assert store.score_manifest(2, "teacher") is not None
    (tmp_path / "rollouts.opd.zarr/parts/000002/teacher/teacher/zarr.json").unlink()
    assert main(["progress", *recipe, "--stage", "score"]) == NOT_FINISHED
    assert "2 of 3 parts" in capsys.readouterr().out.splitlines()[-1]


def test_an_unfinished_run_is_not_converted(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "sft", 3)
    recipe = [*inputs, f"run_dir={str(tmp_path)!r}", "sft.steps=4"]
    assert main(["convert", "trained", *recipe, "--stage", "sft"]) == 2
    assert "3 of 4 steps" in capsys.readouterr().err


def test_a_directory_that_is_of_no_known_checkpoint_is_compared_by_its_weights(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an older version converted, and a model that somebody put there."""
    checkpoint = tmp_path / "sft/checkpoints/step_000004"
    student, teacher = (Path(inputs[number].split("'")[1]) for number in (2, 1))
    assert main(["convert", "to-mcore", str(student), str(checkpoint)]) == 0
    edit_state(checkpoint, lambda state: state.update(step=4))
    command = ["convert", "trained", *inputs, f"run_dir={str(tmp_path)!r}", "sft.steps=4", "--stage", "sft"]
    target = tmp_path / "sft-hf"
    shutil.copytree(student, target)
    assert main(command) == 0
    assert "is there already, of step 4" in capsys.readouterr().out
    shutil.rmtree(target)
    shutil.copytree(teacher, target)
    assert main(command) == 2
    assert "made of another model, it is not recorded which, but the latest checkpoint" in capsys.readouterr().err
    assert not (target / "opd_converted.json").exists()
    (target / "opd_converted.json").write_text("[]")
    assert main(command) == 2
    assert "opd_converted.json can't be read" in capsys.readouterr().err


def test_a_layout_that_the_ranks_do_not_fit(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = ["train.parallel.tp=2", "train.parallel.pp=2"]
    assert main(["check", *inputs, *layout, "--stage", "inputs", "--ranks", "4"]) == 0
    assert main(["check", *inputs, *layout, "--stage", "inputs", "--ranks", "6"]) == 2
    assert "train.parallel: 6 ranks do not fit tp=2 pp=2 cp=1 ep=1; start 4 ranks, or a multiple" in capsys.readouterr().err
    assert main(["check", *inputs, *layout, "--ranks", "6"]) == 2
    assert "train.parallel: 6 ranks" in capsys.readouterr().err, "before the store is looked for"


def test_check_of_the_inputs_names_what_is_missing(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", *inputs, "--stage", "inputs"]) == 0
    assert "rollout: 40 prompts" in capsys.readouterr().out
    assert (tmp_path / "runs/tiny/inputs.json").is_file(), "for 'progress'"
    for override, words in (
        ("eval.held_out.prompts=/nowhere.jsonl", "/nowhere.jsonl: no such prompt file"),
        ("models.teacher=/nowhere", "/nowhere/config.json"),
        ("sft.parallel.tp=8", "tp"),
    ):
        assert main(["check", *inputs, override, "--stage", "inputs"]) == 2
        assert words in capsys.readouterr().err
