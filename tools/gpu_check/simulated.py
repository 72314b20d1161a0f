"""The step of step_shape.py as the simulation has it: `python -m gpu_check.simulated OUTPUT.json`.

The simulation needs a CPU build of PyTorch, which a machine with a GPU has not. So `make gpu-check-simulated` runs it beforehand on
any machine, once with Transformer Engine's layers and once without, and keeps the results in docs/results/gpu/simulated-step.json; this
program takes from there what fits the layers that this machine's step is made of.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_opd.simulate.needs import find_transformer_engine, no_transformer_engine

from . import step_shape as shape
from .parts import NOT_RUN, ROOT
from .record import git_commit

KEPT = ROOT / "docs" / "results" / "gpu" / "simulated-step.json"
HOW = "run `make gpu-check-simulated` where PyTorch is a CPU build, and carry the file along"
LAYERS_BY = ("Transformer Engine", "local layers")


def environment(layers_by: str) -> dict[str, str]:
    """The simulation's: its PYTHONPATH has Transformer Engine or has not. Raises SystemExit where there is none."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if layers_by == "local layers":
        paths = [path for path in paths if not (Path(path) / "transformer_engine").is_dir()]
    else:
        found = find_transformer_engine()
        if found is None:
            raise SystemExit(no_transformer_engine())
        paths = [found, *paths] if found else paths
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def simulate(layers_by: str) -> dict[str, Any]:
    """The numbers of one simulation, in a process of its own. Raises SystemExit with its output."""
    options = ["--no-te"] if layers_by == "local layers" else []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "simulation.json"
        command = [sys.executable, "-m", "megatron_opd.simulate", shape.RECIPE, shape.STAGE, "--gpus", "1", "--layers", str(shape.LAYERS)]
        command += ["--micro-batches", str(shape.MICRO_BATCHES), "--lengths", json.dumps(shape.LENGTHS), "--json", str(output)]
        done = subprocess.run([*command, *options, *shape.OVERRIDES], capture_output=True, text=True, cwd=ROOT, env=environment(layers_by))
        if done.returncode or not output.exists():
            raise SystemExit(f"{' '.join(done.args)}: exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        found = json.loads(output.read_text(encoding="utf-8"))
    blocking = sum(count for what, count in found["copies"].items() if "BLOCKING" in what)
    return {
        "peak_bytes": found["peaks"]["step"],
        "waits_total": sum(found["waits"].values()) + blocking,
        "flops": found["flops"],
        "parameters": found["parameters"],
        "waits": found["waits"],
        "copies": found["copies"],
        "versions": found["versions"],
    }


def keep() -> None:
    """Simulate both kinds of layers into KEPT. Raises SystemExit with what kept one of them from it, once the other is there."""
    made, failed = {}, []
    for name in LAYERS_BY:
        try:
            made[name] = found = simulate(name)
        except SystemExit as reason:
            failed.append(f"{name}: {reason}")
            continue
        print(
            f"{name}: peak of a step {found['peak_bytes'] / 2**30:.2f} GiB, host waits {found['waits_total']}, {found['flops'] / 1e12:.1f} TFLOP"
        )
    if made:
        values = {"settings": shape.SETTINGS, "commit": git_commit(ROOT), "layers_by": made}
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(KEPT)
    if failed:
        raise SystemExit("\n".join(failed))


class NotKept(Exception):
    """Why there is no simulation to compare with."""


def take(kept: Path, layers_by: str) -> dict[str, Any]:
    """What `keep` wrote of these layers. Raises NotKept where there is none, or of another step."""
    if not kept.exists():
        raise NotKept(f"{kept.name} is not there: {HOW}")
    values = json.loads(kept.read_text(encoding="utf-8"))
    if values["settings"] != shape.SETTINGS:
        raise NotKept(f"{kept.name} is of another step than tools/gpu_check/step_shape.py has: {HOW}")
    if layers_by not in values["layers_by"]:
        raise NotKept(f"{kept.name} has no simulation of {layers_by}: {HOW}")
    return {"simulated": f"with commit {values['commit']}", "layers_by": layers_by, **values["layers_by"][layers_by]}


def layers_here() -> str:
    """Which of LAYERS_BY this environment's steps are made of: a Transformer Engine that does not load makes none."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # a broken package may raise anything
        return "local layers"
    return "Transformer Engine"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--keep", action="store_true", help="simulate, on a machine without a GPU")
    args = parser.parse_args()
    if args.keep:
        keep()
        return
    layers_by = layers_here()
    try:
        found = take(KEPT, layers_by)
    except NotKept as reason:
        print(reason)
        raise SystemExit(NOT_RUN) from None
    args.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
