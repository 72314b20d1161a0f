"""`run` makes a whole recipe with one command, `run --plan` says what is done, stale and next, and a kill anywhere costs nothing but time."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import Job, shared_server
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.pipeline.plan import NOT_FINISHED
from megatron_opd.safety.locks import Lock

STAGES = [
    "inputs",
    "generate",
    "sft",
    "sft-hf",
    "rollout",
    "score",
    "engines",
    "train",
    "opd-hf",
    "eval-held_out-teacher",
    "eval-held_out-sft",
    "eval-held_out-opd",
    "report",
]


def make_inputs(folder: Path) -> None:
    for seed, role in enumerate(("teacher", "student")):
        make_model(folder / role, seed=seed)
    write_prompts(folder / "prompts.jsonl", 24)


def words(inputs: Path, run_dir: Path, *overrides: str) -> list[str]:
    """A recipe with its overrides."""
    fields: dict[str, Any] = {
        "run_dir": run_dir,
        "models.teacher": inputs / "teacher",
        "models.student": inputs / "student",
        **{f"{stage}.prompts": inputs / "prompts.jsonl" for stage in ("generate", "rollout", "eval.held_out")},
        "eval.held_out.num_prompts": 8,
        "sft.steps": 4,
        "train.steps": 4,
        **{f"{stage}.save_every": 2 for stage in ("sft", "train")},
        **{f"{stage}.log_every": 100 for stage in ("sft", "train")},
    }
    return ["tiny", *(f"{key}={value}" for key, value in fields.items()), *overrides]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """A run that came to its end. Tests that change it put it back."""
    assert main(["run", *words(inputs, inputs / "run")]) == 0
    return inputs / "run"


def results(run_dir: Path) -> dict[str, Any]:
    """Everything that a run's stages came to, without times."""
    found: dict[str, Any] = {}
    for name in ("sft", "rollouts", "eval/held_out/teacher", "eval/held_out/sft", "eval/held_out/opd"):
        reader = StoreReader(str(run_dir / f"{name}.opd.zarr"))
        reader.check_complete()
        found[name] = [record.crc32c for record in reader.parts.values()]
        found[f"{name} scores"] = [record and record.crc32c for part in reader.parts for record in [reader.score_manifest(part, "teacher")]]
    for name in ("sft", "opd"):
        found[f"{name} weights"] = fingerprint_model(run_dir / f"{name}-hf").weights_sha256
        rows = [json.loads(line) for line in (run_dir / name / "metrics.jsonl").read_text().splitlines()]
        found[f"{name} losses"] = [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
    for name in ("teacher", "sft", "opd"):
        record = json.loads((run_dir / "eval" / "held_out" / f"{name}.json").read_text())
        found[f"eval {name}"] = [record.get(key) for key in ("reverse_kl", "against", "response_tokens", "stopped_share")]
    return found


def plan(capsys: pytest.CaptureFixture[str], *recipe: str) -> tuple[int, dict[str, str], str]:
    """Exit code, state by stage, and all that was printed."""
    capsys.readouterr()
    code = main(["run", *recipe, "--plan"])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "next:"))]
    return code, {line.split()[0]: line[23:35].strip() for line in lines}, text


def states(*stale: str, inputs: str = "done") -> dict[str, str]:
    return {stage: "STALE" if stage in stale else "done" for stage in STAGES} | {"inputs": inputs}


def test_one_command_makes_everything(finished: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = words(inputs, finished)
    assert plan(capsys, *recipe)[:2] == (0, states())
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and "report" not in path.parts}
    assert main(["run", *recipe]) == 0
    text = capsys.readouterr().out
    assert "$ megatron-opd" not in text, "nothing was left to do"
    assert text.count("eval.held_out teacher scores") == 1, "the closing table"
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path for path in before if before[path] != after[path] and path.name not in (".lock", "recipe.toml")] == []


