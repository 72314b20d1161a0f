"""The recipe's sections of the two trainings, [sft] and [train]."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from megatron_opd.errors import ConfigError
from megatron_opd.recipe.layout import MOST, Count, Fp8Config, ParallelConfig, source
from megatron_opd.recipe.layout import Section as _Section
from megatron_opd.recipe.objective import DriftConfig, LossConfig
from megatron_opd.recipe.paths import PATH, PathText

# Adam divides the rate by 1 - beta1 at its first step, and the result must be a float32 number.
_LARGEST_RATE = 1e30
_PAPER = source("arXiv 2604.13010")
_OPD = source("arXiv 2604.13010 (OPD)")  # and no value of its SFT
_MEGATRON = source("Megatron-Core")


def _check_stores(store: str | list[str]) -> str | list[str]:
    if isinstance(store, list) and (not store or len(set(store)) < len(store)):
        raise ValueError("one store, or a list of different ones, is expected")
    return store


_Stores = Annotated[str | list[str], PATH, AfterValidator(_check_stores)]


class LrSchedule(_Section):
    """Learning-rate schedule of Megatron's OptimizerParamScheduler, in steps."""

    decay: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="from lr to min_lr, over the steps after the warm-up", json_schema_extra=_PAPER
    )
    warmup_steps: int = Field(default=0, ge=0, le=MOST, description="optimizer steps over which the rate rises from 0 to lr")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of a decay")


