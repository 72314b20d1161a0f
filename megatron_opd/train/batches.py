"""From the store to packed micro-batches of this rank.

Legend: S packed tokens of a micro-batch (padding included), B sequences, N response tokens (the rows of the loss), K teacher candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from megatron_opd.config import TrainerConfig
from megatron_opd.data.order import step_rollouts
from megatron_opd.data.packing import pack, split_over_ranks
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import StoreError, UserError


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences and, for each response token, its row of the logits, its id and its stored log-probabilities."""

    tokens: torch.Tensor  # int64 [1,S]
    positions: torch.Tensor  # int64 [1,S], restarting in each sequence
    cu_seqlens: torch.Tensor  # int32 [B+1], the padding at the end is a sequence of its own
    rows: torch.Tensor  # int64 [N]: position t-1, whose logits predict tokens[t]
    labels: torch.Tensor  # int64 [N]
    weights: torch.Tensor  # float32 [N]
    student_logp: torch.Tensor  # float32 [N], the sampler's, at temperature 1
    teacher_logp: torch.Tensor | None  # float32 [N]
    topk_ids: torch.Tensor | None  # int64 [N,K], the teacher's candidates
    topk_logp: torch.Tensor | None  # float32 [N,K]
    denominator: int  # this micro-batch's share of the global denominator
    max_seqlen: int
    num_sequences: int
    num_tokens: int  # without padding
    sum_squared_lengths: int

    @property
    def loss_ids(self) -> torch.Tensor:
        """Ids whose log-probabilities the loss needs, int64 [N,1+K]: the sampled token and the teacher's candidates."""
        if self.topk_ids is None or not len(self.labels):  # nothing tells K of no tokens
            return self.labels[:, None]
        return torch.cat([self.labels[:, None], self.topk_ids], 1)

    def to(self, device: torch.device) -> MicroBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, torch.Tensor)}
        )


@dataclass(frozen=True)
class BatchSource:
    """Makes the micro-batches of any step for one data-parallel rank; holds no position of its own."""

    reader: StoreReader
    config: TrainerConfig
    teacher: str | None
    sequence_mean: bool
    dp_rank: int
    dp_size: int
    pad_multiple: int
    topk: bool = False  # whether the loss needs the teacher's candidates

    def __post_init__(self) -> None:
        config, reader = self.config, self.reader
        if len(reader) == 0:
            raise StoreError(f"{reader.location.url}: no rollouts in it")
        if config.global_batch < self.dp_size:
            raise UserError(f"global_batch {config.global_batch} is smaller than {self.dp_size} data-parallel ranks")
        longest = int(self.lengths(np.arange(len(reader))).max())
        if longest > config.micro_batch_tokens:
            raise UserError(
                f"{reader.location.url}: a rollout has {longest} tokens, over micro_batch_tokens = {config.micro_batch_tokens}; raise it, or cut with max_response_tokens"
            )

    def lengths(self, rollouts: np.ndarray) -> np.ndarray:
        """Tokens of each rollout after the cut, int64."""
        lengths = self.reader.lengths[rollouts]
        cut = self.config.max_response_tokens
        return lengths if cut is None else np.minimum(lengths, self.reader.prompt_lens[rollouts].astype(np.int64) + cut)

    def step_rollouts(self, step: int) -> np.ndarray:
        """Global indices of the rollouts of a step, int64 [global_batch]."""
        return step_rollouts(step, len(self.reader), global_batch=self.config.global_batch, seed=self.config.seed)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of a step."""
        rollouts = self.step_rollouts(step)
        lengths = self.lengths(rollouts)
        mine = split_over_ranks(lengths.tolist(), self.dp_size)[self.dp_rank]
        bins = pack(lengths[mine].tolist(), self.config.micro_batch_tokens, packing=self.config.packing)
        return [self.build([int(rollouts[mine[position]]) for position in bin_]) for bin_ in bins]

    def build(self, rollouts: Sequence[int]) -> MicroBatch:
        """One micro-batch of these rollouts (global indices). Raises StoreError for what is missing or broken."""
        tokens, positions, rows, labels, weights, student, teacher, topk_ids, topk_logp = ([] for _ in range(9))
        lengths: list[int] = []
        for index in rollouts:
            rollout = self.reader.rollout(index)
            length, start = int(self.lengths(np.array([index]))[0]), rollout.prompt_len
            offset = sum(lengths)
            tokens.append(rollout.tokens[:length])
            positions.append(np.arange(length))
            rows.append(np.arange(start - 1, length - 1) + offset)
            labels.append(rollout.tokens[start:length])
            weights.append(np.full(length - start, 1.0 / (length - start) if self.sequence_mean else 1.0))
            student.append(rollout.student_logp[start:length])
            if self.teacher is not None:
                scores = self.reader.scores(index, self.teacher, topk=self.topk)
                try:
                    scores.check_against(rollout)
                except ValueError as error:
                    raise StoreError(f"{self.reader.location.url}, rollout {index}: {error}") from None
                teacher.append(scores.logp[start:length])
                if scores.topk_ids is not None and scores.topk_logp is not None:
                    topk_ids.append(scores.topk_ids[start:length])
                    topk_logp.append(scores.topk_logp[start:length])
            lengths.append(length)
        num_tokens = sum(lengths)
        padding = -num_tokens % self.pad_multiple
        if padding:
            tokens.append(np.zeros(padding, np.int32))
            positions.append(np.arange(padding))
        num_rows = sum(len(piece) for piece in rows)
        return MicroBatch(
            tokens=_tensor(tokens, torch.int64)[None],
            positions=_tensor(positions, torch.int64)[None],
            cu_seqlens=torch.tensor(np.cumsum([0, *lengths, *([padding] if padding else [])]), dtype=torch.int32),
            rows=_tensor(rows, torch.int64),
            labels=_tensor(labels, torch.int64),
            weights=_tensor(weights, torch.float32),
            student_logp=_tensor(student, torch.float32),
            teacher_logp=_tensor(teacher, torch.float32) if self.teacher is not None else None,
            topk_ids=_tensor(topk_ids, torch.int64) if self.topk else None,
            topk_logp=_tensor(topk_logp, torch.float32) if self.topk else None,
            denominator=len(rollouts) if self.sequence_mean else num_rows,
            max_seqlen=max([*lengths, padding]),
            num_sequences=len(rollouts),
            num_tokens=num_tokens,
            sum_squared_lengths=sum(length * length for length in lengths),
        )


def _tensor(pieces: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces)).to(dtype)
