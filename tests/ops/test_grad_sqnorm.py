"""ops.grad_sqnorm: the squared norm of a weight gradient that is never stored."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import (
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
from problems import bodies
from problems.grad_sqnorm import plain, problem, rows_of_gradient
from problems.outer import csc_of, shapes, size

from sae_fast import ops, use_backend
from sae_fast.code import RowGradient
from sae_fast.ops import crossovers


def gradient_of(code, values, A, own) -> RowGradient:
    return RowGradient(csc_of(code), list(values), list(A), own)


@cache
def trials_of(shape: tuple, S: int, own: bool, project: bool, n: int, parts: int) -> list:
    """(gradient, W rows, first feature, torch's norm, float64's).  A trial gives one number, so there are several: by seed,
    and by ranges of features."""
    trials, F = [], shape[2]
    for seed in range(n):
        code, values, A, W, coefficient = inputs = problem(*shape, S, own, seed)
        grads = [rows_of_gradient(*inputs, project, dtype) for dtype in (torch.float32, torch.float64)]
        for first in range(0, F, step := -(-F // parts)):
            rows = slice(first, min(first + step, F))
            gradient = gradient_of(code, values, A, None if coefficient is None else coefficient[rows])
            trials.append((gradient, W[rows], first, *(grad[rows].pow(2).sum() for grad in grads)))
    return trials


def judge_shapes(body: bodies.Body, given_shapes: list, S: int, own: bool, project: bool) -> None:
    for B, d, F in given_shapes:
        n, parts = 32 if F < 100 else 4 if B * d * F < 10**7 else 1, 1 if F < 100 else 8
        if body.of_gpu:
            n, parts = 1, 3 if F < 100 else 8
        judge = Judge()
        # With projection and d = 1 nothing is left but rounding: no relative error to judge.
        for gradient, rows, first, *expected in trials_of((B, d, F), S, own, project and d > 1, n, parts):
            out = body.run(ops.grad_sqnorm, gradient, rows, first_feature=first, project=project and d > 1)
            assert out.dtype == torch.float64 and out.shape == ()
            judge.add(f"norm² of {B, d, F}", out, *expected)
        judge.verdict()


@bodies.but_cuda
@pytest.mark.parametrize("project", [False, True])
def test_as_near_to_float64_as_torchs(project, body):
    judge_shapes(body, shapes(body), S=1, own=body.of_gpu, project=project)


@pytest.mark.slow(but=2, of_gpu=True)
@bodies.but_cuda
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("S", [3, 2])
def test_several_sources_and_a_self_coefficient(S, project, body):
    judge_shapes(body, shapes(body, S)[:1] if body.of_gpu else [(3, 63, 31), (57, 100, 400)], S, True, project)


@bodies.but_cuda
def test_projection_takes_out_a_gradient_along_the_row(body):
    """A self-coefficient alone is all along the row: what is left is rounding, as small as torch's."""
    code, values, A, W, own = problem(*size(body, 57, 63, 100), own=True)
    args = (code, values * 0, A, W, own)
    left = body.run(ops.grad_sqnorm, gradient_of(code, values * 0, A, own), W, project=True).sqrt()
    whole = plain(*args, False, torch.float64).sqrt()
    torchs = plain(*args, True, torch.float32).double().sqrt()
    assert left <= 2 * torchs + 2.0**-24 * whole


@bodies.but_cuda
@pytest.mark.parametrize("project", [False, True])
def test_a_zero_row_is_not_projected_and_a_nan_reaches_the_norm(project, body):
    code, values, A, W, _ = problem(*size(body, 57, 63, 100))
    W[0] = 0
    gradient = gradient_of(code, values, A, None)
    assert bool(body.run(ops.grad_sqnorm, gradient, W, project=project).isfinite())
    assert bool(body.run(ops.grad_sqnorm, gradient, W[:1], project=project) > 0)
    values[0, 5] = float("nan")
    assert bool(body.run(ops.grad_sqnorm, gradient_of(code, values, A, None), W, project=project).isnan())


@bodies.but_cuda
def test_no_entries_have_norm_zero(body):
    code = random_code(0, 33)
    gradient = gradient_of(code, code.values[:1], torch.zeros(1, 0, 5), None)
    assert body.run(ops.grad_sqnorm, gradient, randn(33, 5)) == 0


@bodies.but_cuda
@pytest.mark.parametrize("project", [False, True])
def test_strides_do_not_matter(project, body):
    code, values, A, W, own = problem(*size(body, 57, 63, 100), 2, own=True)
    gradient = gradient_of(code, values, A, own)
    csc = replace(gradient.csc, **{n: strided(getattr(gradient.csc, n)) for n in ("colptr", "rows", "perm")})
    apart = RowGradient(csc, list(strided(values)), list(strided(A)), strided(own))
    expected = body.run(ops.grad_sqnorm, gradient, W, project=project)
    equal = torch.testing.assert_close if body.backend == "reference" else assert_same_bits  # torch sums by strides
    equal(expected, body.run(ops.grad_sqnorm, apart, strided(W), project=project))


@bodies.but_cuda
@pytest.mark.parametrize("project", [False, True])
def test_repeats_bit_for_bit_at_every_thread_count(project, body):
    code, values, A, W, own = problem(*size(body, 257, 100, 1000), 2, own=True)
    gradient = gradient_of(code, values, A, own)
    assert_repeats(lambda: body.run(ops.grad_sqnorm, gradient, W, project=project), body.threads)


@bodies.but_cuda
@pytest.mark.parametrize("magnitude", [1e20, 1e-25])
def test_squares_beyond_float32_are_summed_in_float64(magnitude, body):
    code, _, A, W, _ = problem(*size(body, 9, 5, 33))
    gradient = gradient_of(code, torch.ones(1, code.nnz), torch.full_like(A, magnitude), None)
    counts = gradient.csc.colptr.diff().double()
    want = (counts * float(torch.tensor(magnitude))).pow(2).sum() * W.shape[1]
    torch.testing.assert_close(body.run(ops.grad_sqnorm, gradient, W), want, rtol=1e-6, atol=0)


@given(
    B=st.integers(1, 20), d=st.integers(1, 40), F=st.integers(1, 70), S=st.integers(1, 3), seed=st.integers(0, 1000),
    crossover=st.sampled_from([-1.0, 2.0]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_on_a_grid_it_is_exact(B, d, F, S, seed, crossover, dtype):
    code = random_code(B, F, S, seed=seed)
    values, A = (code.values > 0.5).to(dtype), grid(S, B, d, step=1, reach=2, seed=seed).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crossovers.CROSSOVER, "weight_step", crossover)
        norm = ops.grad_sqnorm(gradient_of(code, values, A, None), randn(F, d, dtype=dtype))
    assert norm == plain(code, values, A, torch.zeros(F, d), None, False, torch.float64)


CODE, VALUES, ROWS, W, OWN = problem(9, 5, 33, own=True)
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
