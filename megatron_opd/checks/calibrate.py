"""`megatron-opd check STORE --model MODEL`: how far apart the serving engine and the training engine are, in nats a token.

The loss is a difference of log-probabilities from the two. What they differ by for one and the same model is the floor of noise below
which nothing can be learnt. The result is kept in the store, and training refuses to start where the floor is over its bound.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_opd.cost.meter import provenance
from megatron_opd.data.calibration import check_calibration, read_calibration, servers_differ, write_calibration
from megatron_opd.data.missing import require_made
from megatron_opd.data.store import StoreReader
from megatron_opd.errors import LineageError, UserError
from megatron_opd.hf.lineage import fingerprint_model, same_model, tensor_index
from megatron_opd.hf.tokenizer import check_same_tokenizer
from megatron_opd.recipe.config import Recipe, require
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.recipe.rounds import round_recipe
from megatron_opd.records import Rollout
from megatron_opd.serve.engine import Engine, ScoreRequest
from megatron_opd.serve.opening import open_engine
from megatron_opd.serve.stage import closing_engine
from megatron_opd.store_records import Calibration, Gap

SHARE_FOR_WEIGHTS = 0.7  # of a GPU's memory; activations of one sequence take little


def calibrate(url: str, model: str, config: EngineConfig, *, rollouts: int = 64, max_gap: float = 0.1, log_dir: str | Path = "logs") -> int:
    """Measure, print and record; returns 0, or 2 if servers of one model differ by more than the engines do. Raises UserError.

    With the store's sampler, the stored log-probs and a new scoring pass are compared with Megatron's; with any model and several
    servers, the servers with each other.
    """
    reader = StoreReader(url)
    if len(reader) == 0:
        raise UserError(f"{reader.location.url}: no rollouts in it")
    fingerprint = fingerprint_model(model)
    check_same_tokenizer(reader.manifest.sampler, fingerprint)
    is_sampler = same_model(reader.manifest.sampler, fingerprint)
    servers = len(config.urls) if config.urls else config.launch.servers if config.launch else 1
    if not is_sampler and servers < 2:
        raise LineageError(
            f"{reader.location.url} was sampled from {reader.manifest.sampler.short()}, not from {fingerprint.short()}: give the sampler as --model to compare "
            "the engines, or two servers of this model (--url twice) to compare them with each other"
        )
    sample = _sample(reader, rollouts)
    before = read_calibration(reader.location) or Calibration()
    with closing_engine(open_engine(config, model, log_dir=log_dir)) as engine:
        scores = engine.score([ScoreRequest(rollout.tokens, rollout.prompt_len) for rollout in sample])
        served = [score.logp[rollout.prompt_len :] for score, rollout in zip(scores, sample, strict=True)]
        replicas = _replicas(engine, sample) if servers > 1 else None
        described = engine.describe()
    changes: dict[str, object] = {"skipped": None, "num_rollouts": len(sample), "engine": described, "provenance": provenance()}
    if replicas is not None:
        print(f"servers of {fingerprint.short()} with each other: {replicas.describe()}")
        changes["replicas"] = {**before.replicas, fingerprint.weights_sha256: replicas}
    if is_sampler:
        from megatron_opd.train.logp import megatron_logp

        trained = megatron_logp(model, [(rollout.tokens, rollout.prompt_len) for rollout in sample])
        stored = [rollout.student_logp[rollout.prompt_len :] for rollout in sample]
        changes |= {"floor": gap(served, trained), "stored": gap(stored, trained)}
    record = before.model_copy(update=changes)
    if record.floor is not None and record.stored is not None:
        print(f"scored by {described['kind']}, against Megatron: {record.floor.describe()}")
        print(f"stored by the sampler (pi_ref), against Megatron: {record.stored.describe()}")
    write_calibration(reader.location, record)
    print(f"recorded in {reader.location.show('calibration.json')}; training refuses a mean over train.max_engine_gap")
    if (differ := servers_differ(record, fingerprint.weights_sha256, max_gap)) is not None:
        print(f"WARNING: {differ}")
        return 2
    return 0


def check_engines(recipe: Recipe) -> int:
    """`calibrate` the student that sampled the recipe's rollouts, of several rounds in the first; raises UserError if the engines are further apart than training allows.

    A student that does not fit the GPU, where Megatron would have it whole, is not compared; that is recorded, too.
    """
    recipe = round_recipe(recipe, 1)
    stage = require(recipe.rollout, "rollout")
    require_made(recipe, stage.store)
    reader = StoreReader(stage.store)
    if (reason := _too_large(stage.model)) is not None:
        print(f"engines are not compared: {reason}")
        write_calibration(reader.location, (read_calibration(reader.location) or Calibration()).model_copy(update={"skipped": reason}))
        return 0
    limit = recipe.train.max_engine_gap
    code = calibrate(stage.store, stage.model, recipe.engine_for(stage.model), max_gap=limit, log_dir=f"{recipe.run_dir}/logs")
    check_calibration(reader.location, "", limit)
    return code


def _too_large(model: str) -> str | None:
    """Why one rank of Megatron on this machine's first GPU can't hold the model, None if it can or there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    size = sum(tensor.end - tensor.start for tensor in tensor_index(model).values())
    memory = torch.cuda.get_device_properties(0).total_memory
    return (
        f"the student's weights take {size / 2**30:.0f} GiB, a GPU has {memory / 2**30:.0f}, and one rank would hold them all"
        if size > SHARE_FOR_WEIGHTS * memory
        else None
    )


def gap(left: list[np.ndarray], right: list[np.ndarray]) -> Gap:
    """|left - right| over all tokens."""
    differences = np.abs(np.concatenate(left).astype(np.float64) - np.concatenate(right))
    return Gap(
        mean=float(differences.mean()), p99=float(np.quantile(differences, 0.99)), max=float(differences.max()), tokens=len(differences)
    )


def _sample(reader: StoreReader, count: int) -> list[Rollout]:
    """Rollouts from all over the store, the same each time."""
    chosen = np.random.default_rng(0).permutation(len(reader))[:count]
    return [reader.rollout(int(index)) for index in np.sort(chosen)]


def _replicas(engine: Engine, sample: list[Rollout]) -> Gap:
    """The largest gap between the first server and another, each scoring all of `sample` by itself."""
    from megatron_opd.serve.sglang import SglangEngine

    assert isinstance(engine, SglangEngine)
    requests = [ScoreRequest(rollout.tokens, rollout.prompt_len) for rollout in sample]
    by_server = []
    for server in range(len(engine.pool.servers)):
        with engine.only(server):
            by_server.append([score.logp[request.start :] for score, request in zip(engine.score(requests), requests, strict=True)])
    return max((gap(by_server[0], other) for other in by_server[1:]), key=lambda found: found.mean)
