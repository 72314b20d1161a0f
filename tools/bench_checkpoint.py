#!/usr/bin/env python3
"""Host memory and seconds of a save and a load: torchrun --nproc-per-node 4 tools/bench_checkpoint.py FOLDER [--tp 2]

A model of 191 million parameters with Adam's state. Memory is that of all ranks and their writers together (Pss of each process, so
that what a fork shares counts once), its peak less what it was before. On CPUs, where weights and state lie in the host's memory before.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.model import parallel  # isort: skip  (prepares megatron.core, so it comes first)

import torch
import torch.distributed as dist

from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.model.architecture import parse_architecture
from megatron_opd.model.student import build_chunks, transformer_config
from megatron_opd.recipe.layout import ParallelConfig
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.records import Lineage
from megatron_opd.train import checkpoint
from megatron_opd.train.optim import Trainee, make_trainee

MIB = 2**20
SIZES = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def pss() -> int:
    """Bytes of this process and its descendants."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            waiting += map(int, Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split())
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total


@contextmanager
def watched(found: list[int]) -> Iterator[None]:
    """Append (peak - start) of `pss` to `found`."""
    done, seen = threading.Event(), [pss()]

    def look() -> None:
        while not done.wait(0.02):
            seen.append(pss())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(max(seen) - seen[0])


def seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def over_ranks(value: float, op: dist.ReduceOp.RedOpType) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.item()


def build(config: TrainStage, arch: object) -> Trainee:
    options = transformer_config(arch, parallel=config.parallel, dtype=torch.bfloat16)  # pyright: ignore[reportArgumentType]
    trainee = make_trainee(build_chunks(arch, options), config, steps=10)  # pyright: ignore[reportArgumentType]
    checkpoint._prime_optimizer(trainee.optimizer)
    with torch.no_grad():
        for inner in checkpoint.torch_optimizers(trainee.optimizer):
            for state in inner.state.values():
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].normal_()  # in memory, as after a step: zeros are not
    return trainee


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written; made here")
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists already: name a new folder")
    torch.set_num_threads(1)
    config = TrainStage(init="", store="", output="", parallel=ParallelConfig(tp=options.tp))
    arch = parse_architecture(KNOWN["Qwen3-0.6B"] | SIZES, "of this size")
    parallel.start(config.parallel, seed=1)
    trainee = build(config, arch)
    checkpoint.copy_side_files = lambda *arguments: None
    writer = checkpoint.CheckpointWriter(options.folder, "", Lineage())
    memory: list[int] = []
    with watched(memory):
        blocked = seconds(lambda: writer.save(trainee, {"step": 1}))
        published = blocked + seconds(writer.finish)
    saved = options.folder / "checkpoints" / "step_000001"
    size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    with watched(memory):
        loaded = seconds(lambda: checkpoint.load_checkpoint(saved, trainee))
    total, worst = [over_ranks(value, dist.ReduceOp.SUM) for value in memory], [over_ranks(value, dist.ReduceOp.MAX) for value in memory]
    if dist.get_rank() == 0:
        print(
            "| ranks | tp | checkpoint, MiB | save: all ranks, MiB | fullest rank | blocked, s | published, s | load: all ranks, MiB | s |"
        )
        print(
            f"| {dist.get_world_size()} | {options.tp} | {size / MIB:,.0f} | {total[0] / MIB:,.0f} | {worst[0] / MIB:,.0f} | {blocked:.1f} | "
            f"{published:.1f} | {total[1] / MIB:,.0f} | {loaded:.1f} |"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
