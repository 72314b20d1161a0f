"""Data that grows, by the real commands: a store is extended, several are trained on as one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stores import make_scored_store
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.joined import open_training_stores
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError
from megatron_opd.records import Rollout
from megatron_opd.train.identity import content_of, rollouts_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    make_model(folder / "student", seed=5)
    make_model(folder / "teacher", seed=6)
    write_prompts(folder / "prompts.jsonl", 9)
    return folder


def settings(folder: Path, store: str, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "models.teacher": str(folder / "teacher"),
        "rollout.model": str(folder / "student"),
        "rollout.sft_teacher": str(folder / "teacher"),
        "rollout.prompts": str(folder / "prompts.jsonl"),
        "rollout.store": str(folder / store),
        "rollout.prompts_per_part": 4,
        "rollout.sampling.max_new_tokens": 16,
        "rollout.sampling.temperature": 0.9,
        "engine.batch_sequences": 1,  # a batch of other sequences may round otherwise
        "score.store": str(folder / store),
    }
    return [f"{key}={json.dumps(value)}" for key, value in (options | changes).items()]


def sample(folder: Path, store: str, prompts: int, samples: int, *flags: str, **changes: Any) -> int:
    size = {"rollout.num_prompts": prompts, "rollout.sampling.samples_per_prompt": samples}
    return main(["rollout", "tiny", *settings(folder, store, **size, **changes), *flags])


def by_name(reader: StoreReader) -> dict[tuple[int, int], Rollout]:
    return {(found.prompt_index, found.sample_index): found for found in map(reader.rollout, range(len(reader)))}


def bits(rollout: Rollout) -> tuple[Any, ...]:
    return rollout.tokens.tobytes(), rollout.student_logp.tobytes(), rollout.prompt_len, rollout.finish


def test_an_extended_store_holds_what_one_made_at_once_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More prompts, drawn by a seed (the last part of the old ones is not full), more samples, then both; bit for bit."""

    def grow(store: str, prompts: int, samples: int, *flags: str) -> int:
        return sample(folder, store, prompts, samples, *flags, **{"rollout.subset_seed": 3})

    assert grow("once", 9, 3) == 0
    assert grow("grown", 6, 1) == 0
    parts = {path: path.read_bytes() for path in (folder / "grown/parts").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert grow("grown", 7, 1) == 2
    refused = capsys.readouterr().err
    assert "prompts is 6 prompts" in refused
    assert "--extend would make what is new alone" in refused
    assert grow("grown", 7, 1, "--extend") == 0
    assert grow("grown", 7, 2, "--extend", "--shard", "0/2") == 0
    assert grow("grown", 7, 2, "--shard", "1/2") == 0  # is extended by now
    assert grow("grown", 9, 3, "--extend") == 0
    assert grow("grown", 6, 1) == 0
    assert "it was extended by" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in parts} == parts
    once, grown = by_name(StoreReader(str(folder / "once"))), by_name(StoreReader(str(folder / "grown")))
    assert len(once) == 27
    assert StoreReader(str(folder / "once")).manifest.provenance["subset_seed"] == 3
    assert sample(folder, "grown", 9, 3, **{"rollout.subset_seed": 4}) == 2, "other prompts"
    assert {name: bits(found) for name, found in grown.items()} == {name: bits(found) for name, found in once.items()}


def test_new_parts_alone_are_scored_and_a_training_of_the_shorter_store_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(folder, "scored", 6, 1) == 0
    assert main(["score", "tiny", *settings(folder, "scored")]) == 0
    train(folder, "short", "scored", steps=1, global_batch=4)
    before = {path: path.stat().st_mtime_ns for path in (folder / "scored/parts").rglob("teacher/teacher/**/*") if path.is_file()}
    assert sample(folder, "scored", 9, 2, "--extend") == 0
    again = training(folder, "short", "scored", steps=2, global_batch=4)
    assert main(["check", *again]) == 2
    assert "has not scored" in capsys.readouterr().err
    assert main(["score", "tiny", *settings(folder, "scored")]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    StoreReader(str(folder / "scored"), teacher="teacher").check_complete("teacher")
    assert main(["inspect", str(folder / "scored"), "--verify"]) == 0
    assert main(["check", *again]) == 2
    assert "made with num_rollouts = 6, now 18" in capsys.readouterr().err
    assert main(["check", *training(folder, "long", "scored", global_batch=4)]) == 0
    capsys.readouterr()


def training(folder: Path, output: str, *stores: str, **options: Any) -> list[str]:
    """Recipe and overrides of a training on `stores`, a list if there are several, or an empty name among them."""
    store: Any = str(folder / stores[0]) if len(stores) == 1 else [str(folder / name) for name in stores if name]
    changes = {"save_every": 1, "micro_batch_tokens": 128, "lr": 1e-2, "init": str(folder / "student"), "output": str(folder / output)}
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in (changes | {"store": store} | options).items()]
    overrides += [f"run_dir={json.dumps(str(folder / output))}", f"models.teacher={json.dumps(str(folder / 'teacher'))}"]
    return ["tiny", *overrides]


