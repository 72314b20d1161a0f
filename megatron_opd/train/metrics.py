"""What a step reports: one console line with units, one JSONL row."""

from __future__ import annotations

import math
import resource
from typing import Any

import torch

from megatron_opd.train.step import StepResult

# Dense bf16 peak of one GPU in FLOP/s, from NVIDIA's data sheets; utilisation is reported only for these.
PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def step_row(step: int, result: StepResult, *, seconds: float, batch_tokens: int, flops: float, num_ranks: int) -> dict[str, Any]:
    """Means of a step. batch_tokens: prompt and response tokens of the global batch; flops: model arithmetic of the step."""
    sums = result.sums
    n = sums.tokens
    row: dict[str, Any] = {
        "step": step,
        "loss": sums.loss / sums.denominator,
        "nll": sums.nll / n,
        "entropy": sums.entropy / n,
        "reverse_kl": sums.reverse_kl / n,
        "abs_advantage": sums.abs_advantage / n,
        "clipped_share": sums.clipped / n,
        "ratio": sums.ratio / n,
        "effective_sample_share": sums.ratio**2 / (n * sums.ratio_squared) if sums.ratio_squared else math.nan,
        "response_length": n / sums.sequences,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "response_tokens": int(n),
        "batch_tokens": batch_tokens,
        "seconds": seconds,
        "tokens_per_second": batch_tokens / seconds,
        "model_tflops_per_rank": flops / seconds / num_ranks / 1e12,
        "memory_gib": memory_gib(),
    }
    if (peak := peak_flops()) is not None:
        row["model_flops_utilisation"] = flops / seconds / num_ranks / peak
    return row


def console_line(row: dict[str, Any], *, total: int, distils: bool) -> str:
    """One line a step."""
    losses = (
        f"reverse KL {row['reverse_kl']:.4f} nat/token  |A| {row['abs_advantage']:.4f}" if distils else f"nll {row['nll']:.4f} nat/token"
    )
    drift = f"  ESS {row['effective_sample_share']:.0%}" if distils else ""
    return (
        f"step {row['step']:>5}/{total}  loss {row['loss']:+.4f}  {losses}  entropy {row['entropy']:.3f}{drift}  grad {row['grad_norm']:.3f}  "
        f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s  {row['memory_gib']:.1f} GiB"
    )


def memory_gib() -> float:
    """Peak memory of this rank: of its GPU, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)
