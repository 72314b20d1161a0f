"""The command line: one subcommand a stage. A stage's code is imported when it runs, so one package works in both containers."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_opd import __version__
from megatron_opd.commands import compare, convert, data, others, recipe, rounds, run, slurm, stages
from megatron_opd.errors import INTERRUPTED, Interrupted, QuarantineError, ServersLost, UserError
from megatron_opd.safety.redact import redact_override, redact_words
from megatron_opd.safety.untrusted import Console, check_characters, printable, shortened


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for what the user can mend, 3 for too many quarantined rollouts,
    4 for servers that were lost and for disks and mounts that fail, 1 for our own faults."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with contextlib.redirect_stdout(Console(sys.stdout)):  # names and texts of others are printed everywhere
        return _run(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(shortened(printable(message)))


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    for word in arguments:
        try:
            check_characters(word, "the command line")
        except UserError as error:
            return _fail(f"{str(error).partition(';')[0]}; names must be in UTF-8")
    args, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option: overrides may stand there too.
    named = getattr(args, "has_names", False)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or ("=" not in word and not named) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(map(redact_override, redact_words(rest)))}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    # Notices of libraries that a reader can do nothing about (which optional packages are not there).
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        return int(args.run(args, arguments) or 0)
    except QuarantineError as error:
        return _fail(str(error), code=3)
    except ServersLost as error:
        return _fail(str(error), code=4)
    except UserError as error:
        return _fail(str(error), rank=error.rank)
    except BrokenPipeError:  # who read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}; nothing that was finished is lost: fix this and run the same command again"
        return _fail(message, code=4 if error.errno in _OF_NODE else 2)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\ninterrupted: {_left_behind(args)}", file=sys.stderr)
        return INTERRUPTED
    except Interrupted:
        return INTERRUPTED


# Errors of disks and network file systems: another node may not have them.
_OF_NODE = (errno.EIO, errno.ESTALE, errno.ENODEV, getattr(errno, "EREMOTEIO", errno.EIO))
_KEPT = {
    **dict.fromkeys(
        ("generate", "rollout", "score", "derive", "eval", "import"),
        "parts that are sealed are kept, others are made again; the same command goes on",
    ),
    **dict.fromkeys(("sft", "train", "rounds"), "not within a step; checkpoints that were saved stay; the same command goes on"),
    "convert": "no directory is left half made; the same command makes it",
    **dict.fromkeys(("run", "demo"), "what its finished stages made is kept; the same command goes on"),
}


def _left_behind(args: argparse.Namespace) -> str:
    """What Ctrl-C leaves of a stage."""
    return _KEPT.get(args.stage_name, "nothing was changed that the same command does not make again")


def _fail(message: str, *, code: int = 2, rank: int | None = None) -> int:
    if rank is not None or int(os.environ.get("RANK", "0")) == 0:
        of_rank = f" on rank {rank}" if rank else ""
        print(f"megatron-opd: error{of_rank}: {shortened(printable(message))}", file=sys.stderr, flush=True)
    if os.environ.get("OPD_TRACEBACK") == "1":
        traceback.print_exc()
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megatron-opd",
        description="Offline on-policy distillation: sample once, score once, train with no teacher server.",
        epilog="'run' does everything that is left of a recipe: generate, sft, convert, rollout, score, check, train, convert, eval, report. "
        "Each stage has a command of its own, and goes on where it was stopped.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-opd {__version__}")
    parser.set_defaults(command_line=main)  # of a command that runs others
    commands = parser.add_subparsers(metavar="STAGE", dest="stage_name", required=True)
    run.add_to(commands)
    stages.add_to(commands)
    data.add_to(commands)
    rounds.add_to(commands)
    convert.add_to(commands)
    recipe.add_to(commands)
    others.add_to(commands)
    compare.add_to(commands)
    slurm.add_to(commands)
    return parser
