"""Stores as Arrow tables: a row for each rollout, or for each response token.

Legend: n rollouts, R response tokens of all of them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from megatron_opd.records import Finish

if TYPE_CHECKING:
    from megatron_opd.api.store import Store, StoredRollout

_NAMES = [finish.name.lower() for finish in Finish]  # a finish is its place here


def rollout_table(store: Store, *, text: bool) -> pa.Table:
    """One row a rollout. Scores that are not there are null."""
    rollouts = list(store)
    columns: dict[str, Any] = {
        **_names(store),
        "finish": _finishes(store.finishes),
        "num_prompt_tokens": store.prompt_lens,
        "num_response_tokens": store.response_lens,
        "prompt_ids": _lists([rollout.prompt_ids for rollout in rollouts], pa.int32()),
        "response_ids": _lists([rollout.response_ids for rollout in rollouts], pa.int32()),
        "student_logp": _lists([rollout.student_logp for rollout in rollouts], pa.float32()),
    }
    for teacher in _teachers(store):
        advantages = [_advantage(rollout, teacher) for rollout in rollouts]
        means = [None if advantage is None else float(advantage.mean(dtype=np.float64)) for advantage in advantages]
        columns[f"advantage_{teacher}"] = _lists(advantages, pa.float32())
        columns[f"mean_advantage_{teacher}"] = pa.array(means, pa.float64())
    if text:
        columns["prompt"] = pa.array([rollout.text("prompt") for rollout in rollouts], pa.large_string())
        columns["response"] = pa.array([rollout.text() for rollout in rollouts], pa.large_string())
    return _table(store, columns)


def token_table(store: Store, *, text: bool) -> pa.Table:
    """One row a response token; `position` counts from 0 at the first token of the response."""
    rollouts = list(store)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    ids = _concat([rollout.response_ids for rollout in rollouts], np.int32)
    columns: dict[str, Any] = {
        **{name: np.repeat(values, lengths) for name, values in _names(store).items()},
        "position": _concat([np.arange(length) for length in lengths], np.int32),
        "token_id": ids,
        "student_logp": _concat([rollout.student_logp for rollout in rollouts], np.float32),
    }
    for teacher in _teachers(store):
        advantages = [_filled(_advantage(rollout, teacher), length) for rollout, length in zip(rollouts, lengths, strict=True)]
        advantage = _concat(advantages, np.float32)
        columns[f"advantage_{teacher}"] = pa.array(advantage, mask=np.isnan(advantage))
    if text:
        known = {number: store.tokenizer.decode([number], clean_up_tokenization_spaces=False) for number in np.unique(ids).tolist()}
        columns["token"] = pa.array([known[number] for number in ids.tolist()], pa.string())
    return _table(store, columns)


def _names(store: Store) -> dict[str, np.ndarray]:
    return {"rollout": store.indices, "prompt_index": store.prompt_indices, "sample_index": store.sample_indices}


def _teachers(store: Store) -> list[str]:
    """Those whose scores can be read; which are left out is said."""
    stale = store.stale_teachers
    for name, fault in stale.items():
        warnings.warn(
            f"{store.reader.location.url}: no columns of the derived teacher {name!r}, which is stale: {fault}; make it again: 'megatron-opd derive'",
            stacklevel=4,
        )
    return [name for name in store.teachers if name not in stale]


def _advantage(rollout: StoredRollout, teacher: str) -> np.ndarray | None:
    """None where `teacher` did not score the rollout."""
    return rollout.advantage(teacher) if teacher in rollout.teachers else None


def _filled(values: np.ndarray | None, length: int) -> np.ndarray:
    """`values` with NaN behind them, float32 [length]."""
    result = np.full(length, np.nan, np.float32)
    if values is not None:
        result[: len(values)] = values
    return result


def _finishes(codes: np.ndarray) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int8)), pa.array(_NAMES))


def _lists(arrays: list[np.ndarray] | list[np.ndarray | None], kind: pa.DataType) -> pa.LargeListArray:
    """A list a rollout, null where there is none."""
    lengths = [0 if array is None else len(array) for array in arrays]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int64())
    values = pa.array(_concat([array for array in arrays if array is not None], kind.to_pandas_dtype()), kind)
    missing = pa.array([array is None for array in arrays], pa.bool_())
    return pa.LargeListArray.from_arrays(offsets, values, mask=missing)


def _concat(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)


def _table(store: Store, columns: dict[str, Any]) -> pa.Table:
    """With the store's address and identity as metadata, so that a file of it says where its numbers are from."""
    said = {"opd_store": store.reader.location.url, "opd_store_id": store.reader.store_id}
    return pa.table(columns).replace_schema_metadata(said)
