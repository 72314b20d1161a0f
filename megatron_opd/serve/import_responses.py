"""import: responses that another program made, into a store; text is encoded once, and missing log-probabilities are computed.

Legend: P prompt tokens, R response tokens, T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opd.cost.meter import StageCost, provenance
from megatron_opd.data.imported import (
    ImportedRow,
    check_same_import,
    hash_responses,
    hash_row_prompts,
    named_log_probs,
    prompts_of,
    read_responses,
)
from megatron_opd.data.joining import join_store
from megatron_opd.data.location import Location
from megatron_opd.data.manifests import read_manifest
from megatron_opd.data.store import StoreReader
from megatron_opd.data.writer import write_part
from megatron_opd.errors import ConfigError, UserError
from megatron_opd.hf.lineage import fingerprint_model, load_tokenizer
from megatron_opd.hf.turns import Turns, describe_tokens, generation_prompt, resolve_encoding
from megatron_opd.recipe.config import RolloutStage, SampleStage
from megatron_opd.recipe.inference import EncodingConfig, EngineConfig
from megatron_opd.records import Finish, Lineage, Rollout, check_ending
from megatron_opd.serve.encode import encode_prompts, uses_template
from megatron_opd.serve.engine import Failed, ScoreRequest
from megatron_opd.serve.opening import open_engine
from megatron_opd.serve.sample import account, prompt_format, say_result, student_lineage
from megatron_opd.serve.stage import Bar, ModelGuard, Shard, closing_engine, engine_meter, quarantine
from megatron_opd.store_records import Excluded, StoreManifest

_NAME = "import"


@dataclass(frozen=True)
class _Encoded:
    """Rows as token ids, by the number of the row: prompts int32 [P], responses int32 [R]. Only those of the parts that are to be made."""

    rows: Sequence[ImportedRow]  # all
    prompts: dict[int, np.ndarray]
    responses: dict[int, np.ndarray]
    finishes: dict[int, Finish]

    def tokens(self, row: int) -> np.ndarray:
        """Prompt and response, int32 [T]."""
        return np.concatenate([self.prompts[row], self.responses[row]])

    def rollout(self, row: int, logp: np.ndarray) -> Rollout:
        """`logp`: float32 [R], or [T] with NaN at the prompt. Raises ValueError for what are no log-probabilities."""
        start = len(self.prompts[row])
        if len(logp) == len(self.responses[row]):
            logp = np.concatenate([np.full(start, np.nan, np.float32), logp])
        return Rollout(self.tokens(row), start, row, 0, self.finishes[row], logp.astype(np.float32))


def import_responses(
    stage: SampleStage,
    engine_config: EngineConfig,
    *,
    role: str,
    run_dir: str,
    shard: Shard = Shard(),
    field: str | None = None,
    compute_log_probs: bool = False,
    extend: bool = False,
) -> StoreReader:
    """Fill `stage.store` with the rows of `stage.prompts`, as responses of `stage.model`; every row is a prompt with one sample.

    That the model made them is declared, and recorded so. Log-probabilities are the rows', or computed with the model if no row has any
    or `compute_log_probs`. Goes on where an earlier run stopped. Raises UserError naming file, row and field.
    """
    if stage.sampling.samples_per_prompt != 1 or stage.unique_prompts or stage.subset_seed is not None:
        raise ConfigError(
            "each row of an imported file is a prompt of its own with one response; leave samples_per_prompt, unique_prompts and subset_seed out"
        )
    rows = read_responses(stage.prompts, limit=stage.num_prompts, field=field)
    declares = not compute_log_probs and _have_log_probs(rows)
    fingerprint, tokenizer = fingerprint_model(stage.model), load_tokenizer(stage.model)
    lineage, allowed = declared_lineage(stage, fingerprint.short())
    templated = _templated(tokenizer, rows, stage.encoding)
    turns, lineage = prompt_format(stage, tokenizer, templated, lineage, allow_mismatch=allowed, section="rollout")
    prompts = prompts_of(stage.prompts, rows)
    record = {"model": fingerprint.short(), "file": prompts.name, "sha256": hash_responses(rows, log_probs=declares)}
    wanted = StoreManifest(
        sampler_role=role,
        sampler=fingerprint,
        lineage=lineage,
        prompts=prompts,
        prompts_per_part=stage.prompts_per_part,
        sampling=stage.sampling,
        allow_template_mismatch=allowed,
        provenance={**provenance(), "imported": record | {"log_probs": named_log_probs(declares)}},
        **turns.manifest_fields(),
    )
    location = Location(stage.store)

    def join(**how: Any) -> StoreManifest:
        found = join_store(stage.store, wanted, lambda count: hash_row_prompts(rows[:count]), extend=extend, **how)
        if location.read_attributes("") is not None:
            check_same_import(location.url, read_manifest(location)[0], rows, log_probs=declares)
        return found

    manifest = join(write=False)
    before = StoreReader(stage.store) if location.read_attributes("") is not None else None
    todo = [part for part in range(manifest.num_parts) if shard.owns(part) and (before is None or part not in before.parts)]
    if not todo:
        print(f"{_NAME}: {location.url} has all its parts")
        return account(before or StoreReader(stage.store), shard, stage, _NAME, run_dir)
    ends = describe_tokens(tokenizer, turns.stop_ids, turns.stop_ids)
    print(f"{_NAME}: {len(rows)} responses of {fingerprint.short()}, as declared; they end at {ends}")
    if role == "student" and (texts := sum(row.response is not None for row in rows)):
        print(f"WARNING: {texts} responses are text: they are tokenised again, and the ids may differ from those that the student sampled")
    parts = {part: manifest.prompt_range(part) for part in todo}
    encoded = _encode(tokenizer, rows, [row for numbers in parts.values() for row in numbers], turns, stage, fingerprint.vocab_size)

    def begin() -> None:
        join(planned=manifest)

    if declares:
        begin()
        for part, numbers in parts.items():
            rollouts = [encoded.rollout(row, _given(rows[row])) for row in numbers]
            write_part(location, part, rollouts, [], {"engine": {"kind": "imported"}, **provenance()})
    else:
        _write_with_computed(location, parts, encoded, stage, engine_config, run_dir, begin)
    reader = StoreReader(stage.store)
    say_result(_NAME, reader)
    return account(reader, shard, stage, _NAME, run_dir)


def _write_with_computed(
    location: Location,
    parts: dict[int, range],
    encoded: _Encoded,
    stage: SampleStage,
    engine_config: EngineConfig,
    run_dir: str,
    begin: Callable[[], None],
) -> None:
    """Write parts (their rows) with log-probabilities by the model; `begin` is called when nothing more can be refused.

    What the engine fails at is excluded by name, as quarantined.
    """
    with (
        StageCost(run_dir, _NAME, meter=engine_meter(engine_config)) as cost,
        closing_engine(open_engine(engine_config, stage.model, log_dir=f"{run_dir}/logs")) as engine,
    ):
        cost.num_gpus = engine.num_gpus
        guard = ModelGuard(engine, stage.model)
        total = 0
        for row in (row for numbers in parts.values() for row in numbers):
            if (length := len(encoded.tokens(row))) > engine.context_length:
                raise UserError(
                    f"{encoded.rows[row].where}: prompt and response have {length} tokens, and {stage.model} takes {engine.context_length}; "
                    "leave such rows out"
                )
            total += len(encoded.responses[row])
        begin()

        def requests_of(numbers: range) -> list[ScoreRequest]:
            return [ScoreRequest(encoded.tokens(row), len(encoded.prompts[row])) for row in numbers]

        with Bar(_NAME, cost, total=total, initial=0, unit="token") as bar:
            scored = engine.score_parts(map(requests_of, parts.values()), 0, lambda count: bar.update(count, tokens=count))
            for number, outcomes in scored:
                part, numbers = list(parts.items())[number]
                rollouts, excluded = [], []
                for row, outcome in zip(numbers, outcomes, strict=True):
                    try:
                        if isinstance(outcome, Failed):
                            raise ValueError(outcome.reason)
                        rollouts.append(encoded.rollout(row, outcome.logp))
                    except ValueError as error:
                        excluded.append(Excluded(prompt_index=row, sample_index=0, reason=str(error), quarantined=True))
                guard.check()
                quarantine(run_dir, _NAME, stage.store, part, excluded)
                write_part(location, part, rollouts, excluded, {"engine": engine.describe(), **provenance()})
                cost.tokens += sum(rollout.response_len for rollout in rollouts)
                cost.keep()


def _have_log_probs(rows: Sequence[ImportedRow]) -> bool:
    """Whether the rows have log-probabilities. Raises UserError if some have."""
    without = [row for row in rows if row.logp is None]
    if without and len(without) < len(rows):
        raise UserError(
            f"{without[0].where}: no log-probabilities, but other rows have some; give them for all, or compute all with --compute-logprobs"
        )
    return not without


def declared_lineage(stage: SampleStage, model: str, how: str = "imported") -> tuple[Lineage, bool]:
    """Lineage of responses that are declared to be `model`'s, and whether another prompt format than the SFT answers' is allowed."""
    if not isinstance(stage, RolloutStage):
        return Lineage(sft_teacher_declared=True), False
    lineage = student_lineage(stage)
    said = f"rollouts were {how}: that {model} made them is declared"
    return lineage.model_copy(update={"overrides": [*lineage.overrides, said]}), stage.allow_template_mismatch


def _templated(tokenizer: Any, rows: Sequence[ImportedRow], encoding: EncodingConfig) -> list[bool]:
    """For each row, whether the chat template wrote its prompt: of ids, whether they end as the template ends prompts. Raises UserError."""
    found = [row.prompt is not None and uses_template(row.prompt, encoding) for row in rows]
    given = [number for number, row in enumerate(rows) if row.prompt_ids is not None]
    if not given or encoding.chat_template == "never" or (encoding.chat_template == "auto" and tokenizer.chat_template is None):
        return found
    suffix = generation_prompt(tokenizer, resolve_encoding(tokenizer, encoding, templated=True))
    if not suffix and encoding.chat_template == "auto":
        raise UserError(
            f"{rows[given[0]].where}: the prompt is token ids, and nothing shows whether the chat template wrote it; set encoding.chat_template to "
            "'always' if it did, to 'never' if it is plain text"
        )
    ends = {number: rows[number].prompt_ids[-len(suffix) :].tolist() == suffix if suffix else True for number in given}  # type: ignore[index]
    other = next((number for number in given if not ends[number]), None)
    if other is not None and (encoding.chat_template == "always" or any(ends.values())):
        raise UserError(
            f"{rows[other].where}: the prompt's ids do not end with {suffix}, as the chat template of {tokenizer.name_or_path} ends prompts"
            + ("" if encoding.chat_template == "always" else ", and those of other rows do")
            + "; give the model whose template wrote them or, if they are plain text, set encoding.chat_template='never'"
        )
    return [ends.get(number, written) for number, written in enumerate(found)]


def _encode(
    tokenizer: Any, rows: Sequence[ImportedRow], numbers: Sequence[int], turns: Turns, stage: SampleStage, vocab_size: int
) -> _Encoded:
    """The rows of these numbers as token ids: their own, or encoded, prompts as `generate` does it. Raises UserError."""
    chosen = [rows[number] for number in numbers]
    try:
        texts = iter(encode_prompts(tokenizer, [row.prompt for row in chosen if row.prompt is not None], turns.encoding))
    except UserError as error:  # names prompts by their number, from 0
        raise UserError(f"{stage.prompts}: {error}") from None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    encoded = _Encoded(rows, {}, {}, {})
    for number, row in zip(numbers, chosen, strict=True):
        prompt = row.prompt_ids if row.prompt_ids is not None else next(texts)
        response, finish = _encode_response(tokenizer, row, prompt, turns, special)
        _check_row(row, prompt, response, vocab_size, stage)
        encoded.prompts[number], encoded.responses[number], encoded.finishes[number] = prompt, response, finish
    return encoded


def _encode_response(tokenizer: Any, row: ImportedRow, prompt: np.ndarray, turns: Turns, special: set[int]) -> tuple[np.ndarray, Finish]:
    """Ids int32 [R] of a response with its end, and why it ended. Raises UserError.

    Ids that end with a stop id stopped, others were cut. A text is a whole answer and gets the end of its turn, unless its row says
    'length', and holds no other `special` tokens. What the row says must be so.
    """
    stop_ids = list(turns.stop_ids)
    if row.response_ids is not None:
        tokens = row.response_ids
        finish = row.finish if row.finish is not None else Finish.STOP if int(tokens[-1]) in stop_ids else Finish.LENGTH
    else:
        ids = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        before, after = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (prompt.tolist(), [*prompt.tolist(), *ids]))
        if not ids or after != before + str(row.response):
            raise UserError(
                f"{row.where}: {row.field!r} is not what its {len(ids)} token ids decode to behind the prompt ({after[len(before) :]!r:.80} for "
                f"{row.response!r:.80}); give the response's token ids"
            )
        inside = ids[:-1] if ids[-1] in stop_ids else ids
        if (token := next((token for token in inside if token in special), None)) is not None:
            raise UserError(
                f"{row.where}: {row.field!r} is a text that holds {tokenizer.convert_ids_to_tokens(token)!r}, which the tokenizer of "
                f"{tokenizer.name_or_path} reads as its special token {token}; leave the row out or, if the model made that token, give token ids"
            )
        finish = Finish.STOP if row.finish is None else row.finish
        if finish is Finish.STOP and ids[-1] not in stop_ids:
            end = turns.turn_end if turns.turn_end is not None else tokenizer.eos_token_id
            if end is None:
                raise UserError(
                    f"{row.where}: {row.field!r} is a text, and {tokenizer.name_or_path} has no token that ends one; give its token ids"
                )
            ids = [*ids, end]
        tokens = np.array(ids, np.int32)
    try:
        check_ending(tokens, finish, stop_ids)
    except ValueError as error:
        raise UserError(f"{row.where}: {row.field!r}: {error}; name further ones with sampling.stop_token_ids, or fix the row") from None
    return tokens, finish


def _check_row(row: ImportedRow, prompt: np.ndarray, response: np.ndarray, vocab_size: int, stage: SampleStage) -> None:
    """Raise UserError for ids that the model does not have, and for what is longer than what was asked for."""
    for what, ids in (("prompt", prompt), (f"response ({row.field!r})", response)):
        if int(ids.max()) >= vocab_size:
            raise UserError(
                f"{row.where}: the {what} has the token id {int(ids.max())}, but {stage.model} has {vocab_size}; is it the model that made it?"
            )
    if stage.encoding.max_prompt_tokens is not None and len(prompt) > stage.encoding.max_prompt_tokens:
        raise UserError(
            f"{row.where}: the prompt has {len(prompt)} tokens, over encoding.max_prompt_tokens; leave such rows out, or raise it"
        )
    if len(response) > stage.sampling.max_new_tokens:
        raise UserError(
            f"{row.where}: the response ({row.field!r}) has {len(response)} tokens, over sampling.max_new_tokens = {stage.sampling.max_new_tokens}; "
            "set it to the limit that they were sampled with"
        )


def _given(row: ImportedRow) -> np.ndarray:
    assert row.logp is not None
    return row.logp
