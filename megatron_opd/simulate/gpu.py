"""A GPU that only has shapes: CUDA code paths of PyTorch programs in one process, as any rank of any world, with no CUDA there.

    from megatron_opd.simulate.gpu import world     # before torch
    with world(rank=0, size=8) as ledger:
        ...                                         # torch.cuda.is_available() is True; tensors on "cuda" only have shapes

Made of a compiled guard for autograd's engine (guard.cpp), the functions of `torch.cuda` (cuda.py), PyTorch's "fake" process groups and
fake tensors, and a Ledger on top. Importing this module compiles and loads the guard and changes `torch.cuda` of the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

from megatron_opd.cost.gpus import GPUS, Gpu
from megatron_opd.simulate.needs import build_guard, check_before_torch

check_before_torch()
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron-Core's jit_fuser: eager under fake tensors
os.environ.pop("TRITON_INTERPRET", None)  # launches are stood in for
_GUARD = ctypes.CDLL(str(build_guard()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._tools.fake_collectives  # noqa: E402  fake kernels of c10d's operations
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed import fake_pg  # noqa: E402

from megatron_opd.simulate import cuda, ledger  # noqa: E402
from megatron_opd.simulate.devices import GPUS_PER_NODE, device_of  # noqa: E402
from megatron_opd.simulate.ledger import Ledger  # noqa: E402

__all__ = ["Ledger", "world"]


class _Mode(FakeTensorMode):
    avoid_device_init: Any = True  # or torch.tensor(..., device="cuda") would start CUDA, as there seems to be one


@contextlib.contextmanager
def world(*, rank: int, size: int, gpu: Gpu | None = None, limit: int | None = None) -> Iterator[Ledger]:
    """As rank `rank` of `size`, on a simulated `gpu` (an H100 by default); collectives do nothing. Yields the rank's ledger.

    limit: bytes of the GPU for tensors; the place where they are passed first is kept in `Ledger.overrun`.
    Raises UserError for a GPU whose capability is not known, RuntimeError inside of another world.
    """
    if ledger.active is not None:
        raise RuntimeError("a simulated world is open already in this process")
    cuda.install(device_of(gpu or GPUS["h100"]))
    local = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % GPUS_PER_NODE)}
    before = {name: os.environ.get(name) for name in local}
    os.environ.update(local)
    dist.init_process_group("fake", rank=rank, world_size=size, store=fake_pg.FakeStore())
    counted = Ledger(limit=limit)
    ledger.active = counted
    try:
        with _objects(), _storages(counted), _Mode(allow_non_fake_inputs=True), counted:
            _GUARD.simulated_gpu_register()
            yield counted
    finally:
        ledger.active = None
        _leave()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _storages(counted: Ledger) -> Iterator[None]:
    """Storages that change their size say so: no operation of PyTorch shows it. What recomputation copies between them has no numbers."""
    resize, copy = torch.UntypedStorage.resize_, torch.UntypedStorage.copy_

    def resize_and_count(self: Any, size: Any) -> Any:
        result = resize(self, size)
        counted.resized(self)
        return result

    def copy_if_real(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        # FakeTensorMode would remember the call with its arguments, so that the storages stayed for good.
        return self if self.device.type == "meta" else copy(self, source, *args, **kwargs)

    with replaced(torch.UntypedStorage, "resize_", resize_and_count), replaced(torch.UntypedStorage, "copy_", copy_if_real):
        yield


def _leave() -> None:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _objects() -> Iterator[None]:
    """Groups of any backend are fake ones, and of Python objects every other rank says what this one says."""
    real_new_group = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return real_new_group(*args, **(kwargs | {"backend": "fake", "pg_options": None}))

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list[Any] | None = None, *args: Any, **kwargs: Any) -> None:
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    replacements = {
        "new_group": new_group,
        "all_gather_object": all_gather_object,
        "gather_object": gather_object,
        "broadcast_object_list": lambda *args, **kwargs: None,
    }
    with contextlib.ExitStack() as stack:
        for name, function in replacements.items():
            for module in (dist, dist.distributed_c10d):
                stack.enter_context(replaced(module, name, function))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` in here. Raises AttributeError if there was none."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _move(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Module.to(device). PyTorch's own swaps fake tensors in place, which weak references (the ledger's, Megatron-Core's) forbid."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    if dtype is not None or device is None:
        raise NotImplementedError("a simulated module is moved to a device alone")
    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device != device:
                    tensors[name] = _moved(tensor, device)
    return self


def _moved(tensor: torch.Tensor, device: torch.device) -> Any:
    there: Any = tensor.detach().to(device)
    if isinstance(tensor, torch.nn.Parameter):
        there = torch.nn.Parameter(there, requires_grad=tensor.requires_grad)
    there.__dict__.update({key: value for key, value in tensor.__dict__.items() if key not in there.__dict__})
    return there


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a fake tensor is unpickled to."""
    return torch.zeros(shape, dtype=dtype)


def _patch_tensors() -> None:
    """What fake tensors lack."""
    module: Any = torch.nn.Module
    module.to = _move
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None

    fake: Any = FakeTensor
    dispatch = fake.__torch_dispatch__.__func__

    def dispatch_of_inner(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Transformer Engine's FP8 tensors ask the class of their inner tensors directly, which declines as it sees another class.
        result = dispatch(cls, func, types, args, kwargs)
        if result is NotImplemented and all(type(value) is FakeTensor for value in args if isinstance(value, torch.Tensor)):
            return func(*args, **(kwargs or {}))
        return result

    fake.__torch_dispatch__ = classmethod(dispatch_of_inner)
    fake.tolist = ledger.numbers_of
    # Transformer Engine pickles the state of delayed scaling into a checkpoint.
    fake.__reduce_ex__ = lambda self, protocol: (_zeros, (tuple(self.shape), self.dtype))


cuda.use_guard(_GUARD)
cuda.install(device_of(GPUS["h100"]))  # megatron_opd.model asks for CUDA when it is imported
_patch_tensors()
