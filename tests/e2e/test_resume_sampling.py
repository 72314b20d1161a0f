"""Sampling and scoring that are killed at any moment, by any number of workers, end with the very same arrays."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import make_model, write_prompts

from megatron_opd.cli import main
from megatron_opd.cost.meter import read_stages
from megatron_opd.data.location import Location
from megatron_opd.data.store import StoreReader
from megatron_opd.serve import sample

PARTS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts, and the stores of a run that nobody disturbed: `rollouts`, and `scored`, which has scores too."""
    folder = tmp_path_factory.mktemp("sampling")
    make_model(folder / "student", seed=0)
    make_model(folder / "teacher", seed=1)
    write_prompts(folder / "prompts.jsonl", 2 * PARTS)
    finish(start(folder, "rollout", "rollouts"))
    shutil.copytree(folder / "rollouts", folder / "scored")
    finish(start(folder, "score", "scored"))
    StoreReader(str(folder / "scored")).check_complete("teacher")
    return folder


def arguments(folder: Path, stage: str, store: str, shard: str, *changes: str) -> list[str]:
    settings = {
        "run_dir": folder / "run",
        "models.teacher": folder / "teacher",
        "rollout.model": folder / "student",
        "rollout.sft_teacher": folder / "teacher",
        "rollout.prompts": folder / "prompts.jsonl",
        "rollout.store": folder / store,
        "rollout.prompts_per_part": 2,
        "rollout.sampling.max_new_tokens": 24,
        "rollout.sampling.temperature": 0.9,
        "score.store": folder / store,
        "score.top_k": 4,
    }
    return [stage, "tiny", *(f"{key}={value}" for key, value in settings.items()), *changes, f"--shard={shard}"]


def start(folder: Path, stage: str, store: str, shard: str = "0/1") -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    command = [sys.executable, "-m", "megatron_opd", *arguments(folder, stage, store, shard)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(worker: subprocess.Popen[str]) -> str:
    output, _ = worker.communicate(timeout=300)
    assert worker.returncode == 0, output[-3000:]
    assert "Traceback" not in output
    return output


def num_sealed(store: Path, stage: str) -> int:
    """Groups of the stage that are in place, as a file listing shows them."""
    return len(list(store.glob("parts/0*/zarr.json" if stage == "rollout" else "parts/0*/teacher/teacher/zarr.json")))


def kill_after(worker: subprocess.Popen[str], store: Path, stage: str, *, sealed: int, delay: float) -> None:
    """SIGKILL `delay` seconds after the store has `sealed` groups; nothing is told, nothing is cleaned up."""
    end = time.time() + 200
    while num_sealed(store, stage) < sealed:
        assert worker.poll() is None, worker.communicate()[0][-3000:]
        assert time.time() < end, "no progress"
        time.sleep(0.01)
    time.sleep(delay)
    worker.kill()
    worker.communicate()
    assert worker.returncode == -9, "the worker had ended before it was killed"


def checksums(store: Path, stage: str) -> dict[int, dict[str, int]]:
    reader = StoreReader(str(store))
    if stage == "rollout":
        return {part: record.crc32c for part, record in reader.parts.items()}
    return {part: record.crc32c for part in reader.parts if (record := reader.score_manifest(part, "teacher")) is not None}


def modified(store: Path) -> dict[str, int]:
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in store.glob("parts/0*/**/c/**/*") if path.is_file()}


@pytest.mark.parametrize(("stage", "seed"), [("rollout", 1), ("score", 2)])
def test_killed_again_and_again(folder: Path, stage: str, seed: int) -> None:
    rng = random.Random(seed)
    store = folder / f"killed-{stage}"
    if stage == "score":
        shutil.copytree(folder / "rollouts", store)
    wanted = checksums(folder / "scored", stage)
    kills = [("1/3", 3)]
    if stage == "rollout":  # also once at a moment that knows nothing of the work, and once more
        kills.append(("0/1", 4))
        blind = start(folder, stage, store.name)
        time.sleep(rng.uniform(0.5, 4))
        blind.kill()
        blind.communicate()
    # With parts sealed, as a worker of another number of workers each time.
    for shard, more in kills:
        goal = num_sealed(store, stage) + more
        kill_after(start(folder, stage, store.name, shard), store, stage, sealed=goal, delay=rng.uniform(0, 0.3))
    accounts = [row for row in read_stages(folder / "run" / "stages.jsonl") if row["stage"] == stage]
    assert len(accounts) >= 1 + len(kills), "runs that were killed have one too"
    assert all(row["tokens"] for row in accounts)
    done = checksums(store, stage)
    assert 3 <= len(done) < PARTS
    assert done == {part: wanted[part] for part in done}
    assert StoreReader(str(store)).verify() == []
    before = modified(store)
    # The rest by two workers at once who differ about the number of workers: half of the parts is made by both.
    for worker in [start(folder, stage, store.name, shard) for shard in ("0/1", "1/2")]:
        finish(worker)
    assert checksums(store, stage) == wanted
    reader = StoreReader(str(store))
    reader.check_complete("teacher" if stage == "score" else None)
    assert reader.verify() == []
    after = modified(store)
    sealed = [name for name in before if int(name.split("/")[1]) in done and (stage == "rollout" or "/teacher/" in name)]
    assert sealed
    assert all(after[name] == before[name] for name in sealed)  # what was finished was not made again


def test_nothing_left_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = modified(folder / "scored")
    for stage, said in (("rollout", "has all its parts"), ("score", "has scored all sealed parts")):
        assert main(arguments(folder, stage, "scored", "0/1")) == 0
        assert said in capsys.readouterr().out
    assert modified(folder / "scored") == before


def test_nothing_left_to_do_on_a_disk_that_is_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("write_file", "write_sealed_group"):
        monkeypatch.setattr(Location, name, refuse)
    monkeypatch.setattr("megatron_opd.data.location._make_folder", refuse)
    for stage in ("rollout", "score"):
        assert main(arguments(folder, stage, "scored", "0/1")) == 0


@pytest.mark.parametrize("harm", ["foreign", "damaged"])
def test_a_part_that_is_not_the_stores_is_refused_before_an_engine_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    store = Path(shutil.copytree(folder / "rollouts", folder / harm))
    if harm == "foreign":
        assert main(arguments(folder, "rollout", "short", "3/24", "rollout.sampling.max_new_tokens=2")) == 0
        shutil.rmtree(store / "parts/000003")
        shutil.copytree(folder / "short/parts/000003", store / "parts/000003")
    else:
        path = store / "parts/000003/tokens/c/0"
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    monkeypatch.setattr("megatron_opd.serve.stage.open_engine", _no_engine)
    assert main(arguments(folder, "score", harm, "0/1")) == 2
    named = {"foreign": "parts/000003 is of another store", "damaged": "parts/000003/tokens is damaged"}[harm]
    assert named in capsys.readouterr().err


def test_a_worker_encodes_the_prompts_of_its_own_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = sample.encode_prompts
    monkeypatch.setattr(
        sample,
        "encode_prompts",
        lambda tokenizer, prompts, config: seen.extend(p.index for p in prompts) or real(tokenizer, prompts, config),
    )
    monkeypatch.setattr("megatron_opd.serve.stage.open_engine", _no_engine)
    with pytest.raises(AssertionError, match="an engine was started"):
        main(arguments(folder, "rollout", "few", "5/12"))
    assert seen == [10, 11, 34, 35]


def _no_engine(*args: object, **options: object) -> None:
    raise AssertionError("an engine was started")
