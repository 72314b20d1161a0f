#!/usr/bin/env python3
"""One optimizer step on one GPU, ours against the same step written as Lightning OPD's reference code does it.

    python tools/bench_train.py --model Qwen3-8B --layers 4 --micro-batch-tokens 8192      # what fits 80 GB with all optimizer state
    python tools/bench_train.py --model Qwen3-8B --layers 4 --micro-batch-tokens 8192 --fp8 blockwise

Random weights, and a store of random rollouts with lengths as in DAPO-Math (log-normal, median 1100 tokens, cut at --longest). Each
side runs in a process of its own. The reference step: a forward pass for the reference model, one for the old log-probabilities, one
with full recomputation for the gradient; in each the logits of all tokens, in fp32, and their entropy. Prints a table and, with
--json, writes everything. On a CPU it runs too, for its test; times there say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import megatron_opd.model  # noqa: F401  before megatron.core
from megatron_opd.data.joined import open_training_stores
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import create_store, write_part, write_scores
from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.model import parallel
from megatron_opd.model.architecture import Architecture, read_architecture
from megatron_opd.model.student import Student
from megatron_opd.recipe.training_stages import TrainStage
from megatron_opd.records import (
    LOSS_SUM_NAMES,
    Finish,
    Lineage,
    ModelFingerprint,
    PromptFile,
    Rollout,
    SamplingParams,
    TeacherScores,
    TokenizerFingerprint,
)
from megatron_opd.store_records import ScoreManifest, StoreManifest
from megatron_opd.train import step as step_module
from megatron_opd.train.batches import BatchSource, MicroBatch
from megatron_opd.train.drift import Watch
from megatron_opd.train.identity import run_identity
from megatron_opd.train.loop import build_trainee
from megatron_opd.train.loss import opd_loss
from megatron_opd.train.metrics import peak_flops
from megatron_opd.train.optim import Trainee
from megatron_opd.train.readiness import Readiness

LOSS = opd_loss
PARTS = ("data", "forward", "head and loss", "backward", "optimizer")


def main() -> None:
    args = parse_arguments()
    if args.side is not None:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", args.model, args.layers)
        lengths = random_lengths(args.global_batch * (args.steps + 1), args.longest)
        make_store(Path(folder) / "store", read_architecture(Path(folder) / "model").vocab_size, lengths)
        results = {}
        for side in args.sides:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                raise SystemExit(f"{side}: exit code {run.returncode}; out of memory? fewer --layers or --micro-batch-tokens")
            results[side] = json.loads(run.stdout.splitlines()[-1])
    print(table(results))
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, **results}, indent=2) + "\n", encoding="utf-8"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen3-8B", help=f"a config.json, or one of {', '.join(KNOWN)}")
    parser.add_argument("--layers", type=int, help="keep this many of its layers")
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the longest response")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--recompute", choices=("none", "full"), default="full", help="of our step; the reference's is always full")
    parser.add_argument("--fp8", metavar="RECIPE", help="our step's matrix products in FP8")
    parser.add_argument("--sides", nargs="+", choices=("ours", "reference"), default=["ours", "reference"], help="what is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(directory: Path, name: str, layers: int | None) -> None:
    """Random weights in bf16 on a GPU, fp32 on a CPU. name: of KNOWN, or a config.json; layers: keep as many of its own."""
    on_gpu = torch.cuda.is_available()
    directory.mkdir()
    values = KNOWN[name] if name in KNOWN else json.loads(Path(name).read_text(encoding="utf-8"))
    kinds = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}  # which KNOWN has no need to say
    values = {"model_type": kinds.get(values["architectures"][0])} | values
    if layers is not None:
        values["num_hidden_layers"] = layers
        values.pop("layer_types", None)  # one a layer; transformers makes it
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16 if on_gpu else torch.float32)
    model.save_pretrained(directory)
    del model
    if on_gpu:
        torch.cuda.empty_cache()  # what this process holds, the measured ones can't have


def random_lengths(count: int, longest: int) -> list[tuple[int, int]]:
    """(prompt tokens, all tokens) of each rollout; lengths as in DAPO-Math, scaled to the longest response."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        start = int(rng.integers(min(60, longest), min(400, 2 * longest)))
        found.append((start, start + max(1, min(longest, int(np.exp(rng.normal(np.log(1100 * longest / 4096), 0.8)))))))
    return found


