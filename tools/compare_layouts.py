#!/usr/bin/env python3
"""Which layout of a recipe's training is fastest and fits: python tools/compare_layouts.py opd_8b train [--gpu h200] [--simulate 3]

Without a recipe: all shipped recipes of 8 GPUs and more as they are (--simulate 1 --json docs/results/layouts.json).

Every candidate is a recipe with other `parallel`, `recompute`, `micro_batch_tokens` or `optimizer_offload`; all else stays, so that losses
differ by rounding alone. Memory and time are those of the closed form (megatron_opd/estimate), for rollouts of --tokens tokens. With
--simulate N the recipe as it is and the fastest N also run at full size on a simulated GPU (rank 0, and of a pipeline the last). What fits
has tensors x 1.05 (fragmentation) + 3 GiB (CUDA, cuBLAS, NCCL) in 92 % of the GPU's memory; of a mixture's experts, 1.25 times the even
share of tokens is counted. Prints Markdown, and with --json FILE writes it as JSON too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.cost.gpus import GPUS, Gpu
from megatron_opd.estimate.activations import layer_bytes
from megatron_opd.estimate.memory import FIXED_BYTES, FRAGMENTATION, GIB, Layout, layers_of_stage, stage_memory
from megatron_opd.estimate.step_time import StepTime, predict_work
from megatron_opd.estimate.traffic import StepWork, step_work
from megatron_opd.estimate.workload import student_of
from megatron_opd.model.architecture import Architecture
from megatron_opd.recipe.files import load_recipe, shipped_recipes
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.simulate.needs import python_path

MARGIN = 0.92  # of the GPU's memory
WORTH = 0.02  # share of the time that each further mechanism must save to go before a simpler setting
IMBALANCE = 1.25  # tokens of the fullest rank's experts over the mean
TOKENS = {"train": 3000.0, "sft": 9000.0}  # of a rollout on average
SHORTEST = {"train": 6144, "sft": 20480}  # tokens of a micro-batch that has room for the longest sequence; sft's is the paper's
MICRO_BATCHES = (6144, 8192, 12288, 16384, 20480)
DENSE = [("none", []), ("selective", ["layernorm"]), ("selective", ["layernorm", "mlp"]), ("full", [])]
MIXTURE = [("none", []), ("selective", ["layernorm", "moe_act"]), ("selective", ["layernorm", "moe"]), ("full", [])]


@dataclass(frozen=True)
class Candidate:
    """A setting and what the closed form says of it. `peak`: bytes of tensors on the fullest GPU."""

    config: TrainerConfig
    layout: Layout
    work: StepWork
    time: StepTime
    peak: float

    @property
    def mean(self) -> float:
        """Seconds of a step: the geometric mean of best and worst case."""
        return math.sqrt(self.time.total.low * self.time.total.high)

    @property
    def mechanisms(self) -> int:
        """How many of pipeline, chunks, context parallelism, recomputation and offloading it needs."""
        return sum(
            (
                self.layout.pp > 1,
                self.layout.vpp > 1,
                self.layout.cp > 1,
                self.config.recompute != "none",
                self.config.optimizer_offload > 0,
            )
        )

    def describe(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name in ("tp", "cp", "pp", "vpp", "ep", "dp") if (size := getattr(self.layout, name)) > 1)
        modules = f" ({', '.join(self.config.recompute_modules)})" if self.config.recompute == "selective" else ""
        offload = f", offload {self.config.optimizer_offload:g}" if self.config.optimizer_offload else ""
        return f"{sizes}; {self.config.micro_batch_tokens} tokens; recompute {self.config.recompute}{modules}{offload}"

    def overrides(self, stage: str) -> list[str]:
        """The setting as words for a command."""
        parallel = ", ".join(f"{name} = {getattr(self.layout, name)}" for name in ("tp", "cp", "pp", "vpp", "ep"))
        config = self.config
        words = [f"parallel={{{parallel}}}", f"recompute={config.recompute}", f"micro_batch_tokens={config.micro_batch_tokens}"]
        words.append(f"recompute_modules={json.dumps(config.recompute_modules)}")
        words += [
            f"optimizer_offload={config.optimizer_offload}",
            f"precision_aware_optimizer={json.dumps(config.precision_aware_optimizer)}",
        ]
        return [f"{stage}.{word}" for word in words]


def occupied(peak: float) -> float:
    """Bytes of a GPU that a peak of tensors takes."""
    return peak * (1 + FRAGMENTATION) + FIXED_BYTES


def peak_bytes(arch: Architecture, config: TrainerConfig, layout: Layout, micro_batches: float, *, imbalance: float = IMBALANCE) -> float:
    """On the fullest stage, in a step or while it is built; the fullest rank's experts have `imbalance` times the mean's tokens."""
    stages = [stage_memory(arch, config, layout, stage, micro_batches=max(1, round(micro_batches))) for stage in range(layout.pp)]
    uneven = 0.0
    if arch.num_experts:
        experts = arch.experts_per_token * (2 * arch.hidden_size + 6 * arch.ffn_size) / layout.tp
        again = experts if config.recompute == "full" else min(experts, layer_bytes(arch, config, layout).again)  # of one layer at a time
        working = arch.experts_per_token * 8 * arch.hidden_size / layout.tp
        tokens = config.micro_batch_tokens / layout.cp
        uneven = (imbalance - 1) * tokens * ((experts - again) * layers_of_stage(arch, layout, 0) + again + working)
    step = max(sum(memory.parts.values()) for memory in stages) + uneven
    return max(step, *(memory.building for memory in stages))


def judge(arch: Architecture, config: TrainerConfig, gpus: int, gpu: Gpu, tokens: float) -> Candidate:
    layout = Layout.of(config, gpus)
    step = config.step_tokens(tokens)
    work = step_work(arch, config, layout, tokens=step, squared=step * tokens)
    mixture, fp8 = bool(arch.num_experts), config.fp8 is not None
    time = predict_work(work, gpu=gpu, mixture=mixture, fp8=fp8, pp=layout.pp, vpp=layout.vpp)
    return Candidate(config, layout, work, time, peak_bytes(arch, config, layout, work.micro_batches))


def candidates(arch: Architecture, stage: str, config: TrainerConfig, gpus: int, gpu: Gpu, tokens: float) -> Iterator[Candidate]:
    """All settings of the grid that divide; whether they fit is not looked at."""
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2), (1, 2), (1, 2, 4, 8) if arch.num_experts else (1,))
    offloads = (0.0, 0.25, 0.5, 0.75, 1.0) if arch.num_experts else (0.0,)
    for tp, pp, vpp, cp, ep in sizes:
        parallel = config.parallel.model_copy(update={"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep})
        if (vpp > 1 and pp == 1) or arch.layout_faults(parallel, config.fp8):
            continue
        budgets = [size for size in MICRO_BATCHES if size >= SHORTEST[stage] and (size <= 16384 or stage == "sft")]
        for (recompute, modules), budget, offload in itertools.product(MIXTURE if arch.num_experts else DENSE, budgets, offloads):
            changed = config.model_copy(
                update={
                    "parallel": parallel, "micro_batch_tokens": budget, "recompute": recompute,
                    "recompute_modules": modules or config.recompute_modules, "optimizer_offload": offload,
                    "precision_aware_optimizer": offload > 0,
                }
            )  # fmt: skip
            if not Layout.of(changed, gpus).faults(changed):
                yield judge(arch, changed, gpus, gpu, tokens)


def simulate(recipe: str, stage: str, candidate: Candidate, *, gpus: int, gpu: str) -> dict[str, Any]:
    """Two micro-batches a pipeline stage on a simulated GPU, in processes of their own: what is kept of the fullest rank.

    Raises CalledProcessError.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        for rank in [0] if candidate.layout.pp == 1 else [0, gpus - 1]:
            command = [sys.executable, "-W", "ignore", "-m", "megatron_opd.simulate", recipe, stage, *candidate.overrides(stage)]
            command += ["--gpus", str(gpus), "--rank", str(rank), "--gpu", gpu, "--json", str(result)]
            subprocess.run(
                [*command, "--micro-batches", str(2 * candidate.layout.pp)],
                check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": python_path()},
            )  # fmt: skip
            found.append(json.loads(result.read_text(encoding="utf-8")))
    return reduced(max(found, key=lambda simulation: simulation["peak_bytes"]))


