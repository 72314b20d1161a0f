"""Evaluations between the steps of a training: they change nothing of it, are made once each, and may fail. Tiny models, real ranks and servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fork_server import Ending, Job, shared_server
from serve.stub_server import StubServer
from stores import make_scored_store
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.convert.commands import to_hf
from megatron_opd.hf.lineage import hash_tensors
from megatron_opd.report.write import write_report

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("under_way")
    make_model(folder / "student", seed=5)
    make_model(folder / "teacher", seed=6)
    make_scored_store(folder / "store", sampler=folder / "student", teacher=folder / "teacher")
    write_prompts(folder / "prompts.jsonl", 5)
    return folder


def words(folder: Path, run: str, *more: str) -> list[str]:
    settings = {
        "run_dir": folder / run, "train.init": folder / "student", "train.store": folder / "store", "train.steps": STEPS,
        "train.save_every": 2, "train.global_batch": 8, "train.micro_batch_tokens": 128, "train.lr": 1e-2,
        "eval.small.prompts": folder / "prompts.jsonl", "eval.small.grader": "exact", "eval.small.sampling.max_new_tokens": 5,
        "eval.held_out.prompts": folder / "prompts.jsonl", "eval.held_out.sampling.max_new_tokens": 3,
    }  # fmt: skip
    return ["train", "tiny", *(f"{key}={value}" for key, value in settings.items()), *more]


BOTH = ("train.eval_every=2", "train.evals=['small','held_out']", "train.eval_prompts=3")
SMALL = ("train.evals=['small']", "train.eval_prompts=3")


def train(folder: Path, run: str, *more: str, ranks: int = 1, **options: Any) -> Ending:
    environment: list[dict[str, str]] = [{}]
    if ranks > 1:
        world = {"WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo"}
        environment = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    jobs = [Job(words(folder, run, *more), str(folder / f"{run}.log"), environment=variables, **options) for variables in environment]
    return shared_server().run(*jobs)[0]


def good(folder: Path, run: str, *more: str, **options: Any) -> None:
    assert train(folder, run, *more, **options).code == 0, log(folder, run)


def log(folder: Path, run: str) -> str:
    return (folder / f"{run}.log").read_text()[-6000:]


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "opd/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, run: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("step", "loss", "grad_norm", "learning_rate", "reverse_kl")) for row in rows(folder, run)]


def figures(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each row what its evaluations found, without their time."""
    return [{key: value for key, value in row.items() if key.startswith("eval/") and not key.endswith("/seconds")} for row in found]


def responses(path: Path) -> list[tuple[int, str]]:
    return [(row["prompt"], row["response"]) for row in map(json.loads, path.read_text().splitlines())]


def weights(folder: Path, run: str) -> dict[str, str]:
    return hash_tensors(to_hf(str(folder / run / "opd"), str(folder / f"{run}-hf")))


