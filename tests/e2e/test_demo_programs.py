"""The tour of code, small, through the real command: five evaluations of four models in one table, and grading that goes on where it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fork_server import Job, shared_server

from megatron_opd.demo.programs import LAYOUTS
from megatron_opd.evaluate.rows import Row, read_rows

MODELS = ("teacher", "base", "sft", "opd")
PROMPTS = 8  # of each evaluation
SMALL = [
    "generate.num_prompts=60", "sft.steps=20", "sft.save_every=20", "rollout.num_prompts=20", "train.steps=3", "train.global_batch=8",
    "train.save_every=3", *(f"eval.{name}.num_prompts={PROMPTS}" for name in LAYOUTS),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("programs") / "run"
    return folder, command(folder.parent / "log", "demo", "--model", "programs", f"run_dir={folder}", *SMALL)


def command(log: Path, *words: str) -> str:
    """What a command printed that came to its end."""
    log.unlink(missing_ok=True)
    assert shared_server().run(Job(words, str(log)))[0].code == 0, log.read_text()[-3000:]
    return log.read_text()


def rows_of(folder: Path) -> dict[tuple[str, str], list[Row]]:
    return {(name, model): list(read_rows(folder / "eval" / name / f"{model}.prompts.jsonl")) for name in LAYOUTS for model in MODELS}


def test_five_evaluations_in_one_table(run: tuple[Path, str]) -> None:
    folder, text = run
    table = text[text.rindex("\nmodel ") :].strip().split("\n\n")[0].splitlines()
    assert table[0].split("  ")[0] == "model"
    assert all(f"{name} (average@1)" in table[0] for name in LAYOUTS)
    assert [line.split()[0] for line in table[2:]] == list(MODELS)
    assert all(line.count("%") == 3 * len(LAYOUTS) for line in table[2:])

    rows = rows_of(folder)
    assert all([row.prompt for row in of] == list(range(PROMPTS)) for of in rows.values())
    outcomes = {row.outcome for of in rows.values() for row in of}
    assert outcomes >= {"right", "wrong"}
    assert all(row.reason for of in rows.values() for row in of if row.outcome != "right")
    graded = [row for (name, _), of in rows.items() if name != "aime_like" for row in of if row.outcome in ("right", "wrong")]
    assert {row.detail["isolation"] for row in graded} <= {"namespaces", "bubblewrap", "plain"}
    days = {row["question_id"]: row["contest_date"][:10] for row in map(json.loads, (folder / "prompts/lcb_like.jsonl").open())}
    assert min(days.values()) == "2024-01-01"
    assert min(days[str(row.id)] for row in rows["lcb_like", "teacher"]) == "2024-03-01"


def test_the_teacher_can_program_and_random_weights_cannot(run: tuple[Path, str]) -> None:
    rows = rows_of(run[0])
    right = {model: sum(row.outcome == "right" for name in LAYOUTS for row in rows[name, model]) for model in MODELS}
    assert right["teacher"] >= PROMPTS * len(LAYOUTS) / 2
    assert right["base"] <= 2  # by chance, of sums
    assert all(any(row.outcome == "right" for row in rows[name, "teacher"]) for name in LAYOUTS)


def test_nothing_is_graded_again(run: tuple[Path, str], tmp_path: Path) -> None:
    """Samples and rows are there: the same bytes, the seconds of the first time among them."""
    folder = run[0]
    before = {path: path.read_bytes() for path in sorted(folder.glob("eval/*/*.prompts.jsonl"))}
    assert len(before) == len(LAYOUTS) * len(MODELS)
    text = command(tmp_path / "log", "eval", str(folder))
    assert {path: path.read_bytes() for path in before} == before
    assert text[text.rindex("\nmodel ") :].count("(average@1)") == len(LAYOUTS)


def test_killed_while_grading_it_comes_to_the_same_rows(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, rows = tmp_path / "run", tmp_path / "run/eval/lcb_like/teacher.prompts.jsonl"
    shutil.copytree(run[0], folder)
    before = rows.read_text().splitlines()
    rows.unlink()
    words = ["eval", str(folder), "lcb_like", "--of", "teacher"]
    process = subprocess.Popen([sys.executable, "-m", "megatron_opd", *words], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") >= 2):
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    kept = rows.read_text().splitlines()
    assert 2 <= len(kept) <= PROMPTS
    command(tmp_path / "log", *words)
    after = rows.read_text().splitlines()
    assert set(kept[:2]) <= set(after), "kept, and not graded again"
    assert [without_seconds(line) for line in after] == [without_seconds(line) for line in before]


def without_seconds(line: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(line).items() if name != "seconds"}
