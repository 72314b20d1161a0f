"""run and progress: a recipe as a whole."""

from __future__ import annotations

import argparse

from megatron_opd.commands.options import Stages, add_round, flag_overrides, recipe_stage, round_of
from megatron_opd.errors import UserError
from megatron_opd.recipe.config import Recipe


def add_to(stages: Stages) -> None:
    run = recipe_stage(stages, "run", "every stage of a recipe that is left, from the check of its inputs to the report", _run)
    run.add_argument(
        "--plan", action="store_true", help="only say how far each stage is and what comes next; exit code 3 if something is left"
    )
    run.add_argument(
        "--from", dest="first", metavar="STAGE", help="make again what is stale from this stage on; what it made before is set aside"
    )
    run.add_argument("--until", dest="last", metavar="STAGE", help="end after this stage")
    progress = recipe_stage(stages, "progress", "how far each stage is; exit code 3 if something is left or stale", _progress)
    progress.add_argument("--stage", metavar="STAGE", help="only this stage")
    add_round(progress)


def _run(recipe: Recipe, args: argparse.Namespace) -> int:
    if args.plan:
        from megatron_opd.pipeline.plan import show_plan

        if args.first is not None:
            raise UserError("--plan says what is stale; --from is for making it again: give one of them")
        return show_plan(recipe, typed=_typed(args), last=args.last)
    from megatron_opd.pipeline.run import run_recipe

    return run_recipe(recipe, args.command_line, typed=_typed(args), first=args.first, last=args.last)


def _progress(recipe: Recipe, args: argparse.Namespace) -> int:
    from megatron_opd.pipeline.plan import show_plan

    number = None if args.round is None else round_of(recipe, args)
    return show_plan(recipe, typed=_typed(args), only=args.stage, number=number)


def _typed(args: argparse.Namespace) -> list[str]:
    return [args.recipe, *args.overrides, *flag_overrides(args)]
