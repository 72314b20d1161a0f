"""What the tests of the trainer run on each rank, as worker.py does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from worker import build, chunks_of, layout, main, max_over_ranks, source_of, stage_config, train_steps  # isort: skip  (prepares megatron.core, so it comes first)

import torch
import torch.distributed as dist
from megatron.core import fp8_utils, parallel_state
from rounded import Rounded, dequantized, quantize_matrices_
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_opd.convert.to_mcore import load_hf_weights
from megatron_opd.errors import CheckpointError
from megatron_opd.estimate.memory import Layout, rank_parameters
from megatron_opd.model.architecture import read_architecture
from megatron_opd.model.layers import RMSNorm
from megatron_opd.records import Lineage
from megatron_opd.train import checkpoint, pipeline
from megatron_opd.train import step as step_module
from megatron_opd.train.batches import BatchSource
from megatron_opd.train.checkpoint import CheckpointWriter, load_checkpoint, torch_optimizers
from megatron_opd.train.loss import opd_loss
from megatron_opd.train.optim import Trainee, make_trainee
from megatron_opd.train.step import StepResult, train_step
from megatron_opd.train.update import update

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def estimates(folder: Path, kinds: list[str]) -> dict[str, list[list[float]]]:
    """[counted, predicted] of each rank's parameters and of its optimizer's numbers (main weights and moments), for every layout."""
    results = {}
    for kind in kinds:
        arch = read_architecture(folder / kind)
        for tp, pp in LAYOUTS:
            config = stage_config(str(folder), init=str(folder / kind), parallel=layout(tp=tp, pp=pp))
            trainee = build(config, arch)
            train_step(trainee, arch, opd_loss, source_of(config).micro_batches(0), seed=0)
            sizes = Layout.of(config, dist.get_world_size())
            predicted = rank_parameters(arch, sizes, parallel_state.get_pipeline_model_parallel_rank()).total
            counted = sum(parameter.numel() for parameter in trainee.students[0].parameters())
            states = [state for part in torch_optimizers(trainee.optimizer) for state in part.state.values()]
            moments = sum(state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in states)
            pairs = torch.tensor([[counted, predicted], [moments, 2 * predicted / sizes.dp]], dtype=torch.float64)
            everybody = [torch.zeros_like(pairs) for _ in range(dist.get_world_size())]
            dist.all_gather(everybody, pairs)
            for rank, found in enumerate(everybody):
                results[f"{kind} tp{tp} pp{pp} rank {rank}"] = found.tolist()
    return results


def skipping(folder: Path, distributed_optimizer: bool) -> dict[str, bool]:
    """A step with a loss, or a gradient alone, that is not finite on one data-parallel rank: all skip it, and nothing shows of it."""
    arch = read_architecture(folder / "student")
    results = {}
    for tp, pp in [(1, 1), (2, 1), (1, 2)]:
        config = stage_config(str(folder), parallel=layout(tp=tp, pp=pp), distributed_optimizer=distributed_optimizer)
        source = source_of(config)

        def run(trainee: Trainee, step: int, weight: float = 1.0, source: BatchSource = source) -> StepResult:
            batches = source.micro_batches(step)
            if source.dp_rank == 1:
                batches[0] = replace(batches[0], weights=batches[0].weights * weight)
            return train_step(trainee, arch, opd_loss, batches, seed=step)

        trainee = build(config, arch)
        run(trainee, 0)
        before = snapshot(trainee)
        for name, weight in (("loss", math.inf), ("gradient", 1e30)):
            result = run(trainee, 1, weight)
            assert math.isfinite(result.sums.loss) == (name == "gradient")
            results[f"tp{tp} pp{pp} {name} skipped"] = result.skipped
            results[f"tp{tp} pp{pp} {name} left alone"] = all(map(torch.equal, before, snapshot(trainee)))
        after = run(trainee, 2)
        clean = build(config, arch)
        run(clean, 0)
        clean.scheduler.step(increment=2)
        expected = run(clean, 2)
        results[f"tp{tp} pp{pp} goes on"] = not after.skipped and (after.sums, after.grad_norm, after.learning_rate) == (
            expected.sums, expected.grad_norm, expected.learning_rate,
        )  # fmt: skip
        results[f"tp{tp} pp{pp} same weights"] = all(map(torch.equal, snapshot(clean), snapshot(trainee)))
    return {name: not max_over_ranks(float(not value)) for name, value in results.items()}


def snapshot(trainee: Trainee) -> list[torch.Tensor]:
    """Copies of weights and optimizer state."""
    trainee.gather_weights()
    states = [state for part in torch_optimizers(trainee.optimizer) for state in part.state.values()]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    weights = [weight for student in trainee.students for weight in student.parameters()]
    return [tensor.detach().clone() for tensor in [*weights, *tensors]]


def quantized(folder: Path, kinds: list[str]) -> dict[str, bool]:
    """Hugging Face weights in FP8 parameters: rounded once, and exact where the optimizer will look for them."""
    results = {}
    fp8_utils.is_float8tensor = lambda tensor: isinstance(tensor, Rounded)
    for kind in kinds:
        arch = read_architecture(folder / kind)
        config = stage_config(str(folder), init=str(folder / kind), parallel=layout(tp=2))
        plain, student = (chunks_of(config, arch)[0] for _ in range(2))
        rounded = {id(parameter) for parameter in quantize_matrices_(student)}
        load_hf_weights(student, arch, config.init)
        pairs = list(zip(student.parameters(), plain.parameters(), strict=True))
        results[f"{kind} some"] = 0 < len(rounded) < len(pairs)
        for number, (parameter, expected) in enumerate(pairs):
            if id(parameter) in rounded:
                results[f"{kind} {number} exact"] = torch.equal(parameter.get_high_precision_init_val(), expected)
                expected = expected.to(torch.float8_e4m3fn).to(expected.dtype)
            results[f"{kind} {number}"] = torch.equal(dequantized(parameter.data), expected)
    return {name: not max_over_ranks(float(not value)) for name, value in results.items()}


def planned_shapes(folder: Path) -> dict[str, Any]:
    """[numbers with the plan equal those with the exchange, answers that were compared] in pipelines of unequal micro-batches.

    'refused': what a stage with other micro-batches than its neighbours' says.
    """
    arch = read_architecture(folder / "student")
    answer, exchange = pipeline.Shapes.answer, pipeline.P2PCommunicator._communicate_shapes
    known = pipeline._is_known
    compared = [0]

    def both(shapes: pipeline.Shapes, *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        planned = answer(shapes, *args, **kwargs)
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        communicator = pipeline.P2PCommunicator(group, chunk_config[0])
        asked = exchange(communicator, *args, **kwargs)
        assert asked == planned, (asked, planned)
        compared[0] += sum(map(any, planned))
        return planned

    results: dict[str, Any] = {}
    for sizes in ({"pp": 2}, {"pp": 4}, {"pp": 2, "vpp": 2}, {"tp": 2, "pp": 2, "vpp": 2}, {"pp": 2, "cp": 2}):
        config = stage_config(str(folder), parallel=layout(**sizes))
        batches = source_of(config).micro_batches(0)
        assert len({batch.tokens.shape[1] for batch in batches}) > 1
        found = []
        for way in ("compared", "plan", "exchange"):
            trainee = build(config, arch)
            chunk_config = [trainee.students[0].config]
            compared[0] = 0
            pipeline.Shapes.answer = both if way == "compared" else answer
            pipeline._is_known = (lambda: False) if way == "exchange" else known
            first, second = (train_step(trainee, arch, opd_loss, batches, seed=0) for _ in range(2))
            found.append([first.sums, first.grad_norm, second.sums, second.grad_norm])
            if way == "compared":
                count = compared[0]
        forward = step_module.forward_backward(trainee.chunks, arch, opd_loss, batches, forward_only=True)
        pipeline._is_known = known
        same = torch.equal(forward, step_module.forward_backward(trainee.chunks, arch, opd_loss, batches, forward_only=True))
        results[" ".join(f"{name}{size}" for name, size in sizes.items())] = [found[0] == found[1] == found[2] and same, count]
    pipeline.Shapes.answer = answer
    if parallel_state.get_pipeline_model_parallel_rank() == 1:
        batches = batches[::-1]
    try:
        train_step(trainee, arch, opd_loss, batches, seed=0)
    except RuntimeError as error:
        results["refused"] = str(error)
    return results


def one_norm(folder: Path) -> dict[str, bool]:
    """The step against Megatron's own `optimizer.step()`, which computes the norm again: norms and weights, bit for bit."""
    results = {}
    for kind, sizes in (("student", {"tp": 2}), ("mixture", {"ep": 2})):
        arch = read_architecture(folder / kind)
        for distributed_optimizer in (True, False):
            for clip_grad in (0.01, 0.0):
                options: dict[str, Any] = {"clip_grad": clip_grad, "distributed_optimizer": distributed_optimizer}
                config = stage_config(str(folder), init=str(folder / kind), parallel=layout(**sizes), **options)
                ours, megatrons = build(config, arch), build(config, arch)
                for step in range(2):
                    batches = source_of(config).micro_batches(step)
                    norm = train_step(ours, arch, opd_loss, batches, seed=step).grad_norm
                    step_module.update = megatrons_update
                    expected = train_step(megatrons, arch, opd_loss, batches, seed=step).grad_norm
                    step_module.update = update
                    name = f"{kind} {options} {step}"
                    results[f"{name} norm"] = norm == expected > 0.01
                    results[f"{name} weights"] = all(map(torch.equal, snapshot(ours), snapshot(megatrons)))
    return {name: not max_over_ranks(float(not value)) for name, value in results.items()}


