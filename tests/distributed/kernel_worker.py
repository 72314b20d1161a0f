"""What the kernel's tests run on each rank; needs no Megatron. Usage: kernel_worker.py FUNCTION FOLDER RESULT.json ARGUMENTS(JSON)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from float64 import definition, head_case, head_definition, random_case, tolerance
from opd_kernels import linear_loss, topk_overlap, vocab_parallel_stats

from megatron_opd.safety.processes import LISTENER


def tensor_parallel(folder: Path, impl: str, dtype: str, vocab: int, padded: int) -> dict[str, float]:
    """Largest error against float64, over its tolerance, of log-probabilities, entropy and gradient with the columns split over the ranks."""
    logits, ids, g_logp, g_entropy = random_case(3, 7, padded, 4, vocab_size=vocab)
    logits = logits.to(getattr(torch, dtype))
    row_mask = torch.arange(7) != 2
    width = padded // dist.get_world_size()
    mine = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)

    def run(leaf: torch.Tensor, outputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        (3 * ((outputs[0] * g_logp).sum() + (outputs[1] * g_entropy).sum())).backward()
        assert leaf.grad is not None
        return {"logp": outputs[0].detach(), "entropy": outputs[1].detach(), "gradient": leaf.grad}

    truth_leaf, eager_leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    truth = run(truth_leaf, definition(truth_leaf, ids, vocab_size=vocab, row_mask=row_mask))
    eager = run(eager_leaf, definition(eager_leaf.float(), ids, vocab_size=vocab, row_mask=row_mask))
    leaf = logits[:, mine].clone().requires_grad_()
    options = {"vocab_start": mine.start, "vocab_size": vocab, "tp_group": dist.group.WORLD, "row_mask": row_mask}
    found = run(leaf, vocab_parallel_stats(leaf * 1, ids, inplace_backward=True, impl=impl, **options))
    worst = {}
    for name, value in found.items():
        exact = truth[name][:, mine] if name == "gradient" else truth[name]
        allowed = tolerance(eager[name], truth[name], value.dtype, logits_scale=logits.abs().max().item())
        worst[name] = max_over_ranks((value.double() - exact).abs().max()) / allowed
    return worst


def linear_parallel(folder: Path, impl: str) -> dict[str, float]:
    """Largest error against float64, over its tolerance, of the shards' gradients, for each dtype, chunk size and kind of parallelism."""
    world, rank = dist.get_world_size(), dist.get_rank()
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, rows, ids, loss = head_case(5, 24, 17, 64, vocab_size=50)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        exact = head_definition(hidden.double(), weight.double(), rows, ids, loss, vocab_size=50, scale=2.0)
        eager = head_definition(hidden, weight, rows, ids, loss, vocab_size=50, scale=2.0)
        for sequence_parallel in (False, True):
            tokens, columns = (slice(rank * size // world, (rank + 1) * size // world) for size in (24, 64))
            for chunk in (None, 5):
                x = (hidden[tokens] if sequence_parallel else hidden).clone().requires_grad_()
                w = weight[columns].clone().requires_grad_()
                total, logp, entropy = linear_loss(
                    x, w, ids, loss, rows=rows, chunk_tokens=chunk, vocab_start=columns.start, vocab_size=50,
                    tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, impl=impl,
                )  # fmt: skip
                (2.0 * total).backward()
                assert x.grad is not None
                assert w.grad is not None
                right = [*exact[:3], exact[3][tokens] if sequence_parallel else exact[3], exact[4][columns]]
                errors = [
                    (value.double() - there).abs().max() / tolerance(own, whole, dtype, logits_scale=10.0)
                    for value, there, own, whole in zip((total.detach(), logp, entropy, x.grad, w.grad), right, eager, exact, strict=True)
                ]
                worst[f"{dtype} {'sequence' if sequence_parallel else 'tensor'} {chunk}"] = max_over_ranks(torch.stack(errors).max())
    return worst


def overlap_parallel(folder: Path, vocab: int, padded: int) -> bool:
    """Is the top-k overlap the same with the columns split over the ranks, more candidates than columns a shard too?"""
    generator = torch.Generator().manual_seed(vocab)
    width = padded // dist.get_world_size()
    mine = slice(dist.get_rank() * width, (dist.get_rank() + 1) * width)
    different = 0.0
    for k in (1, 5, min(vocab, width + 3)):
        logits = torch.randn(7, padded, generator=generator)
        ids = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(7)])
        whole = topk_overlap(logits, ids, vocab_size=vocab)
        cut = topk_overlap(logits[:, mine], ids, vocab_start=mine.start, vocab_size=vocab, tp_group=dist.group.WORLD)
        different += float(not torch.equal(whole, cut))
    return not max_over_ranks(torch.tensor(different))


def max_over_ranks(value: torch.Tensor) -> float:
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


FUNCTIONS = {"tensor_parallel": tensor_parallel, "linear_parallel": linear_parallel, "overlap_parallel": overlap_parallel}

if __name__ == "__main__":
    name, folder, result, arguments = sys.argv[1:]
    rank, world, listener = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", LISTENER))
    make_store: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    store = make_store("127.0.0.1", int(os.environ["MASTER_PORT"]), world, rank == 0, master_listen_fd=listener if rank == 0 else None)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    answer = FUNCTIONS[name](Path(folder), **json.loads(arguments))
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(answer))
    dist.destroy_process_group()
