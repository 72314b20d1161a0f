"""Derived teachers: what is computed, against float64 done at once; biases and evidence that were planted; the shuffle."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from unit.derived_scores import SMALL, by_name, make, scored_of, write_again
from unit.derived_scores import scored as scored  # the fixtures
from unit.derived_scores import url as url
from unit.store_parts import VOCAB, fill, make_manifest, make_scores

from megatron_opd.data.derived import part_scores
from megatron_opd.data.recurring import RecurringPart, ResponseTokens, fold_of, response_tokens, surprisal_edges
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_part
from megatron_opd.records import Rollout, TeacherScores
from megatron_opd.store_records import Excluded

Gap = Callable[[Rollout, np.random.Generator], np.ndarray]  # log pi_T - log pi_ref of its response tokens


def planted(path: Path, gap: Gap, *, prompts: int, per_part: int = 50) -> str:
    """A store whose teacher's log-probs are those of the student plus `gap`, and 20 nats lower so that none is above 0."""
    url = str(path)
    fill(url, make_manifest(num_prompts=prompts, per_part=per_part), longest=30)
    for part in StoreReader(url).parts:
        scores = []
        for rollout in StoreReader(url).part_rollouts(part):
            logp = rollout.student_logp.copy()
            logp[rollout.prompt_len :] += gap(rollout, np.random.default_rng([rollout.prompt_index, rollout.sample_index])) - 20
            scores.append(TeacherScores(logp))
        write_again(url, part, scores)
    return url


def at_once(scored: list[tuple[Rollout, TeacherScores]], settings: dict[str, Any]) -> list[np.ndarray]:
    """b of every response, by the definition: loops over tokens, dictionaries of groups, exact sums."""
    edges, rows = surprisal_edges(settings["surprisal_bins"]), []
    for number, (rollout, scores) in enumerate(scored):
        count = rollout.response_len
        for place in range(count):
            t = rollout.prompt_len + place
            student, teacher = float(rollout.student_logp[t]), float(scores.logp[t])
            context = (int(place / count * settings["position_bins"] + 1e-12), sum(-student >= edge for edge in edges))
            fold = fold_of(rollout.prompt_index, folds=settings["folds"], seed=settings["seed"])
            rows.append((number, fold, int(rollout.tokens[t]), context, teacher - student, 1 / count))
    result: list[list[float]] = [[] for _ in scored]
    fitted = {}
    for fold in {row[1] for row in rows}:
        others = [row for row in rows if row[1] != fold]
        total = math.fsum(row[5] for row in others)
        mean = math.fsum(row[5] * row[4] for row in others) / total
        prior = settings["smoothing"] * total / len(others)
        for column in (2, 3):
            groups: dict[Any, list[Any]] = {}
            for row in others:
                groups.setdefault(row[column], []).append(row)
            for key, members in groups.items():
                weight = math.fsum(row[5] for row in members)
                fitted[fold, column, key] = (math.fsum(row[5] * row[4] for row in members) + prior * mean) / (weight + prior)
        fitted[fold] = mean
    for row in rows:
        values = [fitted.get((row[1], column, row[column]), fitted[row[1]]) for column in (2, 3)]
        result[row[0]].append(0.5 * values[0] + 0.5 * values[1])
    return [np.array(values) for values in result]


