"""What is asked of an SGLang server, and its answers checked against that (as SGLang 0.5.23 answers).

Legend: R response tokens, T tokens of a sequence, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pybase64

from megatron_opd.records import LOGP_EPSILON, LOGP_FLOOR, Finish, TeacherScores, check_logp
from megatron_opd.serve.engine import ScoreRequest


class WrongAnswer(Exception):
    """An answer that is not what was asked for: aborted, empty, short, of other tokens, or with values that are no log-probs."""


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


def read_generated(
    answer: dict[str, Any], *, vocab_size: int, max_new_tokens: int, stop_ids: Sequence[int] | None, with_logp: bool
) -> tuple[np.ndarray, np.ndarray | None, Finish]:
    """Tokens int32 [R], log-probs float32 [R] if `with_logp`, and finish of a generate answer. Raises WrongAnswer.

    `stop_ids`: where the response must end; None if the server was told to go on behind them.
    """
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        tokens = np.array(answer["output_ids"], np.int32)
        if reason["type"] == "abort":
            raise WrongAnswer(f"the server aborted the request: {reason.get('message')}")
        if len(tokens) == 0:
            raise WrongAnswer(f"the server gave an empty answer (finish reason {reason['type']})")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise WrongAnswer(
                f"the server sampled token ids from {int(tokens.min())} to {int(tokens.max())} in a vocabulary of {vocab_size}"
            )
        if reason["type"] == "stop":
            finish = Finish.STOP
            if isinstance(reason["matched"], str):  # no stop strings are ever sent: this is how the server reports "NaN happened"
                raise WrongAnswer(f"the server ended the response with {reason['matched']!r}; look into its log")
        elif reason["type"] == "length":
            finish = Finish.LENGTH
            if len(tokens) != max_new_tokens:
                raise WrongAnswer(
                    f"the server cut the response after {len(tokens)} of {max_new_tokens} tokens; does it limit max_new_tokens?"
                )
        else:
            raise WrongAnswer(f"unknown finish reason {reason['type']!r}")
        if stop_ids is not None:
            _check_ending(tokens, finish, stop_ids)
        if not with_logp:
            return tokens, None, finish
        logp, echoed = _read_entries(meta["output_token_logprobs"])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise WrongAnswer(f"the answer is not understood: {error!r}") from error
    if not np.array_equal(echoed, tokens):
        raise WrongAnswer(f"log-probabilities of {len(echoed)} tokens that are not the {len(tokens)} sampled ones")
    _check_logp(logp, 0)
    return tokens, logp, finish


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
        if meta["finish_reason"]["type"] == "abort":
            raise WrongAnswer(f"the server aborted the request: {meta['finish_reason'].get('message')}")
        entries = meta["input_token_logprobs"]
        if len(entries) != T - start + 1:
            raise WrongAnswer(f"{len(entries)} entries for positions {start - 1} to {T - 1}")
        values, echoed = _read_entries(entries)
        candidates = _read_topk(meta) if top_k else None
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise WrongAnswer(f"the answer is not understood: {error!r}") from error
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
    low, high = logp_RK.min(), logp_RK.max()  # of NaN they are NaN, and no comparison holds
    if ids_RK.min() < 0 or ids_RK.max() >= vocab_size or not (low >= LOGP_FLOOR and high <= LOGP_EPSILON):
        raise WrongAnswer(f"top-k candidates with ids outside the vocabulary, or values from {low} to {high} that are no log-probabilities")
    topk_ids, topk_logp = np.empty((T, top_k), np.int32), np.empty((T, top_k), np.float32)
    topk_ids[:start], topk_logp[:start] = -1, np.nan
    topk_ids[start:], topk_logp[start:] = ids_RK, logp_RK
    return TeacherScores(logp, topk_ids, topk_logp)


def _read_entries(entries: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """[[log-prob or null, token id, text or null], ...] as float32 (NaN for null) and int64 arrays."""
    return np.array([entry[0] for entry in entries], np.float32), np.array([entry[1] for entry in entries], np.int64)


def _read_topk(meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates' ids int32 [R,K] and log-probs float32 [R,K]: flat arrays, or lists where the server falls back to those."""
    if "input_top_logprobs_val_flat_b64" in meta:
        dtypes = (meta["input_top_logprobs_idx_flat_b64_dtype"], meta["input_top_logprobs_val_flat_b64_dtype"])
        if dtypes != ("int32", "float32"):
            raise WrongAnswer(f"top-k arrays of dtypes {dtypes}, not int32 and float32")
        ids = np.frombuffer(pybase64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), "<i4")
        logp = np.frombuffer(pybase64.b64decode(meta["input_top_logprobs_val_flat_b64"]), "<f4")
        shape = meta["input_top_logprobs_shape"]
        return ids.reshape(shape), logp.reshape(shape)
    rows = [row for row in meta["input_top_logprobs"] if row is not None]
    return np.array([[entry[1] for entry in row] for row in rows], np.int32), np.array(
        [[entry[0] for entry in row] for row in rows], np.float32
    )


def _check_logp(logp: np.ndarray, start: int) -> None:
    try:
        check_logp(logp, "the server's logp", start)
    except ValueError as error:
        raise WrongAnswer(str(error)) from None
