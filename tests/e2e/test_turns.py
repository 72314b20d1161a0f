"""A Base student beside an Instruct teacher, as published models are: their files name different ends of a turn.

The whole way of a run; responses end where the teacher's do, nothing behind that is trained on, and the model that is delivered stops.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CHATML, ENDOFTEXT, IM_END, make_base, make_instruct, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import LINEAGE_FILE, read_lineage
from megatron_opd.records import Finish

THINKING = CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")
SETTINGS = {
    "generate.sampling.max_new_tokens": 48,
    "sft.steps": 30,
    "sft.lr": 1e-2,
    "sft.schedule.decay": "constant",
    "sft.weight_decay": 0.0,
    "rollout.sampling.max_new_tokens": 48,
    "train.steps": 2,
    "train.lr": 1e-5,
    "train.global_batch": 8,
    "eval.held_out.sampling.max_new_tokens": 48,
    "eval.held_out.num_prompts": 8,
}


class Run:
    """A run folder with models and prompts; stages by the command line."""

    def __init__(self, folder: Path):
        self.folder, self.store = folder, folder / "run" / "rollouts.opd.zarr"
        paths = {"run_dir": "run", "models.teacher": "teacher", "models.student": "student"}
        paths |= {f"{stage}.prompts": "prompts.jsonl" for stage in ("generate", "rollout", "eval.held_out")}
        self.settings = [f"{key}={str(folder / path)!r}" for key, path in paths.items()]
        self.settings += [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]

    def here(self, *command: str, code: int = 0) -> None:
        """A stage in this process."""
        assert main([*command, *self.settings]) == code

    def child(self, *command: str) -> str:
        """A stage that needs ranks."""
        run = subprocess.run(
            [sys.executable, "-m", "megatron_opd", *command[:2], *self.settings, *command[2:]],
            capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
        return run.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything up to the rollouts and their scores."""
    folder = tmp_path_factory.mktemp("turns")
    # The student has a template of its own, and it is not the teacher's: the published pairs of Base and Thinking models.
    make_base(folder / "student", template=CHATML)
    make_instruct(folder / "teacher", template=THINKING)
    write_chats(folder / "prompts.jsonl", 24)
    run = Run(folder)
    run.here("generate", "tiny")
    run.child("sft", "tiny")
    run.here("convert", "trained", "tiny", "--stage", "sft")
    run.here("rollout", "tiny")
    run.here("score", "tiny")
    return run


def test_answers_end_at_the_teachers_id(run: Run) -> None:
    manifest = StoreReader(str(run.folder / "run" / "sft.opd.zarr")).manifest
    assert manifest.turn_end == IM_END
    assert manifest.stop_ids == [IM_END, ENDOFTEXT]
    lineage = read_lineage(run.folder / "run" / "sft-hf")
    assert lineage is not None
    assert lineage.sft is not None
    assert lineage.sft.stop_ids[0] == IM_END
    assert lineage.sft.chat_templates == {"default": THINKING}
    assert lineage.sft.expected_stop_share(48) > 0.9


def test_the_converted_students_files_say_how_its_turns_end(run: Run) -> None:
    sft = run.folder / "run" / "sft-hf"
    assert json.loads((sft / "generation_config.json").read_text())["eos_token_id"] == [IM_END, ENDOFTEXT]
    assert json.loads((sft / "config.json").read_text())["eos_token_id"] == IM_END
    tokenizer = AutoTokenizer.from_pretrained(str(sft))
    assert tokenizer.eos_token_id == IM_END
    assert tokenizer.chat_template == THINKING
    # What it was made from is as it was.
    assert json.loads((run.folder / "student" / "config.json").read_text())["eos_token_id"] == ENDOFTEXT


def test_rollouts_end_there_and_nothing_behind_it_is_stored(run: Run) -> None:
    reader = StoreReader(str(run.store))
    assert reader.manifest.stop_ids == [IM_END, ENDOFTEXT]
    assert (reader.finishes == Finish.STOP).mean() > 0.8
    prefix = reader.manifest.prompt_suffix
    assert AutoTokenizer.from_pretrained(str(run.folder / "teacher")).decode(prefix) == "<|im_start|>assistant\n<think>\n"
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        response = rollout.tokens[rollout.prompt_len :]
        assert rollout.tokens[: rollout.prompt_len][-len(prefix) :].tolist() == prefix
        assert not np.isin(response[:-1], [IM_END, ENDOFTEXT]).any()
        assert (response[-1] in (IM_END, ENDOFTEXT)) == (rollout.finish is Finish.STOP)
    endings = sum((record.endings or {}).get(IM_END, 0) for record in reader.parts.values())
    assert endings > 0.8 * len(reader)


