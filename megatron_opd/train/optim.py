"""The model inside Megatron's data-parallel wrapper, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opd.config import TrainerConfig
from megatron_opd.model.student import Student

# Megatron computes the gradient norm only where it clips; this clips nothing.
_NO_CLIPPING = 1e30


@dataclass(frozen=True)
class Trainee:
    """What one rank trains."""

    student: Student
    ddp: DistributedDataParallel
    optimizer: Any
    scheduler: OptimizerParamScheduler


def make_trainee(student: Student, config: TrainerConfig, *, steps: int) -> Trainee:
    """Wrap the student; the optimizer's main weights are copies of the parameters as they are now."""
    on_gpu = torch.cuda.is_available()
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed_optimizer,
        overlap_grad_reduce=on_gpu,
        overlap_param_gather=on_gpu and config.distributed_optimizer,
    )
    ddp = DistributedDataParallel(student.config, ddp_config, student)
    ddp.broadcast_params()
    bf16 = student.config.bf16
    logging.getLogger("megatron.core.optimizer").setLevel(logging.ERROR)
    optimizer_config = OptimizerConfig(
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
        use_distributed_optimizer=config.distributed_optimizer,
        overlap_param_gather=on_gpu and config.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [ddp])
    student.config.finalize_model_grads_func = finalize_model_grads
    student.config.grad_scale_func = optimizer.scale_loss
    if on_gpu:
        student.config.no_sync_func = ddp.no_sync
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
    return Trainee(student, ddp, optimizer, scheduler)