def megatrons_update(optimizer: Any, sums: torch.Tensor) -> tuple[list[float], float, bool]:
    _, grad_norm, _ = optimizer.step()
    return sums.tolist(), float(grad_norm), False


def other_layers(folder: Path) -> dict[str, Any]:
    """A checkpoint loaded into layers that have an extra state, as Transformer Engine's have, or a parameter that it lacks."""
    arch = read_architecture(folder / "student")
    config = stage_config(str(folder), parallel=layout(tp=2))
    trainee = build(config, arch)
    train_steps(trainee, arch, config, range(2))
    writer = CheckpointWriter(folder / "out-layers", str(folder / "student"), Lineage(), asynchronous=False)
    saved = writer.save(trainee, {"step": 2})
    results: dict[str, Any] = {"continued": train_steps(trainee, arch, config, range(2, 4))}
    RMSNorm.get_extra_state = lambda self: torch.zeros(3, dtype=torch.uint8)
    RMSNorm.set_extra_state = lambda self, state: None
    for name in ("extra state", "extra parameter"):
        chunks = chunks_of(config, arch)
        assert any("_extra_state" in key for key in chunks[0].sharded_state_dict())
        if name == "extra parameter":
            chunks[0].decoder.final_layernorm.register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))
        trainee = make_trainee(chunks, config, steps=10)
        try:
            load_checkpoint(saved, trainee)
        except CheckpointError as error:
            results[name] = str(error)
            continue
        trainee.scheduler.step(increment=2)
        results[name] = train_steps(trainee, arch, config, range(2, 4))
    return results