def test_the_delivered_model_stops_in_transformers_own_generate(run: Run) -> None:
    run.child("train", "tiny")
    run.here("convert", "trained", "tiny")
    run.here("eval", "tiny", "eval.held_out.grader='none'", "--of", "opd")
    result = json.loads((run.folder / "run" / "eval" / "held_out" / "opd.json").read_text())
    assert result["stopped_share"] > 0.8
    folder = str(run.folder / "run" / "opd-hf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abab 1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = model.generate(**prompt, do_sample=True, max_new_tokens=100, num_return_sequences=16)
    answers = answers[:, prompt["input_ids"].shape[1] :]
    assert (answers == IM_END).any(1).float().mean() > 0.9
    assert answers.shape[1] < 100  # every one of them has ended


def test_another_template_is_refused_or_recorded(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = tmp_path / "student"
    shutil.copytree(run.folder / "run" / "sft-hf", student)
    (student / "chat_template.jinja").write_text(CHATML)
    changes = [f"rollout.model={str(student)!r}", f"rollout.store={str(tmp_path / 'store.opd.zarr')!r}", f"train.init={str(student)!r}"]
    changes += [f"{stage}.store={str(tmp_path / 'store.opd.zarr')!r}" for stage in ("score", "train")]
    changes += [f"train.output={str(tmp_path / 'opd')!r}"]
    run.here("rollout", "tiny", *changes, code=2)
    message = capsys.readouterr().err
    assert "its chat template is not the one that wrote the prompts of the SFT answers" in message
    assert r"'<|im_start|>assistant\n<think>\n'" in message
    assert "rollout.allow_template_mismatch=true" in message
    assert not (tmp_path / "store.opd.zarr").exists()
    run.here("rollout", "tiny", *changes, "rollout.allow_template_mismatch=true")
    run.here("score", "tiny", *changes)
    capsys.readouterr()
    run.here("check", "tiny", *changes)
    assert "WARNING: prompt format mismatch allowed" in capsys.readouterr().out


def test_eos_fields_that_were_edited_change_nothing(run: Run, tmp_path: Path) -> None:
    """The same weights with a Base model's files: the lineage, and without it the chat template, still say where turns end."""
    for name, forget in (("edited", False), ("forgotten", True)):
        student, store = tmp_path / name, tmp_path / f"{name}.opd.zarr"
        shutil.copytree(run.folder / "run" / "sft-hf", student)
        for path in ("config.json", "generation_config.json"):
            fields = json.loads((student / path).read_text()) | {"eos_token_id": ENDOFTEXT}
            (student / path).write_text(json.dumps(fields))
        if forget:
            (student / LINEAGE_FILE).unlink()
        run.here("rollout", "tiny", f"rollout.model={str(student)!r}", f"rollout.store={str(store)!r}", "rollout.num_prompts=12")
        reader = StoreReader(str(store))
        assert reader.manifest.stop_ids[0] == IM_END
        assert (reader.finishes == Finish.STOP).mean() > 0.8


def test_tokens_behind_a_stop_id_are_refused_or_recorded(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The student's files name an id that the rollouts go on behind."""
    student = tmp_path / "student"
    shutil.copytree(run.folder / "run" / "sft-hf", student)
    rollout = StoreReader(str(run.store)).rollout(0)
    inside = int(rollout.tokens[rollout.prompt_len])
    assert rollout.response_len > 1
    settings = json.loads((student / "generation_config.json").read_text())
    (student / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [inside, *settings["eos_token_id"]]}))
    changes = [f"train.init={str(student)!r}", f"train.output={str(tmp_path / 'opd')!r}"]
    run.here("check", "tiny", *changes, code=2)
    message = capsys.readouterr().err
    assert f"responses go on behind a stop id of [{inside}]" in message
    assert "allow_stop_mismatch = true goes on all the same, and is recorded" in message
    run.here("check", "tiny", *changes, "train.allow_stop_mismatch=true")
    assert "WARNING: stop mismatch allowed: " in capsys.readouterr().out
