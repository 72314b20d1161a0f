#!/usr/bin/env python3
"""How full the bins are, how fast, how much is padding, and how equal the work: python tools/bench_packing.py [--sequences 1000000]

Lengths as in DAPO-Math: responses log-normal (median 1100 tokens, sigma 0.8) cut at 4096, prompts of 60 to 400 tokens. Prints two
Markdown tables: all sequences into bins; and steps of 256 rollouts over data-parallel ranks, with attention's cost of Qwen3-8B.
A micro-batch is as long as its sequences, padded to MULTIPLE tokens: only this padding is computed and not used.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from megatron_opd.data.packing import costs_of, pack, plan_micro_batches
from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.model.architecture import parse_architecture

BATCH, BUDGET, STEPS = 256, 16384, 100
# Tokens of a micro-batch are padded to a multiple of this with tensor parallel 8 and FP8, the most that a shipped layout comes to.
MULTIPLE = 8 * 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    count = parser.parse_args().sequences
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(np.log(1100), 0.8, count)), 4096).astype(np.int64) + rng.integers(60, 401, count)
    print(f"| micro_batch_tokens | token slots used, {count:,} sequences | CPU seconds |\n|---|---|---|")
    for budget in (4496, 8192, 12288, 16384):
        start = time.process_time()
        bins = pack(lengths, budget)
        seconds = time.process_time() - start
        print(f"| {budget} | {lengths.sum() / (len(bins) * budget):.2%} | {seconds:.1f} |")
    arch = parse_architecture(KNOWN["Qwen3-8B"], "Qwen3-8B")
    quadratic = arch.train_flops(0, 1) / arch.train_flops(1, 0)
    print(
        "\n| data-parallel ranks | micro-batches a step | slots used of those computed | of micro_batch_tokens | most costly rank over the mean, worst step |"
    )
    print("|---|---|---|---|---|")
    for ranks in (1, 2, 4, 8):
        worst, tokens, computed, number = 0.0, 0, 0, 0
        for step in range(STEPS):
            chosen = lengths[step * BATCH : (step + 1) * BATCH]
            costs = costs_of(chosen, quadratic)
            plan = plan_micro_batches(chosen, num_ranks=ranks, budget=BUDGET, quadratic=quadratic)
            loads = [sum(costs[position] for bin_ in rank for position in bin_) for rank in plan]
            worst = max(worst, max(loads) / (sum(loads) / ranks) - 1)
            sizes = [int(chosen[bin_].sum()) for rank in plan for bin_ in rank]
            tokens += sum(sizes)
            computed += sum(-(-size // MULTIPLE) * MULTIPLE for size in sizes)
            number += len(sizes)
        print(f"| {ranks} | {number / STEPS:.1f} | {tokens / computed:.2%} | {tokens / (number * BUDGET):.1%} | {worst:+.2%} |")


if __name__ == "__main__":
    main()
