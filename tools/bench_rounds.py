#!/usr/bin/env python3
"""What rounds cost beside their work, and what they bring: python tools/bench_rounds.py [--folder DIR] [--json FILE] [FIELD=VALUE ...]

The demo's arithmetic task (recipe demo): one SFT student, then 1, 4 and 25 rounds ('megatron-opd rounds') of together the same number of
steps and of rollouts. Work is sampling, scoring and training steps; the rest is start, saving, converting, loading and checking. The final
students are evaluated. Goes on where it was stopped, except in a run whose time is measured: one that is not finished begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_opd.cost.meter import provenance, read_jsonl, read_stages
from megatron_opd.demo.run import DEMOS
from megatron_opd.safety.untrusted import read_object

TIMES_FILE = "bench.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-rounds"))
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 4, 25])
    parser.add_argument("--no-eval", action="store_true", help="times alone")
    parser.add_argument("--json", type=Path, help="write the results here")
    args, fields = parser.parse_known_args()
    if wrong := [field for field in fields if "=" not in field]:
        parser.error(f"not a FIELD=VALUE: {wrong[0]}")
    base = args.folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    DEMOS["arithmetic"].prepare(base)
    for words in (["generate"], ["sft"], ["convert", "trained", "--stage", "sft"]):
        command(words, base, [], log=args.folder / "base.log")
    results: dict[str, Any] = {"command": " ".join(["python", "tools/bench_rounds.py", *sys.argv[1:]]), **provenance()}
    results |= {"cores": os.cpu_count(), "overrides": fields, "rounds": {}}
    for count in args.rounds:
        run = args.folder / f"rounds-{count}"
        places = {
            "models.teacher": base / "teacher", "models.student": base / "student", "rollout.model": base / "sft-hf", "train.init": base / "sft-hf",
            "rollout.prompts": base / "prompts/rollout.jsonl", "eval.addition.prompts": base / "prompts/eval.jsonl", "rounds.count": count, "rounds.keep_alive": "true",
        }  # fmt: skip
        overrides = [*(f"{key}={value}" for key, value in places.items()), *fields]
        results["rounds"][str(count)] = found = measure(run, count, overrides, evaluates=not args.no_eval)
        print(f"{count} rounds: {json.dumps(found)}", flush=True)
    print(f"\n{table(results['rounds'])}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def command(words: list[str], run: Path, overrides: list[str], *, log: Path) -> None:
    """Run a stage of the recipe demo; its output goes to `log`."""
    place = 2 if words[0] == "convert" else 1
    line = [sys.executable, "-m", "megatron_opd", *words[:place], "demo", f"run_dir={run}", *overrides, *words[place:]]
    print(f"$ {' '.join(words)} ({run.name})", flush=True)
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"'{' '.join(words)}' failed ({code}); see {log}")


def measure(run: Path, count: int, overrides: list[str], *, evaluates: bool) -> dict[str, Any]:
    """Seconds and tokens of a whole run, and how good its student is."""
    if not (run / TIMES_FILE).exists():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        load, start, clock = os.getloadavg()[0], time.monotonic(), time.time()
        command(["rounds"], run, overrides, log=run / "rounds.log")
        (run / TIMES_FILE).write_text(json.dumps(times(run, count, time.monotonic() - start, clock, load)), encoding="utf-8")
    if evaluates and not (run / "eval/addition/opd.json").exists():
        command(["eval"], run, [*overrides, "--of", "opd"], log=run / "eval.log")
    steps = read_jsonl(run / "opd/metrics.jsonl", number="step")
    found = read_object(run / TIMES_FILE) | {
        "reverse_kl_of_the_last_tenth": mean(steps[-(len(steps) // 10 or 1) :], "reverse_kl"),
        "off_share": mean(steps, "off_share"),
        "effective_sample_share": mean(steps, "effective_sample_share"),
    }
    if evaluates:
        evaluation = read_object(run / "eval/addition/opd.json")
        found |= {name: {key: evaluation[name][key] for key in ("mean", "low", "high")} for name in ("accuracy", "reverse_kl")}
    return found


def times(run: Path, count: int, wall: float, clock: float, load: float) -> dict[str, Any]:
    stages, steps = read_stages(run / "stages.jsonl"), read_jsonl(run / "opd/metrics.jsonl", number="step")

    def total(stage: str, key: str) -> float:
        return sum(float(row.get(key, 0)) for row in stages if row["stage"] == stage)

    opening = total("rollout", "opening_seconds") + total("score", "opening_seconds")
    sampling = total("rollout", "seconds") - total("rollout", "opening_seconds")
    scoring = total("score", "seconds") - total("score", "opening_seconds")
    training = sum(row["seconds"] for row in steps)
    work, begun = sampling + scoring + training, min(row["started"] for row in stages) - clock
    saving = total("train", "seconds") - training
    return {
        "seconds": wall,
        "sampling": sampling,
        "scoring": scoring,
        "training": training,
        "work": work,
        "rest": {"start": begun, "engines": opening, "saving": saving, "converting_and_checking": wall - work - begun - opening - saving},
        "rest_a_round": (wall - work - begun) / count,
        "seconds_over_work": wall / work,
        "steps": len(steps),
        "student_tokens": int(total("rollout", "tokens")),
        "teacher_tokens": int(total("score", "tokens")),
        "load_average_before": load,
    }


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def table(rounds: dict[str, Any]) -> str:
    lines = [
        "| rounds | work: sampling, scoring, steps (s) | rest: start, engines, saving, converting and checking (s) | all / work | student tokens | "
        "off share | accuracy | reverse KL, nat/token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, row in rounds.items():
        rest = ", ".join(f"{value:.1f}" for value in row["rest"].values())
        accuracy, kl = ("", "")
        if "accuracy" in row:
            accuracy = "{mean:.1%} ({low:.1%} to {high:.1%})".format(**row["accuracy"])
            kl = "{mean:.4f} ({low:.4f} to {high:.4f})".format(**row["reverse_kl"])
        lines.append(
            f"| {count} | {row['sampling']:.1f}, {row['scoring']:.1f}, {row['training']:.1f} | {rest} | {row['seconds_over_work']:.2f} | "
            f"{row['student_tokens']:,} | {row['off_share']:.1%} | {accuracy} | {kl} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