def row(candidate: Candidate, simulated: dict[str, Any] | None) -> dict[str, Any]:
    """One line of the table: GiB, TFLOP, GiB sent and seconds of one rank and step."""
    found = {
        "setting": candidate.describe(),
        "peak_gib": round(candidate.peak / GIB, 1),
        "tflop": round(candidate.work.flops / 1e12),
        "sent_gib": {kind: round(size / GIB, 1) for kind, size in candidate.work.sent.items()},
        "seconds": [round(candidate.time.total.low, 2), round(candidate.time.total.high, 2)],
        "split": candidate.time.describe(),
    }
    if candidate.config.steps is not None:
        hours = candidate.config.steps * candidate.layout.gpus / 3600
        found["gpu_hours"] = [round(candidate.time.total.low * hours, 1), round(candidate.time.total.high * hours, 1)]
    return found | ({} if simulated is None else {"simulated": simulated})


def reduced(simulation: dict[str, Any]) -> dict[str, Any]:
    """What the table keeps of a simulation."""
    messages = simulation["messages"]
    return {
        "peak_gib": round(simulation["peak_bytes"] / GIB, 1),
        "build_gib": round(simulation["peaks"]["build"] / GIB, 1),
        "rank": simulation["rank"],
        "micro_batches": simulation["micro_batches"],
        "lengths": simulation["lengths"],
        "tflop": round(simulation["flops"] / 1e12, 1),
        "waits": sum(simulation["waits"].values()),
        "messages": [f"{m['operation']} over {m['group']} ({m['ranks']}): {m['calls']}, {m['bytes'] / GIB:.2f} GiB" for m in messages],
        "versions": simulation["versions"],
    }


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | setting | peak, GiB (simulated) | of the GPU | TFLOP | GiB sent | seconds | GPU hours |\n|---|---|---|---|---|---|---|---|"
    for found in rows:
        simulated = found.get("simulated")
        peak = max(found["peak_gib"], simulated["peak_gib"] if simulated else 0)
        sent = ", ".join(f"{kind} {size:g}" for kind, size in found["sent_gib"].items())
        shown = f"{found['peak_gib']}" + (f" ({simulated['peak_gib']})" if simulated else "")
        share = occupied(peak * GIB) / (GPUS[found["gpu"].lower()].memory_gib * GIB)
        low, high = found["seconds"]
        hours = " to ".join(f"{hour:,.0f}" if hour >= 1000 else f"{hour:.3g}" for hour in found.get("gpu_hours", []))
        name = f"{found['recipe']} {found['stage']}".strip()
        yield f"| {name} | {found['setting']} | {shown} | {share:.0%} | {found['tflop']:,} | {sent} | {low:.1f} to {high:.1f} | {hours} |"


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The recipe as it is, and the fastest that fit."""
    arch, config, gpus = read(args.recipe, args.stage, args.overrides)
    gpu = GPUS[args.gpu]
    tokens = args.tokens or TOKENS[args.stage]
    room = MARGIN * gpu.memory_gib * GIB
    grid = list(candidates(arch, args.stage, config, gpus, gpu, tokens))
    fitting = sorted((c for c in grid if occupied(c.peak) <= room), key=lambda c: c.mean * (1 + WORTH * c.mechanisms))
    print(f"{args.recipe}, {args.stage}, {gpus} x {gpu.name}, {tokens:g} tokens a rollout: {len(fitting)} of {len(grid)} settings fit\n")
    rows = []
    for number, candidate in enumerate([judge(arch, config, gpus, gpu, tokens), *fitting[: args.best]]):
        wanted = args.simulate and number <= args.simulate
        found = simulate(args.recipe, args.stage, candidate, gpus=gpus, gpu=args.gpu) if wanted else None
        rows.append({"recipe": args.recipe if not number else "", "stage": args.stage, "gpu": gpu.name} | row(candidate, found))
    return rows


def shipped(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every stage of the shipped recipes for nodes of GPUs, as it is; names that end in _h200 are for that GPU.

    What --json FILE already has of a setting is not simulated again; with --simulate the rest is, of the recipes of --only.
    """
    before = json.loads(Path(args.json).read_text(encoding="utf-8"))["rows"] if args.json and Path(args.json).exists() else []
    known = {(found["recipe"], found["stage"], found["setting"]): found.get("simulated") for found in before}

    def one(name: str, stage: str) -> dict[str, Any]:
        kind = "h200" if name.endswith("_h200") else "h100"
        arch, config, gpus = read(name, stage, [])
        candidate = judge(arch, config, gpus, GPUS[kind], TOKENS[stage])
        simulated = known.get((name, stage, candidate.describe()))
        if simulated is None and args.simulate and name in (args.only or names):
            simulated = simulate(name, stage, candidate, gpus=gpus, gpu=kind)
            print(f"{name} {stage}: {simulated['peak_gib']} GiB", file=sys.stderr, flush=True)
        return {"recipe": name, "stage": stage, "gpu": GPUS[kind].name} | row(candidate, simulated)

    names = own_layouts()
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda pair: one(*pair), itertools.product(names, TOKENS)))


