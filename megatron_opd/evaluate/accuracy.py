"""Grading of a store's responses: what is compared with the answer, what scores 0 unseen, and how often."""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from megatron_opd.data.benchmarks import row_id
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import UserError
from megatron_opd.evaluate.grade import END_THINK, GRADING, PACKAGES, THINK, answer_part
from megatron_opd.evaluate.grading_pool import CPU_TIME, GradingPool
from megatron_opd.evaluate.intervals import Totals
from megatron_opd.evaluate.rows import Row, RowWriter, SampleName, key_of
from megatron_opd.evaluate.verdict import Verdict
from megatron_opd.hf.lineage import load_tokenizer
from megatron_opd.recipe.evaluation import EvalStage, Evaluation
from megatron_opd.records import Finish, Prompt
from megatron_opd.serve.stage import Bar

_PROMPT_END = 16  # tokens of the prompt in which a template may open the thinking
# Outcomes that score 0 and are counted, by the name of their count.
_COUNTED = {"cut": "cut", "unclosed": "unclosed", "no_answer": "no_answer", "timeout": "timeouts", "error": "errors"}


class Pool(Protocol):
    """Grades in processes of its own; a context manager."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /) -> None: ...
    def grade(self, items: Iterable[tuple[Prompt, str]]) -> Iterator[Verdict]: ...
    def find_unreadable(self, prompts: Sequence[Prompt]) -> list[str]: ...


def open_pool(stage: EvalStage) -> Pool:
    """The pool of the evaluation's grader. Raises UserError for one whose package is missing."""
    if stage.grader == "code":
        from megatron_opd.evaluate.code.pool import CodePool  # pyright: ignore[reportMissingImports]

        return CodePool(limits=stage.code, workers=None)  # pyright: ignore[reportAttributeAccessIssue]
    return GradingPool(stage.grader, seconds=stage.grading_seconds)


def check_answers(stage: EvalStage, prompts: Sequence[Prompt]) -> None:
    """Raise UserError that counts all answers which the grader can't compare with, and names the first."""
    with open_pool(stage) as pool:
        found = pool.find_unreadable(prompts)
    if len(found) == 1:
        raise UserError(f"{stage.prompts}: {found[0]}")
    if found:
        more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
        shown = "".join(f"\n  {reason}" for reason in found[:5])
        raise UserError(
            f"{stage.prompts}: {len(found)} of {len(prompts)} answers can't be used by the grader {stage.grader!r}; fix them "
            f"(prompts count from 0):{shown}{more}"
        )


@dataclass(frozen=True)
class _Sample:
    """A sample of the store on its way to a row; a verdict that needs no grader, or a row of an earlier time, is there already."""

    name: SampleName
    key: str
    text: str | None
    finish: str | None
    tokens: int
    verdict: Verdict | None
    kept: Row | None
    excluded: str | None = None


def grade_store(
    stage: Evaluation, reader: StoreReader, prompts: Sequence[Prompt], *, rows: Path | None = None
) -> tuple[Totals, dict[str, Any]]:
    """Scores and samples by prompt, and counts (and shares) of responses that scored 0 without a comparison. Raises UserError.

    rows: the file of rows to write and to go on with; None writes none. An excluded prompt is no answer and has a row alone. A response
    that was cut by length is wrong, whatever stands in it, and so is one that never ends its thinking.
    """
    counts: dict[str, Any] = {"responses": len(reader), **dict.fromkeys(_COUNTED.values(), 0)}
    totals: dict[int, tuple[float, float]] = {}
    first_fault = ""
    waiting: deque[_Sample] = deque()  # in the order of the store; only those whose verdict the pool still makes hold the others up
    order: list[SampleName] = []

    with contextlib.ExitStack() as stack:
        writer = None if rows is None else stack.enter_context(RowWriter(rows))
        bar = stack.enter_context(Bar(f"{stage.title} grading", None, total=len(reader), initial=0, unit="response"))
        pool = stack.enter_context(open_pool(stage))

        def to_grade() -> Iterator[tuple[Prompt, str]]:
            for sample in _samples(stage, reader, prompts, load_tokenizer(stage.model), writer):
                waiting.append(sample)
                order.append(sample.name)
                if sample.text is not None and sample.verdict is None and sample.kept is None:
                    yield prompts[sample.name[0]], sample.text

        def settle(sample: _Sample, verdict: Verdict | None) -> None:
            nonlocal first_fault
            row = sample.kept or _row(sample, verdict, prompts[sample.name[0]])
            if writer is not None and sample.kept is None:
                writer.add(row)
            if row.score is None:
                return
            score, samples = totals.get(row.prompt, (0.0, 0.0))
            totals[row.prompt] = (score + row.score, samples + 1)
            if row.outcome in _COUNTED:
                counts[_COUNTED[row.outcome]] += 1
            if row.outcome in ("timeout", "error"):
                first_fault = first_fault or f"prompt {row.prompt}: {row.reason}"
            bar.update(1, tokens=sample.tokens)

        def settle_known() -> None:
            while waiting and (waiting[0].kept or waiting[0].verdict or waiting[0].excluded is not None):
                sample = waiting.popleft()
                settle(sample, sample.verdict)

        for verdict in pool.grade(to_grade()):
            settle_known()
            settle(waiting.popleft(), verdict)
        settle_known()
        if writer is not None:
            writer.finish(order)
    shares = {f"{name}_share": counts[name] / max(len(reader), 1) for name in _COUNTED.values()}
    return dict(sorted(totals.items())), counts | shares | {"first_fault": first_fault or None}


