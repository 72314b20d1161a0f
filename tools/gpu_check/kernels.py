"""The kernel against float64 at real sizes: `python -m gpu_check.kernels OUTPUT.json` (on a CPU small, with the PyTorch implementation).

Inputs are drawn anew in each case. An error is the largest absolute difference to float64; beside it stand that of eager PyTorch in fp32
on the same logits, and the tolerance of the kernels' tests, which is made of it. Error over tolerance is what the bar is about.
Legend: N rows, V vocabulary, K ids a row.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from float64 import definition, tolerance  # pyright: ignore[reportMissingImports]  of tests/distributed, which is on this program's path
from opd_kernels import vocab_parallel_stats

_BLOCK = 64  # rows that are in float64 at once


@dataclass(frozen=True)
class Case:
    """One problem; `padding` columns at the end are allocated and belong to no token."""

    dtype: str
    rows: int
    vocab: int
    k: int
    padding: int = 0
    masked: bool = False
    scale: float = 3.0


def cases(on_gpu: bool) -> list[Case]:
    rows, vocab = (512, 151936) if on_gpu else (24, 1271)
    odd = 151669 if on_gpu else 401
    return [
        Case("bfloat16", rows, vocab, 1),
        Case("bfloat16", rows, vocab, 64),
        Case("bfloat16", rows, odd, 65, padding=vocab - odd, masked=True),
        Case("bfloat16", rows, vocab // 4, 1, masked=True),
        Case("bfloat16", rows, vocab, 1, scale=50.0),
        Case("float32", rows, vocab, 1),
        Case("float32", rows, odd, 65, padding=3, masked=True),
    ]


def eager(logits: torch.Tensor, ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """logp, entropy and gradient by autograd, in float64 for float64 logits, else in fp32."""
    leaf = logits.detach().requires_grad_()
    computed = leaf if leaf.dtype == torch.float64 else leaf.float()
    logp, entropy = definition(computed, ids, vocab_size=logits.shape[1])
    (grad,) = torch.autograd.grad((logp * g_logp).sum() + (entropy * g_entropy).sum(), leaf)
    return logp.detach(), entropy.detach(), grad


def measure(case: Case, seed: int, device: torch.device) -> dict[str, Any]:
    """Errors of logp, entropy and gradient, eager's beside them, and the largest ratio."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, n, v = getattr(torch, case.dtype), case.rows, case.vocab

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    logits = normal(n, v + case.padding).mul_(case.scale).to(dtype)
    ids = torch.randint(v, (n, case.k), generator=generator, device=device)
    g_logp, g_entropy = normal(n, case.k), normal(n)
    mask = torch.rand(n, generator=generator, device=device) < 0.7 if case.masked else None
    leaf = logits.clone().requires_grad_()
    view = leaf * 1
    impl = "triton" if device.type == "cuda" else "torch"
    logp, entropy = vocab_parallel_stats(view, ids, row_mask=mask, vocab_size=v, inplace_backward=True, impl=impl)
    (grad,) = torch.autograd.grad((logp * g_logp).sum() + (entropy * g_entropy).sum(), leaf)
    keep = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask
    if grad[:, v:].any() or grad[~keep].any() or logp[~keep].any() or entropy[~keep].any():
        raise SystemExit(f"{case}: masked rows or columns beyond the vocabulary are not 0")
    worst: dict[str, dict[str, float]] = {name: {"error": 0.0, "eager": 0.0, "ratio": 0.0} for name in ("logp", "entropy", "gradient")}
    for start in range(0, n, _BLOCK):
        kept = torch.arange(start, min(start + _BLOCK, n), device=device)[keep[start : start + _BLOCK]]
        if not len(kept):
            continue
        inputs = ids[kept], g_logp[kept], g_entropy[kept]
        truth, own = eager(logits[kept, :v].double(), *inputs), eager(logits[kept, :v], *inputs)
        size, upstream = logits[kept, :v].abs().max().item(), (g_logp[kept].abs().sum(-1) + g_entropy[kept].abs()).max().item()
        found = logp.detach()[kept], entropy.detach()[kept], grad[kept, :v]
        for name, value, exact, other in zip(worst, found, truth, own, strict=True):
            allowed = tolerance(other, exact, value.dtype, logits_scale=size, upstream=upstream if name == "gradient" else 0.0)
            error, others = (float((x.double() - exact).abs().nan_to_num(torch.inf).max()) for x in (value, other))
            for key, number in (("error", error), ("eager", others), ("ratio", error / allowed)):
                worst[name][key] = max(worst[name][key], number)
    row = asdict(case) | worst | {"ratio": max(values["ratio"] for values in worst.values())}
    return row


def run(device: torch.device) -> Iterator[dict[str, Any]]:
    for seed, case in enumerate(cases(device.type == "cuda")):
        row = measure(case, seed, device)
        print(f"{case}: error / tolerance {row['ratio']:.2f}", flush=True)
        yield row


if __name__ == "__main__":
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Path(sys.argv[1]).write_text(json.dumps({"device": place.type, "rows": list(run(place))}), encoding="utf-8")
