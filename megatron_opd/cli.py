"""The command line: one subcommand a stage. A stage's code is imported when it runs, so one package works in both containers."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_opd import __version__
from megatron_opd.config import STAGES, Recipe, require
from megatron_opd.errors import INTERRUPTED, ConfigError, Interrupted, QuarantineError, UserError
from megatron_opd.lineage import keep_hashes_in
from megatron_opd.paths import expand_path
from megatron_opd.recipe_files import apply_overrides, build_recipe, load_recipe, shipped_recipes
from megatron_opd.redact import public_address, redact_override, redact_words
from megatron_opd.untrusted import Console, check_characters, printable, shortened

_OVERRIDES = "recipe fields to change, for example train.lr=1e-6 train.parallel.tp=2"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for what the user can mend, 3 for too many quarantined rollouts, 1 for our own faults."""
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
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(map(redact_override, redact_words(rest)))}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    # Notices of libraries that a reader can do nothing about (which optional packages are not there).
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    try:
        return int(args.run(args, arguments) or 0)
    except QuarantineError as error:
        return _fail(str(error), code=3)
    except UserError as error:
        return _fail(str(error), rank=error.rank)
    except BrokenPipeError:  # who read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; nothing that was finished is lost: mend this and run the same command again")
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\ninterrupted: {_left_behind(args)}", file=sys.stderr)
        return INTERRUPTED
    except Interrupted:
        return INTERRUPTED


_KEPT = {
    **dict.fromkeys(
        ("generate", "rollout", "score", "eval"), "parts that are sealed are kept, others are made again; the same command goes on"
    ),
    **dict.fromkeys(("sft", "train"), "not within a step; checkpoints that were saved stay; the same command goes on"),
    "convert": "no directory is left half made; the same command makes it",
    "demo": "what its finished stages made is kept; the same command goes on",
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
        epilog="The way of a run: generate, sft, convert, rollout, score, check, train, convert, eval, report. Every stage goes on where it was stopped.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-opd {__version__}")
    stages = parser.add_subparsers(metavar="STAGE", dest="stage_name", required=True)
    _recipe_stage(stages, "generate", "teacher answers for SFT, into a store", _generate, sharded=True)
    sft = _recipe_stage(stages, "sft", "fine-tune the base student on the teacher's answers", _sft, trains=True)
    rollout = _recipe_stage(stages, "rollout", "responses of the fine-tuned student, into a store", _rollout, sharded=True)
    rollout.add_argument("--sft-teacher", metavar="DIR", help="declare the SFT teacher of a student that was fine-tuned elsewhere")
    score = _recipe_stage(stages, "score", "the teacher's log-probabilities of the rollouts, into the same store", _score, sharded=True)
    train = _recipe_stage(stages, "train", "distil on the scored rollouts", _train, trains=True)
    _add_convert(stages)
    _add_servers(_recipe_stage(stages, "eval", "accuracy, and reverse KL to the teacher, of one model", _eval))
    check = _recipe_stage(stages, "check", "is everything ready to train? Would it fit (--gpus)? Do the engines agree (--model)?", _check)
    check.add_argument(
        "--stage",
        choices=("inputs", "sft", "train"),
        default="train",
        help="what shall start: 'inputs' looks at what you bring (models, prompt files), before anything has run",
    )
    check.add_argument(
        "--gpus", type=_positive, metavar="N", help="estimate memory, speed and GPU hours on N GPUs, before anything has run"
    )
    check.add_argument("--gpu-memory", type=_gib, metavar="GIB", help="memory of one GPU for --gpus (default: 80)")
    check.add_argument(
        "--model", type=_path, metavar="DIR", help="instead of a recipe give a store, and here its student: compares SGLang and Megatron"
    )
    check.add_argument("--rollouts", type=_positive, default=64, metavar="N", help="with --model: rollouts to compare on")
    check.add_argument(
        "--ranks", type=_positive, metavar="N", help="how many processes will train: refused if the layout can't be made of them"
    )
    _add_servers(check)
    for command in (score, train, check):
        command.add_argument(
            "--allow-teacher-mismatch",
            action="store_true",
            help="go on with a teacher that is not the SFT teacher; recorded for ever after",
        )
    for command in (sft, train, check):
        command.add_argument(
            "--continue-with-changes",
            action="store_true",
            help="go on in the output folder of a run that had another loss, teacher or initial model; recorded for ever after",
        )
    progress = _recipe_stage(stages, "progress", "how far each stage is; exit code 3 if something is left to do", _progress)
    progress.add_argument("--stage", choices=STAGES, help="only this stage")
    inspect = stages.add_parser(
        "inspect", help="what is in a store", description="Print a store's manifest, lineage, counts, lengths and scores."
    )
    inspect.add_argument("store", type=_path, help="store directory or fsspec URL")
    inspect.add_argument("--verify", action="store_true", help="read everything and compare checksums")
    inspect.set_defaults(run=_inspect)
    report = stages.add_parser(
        "report",
        help="figures and tables of runs",
        description="Write report.html, figures and report.md from the metrics and evaluations of runs.",
    )
    report.add_argument("runs", type=_path, nargs="+", metavar="RUN", help="run directory")
    report.add_argument("--output", type=_path, metavar="DIR", help="where to write (default: RUN/report of the first run)")
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
        "--run-dir", type=_path, metavar="DIR", help="where to work (default: runs/demo-MODEL); an existing one is gone on with"
    )
    demo.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=_OVERRIDES)
    demo.set_defaults(run=_demo)
    return parser


