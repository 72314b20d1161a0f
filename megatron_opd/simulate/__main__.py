"""One training stage of a recipe as one rank on a simulated GPU; 'megatron-opd check RECIPE --gpus N --simulate' starts this."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_opd.cost.gpus import GPUS
from megatron_opd.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, and 2 for what the user can mend."""
    args = _parse(argv)
    try:
        _simulate(args)
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    return 0


def _simulate(args: argparse.Namespace) -> None:
    from megatron_opd.recipe.files import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from megatron_opd.simulate import gpu as _  # noqa: F401  before torch

    if not args.no_te:
        from megatron_opd.simulate import transformer_engine

        transformer_engine.install()
    from megatron_opd.simulate.report import describe, provenance
    from megatron_opd.simulate.stage import simulate_stage

    gpu = GPUS[args.gpu]
    simulation = simulate_stage(
        recipe,
        args.stage,
        ranks=args.gpus,
        rank=args.rank,
        layers=args.layers,
        micro_batches=args.micro_batches,
        lengths=args.lengths,
        steps=args.steps,
        with_save=args.save,
        gpu=replace(gpu, memory_gib=args.gpu_memory or gpu.memory_gib),
    )
    if args.json:
        Path(args.json).write_text(json.dumps(simulation.to_json(), indent=1) + "\n", encoding="utf-8")
    print("\n".join([*describe(simulation), *provenance(simulation)]))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_opd.simulate", description=__doc__)
    parser.add_argument("recipe", help="a TOML file, the folder of a run, or a shipped recipe")
    parser.add_argument("stage", choices=("sft", "train"))
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="recipe fields to change")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks in all")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which of them (default: 0)")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="which GPU is simulated (default: h100)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="its memory, if it is another than that kind's")
    parser.add_argument("--layers", type=int, metavar="L", help="fewer layers than the student has, to be quick")
    parser.add_argument("--micro-batches", type=int, default=2, metavar="N", help="of a step on this rank (default: 2)")
    parser.add_argument("--lengths", type=json.loads, metavar="LIST", help="tokens of the sequences of every micro-batch: '[4096,4096]'")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="optimizer steps; the last one is reported (default: 2)")
    parser.add_argument("--save", action="store_true", help="and the state of a checkpoint")
    parser.add_argument("--no-te", action="store_true", help="without Transformer Engine: Megatron-Core's local layers")
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.rank < args.gpus:
        parser.error(f"--rank {args.rank} is none of {args.gpus} ranks")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
