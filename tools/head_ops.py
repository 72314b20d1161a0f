"""What the LM-head loss does with a chunk, operation by operation, on tensors that have shapes alone: no GPU, no memory, any size.

`record_head` runs `opd_kernels.linear_loss` forward and backward under PyTorch's FakeTensorMode. The Triton kernels are launched into a
recorder, and the weight's gradient is the mixed-precision product, so that the operations are those of a GPU. `Recorder` is the dispatch
mode beneath it, which any code can be run under.

Legend: N rows (tokens), C rows of a chunk, H hidden size, V columns of this rank's vocabulary shard, K ids a row.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from opd_kernels import ChunkLoss, linear, linear_loss, topk_overlap, triton_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SECTOR_BYTES = 32  # of a GPU's memory: the least that is read or written
# What the host must wait for on a GPU: values, or shapes that depend on values.
_WAITS = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal", "unique_dim", "unique_consecutive", "_unique2", "bincount",
}  # fmt: skip
# Nothing is launched for these.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "_assert_async"}


_READS_NOTHING = {"new_full", "new_zeros", "new_ones", "full_like", "zeros_like", "ones_like", "fill_", "zero_"}


@dataclass(frozen=True)
class Op:
    """One operation that a GPU would be sent: bytes of its inputs and of its outputs, each counted once. rows: of a Triton kernel's logits."""

    name: str
    bytes_read: int
    bytes_written: int
    flops: int = 0
    rows: int = 0


class Recorder(TorchDispatchMode):
    """Operations, host waits, and the tensors that were made, each as (dtype, elements)."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.waits: Counter[str] = Counter()
        self.made: list[tuple[torch.dtype, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what a tensor is asked about itself
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if wait := _host_wait(name, args):
            self.waits[wait] += 1
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.made += [(leaf.dtype, leaf.shape) for leaf in results if _storage(leaf) not in known]
        if name not in _FREE and not func.is_view:
            self.ops.append(_operation(name, func, args, kwargs, results))
        return out

    def largest(self, dtype: torch.dtype) -> int:
        """Elements of the largest tensor of `dtype` that was made, 0 without any."""
        return max((shape.numel() for made, shape in self.made if made == dtype), default=0)


def _host_wait(name: str, args: Any) -> str | None:
    if name in _WAITS:
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        chosen = [leaf for leaf in args[1] if isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)]
        return f"{name} with a mask" if chosen else None
    # torch.tensor(numbers, device=...) is a copy from the host's pageable memory.
    return "torch.tensor" if name == "lift_fresh" else None


def _operation(name: str, func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> Op:
    read, written = {}, {id(leaf): leaf for leaf in results}
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                if argument.is_write:
                    written[id(leaf)] = leaf
                if not argument.is_write or name in ("add_", "mul_", "addmm_", "index_add_"):
                    read[id(leaf)] = leaf
    tensors = [leaf for leaf in args if isinstance(leaf, torch.Tensor)]
    bytes_read = 0 if name in _READS_NOTHING else sum(map(_bytes, read.values()))
    if name == "gather":
        bytes_read = _bytes(tensors[1]) + SECTOR_BYTES * tensors[1].numel()
    elif name == "index_select":
        bytes_read = _bytes(tensors[1]) + _bytes(results[0])
    flops = 2 * tensors[-2].numel() * tensors[-1].shape[1] if name in ("mm", "addmm", "addmm_") else 0
    return Op(name, bytes_read, sum(map(_bytes, written.values())), flops)


def _bytes(tensor: torch.Tensor) -> int:
    """Of what the tensor covers: an expanded one is as large as what lies behind it."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Launch:
    """Stands where a Triton kernel is launched: binds the arguments to the kernel's own signature and records its bytes."""

    def __init__(self, kernel: Any, recorder: Recorder) -> None:
        self.kernel, self.recorder = kernel, recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {"num_warps", *triton_kernels.OPTIONS}
            bound = inspect.signature(self.kernel.fn).bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
            # No dispatch mode sees a Triton kernel.
            self.recorder.ops.append(kernel_operation(self.kernel.fn.__name__, bound.arguments))

        return launch


def kernel_operation(name: str, arguments: dict[str, Any]) -> Op:
    """A launch with these arguments. Logits at single columns, and values of one row in a tensor [K,N], cost a sector each."""
    logits = arguments["z_ptr"] if "z_ptr" in arguments else arguments["out_ptr"]
    rows, item, k = len(logits), logits.element_size(), arguments.get("K", 0)
    ids, per_row, scattered = 8 * k * rows, 4 * rows, SECTOR_BYTES * k * rows
    if name == "stats_kernel":
        moved = rows * arguments["num_real"] * item + ids + scattered, 3 * per_row + scattered
    elif name == "gradient_kernel":
        moved = rows * arguments["V"] * item + 4 * per_row, rows * arguments["V"] * item
    else:  # a part of a sector is written by reading it, changing it and writing it
        moved = ids + 4 * k * rows + 2 * scattered + 4 * per_row, scattered
    return Op(name, *moved, rows=rows)


@contextlib.contextmanager
def as_on_a_gpu(recorder: Recorder) -> Iterator[None]:
    """`linear_loss` takes the Triton kernels and the mixed-precision product, whatever the device; kernels are recorded, not run."""
    kernels = {"_stats": "stats_kernel", "_gradient_of": "gradient_kernel", "_chosen": "chosen_kernel"}
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch.object(triton_kernels, name, _Launch(getattr(triton_kernels, kernel), recorder)))
        stack.enter_context(mock.patch.object(linear, "choose", return_value=triton_kernels))
        stack.enter_context(mock.patch.object(linear, "_mixes", lambda total, dz: total.dtype == torch.float32))
        yield


def record_head(
    tokens: int,
    hidden_size: int,
    vocab: int,
    k: int,
    loss: ChunkLoss,
    *,
    chunk_tokens: int | None = None,
    overlap_rows: int = 0,
    overlap_ids: int = 64,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    on_gpu: bool = True,
) -> Recorder:
    """Forward and backward of the head in bf16 with fp32 `main_grad`, every token a row of the loss, [N,K] ids.

    overlap_rows: rows of each chunk whose top-k overlap of `overlap_ids` candidates is measured. on_gpu False: the CPU's own operations.
    """
    with FakeTensorMode():
        hidden = torch.empty(tokens, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        weight: Any = torch.nn.Parameter(torch.empty(vocab, hidden_size, dtype=torch.bfloat16))
        weight.main_grad, weight.grad_added_to_main_grad = torch.empty(vocab, hidden_size), False
        ids = torch.empty(tokens, k, dtype=torch.int64)
        candidates = torch.empty(overlap_rows, overlap_ids, dtype=torch.int64)

        def observe(logits: torch.Tensor, rows: slice) -> None:
            if overlap_rows:
                part = candidates[: len(logits)]
                topk_overlap(logits[: len(part)], part, vocab_start=vocab_start, vocab_size=vocab_size, tp_group=tp_group)

        recorder = Recorder()
        with recorder, as_on_a_gpu(recorder) if on_gpu else contextlib.nullcontext():
            total, *_ = linear_loss(
                hidden, weight, ids, loss, chunk_tokens=chunk_tokens, vocab_start=vocab_start, vocab_size=vocab_size, tp_group=tp_group, observe=observe
            )  # fmt: skip
            total.backward()
    return recorder
