"""generate and rollout: sample responses to prompts, part by part, into a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from megatron_opd.cost.meter import StageCost, provenance
from megatron_opd.data.joining import join_store
from megatron_opd.data.location import Location
from megatron_opd.data.missing import require_made
from megatron_opd.data.prompts import hash_prompts, read_prompts
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_part
from megatron_opd.errors import LineageError
from megatron_opd.hf.lineage import LINEAGE_FILE, fingerprint_model, load_tokenizer, read_lineage
from megatron_opd.hf.turns import Turns, check_prompt_format, describe_tokens, read_turns, with_override
from megatron_opd.recipe.config import Recipe, RolloutStage, SampleStage, require
from megatron_opd.recipe.inference import EngineConfig
from megatron_opd.recipe.rounds import round_recipe
from megatron_opd.records import Finish, Lineage, Prompt, PromptFile, Rollout
from megatron_opd.serve.encode import describe_encoding, encode_prompts, find_overlong, uses_template
from megatron_opd.serve.engine import Failed, Generated, GenerateRequest
from megatron_opd.serve.stage import Bar, Lend, ModelGuard, Shard, check_quarantined, engine_meter, lending, quarantine, round_facts
from megatron_opd.store_records import Excluded, StoreManifest

Stage = TypeVar("Stage", bound=SampleStage)


def generate(recipe: Recipe, shard: Shard = Shard(), *, extend: bool = False) -> StoreReader:
    """Teacher responses for SFT; the store names the teacher, so that consistency can be held from here on."""
    stage = cap_responses(require(recipe.generate, "generate"), recipe.sft.max_response_tokens, "generate")
    engine = recipe.engine_for(stage.model)
    return sample_into_store(stage, engine, role="teacher", run_dir=recipe.run_dir, name="generate", shard=shard, extend=extend)


def rollout(
    recipe: Recipe, shard: Shard = Shard(), *, number: int | None = None, extend: bool = False, lend: Lend | None = None
) -> StoreReader:
    """Student responses for distillation, with the lineage of the student; `number` is the round of several. `lend`: see `sample_into_store`."""
    recipe = round_recipe(recipe, number)
    stage = cap_responses(require(recipe.rollout, "rollout"), recipe.train.max_response_tokens, "rollout")
    require_made(recipe, stage.model, number=number)
    lineage = student_lineage(stage)
    if number is not None and (went := len(lineage.rounds)) != number - 1:
        raise LineageError(
            f"{stage.model}: round {number} wants the student of {number - 1} rounds, but this one went through {went}; "
            f"{'take the student before distillation' if number == 1 else f'convert that of round {number - 1}'}"
        )
    return sample_into_store(
        stage,
        recipe.engine_for(stage.model),
        role="student",
        run_dir=recipe.run_dir,
        name="rollout",
        shard=shard,
        lineage=lineage,
        allow_template_mismatch=stage.allow_template_mismatch,
        extend=extend,
        number=number,
        lend=lend,
    )


def student_lineage(stage: RolloutStage) -> Lineage:
    """Lineage of the student that is sampled, with the SFT teacher that was declared for it. Raises LineageError."""
    lineage = read_lineage(stage.model) or Lineage()
    if stage.sft_teacher is None:
        return lineage
    declared = fingerprint_model(stage.sft_teacher)
    if lineage.sft_teacher is not None and lineage.sft_teacher.weights_sha256 != declared.weights_sha256:
        raise LineageError(
            f"rollout.sft_teacher declares {declared.short()}, but {stage.model} records {lineage.sft_teacher.short()}; drop the declaration"
        )
    return lineage.model_copy(update={"sft_teacher": declared, "sft_teacher_declared": lineage.sft_teacher is None})


def sample_into_store(
    stage: SampleStage,
    engine_config: EngineConfig,
    *,
    role: str,
    run_dir: str,
    name: str,
    shard: Shard = Shard(),
    lineage: Lineage | None = None,
    allow_template_mismatch: bool = False,
    extend: bool | None = False,
    number: int | None = None,
    lend: Lend | None = None,
) -> StoreReader:
    """Fill the store's missing parts that belong to `shard`. Goes on where an earlier run stopped.

    With `extend`, a store that has the first of these prompts, or fewer samples of each, gets parts for what is new; None: the command can't.
    A model that was fine-tuned is asked as in its SFT store; another chat template is refused unless allowed, and then recorded in the
    lineage. `number` is the round of several, which the store and the account name. `lend` gives an engine that is open and stays so;
    without it one is opened for the stage. Raises UserError.
    """
    notes: list[str] = []
    prompt_file, prompts = read_stage_prompts(stage, role=role, answers=False, say=notes.append)
    fingerprint, tokenizer, lineage = fingerprint_model(stage.model), load_tokenizer(stage.model), lineage or Lineage()
    templated = [uses_template(prompt, stage.encoding) for prompt in prompts]
    turns, lineage = prompt_format(stage, tokenizer, templated, lineage, allow_mismatch=allow_template_mismatch, section=name.split()[0])
    wanted = StoreManifest(
        sampler_role=role,
        sampler=fingerprint,
        lineage=lineage,
        prompts=prompt_file,
        prompts_per_part=stage.prompts_per_part,
        sampling=stage.sampling,
        allow_template_mismatch=allow_template_mismatch,
        round=number,
        provenance=provenance() | ({} if stage.subset_seed is None else {"subset_seed": stage.subset_seed}),
        **turns.manifest_fields(),
    )
    sampling = stage.sampling.model_copy(update={"stop_token_ids": wanted.stop_ids})
    location = Location(stage.store)

    def hash_first(count: int) -> str:
        return hash_prompts(prompts[:count])

    # Other settings, and parts of other stores, are refused now, before a model is loaded.
    manifest = join_store(stage.store, wanted, hash_first, extend=extend, write=False)
    before = StoreReader(stage.store) if location.read_attributes("") is not None else None
    todo = [part for part in range(manifest.num_parts) if shard.owns(part) and (before is None or part not in before.parts)]
    if not todo:
        more = before.manifest.num_parts - manifest.num_parts if before is not None else 0
        print(
            f"{name}: {location.url} has all its parts"
            + (f"; it was extended by {more} since, which this command does not make" if more else "")
        )
        return account(before or StoreReader(stage.store), shard, stage, name, run_dir)
    for line in (*notes, *describe_encoding(tokenizer, prompts, stage.encoding)):
        print(f"{name}: {line}")
    rows = sorted({row for part in todo for row in manifest.prompt_range(part)})
    own = [prompts[row] for row in rows]
    own_ids = encode_prompts(tokenizer, own, turns.encoding)  # before an engine has cost something
    if stage.encoding.max_prompt_tokens is not None:
        find_overlong(own_ids, own, stage.encoding, max_tokens=stage.encoding.max_prompt_tokens)
    encoded = dict(zip(rows, own_ids, strict=True))
    with (
        StageCost(run_dir, name, facts=round_facts(number), meter=engine_meter(engine_config)) as cost,
        (lend or lending(engine_config, run_dir))(stage.model) as engine,
    ):
        cost.num_gpus = engine.num_gpus
        cost.facts["opening_seconds"] = cost.seconds()  # of the engine, or of other weights into an open one
        guard = ModelGuard(engine, stage.model)
        max_prompt = longest_prompt(engine.context_length, stage.sampling.max_new_tokens)
        skipped = {rows[position] for position in find_overlong(own_ids, own, stage.encoding, max_tokens=max_prompt)}
        print(f"{name}: responses end at {describe_tokens(tokenizer, turns.stop_ids, turns.stop_ids)}", flush=True)
        # A new one, or an extension, only now: what is refused until here leaves nothing behind.
        join_store(stage.store, wanted, hash_first, extend=extend, planned=manifest)
        settings = {"engine": engine.describe(), **provenance()}
        total = sum(manifest.num_pairs(part) for part in range(manifest.num_parts) if shard.owns(part))
        left = sum(manifest.num_pairs(part) for part in todo)

        def requests_of(part: int) -> list[GenerateRequest]:
            return [GenerateRequest(encoded[row], row, sample) for row, sample in manifest.pairs(part) if row not in skipped]

        with Bar(name, cost, total=total, initial=total - left, unit="rollout") as bar:
            outcomes = engine.generate_parts(map(requests_of, todo), sampling, lambda tokens: bar.update(1, tokens=tokens))
            for position, generated in outcomes:
                part = todo[position]
                rollouts, excluded = _sort_out(requests_of(part), generated)
                excluded += [
                    Excluded(prompt_index=row, sample_index=sample, reason=f"prompt of {len(encoded[row])} tokens is too long")
                    for row, sample in manifest.pairs(part)
                    if row in skipped
                ]
                guard.check()
                quarantine(run_dir, name, stage.store, part, excluded)
                write_part(location, part, rollouts, excluded, settings)
                cost.tokens += sum(rollout.response_len for rollout in rollouts)
                cost.keep()
    reader = StoreReader(stage.store)
    say_result(name, reader)
    return account(reader, shard, stage, name, run_dir)


def longest_prompt(context_length: int, max_new_tokens: int) -> int:
    """Tokens of a prompt behind which a response has room; one token of it where `max_new_tokens` alone fill the context."""
    return context_length - (max_new_tokens if max_new_tokens < context_length else 1)


def read_stage_prompts(
    stage: SampleStage, *, role: str, answers: bool, say: Callable[[str], None] | None = None
) -> tuple[PromptFile, list[Prompt]]:
    """`read_prompts` by a stage's settings; `role` is that of who samples. Raises UserError."""
    return read_prompts(
        stage.prompts,
        limit=stage.num_prompts,
        subset_seed=stage.subset_seed,
        dates=stage.dates,
        share=stage.share,
        unique=stage.unique_prompts,
        answers=answers,
        split="test" if role == "evaluation" else "train",
        say=say,
    )