def _recipe_stage(
    stages: argparse._SubParsersAction, name: str, text: str, run: Callable[..., object], *, sharded: bool = False, trains: bool = False
) -> argparse.ArgumentParser:
    parser = stages.add_parser(name, help=text, description=text[0].upper() + text[1:] + "." * (text[-1] not in ".?"))
    parser.add_argument("recipe", type=_path, help=f"a TOML file, or a shipped recipe: {', '.join(shipped_recipes())}")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help=_OVERRIDES)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and exit")
    if sharded:
        _add_servers(parser)
        parser.add_argument("--shard", default="0/1", metavar="I/N", help="make the parts p with p %% N == I, beside other workers")
    if trains:
        parser.add_argument(
            "--nproc",
            type=_positive,
            metavar="N",
            help="ranks to start on this node (default: one a GPU, or as few as the layout needs on a CPU; not under torchrun)",
        )

    def run_with_recipe(args: argparse.Namespace, arguments: list[str]) -> object:
        if getattr(args, "model", None):
            return _calibrate(args)
        recipe = load_recipe(args.recipe, args.overrides + _flag_overrides(args))
        if args.dry_run:
            print(recipe.to_toml(), end="")
            return 0
        keep_hashes_in(recipe.run_dir)
        if trains:
            return _run_ranks(run, recipe, name, args, arguments)
        return run(recipe, args)

    parser.set_defaults(run=run_with_recipe)
    return parser


def _add_servers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", action="append", metavar="URL", help="a running SGLang server (repeat for several); engine.urls")
    parser.add_argument(
        "--launch",
        nargs="?",
        const=1,
        type=_positive,
        metavar="N",
        help="start N SGLang servers (default 1) for the stage; engine.launch.tp, .dp, .options and .command say how",
    )


def _flag_overrides(args: argparse.Namespace) -> list[str]:
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
    stage = getattr(recipe, name)
    ranks = args.nproc or launch.default_ranks(stage.parallel.min_ranks)
    if ranks == 1:
        return run(recipe, args)
    from megatron_opd.train.readiness import check_start

    check_start(recipe, name, ranks=ranks, allow_changes=args.continue_with_changes)  # before there are processes that would say so
    return launch.launch(arguments, ranks, stage.output)


