"""What the kernel's tests run on each rank; needs no Megatron. Usage: kernel_worker.py FUNCTION FOLDER RESULT.json ARGUMENTS(JSON)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from opd_kernels import vocab_parallel_stats


def tensor_parallel(folder: Path, vocab: int, padded: int) -> dict[str, float]:
    """Largest difference of log-probabilities, entropy and gradient between one rank with all columns and each rank with its own."""
    generator = torch.Generator().manual_seed(3)
    logits = 5.0 * torch.randn(7, padded, generator=generator)
    ids = torch.randint(-1, vocab, (7, 4), generator=generator)
    g_logp, g_entropy = torch.randn(7, 4, generator=generator), torch.randn(7, generator=generator)
    whole = logits.clone().requires_grad_()
    expected = vocab_parallel_stats(whole, ids, vocab_size=vocab)
    ((expected[0] * g_logp).sum() + (expected[1] * g_entropy).sum()).backward()
    width = padded // dist.get_world_size()
    mine = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    shard = logits[:, mine].clone().requires_grad_()
    found = vocab_parallel_stats(shard, ids, vocab_start=mine.start, vocab_size=vocab, tp_group=dist.group.WORLD)
    ((found[0] * g_logp).sum() + (found[1] * g_entropy).sum()).backward()
    assert shard.grad is not None
    assert whole.grad is not None
    pairs = {"logp": (found[0], expected[0]), "entropy": (found[1], expected[1]), "gradient": (shard.grad, whole.grad[:, mine])}
    return {name: _max_over_ranks((here - there).detach().abs().max()) for name, (here, there) in pairs.items()}


def _max_over_ranks(value: torch.Tensor) -> float:
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


if __name__ == "__main__":
    name, folder, result, arguments = sys.argv[1:]
    dist.init_process_group("gloo")
    answer = {"tensor_parallel": tensor_parallel}[name](Path(folder), **json.loads(arguments))
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(answer))
    dist.destroy_process_group()
