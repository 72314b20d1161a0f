"""Answers to what shapes alone can't say: Triton launches, lengths of sequences, tokens of each expert.

Each changes one function for as long as the simulation runs, and keeps the rest of the code real.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_opd.model.architecture import Architecture
from megatron_opd.recipe.training_stages import TrainerConfig
from megatron_opd.simulate.arithmetic import SEQUENCES
from megatron_opd.simulate.gpu import replaced
from megatron_opd.simulate.ledger import Ledger

# Options of a launch that are no arguments of the kernel.
_LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg", "launch_pdl", "launch_cooperative_grid"}


@contextlib.contextmanager
def stand_ins(ledger: Ledger, arch: Architecture, config: TrainerConfig, lengths: Sequence[int]) -> Iterator[list[str]]:
    """All of them, for micro-batches of sequences of these lengths. Yields what was stood in for, in words."""
    names = [
        "Triton kernels are not launched: arguments are bound to the kernel's own, tensors must be on the GPU, results are not computed",
        "what the host reads off the GPU is 0: losses, norms, flags",
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_triton_launches())
        stack.enter_context(replaced(torch.nn.functional, "rms_norm", _rms_norm))
        stack.enter_context(_packed_groups(lengths))
        SEQUENCES[:] = lengths
        stack.callback(SEQUENCES.clear)
        if arch.num_experts:
            stack.enter_context(_balanced_experts(ledger, arch, config, lengths))
            names.append("every expert is sent as many tokens as any other")
        yield names


@contextlib.contextmanager
def _triton_launches() -> Iterator[None]:
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        given = {name: value for name, value in kwargs.items() if name in parameters or name not in _LAUNCH_OPTIONS}
        bound = inspect.signature(self.fn).bind(*args, **given)
        for name, value in bound.arguments.items():
            if isinstance(value, torch.Tensor) and not value.is_cuda:
                raise RuntimeError(f"kernel {self.fn.__name__}: {name} is on {value.device}, and a kernel reads the GPU's memory alone")

    def tuned(self: Any, *args: Any, **kwargs: Any) -> None:
        self.fn.run(*args, **(self.configs[0].all_kwargs() | kwargs))

    with replaced(JITFunction, "run", launch), replaced(Autotuner, "run", tuned):
        yield


class _FusedRMSNorm(torch.autograd.Function):
    """One kernel each way, as PyTorch has on a GPU (`_fused_rms_norm`): it keeps the input, and 1 / rms of each row.

    A PyTorch without CUDA has none for tensors on "cuda", and would make it of operations that keep float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    return _FusedRMSNorm.apply(input, weight)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _packed_groups(lengths: Sequence[int]) -> Iterator[None]:
    """The local layers' attention by PyTorch's SDPA groups sequences by their lengths; PyTorch's varlen attention needs no such thing."""
    from megatron_opd.model import layers

    def groups(packed: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        device, kinds = packed.cu_seqlens_q.device, {}
        for length in lengths:
            kinds.setdefault((length - 1).bit_length(), []).append(length)
        shapes = [(len(members), max(members)) for members in kinds.values()]
        return [
            (torch.zeros(shape, dtype=torch.int64, device=device), torch.ones(shape, dtype=torch.bool, device=device)) for shape in shapes
        ]

    with replaced(layers, "_length_groups", groups):
        yield


@contextlib.contextmanager
def _balanced_experts(ledger: Ledger, arch: Architecture, config: TrainerConfig, lengths: Sequence[int]) -> Iterator[None]:
    """Megatron-Core's dispatcher reads off the GPU how many tokens every expert is sent."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    parallel = config.parallel
    sent = sum(lengths) // parallel.cp // parallel.tp * arch.experts_per_token
    name = "maybe_move_tensor_to_cpu"

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # No wait: a copy to the host that is asked not to block goes to pinned memory, and the dispatcher waits once, for the event after it.
        if not isinstance(tensor, torch.Tensor) or tensor.device.type == "cpu":
            return tensor
        counts = np.full(tensor.numel(), sent // tensor.numel(), dtype=np.int64)
        counts[: sent - counts.sum()] += 1
        return counts.reshape(tuple(tensor.shape))  # NumPy's where Megatron-Core has a CPU tensor, too: a fake one forgets its numbers

    def selected(tensor: torch.Tensor, mask: torch.Tensor) -> int:
        return mask.numel() // arch.num_experts * arch.experts_per_token

    with (
        replaced(moe_utils, name, move),
        replaced(token_dispatcher, name, move),
        replaced(ledger, "selected", selected),
    ):
        yield
