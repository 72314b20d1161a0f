"""Faults that only a GPU would show, put into the code for as long as a simulation runs: each must be found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def injected(name: str | None) -> Iterator[None]:
    """The fault `name` of FAULTS; None: none."""
    with FAULTS[name]() if name else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _wrong_keyword() -> Iterator[None]:
    """Transformer Engine's Python half calls its compiled half with a keyword that this has not."""
    import transformer_engine_torch as tex  # pyright: ignore[reportMissingImports]

    from megatron_opd.simulate.gpu import replaced

    real = tex.generic_gemm
    with replaced(tex, "generic_gemm", lambda *args, **kwargs: real(*args, **kwargs, no_such_option=1)):
        yield


@contextlib.contextmanager
def _cpu_tensor() -> Iterator[None]:
    """The positions of sequences stay in the host's memory, where a kernel can't read them."""
    from megatron_opd.simulate.gpu import replaced
    from megatron_opd.train import step

    real: Any = step.PackedSeqParams
    with replaced(step, "PackedSeqParams", lambda **kwargs: real(**(kwargs | {"cu_seqlens_q": kwargs["cu_seqlens_q"].cpu()}))):
        yield


@contextlib.contextmanager
def _cpu_labels() -> Iterator[None]:
    """Ids whose log-probabilities are wanted are in the host's memory when the loss kernel starts."""
    from megatron_opd.model.student import Student
    from megatron_opd.simulate.gpu import replaced

    real: Any = Student.linear_loss
    with replaced(Student, "linear_loss", lambda self, hidden, ids, *args, **kwargs: real(self, hidden, ids.cpu(), *args, **kwargs)):
        yield


@contextlib.contextmanager
def _item_in_the_loop() -> Iterator[None]:
    """A look at the loss of each micro-batch."""
    from megatron_opd.simulate.gpu import replaced
    from megatron_opd.train import step

    real: Any = step.pack_sums

    def pack_sums(loss: Any, *args: Any, **kwargs: Any) -> Any:
        loss.item()
        return real(loss, *args, **kwargs)

    with replaced(step, "pack_sums", pack_sums):
        yield


@contextlib.contextmanager
def _tensor_of_a_number() -> Iterator[None]:
    """A number of Python's becomes a tensor on the GPU in each micro-batch: a blocking copy of a few bytes."""
    import torch

    from megatron_opd.simulate.gpu import replaced
    from megatron_opd.train import step

    real: Any = step.pack_sums

    def pack_sums(loss: Any, *args: Any, **kwargs: Any) -> Any:
        return real(loss, *args, **kwargs) * torch.tensor(1.0, device=loss.device)

    with replaced(step, "pack_sums", pack_sums):
        yield


FAULTS = {
    "wrong keyword": _wrong_keyword,
    "CPU tensor for attention": _cpu_tensor,
    "CPU tensor for the loss kernel": _cpu_labels,
    "item in the loop": _item_in_the_loop,
    "tensor of a number": _tensor_of_a_number,
}
