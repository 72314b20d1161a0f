"""Grading of a real store: a row for every sample, and that it goes on. Tiny tokenizer, real workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_model
from unit.graded_rows import write_rows
from unit.store_parts import make_manifest

from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.evaluate.accuracy import grade_store
from megatron_opd.evaluate.calibration_error import calibration
from megatron_opd.evaluate.grading_pool import GradingPool
from megatron_opd.evaluate.passk import sample_figures
from megatron_opd.evaluate.rows import by_prompt, read_rows
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.evaluate.wording import describe_grading
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.recipe.evaluation import Evaluation
from megatron_opd.records import Finish, Prompt, PromptFile, Rollout, SamplingParams
from megatron_opd.store_records import Excluded

SAMPLES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "student", seed=1)


class Graded:
    """A store of 4 prompts of 3 samples: right, wrong, no answer, cut; one sample of prompt 2 is excluded."""

    def __init__(self, folder: Path, model: Path):
        self.stage = Evaluation(name="a", label="opd", model=str(model), prompts="", grader="number")
        self.rows = folder / "rows.prompts.jsonl"
        self.prompts = [Prompt(i, f"{i}?", f"{i}", {"unique_id": f"p-{i}"}) for i in range(4)]
        texts = ["it is 0", "0", "1", "<think>a</think> 1", "<think>1", "1!", "2", "2", "2", "none", "3", "4"]
        excluded = [Excluded(prompt_index=2, sample_index=1, reason="the engine failed")]
        self.reader = make_store(folder / "s", model, texts, excluded)

    def __call__(self) -> tuple[dict[int, tuple[float, float]], dict[str, float]]:
        totals, counts = grade_store(self.stage, self.reader, self.prompts, rows=self.rows)
        return dict(totals), counts


@pytest.fixture
def graded(tmp_path: Path, model: Path) -> Graded:
    return Graded(tmp_path, model)


def make_store(path: Path, model: Path, texts: Sequence[str], excluded: Sequence[Excluded]) -> StoreReader:
    """A store in two parts of the given responses, three to a prompt; the last is cut."""
    tokenizer = load_tokenizer(model)
    num_prompts = len(texts) // SAMPLES
    manifest = make_manifest(
        per_part=2,
        prompts=PromptFile(name="p", sha256="0" * 64, num_prompts=num_prompts),
        sampling=SamplingParams(samples_per_prompt=SAMPLES),
        sampler=make_manifest().sampler.model_copy(update={"vocab_size": 300}),
    )
    location = create_store(str(path), manifest)
    out = {(entry.prompt_index, entry.sample_index) for entry in excluded}
    for part in range(num_prompts // 2):
        rollouts = []
        for prompt in (2 * part, 2 * part + 1):
            for sample in range(SAMPLES):
                number = prompt * SAMPLES + sample
                tokens = np.array([*tokenizer("q")["input_ids"], *tokenizer(texts[number])["input_ids"]], np.int32)
                logp = np.array([math.nan, *[-1.0] * (len(tokens) - 1)], np.float32)
                finish = Finish.LENGTH if number == len(texts) - 1 else Finish.STOP
                if (prompt, sample) not in out:
                    rollouts.append(Rollout(tokens, 1, prompt, sample, finish, logp))
        write_part(location, part, rollouts, [entry for entry in excluded if entry.prompt_index // 2 == part], {})
    return StoreReader(str(path))


def count_graded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """What is given to a grader from here on: the prompt's index and the response."""
    given: list[tuple[int, str]] = []
    grade = GradingPool.grade

    def counted(pool: GradingPool, items: Iterable[tuple[Prompt, str]]) -> Iterator[Verdict]:
        return grade(pool, (given.append((item[0].index, item[1])) or item for item in items))

    monkeypatch.setattr(GradingPool, "grade", counted)
    return given


