"""`megatron-opd demo` on the GPU, all stages on one: `python -m gpu_check.demo OUTPUT.json FOLDER`; what each stage cost and how good the students are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_opd.evaluate.run_files import read_run

ONE_GPU = ("train.parallel.tp=1", "train.parallel.pp=1")


def main(output: Path, folder: Path) -> int:
    code = subprocess.run([sys.executable, "-m", "megatron_opd", "demo", "--run-dir", str(folder), *ONE_GPU]).returncode
    if code:
        return code
    found = read_run(folder)
    stages = [{name: row.get(name) for name in ("stage", "seconds", "tokens", "gpu_hours", "energy_joules")} for row in found["stages"]]
    evaluations = [
        {name: evaluation.get(name) for name in ("name", "evaluation", "accuracy", "reverse_kl", "stopped_share")}
        for evaluation in found["evaluations"]
    ]
    output.write_text(json.dumps({"stages": stages, "evaluations": evaluations}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
