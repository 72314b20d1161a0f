"""What is asked of an SGLang server, and its answers checked against that (as SGLang 0.5.23 answers).

Every request has an id of its own (`rid`), which its answer repeats: an answer to another request, or to an earlier attempt, is known by it.

Legend: R response tokens, T tokens of a sequence, K candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pybase64

from megatron_opd.records import Finish, TeacherScores
from megatron_opd.serve.engine import ScoreRequest
from megatron_opd.serve.http import said

# No finite logit of a real model is so far below the others; SGLang writes the lowest finite number for -inf.
LOWEST_LOGP = -1000.0
# A log-prob of a token and that of the same token among the candidates are one number. What is allowed is far below what could mislead.
SAME_NATS = 1e-3
# Log-softmax of bfloat16 logits rounds each value to 8 bits; their probabilities may sum up to a little more than one.
MASS_OVER_ONE = 0.02
# Bytes of an answer: of a token its id, its log-prob, its text (a run of 256 spaces is one token); of a candidate the same without the text.
_BYTES_ANYWAY, _BYTES_A_TOKEN, _BYTES_A_CANDIDATE = 1 << 18, 512, 64
_NOT_UNDERSTOOD = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)


class WrongAnswer(Exception):
    """An answer that is not what was asked for: of another request, aborted, empty, short, of other tokens, or with values that are no log-probs."""


def score_body(request: ScoreRequest, top_k: int) -> dict[str, Any]:
    """The request that scores `request.tokens` from `request.start` on."""
    body: dict[str, Any] = {
        "input_ids": np.ascontiguousarray(request.tokens),
        "return_logprob": True,
        # Entry 0 of the answer belongs to this position and has no value.
        "logprob_start_len": request.start - 1,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
    }
    if top_k:
        body |= {"top_logprobs_num": top_k, "return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
    return body


def largest_answer(body: dict[str, Any]) -> int:
    """Bytes that an answer to this request has at most."""
    tokens = len(body["input_ids"]) + body["sampling_params"]["max_new_tokens"]
    return _BYTES_ANYWAY + tokens * (_BYTES_A_TOKEN + body.get("top_logprobs_num", 0) * _BYTES_A_CANDIDATE)


def check_answers(answer: dict[str, Any], rid: str, num_tokens: int) -> None:
    """Raise WrongAnswer unless this is an answer to the request `rid` with its `num_tokens` tokens, and not an abort."""
    meta = answer.get("meta_info")
    if not isinstance(meta, dict):
        raise WrongAnswer("the answer has no meta_info")
    if meta.get("id") != rid:
        raise WrongAnswer(f"the answer is to the request {said(meta.get('id'), 60)}, but this was {rid}")
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict):
        raise WrongAnswer(f"the finish reason is {said(reason, 60)}")
    if reason.get("type") == "abort":
        raise WrongAnswer(f"the server aborted the request: {said(reason.get('message'))}")
    if reason.get("type") not in ("stop", "length"):
        raise WrongAnswer(f"unknown finish reason {said(reason.get('type'), 60)!r}")
    have = meta.get("prompt_tokens")
    if type(have) is not int or have != num_tokens:
        raise WrongAnswer(f"the server read a prompt of {said(have, 60)} tokens, but {num_tokens} were sent")


def read_generated(
    answer: dict[str, Any], *, vocab_size: int, max_new_tokens: int, stop_ids: Sequence[int] | None, with_logp: bool
) -> tuple[np.ndarray, np.ndarray | None, Finish]:
    """Tokens int32 [R], log-probs float32 [R] if `with_logp`, and finish of a generate answer. Raises WrongAnswer.

    `stop_ids`: where the response must end; None if the server was told to go on behind them.
    """
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        tokens = _integers(answer["output_ids"])
        if len(tokens) == 0:
            raise WrongAnswer(f"the server gave an empty answer (finish reason {said(reason['type'], 60)})")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise WrongAnswer(
                f"the server sampled token ids from {int(tokens.min())} to {int(tokens.max())} in a vocabulary of {vocab_size}"
            )
        if len(tokens) > max_new_tokens:
            raise WrongAnswer(f"the server sampled {len(tokens)} tokens, but {max_new_tokens} were to be the most")
        finish = Finish.STOP if reason["type"] == "stop" else Finish.LENGTH
        if finish is Finish.LENGTH and len(tokens) == max_new_tokens and stop_ids is not None and tokens[-1] in stop_ids:
            finish = Finish.STOP  # at its last token both hold; which one a server names depends on its version
        if reason["type"] == "stop":
            if isinstance(reason["matched"], str):  # no stop strings are ever sent: this is how the server reports "NaN happened"
                raise WrongAnswer(f"the server ended the response with {said(reason['matched'])!r}; look into its log")
        elif len(tokens) != max_new_tokens:
            raise WrongAnswer(f"the server cut the response after {len(tokens)} of {max_new_tokens} tokens; does it limit max_new_tokens?")
        if stop_ids is not None:
            _check_ending(tokens, finish, stop_ids)
        elif finish is Finish.STOP:
            raise WrongAnswer("the server ended a response that was to go on behind stop ids")
        if not with_logp:
            return tokens.astype(np.int32), None, finish
        logp, echoed = _read_entries(meta["output_token_logprobs"])
    except _NOT_UNDERSTOOD as error:
        raise WrongAnswer(f"the answer is not understood: {said(repr(error), 200)}") from error
    if not np.array_equal(echoed, tokens):
        raise WrongAnswer(f"log-probabilities of {len(echoed)} tokens that are not the {len(tokens)} sampled ones")
    _check_logp(logp, 0)
    return tokens.astype(np.int32), logp, finish


def _check_ending(tokens: np.ndarray, finish: Finish, stop_ids: Sequence[int]) -> None:
    """Raise WrongAnswer unless the response ends at its first stop id, and has one if the server says that it stopped."""
    stops = np.flatnonzero(np.isin(tokens, stop_ids))
    first = int(stops[0]) if stops.size else len(tokens)
    if first != (len(tokens) - 1 if finish is Finish.STOP else len(tokens)):
        where = f"token {first + 1} of {len(tokens)} is one" if stops.size else "it holds none"
        raise WrongAnswer(f"the server ended the response by {finish.name.lower()}, but of the stop ids {list(stop_ids)} {where}")


def read_scores(answer: dict[str, Any], request: ScoreRequest, *, vocab_size: int, top_k: int) -> TeacherScores:
    """Scores of `request`, aligned with its tokens. Raises WrongAnswer if the answer is not for these tokens or not complete."""
    T, start = len(request.tokens), request.start
    try:
        meta = answer["meta_info"]
        entries = meta["input_token_logprobs"]
        if len(entries) != T - start + 1:
            raise WrongAnswer(f"{len(entries)} entries for positions {start - 1} to {T - 1}")
        values, echoed = _read_entries(entries)
        candidates = _read_topk(meta) if top_k else None
    except _NOT_UNDERSTOOD as error:
        raise WrongAnswer(f"the answer is not understood: {said(repr(error), 200)}") from error
    sent = request.tokens[start - 1 :]
    # The server labels id vocab_size - 1 as 0; its value is right.
    wrong = np.flatnonzero((echoed != sent) & ~((sent == vocab_size - 1) & (echoed == 0)))
    if wrong.size:
        raise WrongAnswer(
            f"position {start - 1 + int(wrong[0])} holds token {int(sent[wrong[0]])}, but the server scored token {int(echoed[wrong[0]])}"
        )
    logp = np.full(T, np.nan, np.float32)
    logp[start:] = values[1:]
    _check_logp(logp, start)
    if candidates is None:
        return TeacherScores(logp)
    ids_RK, logp_RK = candidates
    if ids_RK.shape != (T - start, top_k) or logp_RK.shape != ids_RK.shape:
        raise WrongAnswer(f"top-k arrays of shapes {ids_RK.shape} and {logp_RK.shape} for {T - start} positions and top_k {top_k}")
    _check_candidates(ids_RK, logp_RK, sent[1:], logp[start:], vocab_size)
    topk_ids, topk_logp = np.empty((T, top_k), np.int32), np.empty((T, top_k), np.float32)
    topk_ids[:start], topk_logp[:start] = -1, np.nan
    topk_ids[start:], topk_logp[start:] = ids_RK, logp_RK
    return TeacherScores(logp, topk_ids, topk_logp)


def _check_candidates(ids_RK: np.ndarray, logp_RK: np.ndarray, tokens_R: np.ndarray, logp_R: np.ndarray, vocab_size: int) -> None:
    """Raise WrongAnswer unless each row is the start of one distribution, highest first, in which the scored token has its log-prob."""
    low, high = logp_RK.min(), logp_RK.max()  # of NaN they are NaN, and no comparison holds
    if ids_RK.min() < 0 or ids_RK.max() >= vocab_size or not (low >= LOWEST_LOGP and high <= 0):
        raise WrongAnswer(f"top-k candidates with ids outside the vocabulary, or values from {low} to {high} that are no log-probabilities")
    if (np.diff(logp_RK, axis=1) > 0).any():
        raise WrongAnswer("top-k candidates that are not in order, the likeliest first")
    if (np.diff(np.sort(ids_RK, axis=1), axis=1) == 0).any():
        raise WrongAnswer("the same top-k candidate twice at a position")
    own_RK = ids_RK == tokens_R[:, None]
    if (np.abs(logp_RK - logp_R[:, None]) > SAME_NATS)[own_RK].any():
        raise WrongAnswer("a token has another log-probability among the top-k candidates than by itself")
    absent_R = ~own_RK.any(axis=1)
    if (absent_R & (logp_R > logp_RK[:, -1] + SAME_NATS)).any():
        raise WrongAnswer("a token is likelier than top-k candidates, but none of them")
    mass_R = np.exp(logp_RK, dtype=np.float64).sum(axis=1) + absent_R * np.exp(logp_R, dtype=np.float64)
    if mass_R.max() > 1 + MASS_OVER_ONE:
        raise WrongAnswer(f"top-k candidates whose probabilities sum up to {mass_R.max():.4g}")


def _read_entries(entries: Any) -> tuple[np.ndarray, np.ndarray]:
    """[[log-prob or null, token id, text or null], ...] as float32 (NaN for null) and int64 arrays."""
    return _numbers([entry[0] for entry in entries]), _integers([entry[1] for entry in entries])


def _read_topk(meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates' ids [R,K] and log-probs float32 [R,K]: flat arrays, or lists where the server falls back to those."""
    if "input_top_logprobs_val_flat_b64" in meta:
        dtypes = (meta["input_top_logprobs_idx_flat_b64_dtype"], meta["input_top_logprobs_val_flat_b64_dtype"])
        if dtypes != ("int32", "float32"):
            raise WrongAnswer(f"top-k arrays of dtypes {said(dtypes, 100)}, not int32 and float32")
        ids = np.frombuffer(pybase64.b64decode(meta["input_top_logprobs_idx_flat_b64"], validate=True), "<i4")
        logp = np.frombuffer(pybase64.b64decode(meta["input_top_logprobs_val_flat_b64"], validate=True), "<f4")
        shape = meta["input_top_logprobs_shape"]
        return ids.reshape(shape), logp.reshape(shape)
    pairs = [_read_entries(row) for row in meta["input_top_logprobs"][1:]]  # the first position has none
    return np.array([ids for _, ids in pairs]), np.array([logp for logp, _ in pairs])


