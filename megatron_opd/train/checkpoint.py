"""Checkpoints: Megatron's distributed format with the data position inside; they appear whole and load into any layout.

A save has two halves. `CheckpointWriter.save` copies the tensors and lets a forked process of each rank write them, under a name
that no other save uses; training goes on. When all ranks' writers are done the checkpoint is published: on disk with all its files, then
renamed to step_NNNNNN, then `latest` is replaced. A process killed anywhere, or a power cut, leaves `latest` naming a whole checkpoint;
what was not published is removed by the next save. docs/training.md has the layout.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.checkpoints.checksums import check_files, collect_sums, id_of, record_checksums, said_of
from megatron_opd.checkpoints.saved import LATEST, STATE_FILE, STEP_PREFIX, checkpoint_folder, last_saved, step_name, step_of
from megatron_opd.convert.hf_files import copy_side_files
from megatron_opd.convert.pickles import check_common, check_extra_state, read_metadata
from megatron_opd.convert.to_hf import HF_FOLDER
from megatron_opd.errors import CheckpointError, DamagedCheckpoint, UserError
from megatron_opd.hf.lineage import write_lineage
from megatron_opd.records import Lineage
from megatron_opd.safety.durable import publish_folder, sync, write_file, write_json
from megatron_opd.train.optim import Trainee, optimizer_parts
from megatron_opd.train.optimizer_state import attach
from megatron_opd.train.writers import Results, how_it_ended, write_and_sum

# Names that start so are no checkpoints: being written, or being removed.
_HIDDEN = "."
_POLL_SECONDS = 0.05
_TORCH_WRITES = ("basic_ios", "iostream", "PytorchStreamWriter")  # in what torch says when a file can't be written
_ROWS = ("metrics.jsonl", "history.jsonl", "recipe.toml")  # in the run's folder


@dataclass
class CheckpointWriter:
    """Saves checkpoints of one run; every method is called on every rank. One save is under way at a time."""

    output: Path
    init: str  # the Hugging Face directory whose configuration and tokenizer travel with the weights
    lineage: Lineage
    keep_last: int = 2
    keep_every: int | None = None  # steps; multiples of it are never removed
    asynchronous: bool = True
    damaged: set[int] = field(default_factory=set)  # steps of checkpoints that were passed over: none of the last ones
    _calls: AsyncCallsQueue = field(default_factory=AsyncCallsQueue)
    _results: Results = field(default_factory=Results)
    _saving: int | None = None
    _writer: Any = None  # this rank's process; a rank with nothing to write has none

    def __post_init__(self) -> None:
        self._results.install()

    def save(self, trainee: Trainee, state: dict[str, Any]) -> Path:
        """Start to save; `state` has 'step'. Returns where the checkpoint will be. Raises CheckpointError if an earlier save failed."""
        self.finish()
        trainee.gather_weights()
        step = int(state["step"])
        self._saving = step
        staging = self._make_staging(step)
        metadata = _content_metadata(trainee)
        self._write(_sharded_state(trainee, metadata, is_loading=False), metadata, staging, partial(self._publish, staging, state))
        if not self.asynchronous:
            self.finish()
        return checkpoint_folder(self.output) / step_name(step)

    def write_weights(self, trainee: Trainee, step: int) -> Path:
        """The weights alone, as a checkpoint holds them, on disk when this returns; who asked removes the folder, or the next save does.

        Raises CheckpointError.
        """
        self.finish()
        trainee.gather_weights()
        self._saving = step
        staging = self._make_staging(step)
        metadata = _content_metadata(trainee)
        self._write({"model": _model_state(trainee, metadata)}, metadata, staging)
        self.finish()
        return staging

    def _write(
        self, sharded_state: dict[str, Any], metadata: dict[str, Any], staging: Path, then: Callable[[], None] | None = None
    ) -> None:
        """Start to write; `then` is done once the files of all ranks are there."""
        try:
            request: Any = dist_checkpointing.save(
                sharded_state,
                str(staging),
                async_sharded_save=True,
                content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
                **_ASYNC_STRATEGY,
            )
        except (OSError, RuntimeError) as error:  # of the first rank, which writes what is no tensor at once
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_WRITES):
                raise
            failure = self._failed(str(error))
            failure.rank = dist.get_rank()
            raise failure from None
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(write_and_sum, request.async_fn, staging, self._results))
        if then is not None:
            request.add_finalize_fn(then)
        self._calls.schedule_async_request(request)
        self._writer = getattr(self._calls.async_calls[-1].async_caller, "process", None)

    def poll(self) -> None:
        """Publish a save whose writers are done; returns at once."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for a save that is under way and publish it."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._saving is None:
            return
        while self._is_writing():
            if not blocking:
                return
            time.sleep(_POLL_SECONDS)
        try:
            self._calls.maybe_finalize_async_calls(blocking=True, no_dist=True)
        except (CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
            # Which rank failed, and why; torch's own text is a traceback, and may not say that a disk is full.
            failures = getattr(error, "failures", None)
            raise self._failed(
                "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in failures.items()) if failures else str(error)
            ) from None
        self._saving = self._writer = None

    def _is_writing(self) -> bool:
        """Whether a rank's writer is still at work. Raises CheckpointError on every rank if one has ended before it was done."""
        alive = self._writer is not None and self._writer.is_alive()
        fault = None if alive or self._writer is None else how_it_ended(self._writer, self._results)
        flags = torch.tensor([float(alive), float(fault is not None)])  # hosts speak to hosts: a GPU is at work
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        writing, failed = flags.tolist()
        if failed:
            faults: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(faults, fault)
            raise self._failed("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(faults) if text is not None))
        return bool(writing)

    def _failed(self, reason: str) -> CheckpointError:
        free = shutil.disk_usage(self.output).free / 2**20
        return CheckpointError(
            f"the checkpoint of step {self._saving} could not be written: {reason} ({free:.1f} MiB are free there); {last_saved(self.output)}; "
            "fix this and run the same command again"
        )

    def _make_staging(self, step: int) -> Path:
        """A new folder for one save; what earlier processes left behind is removed."""
        folder = checkpoint_folder(self.output)
        # A writer of a killed run may still be at work: it must never write into this save.
        made: list[Any] = [f"{_HIDDEN}{step_name(step)}.{uuid.uuid4().hex[:8]}.tmp", None]
        if dist.get_rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(f"{_HIDDEN}{STEP_PREFIX}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                for leftover in folder.glob(f"{_HIDDEN}{LATEST}.*"):
                    leftover.unlink(missing_ok=True)
                (folder / made[0]).mkdir()
            except OSError as error:
                made[1] = str(error)
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise self._failed(made[1])
        return folder / made[0]

    def _publish(self, staging: Path, state: dict[str, Any]) -> None:
        """Rank 0 publishes; its error is everybody's."""
        error: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._publish_alone(staging, state)
            except (OSError, CheckpointError) as failure:
                error[0] = str(failure)
        dist.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise dist_checkpointing.core.CheckpointingException(error[0])

    def _publish_alone(self, staging: Path, state: dict[str, Any]) -> None:
        folder, step = staging.parent, int(state["step"])
        data = collect_sums(staging)
        copy_side_files(self.init, staging / HF_FOLDER)
        write_lineage(staging, self.lineage, for_weights=False)
        write_json(staging / STATE_FILE, state | {"content": id_of(data)})
        record_checksums(staging, data)
        for name in _ROWS:  # what these steps have logged is not to be behind what is saved of them
            if (self.output / name).exists():
                sync(self.output / name)
        target = folder / step_name(step)
        replaced = _set_aside(target)  # of a run that was set back, or a damaged one
        publish_folder(staging, target)  # costs little: files of tensors are on disk already, each writer has seen to its own
        for parent in (self.output, *list(self.output.absolute().parents)[:2]):  # the run's folders may be as new
            with contextlib.suppress(OSError):  # those above it may be somebody else's
                sync(parent)
        write_file(folder / LATEST, step_name(step) + "\n")
        shutil.rmtree(replaced, ignore_errors=True)
        self.damaged.discard(step)
        steps = [found for path in folder.glob(f"{STEP_PREFIX}*") if (found := step_of(path.name)) is not None]
        whole = [found for found in steps if found not in self.damaged]
        for old in [*outdated(whole, step, self.keep_last, self.keep_every), *(found for found in self.damaged if found < step)]:
            shutil.rmtree(_set_aside(folder / step_name(old)), ignore_errors=True)


def outdated(steps: list[int], saved: int, keep_last: int, keep_every: int | None) -> list[int]:
    """Which of the checkpoints at `steps` to remove after `saved` was written.

    Later ones (a run that was set back to an earlier checkpoint has them) are left alone.
    """
    earlier = sorted(step for step in steps if step <= saved)[:-keep_last]
    return [step for step in earlier if keep_every is None or step % keep_every]


def _set_aside(checkpoint: Path) -> Path:
    """Give a checkpoint, if it is there, a name to be removed under: it stops being one at once, not file by file."""
    gone = checkpoint.with_name(f"{_HIDDEN}{checkpoint.name}.{uuid.uuid4().hex[:8]}.old")
    if checkpoint.exists():
        checkpoint.rename(gone)
    return gone


# Megatron-Core 0.19 would ask for NVIDIA's resiliency extension otherwise; 0.16 has its own way alone, and no such argument.
_ASYNC_STRATEGY: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}


def load_checkpoint(checkpoint: Path, trainee: Trainee) -> None:
    """Fill model and optimizer, whatever layout the checkpoint, whose files were checked, was saved with. Raises CheckpointError.

    Settings of the optimizer (rates, betas, ...) stay those of `trainee`, not those of the run that saved it.
    """
    settings = [{key: value for key, value in group.items() if key not in ("params", "step")} for group in trainee.optimizer.param_groups]
    _prime_optimizer(trainee.optimizer)
    _allow_optimizer_classes(trainee.optimizer)
    try:
        metadata = dist_checkpointing.load_content_metadata(str(checkpoint)) or {}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = _sharded_state(trainee, metadata, is_loading=True)
        loaded, _, absent = cast(Any, dist_checkpointing.load)(state, str(checkpoint), strict=StrictHandling.RETURN_ALL)
        _check_absent(absent)
    except (
        OSError, EOFError, AttributeError, KeyError, RuntimeError, pickle.UnpicklingError, CheckpointException, dist_checkpointing.core.CheckpointingException,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{checkpoint} can't be loaded: {_reason(error)}; write the name of another step folder into {LATEST}"
        ) from error
    for number, student in enumerate(trainee.students):
        for key, value in loaded["model"][str(number)].items():
            if "_extra_state" in key:
                _check_extra_state(key, value)
        _check_absent(student.load_state_dict(loaded["model"][str(number)], strict=False).missing_keys)
    with torch.no_grad():
        trainee.optimizer.load_state_dict(loaded["optimizer"])
    for group, own in zip(trainee.optimizer.param_groups, settings, strict=True):
        group.update(own)
    _unshare_steps(trainee.optimizer)
    _move_steps_inside(trainee.optimizer)
    trainee.remake_weights()


def _check_extra_state(key: str, value: Any) -> None:
    """As `check_extra_state`; the error is of the rank that holds it."""
    try:
        check_extra_state(key, value)
    except DamagedCheckpoint as error:
        error.rank = dist.get_rank()
        raise


def find_fault(checkpoint: Path) -> str | None:
    """What is damaged of a checkpoint; every rank reads a share of its files, and has the first rank's answer that there is."""
    rank, world = dist.get_rank(), dist.get_world_size()
    fault = unchecked = None
    try:
        unchecked = said_of(checkpoint, check_files(checkpoint, share=rank, shares=world))
        if rank == 0:
            read_metadata(checkpoint)
            check_common(checkpoint)
    except UserError as error:
        fault = str(error)
    answers: list[Any] = [None] * world
    dist.all_gather_object(answers, fault)
    if rank == 0 and unchecked:
        print(unchecked, flush=True)
    return next((answer for answer in answers if answer is not None), None)


def _reason(error: BaseException) -> str:
    """In one line; the text of torch's collected failures is a traceback of each rank."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return str(cause) or type(cause).__name__


def _check_absent(keys: Iterable[str]) -> None:
    """Raise RuntimeError for what a checkpoint lacks, but for Transformer Engine's extra state: one of other layers has none."""
    if lacking := sorted(key for key in keys if "_extra_state" not in key):
        raise RuntimeError(f"{len(lacking)} of the tensors wanted are not in it (first: {lacking[0]})")


def _content_metadata(trainee: Trainee) -> dict[str, Any]:
    """How the state dict is laid out; 'fully_reshardable' is the optimizer format that any other layout can load."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if trainee.chunks[0].ddp_config.use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"  # written and read by optimizer_state.py
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return metadata


def _sharded_state(trainee: Trainee, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    for part in optimizer_parts(trainee.optimizer):
        attach(part)
    model_state = {str(number): student.sharded_state_dict(metadata=metadata) for number, student in enumerate(trainee.students)}
    optimizer_state = trainee.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    force_all_tensors_to_non_fp8(model_state)  # in a checkpoint, FP8 parameters are the bfloat16 numbers that they stand for
    return {"model": model_state, "optimizer": optimizer_state}


def _model_state(trainee: Trainee, metadata: dict[str, Any]) -> dict[str, Any]:
    state = {str(number): student.sharded_state_dict(metadata=metadata) for number, student in enumerate(trainee.students)}
    force_all_tensors_to_non_fp8(state)
    return state


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers inside of Megatron's."""
    return [part.optimizer for part in optimizer_parts(optimizer)]


def _allow_optimizer_classes(optimizer: Any) -> None:
    """An offloading optimizer has its inner ones' classes among its settings, which Megatron-Core 0.16 won't read without this."""
    groups = [group for inner in torch_optimizers(optimizer) for group in inner.param_groups]
    classes: Any = [value for group in groups for value in group.values() if isinstance(value, type)]
    torch.serialization.add_safe_globals(classes)


def _move_steps_inside(optimizer: Any) -> None:
    """An offloading optimizer would set its GPU part's count of steps to the loaded one before every step; set it once."""
    for inner in torch_optimizers(optimizer):
        on_gpu = getattr(inner, "gpu_optimizer", None)
        steps = [group.pop("step") for group in inner.param_groups if "step" in group] if hasattr(inner, "sub_optimizers") else []
        if on_gpu is not None and steps:
            for group in on_gpu.param_groups:
                group["step"] = max(steps)


def _prime_optimizer(optimizer: Any) -> None:
    """Make the Adam states that a load fills: Megatron asks a loading optimizer for tensors that torch makes at its first step."""
    for inner in torch_optimizers(optimizer):
        if not isinstance(inner, torch.optim.Adam):  # apex and Transformer Engine make them by Megatron's own call
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _unshare_steps(optimizer: Any) -> None:
    """After a load all states share one 'step' tensor, which every parameter's update would count up; give each its own."""
    for inner in torch_optimizers(optimizer):
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
