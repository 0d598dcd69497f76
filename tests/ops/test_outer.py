"""ops.outer: weight gradients by feature, whole, by range, by list, and accumulated."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import (
    FEW_SHAPES,
    SHAPES,
    Judge,
    assert_repeats,
    assert_same_bits,
    both,
    corrupt_transposed,
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

from sae_fast import ops, use_backend
from sae_fast.ops import crossovers


def plain(code):
    """Σ_s f_sᵀ A_s with dense matrices; values [S, nnz] and A [S, B, d]."""
    return lambda values, A: (dense(code, values).mT @ A).sum(0)


def sources(B: int, d: int, F: int, S: int, seed: int = 0) -> tuple:
    """code, values [S, nnz], A [S, B, d]."""
    code = random_code(B, F, S, seed=seed)
    return code, code.values - 0.3, randn(S, B, d, seed=seed)


@cache
def trials_of(B: int, d: int, F: int, S: int) -> list:
    trials = []
    for seed in seeds(F * d):
        code, values, A = sources(B, d, F, S, seed)
        trials.append((code, values, A, *both(plain(code), values, A)))
    return trials


def judge_shape(B: int, d: int, F: int, S: int) -> None:
    result = Judge()
    for code, values, A, *expected in trials_of(B, d, F, S):
        result.add("rows", ops.outer(ops.transpose(code), list(values), list(A)), *expected)
    result.verdict()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_float64_as_torchs(shape, route, monkeypatch):
    B, _, F = shape
    monkeypatch.setattr(crossovers, "CHUNK", B * max(3, F // 4))  # F = 4099: blocks of 1024 and a last one of 3
    judge_shape(*shape, S=1)


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_several_sources_on_every_instruction_set(shape, route, isa):
    judge_shape(*shape, S=2)
    judge_shape(*shape, S=3)


@pytest.mark.parametrize("shape", FEW_SHAPES, ids=str)
def test_reference_body_meets_the_same_contract(shape):
    with use_backend("reference"):
        judge_shape(*shape, S=2)


def test_a_vector_parameters_gradient_is_the_sum_of_its_values(route, isa):
    code, values, _ = sources(257, 1, 100, 1)
    rows = ops.outer(ops.transpose(code), list(values), [torch.ones(257, 1)])
    assert rows.shape == (100, 1)
    judge(rows[:, 0], lambda values: dense(code, values)[0].sum(0), values)


@pytest.mark.parametrize("first, n", [(0, 100), (0, 33), (7, 64), (99, 1), (100, 0), (50, 0)])
def test_a_range_of_features_has_the_same_rows(first, n, route, isa, monkeypatch):
    monkeypatch.setattr(crossovers, "CHUNK", 57 * 10)
    code, values, A = sources(57, 63, 100, 2)
    csc = ops.transpose(code)
    part = ops.outer(csc, list(values), list(A), first_feature=first, n_features=n)
    assert part.shape == (n, 63)
    judge(part, lambda values, A: plain(code)(values, A)[first : first + n], values, A)
    rest = ops.outer(csc, list(values), list(A), first_feature=first)
    assert rest.shape == (100 - first, 63)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_list_of_features_in_any_order_and_more_than_once(backend, isa):
    code, values, A = sources(57, 63, 100, 2)
    features = torch.tensor([99, 3, 3, 0, 41])
    with use_backend(backend):
        rows = ops.outer(ops.transpose(code), list(values), list(A), features=features)
        none = ops.outer(ops.transpose(code), list(values), list(A), features=features[:0])
    judge(rows, lambda values, A: plain(code)(values, A)[features], values, A)
    assert none.shape == (0, 63)


def test_touched_features_are_those_with_entries():
    code = random_code(2, 100)
    csc = ops.transpose(code)
    features = ops.touched(csc)
    assert features.tolist() == sorted(set(code.indices.tolist())) and 0 < len(features) < 100
    A = randn(2, 63)
    rows = ops.outer(csc, [code.magnitudes], [A], features=features)
    whole = torch.zeros(100, 63)
    whole[features] = rows
    assert_same_bits(whole, ops.outer(csc, [code.magnitudes], [A]))


@pytest.mark.parametrize("apart", [False, True])
def test_accumulates_into_out(apart, route, isa, monkeypatch):
    monkeypatch.setattr(crossovers, "CHUNK", 57 * 30)
    code, values, A = sources(57, 63, 100, 2)
    start = randn(100, 63, seed=9)
    out = strided(start) if apart else start.clone()
    returned = ops.outer(ops.transpose(code), list(values), list(A), out=out)
    assert returned is out
    judge(out, lambda start, values, A: start + plain(code)(values, A), start, values, A)


def test_accumulates_a_list_of_features_into_out(isa):
    code, values, A = sources(57, 63, 100, 1)
    features, start = torch.tensor([5, 99]), randn(2, 63, seed=9)
    out = start.clone()
    ops.outer(ops.transpose(code), list(values), list(A), features=features, out=out)
    judge(out, lambda start, values, A: start + plain(code)(values, A)[features], start, values, A)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_code_without_rows_or_entries_gives_zero_rows(backend):
    empty = random_code(9, 33)
    empty = replace(empty, indptr=empty.indptr * 0, indices=empty.indices[:0], values=empty.values[:, :0])
    with use_backend(backend):
        for code in (random_code(0, 33), empty):
            A = torch.zeros(code.batch, 5)
            assert_same_bits(ops.outer(ops.transpose(code), [code.magnitudes], [A]), torch.zeros(33, 5))


def test_a_nan_reaches_its_feature_only(route):
    code, values, A = sources(57, 63, 100, 1)
    values[0, 5] = float("nan")
    rows = ops.outer(ops.transpose(code), list(values), list(A))
    assert rows.isnan().any(1).nonzero()[:, 0].tolist() == [int(code.indices[5])]


def test_strides_do_not_matter(route):
    code, values, A = sources(57, 63, 100, 2)
    csc = ops.transpose(code)
    apart = replace(csc, colptr=strided(csc.colptr), rows=strided(csc.rows), perm=strided(csc.perm))
    expected = ops.outer(csc, list(values), list(A))
    assert_same_bits(expected, ops.outer(apart, list(strided(values)), list(strided(A))))
    assert_same_bits(expected, ops.outer(apart, list(strided(values)), [a.T.contiguous().T for a in A]))


def test_repeats_bit_for_bit_at_every_thread_count(isa):
    code, values, A = sources(257, 100, 1000, 2)
    csc, features = ops.transpose(code), torch.arange(0, 1000, 3)
    assert_repeats(lambda: ops.outer(csc, list(values), list(A)))
    assert_repeats(lambda: ops.outer(csc, list(values), list(A), features=features))


def test_dense_route_repeats_bit_for_bit(monkeypatch):
    monkeypatch.setitem(crossovers.CROSSOVER, "outer", -1.0)
    code, values, A = sources(257, 100, 1000, 2)
    csc = ops.transpose(code)
    assert_repeats(lambda: ops.outer(csc, list(values), list(A)), threads=())


@given(
    B=st.integers(0, 20), d=st.integers(1, 40), F=st.integers(1, 70), S=st.integers(1, 3), seed=st.integers(0, 1000),
    apart=st.booleans(), crossover=st.sampled_from([-1.0, 2.0]), data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_shape_stride_dtype_and_range_on_a_grid_is_exact(B, d, F, S, seed, apart, crossover, dtype, data):
    """Sums of at most 3 · 20 · 2: exact in bfloat16 too."""
    first = data.draw(st.integers(0, F))
    n = data.draw(st.integers(0, F - first))
    code = random_code(B, F, S, seed=seed)
    values, A = (code.values > 0.5).to(dtype), grid(S, B, d, step=1, reach=2, seed=seed).to(dtype)
    give = strided if apart else torch.clone
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crossovers.CROSSOVER, "outer", crossover)
        csc, A_given = ops.transpose(code), [give(a) for a in A]
        rows = ops.outer(csc, list(give(values)), A_given, first_feature=first, n_features=n)
    assert rows.dtype == dtype
    assert torch.equal(rows.double(), plain(code)(values.double(), A.double())[first : first + n])


CODE, VALUES, ROWS = sources(9, 5, 33, 1)
CSC = ops.transpose(CODE)
SOUND = dict(values=list(VALUES), A=list(ROWS))
BAD = {
    "no source": (dict(values=[], A=[]), "values, A: got 0 and 0"),
    "more values than A": (dict(values=[*VALUES, *VALUES]), "values, A: got 2 and 1"),
    "values too short": (dict(values=[VALUES[0, :-1]]), r"values\[0\]: got shape"),
    "a second A with fewer rows": (dict(values=[*VALUES] * 2, A=[*ROWS, ROWS[0, :-1]]), r"A\[1\]: got shape"),
    "a second A of another width": (dict(values=[*VALUES] * 2, A=[*ROWS, ROWS[0, :, :-1]]), r"A\[1\]: got shape"),
    "A of one dimension": (dict(A=[torch.zeros(9)]), r"A\[0\]: got shape"),
    "A of no dimension": (dict(A=[torch.tensor(0.0)]), r"A\[0\]: got shape"),
    "values of another dtype": (dict(values=[VALUES[0].double()]), r"values\[0\]: got torch.float64"),
    "a second A of another dtype": (dict(values=[*VALUES] * 2, A=[*ROWS, ROWS[0].double()]), r"A\[1\]: got torch.float64"),
    "integer values and A": (dict(values=[VALUES[0].long()], A=[ROWS[0].long()]), r"values\[0\]: got torch.int64"),
    "A with fewer rows than the code": (dict(A=[ROWS[0, :8]]), r"A\[0\]: got shape \(8, 5\)|rows"),
    "negative first feature": (dict(first_feature=-1, n_features=2), "first_feature, n_features: got -1"),
    "negative count": (dict(n_features=-1), "n_features: got 0, -1"),
    "a range past F": (dict(first_feature=30, n_features=4), "first_feature, n_features: got 30, 4"),
    "a listed feature of F": (dict(features=torch.tensor([3, 33])), "features: got values outside 0 … 32"),
    "a negative listed feature": (dict(features=torch.tensor([-1])), "features: got values outside"),
    "int32 features": (dict(features=torch.tensor([3], dtype=torch.int32)), "features: got torch.int32"),
    "features as a matrix": (dict(features=torch.tensor([[3]])), "features: got shape"),
    "out of another shape": (dict(out=torch.zeros(32, 5)), "out: got shape"),
    "out of another dtype": (dict(out=torch.zeros(33, 5, dtype=torch.float64)), "out: got torch.float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_names_it(case):
    change, message = BAD[case]
    kwargs = SOUND | change
    with use_backend("reference"), raises_and_changes_nothing(message, CSC, list(kwargs.values())):
        ops.outer(CSC, **kwargs)


@pytest.mark.parametrize("name, csc", corrupt_transposed(CSC))
def test_corrupt_entries_are_a_value_error(name, csc):
    with use_backend("reference"), raises_and_changes_nothing("colptr|rows|perm", csc, *SOUND.values()):
        ops.outer(csc, **SOUND)


@pytest.mark.parametrize("features", [None, torch.tensor([3, 3, 7])])
def test_opcheck(features):
    n = 33 if features is None else 3
    arguments = (CSC.colptr, CSC.rows, CSC.perm, [v.clone() for v in VALUES], list(ROWS), features, 0, 33)
    opcheck(torch.ops.sae_fast.outer.default, arguments)
    opcheck(torch.ops.sae_fast.outer_.default, (randn(n, 5), *arguments))
