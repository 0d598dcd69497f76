"""ops.grad_sqnorm: the squared norm of a weight gradient that is never stored."""

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
    corrupt_transposed,
    grid,
    opcheck,
    raises_and_changes_nothing,
    randn,
    random_code,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from problems.grad_sqnorm import CODE, OWN, ROWS, VALUES, W, plain, problem, rows_of_gradient

from sae_fast import ops, use_backend
from sae_fast.code import RowGradient
from sae_fast.ops import crossovers


def gradient_of(code, values, A, own) -> RowGradient:
    return RowGradient(ops.transpose(code), list(values), list(A), own)


@cache
def trials_of(B: int, d: int, F: int, S: int, own: bool, project: bool) -> list:
    """(gradient, W rows, first feature, torch's norm, float64's).  A trial gives one number, so there are several: by
    seed, or by ranges of features of a large gradient."""
    trials = []
    for seed in range(32 if F < 100 else 4 if B * d * F < 10**7 else 1):
        inputs = problem(B, d, F, S, own, seed)
        gradient, W, coefficient = gradient_of(*inputs[:3], inputs[4]), inputs[3], inputs[4]
        grads = [rows_of_gradient(*inputs, project, dtype) for dtype in (torch.float32, torch.float64)]
        step = F if F < 100 else -(-F // 8)
        for first in range(0, F, step):
            rows = slice(first, min(first + step, F))
            part = gradient if coefficient is None else replace(gradient, self_coefficient=coefficient[rows])
            trials.append((part, W[rows], first, *(grad[rows].pow(2).sum() for grad in grads)))
    return trials


def judge_shape(shape, S: int, own: bool, project: bool) -> None:
    judge = Judge()
    for gradient, rows, first, *expected in trials_of(*shape, S, own, project):
        out = ops.grad_sqnorm(gradient, rows, first_feature=first, project=project)
        assert out.dtype == torch.float64 and out.shape == ()
        judge.add("norm²", out, *expected)
    judge.verdict()


# With projection and d = 1 nothing is left but rounding: no relative error to judge.
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 1], ids=str)
def test_as_near_to_float64_as_torchs(shape, project, route):
    judge_shape(shape, S=1, own=False, project=project)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] == 1], ids=str)
def test_of_a_vector_parameter(shape, route):
    judge_shape(shape, S=1, own=False, project=False)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("shape", [(3, 63, 31), (57, 100, 400)], ids=str)
def test_several_sources_and_a_self_coefficient_on_every_instruction_set(shape, project, isa, monkeypatch):
    monkeypatch.setitem(crossovers.CROSSOVER, "outer", 2.0)
    judge_shape(shape, S=3, own=True, project=project)


@pytest.mark.parametrize("shape", FEW_SHAPES[1:2], ids=str)
def test_reference_body_meets_the_same_contract(shape):
    with use_backend("reference"):
        judge_shape(shape, S=2, own=True, project=True)


def test_projection_takes_out_a_gradient_along_the_row(route):
    """A self-coefficient alone is all along the row: what is left is rounding, as small as torch's."""
    code, values, A, W, own = problem(57, 63, 100, own=True)
    args = (code, values * 0, A, W, own)
    left = ops.grad_sqnorm(gradient_of(code, values * 0, A, own), W, project=True).sqrt()
    whole = plain(*args, False, torch.float64).sqrt()
    torchs = plain(*args, True, torch.float32).double().sqrt()
    assert left <= 2 * torchs + 2.0**-24 * whole


