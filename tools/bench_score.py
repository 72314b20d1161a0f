"""How many tokens/s the scoring client alone can carry: the real stage against a stand-in server that has its answers ready.

    python tools/bench_score.py [--top-k 0 64] [--rollouts 256] [--repeats 3] [--json FILE]

Client, checks of every answer and writing of the store are measured; the server is another process on the same machine. Rates are of
scored tokens over wall time, and over the client's own CPU time, which says less about what else the machine was doing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from megatron_opd.cost.meter import provenance
from megatron_opd.data.writer import create_store, write_part
from megatron_opd.hf.lineage import fingerprint_model
from megatron_opd.recipe.config import ScoreStage
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.records import Finish, Lineage, PromptFile, Rollout, SamplingParams
from megatron_opd.serve.score import score_store
from megatron_opd.store_records import StoreManifest

VOCAB = 151936
PROMPT, RESPONSE = 200, 3896
PER_PART = 64


def make_model(folder: Path) -> Path:
    """The shipped demo teacher with the vocabulary size of Qwen3 in its config: the stand-in reads nothing else of it."""
    shutil.copytree(Path(str(resources.files("megatron_opd") / "demo" / "teacher")), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"vocab_size": VOCAB, "max_position_embeddings": 1 << 15}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_rollouts(rng: np.random.Generator, prompts: range) -> list[Rollout]:
    """Ids as frequent as words are, log-probs as a sampled response has them: most near 0."""
    rollouts = []
    for prompt in prompts:
        tokens = np.minimum(rng.zipf(1.3, PROMPT + RESPONSE), VOCAB - 2).astype(np.int32)
        logp = np.full(len(tokens), np.nan, np.float32)
        logp[PROMPT:] = -rng.gamma(0.25, 1.2, RESPONSE)
        rollouts.append(Rollout(tokens, PROMPT, prompt, 0, Finish.STOP, logp))
    return rollouts


def make_store(url: str, model: Path, rollouts: int) -> None:
    fingerprint = fingerprint_model(model)
    manifest = StoreManifest(
        sampler_role="student",
        sampler=fingerprint,
        lineage=Lineage(),
        prompts=PromptFile(name="bench", sha256="0" * 64, num_prompts=rollouts),
        prompts_per_part=PER_PART,
        sampling=SamplingParams(),
    )
    location = create_store(url, manifest)
    rng = np.random.default_rng(0)
    for part in range(manifest.num_parts):
        write_part(location, part, make_rollouts(rng, manifest.prompt_range(part)), [], {})


@contextlib.contextmanager
def stub_server(model: Path) -> Any:
    """Address of a stand-in server that keeps its answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("stub_sglang.py")
    command = [sys.executable, str(script), "--model-path", str(model), "--port", str(port), "--cache"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def measure(url: str, model: Path, store: Path, folder: Path, top_k: int) -> dict[str, float]:
    """Score a copy of the unscored store once."""
    copy = folder / "copy.opd.zarr"
    shutil.copytree(store, copy)
    stage = ScoreStage(store=str(copy), model=str(model), top_k=top_k)
    config = EngineConfig(urls=[url], dtype="float32")
    before, start = cpu_seconds(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        reader = score_store(stage, config, run_dir=str(folder / "run"), check_lineage=False)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    tokens = int(reader.response_lens.sum())
    shutil.rmtree(copy)
    return {
        "tokens": tokens,
        "seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
    }


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens/s that the scoring client alone can carry, with a stand-in server.")
    parser.add_argument("--top-k", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--rollouts", type=int, default=256, help=f"of {PROMPT} + {RESPONSE} tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    results: dict[str, Any] = {"command": " ".join(["python", "tools/bench_score.py", *sys.argv[1:]]), **provenance()}
    results |= {"cores": os.cpu_count(), "rollouts": args.rollouts, "tokens_a_rollout": PROMPT + RESPONSE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        store = folder / "store.opd.zarr"
        make_store(str(store), model, args.rollouts)
        for top_k in args.top_k:
            with stub_server(model) as url:
                measure(url, model, store, folder, top_k)  # the server makes its answers here
                loads, runs = [], []
                for _ in range(args.repeats):
                    loads.append(os.getloadavg()[0])
                    runs.append(measure(url, model, store, folder, top_k))
            median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            results[f"top_k={top_k}"] = {"median": median, "runs": runs, "load_average_before": loads}
            print(
                f"top-k {top_k:>3}: {median['tokens_per_second'] / 1e6:.3f} M tokens/s of wall time, "
                f"{median['tokens_per_cpu_second'] / 1e6:.3f} M tokens/s of client CPU time "
                f"(median of {args.repeats}; load average {loads})",
                flush=True,
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
