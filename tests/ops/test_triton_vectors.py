"""What a GPU's step does with one number a feature: sums over entries, the check before a change, vectors' steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_close_2x, assert_same_bits, both, dense, randn
from problems.bodies import moved
from problems.outer import csc_of, long_code
from problems.weight_step import ADAM, STEP, State, make_step

pytest.importorskip("triton")

from problems.gapped import DEVICE, Gapped

from sae_fast import use_backend
from sae_fast.code import RowGradient, Rows
from sae_fast.kernels import vectors
from sae_fast.kernels import weight_step as step_kernels
from sae_fast.kernels.flag import NOT_FINITE_LOSS, STALE

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("n", [1, 4])
def test_sums_by_feature(n):
    """Of features without entries, and of one with more than a program takes at once; what is between the rows is no
    part of them."""
    code = long_code(300, 9)
    columns, also = randn(code.nnz, n, seed=1), randn(code.nnz, seed=2)
    gapped = Gapped(replace(code, values=torch.cat([columns.T, also[None]])), torch.float32)
    csc, there = gapped.transposed(), gapped.values[:n].T.contiguous()
    found = vectors.sums(csc, there, gapped.values[n].contiguous())
    judged = both(lambda values: dense(code, values).sum(1), torch.cat([columns.T, also[None]]))
    assert_close_2x(found.cpu(), *judged)
    assert_same_bits(found, vectors.sums(csc, there, gapped.values[n].contiguous()))
    assert_same_bits(found[:n], vectors.sums(csc, there))


def gradients(own: bool = True) -> dict:
    """The arguments of check_finite: of 1100 examples with 5 entries, of 3 features, d = 600."""
    csc = moved(csc_of(long_code(1100, 3)), DEVICE)
    C = csc.rows.shape[0]
    norms = torch.rand(1100, 5).to(DEVICE) + 1  # a scale, and squares of two slices
    encoder, *decoder = ([torch.rand(C).to(DEVICE)] for _ in range(3))
    return dict(
        losses=torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).to(DEVICE), norms=norms,
        encoder=RowGradient(csc, encoder, [norms]),
        decoder=RowGradient(csc, [*decoder[0], *decoder[1]], [norms] * 2, torch.rand(3).to(DEVICE) if own else None),
        vectors=[torch.rand(n).to(DEVICE) for n in (3, 3, 3, 2000)],
    )  # fmt: skip


def flag_of(given: dict) -> int:
    flag = torch.full((), STALE, dtype=torch.int32).to(DEVICE)
    by_name = dict(
        W_enc=given["encoder"], W_dec=given["decoder"], **{f"vector {k}": g for k, g in enumerate(given["vectors"])}
    )
    vectors.check_finite(given["losses"], given["norms"], by_name, flag)
    assert int(flag) & STALE
    return int(flag) & ~STALE


PLACES = {
    "a loss": lambda g: g["losses"][:1], "sparsity": lambda g: g["losses"][1:2],
    "the auxiliary loss": lambda g: g["losses"][2:],
    "a row": lambda g: g["norms"][1099, 3:4], "delta": lambda g: g["encoder"].values[0][-1:],
    "a magnitude": lambda g: g["decoder"].values[0][1:2], "a gate": lambda g: g["decoder"].values[1][-1:],
    "a coefficient": lambda g: g["decoder"].self_coefficient[2:],
    **{f"vector {k}": lambda g, k=k: g["vectors"][k][-1:] for k in range(4)},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_not_finite_sets_the_flag(place):
    for value in (INF, -INF, NAN):
        given = gradients()
        assert flag_of(given) == 0
        PLACES[place](given).fill_(value)
        assert flag_of(given) == NOT_FINITE_LOSS


@pytest.mark.parametrize("place, largest", [("delta", 1.3e35), ("a magnitude", 5.3e33), ("a gate", 5.3e33)])
def test_a_weights_gradient_that_might_overflow_sets_the_flag(place, largest):
    """1100 times the value times the longest row: √(1.5² + 2²) of x, √(1100 · 3) of the residuals."""
    for part, wanted in ((0.9, 0), (1.1, NOT_FINITE_LOSS)):
        given = gradients(own=False)
        given["norms"][5] = torch.tensor([1.0, 1.5**2, 0.0, 2.0**2, 0.0])
        PLACES[place](given).fill_(part * largest)
        assert flag_of(given) == wanted


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_vectors_step_and_visits_are_noted_as_by_a_launch_for_each(beta1, scale):
    step, momentum = make_step(40, 70, 300, momentum=beta1 > 0, long=True), beta1 > 0
    csc = moved(csc_of(step.code), DEVICE)
    adam = step_kernels.new_adam(DEVICE)
    step_kernels.set_adam(adam, beta1=beta1, **ADAM)

    def fresh():
        """Four vectors with gradients, and two weights at other last steps."""
        some = [make_step(1, 1, n, momentum=momentum, seed=n).state for n in (300, 300, 5, 700)]
        given = [(rows_of(state), randn(state.W.shape[0], seed=9).to(DEVICE)) for state in some]
        weights = [rows_of(make_step(40, 70, 300, momentum=momentum, seed=seed).state, False) for seed in (1, 2)]
        return given, weights

    grad_scale = None if scale is None else torch.tensor(scale).to(DEVICE)
    for skip in (0, 4):
        update = step_kernels.Update(adam, False, grad_scale, torch.tensor(skip, dtype=torch.int32).to(DEVICE))
        given, weights = fresh()
        decays = vectors.step_vectors(given, [(rows, csc.colptr) for rows in weights], update)
        apart, others = fresh()
        for rows, g in apart:
            step_kernels.row_step(Rows(*(None if t is None else column(t) for t in rows)), g[:, None], update)
        assert_same_bits([parts(rows) for rows, _ in given], [parts(rows) for rows, _ in apart])
        wanted = [step_kernels._decay(rows, csc.colptr, update, 0) for rows in others]
        assert_same_bits([parts(rows) for rows in weights], [parts(rows) for rows in others])
        if skip:
            assert_same_bits([parts(rows) for rows, _ in given], [parts(rows) for rows, _ in fresh()[0]])
            continue
        assert_same_bits(list(decays), wanted)
        assert bool((decays[0] < 0).any()) and bool((decays[0] >= 0).any())


def rows_of(state: State, vector: bool = True) -> Rows:
    W, v, m = (None if t is None else t.clone().to(DEVICE) for t in (state.W, state.v, state.m))
    last_step = state.last_step.clone().to(DEVICE)
    assert int(last_step.max()) < STEP
    return Rows(*((t if t is None or not vector else t[:, 0].contiguous()) for t in (W, v)), last_step, None,
                m if m is None or not vector else m[:, 0].contiguous())  # fmt: skip


def column(t: torch.Tensor) -> torch.Tensor:
    return t[:, None] if t.is_floating_point() else t


def parts(rows: Rows) -> list[torch.Tensor]:
    return [t for t in rows if t is not None]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_weight_step_takes_visits_that_are_noted_already(beta1):
    step = make_step(40, 20, 9, unit=True, long=True, momentum=beta1 > 0)
    adam = step_kernels.new_adam(DEVICE)
    step_kernels.set_adam(adam, beta1=beta1, **ADAM)
    gapped = Gapped(replace(step.code, values=step.values), torch.float32)
    gradient = RowGradient(gapped.transposed(), list(gapped.values), list(step.A.to(DEVICE)))
    one, two = (rows_of(step.state, False) for _ in range(2))
    update = step_kernels.Update(adam, True)
    step_kernels.weight_step(one, gradient, update)
    (decay,) = vectors.step_vectors([], [(two, gradient.csc.colptr)], update)
    step_kernels.weight_step(two, gradient, update, decay=decay)
    assert_same_bits(parts(one), parts(two))
