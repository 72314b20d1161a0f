"""Commands on what lies on disk: inspect, show, report; and the demo."""

from __future__ import annotations

import argparse

from megatron_opd.commands.options import OVERRIDES, Stages, a_number, a_path, a_positive
from megatron_opd.errors import UserError

TOKENIZER = "the sampler's directory, where it is not found by itself"


def add_to(stages: Stages) -> None:
    inspect = stages.add_parser(
        "inspect",
        help="what is in a store",
        description="Print a store's manifest, lineage, counts, lengths, scores, and what its tokens say.",
    )
    inspect.add_argument("store", type=a_path, help="store directory or fsspec URL")
    inspect.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    inspect.add_argument("--manifests", action="store_true", help="only what the manifests say: no token is read")
    inspect.add_argument("--tokenizer", type=a_path, metavar="DIR", help=TOKENIZER)
    inspect.set_defaults(run=_inspect)
    _add_show(stages)
    report = stages.add_parser(
        "report",
        help="figures and tables of runs",
        description="Write report.html, with its figures and numbers as files beside it, from the metrics and evaluations of runs: which is best, by "
        "how much, how sure, at what cost.",
    )
    report.add_argument("runs", type=a_path, nargs="+", metavar="RUN", help="run directory")
    report.add_argument(
        "--group",
        metavar="FIELD",
        help="field of the recipe (train.loss.name; several with commas) whose values make groups (default: all but seeds)",
    )
    report.add_argument(
        "--baseline", metavar="NAME", help="group, run or model (sft) that the others are compared with (default: the first group)"
    )
    report.add_argument("--output", type=a_path, metavar="DIR", help="where to write (default: RUN/report of the first run)")
    report.set_defaults(run=_report)
    demo = stages.add_parser(
        "demo",
        help="the whole way on this machine, small",
        description="Teacher answers, SFT, rollouts, scores, distillation, evaluation: the same stages, small.",
    )
    demo.add_argument(
        "--model",
        choices=("arithmetic", "programs", "smollm2"),
        default="arithmetic",
        help="a tiny model of arithmetic, or of short programs, or SmolLM2-135M (make demo-smollm2 installs what it needs)",
    )
    demo.add_argument(
        "--run-dir", type=a_path, metavar="DIR", help="where to work (default: runs/demo-MODEL); an existing one is gone on with"
    )
    demo.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=OVERRIDES)
    demo.set_defaults(run=_demo)


def _add_show(stages: Stages) -> None:
    show = stages.add_parser(
        "show",
        help="rollouts, coloured by how far teacher and sampler disagree",
        description="Show rollouts, each token coloured by log pi_T - log pi_ref in nats: in the terminal, or as one HTML page.",
    )
    show.add_argument(
        "store", type=a_path, metavar="STORE", help="store directory or fsspec URL, or a run's folder or recipe: its rollouts"
    )
    show.add_argument("--teacher", metavar="NAME", help="whose scores, where several teachers scored the store")
    show.add_argument("--student", type=a_path, metavar="DIR", help="a Hugging Face model that scores the shown rollouts too")
    show.add_argument("--tokenizer", type=a_path, metavar="DIR", help=TOKENIZER)
    show.add_argument("--prompt", type=a_number, metavar="I", help="only the samples of one prompt, from 0")
    show.add_argument("--search", metavar="TEXT", help="only rollouts whose prompt or response holds this text")
    show.add_argument("--only", choices=("unfinished", "wrong", "excluded"), help="only such rollouts")
    show.add_argument(
        "--sort", choices=("disagreement", "length", "verdict"), help="the largest first, or the wrong ones (default: the store's order)"
    )
    show.add_argument("--worst", type=a_positive, metavar="K", help="the K of the largest disagreement: --sort disagreement --limit K")
    show.add_argument("--limit", type=a_positive, metavar="N", help="at most N rollouts (default: 5 in a terminal, 500 in a page)")
    show.add_argument("--html", type=a_path, metavar="FILE", help="write a page that holds all it needs, and print no rollouts")
    show.set_defaults(run=_show)


def _show(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.show.choose import Query
    from megatron_opd.show.run import show

    if args.worst is not None and (args.limit is not None or args.sort not in (None, "disagreement")):
        raise UserError("--worst K is --sort disagreement --limit K; leave --sort and --limit out")
    limit = args.worst or args.limit or (500 if args.html else 5)
    sort = "disagreement" if args.worst else args.sort
    query = Query(limit, prompt=args.prompt, search=args.search, sort=sort, only=args.only)
    show(args.store, query, teacher=args.teacher, student=args.student, tokenizer=args.tokenizer, page=args.html)


def _inspect(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.show.inspect import inspect_store

    return inspect_store(args.store, verify=args.verify, tokens=not args.manifests, tokenizer=args.tokenizer)


def _report(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.report.write import write_report

    write_report(args.runs, args.output, group=args.group, baseline=args.baseline)


def _demo(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.demo.run import run_demo

    return run_demo(args.model, args.command_line, run_dir=args.run_dir, overrides=args.overrides)
