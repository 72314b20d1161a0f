"""Responses that another program made are imported, scored and trained on, by the real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import IM_END, make_base, make_instruct, make_model, write_chats, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import read_lineage
from megatron_opd.records import Finish


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a store of sampled rollouts, and a dump of it as another program would write it."""
    folder = tmp_path_factory.mktemp("import")
    make_model(folder / "student", seed=5)
    make_model(folder / "teacher", seed=6)
    write_prompts(folder / "prompts.jsonl", 6)
    changes = {"store": "sampled", "model": "student", "sft_teacher": "teacher", "prompts": "prompts.jsonl"}
    overrides = [f"rollout.{key}={json.dumps(str(folder / value))}" for key, value in changes.items()]
    overrides += [f"run_dir={folder / 'run'}", f"models.teacher={folder / 'teacher'}", "rollout.prompts_per_part=4"]
    assert main(["rollout", "tiny", *overrides, "rollout.sampling.max_new_tokens=16", "rollout.sampling.samples_per_prompt=1"]) == 0
    reader = StoreReader(str(folder / "sampled"))
    rows = []
    for rollout in map(reader.rollout, range(len(reader))):
        start = rollout.prompt_len
        rows.append(
            {
                "prompt_token_ids": rollout.tokens[:start].tolist(),
                "token_ids": rollout.tokens[start:].tolist(),
                "logprobs": [float(value) for value in rollout.student_logp[start:]],
            }
        )
    write(folder / "dump.jsonl", rows)
    write(folder / "bare.jsonl", [{key: value for key, value in row.items() if key != "logprobs"} for row in rows])
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bring(folder: Path, file: str, store: str, *options: str, role: str = "student") -> int:
    declared = ["--sft-teacher", str(folder / "teacher")] if role == "student" else []
    section = "rollout" if role == "student" else "generate"
    sizes = [f"{section}.prompts_per_part=4", f"{section}.sampling.max_new_tokens=16"]
    model = [] if "--model" in options else ["--model", str(folder / "student")]
    return main(["import", str(folder / file), str(folder / store), *model, "--role", role, *declared, *sizes, *options])


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, file: str, store: str, *options: str, **how: Any) -> str:
    capsys.readouterr()
    assert bring(folder, file, store, *options, **how) == 2
    return capsys.readouterr().err


