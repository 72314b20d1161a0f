"""`check --stage inputs` and the stages say what becomes of prompts, and refuse before anything has cost something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_model

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [f"models.{role}={str(make_model(folder / role, seed=seed, layers=1))!r}" for seed, role in enumerate(("teacher", "student"))]


def write_rows(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


USER = {"role": "user", "content": "hi"}


def test_check_says_files_and_faults_of_every_stage(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_rows(tmp_path / "texts" / "train.jsonl", {"prompt": "a"}, {"prompt": "a"}, {"prompt": [USER], "answer": ["1", "2"]})
    write_rows(tmp_path / "texts" / "test.jsonl", {"prompt": "b"})
    chat = write_rows(tmp_path / "chat.jsonl", {"prompt": [USER]})
    recipe = [
        "tiny",
        *models,
        f"generate.prompts={str(text.parent)!r}",
        f"rollout.prompts={str(chat)!r}",
        f"eval.held_out.prompts={str(chat)!r}",
    ]
    assert main(["check", *recipe, "rollout.num_prompts=1", "--stage", "inputs"]) == 0
    out = capsys.readouterr().out
    assert f"generate: 3 prompts of {text.parent}: train.jsonl (split train); not read: test.jsonl" in out
    assert "generate: 2 of 3 prompts are text and go to the model as they are, although it has a chat template" in out
    assert f"rollout: 1 prompts of {chat}" in out

    last = write_rows(tmp_path / "last.jsonl", {"prompt": [USER, {"role": "assistant", "content": "It is"}]})
    bad = [
        f"rollout.prompts={str(last)!r}",
        f"eval.held_out.prompts={str(text)!r}",
        "generate.encoding.chat_template=never",
        "eval.held_out.grader=exact",
    ]
    assert main(["check", *recipe, *bad, "--stage", "inputs"]) == 2
    error = capsys.readouterr().err
    assert "3 faults" in error
    assert "generate: prompt 2 is a list of messages, but encoding.chat_template is 'never'" in error
    assert "rollout: prompt 0 ends in an assistant message ('It is'); encoding.assistant_last='continue'" in error
    assert f"{text}:3: 'answer' has 2 elements" in error
    # Each prompt but once: the first two of three rows are the same.
    assert main(["check", *recipe, "generate.unique_prompts=true", "generate.num_prompts=3", "--stage", "inputs"]) == 2
    assert "2 prompts, but num_prompts asks for 3" in capsys.readouterr().err


def test_a_mended_answer_costs_no_sample(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "p.jsonl", {"prompt": "ab", "answer": ["x", "y"]}, {"prompt": [USER], "answer": 2})
    student = models[1].split("=")[1]
    recipe = ["tiny", *models, f"run_dir={str(tmp_path)!r}", f"rollout.prompts={str(path)!r}", f"rollout.model={student}"]
    assert main(["rollout", *recipe]) == 0
    out = capsys.readouterr().out
    assert f"rollout: prompts of {path}\n" in out
    assert "rollout: 1 of 2 prompts are text" in out
    before = StoreReader(str(tmp_path / "rollouts.opd.zarr")).rollout(0).tokens.tolist()
    write_rows(path, {"prompt": "ab", "answer": "x"}, {"prompt": [USER], "answer": "three"})
    assert main(["rollout", *recipe]) == 0
    assert "has all its parts" in capsys.readouterr().out
    assert StoreReader(str(tmp_path / "rollouts.opd.zarr")).rollout(0).tokens.tolist() == before
    write_rows(path, {"prompt": "abc", "answer": "x"}, {"prompt": [USER], "answer": "three"})
    assert main(["rollout", *recipe]) == 2
    assert "was made with other settings: prompts is" in capsys.readouterr().err


def test_a_prompt_that_loses_something_is_refused_before_an_engine_starts(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = [{"name": "add", "description": "adds"}]
    path = write_rows(tmp_path / "p.jsonl", {"prompt": [USER], "tools": tools})
    recipe = ["tiny", *models, f"run_dir={str(tmp_path)!r}", f"rollout.prompts={str(path)!r}", f"rollout.model={models[1].split('=')[1]}"]
    # No server answers there: the refusal comes first.
    assert main(["rollout", *recipe, 'engine.urls=["http://127.0.0.1:1"]']) == 2
    assert "prompt 0: the chat template does not print the name of a tool, 'add'" in capsys.readouterr().err
    assert not (tmp_path / "rollouts.opd.zarr").exists()