def test_new_evaluations_of_a_finished_run(finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of one model by one command; the rest stays."""
    shutil.copytree(finished, tmp_path / "run")
    more = [f"eval.{name}.{field}" for name in "ab" for field in (f"prompts={inputs / 'prompts.jsonl'}", "num_prompts=2", "teacher=none")]
    more += [f"eval.{name}.sampling.max_new_tokens=4" for name in "ab"]
    recipe = words(inputs, tmp_path / "run", *more, "eval.a.models=['base','sft']", "eval.b.models=['sft']")
    _, found, _ = plan(capsys, *recipe)
    assert [stage for stage, state in found.items() if state == "not started"] == ["eval-a-base", "eval-a-sft", "eval-b-sft"]
    assert main(["run", *recipe]) == 0
    text = capsys.readouterr().out
    commands = [line.partition(f" {tmp_path / 'run'} ")[2] for line in text.splitlines() if line.startswith("$ megatron-opd eval")]
    assert commands == ["a --of base", "a b --of sft"]
    closing = text[text.rindex("\nmodel ") :].split("\n\n")[0].strip()
    assert [line.split()[0] for line in closing.splitlines()] == ["model", "-------", "teacher", "base", "sft", "opd"]


def test_a_fresh_recipe_has_everything_left(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, text = plan(capsys, *words(inputs, tmp_path / "run"))
    assert code == NOT_FINISHED
    assert list(found) == STAGES
    assert set(found.values()) == {"not started"}
    assert not (tmp_path / "run").exists()
    assert text.splitlines()[-1].startswith("next: megatron-opd run tiny")


def test_the_plan_after_changes_of_the_recipe(finished: Path, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after_train = ("train", "opd-hf", "eval-held_out-opd")
    after_rollout = ("rollout", "score", "engines", *after_train)
    for changed, stale, reason in (
        (["train.lr=2e-3"], after_train, "differs from the recipe: lr 0.001 there, 0.002 here"),
        (["train.loss.advantage_clip=3"], after_train, "loss.advantage_clip not set there, 3.0 here"),
        (["train.steps=3"], after_train, "differs from the recipe: steps 4 there, 3 here"),
        (["rollout.sampling.temperature=0.8"], after_rollout, "differs from the recipe: temperature 1.0 there, 0.8 here"),
        (["score.top_k=2"], ("score", *after_train), "differs from the recipe: top_k 0 there, 2 here"),
        (["score.model=STUDENT"], ("score", *after_train), "STUDENT is another model since ("),
        (["sft.schedule.warmup_steps=1"], ("sft", "sft-hf", *after_rollout, "eval-held_out-sft"), "schedule.warmup_steps 0 there, 1 here"),
    ):
        changed, reason = (
            [text.replace("STUDENT", str(inputs / "student")) for text in changed],
            reason.replace("STUDENT", str(inputs / "student")),
        )
        code, found, text = plan(capsys, *words(inputs, finished, *changed))
        assert code == NOT_FINISHED
        assert found == states(*stale, inputs="outdated"), changed
        assert reason in text
        assert f"--from {next(stage for stage in STAGES if stage in stale)} " in text.splitlines()[-1]
    for changed in (
        "train.save_every=1",
        "train.log_every=1",
        "train.parallel.tp=2",
        "train.micro_batch_tokens=256",
        "engine.batch_tokens=99",
    ):
        assert plan(capsys, *words(inputs, finished, changed))[0] == 0, changed
    assert plan(capsys, *words(inputs, finished, "train.steps=6"))[1]["train"] == "partial"
    _, found, text = plan(capsys, *words(inputs, finished, "eval.held_out.grader=exact"))
    assert {found[f"eval-held_out-{model}"] for model in ("teacher", "sft", "opd")} == {"outdated"}, "the samples stay"
    assert "made again from the same samples: grader none there, exact here" in text
    assert plan(capsys, *words(inputs, finished, "rounds.count=2"))[1]["train@1"] == "STALE", "the training was one without rounds"
    assert set(plan(capsys, *words(inputs, finished, "rollout=null", "eval=null"))[1]) == {"inputs", "generate", "sft", "report"}
    code, _, text = plan(capsys, *words(inputs, finished, "engine.launch.environment.MY_KEY=s3cret", "train.lr=2e-3"))
    assert "s3cret" not in text
    assert "MY_KEY=(not kept)" in text


def test_the_plan_after_changes_of_the_inputs(finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = words(inputs, finished)
    kept = tmp_path / "teacher"
    shutil.copytree(inputs / "teacher", kept)
    shutil.rmtree(inputs / "teacher")
    make_model(inputs / "teacher", seed=7)
    code, found, text = plan(capsys, *recipe)
    assert (code, found) == (NOT_FINISHED, states(*STAGES[1:-1], inputs="outdated"))
    assert "the teacher was replaced since (" in text
    assert main(["run", *recipe]) == 2, "nothing is thrown away unasked"
    assert "generate is STALE: the teacher was replaced since (" in capsys.readouterr().err
    shutil.rmtree(inputs / "teacher")
    shutil.copytree(kept, inputs / "teacher")

    prompts = inputs / "prompts.jsonl"
    before = prompts.read_text()
    prompts.write_text(before + '{"prompt": "one more"}\n')
    code, found, text = plan(capsys, *recipe)
    assert (code, found["generate"], found["rollout"], found["eval-held_out-opd"]) == (NOT_FINISHED, "STALE", "STALE", "STALE")
    assert "prompts 24 (" in text
    assert found["eval-held_out-teacher"] == "done", "its first eight are the same"
    prompts.write_text(before)
    assert plan(capsys, *recipe)[:2] == (0, states())

    tokenizer = inputs / "teacher/tokenizer.json"
    before = tokenizer.read_text()
    ids = json.loads(before)
    vocabulary = ids["model"]["vocab"]
    one, other = sorted(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    tokenizer.write_text(json.dumps(ids))
    _, found, text = plan(capsys, *recipe)
    assert found["generate"] == "STALE"
    assert "the table of tokens of" in text
    tokenizer.write_text(before)
    assert plan(capsys, *recipe)[:2] == (0, states())


def test_what_is_stale_is_made_again_and_nothing_else(
    finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    changed = words(inputs, run, "sft.lr=2e-3")
    assert main(["run", *changed]) == 2
    assert "sft is STALE: differs from the recipe: lr 0.001 there, 0.002 here" in capsys.readouterr().err
    assert main(["run", *changed, "--from", "sft", "--until", "sft"]) == 0
    assert (run / "set_aside/001/sft/checkpoints").is_dir()
    code, found, _ = plan(capsys, *changed)
    assert code == NOT_FINISHED
    assert [found[stage] for stage in ("generate", "sft", "sft-hf", "rollout")] == ["done", "done", "not started", "not started"]
    assert main(["run", *changed]) == 0
    assert plan(capsys, *changed)[0] == 0
    assert main(["run", *words(inputs, tmp_path / "fresh", "sft.lr=2e-3")]) == 0
    assert results(run) == results(tmp_path / "fresh")
    assert results(run) != results(finished)


def test_a_student_that_was_trained_again(finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, with the stages' own commands."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = words(inputs, run, "sft.seed=1")
    shutil.rmtree(run / "sft")
    assert main(["sft", *recipe]) == 0
    _, found, text = plan(capsys, *recipe)
    assert [found[stage] for stage in ("sft", "sft-hf", "rollout")] == ["done", "STALE", "STALE"]
    assert "made of step 4 (" in text
    assert "; the checkpoint is of step 4 now (" in text
    shutil.rmtree(run / "sft-hf")
    assert main(["convert", "trained", *recipe, "--stage", "sft"]) == 0
    _, found, text = plan(capsys, *recipe)
    assert [found[stage] for stage in ("sft-hf", "rollout", "eval-held_out-sft")] == ["done", "STALE", "STALE"]
    assert text.count("the student was fine-tuned again since (") >= 2


def test_earlier_stages_are_taken_as_they_are(finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = words(inputs, run, "rollout.sampling.temperature=0.8", "train.lr=2e-3")
    lock = Lock(run / "opd")
    lock.acquire()
    code = subprocess.run(
        [sys.executable, "-m", "megatron_opd", "run", *recipe, "--from", "train"], capture_output=True, text=True, timeout=120
    )
    lock.release()
    assert (code.returncode, (run / "set_aside").exists()) == (2, False), "nobody moves a training that runs"
    assert main(["run", *recipe, "--from", "train"]) == 0
    assert "(taken as it is, as --from comes after it)" in capsys.readouterr().out
    assert main(["run", *recipe, "--from", "train"]) == 0
    assert len(list((run / "set_aside").iterdir())) == 1, "what was made is not made again"
    outside = words(inputs, run, f"generate.store={tmp_path / 'shared.opd.zarr'}", "generate.sampling.temperature=0.5")
    shutil.copytree(run / "sft.opd.zarr", tmp_path / "shared.opd.zarr")
    assert main(["run", *outside, "--from", "generate"]) == 2
    assert "others may use it" in capsys.readouterr().err


def test_parts_of_a_run(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = words(inputs, tmp_path / "run")
    assert main(["run", *recipe, "--until", "nothing"]) == 2
    assert "no stage 'nothing' in this recipe; there are inputs, generate" in capsys.readouterr().err
    assert main(["run", *recipe, "--from", "train", "--until", "sft"]) == 2
    assert main(["run", *recipe, "--until", "generate"]) == 0
    _, found, text = plan(capsys, *recipe)
    assert [found[stage] for stage in ("inputs", "generate", "sft")] == ["done", "done", "not started"]
    assert "(sft alone: megatron-opd sft tiny " in text
    lock = Lock(tmp_path / "run")
    lock.acquire()
    code = subprocess.run([sys.executable, "-m", "megatron_opd", "run", *recipe], capture_output=True, text=True, timeout=120)
    lock.release()
    assert code.returncode == 2
    assert "another run writes there" in code.stderr


def test_what_was_read_and_removed_is_not_made_again(
    finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("sft.opd.zarr", "rollouts.opd.zarr", "sft", "opd"):
        shutil.rmtree(run / name)
    code, found, _ = plan(capsys, *words(inputs, run))
    assert (code, found["generate"], found["rollout"], found["train"]) == (0, *["not needed"] * 3)
    _, found, _ = plan(capsys, *words(inputs, run, f"models.teacher={inputs / 'student'}"))
    assert found["eval-held_out-opd"] == "STALE", "its scores are there"
    shutil.copytree(finished / "sft", run / "sft")
    _, found, _ = plan(capsys, *words(inputs, run, "sft.lr=2e-3"))
    assert [found[stage] for stage in ("sft", "sft-hf", "rollout", "opd-hf")] == ["STALE", "STALE", "not started", "STALE"]


ROUNDS = ("rounds.count=2", "rounds.steps=2")
IN_ROUNDS = [
    "rollout@1", "score@1", "engines", "train@1", "opd-hf@1", "rollout@2", "score@2", "train@2", "opd-hf@2",
]  # fmt: skip


def in_rounds(run_dir: Path) -> dict[str, Any]:
    stores = [StoreReader(str(run_dir / f"rounds/00{number}/rollouts.opd.zarr")) for number in (1, 2)]
    found: dict[str, Any] = {"stores": [[record.crc32c for record in reader.parts.values()] for reader in stores]}
    found["students"] = [fingerprint_model(run_dir / name).weights_sha256 for name in ("rounds/001/student-hf", "opd-hf")]
    rows = [json.loads(line) for line in (run_dir / "opd/metrics.jsonl").read_text().splitlines()]
    return found | {"losses": [(row["round"], row["step"], row["loss"]) for row in rows]}


def test_rounds(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    recipe = words(inputs, run, *ROUNDS, "eval.held_out.models=['opd']")
    assert main(["run", *recipe, "--until", "train@1"]) == 0
    code, found, text = plan(capsys, *recipe)
    assert code == NOT_FINISHED
    assert list(found) == [*STAGES[:4], *IN_ROUNDS, "eval-held_out-opd", "report"]
    assert [found[stage] for stage in IN_ROUNDS] == ["done"] * 4 + ["not started"] * 5
    assert "convert trained tiny" in text
    assert "--round 1" in text.splitlines()[-1]
    assert main(["run", *recipe]) == 0
    text = capsys.readouterr().out
    assert "reverse KL, first to last step" in text, "the table of the rounds"
    assert set(plan(capsys, *recipe)[1].values()) == {"done"}
    assert plan(capsys, *recipe)[0] == 0

    together = words(inputs, tmp_path / "together", *ROUNDS, "eval.held_out.models=['opd']", "rounds.keep_alive=true")
    assert main(["run", *together]) == 0
    assert capsys.readouterr().out.count("$ megatron-opd rounds ") == 1
    assert plan(capsys, *together)[0] == 0
    assert in_rounds(tmp_path / "together") == in_rounds(run)

    code, found, text = plan(capsys, *recipe, "train.lr=2e-3")
    assert code == NOT_FINISHED
    assert [found[stage] for stage in IN_ROUNDS] == ["done", "done", "done", *["STALE"] * 6]
    assert main(["run", *recipe, "train.lr=2e-3", "--from", "train@1"]) == 0
    assert plan(capsys, *recipe, "train.lr=2e-3")[0] == 0
    assert (run / "set_aside/001/rounds/002/rollouts.opd.zarr").is_dir(), "of the student that there was"
    assert not (run / "set_aside/001/rounds/001/rollouts.opd.zarr").exists(), "of the student after SFT, which is the same"
    assert in_rounds(run) != in_rounds(tmp_path / "together")


def kill_often(inputs: Path, tmp_path: Path, *, kills: int, rng: random.Random) -> None:
    tmp_path.mkdir(exist_ok=True)
    run, log = tmp_path / "run", tmp_path / "log"
    job = Job(["run", *words(inputs, run)], str(log), threads=torch.get_num_threads())  # as the run that it is compared with
    for _ in range(kills):
        answer = shared_server().run(job, kill_after=rng.uniform(0.05, 2.0))[0]
        assert answer.killed or answer.code == 0, log.read_text()[-3000:]
        if not answer.killed:  # it came to its end: what is killed next is a run that makes the last stages again
            for path in (run / "eval/held_out/opd.json", run / "report/report.html"):
                path.unlink()
    assert shared_server().run(job)[0].code == 0, log.read_text()[-3000:]


def test_killed_anywhere_it_comes_to_the_same(finished: Path, inputs: Path, tmp_path: Path) -> None:
    kill_often(inputs, tmp_path, kills=6, rng=random.Random(0))
    assert results(tmp_path / "run") == results(finished)


@pytest.mark.slow
def test_killed_twenty_times(finished: Path, inputs: Path, tmp_path: Path) -> None:
    rng = random.Random(1)
    for round_ in range(4):
        kill_often(inputs, tmp_path / str(round_), kills=20, rng=rng)
        assert results(tmp_path / str(round_) / "run") == results(finished)
