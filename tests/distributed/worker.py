"""What the distributed tests run on each rank. Usage: worker.py FUNCTION FOLDER RESULT.json ARGUMENTS(JSON); started by ranks.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_opd.model import parallel  # isort: skip  (prepares megatron.core, so it comes first)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoModelForCausalLM

from megatron_opd.config import LossConfig, ParallelConfig, TrainStage
from megatron_opd.convert.mapping import table
from megatron_opd.convert.to_mcore import load_hf_weights, sharded_tensors
from megatron_opd.data.store import StoreReader
from megatron_opd.model.architecture import Architecture, read_architecture
from megatron_opd.model.student import Student, build_student, transformer_config
from megatron_opd.records import Lineage
from megatron_opd.train.batches import BatchSource, MicroBatch
from megatron_opd.train.checkpoint import load_checkpoint, save_checkpoint
from megatron_opd.train.loss import LossFunction, Stored, make_loss, opd_loss
from megatron_opd.train.optim import Trainee, make_trainee
from megatron_opd.train.step import forward_backward, train_step

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def stage_config(folder: str, **options: Any) -> TrainStage:
    defaults: dict[str, Any] = {
        "init": f"{folder}/student",
        "store": f"{folder}/store",
        "output": f"{folder}/out",
        "lr": 1e-2,
        "global_batch": 12,
        "micro_batch_tokens": 96,
    }
    return TrainStage(**(defaults | options))


def build(config: TrainStage, arch: Architecture) -> Trainee:
    student = build_student(arch, transformer_config(arch, parallel=config.parallel, dtype=torch.float32, recompute=config.recompute))
    load_hf_weights(student, arch, config.init)
    return make_trainee(student, config, steps=10)


def source_of(config: TrainStage, *, sequence_mean: bool = True, topk: bool = False) -> BatchSource:
    return BatchSource(
        StoreReader(config.store),
        config,
        teacher="teacher",
        sequence_mean=sequence_mean,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pad_multiple=config.parallel.tp,
        topk=topk,
    )


def layout(tp: int, pp: int, *, sequence_parallel: bool = True) -> ParallelConfig:
    config = ParallelConfig(tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    parallel.start(config, seed=0)
    return config


def parity(folder: Path, kinds: list[str]) -> dict[str, float]:
    """Largest difference of log-probabilities between transformers and Megatron in fp32, for every architecture and layout."""
    worst = {}
    for kind in kinds:
        directory = folder / kind
        arch = read_architecture(directory)
        sequences = [torch.randint(3, arch.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 1, 40, 9)]
        reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        with torch.no_grad():
            expected = torch.cat([reference(ids[None]).logits[0] for ids in sequences]).log_softmax(-1)
        for tp, pp in LAYOUTS:
            for sequence_parallel in (True, False) if tp > 1 else (False,):
                student = build_student(
                    arch, transformer_config(arch, parallel=layout(tp, pp, sequence_parallel=sequence_parallel), dtype=torch.float32)
                )
                load_hf_weights(student, arch, directory)
                logp = packed_logp(student, sequences, vocab_size=arch.vocab_size, pad_multiple=tp)
                difference = (logp[: len(expected)] - expected).abs().max().item() if logp is not None else 0.0
                worst[f"{kind} tp{tp} pp{pp} sp{int(sequence_parallel)}"] = max_over_ranks(difference)
    return worst


def packed_logp(student: Student, sequences: list[torch.Tensor], *, vocab_size: int, pad_multiple: int) -> torch.Tensor | None:
    """Log-probabilities of the whole vocabulary on the last stage, through the pipeline and the head as training uses them."""
    lengths = [len(ids) for ids in sequences]
    if padding := -sum(lengths) % pad_multiple:
        sequences, lengths = [*sequences, torch.zeros(padding, dtype=torch.long)], [*lengths, padding]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    kept: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> Any:
        every_id = torch.arange(vocab_size).expand(sum(lengths), -1)
        _, logp, _ = student.linear_loss(hidden, every_id, lambda logp, *_: logp.sum(), vocab_size=vocab_size, chunk_tokens=13)
        kept.append(logp)
        return hidden.sum(), torch.tensor(1, dtype=torch.int), {}

    def forward(iterator: Any, model: torch.nn.Module) -> Any:
        return model(next(iterator), positions, None, packed_seq_params=packed), keep

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([torch.cat(sequences)[None]]), model=student, num_microbatches=1,
            seq_length=sum(lengths), micro_batch_size=1, forward_only=True,
        )  # fmt: skip
    return kept[0] if kept else None


# (student log-probabilities of the whole vocabulary float64 [N,V], the batch, which of its rows) -> loss [N]
Formula = Callable[[torch.Tensor, MicroBatch, torch.Tensor], torch.Tensor]


def opd_formula(logp: torch.Tensor, batch: MicroBatch, chosen: torch.Tensor) -> torch.Tensor:
    """The paper's loss written out."""
    sampled = logp.gather(1, batch.labels[chosen, None])[:, 0]
    assert batch.teacher_logp is not None
    return -(batch.teacher_logp[chosen].double() - sampled.detach()) * sampled


