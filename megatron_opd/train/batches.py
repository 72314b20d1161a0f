"""From the store to packed micro-batches of this rank.

Legend: S packed tokens of a micro-batch (padding included), B sequences, N response tokens (the rows of the loss), K teacher candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch

from megatron_opd.data.context import context_parallel_tokens
from megatron_opd.data.order import TrainingOrder, cut_lengths
from megatron_opd.data.packing import plan_micro_batches
from megatron_opd.data.store import StoreReader
from megatron_opd.data.vocabulary import Vocabulary
from megatron_opd.errors import StoreError, UserError
from megatron_opd.hf.model_config import read_config
from megatron_opd.recipe.objective import Horizon
from megatron_opd.recipe.training_stages import TrainerConfig


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences and, for each response token, its row of the logits, its id and its stored log-probabilities.

    Under context parallelism: this rank's S of the S * cp tokens of the pack, and the response tokens whose rows are among them.
    """

    tokens: torch.Tensor  # int64 [1,S]
    positions: torch.Tensor  # int64 [1,S], restarting in each sequence
    cu_seqlens: torch.Tensor  # int32 [B+1], of the whole pack; the padding at the end is a sequence of its own
    rows: torch.Tensor  # int64 [N]: position t-1, whose logits predict tokens[t]
    labels: torch.Tensor  # int64 [N]
    response_positions: torch.Tensor  # int64 [N], from 0 in each response
    weights: torch.Tensor  # float32 [N]
    student_logp: torch.Tensor  # float32 [N], the sampler's, at temperature 1
    teacher_logp: torch.Tensor | None  # float32 [N]
    topk_ids: torch.Tensor | None  # int64 [N,K], the teacher's candidates
    topk_logp: torch.Tensor | None  # float32 [N,K]
    overlap_ids: torch.Tensor | None  # int64 [M,K]: the candidates of the first M response tokens, on which their overlap is measured
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

    @cached_property
    def counts(self) -> torch.Tensor:
        """float64 [3]: denominator, response tokens and sequences. It travels with the batch: a number that a step sends to a GPU is a wait."""
        return torch.tensor([self.denominator, len(self.rows), self.num_sequences], dtype=torch.float64, device=self.tokens.device)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is to be on the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"counts": self.counts}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device) -> MicroBatch:
        return self._with({name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()})

    def pinned(self) -> MicroBatch:
        """In page-locked memory, from where a GPU copies while the host goes on; for hosts with CUDA."""
        return self._with({name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    def _with(self, tensors: dict[str, torch.Tensor]) -> MicroBatch:
        counts = tensors.pop("counts")
        batch = replace(self, **tensors)
        vars(batch)["counts"] = counts
        return batch


# The overlap with the teacher's candidates is measured on the rollouts whose index is a multiple of this: reading candidates takes time.
OVERLAP_EVERY = 8
# Arrays of a micro-batch with an entry for each response token.
_PER_ROW = ("labels", "response_positions", "weights", "student_logp", "teacher_logp", "topk_ids", "topk_logp")


@dataclass(frozen=True)
class BatchSource:
    """Makes the micro-batches of any step (from `first_step` on) for one data-parallel rank; holds no position of its own.

    `quadratic_cost`: what attention adds to a sequence's cost, see data/packing.py.
    """

    reader: StoreReader
    config: TrainerConfig
    teacher: str | None
    sequence_mean: bool
    dp_rank: int
    dp_size: int
    pad_multiple: int
    quadratic_cost: float = 0.0
    topk: bool = False  # whether the loss needs the teacher's candidates
    cp_rank: int = 0
    first_step: int = 0  # steps of earlier rounds, which other stores had
    horizon: Horizon | None = None  # of the loss: what stands behind it is not read

    def __post_init__(self) -> None:
        config, reader = self.config, self.reader
        if len(reader) == 0:
            raise StoreError(f"{reader.location.url}: no rollouts in it")
        if fault := config.batch_fault(self.dp_size):
            raise UserError(fault)
        check_lengths(reader, config)

    @cached_property
    def order(self) -> TrainingOrder:
        return TrainingOrder.of(self.reader, self.config)

    @property
    def all_lengths(self) -> np.ndarray:
        """Tokens of every rollout after the cut that all steps have, int64."""
        return self.order.lengths

    @cached_property
    def num_candidates(self) -> int:
        """The teacher's candidates a position, 0 without any."""
        record = self.reader.score_manifest(next(iter(self.reader.parts)), self.teacher) if self.teacher else None
        return record.top_k if record else 0

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the student can look up and be trained on."""
        return Vocabulary(f"the student ({self.config.init})", read_config(self.config.init)["vocab_size"])

    def _measures_overlap(self, index: int) -> bool:
        return self.num_candidates > 0 and index % OVERLAP_EVERY == 0

    def lengths(self, rollouts: Sequence[int] | np.ndarray, step: int = 0) -> np.ndarray:
        """Tokens of these rollouts (global indices) as step `step` reads them, int64."""
        lengths = self.all_lengths[rollouts]
        if self.horizon is None:
            return lengths
        return np.minimum(lengths, self.reader.prompt_lens[rollouts].astype(np.int64) + self.horizon.at(step))

    def step_rollouts(self, step: int) -> np.ndarray:
        """Global indices of the rollouts of a step, int64 [n]."""
        return self.order.rollouts(step - self.first_step)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of a step."""
        rollouts = self.step_rollouts(step)
        lengths = self.lengths(rollouts, step)
        parallel = self.config.parallel
        plan = plan_micro_batches(
            lengths,
            num_ranks=self.dp_size,
            budget=self.config.micro_batch_tokens,
            quadratic=self.quadratic_cost,
            packing=self.config.packing,
            # Ranks that exchange tokens with each other's experts, and an interleaved pipeline, need a number of micro-batches.
            equal_counts=parallel.ep > 1,
            multiple=parallel.pp if parallel.vpp > 1 else 1,
        )
        return [self.build([int(rollouts[position]) for position in bin_], step) for bin_ in plan[self.dp_rank]]

    def build(self, rollouts: Sequence[int], step: int = 0) -> MicroBatch:
        """One micro-batch of these rollouts (global indices) for a step; of none, padding alone. Raises StoreError for what is missing or broken."""
        tokens, positions, rows, labels, places, weights, student, teacher, topk_ids, topk_logp = ([] for _ in range(10))
        overlap_ids: list[np.ndarray] = []
        lengths: list[int] = []  # with the padding that context parallelism needs in each sequence
        num_tokens = sum_squared_lengths = 0
        if self.topk:  # so that a micro-batch of padding alone has their shape, too
            topk_ids.append(np.empty((0, self.num_candidates), np.int32))
            topk_logp.append(np.empty((0, self.num_candidates), np.float32))
        cp = self.config.parallel.cp
        ordered = sorted(rollouts, key=lambda index: not self._measures_overlap(index))
        for index, length in zip(ordered, self.lengths(np.array(ordered, np.int64), step).tolist(), strict=True):
            rollout = self.reader.rollout(index)
            start = rollout.prompt_len
            self.vocabulary.check(rollout.tokens[:length], f"{self.reader.location.url}, rollout {index}", "use models of one tokenizer")
            offset = sum(lengths)
            padded = length if cp == 1 else -(-length // (2 * cp)) * 2 * cp
            tokens.append(np.pad(rollout.tokens[:length], (0, padded - length)))
            positions.append(np.arange(padded))
            rows.append(np.arange(start - 1, length - 1) + offset)
            labels.append(rollout.tokens[start:length])
            places.append(np.arange(length - start))
            weights.append(np.full(length - start, 1.0 / (length - start) if self.sequence_mean else 1.0))
            student.append(rollout.student_logp[start:length])
            if self.teacher is not None:
                measured = self._measures_overlap(index)
                scores = self.reader.scores(index, self.teacher, topk=self.topk or measured)
                try:
                    scores.check_against(rollout)
                except ValueError as error:
                    raise StoreError(f"{self.reader.location.url}, rollout {index}: {error}") from None
                teacher.append(scores.logp[start:length])
                if scores.topk_ids is not None and scores.topk_logp is not None:
                    if self.topk:
                        where = f"{self.reader.location.url}, rollout {index}, candidates of {self.teacher!r}"
                        self.vocabulary.check(scores.topk_ids[start:length], where, "score with a lower score.top_k")
                        topk_ids.append(scores.topk_ids[start:length])
                        topk_logp.append(scores.topk_logp[start:length])
                    if measured:
                        overlap_ids.append(scores.topk_ids[start:length])
            lengths.append(padded)
            num_tokens += length
            sum_squared_lengths += length * length
        padding = -sum(lengths) % self.pad_multiple if lengths else self.pad_multiple
        if padding:
            tokens.append(np.zeros(padding, np.int32))
            positions.append(np.arange(padding))
        num_rows = sum(len(piece) for piece in rows)
        batch = MicroBatch(
            tokens=_tensor(tokens, torch.int64)[None],
            positions=_tensor(positions, torch.int64)[None],
            cu_seqlens=torch.tensor(np.cumsum([0, *lengths, *([padding] if padding else [])]), dtype=torch.int32),
            rows=_tensor(rows, torch.int64),
            labels=_tensor(labels, torch.int64),
            response_positions=_tensor(places, torch.int64),
            weights=_tensor(weights, torch.float32),
            student_logp=_tensor(student, torch.float32),
            teacher_logp=_tensor(teacher, torch.float32) if self.teacher is not None else None,
            topk_ids=_tensor(topk_ids, torch.int64) if self.topk else None,
            topk_logp=_tensor(topk_logp, torch.float32) if self.topk else None,
            overlap_ids=_tensor(overlap_ids, torch.int64) if overlap_ids else None,
            denominator=len(rollouts) if self.sequence_mean else num_rows,
            max_seqlen=max([*lengths, padding]),
            num_sequences=len(rollouts),
            num_tokens=num_tokens,
            sum_squared_lengths=sum_squared_lengths,
        )
        return batch if cp == 1 else _context_parallel_part(batch, cp=cp, rank=self.cp_rank)


def _context_parallel_part(batch: MicroBatch, *, cp: int, rank: int) -> MicroBatch:
    """The rank's tokens of the pack and their rows; what is counted once a pack is counted by the first rank."""
    mine = torch.from_numpy(context_parallel_tokens(batch.cu_seqlens.numpy(), cp=cp, rank=rank))
    local = torch.full((batch.tokens.shape[1],), -1)
    local[mine] = torch.arange(len(mine))
    rows = local[batch.rows]
    kept = rows >= 0
    per_row = {name: getattr(batch, name) for name in _PER_ROW}
    overlap_ids = batch.overlap_ids
    return replace(
        batch,
        overlap_ids=None if overlap_ids is None else overlap_ids[kept[: len(overlap_ids)]],
        tokens=batch.tokens[:, mine],
        positions=batch.positions[:, mine],
        rows=rows[kept],
        **{name: value[kept] for name, value in per_row.items() if value is not None},
        denominator=batch.denominator if rank == 0 else 0,
        num_sequences=batch.num_sequences if rank == 0 else 0,
    )


def check_lengths(reader: StoreReader, config: TrainerConfig) -> None:
    """Raise UserError unless every rollout, cut as the recipe says, fits a micro-batch and keeps a token of its response."""
    url, budget = reader.location.url, config.micro_batch_tokens
    longest = int(cut_lengths(reader, config).max())
    if longest > budget:
        raise UserError(
            f"{url}: a rollout has {longest} tokens, over micro_batch_tokens = {budget}; raise it, or cut with max_response_tokens or overlong = 'cut'"
        )
    prompt = int(reader.prompt_lens.max())
    if prompt >= budget:
        raise UserError(f"{url}: a prompt has {prompt} tokens, which leaves no response in micro_batch_tokens = {budget}; raise it")


def _tensor(pieces: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pieces)).to(dtype) if pieces else torch.empty(0, dtype=dtype)
