"""The Triton kernels that walk the rows of a code: decode, sampled_dots, decode_loss.  On a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Judge,
    assert_same_bits,
    raises_and_changes_nothing,
    randn,
    random_code,
    same_bits,
)
from problems.decode_loss import inputs
from problems.decode_loss import plain as plain_losses
from torch import Tensor

from sae_fast import ops, use_backend
from sae_fast.activations import named
from sae_fast.code import SparseCode

pytest.importorskip("triton")
from problems.triton_rows import DEVICE, Gapped, code_to, on_device, run_gapped, run_losses

from sae_fast.kernels import _config
from sae_fast.kernels import decode as decode_kernel
from sae_fast.kernels import sampled_dots as sampled_dots_kernel

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # wrong in the interpreter
B, D, F = 9, 43, 33  # three slices of columns and nine blocks of a row that has all features; the last ones ragged
SMALL = {
    "decode": {"entries": 4, "columns": 16},
    "decode_loss": {"entries": 4, "columns": 16, "finish": 8},
    "sampled_dots": {"entries": 4, "columns": 16, "finish": 8},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for ops_of_generation in _config.SHIPPED.values():
        for op, values in SMALL.items():
            monkeypatch.setitem(ops_of_generation, op, values)


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def run_decode(code: SparseCode, W: Tensor, groups=None) -> Tensor:
    code, W = code_to(code, W.dtype), W.to(DEVICE)
    return ops.decode(code, W, code.values, groups=groups).cpu()


def run_dots(code: SparseCode, A: Tensor, W: Tensor) -> Tensor:
    return ops.sampled_dots(code_to(code), *on_device(A, W)).cpu()


# ---- Codes with gaps, and what a step needs ---------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, (3, 9, 9, 30)])
def test_decode_reads_nothing_in_gaps(bounds):
    code, W = random_code(B, F, 2), randn(F, D)
    gapped = Gapped(code, W.dtype)
    out = torch.empty(2, 1 if bounds is None else len(bounds) - 1, B, D, device=DEVICE)
    limits = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    decode_kernel.decode(gapped.begin, gapped.end, gapped.indices, gapped.values, W.to(DEVICE), limits, out)
    assert_same_bits(out.cpu(), run_decode(code, W, bounds or (0, F)))


def test_sampled_dots_reads_and_writes_nothing_in_gaps():
    code, A, W = random_code(B, F), randn(B, D), randn(F, D)
    gapped = Gapped(code, W.dtype)
    out = gapped.blank(dtype=W.dtype)
    sampled_dots_kernel.sampled_dots(gapped.begin, gapped.end, gapped.indices, *on_device(A, W), out)
    assert_same_bits(gapped.packed(out), run_dots(code, A, W))


def test_sampled_dots_of_a_row_that_would_end_past_the_buffer_are_not_written():
    A, W = on_device(randn(2, D), randn(F, D))
    begin, end = on_device(torch.tensor([0, 3]), torch.tensor([3, 9]))
    indices = torch.arange(6, dtype=torch.int32, device=DEVICE)
    out = torch.full((12,), -7.0, device=DEVICE)
    sampled_dots_kernel.sampled_dots(begin, end, indices, A, W, out[:6])
    assert_same_bits(out[3:].cpu(), torch.full((9,), -7.0))
    torch.testing.assert_close(out[:3], W[:3] @ A[0])


@pytest.mark.parametrize("V", [1, 2])
def test_decode_loss_reads_and_writes_nothing_in_gaps(V):
    code, *arguments = inputs(B, D, F, V)
    residuals, losses, grads = run_gapped(Gapped(code, torch.float32), *arguments, 9)
    expected = run_losses(code, *arguments, normaliser=9)
    assert_same_bits([residuals[0], grads], [expected.residual, expected.grads])
    assert_same_bits(residuals[1:].reshape(-1, D), expected.residual_aux)
    assert_same_bits((losses.sum(0, dtype=torch.float64) / 9).float(), expected.losses)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation, V", [("relu", 1), ("gated", 2)])
def test_what_a_training_step_needs(activation, V, dtype):
    judge, normaliser = Judge(), 4.0
    for seed in range(2):
        code, *arguments = inputs(B, D, F, V, seed)
        code, arguments = code_to(code, dtype, "cpu"), [t.to(dtype) for t in arguments]
        scale = (randn(F, seed=8) * 0.3).exp().to(dtype) if V == 2 else None

        def formula(values, u, scale, *arguments, code=code):
            grads = plain_losses(code, normaliser)(values, *arguments)[3]
            along = (values * grads).sum(0) - values[-1] * arguments[3][code.indices.long()] / normaliser
            vectors = () if scale is None else (scale, scale)
            parts = named(activation).pullback(u, list(grads), code.indices.long(), vectors)
            return [*parts, *[torch.zeros_like(u)] * (4 - len(parts))], values[0] * (2 / normaliser), along

        given = (code.values, code.u, scale, *arguments)
        exact = formula(*(None if t is None else t.double() for t in given))
        torchs = formula(*given)
        gapped = Gapped(code, dtype)
        _, _, grads, delta, entries, decoder, along = run_gapped(gapped, *arguments, normaliser, code.u, scale, step=True)
        assert_same_bits(grads, run_losses(code, *arguments, normaliser=normaliser).grads)
        assert_same_bits(delta, entries[0])
        judge.add("decoder", decoder, torchs[1], exact[1])
        judge.add("along", along, torchs[2], exact[2])
        for name, *results in zip(("delta", "bias", "r_mag", "b_mag"), entries, torchs[0], exact[0], strict=True):
            judge.add(name, *results)
    judge.verdict()


# ---- The same bits, whatever surrounds a result -----------------------------------------------------------------------


def test_a_dot_does_not_hang_on_its_place():
    """Row 2 has all features; other rows with the same input have few, so theirs stand elsewhere in their blocks."""
    code, W = random_code(B, F), randn(F, D)
    dots = run_dots(code, randn(1, D).expand(B, D), W)
    whole = dots[code.indptr[2] : code.indptr[3]]
    assert whole.shape == (F,) and same_bits(dots, whole[code.indices.long()])


def test_alignment_does_not_matter():
    code, W, A = random_code(B, F), randn(F, D), randn(B, D, seed=1)
    shifted = torch.empty(W.numel() + 1)[1:].view_as(W).copy_(W).to(DEVICE)  # 4 bytes past what a wide load wants
    assert_same_bits(run_dots(code, A, W), ops.sampled_dots(code_to(code), A.to(DEVICE), shifted).cpu())


# ---- Odd input ------------------------------------------------------------------------------------------------------


def test_what_the_kernels_cannot_take():
    code, *arguments = inputs(B, 5, F, 2)
    code, (W, b_dec, target, weight) = code_to(code, torch.float64), [t.double().to(DEVICE) for t in arguments]
    for run in (
        lambda: ops.decode(code, W),
        lambda: ops.sampled_dots(code, target, W),
        lambda: ops.decode_loss(code, W, b_dec, target, weight, 1),
    ):
        with raises_and_changes_nothing("cannot run there: a tensor is torch.float64", code, W):
            run()
