"""rounds: all rounds of rollout, score and train in one set of processes."""

from __future__ import annotations

import argparse

from megatron_opd.commands.options import Stages, add_servers, recipe_stage
from megatron_opd.recipe.config import Recipe


def add_to(stages: Stages) -> None:
    rounds = recipe_stage(
        stages,
        "rounds",
        "all rounds of rollout, score, train and convert, with one set of ranks and engines (rounds.keep_alive)",
        _rounds,
        trains=True,
    )
    add_servers(rounds)
    rounds.add_argument(
        "--continue-with-changes",
        action="store_true",
        help="go on in the output folder of a run that had another loss or teacher; recorded for ever after",
    )


def _rounds(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.pipeline.all_rounds import run_rounds

    run_rounds(recipe, allow_changes=args.continue_with_changes)
