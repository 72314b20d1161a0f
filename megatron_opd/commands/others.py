"""Commands on what lies on disk: inspect, report; and the demo."""

from __future__ import annotations

import argparse

from megatron_opd.commands.options import OVERRIDES, Stages, a_path


def add_to(stages: Stages) -> None:
    inspect = stages.add_parser(
        "inspect", help="what is in a store", description="Print a store's manifest, lineage, counts, lengths and scores."
    )
    inspect.add_argument("store", type=a_path, help="store directory or fsspec URL")
    inspect.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    inspect.set_defaults(run=_inspect)
    report = stages.add_parser(
        "report",
        help="figures and tables of runs",
        description="Write report.html, figures and report.md from the metrics and evaluations of runs.",
    )
    report.add_argument("runs", type=a_path, nargs="+", metavar="RUN", help="run directory")
    report.add_argument("--output", type=a_path, metavar="DIR", help="where to write (default: RUN/report of the first run)")
    report.set_defaults(run=_report)
    demo = stages.add_parser(
        "demo",
        help="the whole way on this machine, small",
        description="Teacher answers, SFT, rollouts, scores, distillation, evaluation: the same stages, small.",
    )
    demo.add_argument(
        "--model",
        choices=("arithmetic", "smollm2"),
        default="arithmetic",
        help="a tiny arithmetic model, or SmolLM2-135M (make demo-smollm2 installs what it needs)",
    )
    demo.add_argument(
        "--run-dir", type=a_path, metavar="DIR", help="where to work (default: runs/demo-MODEL); an existing one is gone on with"
    )
    demo.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=OVERRIDES)
    demo.set_defaults(run=_demo)


def _inspect(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.data.inspect import inspect_store

    return inspect_store(args.store, verify=args.verify)


def _report(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.evaluate.report import write_report

    write_report(args.runs, args.output)


def _demo(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.demo.run import run_demo

    return run_demo(args.model, run_dir=args.run_dir, overrides=args.overrides)
