"""The recipe: one pydantic tree read from TOML, changed by dotted overrides, checked as a whole.

Every path may use {run_dir} and {name}, ~ and environment variables; the built recipe has them filled in, and remembers how they were
written. `None` means "off" or "not given"; there are no magic numbers for that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from megatron_opd.cluster import SlurmConfig
from megatron_opd.errors import ConfigError
from megatron_opd.inference import EncodingConfig, EngineConfig
from megatron_opd.layout import MOST, Count, Fp8Config, ParallelConfig
from megatron_opd.layout import Section as _Section
from megatron_opd.objective import DriftConfig, LossConfig, RoundsConfig
from megatron_opd.paths import PATH, PathText
from megatron_opd.records import SamplingParams
from megatron_opd.redact import holds_secret, redact, redact_address

STAGES = ("generate", "sft", "rollout", "score", "train", "eval")  # sections of a recipe, in the order of a run
# Text for the model, and for the shell, may hold braces of its own.
FREE_TEXT = {"system", "prologue", "gpus"}
# Adam divides the rate by 1 - beta1 at its first step, and the result must be a float32 number.
_LARGEST_RATE = 1e30
_FILLED_IN = {"name", "run_dir", "models"}  # what placeholders of other fields stand for


class ModelsConfig(_Section):
    """Hugging Face directories: config.json, safetensors, tokenizer."""

    teacher: PathText = Field(description="teacher model; must be the one whose answers the student was fine-tuned on")
    student: PathText = Field(description="base student, before SFT")


def _check_sampling(sampling: SamplingParams) -> SamplingParams:
    """Not a field's bound, as older stores may have been sampled so."""
    if sampling.temperature != 0 and not 0.01 <= sampling.temperature <= 100:
        raise ValueError(f"temperature = {sampling.temperature:g} must be 0 (greedy), or between 0.01 and 100")
    return sampling


def _check_stores(store: str | list[str]) -> str | list[str]:
    if isinstance(store, list) and (not store or len(set(store)) < len(store)):
        raise ValueError("one store, or a list of different ones, is expected")
    return store


_Stores = Annotated[str | list[str], PATH, AfterValidator(_check_stores)]
_Sampling = Annotated[SamplingParams, AfterValidator(_check_sampling)]


class SampleStage(_Section):
    """A stage that samples responses into a store."""

    model: PathText
    prompts: PathText = Field(description="JSONL or Parquet file, or the folder of a Hugging Face dataset")
    store: PathText
    num_prompts: int | None = Field(default=None, gt=0, le=MOST, description="use only the first N prompts of the file")
    share: tuple[Count, Count] | None = Field(default=None, description="[i, n]: of these prompts the i-th of n equal shares, in order")
    unique_prompts: bool = Field(default=False, description="each prompt but once (DAPO-Math-17k holds each a hundred times)")
    prompts_per_part: int = Field(default=256, gt=0, le=MOST)
    max_quarantined: float = Field(default=0.001, ge=0, le=1, description="share of failed rollouts above which the stage exits with 3")
    sampling: _Sampling = SamplingParams()
    encoding: EncodingConfig = EncodingConfig()

    @model_validator(mode="after")
    def _check_share(self) -> SampleStage:
        if self.share is not None and self.share[0] > self.share[1]:
            raise ValueError(f"share = {list(self.share)}: [i, n] with i at most n is expected")
        return self


class GenerateStage(SampleStage):
    """Teacher responses for SFT."""

    model: PathText = "{teacher}"
    store: PathText = "{run_dir}/sft.opd.zarr"


class RolloutStage(SampleStage):
    """Student responses for distillation."""

    model: PathText = "{run_dir}/sft-hf"
    store: PathText = "{run_dir}/rollouts.opd.zarr"
    allow_template_mismatch: bool = Field(default=False, description="prompts written otherwise than those of the SFT answers; recorded")
    sft_teacher: PathText | None = Field(default=None, description="declare the SFT teacher of a checkpoint made elsewhere (its directory)")


