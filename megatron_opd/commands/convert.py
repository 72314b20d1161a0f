"""convert: checkpoints between Megatron and Hugging Face."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megatron_opd.commands.options import Stages, a_path, add_round, recipe_stage, round_of
from megatron_opd.recipe.config import Recipe


def add_to(stages: Stages) -> None:
    convert = stages.add_parser(
        "convert",
        help="checkpoints between Megatron and Hugging Face",
        description="Convert checkpoints; both directions are bit-exact in the stored dtype.",
    )
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    to_hf = directions.add_parser("to-hf", help="Megatron checkpoint to a Hugging Face directory")
    to_hf.add_argument("checkpoint", type=a_path, help="a run's output directory (its latest checkpoint), or one step folder")
    to_hf.add_argument("target", type=a_path, help="directory to write; must not hold anything")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the stored one")
    to_hf.set_defaults(run=_to_hf)
    of_recipe = recipe_stage(
        directions, "trained", "what a recipe's sft or train made, to where its next stage looks for it; done already: nothing", _trained
    )
    of_recipe.add_argument("--stage", choices=("sft", "train"), default="train")
    add_round(of_recipe)
    to_mcore = directions.add_parser("to-mcore", help="Hugging Face directory to a Megatron checkpoint")
    to_mcore.add_argument("model", type=a_path, help="Hugging Face directory")
    to_mcore.add_argument("target", type=a_path, help="directory to write; must not hold anything")
    to_mcore.set_defaults(run=_to_mcore)


def _to_hf(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.convert.commands import to_hf

    _tell(lambda: f"wrote {to_hf(args.checkpoint, args.target, dtype=args.dtype)}")


def _trained(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.pipeline.trained import trained_to_hf

    number = round_of(recipe, args) if args.stage == "train" else None
    _tell(lambda: trained_to_hf(recipe, args.stage, number))


def _to_mcore(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.convert.commands import to_mcore

    _tell(lambda: f"wrote {to_mcore(args.model, args.target)}")


def _tell(convert: Callable[[], str]) -> None:
    """Print what a conversion did, or that another process did the same meanwhile."""
    from megatron_opd.convert.staging import AlreadyMade

    try:
        print(convert())
    except AlreadyMade as found:
        print(found)
