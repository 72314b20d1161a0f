"""generate and rollout: sample responses to prompts, part by part, into a store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_opd.config import EngineConfig, Recipe, SampleStage, require
from megatron_opd.cost import StageCost, provenance
from megatron_opd.data.location import Location
from megatron_opd.data.prompts import read_prompts
from megatron_opd.data.store import StoreReader, create_store, part_group, write_part
from megatron_opd.errors import EngineError, LineageError, UserError
from megatron_opd.lineage import fingerprint_model, load_tokenizer, read_lineage
from megatron_opd.records import Excluded, Finish, Lineage, Rollout, StoreManifest
from megatron_opd.serve.encode import encode_prompts
from megatron_opd.serve.engine import Engine, Generated, GenerateRequest, open_engine


@dataclass(frozen=True)
class Shard:
    """Worker `index` of `count`: it makes the parts p with p % count == index."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UserError(f"shard {self.index}/{self.count}: i/N with 0 <= i < N is expected")

    @classmethod
    def parse(cls, text: str) -> Shard:
        index, sign, count = text.partition("/")
        if not sign or not index.isdecimal() or not count.isdecimal():
            raise UserError(f"--shard {text!r}: i/N is expected, for example 0/8")
        return cls(int(index), int(count))

    def owns(self, part: int) -> bool:
        return part % self.count == self.index


def generate(recipe: Recipe, shard: Shard = Shard()) -> StoreReader:
    """Teacher responses for SFT; the store names the teacher, so that consistency can be held from here on."""
    stage = require(recipe.generate, "generate")
    return sample_into_store(stage, recipe.engine, role="teacher", run_dir=recipe.run_dir, name="generate", shard=shard)


def rollout(recipe: Recipe, shard: Shard = Shard()) -> StoreReader:
    """Student responses for distillation, with the lineage of the student."""
    stage = require(recipe.rollout, "rollout")
    lineage = read_lineage(stage.model) or Lineage()
    if stage.sft_teacher is not None:
        declared = fingerprint_model(stage.sft_teacher)
        if lineage.sft_teacher is not None and lineage.sft_teacher.weights_sha256 != declared.weights_sha256:
            raise LineageError(
                f"rollout.sft_teacher declares {declared.short()}, but {stage.model} records {lineage.sft_teacher.short()}; drop the declaration"
            )
        lineage = lineage.model_copy(update={"sft_teacher": declared, "sft_teacher_declared": lineage.sft_teacher is None})
    return sample_into_store(stage, recipe.engine, role="student", run_dir=recipe.run_dir, name="rollout", shard=shard, lineage=lineage)


def sample_into_store(
    stage: SampleStage,
    engine_config: EngineConfig,
    *,
    role: str,
    run_dir: str,
    name: str,
    shard: Shard = Shard(),
    lineage: Lineage | None = None,
) -> StoreReader:
    """Fill the store's missing parts that belong to `shard`. Goes on where an earlier run stopped. Raises UserError."""
    prompt_file, prompts = read_prompts(stage.prompts, limit=stage.num_prompts)
    fingerprint = fingerprint_model(stage.model)
    manifest = StoreManifest(
        sampler_role=role,
        sampler=fingerprint,
        lineage=lineage or Lineage(),
        prompts=prompt_file,
        prompts_per_part=stage.prompts_per_part,
        sampling=stage.sampling,
        encoding=stage.encoding.model_dump(exclude_none=True),
        provenance=provenance(),
    )
    location = Location(stage.store)
    if location.read_attributes("") is not None:
        create_store(stage.store, manifest)  # other settings are refused now, before a model is loaded
    todo = [part for part in range(manifest.num_parts) if shard.owns(part) and location.read_attributes(part_group(part)) is None]
    if not todo:
        print(f"{name}: {stage.store} has all its parts")
        return StoreReader(stage.store)
    with StageCost(run_dir, name) as cost, closing_engine(open_engine(engine_config, stage.model)) as engine:
        max_prompt = (
            engine.context_length - 1
            if stage.sampling.max_new_tokens >= engine.context_length
            else engine.context_length - stage.sampling.max_new_tokens
        )
        encoded, overlong = encode_prompts(load_tokenizer(stage.model), prompts, stage.encoding, max_tokens=max_prompt)
        create_store(stage.store, manifest)  # a new one only now: what is refused until here leaves nothing behind
        settings = {"engine": engine.describe(), **provenance()}
        samples = stage.sampling.samples_per_prompt
        done = sum(len(manifest.prompt_range(part)) for part in range(manifest.num_parts) if shard.owns(part) and part not in todo)
        total = sum(len(manifest.prompt_range(part)) for part in range(manifest.num_parts) if shard.owns(part))
        with progress_bar(name, total=total * samples, initial=done * samples, unit="rollout") as bar:
            for part in todo:
                rows = manifest.prompt_range(part)
                skipped = set(overlong) & set(rows)
                requests = [GenerateRequest(encoded[row], row, sample) for row in rows if row not in skipped for sample in range(samples)]
                generated = engine.generate(requests, stage.sampling, lambda tokens: bar.update(1)) if requests else []
                rollouts = [_to_rollout(request, answer) for request, answer in zip(requests, generated, strict=True)]
                excluded = [
                    Excluded(prompt_index=row, sample_index=s, reason=f"prompt of {len(encoded[row])} tokens is too long")
                    for row in sorted(skipped)
                    for s in range(samples)
                ]
                bar.update(len(excluded))
                write_part(location, part, rollouts, excluded, settings)
                cost.tokens += sum(rollout.response_len for rollout in rollouts)
    reader = StoreReader(stage.store)
    _say_result(name, reader)
    return reader


def _to_rollout(request: GenerateRequest, generated: Generated) -> Rollout:
    if len(generated.tokens) == 0 or generated.finish is Finish.ABORT:
        raise EngineError(
            f"prompt {request.prompt_index}, sample {request.sample_index}: the engine gave no response ({generated.finish.name.lower()})"
        )
    unscored = np.full(len(request.prompt), np.nan, np.float32)
    try:
        return Rollout(
            tokens=np.concatenate([request.prompt, generated.tokens]).astype(np.int32),
            prompt_len=len(request.prompt),
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            finish=generated.finish,
            student_logp=np.concatenate([unscored, generated.logp]).astype(np.float32),
        )
    except ValueError as error:
        raise EngineError(f"prompt {request.prompt_index}, sample {request.sample_index}: {error}") from None


def _say_result(name: str, reader: StoreReader) -> None:
    missing = len(reader.missing_parts())
    excluded = sum(len(record.excluded) for record in reader.parts.values())
    length = (
        f"{reader.response_lens.mean():.0f} tokens a response, {(reader.finishes == Finish.STOP).mean():.1%} ended by themselves"
        if len(reader)
        else "none"
    )
    print(f"{name}: {len(reader)} rollouts in {reader.location.url} ({length}; {excluded} excluded; {missing} parts still missing)")


@contextlib.contextmanager
def closing_engine(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.close()


def progress_bar(name: str, *, total: int, unit: str, initial: int = 0) -> tqdm[Any]:
    """One style of progress bar for every stage; on a file (a Slurm log) a line now and then."""
    return tqdm(total=total, initial=initial, desc=name, unit=unit, unit_scale=True, mininterval=0.5, dynamic_ncols=True)