def prompt_format(
    stage: SampleStage, tokenizer: Any, templated: Sequence[bool], lineage: Lineage, *, allow_mismatch: bool, section: str
) -> tuple[Turns, Lineage]:
    """How prompts are written (`templated` as in `read_turns`), which must be as those of the SFT answers were; allowed otherwise, it is recorded."""
    turns = read_turns(
        stage.model,
        tokenizer,
        stage.encoding,
        templated=templated,
        sft=lineage.sft,
        stop_token_ids=stage.sampling.stop_token_ids,
    )
    if lineage.sft is None:
        return turns, lineage
    problem = check_prompt_format(lineage.sft, turns, stage.model, tokenizer)
    remedy = f"the SFT answers' format is in {stage.model}/{LINEAGE_FILE}; write prompts so, or go on with {section}.allow_template_mismatch=true (recorded)"
    return turns, with_override(lineage, problem, allowed=allow_mismatch, remedy=remedy)


def account(reader: StoreReader, shard: Shard, stage: SampleStage, name: str, run_dir: str | None) -> StoreReader:
    """The reader; raises QuarantineError if too many rollouts of the shard were quarantined."""
    records = [record for part, record in reader.parts.items() if shard.owns(part)]
    excluded = [entry for record in records for entry in record.excluded]
    total = sum(record.num_rollouts for record in records) + len(excluded)
    remedy = "find the cause; to sample them again delete their parts and run the same command"
    check_quarantined(name, excluded, total=total, limit=stage.max_quarantined, run_dir=run_dir, remedy=remedy)
    return reader


