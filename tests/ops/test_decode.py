"""ops.decode: sums of decoder rows, for several value sets and feature groups."""

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
    both,
    corrupt_codes,
    decoded,
    dense,
    grid,
    judge,
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
from problems.bodies import moved
from problems.decode import groups_of, plain

from sae_fast import ops, use_backend
from sae_fast.ops import crossovers


@cache
def trials_of(shape: tuple, V: int, bounds: tuple[int, ...], dtype: torch.dtype) -> list:
    """(code, W_dec, torch's result, float64's result), several of them for a small shape."""
    trials, (B, d, F) = [], shape
    for seed in seeds(B * d):
        code, W = moved(random_code(B, F, V, seed=seed), "cpu", dtype), randn(F, d, seed=seed, dtype=dtype)
        if bounds == (0, F):
            expected = both(lambda values, W: decoded(code, values, W)[:, None], code.values, W)  # noqa: B023
        else:
            expected = both(plain(bounds), dense(code, code.values), W)
        trials.append((code, W, *expected))
    return trials


def judge_decode(body: bodies.Body, shapes: list, V: int, bounds_of, monkeypatch) -> None:
    for shape, dtype in product(shapes, body.dtypes):
        B, _, F = shape
        monkeypatch.setattr(crossovers, "CHUNK", F * max(3, B // 4))  # 257 rows: blocks of 64 and a last one of 1
        bounds, judge = bounds_of(F), Judge()
        for code, W, *expected in trials_of(shape, V, tuple(bounds), dtype):
            out = body.run(ops.decode, code, W, code.values, groups=bounds)
            assert out.dtype == dtype and not out[:, bounds.index(bounds[-1]) :].any(), "a group without features"
            judge.add(f"{shape} {dtype}", out, *expected)
        judge.verdict()


@bodies.but_cuda
def test_as_near_to_float64_as_torchs(body, monkeypatch):
    judge_decode(body, body.shapes, 2, lambda F: [0, F], monkeypatch)


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.but_cuda
@pytest.mark.parametrize("V", [3, 2, 1])
def test_groups_of_every_value_set(V, body, monkeypatch):
    judge_decode(body, body.few_shapes, V, groups_of, monkeypatch)


def test_prefixes_are_a_cumulative_sum_over_groups(route):
    code, W = random_code(57, 100, 1), randn(100, 63)
    groups = ops.decode(code, W, groups=(0, 8, 30, 100))
    prefixes = groups.cumsum(0)
    for prefix, end in zip(prefixes, (8, 30, 100), strict=True):
        judge(prefix, lambda f, W: f @ W, dense(code, code.magnitudes)[:, :end], W[:end])


def test_shape_follows_the_arguments(route):
    code, W = random_code(9, 33), randn(33, 5)
    whole = ops.decode(code, W, code.values)
    assert whole.shape == (2, 9, 5)
    # On the dense route a BLAS may round a small product by where in memory it goes.
    equal = assert_same_bits if route == "sparse" else torch.testing.assert_close
    equal(ops.decode(code, W), whole[0])
    equal(ops.decode(code, W, code.values[1]), whole[1])
    assert ops.decode(code, W, code.gates, groups=(0, 9, 33)).shape == (2, 9, 5)
    assert ops.decode(code, W, code.values, groups=[0, 33]).shape == (2, 1, 9, 5)


@bodies.but_cuda
def test_a_code_without_rows_or_without_entries_decodes_to_zeros(body):
    assert body.run(ops.decode, random_code(0, 33), randn(33, 5)).shape == (0, 5)
    empty = random_code(9, 33)
    empty = replace(empty, indptr=empty.indptr * 0, indices=empty.indices[:0], values=empty.values[:, :0])
    assert_same_bits(body.run(ops.decode, empty, randn(33, 5), empty.values), torch.zeros(2, 9, 5))
    of_no_features = body.run(ops.decode, empty, randn(33, 5), empty.values, groups=(7, 7, 7))
    assert_same_bits(of_no_features, torch.zeros(2, 2, 9, 5))


@bodies.but_cuda
def test_a_nan_value_reaches_its_row_only(body):
    code = random_code(9, 33)
    values = code.magnitudes.clone()
    values[code.indptr[4]] = float("nan")
    out = body.run(ops.decode, code, randn(33, 63), values)
    assert bool(out[4].isnan().all()) and not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@bodies.but_cuda
def test_strides_do_not_matter(body):
    code, W = (random_code(9, 33), randn(33, 19)) if body.of_gpu else (random_code(57, 100), randn(100, 63))
    apart = replace(code, indptr=strided(code.indptr), indices=strided(code.indices), values=strided(code.values))
    assert not apart.values.is_contiguous() and not apart.indices.is_contiguous()
    groups = (0, 9, W.shape[0])
    expected = body.run(ops.decode, code, W, code.values, groups=groups)
    assert_same_bits(expected, body.run(ops.decode, apart, strided(W), apart.values, groups=groups))
    assert_same_bits(expected, body.run(ops.decode, apart, W.T.contiguous().T, apart.values, groups=groups))


@bodies.but_cuda
def test_repeats_bit_for_bit_at_every_thread_count(body):
    code, W = (random_code(9, 33), randn(33, 43)) if body.of_gpu else (random_code(257, 1000), randn(1000, 100))
    assert_repeats(lambda: body.run(ops.decode, code, W, code.values, groups=(0, 30, W.shape[0])), body.threads)


@given(
    B=st.integers(0, 20), d=st.integers(1, 40), F=st.integers(1, 70), V=st.integers(1, 3), seed=st.integers(0, 1000),
    apart=st.booleans(), crossover=st.sampled_from([-1.0, 2.0]), data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_shape_stride_dtype_and_groups_on_a_grid_is_exact(B, d, F, V, seed, apart, crossover, dtype, data):
    bounds = sorted(data.draw(st.lists(st.integers(0, F), min_size=2, max_size=5)))
    code, W = random_code(B, F, V, seed=seed), grid(F, d, step=1, reach=1, seed=seed).to(dtype)
    values = (code.values > 0.5).to(dtype)  # sums of at most 70 ones: exact in bfloat16 too
    give = strided if apart else torch.clone
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crossovers.CROSSOVER, "decode", crossover)
        out = ops.decode(code, give(W), give(values), groups=bounds)
    assert out.dtype == dtype
    assert torch.equal(out.double(), plain(bounds)(dense(code, values.double()), W.double()))


CODE = random_code(9, 33)
BAD = {
    "integer values": (dict(values=CODE.values.long()), "values: got torch.int64"),
    "values of another dtype": (dict(values=CODE.values.double()), "values: got torch.float64"),
    "values too short": (dict(values=CODE.values[:, :-1]), "values: got shape"),
    "values of three dimensions": (dict(values=CODE.values[None]), "values"),
    "values of no dimension": (dict(values=torch.tensor(1.0)), "values"),
    "weights of one dimension": (dict(W_dec=torch.zeros(33)), "W_dec: got shape"),
    "integer weights": (dict(W_dec=torch.zeros(33, 5, dtype=torch.int32)), "values: got torch.float32|W_dec: got"),
    "weights with fewer features": (dict(W_dec=torch.zeros(99, 5)[:32]), "W_dec: got shape"),
    "weights with more features": (dict(W_dec=torch.zeros(34, 5)), "W_dec: got shape"),
    "one bound": (dict(groups=(0,)), r"groups: got \[0\]"),
    "descending bounds": (dict(groups=(0, 9, 8)), "groups: got"),
    "a negative bound": (dict(groups=(-1, 9)), "groups: got"),
    "a bound above F": (dict(groups=(0, 34)), "groups: got"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_names_it(case):
    change, message = BAD[case]
    kwargs = dict(W_dec=randn(33, 5), values=CODE.values) | change
    with raises_and_changes_nothing(message, CODE, list(kwargs.values())):
        ops.decode(CODE, **kwargs)


@pytest.mark.parametrize("name, code", corrupt_codes(9, 33))
def test_a_corrupt_code_is_a_value_error(name, code):
    W = randn(33, 5)
    with use_backend("reference"), raises_and_changes_nothing("indptr|indices", code, W):
        ops.decode(code, W, code.values)


@pytest.mark.parametrize("groups", [None, [0, 9, 33]])
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck(gradients, groups):
    values, W = CODE.values.clone().requires_grad_(gradients), randn(33, 5).requires_grad_(gradients)
    opcheck(torch.ops.sae_fast.decode.default, (CODE.indptr, CODE.indices, values, W, groups))


def test_features_that_do_not_ascend_in_a_row_are_a_value_error():
    code = random_code(9, 33)
    swapped = code.indices.clone()
    first = int(code.indptr[int((code.indptr.diff() > 1).nonzero()[0])])
    swapped[first : first + 2] = swapped[first : first + 2].flip(0)
    with pytest.raises(ValueError, match=r"indices: got .* want them ascending in each row"):
        ops.decode(replace(code, indices=swapped), randn(33, 5))