def test_every_sample_has_a_row(graded: Graded) -> None:
    totals, counts = graded()
    assert totals == {0: (2.0, 3.0), 1: (3.0 - 1.0, 3.0), 2: (2.0, 2.0), 3: (1.0, 3.0)}
    rows = list(read_rows(graded.rows))
    assert [row.name for row in rows] == [(i, j) for i in range(4) for j in range(SAMPLES)]
    outcomes = ["right", "right", "wrong", "right", "unclosed", "right", "right", "excluded", "right", "no_answer", "right", "cut"]
    assert [row.outcome for row in rows] == outcomes
    assert [(row.id, row.gold) for row in rows[::SAMPLES]] == [(f"p-{i}", f"{i}") for i in range(4)]
    assert (rows[7].reason, rows[7].score, rows[7].response, rows[7].tokens) == ("the engine failed", None, None, 0)
    assert (rows[11].finish, rows[11].response, rows[11].reason) == ("length", "4", "cut at 1 tokens")
    assert (rows[3].answer, rows[3].response) == ("1", "<think>a</think> 1")
    assert all(row.reason for row in rows)
    assert all(row.seconds == 0 for row in rows if row.outcome in ("cut", "unclosed", "excluded"))
    found = {"cut": 1, "unclosed": 1, "no_answer": 1, "timeouts": 0, "errors": 0}
    assert counts == {"responses": 11, **found, **{f"{name}_share": count / 11 for name, count in found.items()}, "first_fault": None}
    assert describe_grading(counts) == (
        "graded 0 without a comparison, of 11 responses: 1 (9.1%) cut by length, 1 (9.1%) that never end their <think>, "
        "1 (9.1%) without an answer"
    )


def test_figures_of_the_rows(graded: Graded) -> None:
    totals, _ = graded()
    samples = by_prompt(read_rows(graded.rows))
    figures = sample_figures(samples)
    assert figures["average@n"]["mean"] == pytest.approx(sum(score / count for score, count in totals.values()) / 4)
    assert list(figures["pass@k"]) == ["1", "2"]  # of three samples, of which prompt 2 has two
    assert figures["pass@k"]["2"]["mean"] == pytest.approx((1 + 1 + 1 + 2 / 3) / 4)
    calibrated = calibration(samples)
    assert calibrated is not None
    assert (calibrated["samples"], calibrated["without_answer"]) == (11, 3)


def test_grading_that_was_interrupted_goes_on(graded: Graded, monkeypatch: pytest.MonkeyPatch) -> None:
    graded()
    content = graded.rows.read_bytes()
    given = count_graded(monkeypatch)
    assert graded()[0] == {0: (2.0, 3.0), 1: (2.0, 3.0), 2: (2.0, 2.0), 3: (1.0, 3.0)}
    assert given == []
    lines = content.splitlines(keepends=True)
    graded.rows.write_bytes(b"".join(lines[:8]) + lines[8][:-20])  # killed while it wrote the ninth
    graded()
    assert [prompt for prompt, _ in given] == [2, 3, 3]  # the cut response needs no grader
    assert [row.key for row in read_rows(graded.rows)] == [row.key for row in read_rows_of(content, graded.rows)]


def test_a_mended_answer_costs_no_other_row(graded: Graded, monkeypatch: pytest.MonkeyPatch) -> None:
    graded()
    given = count_graded(monkeypatch)
    graded.prompts[2] = Prompt(2, "2?", "-2", {"unique_id": "p-2"})
    totals, _ = graded()
    assert totals[2] == (0.0, 2.0)
    assert [prompt for prompt, _ in given] == [2, 2]
    assert [row.gold for row in read_rows(graded.rows)] == [gold for gold in ("0", "1", "-2", "3") for _ in range(SAMPLES)]


def test_another_grader_or_limit_grades_again(graded: Graded, monkeypatch: pytest.MonkeyPatch) -> None:
    graded()
    given = count_graded(monkeypatch)
    for number, change in enumerate(({"grader": "exact"}, {"grading_seconds": 2.0}), start=1):
        graded.stage = graded.stage.model_copy(update=change)
        graded()
        assert len(given) == 9 * number
    assert [row.outcome for row in read_rows(graded.rows)][:2] == ["wrong", "right"]  # "it is 0", "0"


def test_what_a_busy_machine_can_cause_is_graded_again(graded: Graded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of CPU time stays; wall-clock time, memory and failures of the grader do not."""
    graded()
    faults = [("timeout", {"limit": "CPU time"}), ("timeout", {"limit": "wall-clock time"}), ("timeout", {"how": "memory"}), ("error", {})]
    rows = list(read_rows(graded.rows))
    for number, (outcome, detail) in zip((0, 1, 2, 3), faults, strict=True):
        rows[number] = replace(rows[number], outcome=outcome, score=0.0, detail=detail)
    write_rows(graded.rows, rows)
    given = count_graded(monkeypatch)
    totals, counts = graded()
    assert given == [(0, "0"), (0, "1"), (1, "<think>a</think> 1")]
    assert (totals[0], totals[1]) == ((1.0, 3.0), (2.0, 3.0))
    assert (counts["timeouts"], counts["errors"]) == (1, 0)


def read_rows_of(content: bytes, near: Path) -> list:
    path = near.with_name("before.prompts.jsonl")
    path.write_bytes(content)
    return list(read_rows(path))