@pytest.mark.parametrize("changes", [{}, {"smoothing": 0.0}, {"folds": 5, "position_bins": 1, "surprisal_bins": 1, "seed": 2}])
def test_what_is_streamed_is_the_definition(url: str, changes: dict[str, Any]) -> None:
    settings = SMALL | changes
    assert make(url, **changes) == [0, 1, 2]
    scored, derived = scored_of(url), scored_of(url, "less")
    wanted = at_once([(rollout.cut(len(scores.logp)), scores) for rollout, scores in scored], settings)
    recurring = RecurringPart(settings, VOCAB)
    for part in range(3):
        recurring.add(response_tokens([pair for pair in scored if pair[0].prompt_index // 4 == part], settings))
    recurring.fit()
    np.testing.assert_allclose(recurring.of(response_tokens(scored, settings)), np.concatenate(wanted), rtol=1e-12, atol=1e-14)
    for (rollout, scores), (_, made), b in zip(scored, derived, wanted, strict=True):
        start = rollout.prompt_len
        assert np.isnan(made.logp[:start]).all()
        np.testing.assert_allclose(made.logp[start:], scores.logp[start:].astype(np.float64) - b, rtol=1e-6, atol=1e-6)
    assert max(float(made.logp[rollout.prompt_len :].max()) for rollout, made in derived) > 0.1  # and read all the same


def test_the_division_into_parts_does_not_matter(tmp_path: Path) -> None:
    urls = [planted(tmp_path / "whole", lambda r, rng: rng.normal(size=r.response_len), prompts=9, per_part=9)]
    pairs = list(part_scores(StoreReader(urls[0]), 0, "teacher"))
    for per_part in (4, 2):
        urls.append(str(tmp_path / f"by{per_part}"))
        location = fill(urls[-1], make_manifest(num_prompts=9, per_part=per_part), parts=[])
        for part in reversed(range(-(-9 // per_part))):
            mine = [pair for pair in pairs if pair[0].prompt_index // per_part == part]
            write_part(location, part, [rollout for rollout, _ in mine], [], {})
            write_again(urls[-1], part, [scores for _, scores in mine])
    for store in urls:
        make(store)
    assert by_name(urls[0], "less") == by_name(urls[1], "less") == by_name(urls[2], "less")


def left_over(url: str, **settings: Any) -> tuple[np.ndarray, list[Rollout]]:
    """What the derived scores say against pi_ref, of all tokens."""
    make(url, **settings)
    pairs = scored_of(url, "less")
    return np.concatenate([(s.logp - r.student_logp)[r.prompt_len :].astype(np.float64) for r, s in pairs]), [r for r, _ in pairs]


def off_the_mean(table: np.ndarray, group_N: np.ndarray, tokens: ResponseTokens) -> np.ndarray:
    """Of each fold and group that the other folds have, how far its estimate is from their mean of all, in standard errors of a mean of so many tokens."""
    found = []
    for fold in np.unique(tokens.fold_N):
        others = tokens.fold_N != fold
        gap_M, group_M, weight_M = tokens.gap_N[others], group_N[others], tokens.weight_N[others]
        mean = np.average(gap_M, weights=weight_M)
        deviation = np.sqrt(np.average((gap_M - mean) ** 2, weights=weight_M))
        for group in np.unique(group_M):
            weight = weight_M[group_M == group]
            found.append((table[fold, group] - mean) / (deviation * np.sqrt((weight**2).sum()) / weight.sum()))
    return np.array(found)


BIASES: dict[Literal["token", "context"], Gap] = {
    "token": lambda r, rng: np.linspace(-2, 2, VOCAB)[r.tokens[r.prompt_len :]],
    "context": lambda r, rng: (
        np.where(-r.student_logp[r.prompt_len :].astype(float) >= surprisal_edges(4)[1], 1.5, -0.5)
        * np.where(np.arange(r.response_len) * 2 // r.response_len == 0, 1, -1)
    ),
}


@pytest.mark.parametrize("kind", BIASES)
def test_a_planted_bias_is_found(tmp_path: Path, kind: Literal["token", "context"]) -> None:
    """Its table holds it; of a bias that shows in one table alone the mean of both takes off half, as published."""
    gap, settings = BIASES[kind], SMALL | {"position_bins": 2, "surprisal_bins": 4, "smoothing": 1.0}
    url = planted(tmp_path / "store", gap, prompts=400, per_part=200)
    scored = scored_of(url)
    tokens, recurring = response_tokens(scored, settings), RecurringPart(settings, VOCAB)
    recurring.add(tokens)
    recurring.fit()
    groups = {"token": tokens.ids_N, "context": tokens.context_N}
    tables = dict(zip(("token", "context"), recurring.tables, strict=True))
    estimate_N = tables[kind][tokens.fold_N, groups[kind]]
    assert np.abs(estimate_N - tokens.gap_N).max() < 0.1
    assert np.corrcoef(estimate_N, tokens.gap_N)[0, 1] > 0.999
    unbiased = "context" if kind == "token" else "token"
    off_G = off_the_mean(tables[unbiased], groups[unbiased], tokens)  # nothing there but noise
    assert np.abs(off_G).max() < 4
    assert 0.5 < np.sqrt(np.mean(off_G**2)) < 1.5
    assert np.abs(off_the_mean(tables[kind], groups[kind], tokens)).max() > 10  # what is planted is far beyond it
    left_N, _ = left_over(url, **settings)
    assert abs(left_N.mean()) < 0.05  # the constant is gone
    slope = float(np.cov(left_N, tokens.gap_N)[0, 1] / tokens.gap_N.var())
    assert 0.45 < slope < 0.55


def test_a_constant_is_gone(tmp_path: Path) -> None:
    left_N, _ = left_over(planted(tmp_path / "constant", lambda r, rng: np.full(r.response_len, 3.0), prompts=60), **SMALL)
    assert np.abs(left_N).max() < 1e-4


def test_planted_evidence_is_left_alone(tmp_path: Path) -> None:
    """What a prompt and a place say, and no other prompt repeats, stays as it is within the error of sampling."""

    def evidence(rollout: Rollout, rng: np.random.Generator) -> np.ndarray:
        return np.random.default_rng(rollout.prompt_index).normal(size=100)[: rollout.response_len]

    bias = BIASES["token"]
    url = planted(tmp_path / "store", lambda r, rng: evidence(r, rng) + bias(r, rng), prompts=400, per_part=200)
    left_N, rollouts = left_over(url)
    evidence_N = np.concatenate([evidence(rollout, np.random.default_rng()) for rollout in rollouts])
    slope = float(np.cov(left_N, evidence_N)[0, 1] / evidence_N.var())
    error = float(left_N.std() / evidence_N.std() / np.sqrt(len(left_N)))
    assert abs(slope - 1) < 4 * error
    assert 4 * error < 0.06


def test_shuffled_scores_are_those_of_the_part(url: str) -> None:
    assert make(url, "shuffled", "shuffle", seed=3) == [0, 1, 2]
    make(url, "other", "shuffle", seed=4)
    reader = StoreReader(url)
    for part in reader.parts:
        values = {}
        for name in ("teacher", "shuffled", "other"):
            pairs = list(part_scores(reader, part, name))
            values[name] = np.concatenate([scores.logp[rollout.prompt_len :] for rollout, scores in pairs if scores is not None])
            assert all(np.isnan(scores.logp[: rollout.prompt_len]).all() for rollout, scores in pairs if scores is not None)
        assert sorted(values["teacher"]) == sorted(values["shuffled"]) == sorted(values["other"])
        assert (values["teacher"] == values["shuffled"]).mean() < 0.1
        assert (values["other"] == values["shuffled"]).mean() < 0.1
        assert abs(np.corrcoef(values["teacher"], values["shuffled"])[0, 1]) < 0.25


def test_what_the_source_left_out_and_cut(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    fill(url, make_manifest(num_prompts=12), longest=20)
    reader = StoreReader(url)
    for part in reader.parts:
        rollouts, out = reader.part_rollouts(part), [(5, 1)] if part == 1 else []
        scores = make_scores([rollout.cut(21) for rollout in rollouts])
        kept = [None if (r.prompt_index, r.sample_index) in out else s for r, s in zip(rollouts, scores, strict=True)]
        excluded = [Excluded(prompt_index=5, sample_index=1, reason="engine failed", quarantined=True) for _ in out]
        write_again(url, part, kept, excluded=excluded, max_tokens=21, allow_teacher_mismatch=True)
    for name, method in (("less", "residualize"), ("shuffled", "shuffle")):
        make(url, name, method)
        record = StoreReader(url).score_manifest(1, name)
        assert record is not None
        assert (record.max_tokens, [entry.prompt_index for entry in record.excluded], record.allow_teacher_mismatch) == (21, [5], True)
        ours, theirs = (StoreReader(url, teacher=teacher) for teacher in (name, "teacher"))
        assert len(ours) == len(theirs) == 23
        np.testing.assert_array_equal(ours.lengths, theirs.lengths)
        for index in range(len(ours)):
            left, right = ours.scores(index, name).logp, theirs.scores(index, "teacher").logp
            np.testing.assert_array_equal(np.isnan(left), np.isnan(right))
    scored = scored_of(url)
    wanted = at_once([(rollout.cut(len(scores.logp)), scores) for rollout, scores in scored], SMALL)
    for (rollout, scores), (_, made), b in zip(scored, scored_of(url, "less"), wanted, strict=True):
        start, end = rollout.prompt_len, len(scores.logp)
        np.testing.assert_allclose(made.logp[start:end], scores.logp[start:] - b, rtol=1e-6, atol=1e-6)


def test_folds_are_of_prompts() -> None:
    folds = [fold_of(prompt, folds=5, seed=0) for prompt in range(5000)]
    assert min(np.bincount(folds)) > 900
    assert folds != [fold_of(prompt, folds=5, seed=1) for prompt in range(5000)]
    assert folds[:10] == [fold_of(prompt, folds=5, seed=0) for prompt in range(10)]