class TrainerConfig(_Section):
    """What sft and train share: everything but the loss."""

    init: PathText = Field(description="directory of the model that training starts from")
    store: _Stores = Field(description="a store, or a list of stores that are trained on as one")
    output: PathText = Field(description="folder of checkpoints and metrics")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="'auto': bfloat16 on GPUs, float32 on a CPU")
    lr: float = Field(default=2e-6, gt=0, description="learning rate, the highest of the schedule", json_schema_extra=_PAPER)
    schedule: LrSchedule = LrSchedule()
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam's decay of the first moment", json_schema_extra=_OPD)
    adam_beta2: float = Field(default=0.98, ge=0, lt=1, description="Adam's decay of the second moment", json_schema_extra=_OPD)
    adam_eps: float = Field(default=1e-8, gt=0, description="what Adam adds to the root of the second moment", json_schema_extra=_MEGATRON)
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="share of a weight, times the learning rate, that AdamW takes off a step",
        json_schema_extra=_OPD,
    )
    clip_grad: float = Field(
        default=1.0,
        ge=0,
        description="0: no clipping; the norm is logged all the same",
        json_schema_extra=source("arXiv 2604.13010 (its code)"),
    )
    global_batch: int | None = Field(default=256, gt=0, le=MOST, description="rollouts a step", json_schema_extra=_OPD)
    global_batch_tokens: int | None = Field(
        default=None, gt=0, le=MOST, description="instead: tokens a step, prompts included; rollouts in their order until they are full"
    )
    steps: int | None = Field(default=None, gt=0, le=MOST, description="optimizer steps; by default `epochs` over the store")
    epochs: int = Field(default=1, gt=0, le=MOST, description="times that the store is gone through, where steps is not given")
    micro_batch_tokens: int = Field(default=16384, gt=0, le=MOST, description="token slots of one packed micro-batch")
    packing: bool = Field(default=True, description="several sequences a micro-batch; False: one")
    max_response_tokens: int | None = Field(default=None, gt=0, le=MOST, description="cut responses after this many tokens")
    overlong: Literal["refuse", "cut"] = Field(default="refuse", description="a rollout of more than micro_batch_tokens tokens")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of the order of the rollouts")
    save_every: int = Field(default=50, gt=0, le=MOST, description="steps between checkpoints")
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
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list, description="besides metrics.jsonl")
    wandb_project: str = Field(default="megatron-opd", description="project of Weights & Biases and Trackio, experiment of MLflow")
    log_name: str | None = Field(
        default=None, min_length=1, max_length=128, description="what loggers call the run; by default name and stage"
    )
    log_group: str | None = Field(
        default=None, min_length=1, max_length=128, description="what loggers put together: seeds of one experiment"
    )
    log_tags: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = Field(default=None, description="for loggers")
    eval_every: int | None = Field(
        default=None, gt=0, le=MOST, description="steps between evaluations of the weights under way; off by default"
    )
    evals: list[str] | None = Field(default=None, min_length=1, description="with eval_every: which, names of [eval.NAME]")
    eval_prompts: int | None = Field(default=None, gt=0, le=MOST, description="with eval_every: only the first N prompts of each")
    allow_stop_mismatch: bool = Field(
        default=False, description="responses that end otherwise than the SFT answers did, or go on behind a stop id; recorded"
    )
    allow_incomplete: bool = Field(default=False, description="train on the sealed parts of a store that is not complete")
    distributed_optimizer: bool = Field(default=True, description="spread the optimizer's state over the data-parallel ranks")
    precision_aware_optimizer: bool = Field(
        default=False,
        description="gradients and Adam moments in the dtypes below (GPU, Transformer Engine)",
    )
    main_grads_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="with precision_aware_optimizer", json_schema_extra=_MEGATRON
    )
    moments_dtype: Literal["float32", "bfloat16", "float16", "fp8"] = Field(
        default="float32", description="with precision_aware_optimizer", json_schema_extra=_MEGATRON
    )
    optimizer_offload: float = Field(
        default=0.0, ge=0, le=1, description="share of the optimizer's state that lives and is updated on the CPU"
    )
    recompute: Literal["none", "selective", "full"] = Field(default="none", description="activations that the backward pass makes again")
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]] = Field(
        default=["core_attn"], description="what 'selective' makes again", json_schema_extra=_MEGATRON
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
        default=30, gt=0, le=100_000, description="minutes that a rank may wait for the others in a collective before the run ends"
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

    @model_validator(mode="before")
    @classmethod
    def _one_batch(cls, given: Any) -> Any:
        """Of global_batch and global_batch_tokens the one that is not given is off; of none it is global_batch's default."""
        if not isinstance(given, dict):
            return given
        count, tokens = given.get("global_batch"), given.get("global_batch_tokens")
        if count is not None and tokens is not None:
            raise ValueError(
                f"global_batch = {count!r} and global_batch_tokens = {tokens!r} both say what a step is; take one out (FIELD=null)"
            )
        if count is None and tokens is None and "global_batch" in given:
            raise ValueError("global_batch = null: steps need a size; give global_batch, or global_batch_tokens in its place")
        rest = {key: value for key, value in given.items() if key != "global_batch"}
        return given if count is not None else rest if tokens is None else rest | {"global_batch": None}

    @model_validator(mode="after")
    def _check_evals(self) -> TrainerConfig:
        if self.eval_every is None and (self.evals is not None or self.eval_prompts is not None):
            raise ValueError("evals and eval_prompts say what eval_every evaluates; give eval_every, or leave them out")
        if self.evals is not None and len(set(self.evals)) < len(self.evals):
            raise ValueError(f"evals = {self.evals}: each of them once is expected")
        return self

    def evaluates_after(self, step: int) -> bool:
        return self.eval_every is not None and step % self.eval_every == 0

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
        if fault := self.batch_fault(ranks // (p.tp * p.pp * p.cp)):
            raise ConfigError(f"{name}.{fault}; raise it, or start fewer ranks")

    def batch_fault(self, dp: int) -> str | None:
        """What is wrong unless every step has a rollout for each of `dp` data-parallel ranks."""
        if self.global_batch_tokens is None:
            assert self.global_batch is not None
            return f"global_batch = {self.global_batch} is smaller than {dp} data-parallel ranks" if self.global_batch < dp else None
        if self.global_batch_tokens >= dp * self.micro_batch_tokens:  # no rollout is longer than a micro-batch
            return None
        return f"global_batch_tokens = {self.global_batch_tokens} is less than a micro-batch of {self.micro_batch_tokens} for each of {dp} data-parallel ranks"

    def step_tokens(self, mean: float) -> float:
        """Tokens of a step, prompts included, of rollouts of `mean` tokens."""
        return self.global_batch_tokens or (self.global_batch or 0) * mean

    @property
    def batch(self) -> str:
        """What a step is, in words."""
        return f"{self.global_batch} rollouts" if self.global_batch_tokens is None else f"{self.global_batch_tokens:,} tokens"

    @property
    def longest_response(self) -> int | None:
        """Tokens of a response that are read at most, None for all of them."""
        return self.max_response_tokens

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
    lr: float = Field(default=8e-5, gt=0, json_schema_extra=_PAPER)
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
    allow_teacher_mismatch: bool = Field(
        default=False, description="train on scores of a model that is not the student's SFT teacher; recorded"
    )
    allow_off_policy: bool = Field(
        default=False, description="responses that train.init did not sample, such as the teacher's own answers (scored); recorded"
    )

    @property
    def longest_response(self) -> int | None:
        """Also cut at the loss's horizon: tokens behind it change nothing, as attention is causal."""
        limits = [self.max_response_tokens, self.loss.horizon.longest if self.loss.horizon else None]
        return min((limit for limit in limits if limit is not None), default=None)