def test_rollouts_with_their_log_probs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bring(folder, "dump.jsonl", "declared") == 0
    sampled, reader = StoreReader(str(folder / "sampled")), StoreReader(str(folder / "declared"))
    assert len(reader) == len(sampled) == 6
    for left, right in zip(map(sampled.rollout, range(6)), map(reader.rollout, range(6)), strict=True):
        assert left.tokens.tobytes() == right.tokens.tobytes()
        assert left.student_logp.tobytes() == right.student_logp.tobytes()
        assert (left.prompt_index, left.prompt_len, left.finish) == (right.prompt_index, right.prompt_len, right.finish)
    assert reader.manifest.lineage.sft_teacher_declared
    assert "that student (" in reader.manifest.lineage.overrides[0]
    assert main(["inspect", str(folder / "declared"), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "imported           from dump.jsonl" in printed
    assert "log-probabilities were declared" in printed
    assert "OVERRIDE           rollouts were imported" in printed


def test_missing_log_probs_are_computed_then_scored_and_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bring(folder, "bare.jsonl", "computed") == 0
    sampled, reader = StoreReader(str(folder / "sampled")), StoreReader(str(folder / "computed"))
    for left, right in zip(map(sampled.rollout, range(6)), map(reader.rollout, range(6)), strict=True):
        assert left.tokens.tobytes() == right.tokens.tobytes()
        np.testing.assert_allclose(left.student_logp, right.student_logp, atol=1e-4)
    recipe = ["tiny", f"run_dir={folder / 'run'}", f"models.teacher={folder / 'teacher'}", f"score.store={folder / 'computed'}"]
    assert main(["score", *recipe]) == 0
    changes = {"store": str(folder / "computed"), "init": str(folder / "student"), "output": str(folder / "opd")}
    changes |= {"global_batch": 3, "steps": 2, "micro_batch_tokens": 128}
    recipe += [f"train.{key}={json.dumps(value)}" for key, value in changes.items()]
    assert "6 rollouts, 2 steps" in run("train", *recipe)
    assert main(["convert", "trained", *recipe]) == 0
    lineage = read_lineage(folder / "run/opd-hf")
    assert lineage is not None
    assert any("rollouts were imported" in text for text in lineage.overrides)
    capsys.readouterr()


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "megatron_opd", *arguments, "--nproc", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_an_import_goes_on_and_grows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(folder / "dump.jsonl")
    write(folder / "five.jsonl", rows[:5])
    assert bring(folder, "five.jsonl", "grown", "--shard", "1/2") == 0
    assert bring(folder, "five.jsonl", "grown") == 0
    sums = {part: record.crc32c for part, record in StoreReader(str(folder / "grown")).parts.items()}
    shutil.rmtree(folder / "grown/parts/000001")
    assert bring(folder, "five.jsonl", "grown") == 0
    assert {part: record.crc32c for part, record in StoreReader(str(folder / "grown")).parts.items()} == sums
    assert "--extend would make what is new" in refusal(capsys, folder, "dump.jsonl", "grown")
    assert bring(folder, "dump.jsonl", "grown", "--extend") == 0
    assert bring(folder, "five.jsonl", "grown") == 0  # of the old file, which does no harm
    reader = StoreReader(str(folder / "grown"))
    assert (len(reader), len(reader.parts)) == (6, 3)
    assert reader.verify() == []
    changed = [*rows[:4], rows[4] | {"token_ids": rows[4]["token_ids"][:-1], "logprobs": rows[4]["logprobs"][:-1]}, rows[5]]
    write(folder / "changed.jsonl", changed)
    assert "was imported from 'five.jsonl' with other responses" in refusal(capsys, folder, "changed.jsonl", "grown")
    assert "that were 'declared', now they would be 'computed'" in refusal(capsys, folder, "dump.jsonl", "grown", "--compute-logprobs")


def test_what_is_wrong_is_refused_and_leaves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = rows_of(folder / "dump.jsonl")
    bare = {key: value for key, value in second.items() if key != "logprobs"}
    for row, named in (
        (bare, "bad.jsonl:2: no log-probabilities, but other rows have some"),
        ({**second, "prompt_token_ids": [300]}, "bad.jsonl:2: the prompt has the token id 300, but"),
        ({**bare, "token_ids": [5, 1, 6], "logprobs": [-1.0] * 3}, "bad.jsonl:2: 'token_ids': 1 tokens stand behind the stop id 1"),
        ({**bare, "token_ids": [5, 1], "logprobs": [-1.0] * 2, "finish_reason": "length"}, "bad.jsonl:2: 'token_ids': it ended by length at token 1"),
        ({**bare, "token_ids": [5, 6], "logprobs": [-1.0] * 2, "finish_reason": "stop"}, "bad.jsonl:2: 'token_ids': it ended by stop at token 6"),
        ({**bare, "token_ids": [5] * 17, "logprobs": [-1.0] * 17}, "over sampling.max_new_tokens = 16"),
    ):  # fmt: skip
        write(folder / "bad.jsonl", [first, row])
        assert named in refusal(capsys, folder, "bad.jsonl", "bad", "rollout.encoding.chat_template=never")
    write(folder / "long.jsonl", [{"prompt": "a" * 130, "response": "b"}])
    assert "long.jsonl:1: prompt and response have 132 tokens" in refusal(capsys, folder, "long.jsonl", "bad")
    assert "rollout.model is what the command line says" in refusal(capsys, folder, "dump.jsonl", "bad", "rollout.model=x")
    assert "is a prompt of its own" in refusal(capsys, folder, "dump.jsonl", "bad", "rollout.sampling.samples_per_prompt=2")
    assert not (folder / "bad").exists()
    texts = [{"prompt": row["prompt"], "response": "b"} for row in rows_of(folder / "prompts.jsonl")]
    write(folder / "texts.jsonl", texts)
    assert bring(folder, "texts.jsonl", "of-text") == 0
    assert "WARNING: 6 responses are text" in capsys.readouterr().out
    assert "made with other settings: lineage is" in refusal(capsys, folder, "texts.jsonl", "sampled")  # which was sampled


def test_text_answers_become_turns_and_are_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SFT answers as messages: the prompts are those that `generate` would write, each answer ends as the template ends turns."""
    base, teacher = make_base(tmp_path / "base"), make_instruct(tmp_path / "teacher")
    chats = rows_of(write_chats(tmp_path / "chats.jsonl", 8))
    texts = [f"né {number}" for number in range(8)]
    rows = [{"messages": [*row["prompt"], {"role": "assistant", "content": text}]} for row, text in zip(chats, texts, strict=True)]
    rows[7]["finish_reason"] = "length"
    write(tmp_path / "answers.jsonl", rows)
    assert bring(tmp_path, "answers.jsonl", "sft", "--model", str(teacher), role="teacher") == 0
    reader = StoreReader(str(tmp_path / "sft"))
    recipe = ["tiny", f"run_dir={tmp_path / 'run'}", f"models.teacher={teacher}", f"generate.prompts={tmp_path / 'chats.jsonl'}"]
    generate = ["generate.num_prompts=8", "generate.sampling.max_new_tokens=16", "generate.sampling.samples_per_prompt=1"]
    assert main(["generate", *recipe, *generate, f"generate.store={tmp_path / 'sampled'}"]) == 0
    sampled = StoreReader(str(tmp_path / "sampled"))
    assert sampled.manifest.prompts.sha256 == reader.manifest.prompts.sha256
    for name in ("stop_ids", "turn_end", "chat_templates", "prompt_suffix", "prompt_probe"):
        assert getattr(sampled.manifest, name) == getattr(reader.manifest, name)
    for number, text in enumerate(texts):
        rollout = reader.rollout(number)
        asked = sampled.rollout(int(np.flatnonzero(sampled.prompt_indices == number)[0]))
        assert rollout.tokens[: rollout.prompt_len].tolist() == asked.tokens[: asked.prompt_len].tolist()
        ending = [IM_END] if number < 7 else []
        assert rollout.finish == (Finish.STOP if ending else Finish.LENGTH)
        assert len(rollout.tokens) == rollout.prompt_len + len(text.encode()) + len(ending)
        assert rollout.tokens[-1] == IM_END if ending else rollout.tokens[-1] != IM_END
    special = "a<|im_start|>user\nb"
    write(tmp_path / "special.jsonl", [rows[0], {"messages": [*chats[1]["prompt"], {"role": "assistant", "content": special}]}])
    options = ("--model", str(teacher), "generate.prompts_per_part=1")
    refused = refusal(capsys, tmp_path, "special.jsonl", "special", *options, role="teacher")
    assert "special.jsonl:2: 'messages' is a text that holds '<|im_start|>'" in refused
    assert bring(tmp_path, "special.jsonl", "special", *options, "--shard", "0/2", role="teacher") == 0, "the row is another worker's"
    ended = {"messages": [*chats[1]["prompt"], {"role": "assistant", "content": "b<|im_end|>"}]}
    write(tmp_path / "ended.jsonl", [rows[0], ended])
    assert bring(tmp_path, "ended.jsonl", "ended", *options, role="teacher") == 0
    rollout = StoreReader(str(tmp_path / "ended")).rollout(1)
    assert (len(rollout.tokens) - rollout.prompt_len, int(rollout.tokens[-1])) == (2, IM_END)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "sft")]) == 0
    printed = capsys.readouterr().out
    assert "none; SFT needs none" in printed
    assert "megatron-opd score" not in printed
    both = json.dumps([str(tmp_path / "sft"), str(tmp_path / "sampled")])
    changes = [
        f"sft.store={both}",
        f"sft.init={base}",
        f"sft.output={tmp_path / 'out'}",
        "sft.global_batch=8",
        "sft.steps=1",
        "sft.micro_batch_tokens=256",
    ]
    assert "16 rollouts" in run("sft", *recipe, *changes)
    assert main(["convert", "trained", *recipe, *changes, "--stage", "sft"]) == 0
    lineage = read_lineage(tmp_path / "run/sft-hf")
    assert lineage is not None
    assert lineage.sft_teacher_declared
    capsys.readouterr()


def test_prompts_of_ids_say_how_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_instruct(tmp_path / "teacher")
    write_chats(tmp_path / "chats.jsonl", 3)
    recipe = [
        "tiny",
        f"run_dir={tmp_path / 'run'}",
        f"models.teacher={teacher}",
        f"generate.prompts={tmp_path / 'chats.jsonl'}",
        "generate.num_prompts=3",
    ]
    assert main(["generate", *recipe, f"generate.store={tmp_path / 'sampled'}", "generate.sampling.max_new_tokens=16"]) == 0
    sampled = StoreReader(str(tmp_path / "sampled"))
    rows = []
    for rollout in map(sampled.rollout, range(3)):
        rows.append({"prompt_ids": rollout.tokens[: rollout.prompt_len].tolist(), "completion_ids": [65, IM_END]})
    write(tmp_path / "ids.jsonl", rows)
    assert bring(tmp_path, "ids.jsonl", "imported", "--model", str(teacher), role="teacher") == 0
    manifest = StoreReader(str(tmp_path / "imported")).manifest
    assert (manifest.chat_templates, manifest.prompt_suffix) == (sampled.manifest.chat_templates, sampled.manifest.prompt_suffix)
    plain = [{"prompt_ids": [65, 66], "completion_ids": [65, IM_END]}]
    write(tmp_path / "plain.jsonl", plain * 2)
    assert bring(tmp_path, "plain.jsonl", "plain", "--model", str(teacher), role="teacher") == 0
    assert StoreReader(str(tmp_path / "plain")).manifest.chat_templates == {}
    write(tmp_path / "mixed.jsonl", [*rows, *plain])
    mixed = refusal(capsys, tmp_path, "mixed.jsonl", "mixed", "--model", str(teacher), role="teacher")
    assert "mixed.jsonl:4: the prompt's ids do not end with" in mixed
    always = "generate.encoding.chat_template=always"
    assert "plain.jsonl:1" in refusal(capsys, tmp_path, "plain.jsonl", "mixed", "--model", str(teacher), always, role="teacher")
