"""What the subcommands share: the recipe and its overrides, servers, types of options, the ranks of a training."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable

from megatron_opd.errors import ConfigError
from megatron_opd.hf.lineage import keep_hashes_in
from megatron_opd.recipe.config import Recipe
from megatron_opd.recipe.files import load_recipe, shipped_recipes
from megatron_opd.recipe.paths import expand_path
from megatron_opd.recipe.rounds import check_keep_alive, check_number, round_recipe
from megatron_opd.recipe.stored import storing

OVERRIDES = "recipe fields to change, for example train.lr=1e-6 train.parallel.tp=2"
MAKE = ("generate", "sft", "rollout", "score", "derive", "train", "rounds")  # their settings are kept in the run's folder
Stages = argparse._SubParsersAction


def recipe_stage(
    stages: Stages, name: str, text: str, run: Callable[..., object], *, sharded: bool = False, trains: bool = False, names: str = ""
) -> argparse.ArgumentParser:
    """A command for a recipe. `names`: what words without "=" among the overrides stand for; the command sorts them out."""
    parser = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + "." * (text[-1] not in ".?"))
    parser.add_argument(
        "recipe", type=a_path, help=f"a TOML file, the folder of a run, or a shipped recipe: {', '.join(shipped_recipes())}"
    )
    words, text = (f"{names}|FIELD=VALUE", f"{names.lower()}s of the recipe, and {OVERRIDES}") if names else ("FIELD=VALUE", OVERRIDES)
    parser.add_argument("overrides", nargs="*", metavar=words, help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the checked recipe, every default included, and exit")
    if sharded:
        add_servers(parser)
        parser.add_argument("--shard", default="0/1", metavar="I/N", help="make the parts p with p %% N == I, beside other workers")
    if trains:
        parser.add_argument(
            "--nproc",
            type=a_positive,
            metavar="N",
            help="ranks to start on this node (default: one a GPU, or as few as the layout needs on a CPU; not under torchrun)",
        )

    def run_with_recipe(args: argparse.Namespace, arguments: list[str]) -> object:
        recipe = load_recipe(args.recipe, args.overrides + flag_overrides(args), say=_say)
        if args.dry_run:
            number = getattr(args, "round", None)
            print((round_recipe(recipe, number and round_of(recipe, args))).to_toml(), end="")
            return 0
        keep_hashes_in(recipe.run_dir)
        with storing(recipe) if name in MAKE else contextlib.nullcontext():
            if trains and name == "rounds":
                return _run_rounds(run, recipe, args, arguments)
            if trains:
                return _run_ranks(run, recipe, name, args, arguments)
            return run(recipe, args)

    parser.set_defaults(run=run_with_recipe, has_names=bool(names))
    return parser


def _say(line: str) -> None:
    """Not on stdout, which a dry run fills with TOML."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=sys.stderr, flush=True)


def add_round(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--round", type=a_positive, metavar="N", help="which of the recipe's rounds (rounds.count), from 1")


def round_of(recipe: Recipe, args: argparse.Namespace) -> int | None:
    """The round that the command is for, None where the recipe has but one. Raises ConfigError."""
    return check_number(recipe, args.round, args.stage_name)


def add_servers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", action="append", metavar="URL", help="a running SGLang server (repeat for several), instead of the recipe's; engine.urls"
    )
    parser.add_argument(
        "--launch",
        nargs="?",
        const=1,
        type=a_positive,
        metavar="N",
        help="start N SGLang servers (default 1) for the stage; engine.launch.tp, .dp, .options and .command say how",
    )


def flag_overrides(args: argparse.Namespace) -> list[str]:
    """Flags that are only another spelling of recipe fields."""
    overrides = []
    if getattr(args, "url", None):
        overrides.append(f"engine.urls={args.url!r}")
    if getattr(args, "launch", None):
        overrides.append(f"engine.launch.servers={args.launch}")
    if getattr(args, "sft_teacher", None):
        overrides.append(f"rollout.sft_teacher={args.sft_teacher!r}")
    if getattr(args, "allow_teacher_mismatch", False):
        overrides += ["score.allow_teacher_mismatch=true", "train.allow_teacher_mismatch=true"]
    return overrides


def _run_ranks(run: Callable[..., object], recipe: Recipe, name: str, args: argparse.Namespace, arguments: list[str]) -> object:
    """In a rank: train. Otherwise start the ranks of this node."""
    from megatron_opd.train import launch

    if launch.is_rank():
        launch.end_with_launcher()
        return run(recipe, args)
    number = round_of(recipe, args) if name == "train" else None
    stage = getattr(round_recipe(recipe, number), name)
    ranks = args.nproc or launch.default_ranks(stage.parallel.min_ranks)
    if ranks == 1:
        return run(recipe, args)
    from megatron_opd.train.readiness import check_loggers, check_start

    launch.check_gpus(ranks)
    check_loggers(stage.loggers)
    # Before there are processes that would say so.
    check_start(recipe, name, number=number, ranks=ranks, allow_changes=args.continue_with_changes)
    return launch.launch(arguments, ranks, stage.output)


def _run_rounds(run: Callable[..., object], recipe: Recipe, args: argparse.Namespace, arguments: list[str]) -> object:
    """As `_run_ranks`; what the ranks will train on is not there yet."""
    from megatron_opd.train import launch

    if launch.is_rank():
        launch.end_with_launcher()
        return run(recipe, args)
    check_keep_alive(recipe)
    ranks = args.nproc or launch.default_ranks(recipe.train.parallel.min_ranks)
    recipe.train.check_ranks("train", ranks)
    return run(recipe, args) if ranks == 1 else launch.launch(arguments, ranks, recipe.train.output)


def a_path(text: str) -> str:
    try:
        return expand_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def a_positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is expected, got {text!r}")
    return int(text)


def a_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on is expected, got {text!r}")
    return int(text)


def a_gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a number of GiB above 0 is expected, got {text!r}")
    return number