class ScoreStage(_Section):
    """Teacher log-probabilities of the rollouts."""

    store: PathText = "{run_dir}/rollouts.opd.zarr"
    model: PathText = "{teacher}"
    teacher: str = Field(default="teacher", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the teacher's group in the store")
    top_k: int = Field(default=0, ge=0, le=MOST)
    topk_dtype: Literal["float32", "float16"] = "float32"
    overlong: Literal["error", "cut", "skip"] = Field(
        default="error", description="rollouts longer than the teacher takes: score what fits, or leave them out; both are recorded"
    )
    max_quarantined: float = Field(default=0.001, ge=0, le=1, description="share of failed rollouts above which the stage exits with 3")
    allow_teacher_mismatch: bool = False


class LrSchedule(_Section):
    """Learning-rate schedule of Megatron's OptimizerParamScheduler, in steps."""

    decay: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    min_lr: float = Field(default=0.0, ge=0)


class TrainerConfig(_Section):
    """What sft and train share: everything but the loss."""

    init: PathText
    store: _Stores = Field(description="a store, or a list of stores that are trained on as one")
    output: PathText
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="'auto': bfloat16 on GPUs, float32 on a CPU")
    lr: float = Field(default=2e-6, gt=0)
    schedule: LrSchedule = LrSchedule()
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_grad: float = Field(default=1.0, ge=0, description="0: no clipping; the norm is logged all the same")
    global_batch: int = Field(default=256, gt=0, le=MOST, description="rollouts a step")
    steps: int | None = Field(default=None, gt=0, le=MOST, description="optimizer steps; by default `epochs` over the store")
    epochs: int = Field(default=1, gt=0, le=MOST)
    micro_batch_tokens: int = Field(default=16384, gt=0, le=MOST, description="token slots of one packed micro-batch")
    packing: bool = Field(default=True, description="several sequences a micro-batch; False: one")
    max_response_tokens: int | None = Field(default=None, gt=0, le=MOST, description="cut responses after this many tokens")
    overlong: Literal["refuse", "cut"] = Field(default="refuse", description="a rollout of more than micro_batch_tokens tokens")
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    save_every: int = Field(default=50, gt=0, le=MOST)
    log_every: int = Field(default=1, gt=0, le=MOST, description="steps between console lines; metrics.jsonl has every step")
    keep_last: int = Field(default=2, gt=0, le=MOST, description="newest checkpoints kept")
    keep_every: int | None = Field(
        default=None, gt=0, le=MOST, description="keep every n-th step's checkpoint for good; a multiple of save_every"
    )
    async_save: bool = Field(default=True, description="write checkpoints while training goes on")
    max_skipped_steps: int = Field(
        default=3,
        ge=0,
        le=MOST,
        description="steps in a row that may be skipped as their loss or gradient is not finite; one more ends the run",
    )
    loggers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list, description="besides metrics.jsonl")
    wandb_project: str = "megatron-opd"
    allow_stop_mismatch: bool = Field(
        default=False, description="responses that end otherwise than the SFT answers did, or go on behind a stop id; recorded"
    )
    allow_incomplete: bool = Field(default=False, description="train on the sealed parts of a store that is not complete")
    distributed_optimizer: bool = True
    precision_aware_optimizer: bool = Field(
        default=False,
        description="gradients and Adam moments in the dtypes below (GPU, Transformer Engine)",
    )
    main_grads_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="with precision_aware_optimizer")
    moments_dtype: Literal["float32", "bfloat16", "float16", "fp8"] = Field(default="float32", description="with precision_aware_optimizer")
    optimizer_offload: float = Field(
        default=0.0, ge=0, le=1, description="share of the optimizer's state that lives and is updated on the CPU"
    )
    recompute: Literal["none", "selective", "full"] = Field(default="none", description="activations that the backward pass makes again")
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]] = Field(
        default=["core_attn"], description="what 'selective' makes again"
    )
    fp8: Fp8Config | None = Field(default=None, description="matrix products in FP8; not given: all in dtype")
    deterministic: bool = Field(
        default=False, description="on GPUs: only kernels that give the same bits each time, so that a resumed run is the same bit for bit"
    )
    loss_chunk_tokens: Count | Literal["all"] = Field(
        default=4096, description="response tokens whose logits are held at once; 'all' of a micro-batch"
    )
    parallel: ParallelConfig = ParallelConfig()
    process_group_minutes: int = Field(
        default=30, gt=0, le=100_000, description="how long a rank may wait for the others in a collective before the run ends"
    )

    @model_validator(mode="after")
    def _check_steps(self) -> TrainerConfig:
        if self.lr > _LARGEST_RATE:
            raise ValueError(f"lr = {self.lr:g} makes steps that float32 can't hold; it may be at most {_LARGEST_RATE:g}")
        if self.schedule.min_lr > self.lr:
            raise ValueError(f"schedule.min_lr = {self.schedule.min_lr:g} is above lr = {self.lr:g}; lower it, or raise lr")
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every = {self.keep_every} is not a multiple of save_every = {self.save_every}: other steps are not saved; "
                f"take {-(-self.keep_every // self.save_every) * self.save_every}, or another save_every"
            )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> TrainerConfig:
        lowered = self.main_grads_dtype != "float32" or self.moments_dtype != "float32"
        if lowered and not self.precision_aware_optimizer:
            raise ValueError("main_grads_dtype and moments_dtype need precision_aware_optimizer = true")
        if self.precision_aware_optimizer and not self.distributed_optimizer:
            raise ValueError("precision_aware_optimizer needs distributed_optimizer = true")
        if self.optimizer_offload and not self.precision_aware_optimizer:
            raise ValueError(
                "optimizer_offload needs precision_aware_optimizer = true: Megatron-Core's offloading optimizer is built on it"
            )
        if self.optimizer_offload and self.moments_dtype != "float32":
            raise ValueError("optimizer_offload keeps Adam's moments in float32; leave moments_dtype out")
        if self.moments_dtype in ("float16", "fp8") and self.fp8 is not None and self.fp8.recipe != "delayed":
            raise ValueError(
                f"moments_dtype = {self.moments_dtype!r} with fp8.recipe = {self.fp8.recipe!r}: Megatron-Core saves such moments without their "
                "scales; use float32 or bfloat16"
            )
        if self.precision_aware_optimizer and self.dtype == "float32":
            raise ValueError("precision_aware_optimizer is for bfloat16 training, but dtype = 'float32'")
        if self.fp8 is not None and self.dtype == "float32":
            raise ValueError("fp8 is for bfloat16 training, but dtype = 'float32'")
        if self.fp8 is not None and self.fp8.parameters and (not self.distributed_optimizer or self.optimizer_offload):
            raise ValueError(
                "fp8.parameters needs distributed_optimizer = true, whose shards are the exact weights, and no optimizer_offload"
            )
        return self

    def check_ranks(self, name: str, ranks: int) -> None:
        """Raise ConfigError unless `ranks` processes can make the groups of stage `name`, each data-parallel one with a rollout a step."""
        p = self.parallel
        try:
            p.check_ranks(ranks)
        except ConfigError as error:
            raise ConfigError(f"{name}.parallel: {error}") from None
        if self.global_batch < (dp := ranks // (p.tp * p.pp * p.cp)):
            raise ConfigError(
                f"{name}.global_batch = {self.global_batch} is smaller than {dp} data-parallel ranks; raise it, or start fewer ranks"
            )

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this."""
        return self.parallel.token_multiple * (self.fp8.token_multiple if self.fp8 else 1)

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens a chunk of the LM head, None for all at once."""
        return None if self.loss_chunk_tokens == "all" else self.loss_chunk_tokens


class SftStage(TrainerConfig):
    """Supervised fine-tuning on the teacher's responses."""

    init: PathText = "{student}"
    store: _Stores = "{run_dir}/sft.opd.zarr"
    output: PathText = "{run_dir}/sft"
    lr: float = Field(default=8e-5, gt=0)
    schedule: LrSchedule = LrSchedule(decay="cosine")


class TrainStage(TrainerConfig):
    """Offline on-policy distillation on scored rollouts."""

    init: PathText = "{run_dir}/sft-hf"
    store: _Stores = "{run_dir}/rollouts.opd.zarr"
    output: PathText = "{run_dir}/opd"
    teacher: str = Field(default="teacher", description="name of the teacher's group in the store")
    loss: LossConfig = LossConfig()
    drift: DriftConfig = DriftConfig()
    max_engine_gap: float = Field(
        default=0.1, gt=0, description="nats a token, on average, that serving and training engine may differ by ('check STORE --model')"
    )
    allow_teacher_mismatch: bool = False


class EvalStage(_Section):
    """Accuracy on verifiable prompts and, with a teacher, reverse KL to it on the model's own samples."""

    models: list[Literal["teacher", "sft", "opd"]] = Field(
        default=["teacher", "sft", "opd"], description="what 'run' evaluates: the teacher, the student after SFT, and after distillation"
    )
    model: PathText = "{run_dir}/opd-hf"
    name: str = Field(default="opd", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the output files and the row in reports")
    prompts: PathText
    output: PathText = "{run_dir}/eval"
    grader: Literal["exact", "number", "math", "reasoning_gym", "none"] = "exact"
    grading_seconds: float = Field(
        default=5.0, ge=0.01, le=3600, description="CPU time to grade a response; one that takes more scores 0 and is counted"
    )
    teacher: PathText | None = Field(default="{teacher}", description="score samples with this model for the reverse KL; 'none' does not")
    baseline: str | None = Field(default=None, description="name of an earlier evaluation in `output` to give the paired difference to")
    num_prompts: int | None = Field(default=None, gt=0, le=MOST)
    sampling: _Sampling = SamplingParams()
    encoding: EncodingConfig = EncodingConfig()
    allow_template_mismatch: bool = Field(default=False, description="prompts written otherwise than those of the SFT answers; recorded")

    @field_validator("teacher")
    @classmethod
    def _none_is_off(cls, teacher: str | None) -> str | None:
        return None if teacher == "none" else teacher

    @model_validator(mode="after")
    def _check_baseline(self) -> EvalStage:
        if self.baseline == self.name:
            raise ValueError(
                f"eval.baseline = {self.baseline!r} is this evaluation's own name (eval.name); an evaluation is compared with another: "
                "give this one another name, or, to make the baseline itself, add eval.baseline=null"
            )
        return self


class Recipe(_Section):
    """Everything that a run is made of. Stages not used by a recipe may be left out where they have no required field."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: PathText = "runs/{name}"
    models: ModelsConfig
    engine: EngineConfig = EngineConfig()
    generate: GenerateStage | None = None
    sft: SftStage = SftStage()
    rollout: RolloutStage | None = None
    score: ScoreStage = ScoreStage()
    train: TrainStage = TrainStage()
    rounds: RoundsConfig = RoundsConfig()
    eval: EvalStage | None = None
    slurm: SlurmConfig = SlurmConfig()
    _written: Recipe | None = PrivateAttr(default=None)  # with {placeholders}, ~ and $VARIABLES; None: as it is here

    @model_validator(mode="after")
    def _check_rounds(self) -> Recipe:
        if (fault := self.rounds.fault(self.train.steps, self.train.drift)) is not None:
            raise ValueError(f"rounds: {fault}")
        return self

    @model_validator(mode="after")
    def _check_addresses(self) -> Recipe:
        for where, text in _texts(self.model_dump(exclude={"engine": True, "slurm": {"environment"}})):
            if holds_secret(text):
                raise ValueError(
                    f"{where}: the address {redact_address(text)!r} holds a password or key, which would end up in files and logs; give it without, "
                    "and the secret in the environment (AWS_SECRET_ACCESS_KEY and the like)"
                )
        return self

    def remember(self, written: Recipe) -> Recipe:
        """This recipe, which from now on is written down as `written`, from which it was filled in."""
        self._written = written
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Recipe:
        """As pydantic's. A changed section is written down as it was given, the others as they were read; with another name, run_dir or models,
        which others were filled in with, all of it as it is filled in."""
        copy = super().model_copy(update=update, deep=deep)
        if update and copy._written is not None:
            copy._written = None if _FILLED_IN & update.keys() else copy._written.model_copy(update=update)
        return copy

    def engine_for(self, model: str) -> EngineConfig:
        """The engine settings for serving the model in this directory: engine.launch.teacher counts for a teacher's, .student for any other."""
        teachers = [self.models.teacher, self.score.model]
        teachers += [self.generate.model] if self.generate else []
        teachers += [self.eval.teacher] if self.eval and self.eval.teacher else []
        return self.engine.serving("teacher" if os.path.realpath(model) in map(os.path.realpath, teachers) else "student")

    def recorded(self, **options: Any) -> dict[str, Any]:
        """The recipe as it may be written down and sent to others: without the values of secrets. `options` are model_dump's."""
        return redact(self.model_dump(**options))

    def to_toml(self) -> str:
        """The checked recipe, every default included, with placeholders as they were written, so that it can be used under another name.

        Options that are off are left out, as TOML has no null, and so are secrets.
        """
        written = self._written or self
        tree = written.recorded(exclude_none=True)
        if written.eval is not None and written.eval.teacher is None:
            tree["eval"]["teacher"] = "none"  # left out, it would be the default again
        return tomli_w.dumps(tree)


def _texts(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree that is not for the model, with its field."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in FREE_TEXT:
                yield from _texts(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _texts(value, f"{where}.{number}")
    elif isinstance(node, str):
        yield where, node


def require(section: Any, name: str) -> Any:
    """The stage's section, or a ConfigError that says that the recipe has none."""
    if section is None:
        raise ConfigError(f"the recipe has no [{name}] section; add it, or give its fields as overrides ({name}.prompts=...)")
    return section
