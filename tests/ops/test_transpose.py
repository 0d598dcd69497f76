"""ops.transpose: the entries of a code by feature, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import (
    SHAPES,
    assert_repeats,
    assert_same_bits,
    code_of,
    corrupt_codes,
    opcheck,
    raises_and_changes_nothing,
    random_code,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import bodies
from problems.bodies import every_schedule, moved

from sae_fast import ops, use_backend
from sae_fast.code import SparseCode


def assert_transposed(code: SparseCode, run=lambda op, *given: op(*given)) -> None:
    """Entry by entry, in Python: feature by feature, rows ascending, perm pointing back."""
    by_feature: list[list[tuple[int, int]]] = [[] for _ in range(code.d_sae)]
    offsets = code.indptr.tolist()
    for row in range(code.batch):
        for j in range(offsets[row], offsets[row + 1]):
            by_feature[int(code.indices[j])].append((row, j))
    csc = run(ops.transpose, code)
    assert (csc.colptr.dtype, csc.rows.dtype, csc.perm.dtype) == (torch.int64, torch.int32, torch.int64)
    assert csc.colptr.diff().tolist() == [len(entries) for entries in by_feature] and csc.colptr[0] == 0
    flat = [entry for entries in by_feature for entry in entries]
    assert list(zip(csc.rows.tolist(), csc.perm.tolist(), strict=True)) == flat


SIZES = sorted({(B, F) for B, _, F in SHAPES if B * F < 30_000})


FEW = [(1, 6), (3, 9), (33, 1), (64, 5), (70, 21)]  # words of 32 rows, tiles of 4 features; each with a ragged last one


# Of CUDA's blocks several, ragged, of rows (256) and of features (2048); more chunks than a thread sums at once (8).
BLOCKS = [(257, 33), (40, 2049), (300, 4200), (2400, 3)]


def columns(rows: int, features: int) -> SparseCode:
    """Empty rows; one feature in every other row, the last feature in none."""
    g = torch.Generator().manual_seed(rows + features)
    member = torch.rand(rows, features, generator=g) < (0.3 if features < 100 else 0.02)
    member[:, -1] = False
    member[:, features // 2] = True
    member[1::7] = False
    return code_of(member, 1, g)


@bodies.every
def test_orders_entries_by_feature(body):
    large = body.shapes if body.route == "shipped" else []
    more = BLOCKS if body.backend == "cuda" else [(B, F) for B, _, F in large]
    for size in [*FEW, *more] if body.of_gpu or body.isa else SIZES:
        assert_transposed(random_code(*size), body.run)
        assert_transposed(columns(*size), body.run)


@bodies.of_gpu
def test_gaps_are_not_read_and_nothing_is_written_past_the_entries(body):
    from problems.gapped import Gapped

    for size in FEW:
        code = columns(*size)
        gapped = Gapped(code, code.values.dtype)
        found = every_schedule(body, lambda: moved(gapped.transposed(), "cpu"))  # noqa: B023
        with use_backend("reference"):
            expected, n = ops.transpose(code), code.nnz
        assert_same_bits([expected.colptr, expected.rows], [found.colptr, found.rows[:n]])
        assert torch.equal(found.perm[:n], gapped.at[expected.perm])


@pytest.mark.kernels
def test_cuda_reads_rows_longer_than_a_warp_does_at_once(cuda_calls):
    """Words of all ones; and every number of entries up to two reads' worth."""
    cuda, g = bodies.Body("cuda"), torch.Generator().manual_seed(0)
    assert_transposed(code_of(torch.ones(34, 200, dtype=torch.bool), 1, g), cuda.run)
    assert_transposed(code_of(torch.arange(130) < torch.arange(130)[:, None], 1, g), cuda.run)
    assert set(cuda_calls) == {"transpose_count", "transpose_place"}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_orders_entries_by_feature_at_any_size(size):
    assert_transposed(random_code(*size))


def test_a_large_code_as_a_stable_sort_has_it(isa):
    code = random_code(257, 4099)
    csc = ops.transpose(code)
    assert torch.equal(csc.perm, torch.argsort(code.indices.long(), stable=True))
    assert torch.equal(csc.rows.long(), code.row_ids()[csc.perm])
    assert torch.equal(csc.colptr.diff(), torch.bincount(code.indices.long(), minlength=4099))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_repeats_bit_for_bit_at_every_thread_count(threads):
    """Also with more threads than rows."""
    for code in (random_code(257, 1000), random_code(3, 100), random_code(1, 33)):
        torch.set_num_threads(1)
        expected = ops.transpose(code)
        assert_repeats(lambda: ops.transpose(code), threads=(threads,))  # noqa: B023
        assert_same_bits(expected, ops.transpose(code))


def test_one_feature_may_own_every_entry(isa):
    code = random_code(257, 1)
    csc = ops.transpose(replace(code, shape=torch.Size((257, 500)), indices=code.indices + 499))
    assert not csc.colptr[:-1].any() and csc.colptr[-1] == code.nnz
    assert torch.equal(csc.perm, torch.arange(code.nnz))


@bodies.every
def test_a_code_without_rows_or_entries(body):
    for rows in (0, 9):
        empty = torch.zeros(rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        csc = body.run(
            ops.transpose, replace(random_code(0, 33), shape=torch.Size((rows, 33)), indptr=empty[0], indices=empty[1])
        )
        assert_same_bits(csc.colptr, torch.zeros(34, dtype=torch.int64))
        assert csc.rows.shape == csc.perm.shape == (0,)


@bodies.every
def test_strides_do_not_matter(body):
    code = random_code(57, 20)
    apart = replace(code, indptr=strided(code.indptr), indices=strided(code.indices))
    assert not apart.indptr.is_contiguous()
    assert_same_bits(body.run(ops.transpose, code), body.run(ops.transpose, apart))


@given(B=st.integers(0, 40), F=st.integers(1, 90), seed=st.integers(0, 1000), threads=st.integers(1, 4))
def test_any_size_and_thread_count(B, F, seed, threads):
    torch.set_num_threads(threads)
    assert_transposed(random_code(B, F, seed=seed))


@pytest.mark.parametrize("name, code", corrupt_codes(9, 33))
def test_a_corrupt_code_is_a_value_error(name, code):
    with use_backend("reference"), raises_and_changes_nothing("indptr|indices", code):
        ops.transpose(code)


@pytest.mark.parametrize("features", [0, -1])
def test_a_count_of_features_below_one_is_a_value_error(features):
    code = random_code(9, 33)
    with raises_and_changes_nothing(f"features: got {features}", code):
        torch.ops.sae_fast.transpose(code.indptr, code.indices, features)


def test_opcheck():
    code = random_code(9, 33)
    opcheck(torch.ops.sae_fast.transpose.default, (code.indptr, code.indices, 33))