def _samples(
    stage: Evaluation, reader: StoreReader, prompts: Sequence[Prompt], tokenizer: Any, writer: RowWriter | None
) -> Iterator[_Sample]:
    """All samples of a store, excluded ones among them, part by part."""

    @lru_cache(maxsize=1)  # the samples of a prompt stand together, and tests of programs may be long
    def basis(prompt_index: int) -> str:
        return key_of(*_basis(stage, prompts[prompt_index]))

    def kept(name: SampleName, key: str) -> Row | None:
        row = None if writer is None else writer.find(name, key)
        return row if row is not None and _would_come_again(row) else None

    for part, record in reader.parts.items():
        rows = reader.part_rows(part)
        indices = {(int(reader.prompt_indices[i]), int(reader.sample_indices[i])): i for i in range(rows.start, rows.stop)}
        reasons = {(entry.prompt_index, entry.sample_index): entry.reason for entry in record.excluded}
        for name in sorted(indices.keys() | reasons.keys()):
            if name not in indices:
                key = key_of("excluded", reasons[name], prompts[name[0]].answer)
                yield _Sample(name, key, None, None, 0, None, kept(name, key), reasons[name])
                continue
            rollout = reader.rollout(indices[name])
            text = response_text(tokenizer, rollout.tokens, rollout.prompt_len)
            finish = "length" if rollout.finish == Finish.LENGTH else "stop"
            key = key_of(basis(name[0]), finish, text)
            yield _Sample(name, key, text, finish, rollout.response_len, _unseen(text, rollout.response_len, finish), kept(name, key))


def _would_come_again(row: Row) -> bool:
    """Whether another grading would find the same. What a busy machine can cause is graded again: a failure, a limit of memory or wall-clock time."""
    return row.outcome not in ("timeout", "error") or row.detail.get("limit") == CPU_TIME


def _unseen(text: str, tokens: int, finish: str) -> Verdict | None:
    """The verdict of a response that no grader is asked about."""
    if finish == "length":
        return Verdict(0.0, "cut", reason=f"cut at {tokens} tokens")
    if answer_part(text) is None:
        return Verdict(0.0, "unclosed", reason=f"it ended by itself, and its {THINK} never does")
    return None


def _basis(stage: Evaluation, prompt: Prompt) -> tuple[Any, ...]:
    """What a verdict depends on besides the response: the version of the grader, its limits, and what it compares with."""
    if stage.grader == "code":
        return GRADING, "code", stage.code.model_dump(), prompt.answer, prompt.meta
    package = PACKAGES.get(stage.grader)
    installed = package and version(package.replace("_", "-"))
    return GRADING, stage.grader, installed, stage.grading_seconds, prompt.answer, prompt.meta.get("reasoning_gym")


def answers_sha256(stage: EvalStage, prompts: Iterable[Prompt]) -> str:
    """sha256 in hex of what responses are compared with, in the order of the prompts: answers, entries of reasoning_gym, tests of programs.

    Raises UserError for tests that can't be used.
    """
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(key_of(prompt.answer, prompt.meta.get("reasoning_gym"), _tests(stage, prompt)).encode())
    return found.hexdigest()


def _tests(stage: EvalStage, prompt: Prompt) -> dict[str, Any] | None:
    if stage.grader != "code":
        return None
    from megatron_opd.evaluate.code.tests_of import tests_of

    return asdict(tests_of(prompt))


def _row(sample: _Sample, verdict: Verdict | None, prompt: Prompt) -> Row:
    if sample.excluded is not None:
        found: dict[str, Any] = {
            "outcome": "excluded",
            "score": None,
            "answer": None,
            "reason": sample.excluded,
            "seconds": 0.0,
            "detail": {},
        }
    else:
        assert verdict is not None
        found = asdict(verdict)
    return Row(
        prompt=sample.name[0],
        id=row_id(prompt.meta),
        sample=sample.name[1],
        gold=prompt.answer,
        finish=sample.finish,  # type: ignore[arg-type]
        tokens=sample.tokens,
        key=sample.key,
        response=sample.text,
        **found,
    )


def response_text(tokenizer: Any, tokens: np.ndarray, prompt_len: int) -> str:
    """Text of a response without special tokens, but with its <think> tags; the opening one too if the prompt's template wrote it."""
    special = set(tokenizer.all_special_tokens)
    response = tokens[prompt_len:].tolist()
    if special.isdisjoint((THINK, END_THINK)):
        text = tokenizer.decode(response, skip_special_tokens=True)
    else:
        text = tokenizer.decode(response, skip_special_tokens=False)
        for token in special - {THINK, END_THINK}:
            text = text.replace(token, "")
    opened = tokenizer.decode(tokens[max(0, prompt_len - _PROMPT_END) : prompt_len].tolist()).rstrip().endswith(THINK)
    return f"{THINK}{text}" if opened else text