def make_store(path: Path, vocab: int, lengths: Sequence[tuple[int, int]]) -> None:
    """Random rollouts with scores, of these (prompt tokens, all tokens)."""
    rng, count = np.random.default_rng(1), len(lengths)
    tokenizer = TokenizerFingerprint(vocab_sha256="0" * 64, num_tokens=vocab)
    model = ModelFingerprint(name="random", config_sha256="0" * 64, weights_sha256="0" * 64, vocab_size=vocab, tokenizer=tokenizer)
    manifest = StoreManifest(
        sampler_role="student", sampler=model, lineage=Lineage(sft_teacher=model), prompts_per_part=count,
        prompts=PromptFile(name="random", sha256="0" * 64, num_prompts=count), sampling=SamplingParams(max_new_tokens=max(length - start for start, length in lengths)),
    )  # fmt: skip
    location = create_store(str(path), manifest)
    rollouts, scores = [], []
    for prompt, (start, length) in enumerate(lengths):
        logp, teacher = (np.full(length, np.nan, np.float32) for _ in range(2))
        logp[start:], teacher[start:] = (-rng.exponential(1.0, length - start) for _ in range(2))
        rollouts.append(Rollout(rng.integers(0, vocab, length).astype(np.int32), start, prompt, 0, Finish.STOP, logp))
        scores.append(TeacherScores(teacher))
    write_part(location, 0, rollouts, [], {})
    record = ScoreManifest(part=0, teacher=model, part_crc32c=StoreReader(str(path)).parts[0].crc32c, crc32c={})
    write_scores(location, "teacher", record, rollouts, scores)


class Clock:
    """Seconds by part; what is timed ends when the GPU is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = function(*args, **kwargs)
            self.seconds[part] += now() - start
            return result

        return run


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prepare(config: TrainStage) -> tuple[Trainee, Architecture, BatchSource, torch.device]:
    """What `train` builds before its first step, without a run's folder and checks; for a store of one rank."""
    device = parallel.start(config.parallel, seed=0)
    arch = read_architecture(config.init)
    source = BatchSource(
        open_training_stores(config.store), config, "teacher", sequence_mean=True, dp_rank=0, dp_size=1, pad_multiple=config.token_multiple
    )
    fingerprint = source.reader.manifest.sampler
    identity = run_identity(config, source.reader, arch, fingerprint, fingerprint)
    return build_trainee(Readiness(arch, fingerprint, Lineage(), identity, []), config, steps=100, device=device), arch, source, device


