"""What a store writes down: its manifest and extensions, those of parts and of scores, and the gap between engines. They check themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from megatron_opd.records import Count, Derivation, Lineage, ModelFingerprint, PromptFile, Record, SamplingParams, Sparse, StoreId

MAX_PARTS = 10**6  # folders of six digits
EXTENDED_FORMAT = 2  # of a store with extensions, which programs that know none must not take for the whole


class Extension(Record):
    """What a store was asked to hold from then on: all of `prompts`, `samples_per_prompt` of each; the parts that it had stay.

    `extends` and `store_id`: identities of the store before and with it.
    """

    prompts: PromptFile
    samples_per_prompt: int = Field(gt=0, lt=1 << 20)
    extends: StoreId
    store_id: StoreId
    provenance: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """Parts `first_part` on, which hold these samples of these prompts (rows of the prompt file); of the store as first made, and each extension.

    `generation`: the extension that asked for it, from 1; 0 for the store as it was first made.
    """

    generation: int
    first_part: int
    prompts: range
    samples: range
    prompts_per_part: int

    @property
    def num_parts(self) -> int:
        return -(-len(self.prompts) // self.prompts_per_part)

    def prompt_range(self, part: int) -> range:
        """Prompts of part `part` of the store."""
        start = (part - self.first_part) * self.prompts_per_part
        return self.prompts[start : start + self.prompts_per_part]


class StoreManifest(Sparse):
    """Attributes of a store's root group.

    `prompts` and `sampling.samples_per_prompt` are those that the store was first made for; `num_prompts` and `samples_per_prompt` those of now.

    `stop_ids`: every id that ends a response (empty in a store of an older version). `turn_end`: the one with which the chat template
    closes a turn. `chat_templates`: what wrote the prompts; `prompt_suffix`: its ids behind the last message; `prompt_probe`: its ids for a
    fixed conversation. `round`: the number of the round, of several, whose rollouts these are; its lineage names the stores of those before.
    """

    _left_out = ("round",)

    format_version: int = 1
    sampler_role: str
    sampler: ModelFingerprint
    lineage: Lineage
    prompts: PromptFile
    prompts_per_part: int = Field(gt=0, lt=1 << 40)
    sampling: SamplingParams
    encoding: dict[str, Any] = Field(default_factory=dict)
    stop_ids: list[int] = Field(default_factory=list)
    turn_end: int | None = None
    chat_templates: dict[str, str] = Field(default_factory=dict)
    prompt_suffix: list[int] = Field(default_factory=list)
    prompt_probe: list[int] = Field(default_factory=list)
    allow_template_mismatch: bool = False
    round: int | None = Field(default=None, ge=1, lt=1 << 40)
    engine: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    extensions: list[Extension] = Field(default_factory=list, max_length=1 << 16)

    @model_validator(mode="after")
    def _parts_have_names(self) -> StoreManifest:
        if (self.format_version == EXTENDED_FORMAT) != bool(self.extensions):
            raise ValueError(f"format {self.format_version} with {len(self.extensions)} extensions")
        prompts, samples = self.prompts.num_prompts, self.sampling.samples_per_prompt
        for extension in self.extensions:
            now, each = extension.prompts.num_prompts, extension.samples_per_prompt
            if now < prompts or each < samples or (now, each) == (prompts, samples):
                raise ValueError(f"an extension from {prompts} prompts x {samples} samples to {now} x {each}")
            prompts, samples = now, each
        if self.num_parts > MAX_PARTS:
            raise ValueError(f"{self.num_parts} parts, at most {MAX_PARTS} are possible; raise prompts_per_part")
        return self

    @property
    def all_prompts(self) -> PromptFile:
        """Identity of the prompts that the store holds now."""
        return self.extensions[-1].prompts if self.extensions else self.prompts

    @property
    def num_prompts(self) -> int:
        return self.all_prompts.num_prompts

    @property
    def samples_per_prompt(self) -> int:
        return self.extensions[-1].samples_per_prompt if self.extensions else self.sampling.samples_per_prompt

    def segments(self) -> list[Segment]:
        """In the order of their parts. An extension adds the new samples of the prompts that were there, then the new prompts."""
        prompts, samples = self.prompts.num_prompts, self.sampling.samples_per_prompt
        found = [Segment(0, 0, range(prompts), range(samples), self.prompts_per_part)]
        for generation, extension in enumerate(self.extensions, start=1):
            now, each = extension.prompts.num_prompts, extension.samples_per_prompt
            for rows, numbers in ((range(prompts), range(samples, each)), (range(prompts, now), range(each))):
                if rows and numbers:
                    first = found[-1].first_part + found[-1].num_parts
                    found.append(Segment(generation, first, rows, numbers, self.prompts_per_part))
            prompts, samples = now, each
        return found

    @property
    def num_parts(self) -> int:
        last = self.segments()[-1]
        return last.first_part + last.num_parts

    @property
    def vocab_size(self) -> int:
        return self.sampler.vocab_size

    def segment(self, part: int) -> Segment:
        """The one that part `part` is of."""
        return next(segment for segment in reversed(self.segments()) if segment.first_part <= part)

    def prompt_range(self, part: int) -> range:
        """Rows of the prompt file that part `part` holds."""
        return self.segment(part).prompt_range(part)

    def sample_range(self, part: int) -> range:
        """Samples of each of its prompts that part `part` holds."""
        return self.segment(part).samples

    def num_pairs(self, part: int) -> int:
        """How many rollouts part `part` is to account for."""
        segment = self.segment(part)
        return len(segment.prompt_range(part)) * len(segment.samples)

    def pairs(self, part: int) -> list[tuple[int, int]]:
        """(prompt, sample) of every rollout that part `part` is to account for, in order."""
        return [(prompt, sample) for prompt in self.prompt_range(part) for sample in self.sample_range(part)]


class Excluded(Record):
    """A rollout that was asked for and is not there (or not scored), with the reason; `quarantined`: the engine failed at it."""

    prompt_index: Count
    sample_index: Count
    reason: str
    quarantined: bool = False


class PartManifest(Record):
    """Attributes of a sealed part; written last. `crc32c` is of each array's raw bytes.

    `store_id`: identity of the store that it was made for. `endings`: how many responses each stop id ended. Parts of older versions
    have neither.
    """

    part: Count
    store_id: StoreId | None = None
    num_rollouts: Count
    num_tokens: Count
    num_response_tokens: Count
    excluded: list[Excluded] = Field(default_factory=list)
    endings: dict[int, int] | None = None
    crc32c: dict[str, int]
    provenance: dict[str, Any] = Field(default_factory=dict)


class Derived(Derivation):
    """As it stands beside the scores: `source_id` is of the checksums of the source's scores of the whole store, and of what they score."""

    source_id: StoreId

    @property
    def derivation(self) -> Derivation:
        return Derivation.model_validate(self.model_dump(include=set(Derivation.model_fields)))


