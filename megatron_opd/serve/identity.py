"""Who a server is: what it says of itself, read with care, and log-probs of fixed tokens; two servers compared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.errors import EngineError, LineageError
from megatron_opd.safety.untrusted import is_deep
from megatron_opd.serve.http import said

# Two engines of one model differ by some 0.03 nats a token in bf16, other models by more than one: see `check_probe`.
PROBE_TOKENS = 48
PROBE_NATS = 0.25
# Settings of a server that change its numbers: recorded, and the same on every server.
NUMERIC_SETTINGS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "enable_fp32_lm_head",
    "enable_deterministic_inference",
    "attention_backend",
    "tp_size",
)
LONGEST_TEXT = 200  # of a setting that is recorded
SHORTEST_INPUT, LARGEST_NUMBER = 16, 1 << 31
_KNOWN = "SGLang 0.5.23 is known to work"


@dataclass(frozen=True)
class Facts:
    """What /model_info and /server_info say, of the types that they should have. `startup_time` tells one process from the next at the same address."""

    model_path: str
    is_generation: bool
    load_format: str | None
    sampling_defaults: Any
    weight_version: str | int | None
    version: str
    settings: dict[str, Any]
    longest_input: int
    startup_time: Any
    num_gpus: int


@dataclass(frozen=True)
class Identity:
    """What a server was when it was inspected."""

    facts: Facts
    probe: np.ndarray  # float32 [PROBE_TOKENS - 1]: log-probs of fixed tokens
    unscaled_logp: bool  # log-probs of sampled tokens are at temperature 1


def read_facts(model_info: dict[str, Any], server_info: dict[str, Any]) -> Facts:
    """Raises EngineError for what no SGLang server says."""
    for info in (model_info, server_info):
        if is_deep(info):
            raise EngineError(f"a description of itself that is nested too deeply; {_KNOWN}")

    def read(info: dict[str, Any], name: str, *kinds: type, default: Any = None) -> Any:
        value = info.get(name, default)
        recorded = name != "model_path"
        if type(value) not in kinds or (isinstance(value, str) and recorded and not (len(value) <= LONGEST_TEXT and value.isprintable())):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise EngineError(
                f"does not describe itself as an SGLang server does: {name} is {said(repr(value), 80)}, not {wanted}; {_KNOWN}"
            )
        return value

    def count(name: str, least: int, default: int | None = None) -> int:
        value = read(server_info, name, int, *([type(None)] if default is not None else []))
        number = int(default or 0) if value is None else int(value)
        if not least <= number < LARGEST_NUMBER:
            raise EngineError(f"does not describe itself as an SGLang server does: {name} is {said(number, 80)}; {_KNOWN}")
        return number

    nothing = type(None)
    settings = {name: read(server_info, name, str, bool, int, nothing) for name in NUMERIC_SETTINGS}
    settings["dtype"] = read(server_info, "dtype", str)
    tp, pp, dp = (count(name, 1, default=1) for name in ("tp_size", "pp_size", "dp_size"))
    copies = 1 if read(server_info, "enable_dp_attention", bool, nothing) else dp  # which share GPUs with it
    return Facts(
        model_path=read(model_info, "model_path", str),
        is_generation=read(model_info, "is_generation", bool, default=True),
        load_format=read(model_info, "load_format", str, nothing),
        sampling_defaults=model_info.get("preferred_sampling_params"),
        weight_version=read(model_info, "weight_version", str, int, nothing),
        version=read(server_info, "version", str),
        settings=settings,
        longest_input=count("max_req_input_len", SHORTEST_INPUT) - 1,  # it refuses inputs of max_req_input_len tokens
        startup_time=server_info.get("startup_time"),
        num_gpus=tp * pp * copies if read(server_info, "device", str, nothing) == "cuda" else 0,
    )


def check_serves_model(url: str, facts: Facts, model: Path) -> None:
    """Raise LineageError for another model, EngineError for a server that would change what it is asked."""
    try:
        same = os.path.realpath(facts.model_path) == os.path.realpath(model)
    except (OSError, ValueError):  # no path: too long, or with a NUL
        same = False
    if not same:
        remedy = f"start the server with --model-path {model.resolve()}, or give the directory that it serves"
        raise LineageError(f"{url} serves {said(facts.model_path)}, but the model is {model}; {remedy}")
    if facts.load_format == "dummy":
        raise LineageError(f"{url} serves random weights (--load-format dummy), not those of {model}; start it without this option")
    if not facts.is_generation:
        raise EngineError(f"{url} runs as an embedding model; start it without --is-embedding")
    if facts.sampling_defaults:
        raise EngineError(
            f"{url} changes sampling parameters by itself ({said(facts.sampling_defaults)}); start it without --preferred-sampling-params"
        )


def served_dtype(stated: str, hf_config: dict[str, Any]) -> str:
    """The dtype behind a server's --dtype option. Raises EngineError for 'auto' on float32 weights: SGLang makes them float16."""
    if stated == "auto":
        stated = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
        if stated == "float32":
            raise EngineError(
                "runs float32 weights with --dtype auto, which SGLang takes for float16; start it with --dtype bfloat16 or --dtype float32"
            )
    return {"half": "float16", "float": "float32"}.get(stated, stated)


def probe_tokens(vocab_size: int, count: int) -> np.ndarray:
    """The same tokens for every server of a model, int32 [count]."""
    return np.random.default_rng(0).integers(0, vocab_size, count).astype(np.int32)


def check_probe(left: str, left_probe: np.ndarray, right: str, right_probe: np.ndarray) -> None:
    """Raise LineageError if two probes are not of the same weights."""
    same = left_probe.shape == right_probe.shape
    gap = float(np.abs(left_probe - right_probe).mean()) if same else float("inf")
    if gap > PROBE_NATS:
        raise LineageError(
            f"{left} gives other log-probabilities than {right} for the same tokens ({gap:.2f} nats a token on average): not the same weights"
        )


def check_alike(known: list[tuple[str, Identity]]) -> None:
    """Raise EngineError or LineageError unless all servers (address, identity) would give the same numbers."""
    first, want = known[0]
    for url, have in known[1:]:
        for name, value in [("version", have.facts.version), *have.facts.settings.items()]:
            wanted = want.facts.version if name == "version" else want.facts.settings[name]
            if value != wanted:
                raise EngineError(f"servers differ in {name}: {first} has {said(wanted)}, {url} has {said(value)}; start them alike")
        check_probe(url, have.probe, first, want.probe)


def weights_changed(url: str, identity: Identity | None, now: Any) -> LineageError:
    before = identity.facts.weight_version if identity is not None else None
    return LineageError(
        f"{url} changed its weights from version {said(before, 80)!r} to {said(now, 80)!r} during the run; check which model it serves and start the stage again"
    )