def cap_responses(stage: Stage, used: int | None, name: str) -> Stage:
    """`stage` with responses no longer than training will use."""
    if used is None or stage.sampling.max_new_tokens <= used:
        return stage
    print(f"{name}: responses are sampled up to {used} tokens, as training uses no more ({name}.sampling.max_new_tokens asks for more)")
    return stage.model_copy(update={"sampling": stage.sampling.model_copy(update={"max_new_tokens": used})})


def _sort_out(requests: Sequence[GenerateRequest], outcomes: Sequence[Generated | Failed]) -> tuple[list[Rollout], list[Excluded]]:
    """Rollouts, and what the engine failed at."""
    rollouts, excluded = [], []
    for request, outcome in zip(requests, outcomes, strict=True):
        try:
            if isinstance(outcome, Failed):
                raise ValueError(outcome.reason)
            rollouts.append(_to_rollout(request, outcome))
        except ValueError as error:
            name = {"prompt_index": request.prompt_index, "sample_index": request.sample_index}
            excluded.append(Excluded(**name, reason=str(error), quarantined=True))
    return rollouts, excluded


def _to_rollout(request: GenerateRequest, generated: Generated) -> Rollout:
    """Raises ValueError for what is no response."""
    if len(generated.tokens) == 0 or generated.finish is Finish.ABORT:
        raise ValueError(f"the engine gave no response ({generated.finish.name.lower()})")
    unscored = np.full(len(request.prompt), np.nan, np.float32)
    return Rollout(
        tokens=np.concatenate([request.prompt, generated.tokens]).astype(np.int32),
        prompt_len=len(request.prompt),
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        finish=generated.finish,
        student_logp=np.concatenate([unscored, generated.logp]).astype(np.float32),
    )


def say_result(name: str, reader: StoreReader) -> None:
    missing = len(reader.missing_parts())
    excluded = sum(len(record.excluded) for record in reader.parts.values())
    length = (
        f"{reader.response_lens.mean():.0f} tokens a response, {(reader.finishes == Finish.STOP).mean():.1%} ended by themselves"
        if len(reader)
        else "none"
    )
    print(f"{name}: {len(reader)} rollouts in {reader.location.url} ({length}; {excluded} excluded; {missing} parts still missing)")