def _integers(values: Any) -> np.ndarray:
    """int64 array of a list of JSON integers. Raises WrongAnswer for anything else: NumPy would take "5", 5.7 and true for integers."""
    _check_types(values, {int})
    return np.array(values, np.int64)


def _numbers(values: list[Any]) -> np.ndarray:
    """float32 array of a list of JSON numbers and nulls (NaN). Raises WrongAnswer for anything else."""
    _check_types(values, {int, float, type(None)})
    with np.errstate(over="ignore"):  # infinite, which is no log-probability
        return np.array(values, np.float64).astype(np.float32)


def _check_types(values: Any, wanted: Collection[type]) -> None:
    if type(values) is not list:
        raise WrongAnswer(f"a {type(values).__name__} where a list of numbers belongs")
    if odd := set(map(type, values)).difference(wanted):
        raise WrongAnswer(f"a {', '.join(sorted(kind.__name__ for kind in odd))} where a number belongs")


def _check_logp(logp: np.ndarray, start: int) -> None:
    """Raise WrongAnswer unless log-probs stand from `start` on. SGLang's never exceed 0: a log-softmax subtracts the log of a sum that is at least one."""
    bad = np.flatnonzero(~((logp[start:] >= LOWEST_LOGP) & (logp[start:] <= 0)))  # NaN is neither
    if bad.size:
        t = start + int(bad[0])
        raise WrongAnswer(f"the server's logp[{t}] is {logp[t]}, not a log-probability ({bad.size} such positions)")