def train(folder: Path, output: str, *stores: str, **options: Any) -> str:
    command = [sys.executable, "-m", "megatron_opd", "train", *training(folder, output, *stores, **options), "--nproc", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout + run.stderr


def rows(folder: Path, output: str) -> list[dict[str, Any]]:
    kept = ("step", "loss", "grad_norm", "batch_tokens", "epoch")
    lines = (folder / output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]


def test_several_stores_are_trained_on_as_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"sampler": folder / "student", "teacher": folder / "teacher"}
    one = make_scored_store(folder / "a", **models, prompts=6, seed=1)
    two = make_scored_store(folder / "b", **models, prompts=5, seed=2)
    both = open_training_stores([str(folder / "a"), str(folder / "b")], "teacher")
    assert len(both) == len(one) + len(two) == 22
    for index in range(22):
        reader, own = (one, index) if index < len(one) else (two, index - len(one))
        assert bits(both.rollout(index)) == bits(reader.rollout(own))
        assert both.scores(index, "teacher").logp.tobytes() == reader.scores(own, "teacher").logp.tobytes()
    alone, scored = open_training_stores([str(folder / "a")], "teacher"), StoreReader(str(folder / "a"), teacher="teacher")
    assert (rollouts_id(alone), content_of(alone)) == (rollouts_id(scored), content_of(scored))
    identities = {rollouts_id(open_training_stores([str(folder / name) for name in names])) for names in ("a", "b", "ab", "ba")}
    assert len(identities) == 4
    train(folder, "of-a", "a", steps=2, global_batch=4)
    train(folder, "of-list", "a", "", steps=2, global_batch=4)
    assert rows(folder, "of-a") == rows(folder, "of-list")
    said = train(folder, "of-both", "a", "b", steps=3, global_batch=11)
    assert "22 rollouts" in said
    assert sum(row["batch_tokens"] for row in rows(folder, "of-both")[:2]) == int(both.lengths.sum())
    same = training(folder, "of-both", "a", "b", steps=3, global_batch=11)
    for command in (
        ["check", *same],
        ["check", *same, "--gpus", "1"],
        ["progress", *same, "--stage", "train"],
        ["convert", "trained", *same],
    ):
        assert main(command) == 0, command
    capsys.readouterr()
    assert main(["check", *training(folder, "of-both", "b", "a", steps=3, global_batch=11)]) == 2
    assert f"other rollouts than {folder / 'b'}, {folder / 'a'} has now" in capsys.readouterr().err


def test_stores_that_are_no_mixture_are_refused(folder: Path, tmp_path: Path) -> None:
    models = {"sampler": folder / "student", "teacher": folder / "teacher"}
    make_scored_store(tmp_path / "a", **models, prompts=2, seed=1)
    first = str(tmp_path / "a")

    def refused(match: str, **how: Any) -> None:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        make_scored_store(tmp_path / "b", **({"prompts": 2, "seed": 2} | models | how))
        with pytest.raises(StoreError, match=f"{first} and {tmp_path / 'b'} {match}"):
            open_training_stores([first, str(tmp_path / "b")], "teacher")

    refused("can't be trained on together: sampler is student.* in the first and teacher", sampler=folder / "teacher")
    refused("can't be trained on together: lineage.sft_teacher is teacher .* student", teacher=folder / "student")
    refused("can't be trained on together: top_k of teacher 'teacher' is 0 in the first and 4", top_k=4)
    refused("hold the same rollouts", seed=1)
    with pytest.raises(StoreError, match=f"{tmp_path / 'c'}: no store here"):
        open_training_stores([first, str(tmp_path / "c")], "teacher")
    scored = make_scored_store(tmp_path / "c", **models, prompts=2, seed=3)
    shutil.rmtree(tmp_path / "c/parts/000000/teacher")
    with pytest.raises(StoreError, match=f"{tmp_path / 'c'}: teacher 'teacher' has not scored 1 of {scored.num_parts} parts"):
        open_training_stores([first, str(tmp_path / "c")], "teacher").check_scored("teacher")