class ScoreManifest(Sparse):
    """Attributes of a teacher's group in a part; written last.

    `excluded` rollouts have no scores (NaN), and those longer than `max_tokens` are scored up to there; training leaves both out.
    `largest_candidate` is the highest token id among the teacher's candidates, None without any. `store_id` as in `PartManifest`.
    `derived`: how they were made, of scores of the same model, where no model scored.
    """

    _left_out = ("derived",)

    part: Count
    store_id: StoreId | None = None
    teacher: ModelFingerprint
    top_k: int = Field(default=0, ge=0, lt=1 << 20)
    max_tokens: int | None = Field(default=None, gt=0, lt=1 << 40)
    largest_candidate: Count | None = None
    excluded: list[Excluded] = Field(default_factory=list)
    allow_teacher_mismatch: bool = False
    derived: Derived | None = None
    part_crc32c: dict[str, int]
    crc32c: dict[str, int]
    engine: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)


class Gap(Record):
    """|difference| of two engines' log-probabilities of the same tokens, nats."""

    mean: float
    p99: float
    max: float
    tokens: int

    def describe(self) -> str:
        return f"mean {self.mean:.2g}, p99 {self.p99:.2g}, max {self.max:.2g} nats over {self.tokens} tokens"


class Calibration(Record):
    """How far the engines are apart on a sample of a store's rollouts.

    `floor`: the sampler scored by the serving engine, against Megatron. `stored`: pi_ref as stored, against Megatron. `replicas`: servers
    of one model with each other, by the model's weights_sha256. `skipped`: why the engines were not compared.
    """

    floor: Gap | None = None
    stored: Gap | None = None
    replicas: dict[str, Gap] = Field(default_factory=dict)
    num_rollouts: int = 0
    skipped: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
