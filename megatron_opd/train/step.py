"""One optimizer step over this rank's micro-batches, through Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_opd.model.architecture import Architecture
from megatron_opd.model.student import Student
from megatron_opd.records import LOSS_SUM_NAMES, LossSums
from megatron_opd.train.batches import MicroBatch
from megatron_opd.train.drift import Watch, Watched
from megatron_opd.train.feed import feeds
from megatron_opd.train.loss import LossFunction, Stored, pack_sums
from megatron_opd.train.optim import Trainee
from megatron_opd.train.pipeline import known_shapes
from megatron_opd.train.update import update

_WATCH = Watch()


@dataclass(frozen=True)
class StepResult:
    """Sums over the global batch, the gradient norm before clipping, and the learning rate.

    `skipped`: loss or gradient was not finite; neither weights nor optimizer were touched.
    """

    sums: LossSums
    watched: Watched
    grad_norm: float
    learning_rate: float
    skipped: bool


def train_step(
    trainee: Trainee,
    arch: Architecture,
    loss: LossFunction,
    micro_batches: list[MicroBatch],
    *,
    seed: int,
    chunk_tokens: int | None = None,
    watch: Watch = _WATCH,
) -> StepResult:
    """Forward, backward, reduction, optimizer. `seed` restarts the random state, so that a step depends on nothing before it.

    micro_batches: on the device, or where `MicroBatch.pinned` puts them: they are then copied while the ones before them compute.
    """
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    sums = forward_backward(trainee.chunks, arch, loss, micro_batches, chunk_tokens=chunk_tokens, watch=watch)
    learning_rate = _learning_rate(trainee)
    values, grad_norm, skipped = update(trainee.optimizer, sums)
    trainee.scheduler.step(increment=1)  # the rate is a function of the step's number, skipped or not
    n = len(LOSS_SUM_NAMES)
    return StepResult(LossSums(*values[:n]), Watched.of(values[n:]), grad_norm, learning_rate, skipped)


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    loss: LossFunction,
    micro_batches: list[MicroBatch],
    *,
    chunk_tokens: int | None = None,
    forward_only: bool = False,
    watch: Watch = _WATCH,
) -> torch.Tensor:
    """Gradients into `main_grad` (divided by the global denominator), and the sums on every rank.

    The sums are float64 [len(LOSS_SUM_NAMES) + watch.num_sums].
    chunk_tokens: response tokens whose logits are held at once (None: all of a micro-batch).
    """
    device = next(chunks[0].parameters()).device
    lengths = [batch.tokens.shape[1] for batch in micro_batches]
    with (
        torch.set_grad_enabled(not forward_only),  # the head makes its gradients in the forward pass
        known_shapes(lengths, get_model_config(chunks[0]), num_chunks=len(chunks), forward_only=forward_only),
    ):
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, arch=arch, loss=loss, chunk_tokens=chunk_tokens, watch=watch),
            data_iterator=feeds(micro_batches, device, num_chunks=len(chunks)),
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=max(lengths),
            micro_batch_size=1,
            forward_only=forward_only,
        )
    sums = torch.zeros(len(LOSS_SUM_NAMES) + watch.num_sums, dtype=torch.float64, device=device)
    if outputs:  # on the last stage
        sums += torch.stack([output["sums"] for output in outputs]).sum(0)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return sums


def _forward_step(
    batches: Iterator[MicroBatch],
    model: torch.nn.Module,
    *,
    arch: Architecture,
    loss: LossFunction,
    chunk_tokens: int | None,
    watch: Watch,
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,  # of the longest sequence: RoPE is made this long, and restarts in each sequence
        max_seqlen_kv=batch.max_seqlen,
    )
    hidden = model(batch.tokens, batch.positions, None, packed_seq_params=packed)
    student = cast(Student, model.module if isinstance(model, DistributedDataParallel) else model)
    return hidden, partial(_loss_sums, batch=batch, student=student, arch=arch, loss=loss, chunk_tokens=chunk_tokens, watch=watch)


def _loss_sums(
    hidden: torch.Tensor,
    *,
    batch: MicroBatch,
    student: Student,
    arch: Architecture,
    loss: LossFunction,
    chunk_tokens: int | None,
    watch: Watch,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    extra: dict[str, torch.Tensor] = {}

    def weighted(logp: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
        per_token, sums = loss(logp, entropy, Stored.of(batch, rows))
        for name, value in sums.items():
            extra[name] = extra.get(name, 0) + value
        return (batch.weights[rows] * per_token).sum()

    overlaps: list[torch.Tensor] = []

    def measure_overlap(logits: torch.Tensor, rows: slice) -> None:
        if batch.overlap_ids is not None and len(ids := batch.overlap_ids[rows]):
            overlaps.append(student.topk_overlap(logits[: len(ids)], ids, vocab_size=arch.vocab_size))

    total, logp, entropy = student.linear_loss(
        hidden,
        batch.loss_ids,
        weighted,
        rows=batch.rows,
        vocab_size=arch.vocab_size,
        chunk_tokens=chunk_tokens,
        observe=measure_overlap,
    )
    sums = pack_sums(total, logp[:, 0], entropy, batch, extra)
    return (
        total,
        batch.counts[0].to(torch.int),
        {"sums": torch.cat([sums, watch.sums(logp[:, 0], batch, torch.cat(overlaps) if overlaps else None)])},
    )


def _learning_rate(trainee: Trainee) -> float:
    return float(trainee.optimizer.param_groups[0]["lr"])
