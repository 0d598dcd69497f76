"""ops.sampled_dots: A Wᵀ at the entries of a code."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from helpers import (
    Judge,
    assert_repeats,
    assert_same_bits,
    at_entries,
    both,
    corrupt_codes,
    grid,
    opcheck,
    raises_and_changes_nothing,
    randn,
    random_code,
    seeds,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import bodies

from sae_fast import ops, use_backend
from sae_fast.ops import crossovers


def plain(code):
    return lambda A, W: at_entries(code, A @ W.T)


@cache
def trials_of(shape: tuple, dtype: torch.dtype) -> list:
    """(code, A, W, torch's result, float64's result), several of them for a small shape."""
    trials, (B, d, F) = [], shape
    for seed in seeds(random_code(B, F).nnz):
        code, A = random_code(B, F, seed=seed), randn(B, d, seed=seed, dtype=dtype)
        W = randn(F, d, seed=seed + 1, dtype=dtype)
        trials.append((code, A, W, *both(plain(code), A, W)))
    return trials


@bodies.but_cuda
def test_as_near_to_float64_as_torchs(body, monkeypatch):
    for shape, dtype in product(body.shapes, body.dtypes):
        B, _, F = shape
        monkeypatch.setattr(crossovers, "CHUNK", F * max(3, B // 4))
        judge = Judge()
        for code, A, W, *expected in trials_of(shape, dtype):
            judge.add(f"{shape} {dtype}", body.run(ops.sampled_dots, code, A, W), *expected)
        judge.verdict()


@bodies.but_cuda
def test_a_code_without_rows_or_without_entries_has_no_dots(body):
    assert body.run(ops.sampled_dots, random_code(0, 33), torch.zeros(0, 5), randn(33, 5)).shape == (0,)
    empty = random_code(9, 33)
    empty = replace(empty, indptr=empty.indptr * 0, indices=empty.indices[:0])
    assert body.run(ops.sampled_dots, empty, randn(9, 5), randn(33, 5)).shape == (0,)


@bodies.but_cuda
def test_a_nan_reaches_the_dots_of_its_row_only(body):
    code, A = random_code(9, 33), randn(9, 63)
    A[4, 62] = float("nan")
    out = body.run(ops.sampled_dots, code, A, randn(33, 63))
    row = slice(int(code.indptr[4]), int(code.indptr[5]))
    assert bool(out[row].isnan().all()) and int(out.isnan().sum()) == row.stop - row.start > 0


def operands(body: bodies.Body, B: int, d: int, F: int) -> tuple:
    """code, A and W of these sizes, or of the interpreter's."""
    B, d, F = body.size(B, d, F)
    return random_code(B, F), randn(B, d), randn(F, d, seed=1)


@bodies.but_cuda
def test_strides_do_not_matter(body):
    code, A, W = operands(body, 57, 63, 100)
    apart = replace(code, indptr=strided(code.indptr), indices=strided(code.indices))
    expected = body.run(ops.sampled_dots, code, A, W)
    assert_same_bits(expected, body.run(ops.sampled_dots, apart, strided(A), strided(W)))
    assert_same_bits(expected, body.run(ops.sampled_dots, code, A.T.contiguous().T, W.T.contiguous().T))


@bodies.but_cuda
def test_repeats_bit_for_bit_at_every_thread_count(body):
    code, A, W = operands(body, 257, 100, 1000)
    assert_repeats(lambda: body.run(ops.sampled_dots, code, A, W), body.threads)


@given(
    B=st.integers(0, 20), d=st.integers(1, 40), F=st.integers(1, 70), seed=st.integers(0, 1000),
    apart=st.booleans(), crossover=st.sampled_from([-1.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_shape_stride_and_dtype_on_a_grid_is_exact(B, d, F, seed, apart, crossover, dtype):
    """Sums of at most 40 ones: exact in bfloat16 too."""
    code = random_code(B, F, seed=seed)
    A, W = grid(B, d, step=1, reach=1, seed=seed).to(dtype), grid(F, d, step=1, reach=1, seed=seed + 1).to(dtype)
    give = strided if apart else torch.clone
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crossovers.CROSSOVER, "sampled_dots", crossover)
        out = ops.sampled_dots(code, give(A), give(W))
    assert out.dtype == dtype
    assert torch.equal(out.double(), plain(code)(A.double(), W.double()))


CODE = random_code(9, 33)
BAD = {
    "integer A": (dict(A=torch.zeros(9, 5, dtype=torch.int64)), "A: got torch.int64"),
    "A of another dtype": (dict(A=torch.zeros(9, 5, dtype=torch.float64)), "A: got torch.float64"),
    "too few rows": (dict(A=torch.zeros(8, 5)), r"A: got shape \(8, 5\), want \[9, 5\]"),
    "another width": (dict(A=torch.zeros(9, 4)), "A: got shape"),
    "A of one dimension": (dict(A=torch.zeros(9)), "A: got shape"),
    "weights of one dimension": (dict(W=torch.zeros(33)), "W: got shape"),
    "weights with fewer features": (dict(W=torch.zeros(99, 5)[:32]), "W: got shape"),
    "weights with more features": (dict(W=torch.zeros(34, 5)), "W: got shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_names_it(case):
    change, message = BAD[case]
    kwargs = dict(A=randn(9, 5), W=randn(33, 5)) | change
    with use_backend("reference"), raises_and_changes_nothing(message, CODE, list(kwargs.values())):
        ops.sampled_dots(CODE, **kwargs)


@pytest.mark.parametrize("name, code", corrupt_codes(9, 33))
def test_a_corrupt_code_is_a_value_error(name, code):
    A, W = randn(9, 5), randn(33, 5)
    with use_backend("reference"), raises_and_changes_nothing("indptr|indices", code, A, W):
        ops.sampled_dots(code, A, W)


@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(gradients):
    A, W = randn(9, 5).requires_grad_(gradients), randn(33, 5).requires_grad_(gradients)
    opcheck(torch.ops.sae_fast.sampled_dots.default, (CODE.indptr, CODE.indices, A, W))