def reference_gradients(
    arch: Architecture, batches: list[MicroBatch], directory: Path, formula: Formula
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of `formula` by autograd through transformers in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    total, denominator = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        denominator += batch.denominator
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            chosen = (batch.rows >= start) & (batch.rows < end)
            if not chosen.any():
                continue
            logits = model(batch.tokens[:, start:end]).logits[0, batch.rows[chosen] - start]
            total = total + (batch.weights[chosen].double() * formula(torch.log_softmax(logits, -1), batch, chosen)).sum()
    (total / denominator).backward()
    hf = {name: parameter.grad for name, parameter in model.named_parameters()}
    if arch.tied_embeddings:
        hf.setdefault("model.embed_tokens.weight", hf.get("lm_head.weight"))
    gradients = {}
    for entry in table(arch):
        for layer in range(arch.num_layers) if entry.per_layer else [None]:
            gradients[f"{entry.mcore}/{layer}"] = entry.to_mcore([hf[name] for name in entry.hf_names(layer)], arch)
    return (total / denominator).item(), gradients


def gradient_error(student: Student, expected: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Largest difference of main_grad from the expected global tensors, over this rank's shards, relative to the largest gradient."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    parameters = list(student.parameters())
    sharded = dict(student.sharded_state_dict(metadata={"singleton_local_shards": False}))
    apply_factories(sharded)
    worst, compared = 0.0, 0
    for shard in sharded_tensors(sharded):
        skip = shard.prepend_axis_num
        layer = shard.global_offset[0] if skip else None
        full = expected[f"{shard.key}/{layer}"]
        piece = full[tuple(slice(offset, offset + size) for offset, size in zip(shard.global_offset[skip:], shard.data.shape, strict=True))]
        owner = next(p for p in parameters if same_memory(p, shard.data))
        first = shard.data.storage_offset() - owner.data.storage_offset()
        grad = owner.main_grad.reshape(-1)[first : first + shard.data.numel()].reshape(shard.data.shape)
        grad = grad[tuple(slice(size) for size in piece.shape)]
        worst = max(worst, (grad - piece).abs().max().item() if piece.numel() else 0.0)
        compared += shard.data.numel()
    assert compared == sum(p.numel() for p in parameters)
    return worst / largest, compared


def same_memory(parameter: torch.nn.Parameter, view: torch.Tensor) -> bool:
    if parameter.data.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
        return False
    start = parameter.data.storage_offset()
    return start <= view.storage_offset() < start + parameter.numel()


def gradients(folder: Path, kinds: list[str]) -> dict[str, list[float]]:
    """[loss difference, relative gradient error] against the float64 reference: layouts, packing, micro-batch sizes, normalisations."""
    results = {}
    for kind in kinds:
        directory = folder / kind
        arch = read_architecture(directory)
        for sequence_mean in (True, False):
            parallel.start(ParallelConfig(), seed=0)
            config = stage_config(str(folder), init=str(directory), packing=False, distributed_optimizer=False)
            source = source_of(config, sequence_mean=sequence_mean)
            everything = [source.build([int(i)]) for i in source.step_rollouts(0)]
            loss, expected = reference_gradients(arch, everything, directory, opd_formula)
            for tp, pp in LAYOUTS:
                if not sequence_mean and (tp, pp) != (2, 2):
                    continue
                for options in (
                    {"micro_batch_tokens": 96, "loss_chunk_tokens": "all"},
                    {"micro_batch_tokens": 600, "loss_chunk_tokens": 17},
                    {"packing": False},
                ):
                    config = stage_config(str(folder), init=str(directory), parallel=layout(tp, pp), distributed_optimizer=False, **options)
                    trainee = build(config, arch)
                    trainee.ddp.zero_grad_buffer()
                    sums = forward_backward(
                        trainee.ddp,
                        trainee.student,
                        arch,
                        opd_loss,
                        source_of(config, sequence_mean=sequence_mean).micro_batches(0),
                        chunk_tokens=config.chunk_tokens,
                    )
                    error, _ = gradient_error(trainee.student, expected)
                    name = f"{kind} tp{tp} pp{pp} {options} {'sequence' if sequence_mean else 'token'}"
                    results[name] = [abs(sums[0].item() / sums[1].item() - loss), max_over_ranks(error)]
    return results


def every_loss(folder: Path) -> dict[str, list[float]]:
    """[loss difference, relative gradient error] of each loss of the registry, from stored candidates, against float64."""
    directory = folder / "qwen3-tied"
    arch = read_architecture(directory)
    results = {}
    for number, name in enumerate(["opd", "vopd", "exopd", "reverse_kl", "forward_kl", "jsd"]):
        sampled = number < 3
        loss = make_loss(
            LossConfig.model_validate(
                {"name": name, "entropy_bonus": 0.1, **({"advantage_clip": 2.0, "importance_clip": 1.5} if sampled else {})}
            )
        )

        def formula(logp: torch.Tensor, batch: MicroBatch, chosen: torch.Tensor, loss: LossFunction = loss) -> torch.Tensor:
            stored = Stored(*(piece[chosen].double() for piece in (batch.student_logp, batch.teacher_logp, batch.topk_logp)))
            return loss(logp.gather(1, batch.loss_ids[chosen]), -(logp.exp() * logp).sum(1), stored)[0]

        options: dict[str, Any] = {"init": str(directory), "store": f"{folder}/topk", "distributed_optimizer": False}
        parallel.start(ParallelConfig(), seed=0)
        source = source_of(stage_config(str(folder), packing=False, **options), topk=True)
        value, expected = reference_gradients(arch, [source.build([int(i)]) for i in source.step_rollouts(0)], directory, formula)
        config = stage_config(str(folder), parallel=layout(2, 1 + number % 2), **options)
        trainee = build(config, arch)
        trainee.ddp.zero_grad_buffer()
        sums = forward_backward(trainee.ddp, trainee.student, arch, loss, source_of(config, topk=True).micro_batches(0), chunk_tokens=31)
        error, _ = gradient_error(trainee.student, expected)
        results[name] = [abs(sums[0].item() / sums[1].item() - value), max_over_ranks(error)]
    return results


def overlapped(folder: Path, kinds: list[str]) -> dict[str, list[float]]:
    """[relative gradient error, calls of a hook on the output layer] where Megatron reduces gradients while the backward pass runs."""
    results = {}
    for kind in kinds:
        directory = folder / kind
        arch = read_architecture(directory)
        parallel.start(ParallelConfig(), seed=0)
        config = stage_config(str(folder), init=str(directory), packing=False)
        source = source_of(config)
        _, expected = reference_gradients(arch, [source.build([int(i)]) for i in source.step_rollouts(0)], directory, opd_formula)
        student = build_student(arch, transformer_config(arch, parallel=config.parallel, dtype=torch.float32))
        load_hf_weights(student, arch, directory)
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=2000)
        ddp = DistributedDataParallel(student.config, options, student)
        student.config.finalize_model_grads_func, student.config.no_sync_func = finalize_model_grads, ddp.no_sync
        calls: list[int] = []
        student.output_layer.register_forward_pre_hook(lambda module, *_, calls=calls: calls.append(1))
        ddp.zero_grad_buffer()
        forward_backward(ddp, student, arch, opd_loss, source.micro_batches(0), chunk_tokens=9)
        error, _ = gradient_error(student, expected)
        results[kind] = [max_over_ranks(error), len(calls)]
    return results


def reshard(folder: Path, distributed_optimizer: bool) -> dict[str, list[float]]:
    """Losses of three steps after a checkpoint, continued in the layout that saved it and loaded into others."""
    directory = folder / "student"
    arch = read_architecture(directory)
    results: dict[str, list[float]] = {}

    def steps(trainee: Trainee, config: TrainStage, first: int, count: int) -> list[float]:
        source = source_of(config)
        found = [
            train_step(trainee, arch, partial(opd_loss, advantage_clip=3.0), source.micro_batches(step), seed=step)
            for step in range(first, first + count)
        ]
        return [value for result in found for value in (result.sums.loss / result.sums.denominator, result.grad_norm)]

    config = stage_config(str(folder), parallel=layout(2, 1), distributed_optimizer=distributed_optimizer)
    trainee = build(config, arch)
    steps(trainee, config, 0, 2)
    checkpoint = save_checkpoint(
        folder / f"out{int(distributed_optimizer)}", trainee, {"step": 2}, init=str(directory), lineage=Lineage(), keep_last=2
    )
    results["continued tp2 pp1"] = steps(trainee, config, 2, 3)
    for tp, pp in [(2, 1), (1, 2), (2, 2), (1, 1)]:
        config = stage_config(str(folder), parallel=layout(tp, pp), distributed_optimizer=distributed_optimizer)
        trainee = build(config, arch)
        load_checkpoint(checkpoint, trainee)
        trainee.scheduler.step(increment=2)
        results[f"loaded tp{tp} pp{pp}"] = steps(trainee, config, 2, 3)
    return results


def max_over_ranks(value: float) -> float:
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


if __name__ == "__main__":
    name, folder, result, arguments = sys.argv[1:]
    parallel.start(ParallelConfig(), seed=0)
    answer = {"parity": parity, "gradients": gradients, "every_loss": every_loss, "overlapped": overlapped, "reshard": reshard}[name](
        Path(folder), **json.loads(arguments)
    )
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(answer))
    parallel.stop()
