"""Grading of a store's responses: what is compared with the answer, what scores 0 unseen, and how often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_opd.config import EvalStage
from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.grade import END_THINK, THINK, answer_part
from megatron_opd.evaluate.grading_pool import GradingPool
from megatron_opd.evaluate.intervals import Totals
from megatron_opd.lineage import load_tokenizer
from megatron_opd.records import Finish, Prompt

_PROMPT_END = 16  # tokens of the prompt in which a template may open the thinking


def grade_store(stage: EvalStage, reader: StoreReader, prompts: Sequence[Prompt]) -> tuple[Totals, dict[str, Any]]:
    """Scores and samples by prompt, and counts of responses that scored 0 without a comparison. Raises UserError.

    An excluded prompt is no answer and is not there. A response that was cut by length is wrong, whatever stands in it, and so is one
    that never ends its thinking.
    """
    tokenizer = load_tokenizer(stage.model)
    counts = {"responses": len(reader), "cut": 0, "unclosed": 0, "timeouts": 0, "errors": 0}
    totals: dict[int, tuple[float, float]] = {}
    order: list[int] = []  # prompts of the responses that are graded
    first_fault = ""

    def add(prompt_index: int, score: float) -> None:
        total, samples = totals.get(prompt_index, (0.0, 0.0))
        totals[prompt_index] = (total + score, samples + 1)

    def to_grade() -> Iterator[tuple[Prompt, str]]:
        for index in range(len(reader)):
            prompt_index = int(reader.prompt_indices[index])
            if reader.finishes[index] == Finish.LENGTH:
                counts["cut"] += 1
                add(prompt_index, 0.0)
                continue
            rollout = reader.rollout(index)
            text = response_text(tokenizer, rollout.tokens, rollout.prompt_len)
            if answer_part(text) is None:
                counts["unclosed"] += 1
                add(prompt_index, 0.0)
            else:
                order.append(prompt_index)
                yield prompts[prompt_index], text

    with GradingPool(stage.grader, seconds=stage.grading_seconds) as pool:
        for number, verdict in enumerate(pool.grade(to_grade())):
            add(order[number], verdict.score)
            if verdict.fault is not None:
                counts[f"{verdict.fault}s"] += 1
                first_fault = first_fault or f"prompt {order[number]}: {verdict.reason}"
    shares = {"cut_share": counts["cut"] / len(reader) if len(reader) else 0.0}
    return dict(sorted(totals.items())), counts | shares | {"first_fault": first_fault or None}


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
