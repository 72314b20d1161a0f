"""SGLang's scores against Hugging Face's, and how fast it gives them: `python -m gpu_check.sglang OUTPUT.json [--small]`.

A model of the shape of Qwen3-0.6B with random weights and the demo teacher's tokenizer; one server on 127.0.0.1, started and
ended by the project's own engine; 64 sequences of random tokens. OPD_SGLANG_PYTHON names the Python that has SGLang, if it is another one.
`--small`: the demo teacher and 8 short sequences, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opd.estimate.known_models import KNOWN
from megatron_opd.hf.model_config import read_config
from megatron_opd.recipe.inference import EngineConfig, LaunchConfig
from megatron_opd.serve.engine import ScoreRequest
from megatron_opd.serve.opening import open_engine

_PROMPT = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), small=args.small)
    args.output.write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps(found, indent=1))


def make_model(folder: Path) -> Path:
    """Random weights in bf16 of Qwen3-0.6B's shape."""
    shutil.copytree(Path(str(resources.files("megatron_opd") / "demo" / "teacher")), folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    config = KNOWN["Qwen3-0.6B"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def compare(folder: Path, *, small: bool) -> dict[str, Any]:
    """Seconds to start and to score, tokens/s, and how far the two engines' log-probabilities are apart."""
    model = Path(str(resources.files("megatron_opd") / "demo" / "teacher")) if small else make_model(folder / "model")
    count, longest = (8, 100) if small else (64, 2048)
    vocab = read_config(str(model))["vocab_size"]
    rng = np.random.default_rng(0)
    start = _PROMPT if not small else 8
    lengths = rng.integers(longest // 2, longest + 1, count)
    requests = [ScoreRequest(rng.integers(0, vocab, length).astype(np.int32), start) for length in lengths]
    # OPD_SGLANG_OPTIONS: on a CPU such as "--device cpu --max-total-tokens 8192".
    options = os.environ.get("OPD_SGLANG_OPTIONS", "--mem-fraction-static 0.6").split()
    python = os.environ.get("OPD_SGLANG_PYTHON", sys.executable)
    launch = LaunchConfig(
        command=[python, "-m", "sglang.launch_server"], options=options, environment={"PYTHONPATH": ""}, start_seconds=600 if small else 140
    )
    begin = time.perf_counter()
    engine = open_engine(EngineConfig(kind="sglang", launch=launch), model, log_dir=folder / "logs")
    try:
        started = time.perf_counter() - begin
        engine.score(requests[:4])
        begin = time.perf_counter()
        served = engine.score(requests)
        seconds = time.perf_counter() - begin
        description = engine.describe()
    finally:
        engine.close()
    own = open_engine(EngineConfig(kind="transformers"), model)
    try:
        expected = own.score(requests)
    finally:
        own.close()
    apart = np.concatenate([np.abs(a.logp[start:] - b.logp[start:]) for a, b in zip(served, expected, strict=True)])
    return {
        "engine": {key: str(value) for key, value in description.items()},
        "sequences": count,
        "tokens": int(lengths.sum()),
        "start_seconds": started,
        "score_seconds": seconds,
        "tokens_per_second": int(lengths.sum()) / seconds,
        "logp_apart_mean": float(apart.mean()),
        "logp_apart_99th_percentile": float(np.quantile(apart, 0.99)),
        "logp_apart_most": float(apart.max()),
    }


if __name__ == "__main__":
    main()
