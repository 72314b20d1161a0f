"""`linear_loss` against float64 autograd through the whole head: whole and in chunks, alone and split over gloo ranks.

Like test_vocab_parallel_stats.py: PyTorch on a CPU, Triton on a GPU; the interpreter is used over the ranks alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import head_case, head_definition, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import linear_loss
from ranks import KERNEL_WORKER, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 30),
    chosen=st.integers(0, 30),
    vocab=st.sampled_from([31, 64, 401]),
    chunk=st.sampled_from([None, 1, 4, 7, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 2.5]),
)
def test_agrees_with_the_definition(
    seed: int, tokens: int, chosen: int, vocab: int, chunk: int | None, dtype: torch.dtype, scale: float
) -> None:
    hidden, weight, rows, ids, loss = head_case(seed, tokens, min(chosen, tokens), vocab, vocab_size=vocab - 3)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    exact = head_definition(hidden.double(), weight.double(), rows, ids, loss, vocab_size=vocab - 3, scale=scale)
    eager = head_definition(hidden, weight, rows, ids, loss, vocab_size=vocab - 3, scale=scale)
    leaves = hidden.to(DEVICE).clone().requires_grad_(), weight.to(DEVICE).clone().requires_grad_()

    def on_device(logp: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
        return loss(logp.cpu(), entropy.cpu(), part)

    total, logp, entropy = linear_loss(*leaves, ids.to(DEVICE), on_device, rows=rows.to(DEVICE), chunk_tokens=chunk, vocab_size=vocab - 3)
    assert not logp.requires_grad
    assert not entropy.requires_grad
    (total * scale).backward()
    found = [total.detach(), logp, entropy, leaves[0].grad, leaves[1].grad]
    for name, value, right, own in zip(("loss", "logp", "entropy", "dX", "dW"), found, exact, eager, strict=True):
        assert value is not None
        allowed = tolerance(own, right, dtype, logits_scale=10.0)
        torch.testing.assert_close(value.double().cpu(), right, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}")


def head(device: str = DEVICE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight, rows, ids, _ = head_case(1, 24, 20, 60)
    return hidden.to(device).requires_grad_(), torch.nn.Parameter(weight.to(device)), rows.to(device), ids.to(device)


def nll(logp: torch.Tensor, *_: Any) -> torch.Tensor:
    return -logp[:, 0].sum()


def test_all_tokens_without_rows_and_the_argument_is_left_alone() -> None:
    hidden, weight, _, ids = head()
    ids, before = ids[:1].expand(24, -1), hidden.detach().clone()
    every = torch.arange(24, device=DEVICE)
    results = []
    for rows in (None, every):
        total, *_ = linear_loss(hidden, weight, ids, nll, rows=rows, chunk_tokens=5)
        assert total._base is None  # Megatron's pipeline frees no view
        results.append(torch.autograd.grad(total, (hidden, weight)))
    assert torch.equal(hidden.detach(), before)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def with_main_grad(weight: torch.Tensor) -> Any:
    """The weight as Megatron's data-parallel wrapper leaves it."""
    wrapped: Any = weight
    wrapped.main_grad, wrapped.grad_added_to_main_grad = torch.full(weight.shape, 0.5, device=weight.device), False
    return wrapped


def test_the_weights_gradient_is_added_to_main_grad() -> None:
    hidden, weight, rows, ids = head()
    linear_loss(hidden, weight, ids, nll, rows=rows, chunk_tokens=6)[0].backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    expected, dx = weight.grad + 0.5, hidden.grad.clone()
    hidden.grad = weight.grad = None
    wrapped = with_main_grad(weight)
    linear_loss(hidden, wrapped, ids, nll, rows=rows, chunk_tokens=6)[0].backward()
    torch.testing.assert_close(wrapped.main_grad, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.grad, dx, rtol=0, atol=0)
    assert wrapped.grad_added_to_main_grad
    assert not wrapped.grad.any()


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion would end the process")
def test_a_loss_that_is_scaled_after_main_grad_was_written_is_refused() -> None:
    hidden, weight, rows, ids = head()
    total, *_ = linear_loss(hidden, with_main_grad(weight), ids, nll, rows=rows)
    with pytest.raises(RuntimeError, match="must not be scaled"):
        (2 * total).backward()


