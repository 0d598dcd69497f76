"""ops.outer: weight gradients by feature, whole, by range, by list, and accumulated."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from helpers import (
    Judge,
    assert_close_2x,
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
from problems import bodies
from problems.bodies import every_schedule, misaligned, moved
from problems.outer import csc_of, plain, shapes, size, sources

from sae_fast import ops, use_backend
from sae_fast.code import RowGradient
from sae_fast.ops import crossovers


@cache
def trials_of(shape: tuple, S: int, dtype: torch.dtype, n: int) -> list:
    """(csc, values, A, torch's rows, float64's)."""
    trials, (B, d, F) = [], shape
    for seed in range(n):
        code, values, A = sources(B, d, F, S, seed, dtype)
        trials.append((csc_of(code), list(values), list(A), *both(plain(code), values, A)))
    return trials


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("S", [3, 2, 1])
def test_as_near_to_float64_as_torchs(S, body, monkeypatch):
    for shape, dtype in product(shapes(body, S), body.dtypes):
        B, d, F = shape
        monkeypatch.setattr(crossovers, "CHUNK", B * max(3, F // 4))  # F = 4099: blocks of 1024 and a last one of 3
        result = Judge()
        for csc, values, A, *expected in trials_of(shape, S, dtype, 1 if body.of_gpu else len(seeds(F * d))):
            rows = body.run(ops.outer, csc, values, A)
            assert rows.dtype == dtype and not rows[csc.colptr.diff() == 0].any()
            result.add(f"{shape} {dtype}", rows, *expected)
        result.verdict()


@bodies.every
def test_a_vector_parameters_gradient_is_the_sum_of_its_values(body):
    code, values, A = sources(*size(body, 257, 1, 100), 1)
    rows = body.run(ops.outer, csc_of(code), list(values), [torch.ones_like(A[0, :, :1])])
    assert rows.shape == (code.d_sae, 1)
    judge(rows[:, 0], lambda values: dense(code, values)[0].sum(0), values)


@bodies.every
def test_ranges_and_lists_have_the_rows_of_the_whole_and_are_accumulated(body, monkeypatch):
    """Features in any order and more than once; bit for bit but where a product sums in an order of its own."""
    for (B, d, F), dtype in product([size(body, 57, 63, 100), *shapes(body)[2:3] * body.of_gpu], body.dtypes):
        monkeypatch.setattr(crossovers, "CHUNK", B * 10)
        code, values, A = sources(B, d, F, 2, dtype=dtype)
        given_, exact = (csc_of(code), list(values), list(A)), both(plain(code), values, A)
        whole, start, listed = (
            body.run(ops.outer, *given_),
            randn(F, d, seed=9, dtype=dtype),
            torch.tensor([F - 1, 0, 0, 3]),
        )
        spans = [(0, F // 3), (F // 4, F // 2), (F - 1, 1), (F, 0), (F // 2, None)]
        asked = [(slice(a, F if n is None else a + n), dict(first_feature=a, n_features=n)) for a, n in spans]
        asked += [(some, dict(features=some)) for some in (listed, listed[:0])]
        for (at, how), apart in zip(asked, (strided, torch.clone) * 4, strict=False):
            rows, out = body.run(ops.outer, *given_, **how), apart(start[at])
            assert_close_2x(rows, *(t[at] for t in exact))
            if body.exact:
                assert_same_bits(rows, whole[at])
            sums = body.run(ops.outer, *given_, **how, out=out)
            assert body.device == "cuda" or sums is out
            assert_close_2x(sums, *(start[at].to(t.dtype) + t[at] for t in exact))
            idle = given_[0].colptr.diff()[at] == 0
            assert_same_bits(sums[idle], start[at][idle])


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


@bodies.every
def test_a_code_without_rows_or_entries_gives_zero_rows(body):
    empty = random_code(9, 33)
    empty = replace(empty, indptr=empty.indptr * 0, indices=empty.indices[:0], values=empty.values[:, :0])
    for code in (random_code(0, 33), empty):
        rows = body.run(ops.outer, csc_of(code), [code.magnitudes], [torch.zeros(code.batch, 5)])
        assert_same_bits(rows, torch.zeros(33, 5))


@bodies.every
def test_what_is_not_finite_reaches_its_features_only(body):
    """A value; and a row, but where a product multiplies it by zeros."""
    code, values, A = sources(*size(body, 57, 63, 100), 1)
    csc, (values,), (A,) = csc_of(code), values, A
    before = body.run(ops.outer, csc, [values], [A])
    for name, given_ in {"value": values, "row": A}.items() if body.exact else {"value": values}.items():
        given_ = given_.clone()
        given_[0] = float("nan") if name == "value" else float("inf")
        found = body.run(ops.outer, csc, *([given_], [A]) if name == "value" else ([values], [given_]))
        hit = torch.zeros(code.d_sae, dtype=torch.bool)
        hit[code.indices[: 1 if name == "value" else code.indptr[1]].long()] = True
        assert hit.any() and not found[hit].isfinite().any(), name
        equal = assert_same_bits if body.exact else torch.testing.assert_close
        equal(found[~hit], before[~hit])


@bodies.every
def test_strides_do_not_matter(body):
    code, values, A = sources(*size(body, 57, 63, 100), 2)
    csc = csc_of(code)
    apart = replace(csc, colptr=strided(csc.colptr), rows=strided(csc.rows), perm=strided(csc.perm))
    expected = body.run(ops.outer, csc, list(values), list(A))
    assert_same_bits(expected, body.run(ops.outer, apart, list(strided(values)), list(strided(A))))
    columns = [a.T.contiguous().T for a in A]
    assert_same_bits(expected, body.run(ops.outer, apart, list(strided(values)), columns))


@bodies.every
def test_repeats_bit_for_bit_at_every_thread_count(body):
    code, values, A = sources(*size(body, 257, 100, 1000), 2)
    given_, features = (csc_of(code), list(values), list(A)), torch.arange(0, code.d_sae, 3)
    assert_repeats(lambda: body.run(ops.outer, *given_), body.threads)
    assert_repeats(lambda: body.run(ops.outer, *given_, features=features), body.threads)


# ---- What a GPU's kernels have to themselves -------------------------------------------------------------------------


@bodies.of_gpu
@pytest.mark.parametrize("d", [4, 20])
def test_neither_gaps_nor_room_nor_a_schedule_change_a_bit(d, body):
    from problems.gapped import Gapped

    from sae_fast.kernels import outer as kernels

    code, values, A = sources(42, d, 21, 2)
    expected = every_schedule(body, lambda: body.run(ops.outer, csc_of(code), list(values), list(A)))
    gapped, out = Gapped(replace(code, values=values), values.dtype), torch.full((21, d), float("nan"), device=body.device)
    gradient = RowGradient(gapped.transposed(), list(gapped.values), moved(list(A), body.device))
    kernels.outer(gradient, out, runs=kernels.runs(gradient.csc.colptr, gapped.capacity), accumulate=False)
    assert_same_bits(expected, out.cpu())


@pytest.mark.kernels
def test_runs_are_those_of_the_long_features(monkeypatch):
    pytest.importorskip("triton")
    from sae_fast.kernels import _config
    from sae_fast.kernels import outer as kernels

    for generation in _config.SHIPPED.values():
        monkeypatch.setitem(generation, "outer", {**generation["outer"], "run": 5})
    colptr = torch.tensor([0, 11, 16, 16, 22, 23])  # 11, 5, 0, 6 and 1 entries
    runs = kernels.runs(moved(colptr, "cuda" if bodies.GPU else "cpu"), 30)
    assert runs.first.tolist() == [0, 3, 3, 3, 5, 5]
    assert runs.owner.tolist() == [0, 0, 0, 3, 3] + [5] * 8


@pytest.mark.kernels
@pytest.mark.parametrize("d", [4, 60, 128])
def test_cuda_sums_from_anywhere_in_memory_and_without_runs(d, cuda_calls):
    """Feature 0 has two warps' worth of 32 entries and four more."""
    body = bodies.Body("cuda")
    for dtype in body.dtypes:
        code, values, A = sources(70, d, 21, 2, dtype=dtype)
        csc, values, A = moved((csc_of(code), list(values), list(A)), body.device)
        rows = ops.outer(csc, values, A)
        assert_close_2x(rows.cpu(), *both(plain(code), torch.stack(values).cpu(), torch.stack(A).cpu()))
        out = torch.zeros_like(rows)
        assert_same_bits(rows, ops.outer(csc, values, [A[0], misaligned(A[1])], out=misaligned(out)))
        assert_same_bits(rows, ops.outer(csc, values, A, out=out))
    assert set(cuda_calls) == {"outer"}


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
    "A with fewer rows than the code": (dict(A=[ROWS[0, :7]]), r"A\[0\]: got shape \(7, 5\)|rows"),
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
