"""slurm: the jobs of a recipe, as slurm/pipeline.sh submits them; slurm-ranks: one node's part of a training job."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_opd.commands.options import OVERRIDES, Stages, a_path, a_positive
from megatron_opd.errors import UserError
from megatron_opd.recipe.files import load_recipe

DEFAULT = "opd_8b"


def add_to(stages: Stages) -> None:
    slurm = stages.add_parser(
        "slurm",
        help="the jobs that slurm/pipeline.sh submits for a recipe",
        description="Print each job of a recipe as an sbatch line. slurm/pipeline.sh takes the same arguments, and submits them.",
    )
    slurm.add_argument("recipe", type=a_path, nargs="?", default=DEFAULT, help=f"a TOML file, or a shipped recipe (default: {DEFAULT})")
    slurm.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=OVERRIDES)
    slurm.add_argument("--from", dest="first", metavar="STAGE", help="the first stage to submit")
    slurm.add_argument("--until", dest="last", metavar="STAGE", help="the last stage to submit")
    slurm.add_argument("--dry-run", action="store_true", help="print what would be submitted (what this command does by itself)")
    slurm.add_argument(
        "--site", action="append", default=[], metavar="NAME=VALUE", help="a setting of slurm/env.sh; pipeline.sh gives them"
    )
    slurm.add_argument("--plan", action="store_true", help="print the jobs for pipeline.sh")
    slurm.set_defaults(run=_slurm)
    # Not for people: what a job's step runs on each node.
    ranks = stages.add_parser("slurm-ranks")
    ranks.add_argument("--per-node", type=a_positive, required=True)
    ranks.add_argument("--leader", required=True)
    ranks.add_argument("--port", type=a_positive, required=True)
    ranks.add_argument("words", nargs=argparse.REMAINDER)
    ranks.set_defaults(run=_ranks)
    # Nor this, in a job without GPUs: can the servers of the recipe be started here?
    servers = stages.add_parser("slurm-servers")
    servers.add_argument("recipe", type=a_path)
    servers.add_argument("overrides", nargs="*")
    servers.set_defaults(run=_servers)


def _slurm(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.pipeline.slurm import Cluster, describe, plan_jobs, shell_plan, show_plan

    name, overrides = (DEFAULT, [args.recipe, *args.overrides]) if _is_override(args.recipe) else (args.recipe, args.overrides)
    recipe = load_recipe(name, overrides)
    cluster = Cluster(recipe.slurm, dict(_setting(word) for word in args.site))
    jobs = plan_jobs(recipe, name, overrides, cluster, first=args.first, last=args.last)
    if args.plan:
        print(shell_plan(jobs, recipe, cluster), end="")
        print("\n".join(describe(jobs, recipe, cluster)), file=sys.stderr)
    else:
        print("\n".join(show_plan(jobs, recipe, cluster)))


def _is_override(word: str) -> bool:
    """FIELD=VALUE, and not a path with = in it, such as runs/lr=1e-6/recipe.toml; slurm/lib.sh has the same rule."""
    field, sign, _ = word.partition("=")
    return sign != "" and "/" not in field and not Path(word).exists()


def _servers(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.serve.launch import check_program

    engine = load_recipe(args.recipe, args.overrides).engine
    if engine.launch is not None and not engine.urls and engine.kind != "transformers":
        check_program(engine.launch)


def _setting(word: str) -> tuple[str, str]:
    name, sign, value = word.partition("=")
    if not sign:
        raise UserError(f"--site {word!r:.100}: NAME=VALUE is expected")
    return name, value


def _ranks(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.train.node import run_ranks

    return run_ranks(args.words, per_node=args.per_node, leader=args.leader, port=args.port)
