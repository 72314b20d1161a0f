"""What the tests of the losses run on each rank, as worker.py does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from worker import (  # isort: skip  (prepares megatron.core, so it comes first)
    build, chunks_of, gradient_error, layout, main, max_over_ranks, opd_formula, reference_gradients, source_of, stage_config,
)  # fmt: skip

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from transformers import AutoModelForCausalLM

from megatron_opd.model.architecture import read_architecture
from megatron_opd.recipe.objective import LossConfig
from megatron_opd.train.batches import OVERLAP_EVERY, MicroBatch
from megatron_opd.train.loss import LossFunction, Stored, make_loss, opd_loss
from megatron_opd.train.step import forward_backward, train_step


def every_loss(folder: Path) -> dict[str, list[float]]:
    """[loss difference, relative gradient error] of each loss of the registry, from stored candidates, against float64."""
    directory = folder / "qwen3-tied"
    arch = read_architecture(directory)
    results = {}
    for number, name in enumerate(["opd", "vopd", "exopd", "constant", "reverse_kl", "forward_kl", "jsd"]):
        options_of_loss: dict[str, float] = {"importance_clip": 1.5} if number < 4 else {}
        options_of_loss |= {"advantage_clip": 2.0} if number < 3 else {}
        loss = make_loss(LossConfig.model_validate({"name": name, "entropy_bonus": 0.1, **options_of_loss}))

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


def horizon(folder: Path) -> dict[str, list[float]]:
    """[loss difference, relative gradient error] of a step of a schedule, in layouts, against whole responses of which the first tokens count."""
    directory = folder / "qwen3-tied"
    arch = read_architecture(directory)
    limit, step, results = {"start": 40, "end": 4, "steps": 3}, 2, {}
    counted = 40 - 36 * step // 3
    options: dict[str, Any] = {"init": str(directory), "distributed_optimizer": False}
    for sequence_mean in (True, False):
        layout()
        source = source_of(stage_config(str(folder), packing=False, **options), sequence_mean=sequence_mean)
        batches = []
        for index in source.step_rollouts(step):
            batch = source.build([int(index)])
            weights = batch.weights.where(batch.response_positions < counted, 0.0)
            n = int((weights > 0).sum())
            batches.append(
                replace(batch, weights=weights / weights.sum() if sequence_mean else weights, denominator=1 if sequence_mean else n)
            )
        assert any(len(batch.rows) > counted for batch in batches)
        value, expected = reference_gradients(arch, batches, directory, opd_formula)
        for sizes in ({}, {"pp": 2, "cp": 2}) if sequence_mean else ({"tp": 2, "pp": 2},):
            config = stage_config(str(folder), parallel=layout(**sizes), loss={"horizon": limit}, **options)
            trainee = build(config, arch)
            trainee.chunks[0].zero_grad_buffer()
            source = replace(source_of(config, sequence_mean=sequence_mean), horizon=config.loss.horizon)
            sums = forward_backward(trainee.chunks, arch, opd_loss, source.micro_batches(step), chunk_tokens=31)
            error = max_over_ranks(gradient_error(trainee.students, expected))
            results[f"{sizes} {sequence_mean}"] = [abs(sums[0].item() / sums[1].item() - value), error]
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
    main([every_loss, horizon, overlapped, overlap])