def own_layouts() -> list[str]:
    """Shipped recipes for nodes of GPUs; of those that train one student in one way (other prompts, another teacher) the first by name."""
    found: dict[str, str] = {}
    for name in shipped_recipes():
        recipe = load_recipe(name)
        trainings = [
            stage.model_dump(exclude={"init", "store", "output", "teacher", "allow_teacher_mismatch"})
            for stage in (recipe.sft, recipe.train)
        ]
        if recipe.engine.kind == "sglang":
            found.setdefault(repr((recipe.models.student, trainings, name.endswith("_h200"))), name)
    return list(found.values())


def read(name: str, stage: str, overrides: list[str]) -> tuple[Architecture, TrainerConfig, int]:
    """The student's sizes, the stage's settings and the GPUs that the recipe asks for."""
    recipe = load_recipe(name, overrides)
    arch = student_of(recipe).arch
    assert arch is not None
    return arch, getattr(recipe, stage), recipe.slurm.nodes * recipe.slurm.gpus_per_node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("stage", nargs="?", choices=("sft", "train"), default="train")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--tokens", type=float, help="of a rollout on average, prompt and response (default: train 3000, sft 9000)")
    parser.add_argument("--best", type=int, default=8, help="how many to list (default: 8)")
    parser.add_argument("--simulate", type=int, default=0, metavar="N", help="simulate so many of them, and the recipe as it is")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of all recipes simulate these")
    parser.add_argument("--jobs", type=int, default=1, help="simulations at once, where all recipes are looked at")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_intermixed_args()
    rows = compare(args) if args.recipe else shipped(args)
    print("\n".join(markdown(rows)))
    if args.json:
        command = " ".join(["python", *sys.argv])
        Path(args.json).write_text(json.dumps({"command": command, "tokens": TOKENS, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