def read_batches(source: BatchSource, step: int, device: torch.device) -> list[MicroBatch]:
    """As `train` reads them: pinned where there is a GPU, which copies them while it computes."""
    batches = source.micro_batches(step)
    return [batch.pinned() for batch in batches] if device.type == "cuda" else batches


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side: throughput of undisturbed steps, then the split of as many steps that wait for the GPU between their parts."""
    ours = args.side == "ours"
    options: dict[str, Any] = {"fp8": {"recipe": args.fp8}} if args.fp8 and ours else {}
    config = TrainStage(
        init=str(args.folder / "model"), store=str(args.folder / "store"), output=str(args.folder / "out"), global_batch=args.global_batch,
        micro_batch_tokens=args.micro_batch_tokens, recompute=args.recompute if ours else "full", **options,
    )  # fmt: skip
    trainee, arch, source, device = prepare(config)
    train_step: Any = partial(step_module.train_step, trainee, arch, LOSS, chunk_tokens=config.chunk_tokens)
    if not ours:
        train_step = partial(reference_step, trainee, arch)
        step_module._loss_sums = reference_loss
    clock = Clock()

    def read(step: int) -> list[MicroBatch]:
        return read_batches(source, step, device) if ours else [batch.to(device) for batch in source.micro_batches(step)]

    first = train_step(read(0), seed=0)
    seconds = []
    for step in range(1, args.steps + 1):
        start = now()
        train_step(read(step), seed=step)
        seconds.append(now() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    split = split_times(clock, train_step, read, args.steps)
    lengths = np.concatenate([source.lengths(source.step_rollouts(step)) for step in range(1, args.steps + 1)])
    flops, total = arch.train_flops(int(lengths.sum()), int((lengths**2).sum())), sum(seconds)
    peak = peak_flops()
    parallel.stop()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": arch.num_parameters,
        "loss": first.sums.loss / first.sums.denominator,
        "tokens_per_second": int(lengths.sum()) / total,
        "step_seconds": seconds,
        "tflops": flops / total / 1e12,
        "mfu": None if peak is None else flops / total / peak,
        "memory_gib": memory,
        "split": {part: value / sum(split.values()) for part, value in split.items()},
    }


def split_times(clock: Clock, train_step: Any, read: Any, steps: int) -> dict[str, float]:
    """Seconds by part. Our head makes its gradient in the forward pass, so that "head and loss" holds it; recomputation is "backward"."""
    timed = {"_forward_step": "forward", "_loss_sums": "head and loss", "update": "optimizer"}
    kept = {name: getattr(step_module, name) for name in timed}
    for name, part in timed.items():
        setattr(step_module, name, clock.timed(part, kept[name]))
    total = 0.0
    for step in range(1, steps + 1):
        start = now()
        micro_batches = clock.timed("data", read)(step)
        train_step(micro_batches, seed=step)
        total += now() - start
    for name, function in kept.items():
        setattr(step_module, name, function)
    clock.seconds["backward"] = total - sum(clock.seconds.values())
    return {part: clock.seconds[part] for part in PARTS}


def reference_step(trainee: Trainee, arch: Architecture, micro_batches: list[MicroBatch], *, seed: int) -> Any:
    """The step as the reference code has it; the reference model's weights are ours here, which takes the same time."""
    for _ in range(2):
        with torch.no_grad():
            step_module.forward_backward(trainee.chunks, arch, LOSS, micro_batches, forward_only=True)
    return step_module.train_step(trainee, arch, LOSS, micro_batches, seed=seed)


def reference_loss(hidden: torch.Tensor, *, batch: MicroBatch, student: Student, arch: Architecture, **unused: Any) -> Any:
    """Stands in for `step._loss_sums`: fp32 logits of all tokens, their log-softmax and entropy, then the sampled tokens'."""
    weight_VH = student._head_weight()
    logp_SV = torch.log_softmax(F.linear(hidden[:, 0], weight_VH)[:, : arch.vocab_size].float(), -1)
    entropy = -(logp_SV.exp() * logp_SV).sum(-1).detach()[batch.rows].sum()
    logp = logp_SV[batch.rows].gather(1, batch.labels[:, None])[:, 0]
    assert batch.teacher_logp is not None
    total = -(batch.weights * (batch.teacher_logp - logp.detach()) * logp).sum()
    known = {"loss": total.detach(), "denominator": batch.denominator, "tokens": len(batch.rows), "entropy": entropy}
    sums = torch.zeros(len(LOSS_SUM_NAMES) + Watch().num_sums, dtype=torch.float64, device=total.device)
    for name, value in known.items():
        sums[LOSS_SUM_NAMES.index(name)] = value
    return total, torch.tensor(batch.denominator, dtype=torch.int, device=total.device), {"sums": sums}


def table(results: dict[str, dict[str, Any]]) -> str:
    first = next(iter(results.values()))
    lines = [
        f"{first['parameters'] / 1e9:.2f} billion parameters, {first['device']}",
        f"{'':<22}{''.join(f'{side:>12}' for side in results)}",
    ]

    def line(name: str, form: Any) -> None:
        lines.append(f"{name:<22}{''.join(f'{form(side):>12}' for side in results.values())}")

    line("tokens/s", lambda side: f"{side['tokens_per_second']:,.0f}")
    line("model TFLOP/s", lambda side: f"{side['tflops']:.1f}")
    line("MFU", lambda side: "" if side["mfu"] is None else f"{side['mfu']:.1%}")
    line("peak memory, GiB", lambda side: f"{side['memory_gib']:.1f}")
    for part in PARTS:
        line(f"  {part}", lambda side, part=part: f"{side['split'][part]:.1%}")
    if len(results) == 2:
        lines.append(f"speed-up {results['ours']['tokens_per_second'] / results['reference']['tokens_per_second']:.2f} x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
