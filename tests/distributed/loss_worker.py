"""What the tests of the losses run on each rank, as worker.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import (  # isort: skip  (prepares megatron.core, so it comes first)
    build, chunks_of, gradient_error, layout, main, max_over_ranks, opd_formula, reference_gradients, source_of, stage_config,
)  # fmt: skip

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from transformers import AutoModelForCausalLM

from megatron_opd.config import LossConfig
from megatron_opd.model.architecture import read_architecture
from megatron_opd.train.batches import OVERLAP_EVERY, MicroBatch
from megatron_opd.train.loss import LossFunction, Stored, make_loss, opd_loss
from megatron_opd.train.step import forward_backward, train_step


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
        layout()
        source = source_of(stage_config(str(folder), packing=False, **options), topk=True)
        value, expected = reference_gradients(arch, [source.build([int(i)]) for i in source.step_rollouts(0)], directory, formula)
        config = stage_config(str(folder), parallel=layout(tp=2, pp=1 + number % 2), **options)
        trainee = build(config, arch)
        trainee.chunks[0].zero_grad_buffer()
        sums = forward_backward(trainee.chunks, arch, loss, source_of(config, topk=True).micro_batches(0), chunk_tokens=31)
        error = gradient_error(trainee.students, expected)
        results[name] = [abs(sums[0].item() / sums[1].item() - value), max_over_ranks(error)]
    return results


def overlapped(folder: Path, kinds: list[str]) -> dict[str, list[float]]:
    """[relative gradient error, calls of a hook on the output layer] where Megatron reduces gradients while the backward pass runs."""
    results = {}
    for kind in kinds:
        directory = folder / kind
        arch = read_architecture(directory)
        config = stage_config(str(folder), init=str(directory), packing=False, parallel=layout())
        source = source_of(config)
        _, expected = reference_gradients(arch, [source.build([int(i)]) for i in source.step_rollouts(0)], directory, opd_formula)
        (student,) = chunks_of(config, arch)
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, bucket_size=2000)
        ddp = DistributedDataParallel(student.config, options, student)
        student.config.finalize_model_grads_func, student.config.no_sync_func = finalize_model_grads, ddp.no_sync
        calls: list[int] = []
        student.output_layer.register_forward_pre_hook(lambda module, *_, calls=calls: calls.append(1))
        ddp.zero_grad_buffer()
        forward_backward([ddp], arch, opd_loss, source.micro_batches(0), chunk_tokens=9)
        results[kind] = [max_over_ranks(gradient_error([student], expected)), len(calls)]
    return results


def overlap(folder: Path) -> dict[str, list[float]]:
    """[summed top-k overlap, tokens] of a step: of sets made with transformers, and in layouts, with losses that read candidates or not."""
    arch = read_architecture(folder / "student")
    options: dict[str, Any] = {"store": f"{folder}/topk", "global_batch": 24}
    source = source_of(stage_config(str(folder), parallel=layout(), **options))
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    shares = []
    for index in source.step_rollouts(0)[source.step_rollouts(0) % OVERLAP_EVERY == 0]:
        rollout, scores = source.reader.rollout(index), source.reader.scores(index, "teacher", topk=True)
        logits = model(torch.from_numpy(rollout.tokens).long()[None]).logits[0]
        for token in range(rollout.prompt_len, len(rollout.tokens)):
            shares.append(len({*logits[token - 1].topk(5).indices.tolist()} & {*scores.topk_ids[token].tolist()}) / 5)
    results = {"transformers": [sum(shares), float(len(shares))]}
    for sizes in ({}, {"tp": 2}, {"pp": 2}, {"cp": 2}):
        for topk, loss in ((False, opd_loss), (True, make_loss(LossConfig(name="reverse_kl")))):
            config = stage_config(str(folder), parallel=layout(**sizes), **options)
            batches = source_of(config, topk=topk).micro_batches(0)
            watched = train_step(build(config, arch), arch, loss, batches, seed=0, chunk_tokens=9).watched
            results[f"{sizes} {topk}"] = [watched.overlap, watched.overlap_tokens]
    return results


if __name__ == "__main__":
    main([every_loss, overlapped, overlap])