@pytest.mark.parametrize("project", [False, True])
def test_a_zero_row_is_not_projected(project, route):
    code, values, A, W, _ = problem(57, 63, 100)
    W[3] = 0
    norm = ops.grad_sqnorm(gradient_of(code, values, A, None), W, project=project)
    assert bool(norm.isfinite())
    alone = ops.grad_sqnorm(gradient_of(code, values, A, None), W[3:4], first_feature=3, project=project)
    assert bool(alone > 0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_entries_have_norm_zero(backend):
    with use_backend(backend):
        code = random_code(0, 33)
        assert ops.grad_sqnorm(gradient_of(code, code.values[:1], torch.zeros(1, 0, 5), None), randn(33, 5)) == 0


def test_a_nan_reaches_the_norm(route):
    code, values, A, W, _ = problem(9, 63, 33)
    values[0, 5] = float("nan")
    assert bool(ops.grad_sqnorm(gradient_of(code, values, A, None), W).isnan())


def test_strides_do_not_matter(route):
    code, values, A, W, own = problem(57, 63, 100, 2, own=True)
    gradient = gradient_of(code, values, A, own)
    csc = replace(gradient.csc, **{n: strided(getattr(gradient.csc, n)) for n in ("colptr", "rows", "perm")})
    apart = RowGradient(csc, list(strided(values)), list(strided(A)), strided(own))
    for project in (False, True):
        expected = ops.grad_sqnorm(gradient, W, project=project)
        assert_same_bits(expected, ops.grad_sqnorm(apart, strided(W), project=project))


@pytest.mark.parametrize("project", [False, True])
def test_repeats_bit_for_bit_at_every_thread_count(project, isa, monkeypatch):
    monkeypatch.setitem(crossovers.CROSSOVER, "outer", 2.0)
    code, values, A, W, own = problem(257, 100, 1000, 2, own=True)
    gradient = gradient_of(code, values, A, own)
    assert_repeats(lambda: ops.grad_sqnorm(gradient, W, project=project))


@given(
    B=st.integers(1, 20), d=st.integers(1, 40), F=st.integers(1, 70), S=st.integers(1, 3), seed=st.integers(0, 1000),
    crossover=st.sampled_from([-1.0, 2.0]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_on_a_grid_it_is_exact(B, d, F, S, seed, crossover, dtype):
    code = random_code(B, F, S, seed=seed)
    values, A = (code.values > 0.5).to(dtype), grid(S, B, d, step=1, reach=2, seed=seed).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crossovers.CROSSOVER, "outer", crossover)
        norm = ops.grad_sqnorm(gradient_of(code, values, A, None), randn(F, d, dtype=dtype))
    assert norm == plain(code, values, A, torch.zeros(F, d), None, False, torch.float64)


SOUND = gradient_of(CODE, VALUES, ROWS, OWN)
BAD = {
    "W of one dimension": (SOUND, dict(W=torch.zeros(33)), "W: got shape"),
    "integer W": (SOUND, dict(W=torch.zeros(33, 5, dtype=torch.int64)), "W: got torch.int64"),
    "W of another dtype": (SOUND, dict(W=torch.zeros(33, 5, dtype=torch.float64)), "got torch.float32|got torch.float64"),
    "W of another width": (SOUND, dict(W=torch.zeros(33, 4)), r"A\[0\]: got shape"),
    "more rows than features": (
        replace(SOUND, self_coefficient=None), dict(W=torch.zeros(34, 5)), "first_feature: got 0 with 34"),
    "negative first feature": (SOUND, dict(first_feature=-1), "first_feature: got -1"),
    "no source": (replace(SOUND, values=[], A=[]), {}, "values, A: got 0 and 0"),
    "values too short": (replace(SOUND, values=[VALUES[0, :-1]]), {}, r"values\[0\]: got shape"),
    "self-coefficient too short": (replace(SOUND, self_coefficient=OWN[:-1]), {}, "self_coefficient: got shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_value_error_that_names_it(case):
    gradient, change, message = BAD[case]
    kwargs = dict(W=W) | change
    with use_backend("reference"), raises_and_changes_nothing(message, gradient, kwargs["W"]):
        ops.grad_sqnorm(gradient, **kwargs)


@pytest.mark.parametrize("name, csc", corrupt_transposed(SOUND.csc))
def test_corrupt_entries_are_a_value_error(name, csc):
    with use_backend("reference"), raises_and_changes_nothing("colptr|rows|perm", csc, W):
        ops.grad_sqnorm(replace(SOUND, csc=csc), W)


def test_opcheck():
    csc = SOUND.csc
    arguments = (W, csc.colptr, csc.rows, csc.perm, SOUND.values, SOUND.A, OWN, 0, True)
    opcheck(torch.ops.sae_fast.grad_sqnorm.default, arguments)


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_squares_beyond_float32_are_summed_in_float64(size):
    code = random_code(9, 33)
    csc = ops.transpose(code)
    gradient = RowGradient(csc, [torch.ones(code.nnz)], [torch.full((9, 5), size)])
    counts = csc.colptr.diff().double()
    want = (counts * float(torch.tensor(size))).pow(2).sum() * 5
    torch.testing.assert_close(ops.grad_sqnorm(gradient, randn(33, 5)), want, rtol=1e-6, atol=0)
