"""What `inspect` says of a store's tokens: how responses end, and of each teacher its reverse KL, the advantage, and where it disagrees.

One pass over the store in bounded memory: totals by prompt and by token id, and a random sample of the advantage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_opd.data.store import StoreReader
from megatron_opd.evaluate.intervals import Interval, ratio_interval
from megatron_opd.records import Finish
from megatron_opd.safety.untrusted import one_line
from megatron_opd.show.items import MARKED
from megatron_opd.show.tokens import TokenTexts

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_SAMPLE = 1 << 20  # tokens whose advantages are kept for the quantiles; of fewer, all
_AT_ONCE = 1 << 18  # tokens that are counted at once
_TOP = 10  # tokens in the table


@dataclass
class Disagreement:
    """Totals of one teacher over the response tokens that it scored. `gap` is log pi_T - log pi_ref in nats.

    `by_prompt`: sum of -gap, and tokens. `by_token`: float64 [V, 3], number, sum of gap and sum of |gap| of each id.
    """

    by_prompt: dict[int, tuple[float, float]] = field(default_factory=dict)
    by_token: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    num_tokens: int = 0
    marked: int = 0
    are_log_probs: bool = True
    sample: Sample = field(default_factory=lambda: Sample(_SAMPLE))
    _waiting: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _num_waiting: int = 0

    def add(self, prompt: int, tokens: np.ndarray, gap: np.ndarray) -> None:
        """The response of one rollout: ids and gaps [R]. `finish` after the last."""
        nats, count = self.by_prompt.get(prompt, (0.0, 0.0))
        self.by_prompt[prompt] = (nats - float(gap.sum(dtype=np.float64)), count + len(gap))
        self.num_tokens += len(gap)
        self._waiting.append((tokens, gap))
        self._num_waiting += len(gap)
        if self._num_waiting >= _AT_ONCE:
            self.finish()

    def finish(self) -> None:
        """Count what waits to be counted together with others."""
        if not self._waiting:
            return
        tokens, gap = (np.concatenate(arrays) for arrays in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        self.marked += int((np.abs(gap) >= MARKED).sum())
        if tokens.max() >= len(self.by_token):
            self.by_token = np.pad(self.by_token, ((0, int(tokens.max()) + 1 - len(self.by_token)), (0, 0)))
        ids, where = np.unique(tokens, return_inverse=True)
        for column, weights in enumerate((None, gap, np.abs(gap))):
            self.by_token[ids, column] += np.bincount(where, weights)
        self.sample.add(gap)

    def reverse_kl(self) -> Interval:
        """Estimate of the reverse KL in nats a token: the mean of log pi_ref - log pi_T, with an interval clustered by prompt.

        Of derived scores that are no log-probabilities it is the mean gap alone, no KL.
        """
        return ratio_interval(self.by_prompt)

    def worst(self, count: int = _TOP) -> list[tuple[int, int, float, float]]:
        """(id, number, mean gap, total of |gap|) of the tokens with the largest totals."""
        order = np.argsort(-self.by_token[:, 2], kind="stable")[:count]
        rows = [(int(at), *self.by_token[at].tolist()) for at in order]
        return [(number, int(n), total / n, size) for number, n, total, size in rows if n and size]


class Sample:
    """A uniform random sample, without repeats, of a stream of numbers: each draws a key, and those with the smallest keys stay."""

    def __init__(self, size: int, seed: int = 0):
        self._size, self._random = size, np.random.default_rng(seed)
        self._values, self._keys = np.empty(2 * size, np.float32), np.empty(2 * size)
        self._held = 0
        self._limit = 1.0  # keys from here on can't be among the smallest

    def add(self, values: np.ndarray) -> None:
        keys = self._random.random(len(values))
        for start in range(0, len(values), self._size):
            piece = slice(start, start + self._size)
            keep = keys[piece] < self._limit
            end = self._held + int(keep.sum())
            if end > 2 * self._size:  # seldom: the limit falls, and fewer are kept
                self._shrink()
                end = self._held + int(keep.sum())
            self._values[self._held : end], self._keys[self._held : end] = values[piece][keep], keys[piece][keep]
            self._held = end

    def _shrink(self) -> None:
        smallest = np.argpartition(self._keys[: self._held], self._size - 1)[: self._size]
        self._values[: self._size], self._keys[: self._size] = self._values[smallest], self._keys[smallest]
        self._held, self._limit = self._size, float(self._keys[: self._size].max())

    @property
    def values(self) -> np.ndarray:
        """At most `size` of them, float32."""
        if self._held > self._size:
            self._shrink()
        return self._values[: self._held]


@dataclass
class Endings:
    """Response tokens, those behind the first stop id of their response, and responses that ended by themselves."""

    num_tokens: int = 0
    behind: int = 0
    stopped: int = 0
    responses: int = 0


def measure(reader: StoreReader, teachers: Sequence[str]) -> tuple[Endings, dict[str, Disagreement]]:
    """Read every rollout once. Raises StoreError for what is damaged."""
    endings, found = Endings(), {name: Disagreement() for name in teachers}
    stop_ids = np.array(reader.manifest.stop_ids, np.int64)
    for index in range(len(reader)):
        rollout = reader.rollout(index)
        start, response = rollout.prompt_len, rollout.tokens[rollout.prompt_len :]
        stops = np.flatnonzero(np.isin(response, stop_ids))
        endings.num_tokens += len(response)
        endings.responses += 1
        endings.stopped += rollout.finish is Finish.STOP
        endings.behind += len(response) - 1 - int(stops[0]) if stops.size else 0
        part = int(reader.part_ids[index])
        for name, totals in found.items():
            record = reader.score_manifest(part, name)
            if record is None or (rollout.prompt_index, rollout.sample_index) in reader.unscored(part, name):
                continue
            scores = reader.scores(index, name)
            scored, totals.are_log_probs = len(scores.logp), scores.are_log_probs
            totals.add(rollout.prompt_index, rollout.tokens[start:scored], scores.logp[start:] - rollout.student_logp[start:scored])
    for totals in found.values():
        totals.finish()
    return endings, found


def lines(reader: StoreReader, texts: TokenTexts, endings: Endings, found: dict[str, Disagreement]) -> Iterator[str]:
    """What was measured, for people."""
    if not endings.responses:
        return
    share = endings.stopped / endings.responses
    yield f"{'endings':<18} {share:.1%} of {endings.responses} responses ended by themselves; {_behind(reader, endings)}"
    for name, totals in found.items():
        if not totals.num_tokens:
            continue
        mean, low, high = totals.reverse_kl()
        label, are_log_probs = one_line(f"{name!r}"), totals.are_log_probs
        what, why = ("reverse KL", "") if are_log_probs else ("mean score gap", " (derived: scores of no distribution, so no KL)")
        yield (
            f"{what + ' ' + label:<18} {mean:.4f} nat/token (95 % interval {low:.4f} to {high:.4f}, {len(totals.by_prompt)} prompts), "
            f"the mean of log pi_ref - {'log pi_T' if are_log_probs else 'score'} over {totals.num_tokens:,} tokens{why}"
        )
        values = np.quantile(totals.sample.values, QUANTILES)
        sampled = f", of {len(totals.sample.values):,} tokens drawn at random" if len(totals.sample.values) < totals.num_tokens else ""
        shown = ", ".join(f"{quantile:.1%} {value:+.3f}" for quantile, value in zip(QUANTILES, values, strict=True))
        yield f"{'advantage ' + label:<18} quantiles in nat: {shown}; {totals.marked / totals.num_tokens:.2%} of {MARKED:g} and more{sampled}"
        yield f"where {label} and the sampler disagree most: total of |{'log pi_T' if are_log_probs else 'score'} - log pi_ref| by token, nat"
        yield f"{'token':>16} {'id':>8} {'number':>10} {'mean':>8} {'total':>12}  share of all"
        everything = totals.by_token[:, 2].sum()
        for number, count, mean, total in totals.worst():
            piece = texts.piece(number)
            text = "" if piece.kind == "id" else f"'{one_line(piece.text)}'"
            yield f"{text:>16} {number:>8} {count:>10} {mean:>+8.3f} {total:>12.1f}  {total / everything:.1%}"


def _behind(reader: StoreReader, endings: Endings) -> str:
    if not reader.manifest.stop_ids:
        return "its stop ids are not known, so neither are tokens behind them"
    fault = "" if not endings.behind else " (MUST BE 0: these are no responses; make them again)"
    return f"{endings.behind / endings.num_tokens:.2%} of tokens behind a stop id{fault}"
