"""average@n, pass@k and majority@n: what several samples of a prompt are worth, with 95 % intervals over prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_opd.evaluate.intervals import Totals, proportion_interval
from megatron_opd.evaluate.rows import Row

Samples = Mapping[int, Sequence[Row]]  # rows of each prompt, without what was excluded


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that of `k` of `n` samples, drawn without replacement, at least one of the `c` right ones is there.

    1 - C(n-c, k) / C(n, k): unbiased for the pass@k of the model (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError
    unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} of them right")
    # C(n-c, k) / C(n, k) as a product of factors that are at most 1; both forms are the same number, the shorter is taken.
    factors, taken = min((k, c), (c, k))
    missed = 1.0
    for i in range(factors):
        missed *= max(0, n - taken - i) / (n - i)
    return 1.0 - missed


def majority(rows: Sequence[Row]) -> float:
    """Whether the answer that most samples of a prompt give is right; of answers that are as frequent, the share that is.

    Samples without an answer have no vote. 0 where none has one.
    """
    votes = Counter(row.answer for row in rows if row.answer is not None)
    right = {row.answer for row in rows if row.outcome == "right"}
    most = max(votes.values(), default=0)
    first = [answer for answer, count in votes.items() if count == most]
    return sum(answer in right for answer in first) / len(first) if first else 0.0


def sample_figures(samples: Samples, *, votes: bool = True) -> dict[str, Any]:
    """average@n, pass@k and majority@n as fields of MODEL.json; {} where there is no prompt.

    votes: whether the grader says what the answer of a response is; majority@n is None where it doesn't, as for programs.
    n is the least number of samples that a prompt has; average@n and majority@n are over all that are there, each prompt with the same
    weight. k: 1, 2, 4, ... up to the largest number of samples, each over the `prompts` that have so many. A sample passes if its outcome is
    "right": a partial score counts in the average alone.
    """
    if not samples:
        return {}
    n = min(map(len, samples.values()))
    right = {prompt: (len(rows), sum(row.outcome == "right" for row in rows)) for prompt, rows in samples.items()}
    pass_at = {}
    for k in _powers_of_two(max(map(len, samples.values()))):
        passed = {prompt: pass_at_k(count, c, k) for prompt, (count, c) in right.items() if count >= k}
        pass_at[str(k)] = {"prompts": len(passed)} | _mean(passed)
    return {
        "average@n": {"n": n} | proportion_interval(prompt_means(samples)).record(),
        "pass@k": pass_at,
        "majority@n": {"n": n} | _mean({prompt: majority(rows) for prompt, rows in samples.items()}) if votes else None,
    }


def prompt_means(samples: Samples) -> Totals:
    """The mean score of each prompt, as totals in which every prompt has the same weight, however many samples of it are there."""
    return {prompt: (sum(row.score or 0.0 for row in rows) / len(rows), 1.0) for prompt, rows in samples.items()}


def _mean(values: Mapping[int, float]) -> dict[str, float | None]:
    return proportion_interval({prompt: (value, 1.0) for prompt, value in values.items()}).record()


def _powers_of_two(most: int) -> Iterable[int]:
    k = 1
    while k <= most:
        yield k
        k *= 2
