"""What the answers of an SGLang server say, checked against what was asked (as SGLang 0.5.23 answers).

Legend: R response tokens, T tokens of a sequence, K candidates.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from megatron_opd.errors import EngineError
from megatron_opd.records import Finish, TeacherScores, check_logp
from megatron_opd.serve.engine import ScoreRequest


class PassingFailure(Exception):
    """A request failed for a reason that may pass: no connection, no answer in time, a 5xx, an aborted or empty answer."""


def read_generated(
    answer: dict[str, Any], *, vocab_size: int, max_new_tokens: int, with_logp: bool
) -> tuple[np.ndarray, np.ndarray | None, Finish]:
    """Tokens int32 [R], log-probs float32 [R] if `with_logp`, and finish of a generate answer. Raises EngineError, PassingFailure."""
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    tokens = np.asarray(answer["output_ids"], np.int32)
    if reason["type"] == "abort":
        raise PassingFailure(f"the server aborted the request: {reason.get('message')}")
    if len(tokens) == 0:
        raise PassingFailure(f"the server gave an empty answer (finish reason {reason['type']})")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise EngineError(f"the server sampled token ids from {int(tokens.min())} to {int(tokens.max())} in a vocabulary of {vocab_size}")
    if reason["type"] == "stop":
        finish = Finish.STOP
        if isinstance(reason["matched"], str):  # no stop strings are ever sent: this is how the server reports "NaN happened"
            raise EngineError(f"the server ended the response with {reason['matched']!r}; look into its log")
    elif reason["type"] == "length":
        finish = Finish.LENGTH
        if len(tokens) != max_new_tokens:
            raise EngineError(f"the server cut the response after {len(tokens)} of {max_new_tokens} tokens; does it limit max_new_tokens?")
    else:
        raise EngineError(f"unknown finish reason {reason['type']!r}")
    if not with_logp:
        return tokens, None, finish
    entries = meta["output_token_logprobs"]
    if [entry[1] for entry in entries] != tokens.tolist():
        raise EngineError(f"log-probabilities of {len(entries)} tokens that are not the {len(tokens)} sampled ones")
    logp = np.array([entry[0] for entry in entries], np.float32)
    _check_logp(logp, 0)
    return tokens, logp, finish


def read_scores(answer: dict[str, Any], request: ScoreRequest, *, vocab_size: int, top_k: int) -> TeacherScores:
    """Scores of `request`, aligned with its tokens. Raises EngineError if the answer is not for these tokens or not complete."""
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise PassingFailure(f"the server aborted the request: {meta['finish_reason'].get('message')}")
    T, start = len(request.tokens), request.start
    entries = meta["input_token_logprobs"]
    if len(entries) != T - start + 1:
        raise EngineError(f"{len(entries)} entries for positions {start - 1} to {T - 1}")
    sent = request.tokens[start - 1 :]
    echoed = np.array([entry[1] for entry in entries], np.int64)
    # The server labels id vocab_size - 1 as 0; its value is right.
    wrong = np.flatnonzero((echoed != sent) & ~((sent == vocab_size - 1) & (echoed == 0)))
    if wrong.size:
        raise EngineError(
            f"position {start - 1 + int(wrong[0])} holds token {int(sent[wrong[0]])}, but the server scored token {int(echoed[wrong[0]])}"
        )
    logp = np.full(T, np.nan, np.float32)
    logp[start:] = np.array([entry[0] for entry in entries[1:]], np.float32)
    _check_logp(logp, start)
    if not top_k:
        return TeacherScores(logp)
    ids_RK, logp_RK = _read_topk(meta)
    if ids_RK.shape != (T - start, top_k) or logp_RK.shape != ids_RK.shape:
        raise EngineError(f"top-k arrays of shapes {ids_RK.shape} and {logp_RK.shape} for {T - start} positions and top_k {top_k}")
    if ids_RK.min() < 0 or ids_RK.max() >= vocab_size or not np.isfinite(logp_RK).all():
        raise EngineError("top-k candidates with ids outside the vocabulary or log-probabilities that are not finite")
    unscored = np.full((start, top_k), np.nan, np.float32)
    return TeacherScores(logp, np.concatenate([np.full(unscored.shape, -1, np.int32), ids_RK]), np.concatenate([unscored, logp_RK]))


def _read_topk(meta: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Candidates' ids int32 [R,K] and log-probs float32 [R,K]: flat arrays, or lists where the server falls back to those."""
    if "input_top_logprobs_val_flat_b64" in meta:
        dtypes = (meta["input_top_logprobs_idx_flat_b64_dtype"], meta["input_top_logprobs_val_flat_b64_dtype"])
        if dtypes != ("int32", "float32"):
            raise EngineError(f"top-k arrays of dtypes {dtypes}, not int32 and float32")
        ids = np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), "<i4")
        logp = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), "<f4")
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
        raise EngineError(str(error)) from None
