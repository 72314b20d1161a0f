"""The command that compares two models by their graded samples."""

from __future__ import annotations

import argparse

from megatron_opd.commands.options import Stages, a_path


def add_to(stages: Stages) -> None:
    parser = stages.add_parser(
        "compare",
        help="the difference of two models, paired by prompt",
        description="Compare two models of one or two runs: for each evaluation that both have, AFTER minus BEFORE with its 95 % interval.",
    )
    side = "folder of a run, and which of its models (default: opd, or the only one)"
    parser.add_argument("before", type=a_path, metavar="BEFORE[:MODEL]", help=side)
    parser.add_argument("after", type=a_path, metavar="AFTER[:MODEL]", help=side)
    parser.add_argument("--json", type=a_path, metavar="FILE", help="write the figures, and the prompts that one alone solved")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.evaluate.compare import compare

    compare(args.before, args.after, output=args.json)
