"""The model inside Megatron's data-parallel wrapper, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opd.errors import UserError
from megatron_opd.model.student import Student, uses_transformer_engine
from megatron_opd.recipe.training_stages import TrainerConfig

# This clips nothing; a limit of 0 would scale all gradients to 0.
_NO_CLIPPING = 1e30


@dataclass(frozen=True)
class Trainee:
    """What one rank trains: its pipeline stages (one, but for an interleaved pipeline) in Megatron's data-parallel wrapper."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler

    @property
    def students(self) -> list[Student]:
        return [cast(Student, chunk.module) for chunk in self.chunks]

    def gather_weights(self) -> None:
        """Make this rank's weights whole. After a step it has its own shard of the new ones: the next forward pass gathers the others."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def release(self) -> None:
        """After training: undo the cycles through which hooks of the parameters, which Python can't see, hold everything for ever.

        That is models, optimizer, and process groups, whose threads (gloo's) wake up all the time.
        """
        for chunk in self.chunks:
            functions: Any = chunk.config
            functions.finalize_model_grads_func = functions.grad_scale_func = functions.no_sync_func = None
            chunk.grad_accs.clear()

    def remake_weights(self) -> None:
        """Make the weights from the optimizer's main weights, as a step does (FP8 ones that went through a checkpoint were rounded twice)."""
        if not self.chunks[0].ddp_config.use_distributed_optimizer:
            return
        with torch.no_grad():
            for part in optimizer_parts(self.optimizer):
                if part.config.reuse_grad_buf_for_mxfp8_param_ag:
                    part._copy_main_params_to_param_buffer()
                else:
                    part._copy_main_params_to_model_params()
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers: one, or with experts one for them and one for the rest."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def make_trainee(students: Sequence[Student], config: TrainerConfig, *, steps: int, bucket_size: int | None = None) -> Trainee:
    """Wrap the students; the optimizer's main weights are copies of the parameters as they are now.

    bucket_size: parameters whose gradients are reduced together, by default Megatron's (40 million or more).
    """
    model_config = students[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.main_grads_dtype == "float32",
        use_distributed_optimizer=config.distributed_optimizer,
        overlap_grad_reduce=True,
        bucket_size=bucket_size,
        fp8_param_gather=_fp8_parameters(config),
        **gather_options(config),
    )
    # Buckets overlap communication with the backward pass; only the chunk whose backward pass comes last gains by it.
    chunks = [
        DistributedDataParallel(model_config, ddp_config, student, disable_bucketing=number > 0) for number, student in enumerate(students)
    ]
    if not _fp8_parameters(config):  # torch.distributed does not know these; every rank has read the same files
        for chunk in chunks:
            chunk.broadcast_params()
    logging.getLogger("megatron.core.optimizer").setLevel(logging.ERROR)
    optimizer = get_megatron_optimizer(optimizer_config(config, bf16=model_config.bf16), [*chunks])
    model_config.finalize_model_grads_func = finalize_gradients
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.batch_p2p_sync = (
        False  # the host waits for the device at each exchange of a pipeline: for a fault of old versions of PyTorch
    )
    no_sync: Any = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    model_config.no_sync_func = no_sync
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.schedule.min_lr,
        lr_warmup_steps=config.schedule.warmup_steps,
        lr_decay_steps=max(steps, config.schedule.warmup_steps + 1),
        lr_decay_style=config.schedule.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    # The offloading optimizer is made twice, the first time with copies of all parameters, and hooks hold that one in a cycle.
    gc.collect()
    return Trainee(chunks, optimizer, scheduler)


def finalize_gradients(chunks: list[Any], denominator: torch.Tensor | None = None, **options: Any) -> None:
    """Reduce the gradients over ranks and divide them by the global denominator, given as int32 [] of this rank on the last stage.

    Megatron's, but that 0.16.1 asks the device for each chunk whether the denominator is 0 (none is then divided).
    """
    finalize_model_grads(chunks, None, **options)
    if denominator is None:
        return
    pipeline: Any = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(denominator, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)
    dist.all_reduce(denominator, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.scale_gradients(1.0 / denominator.clamp(min=1))


def optimizer_config(config: TrainerConfig, *, bf16: bool) -> OptimizerConfig:
    """Adam, its precision, and where its state lives. Raises UserError if that needs Transformer Engine and it is not here."""
    precision: dict[str, Any] = {}
    if config.precision_aware_optimizer:
        if not uses_transformer_engine():
            raise UserError(
                "precision_aware_optimizer (and optimizer_offload with it) needs a GPU with Transformer Engine: it has the Adam for it"
            )
        moments = getattr(torch, {"fp8": "uint8"}.get(config.moments_dtype, config.moments_dtype))  # Megatron-Core names FP8 by its storage
        precision = {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": getattr(torch, config.main_grads_dtype),
            "exp_avg_dtype": moments,
            "exp_avg_sq_dtype": moments,
            # Otherwise main weights are the 16 bits that bfloat16 lacks, and Megatron-Core saves those as if they were the weights.
            "store_param_remainders": False,
        }
    if config.optimizer_offload:
        precision |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": config.optimizer_offload,
            # Its GPU part would not wait for gradients that are made float32 on the way.
            "overlap_cpu_optimizer_d2h_h2d": config.optimizer_offload == 1.0 or config.main_grads_dtype == "float32",
        }
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad or _NO_CLIPPING,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        fp8_recipe=config.fp8.recipe if config.fp8 else None,
        use_distributed_optimizer=config.distributed_optimizer,
        **gather_options(config),
        **precision,
    )


def _fp8_parameters(config: TrainerConfig) -> bool:
    return config.fp8 is not None and config.fp8.parameters


def gather_options(config: TrainerConfig) -> dict[str, Any]:
    """How weights come together after a step, for the data-parallel wrapper and the optimizer alike.

    FP8 ones at once: what Megatron-Core does to them after a gather (transposes, MXFP8's copy out of the gradients' memory) it leaves
    to the caller where the gather is overlapped.
    """
    fp8 = _fp8_parameters(config)
    return {
        "overlap_param_gather": config.distributed_optimizer and not fp8,
        "reuse_grad_buf_for_mxfp8_param_ag": fp8 and config.fp8 is not None and config.fp8.recipe == "mxfp8",
    }
