"""`vocab_parallel_stats` against float64 autograd of its definition, whole and split over gloo ranks.

The file runs with the PyTorch implementation on a CPU, with the Triton kernels on a GPU, and with them in Triton's interpreter when
TRITON_INTERPRET=1 is set; `test_the_triton_kernels_in_the_interpreter` runs it again that way.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import definition, random_case, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_kernels import vocab_parallel_stats
from ranks import KERNEL_WORKER, run_ranks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
IMPL = "triton" if INTERPRETED or DEVICE == "cuda" else "torch"


def check(logits: torch.Tensor, ids: torch.Tensor, g_logp: torch.Tensor, g_entropy: torch.Tensor, *, inplace: bool, **options: Any) -> None:
    """Outputs and gradient are no further from float64 than twice what eager PyTorch is; the argument is left alone by the forward."""
    form: Any = {"vocab_size": options.get("vocab_size") or logits.shape[1], "temperature": options.get("temperature", 1.0)}
    mask = form["row_mask"] = options.get("row_mask")

    def run(leaf: torch.Tensor, outputs: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        loss = (outputs[0] * g_logp).sum() + (outputs[1] * g_entropy).sum() * 2
        (loss * 1.5).backward()  # the loss is not the last operation
        assert leaf.grad is not None
        return [outputs[0].detach().cpu(), outputs[1].detach().cpu(), leaf.grad.nan_to_num(0.0).cpu()]

    truth_leaf, eager_leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    truth = run(truth_leaf, definition(truth_leaf, ids, **form))
    eager = run(eager_leaf, definition(eager_leaf.float(), ids, **form))
    g_logp, g_entropy, options["row_mask"] = g_logp.to(DEVICE), g_entropy.to(DEVICE), None if mask is None else mask.to(DEVICE)
    leaf = logits.to(DEVICE).clone().requires_grad_()
    computed = leaf * 1 if inplace else leaf
    outputs = vocab_parallel_stats(computed, ids.to(DEVICE), inplace_backward=inplace, impl=IMPL, **options)
    torch.testing.assert_close(computed.detach().cpu(), logits, rtol=0, atol=0, equal_nan=True)
    found = run(leaf, outputs)
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (torch.float32, torch.float32, logits.dtype)
    finite = logits.float()[logits.isfinite()]
    scale = finite.abs().max().item() / form["temperature"] if finite.numel() else 0.0
    # Of the loss by the two outputs of a row.
    upstream = 1.5 * (g_logp.abs().sum(-1) + 2 * g_entropy.abs()).max().item() if len(g_entropy) else 0.0
    for name, value, exact, own in zip(("logp", "entropy", "gradient"), found, truth, eager, strict=True):
        # The gradient by a logit has the temperature in its denominator once more.
        sharper, factor = (form["temperature"], upstream) if name == "gradient" else (1.0, 0.0)
        allowed = tolerance(own, exact, value.dtype, logits_scale=scale / sharper, upstream=factor)
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sharp_softmax_whose_only_gradient_is_the_entropys() -> None:
    for bf16, masked, inplace in itertools.product((False, True), repeat=3):
        logits, ids, g_logp, g_entropy = random_case(176, 7, 1271, 0, vocab_size=1231)
        mask = torch.rand(7, generator=torch.Generator().manual_seed(176)) < 0.5 if masked else None
        logits = logits.bfloat16() if bf16 else logits
        check(logits, ids, g_logp, g_entropy, inplace=inplace, vocab_size=1231, temperature=0.5, row_mask=mask)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 9),
    vocab=st.sampled_from([1, 2, 31, 401, 1271, 9000]),
    k=st.integers(0, 5),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    bf16=st.booleans(),
    masked=st.booleans(),
    inplace=st.booleans(),
    data=st.data(),
)
def test_agrees_with_the_definition(
    seed: int, n: int, vocab: int, k: int, temperature: float, bf16: bool, masked: bool, inplace: bool, data: Any
) -> None:
    vocab_size = data.draw(st.integers(max(1, vocab - 40), vocab))
    logits, ids, g_logp, g_entropy = random_case(seed, n, vocab, k, vocab_size=vocab_size)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    logits = logits.bfloat16() if bf16 else logits
    check(logits, ids, g_logp, g_entropy, inplace=inplace, vocab_size=vocab_size, temperature=temperature, row_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_real_vocabulary_with_top_k(dtype: torch.dtype) -> None:
    logits, ids, g_logp, g_entropy = random_case(4, 3, 152064, 65, vocab_size=151936)
    check(logits.to(dtype), ids, g_logp, g_entropy, inplace=True, vocab_size=151936)


def test_large_and_minus_infinite_logits() -> None:
    logits, ids, g_logp, g_entropy = random_case(0, 8, 50, 3, scale=200.0)
    logits[:, 7] = -torch.inf
    check(logits, ids.where(ids != 7, -1), g_logp, g_entropy, inplace=True)


def test_a_nan_in_a_masked_row_does_not_spread_and_one_elsewhere_is_seen() -> None:
    logits, ids, *_ = random_case(1, 4, 20, 2)
    ids = ids.clamp(min=0)
    logits[2] = torch.nan
    mask = torch.tensor([True, True, False, True], device=DEVICE)
    leaf = logits.to(DEVICE).clone().requires_grad_()
    logp, entropy = vocab_parallel_stats(leaf * 1, ids.to(DEVICE), row_mask=mask, inplace_backward=True, impl=IMPL)
    (logp.sum() + entropy.sum()).backward()
    assert leaf.grad is not None
    assert logp.isfinite().all()
    assert (logp[2] == 0).all()
    logits[2], logits[1, 5] = 0.0, torch.nan
    logp, entropy = vocab_parallel_stats(logits.to(DEVICE), ids.to(DEVICE), row_mask=mask, impl=IMPL)
    assert logp[1].isnan().all()
    assert entropy[1].isnan()
    assert logp[[0, 2, 3]].isfinite().all()


def test_a_nan_in_a_masked_row_does_not_reach_the_gradient() -> None:
    made: list[torch.Tensor] = []
    leaf = torch.zeros(2, 6, device=DEVICE, requires_grad=True)
    computed = leaf + torch.tensor([[0.0], [torch.nan]], device=DEVICE)
    computed.register_hook(made.append)
    mask = torch.tensor([True, False], device=DEVICE)
    logp, entropy = vocab_parallel_stats(
        computed, torch.zeros(2, 1, dtype=torch.long, device=DEVICE), row_mask=mask, inplace_backward=True, impl=IMPL
    )
    (logp.sum() * 3 + entropy.sum()).backward()
    assert made[0].data_ptr() == computed.data_ptr()  # really in place
    assert (made[0][1] == 0).all()
    assert made[0][0, 0] != 0


def test_an_id_beyond_the_vocabulary_has_no_probability() -> None:
    logits, *_ = random_case(1, 2, 20, 1)
    ids = torch.tensor([[17], [19]], device=DEVICE)
    leaf = logits.to(DEVICE).clone().requires_grad_()
    logp, _ = vocab_parallel_stats(leaf, ids, vocab_size=18, impl=IMPL)
    assert logp[0].isfinite()
    assert logp[1] == -torch.inf
    logp.where(logp > -torch.inf, 0.0).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad[1] == 0).all()
    assert (leaf.grad[:, 18:] == 0).all()


def test_logits_that_are_a_view_with_wider_rows() -> None:
    logits, ids, g_logp, g_entropy = random_case(5, 4, 300, 2, vocab_size=256)
    wide, narrow = logits.to(DEVICE).clone().requires_grad_(), logits[:, :256].to(DEVICE).clone().requires_grad_()
    grads = []
    for leaf, view in ((wide, (wide * 1)[:, :256]), (narrow, narrow * 1)):
        logp, entropy = vocab_parallel_stats(view, ids.to(DEVICE), impl=IMPL, inplace_backward=True)
        ((logp * g_logp.to(DEVICE)).sum() + (entropy * g_entropy.to(DEVICE)).sum()).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad[:, :256])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_in_place_is_never_silently_wrong() -> None:
    ids = torch.zeros(3, 1, dtype=torch.long, device=DEVICE)
    leaf = torch.randn(3, 40, device=DEVICE).requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        vocab_parallel_stats(leaf, ids, inplace_backward=True, impl=IMPL)
    logp, _ = vocab_parallel_stats(leaf * 1, ids, inplace_backward=True, impl=IMPL)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        logp.sum().backward()
    computed = leaf * 1
    square = computed**2  # saves the logits for its own backward
    logp, _ = vocab_parallel_stats(computed, ids, inplace_backward=True, impl=IMPL)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        square.sum().backward()
    logp, _ = vocab_parallel_stats(leaf, ids, impl=IMPL)  # not in place: as often as wanted
    first, second = (torch.autograd.grad(logp.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_wrong_arguments_are_refused() -> None:
    logits, ids = torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 1, dtype=torch.long, device=DEVICE)
    for match, arguments in {
        "are expected": (logits, ids[:2], {}),
        "int64": (logits, ids.int(), {}),
        "temperature": (logits, ids, {"temperature": 0.0}),
        "vocab_size": (logits, ids, {"vocab_size": 0}),
        "row_mask": (logits, ids, {"row_mask": torch.ones(2, dtype=torch.bool)}),
        "impl": (logits, ids, {"impl": "cuda"}),
    }.items():
        with pytest.raises(ValueError, match=match):
            vocab_parallel_stats(arguments[0], arguments[1], **arguments[2])


@pytest.mark.skipif(IMPL == "triton", reason="Triton can run here")
def test_triton_without_a_gpu_is_refused_and_auto_chooses() -> None:
    logits, ids = torch.zeros(3, 5), torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        vocab_parallel_stats(logits, ids, impl="triton")
    assert vocab_parallel_stats(logits, ids)[0].shape == (3, 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks on a CPU")
@pytest.mark.parametrize(("world", "vocab", "dtype"), [(1, 37, "float32"), (2, 37, "bfloat16"), (4, 37, "float32"), (4, 29, "bfloat16")])
def test_tensor_parallel(tmp_path: Path, world: int, vocab: int, dtype: str) -> None:
    """40 columns; with 29 real ones the last of four ranks holds padding alone."""
    worst = run_ranks("tensor_parallel", world, tmp_path, worker=KERNEL_WORKER, impl=IMPL, dtype=dtype, vocab=vocab, padded=40)
    assert len(worst) == 3
    assert max(worst.values()) < 1, worst


@pytest.mark.skipif(IMPL == "triton", reason="Triton has been tested by the tests above")
def test_the_triton_kernels_in_the_interpreter() -> None:
    """Every test of this file again, with the kernels in Triton's interpreter: it must be chosen before triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed (it is for Linux alone)")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
