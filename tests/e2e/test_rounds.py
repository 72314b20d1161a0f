"""Rounds of rollout, score and train: by separate commands or in one set of processes, killed or not, they end with the same students."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import Ending, Job, shared_server
from serve.stub_server import LAUNCH_COMMAND
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.data.location import Location
from megatron_opd.data.store import StoreReader
from megatron_opd.hf.lineage import fingerprint_model, hash_tensors, read_lineage

ROUNDS, STEPS = 3, 2
STAGES = (("rollout",), ("score",), ("train",), ("convert", "trained"))


class Worker:
    """Commands of one recipe."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, run: str, *words: str, overrides: dict[str, Any] | None = None, kill_at: int | None = None) -> Ending:
        """One command; the words behind it are its flags."""
        named = 2 if words[0] == "convert" else 1
        words = (*words[:named], *fields(self.folder, run, overrides), *words[named:])
        job = Job(words, str(self.folder / f"{run}.log"), below=str(self.folder / run), kill_at=kill_at)
        return shared_server().run(job)[0]

    def good(self, run: str, *words: str, **options: Any) -> None:
        answer = self.run(run, *words, **options)
        assert answer.code == 0, self.log(run)

    def separate(self, run: str, *numbers: int, **options: Any) -> None:
        """The commands of these rounds, one after the other."""
        for number in numbers:
            for stage in STAGES:
                self.good(run, *stage, "--round", str(number), **options)

    def log(self, run: str) -> str:
        return (self.folder / f"{run}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tmp_path_factory.mktemp("rounds")
    make_model(folder / "student", seed=0)
    make_model(folder / "teacher", seed=1)
    write_prompts(folder / "prompts.jsonl", 24)
    return Worker(folder)


def fields(folder: Path, run: str, overrides: dict[str, Any] | None = None) -> list[str]:
    settings = {
        "run_dir": folder / run,
        "models.teacher": folder / "teacher",
        "models.student": folder / "student",
        "rollout.model": folder / "student",
        "rollout.sft_teacher": folder / "teacher",
        "rollout.prompts": folder / "prompts.jsonl",
        "rollout.prompts_per_part": 4,
        "rollout.sampling.max_new_tokens": 6,
        "train.init": folder / "student",
        "train.global_batch": 8,
        "train.save_every": 1,
        "train.lr": 1e-2,
        "train.schedule.decay": "linear",
        "eval.held_out.prompts": folder / "prompts.jsonl",
        "rounds.count": ROUNDS,
        "rounds.steps": STEPS,
    } | (overrides or {})
    return [
        "tiny",
        *(f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items() if value is not None),
    ]


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run / "opd/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, run: str) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "grad_norm", "learning_rate", "reverse_kl", "off_share", "effective_sample_share", "round")
    return [tuple(row.get(name) for name in names) for row in rows(folder, run)]


def everything(folder: Path, run: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """What must be the same bit for bit: losses, students, rollouts, scores, and what the rounds record of each other."""
    found: dict[str, Any] = {"losses": losses(folder, run)}
    for number in range(1, rounds + 1):
        place = folder / run / "rounds" / f"{number:03d}"
        reader = StoreReader(str(place / "rollouts.opd.zarr"))
        scores = {part: reader.score_manifest(part, "teacher").crc32c for part in reader.parts}  # pyright: ignore
        student = folder / run / "opd-hf" if number == rounds else place / "student-hf"
        record = json.loads((place / "round.json").read_text())
        record.pop("content")  # of a save, whose files hold random names
        found[f"round {number}"] = (
            {part: kept.crc32c for part, kept in reader.parts.items()}, scores, hash_tensors(student), record, reader.manifest.lineage.rounds,
            read_lineage(student),
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def calm(worker: Worker) -> dict[str, Any]:
    worker.separate("calm", 1, 2, 3)
    return everything(worker.folder, "calm")


def test_every_round_s_rollouts_are_the_students_own_and_the_chain_is_recorded(worker: Worker, calm: dict[str, Any]) -> None:
    assert [row["round"] for row in rows(worker.folder, "calm")] == [1, 1, 2, 2, 3, 3]
    assert all(row["off_share"] == 0 for row in rows(worker.folder, "calm")[::STEPS])
    assert [row["learning_rate"] for row in rows(worker.folder, "calm")] == pytest.approx([1e-2 * (6 - step) / 6 for step in range(6)])
    stores = [StoreReader(str(worker.folder / f"calm/rounds/00{number}/rollouts.opd.zarr")) for number in (1, 2, 3)]
    assert [store.manifest.round for store in stores] == [1, 2, 3]
    assert [record.store_id for record in stores[2].manifest.lineage.rounds] == [store.store_id for store in stores[:2]]
    last = read_lineage(worker.folder / "calm/opd-hf")
    assert last is not None
    assert [record.number for record in last.rounds] == [1, 2, 3]
    state = json.loads((worker.folder / "calm/opd/checkpoints/step_000006/opd_state.json").read_text())
    assert [(entry["first_step"], entry["last_step"]) for entry in state["rounds"]] == [(1, 2), (3, 4), (5, 6)]
    students = ["student", "calm/rounds/001/student-hf", "calm/rounds/002/student-hf"]
    assert [entry["student"] for entry in state["rounds"]] == [fingerprint_model(worker.folder / name).weights_sha256 for name in students]
    cost = [json.loads(line) for line in (worker.folder / "calm/stages.jsonl").read_text().splitlines()]
    assert {(row["stage"], row["round"]) for row in cost} == {(stage, n) for stage in ("rollout", "score", "train") for n in (1, 2, 3)}
    assert main(["progress", *fields(worker.folder, "calm"), "--round", "2"]) == 0
    for words in (("train", "--round", "1"), ("train", "--round", "3"), ("convert", "trained", "--round", "1")):  # ended: nothing to do
        worker.good("calm", *words)
    assert everything(worker.folder, "calm") == calm


@pytest.fixture(scope="module")
def operations(worker: Worker) -> int:
    """File operations of all rounds in one set of processes."""
    answer = worker.run("alive", "rounds")
    assert answer.code == 0, worker.log("alive")
    return answer.operations


def test_one_set_of_processes_makes_the_same(worker: Worker, calm: dict[str, Any], operations: int) -> None:
    assert everything(worker.folder, "alive") == calm
    worker.good("alive", "rounds")
    assert everything(worker.folder, "alive") == calm


def test_killed_anywhere_either_way_goes_on_to_the_same(worker: Worker, calm: dict[str, Any], operations: int) -> None:
    rng = random.Random(0)
    assert operations > 300
    kills = 0
    for kill in range(6):
        answer = worker.run("killed", "rounds", kill_at=rng.randrange(1, operations // 5))
        kills += answer.killed
        assert answer.killed or answer.code == 0, worker.log("killed")
        if kill == 2:
            worker.separate("killed", 1)
        if not answer.killed:
            break
    assert kills >= 3
    worker.good("killed", "rounds")
    assert everything(worker.folder, "killed") == calm
    assert not list((worker.folder / "killed/opd").rglob(".*.tmp"))


def test_a_last_checkpoint_that_is_made_again_is_known_by_its_weights(worker: Worker, calm: dict[str, Any]) -> None:
    worker.separate("remade", 1)
    shutil.rmtree(worker.folder / "remade/opd/checkpoints")
    for words in (("train", "--round", "1"), ("rollout", "--round", "2"), ("score", "--round", "2")):
        worker.good("remade", *words)
    assert worker.run("remade", "train", "--round", "2").code == 2
    assert "'megatron-opd convert trained RECIPE --round 1' says whether they are one" in worker.log("remade")
    worker.good("remade", "convert", "trained", "--round", "1")
    worker.good("remade", "rounds")
    assert everything(worker.folder, "remade") == calm


def test_ranks_wait_for_the_first_and_train_together(worker: Worker, calm: dict[str, Any]) -> None:
    """Two ranks of tensor parallelism; other sums, so nearly the same losses."""
    command = [sys.executable, "-m", "megatron_opd", "rounds", *fields(worker.folder, "ranks", {"train.parallel.tp": 2})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(worker.folder, "ranks")
    assert [row[0] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row[1:5] for row in found[:2]] == [pytest.approx(row[1:5], rel=1e-3) for row in calm["losses"][:2]]


def test_launched_servers_take_each_round_s_weights(worker: Worker) -> None:
    """Stand-ins, whose numbers depend on the bytes of the weights that they serve: student and teacher side by side."""
    servers = {"engine.launch.command": json.dumps(LAUNCH_COMMAND), "engine.dtype": "float32", "rounds.count": 2}
    worker.separate("servers", 1, 2, overrides=servers)
    worker.good("servers-alive", "rounds", overrides=servers)
    assert everything(worker.folder, "servers-alive", 2) == everything(worker.folder, "servers", 2)
    refused = worker.run("servers-alive", "rounds", "--url", "http://127.0.0.1:1", overrides={"rounds.count": 2})
    assert refused.code == 2
    assert "a server at an address serves one model" in worker.log("servers-alive")


def test_a_single_round_knows_nothing_of_rounds_and_is_the_same_either_way(worker: Worker) -> None:
    single = {"rounds.count": 1, "rounds.steps": None, "train.steps": 3}
    for stage in STAGES:
        worker.good("single", *stage, overrides=single)
    worker.good("single-alive", "rounds", overrides=single)
    assert losses(worker.folder, "single") == losses(worker.folder, "single-alive")
    assert all(row[-1] is None for row in losses(worker.folder, "single"))
    assert hash_tensors(worker.folder / "single/opd-hf") == hash_tensors(worker.folder / "single-alive/opd-hf")
    for run in ("single", "single-alive"):
        folder = worker.folder / run
        assert not (folder / "rounds").exists()
        assert "rounds" not in json.loads((folder / "opd/checkpoints/step_000003/opd_state.json").read_text())
        manifest = Location(str(folder / "rollouts.opd.zarr")).read_attributes("") or {}
        assert "sampler" in manifest
        assert "round" not in manifest
        assert "rounds" not in manifest["lineage"]
        assert "rounds" not in json.loads((folder / "opd-hf/opd_lineage.json").read_text())["lineage"]


def test_reset_is_a_fresh_run_from_the_converted_student(worker: Worker, calm: dict[str, Any]) -> None:
    reset = {"rounds.optimizer": "reset"}
    worker.separate("reset", 1, 2, overrides=reset)
    worker.good("reset-alive", "rounds", overrides=reset)
    assert losses(worker.folder, "reset-alive")[:4] == losses(worker.folder, "reset")
    assert [row[3] for row in losses(worker.folder, "reset")] == pytest.approx([1e-2, 5e-3, 1e-2, 5e-3])
    assert losses(worker.folder, "reset")[3] != calm["losses"][3]
    # By hand: the second round's prompts and seed, from the student of the first.
    student = worker.folder / "reset/rounds/001/student-hf"
    fresh = {
        "rounds.count": 1, "rounds.steps": None, "train.steps": STEPS, "train.init": student, "rollout.model": student, "rollout.share": "[2, 3]",
        "rollout.sampling.seed": 1, "rollout.sft_teacher": None,
    }  # fmt: skip
    for stage in STAGES:
        worker.good("fresh", *stage, overrides=fresh)
    assert [row[1:-1] for row in losses(worker.folder, "fresh")] == [row[1:-1] for row in losses(worker.folder, "reset")[2:]]
    assert hash_tensors(worker.folder / "fresh/opd-hf") == hash_tensors(worker.folder / "reset/rounds/002/student-hf")


def test_drift_ends_a_round_early_and_the_next_begins_there(worker: Worker) -> None:
    drift = {
        "rounds.until": "drift",
        "rounds.steps": 4,
        "train.drift.max_off_share": 0.05,
        "train.drift.patience": 1,
        "train.save_every": 4,
    }
    worker.separate("drift", 1, 2, 3, overrides=drift)
    worker.good("drift-alive", "rounds", overrides=drift)
    assert everything(worker.folder, "drift") == everything(worker.folder, "drift-alive")
    found = rows(worker.folder, "drift")
    records = [json.loads((worker.folder / f"drift/rounds/00{number}/round.json").read_text()) for number in (1, 2, 3)]
    assert records[0]["ended_by"] == "drift"
    assert records[0]["last_step"] < 4
    assert [record["first_step"] for record in records] == [1, *(record["last_step"] + 1 for record in records[:2])]
    assert [row["round"] for row in found] == [n for n, r in enumerate(records, 1) for _ in range(r["first_step"], r["last_step"] + 1)]
    for record in records:
        of_round = [row["off_share"] > 0.05 for row in found if record["first_step"] <= row["step"] <= record["last_step"]]
        assert of_round == [False] * (len(of_round) - 1) + [record["ended_by"] == "drift"]
    assert main(["progress", *fields(worker.folder, "drift", drift), "--round", "1"]) == 0


def test_what_is_not_the_round_s_is_refused(worker: Worker, calm: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = worker.folder
    shutil.copytree(folder / "calm", folder / "mixed")
    words = fields(folder, "mixed")

    def refused(message: str, *command: str) -> None:
        capsys.readouterr()
        flags = [*command, *words] if command[0] == "convert" else [command[0], *words, *command[1:]]
        if command[0] == "convert":
            flags = [*command[:2], *words, *command[2:]]
        assert main(flags) == 2
        error = capsys.readouterr().err
        assert (message in error, "Traceback" in error) == (True, False), error

    refused("say which with --round N (1 to 3)", "train")
    refused("--round 4: the recipe has 3 rounds", "rollout", "--round", "4")
    place = folder / "mixed/rounds"
    # Another student where the second round's should be: the store was not sampled from it.
    shutil.rmtree(folder / "mixed/opd/checkpoints/step_000006")
    shutil.rmtree(folder / "mixed/opd/checkpoints/step_000005", ignore_errors=True)
    shutil.copytree(folder / "calm/opd/checkpoints/step_000005", folder / "mixed/opd/checkpoints/step_000005")
    (folder / "mixed/opd/checkpoints/latest").write_text("step_000005\n")
    shutil.move(place / "002/student-hf", place / "002/kept")
    shutil.copytree(place / "001/student-hf", place / "002/student-hf")
    refused("holds rollouts of student-hf", "train", "--round", "3")
    refused("round 3 wants the student of 2 rounds, but this one went through 1", "rollout", "--round", "3")
    refused("was made of step 2", "convert", "trained", "--round", "2")
    shutil.rmtree(place / "002/student-hf")
    shutil.move(place / "002/kept", place / "002/student-hf")
    # A store of another round, and a round before which another must end.
    shutil.rmtree(place / "003/rollouts.opd.zarr")
    shutil.copytree(place / "001/rollouts.opd.zarr", place / "003/rollouts.opd.zarr")
    refused("rounds/003/rollouts.opd.zarr", "train", "--round", "3")
    shutil.rmtree(folder / "mixed/opd/checkpoints")
    refused("no checkpoint of round 1, so round 2 can't begin", "train", "--round", "2")
    refused("0 of 2 steps; finish it ('megatron-opd train' with --round 1)", "convert", "trained", "--round", "1")
