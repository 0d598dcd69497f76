"""The Triton kernels that walk the rows of a code: decode, sampled_dots, decode_loss.  On a GPU or in the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import (
    Judge,
    assert_same_bits,
    at_entries,
    both,
    decoded,
    dense,
    raises_and_changes_nothing,
    randn,
    random_code,
    same_bits,
    strided,
)
from problems.decode import groups_of
from problems.decode import plain as plain_groups
from problems.decode_loss import inputs, judge_one
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


@pytest.fixture
def shipped_tiles(small_tiles, monkeypatch):
    monkeypatch.undo()


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def run_decode(code: SparseCode, W: Tensor, groups=None) -> Tensor:
    code, W = code_to(code, W.dtype), W.to(DEVICE)
    return ops.decode(code, W, code.values, groups=groups).cpu()


def run_dots(code: SparseCode, A: Tensor, W: Tensor) -> Tensor:
    return ops.sampled_dots(code_to(code), *on_device(A, W)).cpu()


# ---- Against float64 ------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 3])
def test_decode(V, dtype):
    judge = Judge()
    for seed in range(2):
        code, W = code_to(random_code(B, F, V, seed=seed), dtype, "cpu"), randn(F, D, seed=seed, dtype=dtype)
        judge.add("x_hat", run_decode(code, W), *both(lambda values, W: decoded(code, values, W), code.values, W))  # noqa: B023
    judge.verdict()


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 3])
def test_decode_of_groups(V, dtype):
    code, W = code_to(random_code(3, 150, V, density=0.5), dtype, "cpu"), randn(150, 19, dtype=dtype)
    judge, bounds = Judge(), groups_of(150)
    out = run_decode(code, W, bounds)
    judge.add("groups", out, *both(plain_groups(bounds), dense(code, code.values), W))
    judge.verdict()
    assert not out[:, -1].any(), "a group without features decodes to 0"
    assert_same_bits(run_decode(code, W, (0, 150))[:, 0], run_decode(code, W))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_dots(dtype):
    judge = Judge()
    for seed in range(2):
        code, A, W = random_code(B, F, seed=seed), randn(B, D, seed=seed, dtype=dtype), randn(F, D, seed=9, dtype=dtype)
        judge.add("dots", run_dots(code, A, W), *both(lambda A, W: at_entries(code, A @ W.T), A, W))  # noqa: B023
    judge.verdict()


@pytest.mark.slow(but=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2])
def test_decode_loss(V, dtype):
    """Rows without entries, with all features, with values of 0; the normaliser is any positive number."""
    judge = Judge()
    for seed in range(3):
        code, *arguments = inputs(B, D, F, V, seed)
        code, arguments = code_to(code, dtype, "cpu"), [t.to(dtype) for t in arguments]
        out = run_losses(code, *arguments, normaliser=1.75)
        assert all(t.dtype == dtype for t in out)
        judge_one(judge, out, *both(plain_losses(code, 1.75), code.values, *arguments))
        assert not out.grads[code.values == 0].any()
    judge.verdict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 31), (1, 257, 3), (3, 16, 8), (1, 300, 4099)], ids=str)
def test_shipped_tiles_on_other_shapes(shape, dtype, shipped_tiles):
    rows, d, features = shape
    judge, code = Judge(), code_to(random_code(rows, features, density=0.02), dtype, "cpu")
    _, *arguments = inputs(rows, d, features, 2)
    W, b_dec, target, weight = (t.to(dtype) for t in arguments)
    judge.add("x_hat", run_decode(code, W), *both(lambda values, W: decoded(code, values, W), code.values, W))
    judge.add("dots", run_dots(code, target, W), *both(lambda A, W: at_entries(code, A @ W.T), target, W))
    out = run_losses(code, W, b_dec, target, weight, normaliser=rows)
    torchs, exact = both(plain_losses(code, rows), code.values, W, b_dec, target, weight)
    for name in ("residual", "residual_aux", "grads"):  # three losses are too few numbers for the rule
        k = out._fields.index(name)
        judge.add(name, out[k], torchs[k], exact[k])
    judge.verdict()
    assert torch.allclose(out.losses.double(), exact[0], rtol=4 * torch.finfo(dtype).eps)


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
            vectors = () if scale is None else (scale, scale)
            parts = named(activation).pullback(u, list(grads), code.indices.long(), vectors)
            return [*parts, *[torch.zeros_like(u)] * (4 - len(parts))], values[0] * (2 / normaliser)

        given = (code.values, code.u, scale, *arguments)
        exact = formula(*(None if t is None else t.double() for t in given))
        torchs = formula(*given)
        gapped = Gapped(code, dtype)
        _, _, grads, delta, entries, decoder = run_gapped(gapped, *arguments, normaliser, code.u, scale, step=True)
        assert_same_bits(grads, run_losses(code, *arguments, normaliser=normaliser).grads)
        assert_same_bits(delta, entries[0])
        judge.add("decoder", decoder, torchs[1], exact[1])
        for name, *results in zip(("delta", "bias", "r_mag", "b_mag"), entries, torchs[0], exact[0], strict=True):
            judge.add(name, *results)
    judge.verdict()


# ---- The same bits, whatever surrounds a result -----------------------------------------------------------------------


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(dtype):
    code, *arguments = inputs(B, D, F, 2)
    arguments = [t.to(dtype) for t in arguments]
    W, _, A, _ = arguments
    for run in (
        lambda: run_decode(code, W, (0, 7, F)),
        lambda: run_dots(code, A, W),
        lambda: run_losses(code, *arguments, normaliser=B),
    ):
        assert_same_bits(run(), run())


def test_a_dot_does_not_hang_on_its_place():
    """Row 2 has all features; other rows with the same input have few, so theirs stand elsewhere in their blocks."""
    code, W = random_code(B, F), randn(F, D)
    dots = run_dots(code, randn(1, D).expand(B, D), W)
    whole = dots[code.indptr[2] : code.indptr[3]]
    assert whole.shape == (F,) and same_bits(dots, whole[code.indices.long()])


@pytest.mark.slow
def test_strides_and_alignment_do_not_matter():
    code, *arguments = inputs(B, D, F, 2)
    W, _, A, _ = arguments
    apart = replace(code, indptr=strided(code.indptr), indices=strided(code.indices), values=strided(code.values))
    away = [strided(t) for t in arguments]
    assert_same_bits(run_decode(code, W, (0, 7, F)), run_decode(apart, away[0], (0, 7, F)))
    assert_same_bits(run_dots(code, A, W), run_dots(apart, away[2], away[0]))
    assert_same_bits(run_losses(code, *arguments, normaliser=B), run_losses(apart, *away, normaliser=B))

    shifted = torch.empty(W.numel() + 1)[1:].view_as(W).copy_(W).to(DEVICE)  # 4 bytes past what a wide load wants
    assert_same_bits(run_dots(code, A, W), ops.sampled_dots(code_to(code), A.to(DEVICE), shifted).cpu())


# ---- Odd input ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_nan_reaches_its_own_row_only():
    code, W, b_dec, target, weight = inputs(B, D, F, 2)
    target[4, 3] = float("nan")
    out = run_losses(code, W, b_dec, target, weight, normaliser=B)
    assert out.losses.isnan().tolist() == [True, False, True] and int(out.residual.isnan().sum()) == 1
    assert not (out.grads[:, : code.indptr[4]].isnan().any() or out.grads[:, code.indptr[5] :].isnan().any())
    dots = run_dots(code, target, W)
    row = slice(int(code.indptr[4]), int(code.indptr[5]))
    assert bool(dots[row].isnan().all()) and int(dots.isnan().sum()) == row.stop - row.start > 0

    values = code.values.clone()
    values[0, code.indptr[4]] = float("nan")
    code = replace(code, values=values)
    x_hat = run_decode(code, W)
    assert bool(x_hat[0, 4].isnan().all()) and int(x_hat.isnan().sum()) == D
    losses = run_losses(code, W, b_dec, randn(B, D), weight, normaliser=B).losses
    assert losses.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("V", [1, 2])
def test_without_rows_or_without_entries(V):
    code, W, b_dec, target, weight = inputs(0, 5, 33, V)
    assert run_decode(code, W).shape == (V, 0, 5) and run_dots(code, target, W).shape == (0,)
    out = run_losses(code, W, b_dec, target, weight, normaliser=1)
    assert_same_bits(out.losses, torch.zeros(3))
    assert out.residual.shape == (0, 5) and out.grads.shape == (V, 0)

    code, W, b_dec, target, weight = inputs(B, 5, 33, V)
    code = replace(code, indptr=code.indptr * 0, indices=code.indices[:0], u=code.u[:0], values=code.values[:, :0])
    assert_same_bits(run_decode(code, W), torch.zeros(V, B, 5))
    assert run_dots(code, target, W).shape == (0,)
    out = run_losses(code, W, b_dec, target, weight, normaliser=B)
    assert_same_bits(out.residual, b_dec - target)
    assert out.losses[1] == 0 and bool(out.losses[0] > 0) and bool((out.losses[2] > 0) == (V == 2))


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
