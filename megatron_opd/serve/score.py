"""score: the teacher's log-probabilities of every stored rollout, part by part, beside the rollouts."""

from __future__ import annotations

from megatron_opd.config import EngineConfig, Recipe, ScoreStage
from megatron_opd.cost import StageCost, provenance
from megatron_opd.data.store import StoreReader, write_scores
from megatron_opd.errors import StoreError
from megatron_opd.lineage import check_same_tokenizer, check_teacher, fingerprint_model, same_model
from megatron_opd.records import ModelFingerprint, ScoreManifest, TeacherScores
from megatron_opd.serve.engine import ScoreRequest, open_engine
from megatron_opd.serve.sample import Shard, closing_engine, progress_bar


def score(recipe: Recipe, shard: Shard = Shard()) -> StoreReader:
    """Score with the recipe's teacher; refuses a teacher that is not the student's SFT teacher. Raises UserError."""
    stage = recipe.score
    return score_store(stage, recipe.engine, run_dir=recipe.run_dir, shard=shard)


def score_store(
    stage: ScoreStage, engine_config: EngineConfig, *, run_dir: str, shard: Shard = Shard(), check_lineage: bool = True
) -> StoreReader:
    """Score every sealed part of `shard` that teacher `stage.teacher` has not scored. Goes on where an earlier run stopped.

    `check_lineage=False` is for evaluation, where the sampler may be any model. Raises UserError.
    """
    reader = StoreReader(stage.store)
    fingerprint = fingerprint_model(stage.model)
    check_same_tokenizer(reader.manifest.sampler, fingerprint)
    override = None
    if check_lineage:
        override = check_teacher(reader.manifest.lineage, fingerprint, allow_mismatch=stage.allow_teacher_mismatch)
        if override is not None:
            print(f"WARNING: {override}")
    parts = [part for part in reader.parts if shard.owns(part)]
    for part in parts:
        _check_earlier(reader, part, stage, fingerprint)
    todo = [part for part in parts if reader.score_manifest(part, stage.teacher) is None]
    if not todo:
        print(
            f"score: teacher {stage.teacher!r} has scored all sealed parts of {stage.store}; {len(reader.missing_parts())} parts are not sealed"
        )
        return reader
    with StageCost(run_dir, "score") as cost, closing_engine(open_engine(engine_config, stage.model)) as engine:
        settings = engine.describe()
        total = sum(reader.parts[part].num_response_tokens for part in parts)
        done = total - sum(reader.parts[part].num_response_tokens for part in todo)
        with progress_bar("score", total=total, initial=done, unit="token") as bar:
            for part in todo:
                rollouts = reader.part_rollouts(part)
                requests = [ScoreRequest(rollout.tokens, rollout.prompt_len) for rollout in rollouts]
                scores: list[TeacherScores] = engine.score(requests, stage.top_k, bar.update) if requests else []
                record = ScoreManifest(
                    part=part,
                    teacher=engine.fingerprint,
                    top_k=stage.top_k,
                    allow_teacher_mismatch=override is not None,
                    part_crc32c=reader.parts[part].crc32c,
                    crc32c={},
                    engine=settings,
                    provenance=provenance(),
                )
                write_scores(reader.location, stage.teacher, record, rollouts, scores, topk_dtype=stage.topk_dtype)
                cost.tokens += reader.parts[part].num_response_tokens
    print(
        f"score: {cost.tokens} tokens by {fingerprint.short()} as {stage.teacher!r} into {stage.store}; {len(reader.missing_parts())} parts are not sealed"
    )
    return reader


def _check_earlier(reader: StoreReader, part: int, stage: ScoreStage, fingerprint: ModelFingerprint) -> None:
    """Raise StoreError if this teacher name stands for another model, or another K, in a part that is already scored."""
    record = reader.score_manifest(part, stage.teacher)
    if record is None:
        return
    if not same_model(record.teacher, fingerprint):
        raise StoreError(
            f"{stage.store}: teacher {stage.teacher!r} of part {part} is {record.teacher.short()}, not {fingerprint.short()}; use another name (score.teacher=...)"
        )
    if record.top_k != stage.top_k:
        raise StoreError(
            f"{stage.store}: part {part} was scored with top_k={record.top_k}, now top_k={stage.top_k}; use the same, or another name (score.teacher=...)"
        )
