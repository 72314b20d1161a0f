"""score: the teacher's log-probabilities of every stored rollout, part by part, beside the rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.cost.meter import StageCost, provenance
from megatron_opd.data.missing import require_made
from megatron_opd.data.store import StoreReader
from megatron_opd.data.stored_format import check_stored_format, teacher_writes_otherwise
from megatron_opd.data.vocabulary import Vocabulary
from megatron_opd.data.writer import write_scores
from megatron_opd.errors import StoreError
from megatron_opd.hf.lineage import check_teacher, fingerprint_model, load_tokenizer, same_model, teacher_problem
from megatron_opd.hf.tokenizer import check_same_tokenizer
from megatron_opd.recipe.config import Recipe, ScoreStage
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.recipe.rounds import round_recipe
from megatron_opd.records import ModelFingerprint, Rollout, TeacherScores
from megatron_opd.serve.derive import derive_all
from megatron_opd.serve.engine import Failed, ScoreRequest
from megatron_opd.serve.stage import Bar, Lend, ModelGuard, Shard, check_quarantined, engine_meter, lending, quarantine, round_facts
from megatron_opd.store_records import Excluded, ScoreManifest


def score(recipe: Recipe, shard: Shard = Shard(), *, number: int | None = None, lend: Lend | None = None) -> StoreReader:
    """Score with the recipe's teacher, in round `number` of several, and make its derived teachers once the whole store is scored.

    Refuses a teacher that is not the student's SFT teacher, unless training reads derived scores for which it need not be. Raises UserError.
    """
    recipe = round_recipe(recipe, number)
    stage = recipe.score
    require_made(recipe, stage.store, number=number)
    reader = score_store(
        stage,
        recipe.engine_for(stage.model),
        run_dir=recipe.run_dir,
        shard=shard,
        trains_on_candidates=recipe.train.loss.needs_topk,
        any_teacher=recipe.trains_on_any_teacher,
        number=number,
        lend=lend,
    )
    if not stage.derived:
        return reader
    if reader.missing_parts() or reader.unscored_parts(stage.teacher):
        print(f"{', '.join(map(repr, stage.derived))}: derived when all parts are scored")
    else:
        derive_all(stage, stage.derived, run_dir=recipe.run_dir, number=number)
    return reader


def score_store(
    stage: ScoreStage,
    engine_config: EngineConfig,
    *,
    run_dir: str,
    name: str = "score",
    shard: Shard = Shard(),
    check_lineage: bool = True,
    trains_on_candidates: bool = False,
    any_teacher: bool = False,
    number: int | None = None,
    lend: Lend | None = None,
) -> StoreReader:
    """Score every sealed part of `shard` that teacher `stage.teacher` has not scored. Goes on where an earlier run stopped.

    `name` is the stage's, for people and for the account. `check_lineage=False` is for evaluation, where the sampler may be any model.
    With `trains_on_candidates`, a candidate of the teacher that the student does not know is an error. With `any_teacher` it need not be the SFT
    teacher; training on the scores themselves is refused then. `number` and `lend` are those of `sample_into_store`. Raises UserError.
    """
    reader = StoreReader(stage.store)
    fingerprint, student = fingerprint_model(stage.model), reader.manifest.sampler
    parts = [part for part in reader.parts if shard.owns(part)]
    todo, foreign, override = check_scoring(reader, stage, fingerprint, parts, check_lineage=check_lineage, any_teacher=any_teacher)
    if not todo:
        print(
            f"{name}: teacher {stage.teacher!r} has scored all sealed parts of {reader.location.url}; {len(reader.missing_parts())} parts are not sealed"
        )
        account_scores(reader, parts, stage, name, run_dir)
        return reader
    known = Vocabulary(f"student {student.short()}", student.vocab_size, foreign)
    with (
        StageCost(run_dir, name, facts=round_facts(number), meter=engine_meter(engine_config)) as cost,
        (lend or lending(engine_config, run_dir))(stage.model) as engine,
    ):
        cost.num_gpus = engine.num_gpus
        cost.facts["opening_seconds"] = cost.seconds()  # of the engine, or of other weights into an open one
        guard = ModelGuard(engine, stage.model)
        settings = engine.describe()
        total = sum(reader.parts[part].num_response_tokens for part in parts)
        left = sum(reader.parts[part].num_response_tokens for part in todo)
        works: dict[int, PartWork] = {}

        def requests_of(part: int) -> list[ScoreRequest]:
            works[part] = PartWork(reader.part_rollouts(part), engine.context_length, stage.overlong)
            return works[part].requests()

        with Bar(name, cost, total=total, initial=total - left, unit="token") as bar:
            outcomes = engine.score_parts(map(requests_of, todo), stage.top_k, lambda tokens: bar.update(tokens, tokens=tokens))
            for position, results in outcomes:
                part = todo[position]
                work = works.pop(part)
                scores = work.sort_out(results)
                if trains_on_candidates:
                    _check_candidates(known, work.rollouts, scores)
                guard.check()
                record = ScoreManifest(
                    part=part,
                    teacher=engine.fingerprint,
                    top_k=stage.top_k,
                    max_tokens=work.max_tokens,
                    largest_candidate=largest_candidate(scores),
                    excluded=work.excluded,
                    allow_teacher_mismatch=override is not None,
                    part_crc32c=reader.parts[part].crc32c,
                    crc32c={},
                    engine=settings,
                    provenance=provenance(),
                )
                quarantine(run_dir, name, stage.store, part, work.excluded)
                write_scores(reader.location, stage.teacher, record, work.rollouts, scores, topk_dtype=stage.topk_dtype)
                cost.tokens += reader.parts[part].num_response_tokens
                cost.keep()
    reader.refresh()
    print(
        f"{name}: {cost.tokens} tokens by {fingerprint.short()} as {stage.teacher!r} into {reader.location.url}; {len(reader.missing_parts())} parts are not sealed"
    )
    account_scores(reader, parts, stage, name, run_dir)
    return reader


def check_scoring(
    reader: StoreReader,
    stage: ScoreStage,
    fingerprint: ModelFingerprint,
    parts: Sequence[int],
    *,
    check_lineage: bool = True,
    any_teacher: bool = False,
) -> tuple[list[int], dict[int, str], str | None]:
    """All that must hold before the model of this fingerprint scores `parts`, so that an engine has cost nothing where it does not.

    Returns the parts that are left to score, the tokens that one of both models lacks (by id), and the sentence of a teacher mismatch that
    is allowed. Raises UserError.
    """
    student = reader.manifest.sampler
    foreign = check_same_tokenizer(student, fingerprint)
    override = None
    if check_lineage:
        check_stored_format(reader)
        if reader.manifest.lineage.sft is None and (problem := teacher_writes_otherwise(reader, load_tokenizer(stage.model))) is not None:
            print(f"WARNING: {problem}")
        lineage = reader.manifest.lineage
        if reader.manifest.sampler_role == "teacher":  # answers for SFT: whoever was fine-tuned on them has this teacher
            lineage = lineage.model_copy(update={"sft_teacher": student})
        problem = teacher_problem(lineage, fingerprint)
        if any_teacher and problem is not None and not stage.allow_teacher_mismatch:
            print(f"{problem[0]}: scored to be derived from; training on the scores of {stage.teacher!r} themselves will be refused")
        else:
            override = check_teacher(lineage, fingerprint, allow_mismatch=stage.allow_teacher_mismatch)
        if override is not None:
            print(f"WARNING: {override}")
    for part in parts:
        _check_earlier(reader, part, stage, fingerprint)
    todo = [part for part in parts if reader.score_manifest(part, stage.teacher) is None]
    for part in todo:
        reader.check_sampled(part)
    Vocabulary(f"teacher {fingerprint.short()}", fingerprint.vocab_size, foreign).check_store(reader, todo, known_rows=student.vocab_size)
    return todo, foreign, override


def _check_candidates(known: Vocabulary, rollouts: Sequence[Rollout], scores: Sequence[TeacherScores | None]) -> None:
    """Raise StoreError for a teacher's candidate that the student does not know."""
    for rollout, score in zip(rollouts, scores, strict=True):
        if score is not None and score.topk_ids is not None:
            where = f"the teacher's candidates at prompt {rollout.prompt_index}, sample {rollout.sample_index}"
            known.check(score.topk_ids, where, "lower score.top_k, or set score.top_k = 0 and train.loss.name = 'opd', which needs none")


