"""`make study`: the method's claims in miniature, on two CPU cores (docs/study.md). Options: make study STUDY_ARGS="...".

The report is of all that is done in the folder, whichever arms and seeds were asked for now. A run of the whole study replaces the results
that are committed, docs/results/study (of another subject docs/results/study-SUBJECT), when nothing is left; any other writes to
FOLDER/results. It goes on where it was stopped. Exit codes: 0 all is done; 1 something failed or is left; 2 it could not begin.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import arms as all_arms
from . import forks
from .plan import Replicate, folder_of, list_jobs, seeds_in, write_recipes
from .report import write
from .results import collect
from .run import Runner
from .subject import ARITHMETIC, SUBJECTS

ROOT = Path(__file__).resolve().parents[2]


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    try:
        subject = SUBJECTS[args.subject]
        arms = subject.choose(args.only, quick=args.quick)
        settings = subject.settings.changed(args.sizes)
        settings.keep(args.folder)
        seeds = args.seeds if args.seeds is not None else [0] if args.quick else [0, 1, 2]
        replicates = [Replicate(folder_of(args.folder, seed), seed, settings, subject) for seed in seeds]
        jobs = list_jobs(replicates, arms)
        runner = Runner(args.folder, args.lanes, say=lambda text: print(text, flush=True))
        all_of_it = [Replicate(folder_of(args.folder, seed), seed, settings, subject) for seed in sorted({*seeds, *seeds_in(args.folder)})]
        runner.left(list_jobs(all_of_it, subject.possible))  # raises for what is of another study
        left = runner.left(jobs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(arms)} arms, seeds {', '.join(map(str, seeds))}: {len(jobs)} jobs, {len(left)} left", flush=True)
    if args.dry_run:
        print("\n".join(f"{job.name}: megatron-opd {' '.join(job.words)}" for job in left))
        return 0
    failed = []
    if left:
        forks.load()
        from .prepare import prepare  # imports torch

        try:
            for replicate in replicates:
                prepare(replicate)
                write_recipes(replicate)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = runner.run(jobs, until=None if args.minutes is None else time.monotonic() + args.minutes * 60)
        except KeyboardInterrupt:
            print("interrupted; what is done stays done, and the same command goes on", file=sys.stderr)
            return 1
        left = runner.left(jobs)
    part = bool(left or args.quick or args.only or args.seeds is not None or args.sizes)
    output = args.output or (args.folder / "results" if part else ROOT / "docs/results" / args.study)
    write(collect(runner, all_of_it, subject.possible), output)
    print(f"{output}/report.md; {len(left)} jobs are left, of which {len(failed)} failed")
    return int(bool(left))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and the main arms: a quarter of an hour")
    parser.add_argument("--subject", choices=SUBJECTS, default=ARITHMETIC.name, help="the demo that is studied (default: arithmetic)")
    parser.add_argument(
        "--folder", type=Path, help="models, stores and trainings (default: runs/study, of another subject runs/study-SUBJECT)"
    )
    parser.add_argument(
        "--output", type=Path, help="tables and figures (default: docs/results/study when the whole study is done, else FOLDER/results)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, with --quick 0")
    parser.add_argument("--only", nargs="+", metavar="ARM", help=f"these arms alone: {', '.join(arm.name for arm in all_arms.ARMS)}")
    parser.add_argument("--lanes", type=int, default=min(2, os.cpu_count() or 1), help="commands side by side, one core each (default: 2)")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many; the next call goes on")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="FIELD=NUMBER", help="other sizes than the study's, for all arms")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    args = parser.parse_args(words)
    args.study = "study" if args.subject == ARITHMETIC.name else f"study-{args.subject}"
    args.folder = args.folder or Path("runs") / args.study
    return args


if __name__ == "__main__":
    raise SystemExit(main())
