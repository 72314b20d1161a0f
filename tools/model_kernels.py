"""Predicts the LM-head loss on GPUs from the kernels' machine code and from the operations that it sends; runs without a GPU.

    python tools/model_kernels.py --output docs/results/kernels-model.json

Prints each kernel (instructions a logit by kind, registers, occupancy, what bounds it, microseconds) and the whole head, forward and
gradient, at the sizes of docs/kernels.md; `--ops` also every operation of one chunk with its bytes. See `kernel_model` for what is assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import head_ops
import torch
import triton
from compile_kernels import Variant, assemblers
from kernel_model import GPUS, KINDS, Code, Gpu, Reached, predict

from megatron_opd.recipe.objective import LossConfig
from megatron_opd.train.loss import Stored, make_loss

KERNELS = ("stats_kernel", "gradient_kernel", "chosen_kernel")
Codes = dict[tuple[str, int, int], Code]  # kernel, ids a row, architecture


def record(tokens: int, hidden: int, vocab: int, k: int, chunk: int, overlap_rows: int = 0) -> list[head_ops.Op]:
    """Operations of the head with the loss `opd` (one id a row) or `jsd` (the sampled token and k - 1 candidates)."""
    loss = make_loss(LossConfig(name="opd" if k == 1 else "jsd"))

    def of_chunk(logp: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
        stored = Stored(logp.new_empty(len(logp)), logp.new_empty(len(logp)), logp.new_empty(len(logp), k - 1) if k > 1 else None)
        return loss(logp, entropy, stored)[0].sum()

    return head_ops.record_head(tokens, hidden, vocab, k, of_chunk, chunk_tokens=chunk, overlap_rows=overlap_rows).ops


def compiled(ids: Sequence[int], gpus: Sequence[Gpu]) -> Codes:
    """Machine code of the kernels that the head launches: bf16, with entropy, no mask."""
    found: Codes = {}
    for arch in sorted({gpu.arch for gpu in gpus}):
        for k in ids:
            for kernel in KERNELS:
                found[kernel, k, arch] = Code.of(Variant(kernel, "bf16", k, entropy=True, mask=False), arch)
    return found


def head_seconds(ops: Sequence[head_ops.Op], gpu: Gpu, codes: Codes, vocab: int, k: int, reached: Reached) -> dict[str, float]:
    """Seconds of the products, of each kernel, and of the small operations."""
    seconds: dict[str, float] = dict.fromkeys(("products", *KERNELS, "small operations"), 0.0)
    for op in ops:
        moved = op.bytes_read + op.bytes_written
        from_memory = moved / (gpu.bandwidth * reached.bandwidth)
        if op.flops:
            seconds["products"] += max(op.flops / (gpu.tensor * reached.tensor), from_memory)
        elif op.name in KERNELS:
            seconds[op.name] += predict(codes[op.name, k, gpu.arch], gpu, op.rows, vocab, k, moved, reached).total
        else:
            seconds["small operations"] += max(reached.smallest, from_memory)
    return seconds


def print_kernels(
    codes: Codes, gpus: Sequence[Gpu], tokens: int, vocab: int, ids: Sequence[int], chunk: int, reached: Reached
) -> list[Any]:
    print(f"\nKernels over all {tokens} rows of {vocab} logits (bf16, entropy, no mask)\n")
    print(
        "| GPU | kernel | K | "
        + " | ".join(KINDS)
        + " | all | registers | programs | occupancy | bytes a logit | bound | us | memory | busiest pipe | issue |"
    )
    print("|---" * (len(KINDS) + 13) + "|")
    rows = []
    for gpu in gpus:
        for k in ids:
            launches = {op.name: op for op in record(tokens, 64, vocab, k, tokens) if op.name in KERNELS}
            for kernel in KERNELS:
                code, op = codes[kernel, k, gpu.arch], launches[kernel]
                if kernel == "gradient_kernel" and k != ids[0]:
                    continue  # it has no ids
                found = predict(code, gpu, tokens, vocab, k, op.bytes_read + op.bytes_written, reached)
                rows.append({"tokens": tokens, "vocab": vocab, "k": k, **found.row(), "compiled": asdict(code.measured)})
                pipes = {name: value for name, value in found.seconds.items() if name not in ("memory", "issue")}
                pipe = max(pipes, key=lambda name: pipes[name])
                counts = " | ".join(f"{found.per_element.get(name, 0):.2f}" for name in KINDS)
                print(
                    f"| {gpu.name} | {kernel} | {k} | {counts} | {sum(found.per_element.values()):.2f} | {code.measured.registers} "
                    f"| {found.programs} ({found.limited_by}) | {found.occupancy:.0%} | {found.bytes_moved / tokens / vocab:.2f} | {found.bound} "
                    f"| {1e6 * found.total:.0f} | {1e6 * found.seconds['memory']:.0f} | {pipe} {1e6 * pipes[pipe]:.0f} | {1e6 * found.seconds['issue']:.0f} |"
                )
    return rows


def print_heads(arguments: argparse.Namespace, codes: Codes, gpus: Sequence[Gpu], reached: Reached) -> list[Any]:
    print(f"\nThe whole head, forward and gradient, milliseconds (H={arguments.hidden}, chunks of {arguments.chunk})\n")
    print("| N | V | K | " + " | ".join(f"{gpu.name}: products + kernels + small = all" for gpu in gpus) + " | small operations a chunk |")
    print("|---" * (4 + len(gpus)) + "|")
    rows = []
    for tokens in arguments.tokens:
        for vocab in arguments.vocab:
            for k in arguments.ids:
                ops = record(tokens, arguments.hidden, vocab, k, arguments.chunk)
                small = sum(not op.flops and op.name not in KERNELS for op in ops) / -(-tokens // arguments.chunk)
                cells = []
                for gpu in gpus:
                    seconds = head_seconds(ops, gpu, codes, vocab, k, reached)
                    kernels = sum(seconds[name] for name in KERNELS)
                    parts = (seconds["products"], kernels, seconds["small operations"], sum(seconds.values()))
                    cells.append("{:.1f} + {:.2f} + {:.2f} = {:.1f}".format(*(1e3 * part for part in parts)))
                    rows.append({"gpu": gpu.name, "tokens": tokens, "vocab": vocab, "k": k, "seconds": seconds, "total": parts[-1]})
                print(f"| {tokens} | {vocab} | {k} | " + " | ".join(cells) + f" | {small:.0f} |", flush=True)
    return rows


def print_operations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every operation of one chunk, those of an eighth of its rows' overlap too, with its bytes."""
    found = {}
    for k in arguments.ids:
        table: dict[str, list[int]] = {}
        ops = record(arguments.chunk, arguments.hidden, arguments.vocab[0], k, arguments.chunk, arguments.chunk // 8 * (k > 1))
        for op in ops:
            entry = table.setdefault(op.name, [0, 0, 0])
            for position, value in enumerate((1, op.bytes_read, op.bytes_written)):
                entry[position] += value
        found[str(k)] = table
        if arguments.ops:
            print(f"\nOne chunk of {arguments.chunk} rows, K={k}\n\n| operation | times | MB read | MB written |\n|---|---|---|---|")
            for name, (times, bytes_read, bytes_written) in sorted(table.items(), key=lambda item: -item[1][1] - item[1][2]):
                print(f"| {name} | {times} | {bytes_read / 1e6:.2f} | {bytes_written / 1e6:.2f} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the LM-head loss on GPUs from machine code and operations.")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936, 75968, 37984], help="columns of a rank's shard")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 65], help="ids a token: the sampled one, and the teacher's candidates")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens a chunk")
    parser.add_argument("--ops", action="store_true", help="print every operation of one chunk")
    for name, value in asdict(Reached()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help="assumed: see Reached")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    arguments = parser.parse_args()
    gpus = [GPUS[name] for name in arguments.gpus]
    reached = Reached(**{name: getattr(arguments, name) for name in asdict(Reached())})
    codes = compiled(arguments.ids, gpus)
    versions = {"triton": triton.__version__, **assemblers(), "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in versions.items()), "; assumed:", reached)
    tokens = sorted(arguments.tokens)[len(arguments.tokens) // 2]
    result = {
        **versions,
        "command": " ".join(["python", *sys.argv]),
        "gpus": {gpu.name: asdict(gpu) for gpu in gpus},
        "assumed": asdict(reached),
        "kernels": print_kernels(codes, gpus, tokens, arguments.vocab[0], arguments.ids, arguments.chunk, reached),
        "heads": print_heads(arguments, codes, gpus, reached),
        "operations of a chunk (times, bytes read, bytes written)": print_operations(arguments),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