def test_ranks_train_to_the_same_bits_and_the_weights_of_the_step_are_evaluated(folder: Path) -> None:
    good(folder, "plain", "train.parallel.tp=2", ranks=2)
    good(folder, "two", "train.parallel.tp=2", *BOTH, ranks=2)
    assert losses(folder, "two") == losses(folder, "plain")
    assert weights(folder, "two") == weights(folder, "plain")

    found = rows(folder, "two")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert not any(key.startswith("eval/") for row in found[::2] for key in row)
    for row in found[1::2]:
        assert row["eval/small/accuracy"] == row["eval/small/accuracy_low"] == 0
        assert row["eval/small/accuracy_high"] == pytest.approx(0.5615, abs=1e-4)  # Wilson's of 0 of 3
        assert 0 <= row["eval/small/stopped_share"] <= 1
        assert 1 <= row["eval/small/response_length"] <= 5
        assert "eval/held_out/response_length" in row
        assert "eval/held_out/accuracy" not in row  # without a grader there is none
    place = folder / "two/opd/eval"
    assert len(list(place.glob("small/step-*.json"))) == len(list(place.glob("small/step-*.prompts.jsonl"))) == 2
    assert not [path for path in (folder / "two").rglob("*") if path.suffix == ".tmp" or path.name.endswith(".opd.zarr")]
    cost = [json.loads(line) for line in (folder / "two/stages.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in cost} == {"train"}
    assert (cost[-1]["evaluations"], cost[-1]["failed_evaluations"]) == (4, 0)

    # As the command of its own finds it, of the checkpoint of that step.
    assert (
        main(
            [
                "eval",
                *words(folder, "two", "eval.small.teacher=none", "eval.small.num_prompts=3")[1:],
                "small",
                "--of",
                f"end={folder}/two-hf",
            ]
        )
        == 0
    )
    assert responses(place / "small/step-000004.prompts.jsonl") == responses(folder / "two/eval/small/end.prompts.jsonl")
    assert responses(place / "small/step-000002.prompts.jsonl") != responses(place / "small/step-000004.prompts.jsonl")


def test_a_run_killed_in_an_evaluation_has_each_once(folder: Path) -> None:
    every = ("train.eval_every=3", *SMALL)
    below = "opd/checkpoints/.step_000003"  # what step 3, which is not saved, writes
    calm = train(folder, "calm", *every, below=f"calm/{below}")
    assert calm.code == 0, log(folder, "calm")
    assert calm.operations > 20
    for kill_at in (calm.operations // 2, calm.operations - 1):
        assert train(folder, "killed", *every, below=f"killed/{below}", kill_at=kill_at).killed
        assert rows(folder, "killed")[-1]["step"] == 2
    good(folder, "killed", *every)
    assert losses(folder, "killed") == losses(folder, "calm")
    assert figures(rows(folder, "killed")) == figures(rows(folder, "calm"))
    assert not list((folder / "killed/opd").rglob("*.tmp"))


def test_servers_take_the_weights_of_the_step_and_may_be_away(folder: Path) -> None:
    """Stand-ins, whose numbers depend on the bytes of the weights that they serve."""

    def model_of(server: StubServer) -> str:
        return httpx.get(f"{server.url}/model_info", trust_env=False).json()["model_path"]

    with StubServer(folder / "student") as server:
        fields = ["train.eval_every=1", *SMALL, f"engine.urls=['{server.url}']", "engine.dtype=float32", "engine.patience=0.1"]
        good(folder, "served", *fields, "train.steps=2")
        assert Path(model_of(server)) == folder / "student"
        assert ["eval/small/response_length" in row for row in rows(folder, "served")] == [True, True]
        served = [responses(folder / f"served/opd/eval/small/step-00000{step}.prompts.jsonl") for step in (1, 2)]
        assert served[0] != served[1]
        # What a run that was killed in an evaluation leaves there.
        left = folder / "served/opd/checkpoints/.step_000002.left.tmp/step-000002"
        shutil.copytree(folder / "teacher", left)
        answer = httpx.post(f"{server.url}/update_weights_from_disk", json={"model_path": str(left)}, trust_env=False)
        assert answer.json()["success"] is True
        good(folder, "served", *fields, "train.steps=3")
        assert Path(model_of(server)) == folder / "student"
        assert "eval/small/accuracy" in rows(folder, "served")[2]
    good(folder, "served", *fields)
    last = rows(folder, "served")[3]
    assert {key for key in last if key.startswith("eval/")} == {"eval/small/error"}
    assert "is the server running?" in last["eval/small/error"]
    assert "WARNING: train: after step 4 small could not be evaluated: EngineError" in log(folder, "served")
    assert [row["step"] for row in rows(folder, "served")] == [1, 2, 3, 4]
    page = write_report([str(folder / "served")]).with_suffix(".md").read_text()
    assert "| served | opd | small | 3, 1 failed | 0.0% (0.0% to 56.2%) after step 1 | 0.0% (0.0% to 56.2%) after step 3 |" in page
    assert (folder / "served/report/during-opd.png").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.eval_every=1"], "train.eval_every = 1: name what is to be evaluated, train.evals=[...] (of held_out, small)"),
        (["train.eval_every=1", "train.evals=['aime']"], "train.evals: the recipe has no evaluation 'aime'; it has held_out, small"),
        (["train.evals=['small']"], "give eval_every, or leave them out"),
        ([*BOTH, "engine.launch.servers=1"], "servers of engine.launch live for one stage"),
        ([*BOTH, "engine.device=cuda"], "would share the first rank's GPU with training"),
        ([*BOTH, "eval.small.grader=code"], "needs allow_code_execution = true"),
        ([*BOTH, "eval.small.grader=choice"], "3 of 3 answers can't be used by the grader 'choice'"),
        ([*BOTH, "eval.small.prompts=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_anything_is_loaded(
    more: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(words(folder, "refused", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "refused/opd").exists()