def largest_candidate(scores: Sequence[TeacherScores | None]) -> int | None:
    """The highest token id among the candidates, None without any."""
    return max((int(score.topk_ids.max()) for score in scores if score is not None and score.topk_ids is not None), default=None)


def account_scores(reader: StoreReader, parts: Sequence[int], stage: ScoreStage, name: str, run_dir: str | None) -> None:
    """Raise QuarantineError if too many rollouts of `parts` were quarantined."""
    excluded = [entry for part in parts if (record := reader.score_manifest(part, stage.teacher)) is not None for entry in record.excluded]
    remedy = f"find the cause; to score them again delete teacher/{stage.teacher} of their parts and run the same command"
    total = sum(reader.parts[part].num_rollouts for part in parts)
    check_quarantined(name, excluded, total=total, limit=stage.max_quarantined, run_dir=run_dir, remedy=remedy)


class PartWork:
    """Rollouts of a part on their way to the teacher, and those that it can't score, with the reason."""

    def __init__(self, rollouts: Sequence[Rollout], context_length: int, overlong: str):
        self.rollouts = rollouts
        self.excluded: list[Excluded] = []
        longest = max((len(rollout.tokens) for rollout in rollouts), default=0)
        self.max_tokens = context_length if longest > context_length and overlong == "cut" else None
        for rollout in rollouts:
            T = len(rollout.tokens)
            if context_length >= T:
                continue
            if overlong == "error":
                raise StoreError(
                    f"prompt {rollout.prompt_index}, sample {rollout.sample_index} has {T} tokens, but the teacher takes {context_length}; "
                    "raise the server's context length, or set score.overlong to 'cut' or 'skip' (recorded)"
                )
            if overlong == "skip" or rollout.prompt_len >= context_length:
                self._exclude(rollout, f"{T} tokens ({rollout.prompt_len} of the prompt), the teacher takes {context_length}")

    def _exclude(self, rollout: Rollout, reason: str, *, quarantined: bool = False) -> None:
        names = {"prompt_index": rollout.prompt_index, "sample_index": rollout.sample_index}
        self.excluded.append(Excluded(**names, reason=reason, quarantined=quarantined))

    def asked(self) -> list[Rollout]:
        """Rollouts that are to be scored, cut where they are too long."""
        out = {(entry.prompt_index, entry.sample_index) for entry in self.excluded}
        return [r.cut(self.max_tokens) for r in self.rollouts if (r.prompt_index, r.sample_index) not in out]

    def requests(self) -> list[ScoreRequest]:
        return [ScoreRequest(rollout.tokens, rollout.prompt_len) for rollout in self.asked()]

    def sort_out(self, outcomes: Sequence[TeacherScores | Failed]) -> list[TeacherScores | None]:
        """Scores of all rollouts, None for the excluded, to which come those that the engine failed at."""
        scores: dict[tuple[int, int], TeacherScores] = {}
        for rollout, outcome in zip(self.asked(), outcomes, strict=True):
            try:
                if isinstance(outcome, Failed):
                    raise ValueError(outcome.reason)
                outcome.check_against(rollout)
                scores[rollout.prompt_index, rollout.sample_index] = outcome
            except ValueError as error:
                self._exclude(rollout, str(error), quarantined=True)
        return [scores.get((rollout.prompt_index, rollout.sample_index)) for rollout in self.rollouts]


def _check_earlier(reader: StoreReader, part: int, stage: ScoreStage, fingerprint: ModelFingerprint) -> None:
    """Raise StoreError if this teacher name stands for another model, or another K, in a part that is already scored."""
    record = reader.score_manifest(part, stage.teacher)
    if record is None:
        return
    if record.derived is not None:
        raise StoreError(
            f"{reader.location.url}: teacher {stage.teacher!r} of part {part} is derived ({record.derived.describe()}); use another name (score.teacher=...)"
        )
    if not same_model(record.teacher, fingerprint):
        raise StoreError(
            f"{reader.location.url}: teacher {stage.teacher!r} of part {part} is {record.teacher.short()}, not {fingerprint.short()}; use another name (score.teacher=...)"
        )
    if record.top_k != stage.top_k:
        raise StoreError(
            f"{reader.location.url}: part {part} was scored with top_k={record.top_k}, now top_k={stage.top_k}; use the same, or another name (score.teacher=...)"
        )