def _generate(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.sample import generate
    from megatron_opd.serve.stage import Shard

    generate(recipe, Shard.parse(args.shard))


def _rollout(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.sample import rollout
    from megatron_opd.serve.stage import Shard

    rollout(recipe, Shard.parse(args.shard))


def _score(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.serve.score import score
    from megatron_opd.serve.stage import Shard

    score(recipe, Shard.parse(args.shard))


def _sft(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.train.loop import run_sft

    run_sft(recipe, allow_changes=args.continue_with_changes)


def _train(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.train.loop import run_train

    run_train(recipe, allow_changes=args.continue_with_changes)


def _eval(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.evaluate.run import evaluate

    evaluate(require(recipe.eval, "eval"), recipe)


def _path(text: str) -> str:
    try:
        return expand_path(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is expected, got {text!r}")
    return int(text)


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a number of GiB above 0 is expected, got {text!r}")
    return number


def _check(recipe: Recipe, args: argparse.Namespace) -> None:
    if args.gpus is not None:
        from megatron_opd.estimate import estimate_recipe

        print("\n".join(estimate_recipe(recipe, args.gpus, args.gpu_memory or 80.0)))
        return
    if args.gpu_memory is not None:
        raise UserError("--gpu-memory is for the estimate, which needs the number of GPUs too: add --gpus N")
    if args.stage == "inputs":
        from megatron_opd.inputs import check_inputs, raise_faults

        found = check_inputs(recipe, ranks=args.ranks)
        for line in found.lines:
            print(line)
        raise_faults(found.faults)
        return
    from megatron_opd.train.readiness import check_start

    ready = check_start(recipe, args.stage, ranks=args.ranks, allow_changes=args.continue_with_changes)
    for note in ready.notes:
        print(note)
    if args.stage == "sft":
        print(f"ready to fine-tune {ready.init.short()} on {public_address(recipe.sft.store)}")
    else:
        print(f"ready to train {ready.init.short()} on {public_address(recipe.train.store)} with teacher {recipe.train.teacher!r}")


def _progress(recipe: Recipe, args: argparse.Namespace) -> int:
    from megatron_opd.progress import show_progress

    return show_progress(recipe, args.stage)


def _calibrate(args: argparse.Namespace) -> int:
    from megatron_opd.calibrate import calibrate

    tree = apply_overrides({}, args.overrides + _flag_overrides(args))
    recipe = build_recipe({"name": "check", "models": {"teacher": args.model, "student": args.model}} | tree, "check")
    return calibrate(args.recipe, args.model, recipe.engine, rollouts=args.rollouts, max_gap=recipe.train.max_engine_gap)


def _inspect(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.data.inspect import inspect_store

    return inspect_store(args.store, verify=args.verify)


def _report(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.evaluate.report import write_report

    write_report(args.runs, args.output)


def _demo(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_opd.demo.run import run_demo

    return run_demo(args.model, run_dir=args.run_dir, overrides=args.overrides)


def _add_convert(stages: argparse._SubParsersAction) -> None:
    convert = stages.add_parser(
        "convert",
        help="checkpoints between Megatron and Hugging Face",
        description="Convert checkpoints; both directions are bit-exact in the stored dtype.",
    )
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    to_hf = directions.add_parser("to-hf", help="Megatron checkpoint to a Hugging Face directory")
    to_hf.add_argument("checkpoint", type=_path, help="a run's output directory (its latest checkpoint), or one step folder")
    to_hf.add_argument("target", type=_path, help="directory to write; must not hold anything")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the stored one")
    to_hf.set_defaults(run=_to_hf)
    of_recipe = _recipe_stage(
        directions, "trained", "what a recipe's sft or train made, to where its next stage looks for it; done already: nothing", _trained
    )
    of_recipe.add_argument("--stage", choices=("sft", "train"), default="train")
    to_mcore = directions.add_parser("to-mcore", help="Hugging Face directory to a Megatron checkpoint")
    to_mcore.add_argument("model", type=_path, help="Hugging Face directory")
    to_mcore.add_argument("target", type=_path, help="directory to write; must not hold anything")
    to_mcore.set_defaults(run=_to_mcore)


def _to_hf(args: argparse.Namespace, arguments: list[str]) -> None:
    from megatron_opd.convert.commands import to_hf

    _tell(lambda: f"wrote {to_hf(args.checkpoint, args.target, dtype=args.dtype)}")


def _trained(recipe: Recipe, args: argparse.Namespace) -> None:
    from megatron_opd.convert.commands import trained_to_hf

    _tell(lambda: trained_to_hf(recipe, args.stage))


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