def test_without_gradients_nothing_is_accumulated() -> None:
    hidden, weight, rows, ids = head()
    wrapped = with_main_grad(weight)
    with torch.no_grad():
        total, logp, _ = linear_loss(hidden, wrapped, ids, nll, rows=rows, chunk_tokens=6)
    assert (wrapped.main_grad == 0.5).all()
    assert not total.requires_grad
    torch.testing.assert_close(total, -logp[:, 0].sum(), rtol=1e-5, atol=0)


def test_a_frozen_head_still_gives_the_hidden_states_their_gradient() -> None:
    hidden, weight, rows, ids = head()
    (expected,) = torch.autograd.grad(linear_loss(hidden, weight, ids, nll, rows=rows)[0], hidden)
    (found,) = torch.autograd.grad(linear_loss(hidden, weight.detach(), ids, nll, rows=rows)[0], hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recompute_of_the_head_is_refused(use_reentrant: bool) -> None:
    hidden, weight, rows, ids = head()
    total: Any = checkpoint(lambda x: linear_loss(x, weight, ids, nll, rows=rows)[0], hidden, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="activation recompute"):
        total.backward()


def test_a_second_backward_raises() -> None:
    hidden, weight, rows, ids = head()
    total, *_ = linear_loss(hidden, weight, ids, nll, rows=rows)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_of_all_tokens_are_never_held_in_chunks() -> None:
    hidden, weight, rows, ids, _ = head_case(2, 64, 60, 500, width=8)
    for chunk, largest in ((6, max(6 * 500, 500 * 8)), (None, 60 * 500)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with LargestTensor() as seen:
            linear_loss(*leaves, ids, nll, rows=rows, chunk_tokens=chunk)[0].backward()
        assert seen.elements == largest


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_the_chunked_head_of_a_real_model_holds_less_than_two_gigabytes() -> None:
    hidden = torch.randn(16384, 4096, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = with_main_grad(torch.nn.Parameter(torch.randn(151936, 4096, device=DEVICE, dtype=torch.bfloat16) / 64))
    ids = torch.randint(151936, (16384, 1), device=DEVICE)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    total, logp, _ = linear_loss(hidden, weight, ids, nll, chunk_tokens=4096)
    total.backward()
    assert torch.cuda.max_memory_allocated() - held < 2.0e9
    exact = torch.log_softmax(hidden[:4].double() @ weight.double().t(), -1).gather(1, ids[:4])
    torch.testing.assert_close(logp[:4].double(), exact, rtol=0, atol=0.05)  # logits are rounded to bf16


def test_wrong_arguments_are_refused() -> None:
    hidden, weight, rows, ids = head()
    for match, arguments, options in (
        ("of one dtype", (hidden, weight.double(), ids), {"rows": rows}),
        ("of one dtype", (hidden[:, :3], weight, ids), {"rows": rows}),
        ("ids must be", (hidden, weight, ids), {}),
        ("chunk_tokens", (hidden, weight, ids), {"rows": rows, "chunk_tokens": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            linear_loss(*arguments, nll, **options)
    with pytest.raises(ValueError, match="must be a scalar"):
        linear_loss(hidden, weight, ids, lambda logp, *_: logp, rows=rows)


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks on a CPU")
@pytest.mark.parametrize(("world", "impl"), [(2, "torch"), (2, "triton"), (4, "torch")])
def test_tensor_and_sequence_parallel(tmp_path: Path, world: int, impl: str) -> None:
    """The shards' gradients, with and without sequence parallel, whole and in chunks, in fp32 and bf16."""
    environment = {"TRITON_INTERPRET": "1"} if impl == "triton" else {}
    worst = run_ranks("linear_parallel", world, tmp_path, worker=KERNEL_WORKER, environment=environment, impl=impl)
    assert len(worst) == 8
    assert max(worst.values()) < 1, worst