def gathered(folder: Path, kind: str, saved: dict[str, int], loaded: list[dict[str, int]]) -> dict[str, bool]:
    """What Megatron-Core's own way of writing the optimizer's state, which gathers it, has to do with ours."""
    arch = read_architecture(folder / kind)
    config = stage_config(str(folder), init=str(folder / kind), parallel=layout(**saved))
    trainee = build(config, arch)
    train_steps(trainee, arch, config, range(2))
    before = snapshot(trainee)
    attach, checkpoints = checkpoint.attach, {}
    for way in ("theirs", "ours"):
        if way == "theirs":
            _count_padding_(trainee)
        checkpoint.attach = attach if way == "ours" else lambda optimizer: None
        writer = CheckpointWriter(folder / f"out-{way}-{kind}", str(folder / kind), Lineage(), asynchronous=False)
        checkpoints[way] = writer.save(trainee, {"step": 2})
    contents = {way: tensors_of(path) for way, path in checkpoints.items()}
    results = {
        "names": contents["ours"].keys() == contents["theirs"].keys(),
        "numbers": all(torch.equal(contents["ours"][key], tensor) for key, tensor in contents["theirs"].items()),
        "moments": any("exp_avg_sq" in key and tensor.any() for key, tensor in contents["ours"].items()),
    }
    for sizes in (saved, *loaded):
        config = stage_config(str(folder), init=str(folder / kind), parallel=layout(**sizes))
        found = {}
        for way, path in checkpoints.items():
            trainee = build(config, arch)
            load_checkpoint(path, trainee)
            found[way] = snapshot(trainee)
        results[f"{sizes} alike"] = all(map(torch.equal, found["ours"], found["theirs"]))
        if sizes is saved:
            results["as before"] = all(map(torch.equal, before, found["ours"]))
    return {name: not max_over_ranks(float(not value)) for name, value in results.items()}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = FileSystemReader(path)
    described = reader.read_metadata().state_dict_metadata
    found: Any = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load_state_dict(found, reader, no_dist=True)
    return found


def _count_padding_(trainee: Trainee) -> None:
    """Megatron-Core (0.16.1, 0.19.2) leaves the padding of buckets out when it gathers, and then cuts by offsets that count it."""
    for chunk in trainee.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


if __name__ == "__main__":
    main([estimates, skipping, quantized, planned_shapes, one_norm, other_layers, gathered])
