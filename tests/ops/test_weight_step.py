"""ops.weight_step and ops.row_step: exact lazy Adam on the touched rows of a weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import (
    Judge,
    assert_repeats,
    assert_same_bits,
    corrupt_transposed,
    dense,
    grid,
    opcheck,
    raises_and_changes_nothing,
    randn,
    random_code,
    same_bits,
    seeds,
    strided,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import bodies
from problems.bodies import moved
from problems.outer import csc_of, shapes, size
from problems.weight_step import ADAM, STEP, State, Step, add_state, make_step, plain, plain_moments, stepped

from sae_fast import ops, use_backend
from sae_fast.code import RowGradient
from sae_fast.ops import crossovers


def judge_steps(
    body: bodies.Body, steps: list[Step], unit_rows: bool, scale: float | None = None, adam: dict = ADAM
) -> State:
    """Judges W and v of all steps together; returns the last state."""
    judge, grad_scale = Judge(), None if scale is None else torch.tensor(scale)
    for step in steps:
        after = stepped(body, step, unit_rows, adam, grad_scale=grad_scale)
        add_state(judge, after, step, unit_rows, scale, adam)
    judge.verdict()
    return after


# ---- The step --------------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=2, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("S", [3, 2, 1])
def test_as_near_to_float64_as_torchs(S, unit_rows, body, monkeypatch):
    for B, d, F in shapes(body, S):
        if body.of_gpu and unit_rows and d == 1:  # it never moves
            continue
        monkeypatch.setattr(crossovers, "CHUNK", (B + d) * max(3, F // 4))  # F = 4099: blocks of 1024 and a last one of 3
        trials = range(1) if body.of_gpu else seeds(F * d)
        steps = [make_step(B, d, F, S, unit=unit_rows, own=S > 1, seed=seed, long=True) for seed in trials]
        judge_steps(body, steps, unit_rows, 0.7 if S == 3 else None)


@bodies.every
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("scale", [None, 1e-3, 30.0])
def test_beta2_and_the_gradient_scale(scale, beta2, body):
    adam = ADAM | dict(beta2=beta2, eps=1.0)  # at β2 = 0 the step is g / (|g| + eps): a small eps would blow up rounding
    trials = range(1 if body.of_gpu else 3)
    judge_steps(body, [make_step(*size(body, 57, 63, 100), seed=seed) for seed in trials], False, scale, adam)


@bodies.every
@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_touched_row_with_zero_gradient_still_decays(unit_rows, body):
    """As the decoder rows of S \\ S′: no step, v decays, last_step advances, the row is renormalised; after a step at rest
    by exactly β2."""
    step = make_step(*size(body, 57, 63, 100), unit=unit_rows)
    nothing, touched = replace(step, values=step.values * 0), step.touched()
    after = judge_steps(body, [nothing], unit_rows)
    assert bool((after.v[touched] < step.state.v[touched]).all())
    state = replace(step.state, last_step=torch.full_like(step.state.last_step, STEP - 1))
    after = judge_steps(body, [replace(nothing, state=state)], unit_rows)
    if not unit_rows:
        assert_same_bits(after.W, step.state.W)
        assert_same_bits(after.v[touched], step.state.v[touched] * torch.tensor(ADAM["beta2"], dtype=torch.float32))


@bodies.every
def test_a_zero_row_with_unit_rows_stays_finite(body):
    step = make_step(*((9, 19, 33) if body.of_gpu else (57, 63, 100)), unit=True)
    for values in (step.values, step.values * 0):
        with use_backend("reference"):
            gradient = replace(step, values=values).gradient()
        state = moved(step.state.clone().tensors(), body.device)
        state[0][3] = 0
        ops.weight_step(*state, moved(gradient, body.device), unit_rows=True, **ADAM)
        assert all(bool(t.isfinite().all()) for t in state[:2])


@bodies.every
def test_unit_rows_take_out_a_gradient_along_the_row(body):
    """A self-coefficient alone is all along the row: nothing of it is left."""
    step = make_step(*size(body, 57, 63, 100), unit=True, own=True)
    own, judge = replace(step, values=step.values * 0), Judge()
    judge.add("W", stepped(body, own, True).W, *(plain(own, dtype, True)[0] for dtype in (torch.float32, torch.float64)))
    judge.verdict()


@bodies.every
@pytest.mark.parametrize("unit_rows", [False, True])
def test_ranges_of_features_step_as_the_whole(unit_rows, body):
    """A weight split at any feature, as on two ranks; the same bits but where a product sums in an order of its own."""
    step = make_step(*size(body, 57, 63, 100), S=2, unit=unit_rows, own=True, long=True)
    whole, F = stepped(body, step, unit_rows), step.code.d_sae
    for first in (1, F - 3) if body.of_gpu else (0, 1, F // 2, F - 3, F):
        judge, (parts, gradient) = Judge(), moved((step.state.clone(), step.gradient()), body.device)
        for a, b in ((0, first), (first, F)):
            own = replace(gradient, self_coefficient=gradient.self_coefficient[a:b])
            ops.weight_step(*(t[a:b] for t in parts.tensors()), own, first_feature=a, unit_rows=unit_rows, **ADAM)
        add_state(judge, moved(parts, "cpu"), step, unit_rows)
        judge.verdict()
        assert not body.exact or (same_bits(moved(parts.W, "cpu"), whole.W) and same_bits(moved(parts.v, "cpu"), whole.v))


@bodies.every
def test_skip_makes_the_call_a_no_op(body):
    """Whatever number says so, where all of it is read."""
    step = make_step(*size(body, 57, 63, 100))
    taken = stepped(body, step)
    assert not same_bits(taken.W, step.state.W)
    for dtype in (torch.bool, torch.int16, torch.int32, torch.int64):
        skip = torch.tensor(1 if dtype == torch.bool else 256).to(dtype)
        assert_same_bits(stepped(body, step, skip=skip), step.state)
        assert_same_bits(stepped(body, step, skip=torch.zeros_like(skip)), taken)


@bodies.every
def test_no_entries_change_nothing(body):
    step = make_step(9, 63, 33)
    empty = replace(step.code, indptr=step.code.indptr * 0, indices=step.code.indices[:0])
    for code, A in ((empty, step.A), (random_code(0, 33), torch.zeros(1, 0, 63))):
        gradient = RowGradient(csc_of(code), [torch.zeros(0)], list(A))
        assert_same_bits(stepped(body, step, True, gradient=gradient), step.state)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_trajectory_with_idle_rows_is_torch_optim_adams(unit_rows, backend, isa):
    """From v = 0 over 15 steps, on gradients that are exact in float32, so that no rounding becomes a full step."""
    start = torch.nn.functional.normalize(randn(40, 6), dim=1)
    state = State(start.clone(), torch.zeros(40, 6), torch.zeros(40, dtype=torch.int64))
    dense_W = {dtype: start.to(dtype, copy=True) for dtype in (torch.float32, torch.float64)}
    adams = {dtype: torch.optim.Adam([W], lr=0.05, betas=(0.0, 0.99), eps=1e-4) for dtype, W in dense_W.items()}
    for k in range(1, 16):
        code = random_code(2, 40, 1, density=0.15, seed=k)
        values, A = (code.values > 0.5).float(), grid(1, 2, 6, step=0.5, reach=3, seed=k)
        with use_backend(backend):
            gradient = RowGradient(ops.transpose(code), list(values), list(A))
            ops.weight_step(*state.tensors(), gradient, step=k, lr=0.05, beta2=0.99, eps=1e-4, unit_rows=unit_rows)
        for dtype, W in dense_W.items():
            W.grad = (dense(code, values.to(dtype))[0].T @ A[0].to(dtype)).clone()
            if unit_rows:
                W.grad -= (W.grad * W).sum(1, keepdim=True) * W
            adams[dtype].step()
            if unit_rows:
                W /= W.norm(dim=1, keepdim=True)
    assert bool((state.last_step < 15).any())
    judge = Judge()
    judge.add("W", state.W, dense_W[torch.float32], dense_W[torch.float64])
    v = {dtype: adams[dtype].state[W]["exp_avg_sq"] for dtype, W in dense_W.items()}
    judge.add("v", state.v_now(0.99, 15), v[torch.float32], v[torch.float64])
    judge.verdict()


@bodies.every
def test_a_nan_in_a_gradient_reaches_its_row_only(body):
    step = make_step(*size(body, 57, 63, 100))
    values = step.values.clone()
    values[0, 5] = float("nan")
    state = stepped(body, replace(step, values=values))
    assert state.W.isnan().any(1).nonzero()[:, 0].tolist() == [int(step.code.indices[5])]


def test_a_parameter_in_grad_mode_is_updated_and_its_version_counted():
    step = make_step(9, 63, 33)
    W = torch.nn.Parameter(step.state.W.clone())
    version = W._version
    ops.weight_step(W, step.state.v.clone(), step.state.last_step.clone(), step.gradient(), **ADAM)
    assert W._version > version and W.is_leaf and not same_bits(W, step.state.W)
    version = W._version
    ops.row_step(W, step.state.v.clone(), step.state.last_step.clone(), randn(33, 63), **ADAM)
    assert W._version > version


@bodies.every
def test_strides_of_the_gradient_do_not_matter(body):
    step = make_step(*size(body, 57, 63, 100), S=2, own=True)
    gradient = step.gradient()
    csc = replace(gradient.csc, **{n: strided(getattr(gradient.csc, n)) for n in ("colptr", "rows", "perm")})
    apart = RowGradient(csc, list(strided(step.values)), list(strided(step.A)), strided(step.self_coefficient))
    assert_same_bits(stepped(body, step), stepped(body, step, gradient=apart))


@bodies.every
@pytest.mark.parametrize("unit_rows", [False, True])
def test_repeats_bit_for_bit_at_every_thread_count(unit_rows, body):
    step = make_step(*size(body, 257, 100, 1000), S=2, unit=True, own=True, long=True)
    assert_repeats(lambda: stepped(body, step, unit_rows), body.threads)


@given(
    B=st.integers(1, 20), d=st.integers(1, 40), F=st.integers(1, 70), seed=st.integers(0, 1000),
    crossover=st.sampled_from([-1.0, 2.0]), first=st.integers(0, 70), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_any_range_of_any_size_accumulates_an_exact_second_moment(B, d, F, seed, crossover, first, dtype):
    """On a grid, with β2 = ½ and v = 0, v is g²/2 exactly; outside the range nothing moves."""
    code, first = random_code(B, F, 1, seed=seed), min(first, F)
    values, A = (code.values > 0.5).to(dtype), grid(1, B, d, step=1, reach=2, seed=seed).to(dtype)
    W, v, last_step = randn(F, d, seed=seed, dtype=dtype), torch.zeros(F, d, dtype=dtype), torch.zeros(F, dtype=torch.int64)
    before = W.clone()
    with pytest.MonkeyPatch.context() as patch:
        for op in ("weight_step", "outer"):
            patch.setitem(crossovers.CROSSOVER, op, crossover)
        gradient = RowGradient(ops.transpose(code), list(values), list(A))
        ops.weight_step(W[first:], v[first:], last_step[first:], gradient, first_feature=first, step=3, lr=0.5,
                        beta2=0.5, eps=1e-3)  # fmt: skip
    grad = dense(code, values.double())[0].T @ A[0].double()
    grad[:first] = 0
    assert torch.equal(v.double(), grad.square() / 2)
    assert torch.equal(before == W, grad == 0)


# ---- row_step --------------------------------------------------------------------------------------------------------


def row_stepped(body: bodies.Body, state: State, grad: torch.Tensor, **settings) -> State:
    after, grad = moved((state.clone(), grad), body.device)
    ops.row_step(
        *after.tensors(), grad, m=after.m, **ADAM, **{name: moved(value, body.device) for name, value in settings.items()}
    )
    return moved(after, "cpu")


@bodies.but_cuda
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_row_step_takes_the_step_of_a_dense_gradient(scale, unit_rows, body):
    sizes = (
        [(1, 1100), (3, 300), (20, 5), (769, 3)] if body.of_gpu else [(1, 100), (63, 33), (769, 31), (100, 1), (63, 4099)]
    )
    grad_scale = None if scale is None else torch.tensor(scale)
    for d, F in sizes:
        judge = Judge()
        for seed in range(1) if body.of_gpu else seeds(F * d):
            step = make_step(1, d, F, unit=unit_rows, seed=seed, density=1.0)  # one row: its gradient is exact
            step = replace(step, values=torch.ones_like(step.values))
            grad = strided(step.dense_gradient(torch.float32))
            state = row_stepped(body, step.state, grad, unit_rows=unit_rows, grad_scale=grad_scale)
            results = [plain(step, dtype, unit_rows, scale or 1.0) for dtype in (torch.float32, torch.float64)]
            judge.add("W", state.W, *(W for W, _ in results))
            judge.add("v", state.v, *(v for _, v in results))
            assert bool((state.last_step == STEP).all())
        if d > 1 or not unit_rows or not body.of_gpu:  # such a row never moves
            judge.verdict()


@bodies.but_cuda
def test_row_step_skips_on_demand(body):
    state, grad = make_step(9, 63, 33).state, randn(33, 63)
    assert_same_bits(row_stepped(body, state, grad, skip=torch.tensor(True)), state)
    assert_same_bits(row_stepped(body, state, grad, skip=torch.tensor(False)), row_stepped(body, state, grad))


@bodies.but_cuda
def test_row_step_repeats_bit_for_bit_at_every_thread_count(body):
    B, d, F = size(body, 9, 100, 1000)
    step, grad = make_step(B, d, F).state, randn(F, d)
    assert_repeats(lambda: row_stepped(body, step, grad, unit_rows=True), body.threads)


# ---- Momentum --------------------------------------------------------------------------------------------------------

MOMENTUM = ADAM | dict(beta1=0.9)


def take(
    body: bodies.Body, step: Step, unit_rows: bool = False, scale: float | None = None, adam: dict = MOMENTUM, **settings
) -> State:
    """The state after a step with its m."""
    grad_scale = None if scale is None else torch.tensor(scale)
    return stepped(body, step, unit_rows, adam, grad_scale=grad_scale, **settings)


def judge_momentum(
    body: bodies.Body, steps: list[Step], unit_rows: bool, scale: float | None = None, adam: dict = MOMENTUM
) -> None:
    judge = Judge()
    for step in steps:
        add_state(judge, take(body, step, unit_rows, scale, adam), step, unit_rows, scale, adam)
    judge.verdict()


@pytest.mark.slow(but=1, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("unit_rows", [True, False])
def test_momentum_is_as_near_to_float64_as_torchs(unit_rows, body, monkeypatch):
    for B, d, F in body.shapes:
        monkeypatch.setattr(crossovers, "CHUNK", (B + d) * max(3, F // 4))
        trials = range(2) if body.of_gpu else seeds(F * d)
        settings = dict(S=2, unit=unit_rows, own=True, momentum=True, long=body.of_gpu)
        steps = [make_step(B, d, F, seed=s, **settings) for s in trials]
        judge_momentum(body, steps, unit_rows)


@pytest.mark.slow(but=2, of_gpu=True)
@bodies.every
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("scale", [None, 1e-3, 30.0])
def test_momentum_of_any_beta1_and_the_gradient_scale(scale, beta1, body):
    B, d, F = size(body, 57, 63, 400)
    steps = [make_step(B, d, F, seed=seed, density=0.01, momentum=True) for seed in range(3)]
    judge_momentum(body, steps, False, scale, MOMENTUM | dict(beta1=beta1, step=12))


@bodies.every
def test_a_row_without_entries_moves_while_it_has_momentum_and_else_rests_bit_for_bit(body):
    step = make_step(3, 63, 60 if body.of_gpu else 4099, unit=True, own=True, momentum=True, long=True)
    after, rests = take(body, step, unit_rows=True), ~step.moving()
    coasts = step.moving() & ~step.touched()
    assert min(rests.sum(), coasts.sum()) > step.code.d_sae // 5
    assert_same_bits(after.rows(rests), step.state.rows(rests))
    assert bool((after.W != step.state.W)[coasts].any(1).all())
    assert bool((after.last_step[coasts] == STEP).all())
    torch.testing.assert_close(after.m[coasts], 0.9 * step.state.m[coasts])


@bodies.every
def test_one_last_element_of_momentum_moves_its_row(body):
    F = 40 if body.of_gpu else 400
    step = make_step(3, 70, F, momentum=True, long=True)
    m = torch.zeros(F, 70)
    m[:, -1] = 1e-30
    still = replace(step, state=replace(step.state, m=m), values=step.values * 0)
    assert bool((take(body, still).last_step == STEP).all())


@bodies.every
def test_a_step_at_beta1_of_0_keeps_the_gradient_and_moves_as_without_momentum(body):
    step = make_step(*size(body, 57, 63, 400), unit=True, density=0.01, momentum=True)
    touched, plain_state = step.touched(), replace(step, state=replace(step.state, m=None))
    kept, without = take(body, step, True, adam=MOMENTUM | dict(beta1=0.0)), stepped(body, plain_state, True)
    assert_same_bits([t[touched] for t in kept.tensors()], [t[touched] for t in without.tensors()])
    grad = ops.project_rows(step.dense_gradient(torch.float64), step.state.W.double())
    torch.testing.assert_close(kept.m.double(), grad, rtol=1e-4, atol=1e-5)


@bodies.every
def test_momentum_runs_out_in_the_engines_and_its_row_rests(body):
    """Where plain Adam keeps a subnormal number for good, whose step is 0."""
    step = make_step(3, 63, 40 if body.of_gpu else 400, momentum=True, long=True)
    left = replace(step, state=replace(step.state, m=step.state.m.sign() * 2.0**-126))
    after, coasts = take(body, left), left.moving() & ~left.touched()
    assert coasts.sum() > 10 and bool(after.m[coasts].any()) == (body.backend == "reference"), "which is plain Adam"
    assert_same_bits(after.W[coasts], left.state.W[coasts])
    if body.backend == "reference":
        return
    again = take(body, replace(left, state=after), adam=MOMENTUM | dict(step=STEP + 1))
    assert_same_bits(again.rows(coasts), after.rows(coasts))


@bodies.every
@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_trajectory_with_momentum_is_torch_optim_adams(unit_rows, body):
    start = torch.nn.functional.normalize(randn(40, 6), dim=1)
    state = State(start.clone(), torch.zeros(40, 6), torch.zeros(40, dtype=torch.int64), torch.zeros(40, 6))
    adams = {dtype: Adam(start.to(dtype, copy=True), unit_rows) for dtype in (torch.float32, torch.float64)}
    for k in range(1, 16):
        code = random_code(2, 40, 1, density=0.05, seed=k)
        step = Step(state, code, (code.values > 0.5).float(), grid(1, 2, 6, step=0.5, reach=3, seed=k))
        state = take(body, step, unit_rows, adam=dict(step=k, lr=0.05, beta1=0.9, beta2=0.99, eps=1e-4))
        for adam in adams.values():
            adam.step(step.dense_gradient(adam.W.dtype))
    assert bool((state.last_step == 0).any())
    judge = Judge()
    results = {"W": state.W, "v": state.v_now(0.99, 15), "m": state.m}
    for name, result in results.items():
        judge.add(name, result, *(adams[dtype].now()[name] for dtype in (torch.float32, torch.float64)))
    judge.verdict()


class Adam:
    """torch.optim.Adam on one weight; with ``unit_rows`` constrained by hand."""

    def __init__(self, W: torch.Tensor, unit_rows: bool):
        self.W, self.unit_rows = W, unit_rows
        self.adam = torch.optim.Adam([W], lr=0.05, betas=(0.9, 0.99), eps=1e-4)

    def step(self, grad: torch.Tensor) -> None:
        self.W.grad = grad - (grad * self.W).sum(1, keepdim=True) * self.W if self.unit_rows else grad
        self.adam.step()
        if self.unit_rows:
            self.W /= self.W.norm(dim=1, keepdim=True)

    def now(self) -> dict[str, torch.Tensor]:
        state = self.adam.state[self.W]
        return {"W": self.W, "v": state["exp_avg_sq"], "m": state["exp_avg"]}


@bodies.every
def test_ranges_of_features_with_momentum_step_as_the_whole(body):
    step = make_step(*size(body, 57, 63, 400), S=2, unit=True, own=True, density=0.01, momentum=True)
    F = step.code.d_sae
    for first in (1, F - 3) if body.of_gpu else (0, 1, F // 2, F - 3, F):
        gradient, whole, parts = step.gradient(), take(body, step, unit_rows=True), step.state.clone()
        for a, b in ((0, first), (first, F)):
            own, part = replace(gradient, self_coefficient=step.self_coefficient[a:b]), parts.rows(slice(a, b))
            part, own = moved((part, own), body.device)
            ops.weight_step(*part.tensors(), own, m=part.m, first_feature=a, unit_rows=True, **MOMENTUM)
            for to, it in zip((*parts.tensors(), parts.m), (*part.tensors(), part.m), strict=True):
                to[a:b] = it
        torch.testing.assert_close(parts.W, whole.W)
        if body.exact:
            assert_same_bits(whole, parts)


@bodies.every
def test_momentum_repeats_bit_for_bit_at_every_thread_count(body):
    step = make_step(*size(body, 100, 100, 1000), S=2, unit=True, own=True, density=0.01, momentum=True)
    assert_repeats(lambda: take(body, step, unit_rows=True), body.threads)


@bodies.every
def test_momentum_is_left_alone_by_a_step_that_is_skipped(body):
    step = make_step(*size(body, 57, 63, 400), density=0.01, momentum=True)
    assert_same_bits(take(body, step, skip=torch.tensor(True)), step.state)
    assert_same_bits(take(body, step, skip=torch.tensor(False)), take(body, step))


@bodies.but_cuda
@pytest.mark.parametrize("unit_rows", [False, True])
def test_row_step_takes_a_dense_gradient_with_momentum(unit_rows, body):
    sizes = [(1, 100), (43, 9), (769, 3)] if body.of_gpu else [(1, 100), (63, 33), (769, 31), (63, 4099)]
    for d, F in sizes:
        judge = Judge()
        for seed in range(1) if body.of_gpu else seeds(F * d):
            step = make_step(1, d, F, unit=unit_rows, seed=seed, density=1.0, momentum=True)
            step = replace(step, values=torch.ones_like(step.values))
            grad = strided(step.dense_gradient(torch.float32))
            state = row_stepped(body, step.state, grad, unit_rows=unit_rows, beta1=0.9)
            trials = [plain_moments(step, dtype, unit_rows, 1.0, MOMENTUM) for dtype in (torch.float32, torch.float64)]
            for name, result, torchs, exact in zip("Wvm", (state.W, state.v, state.m), *trials, strict=True):
                judge.add(name, result, torchs, exact)
            assert bool((state.last_step == STEP).all())
        if d > 1 or not unit_rows or not body.of_gpu:  # such a row never moves
            judge.verdict()


@pytest.mark.parametrize("unit_rows", [False, True])
def test_momentum_keeps_a_shadow_of_every_row_that_moves(unit_rows, route, isa):
    step = make_step(57, 63, 1000, unit=unit_rows, density=0.005, momentum=True)
    state, shadow = step.state.clone(), ops.make_shadow(step.state.W)
    for k in (STEP, STEP + 1):
        ops.weight_step(
            *state.tensors(), step.gradient(), m=state.m, unit_rows=unit_rows, shadow=shadow, **MOMENTUM | dict(step=k)
        )
        assert_same_bits(tuple(shadow), tuple(ops.make_shadow(state.W)))


# ---- Bad input -------------------------------------------------------------------------------------------------------

SOUND = make_step(9, 5, 33)
STATE_KINDS = {
    "W of one dimension": (dict(W=torch.zeros(33)), "W: got shape"),
    "integer W": (dict(W=torch.zeros(33, 5, dtype=torch.int64)), "W: got torch.int64|got torch"),
    "v of another shape": (dict(v=torch.zeros(33, 4)), "v: got shape"),
    "v of another dtype": (dict(v=torch.zeros(33, 5, dtype=torch.float64)), "v: got torch.float64"),
    "last_step too short": (dict(last_step=torch.zeros(32, dtype=torch.int64)), "last_step: got shape"),
    "int32 last_step": (dict(last_step=torch.zeros(33, dtype=torch.int32)), "last_step: got torch.int32"),
    "W apart": (dict(W=strided(SOUND.state.W)), "W: got strides"),
    "v apart": (dict(v=strided(SOUND.state.v)), "v: got strides"),
    "last_step apart": (dict(last_step=strided(SOUND.state.last_step)), "last_step: got strides"),
    "step 0": (dict(step=0), "step: got 0"),
    "negative lr": (dict(lr=-1.0), "lr, beta1, beta2, eps: got -1"),
    "lr that is not a number": (dict(lr=float("nan")), "lr, beta1, beta2, eps: got nan"),
    "beta1 of 1": (dict(beta1=1.0), "lr, beta1, beta2, eps: got 0.5, 1.0"),
    "negative beta1": (dict(beta1=-0.1), "lr, beta1, beta2, eps: got 0.5, -0.1"),
    "beta2 of 1": (dict(beta2=1.0), "lr, beta1, beta2, eps"),
    "negative beta2": (dict(beta2=-0.1), "lr, beta1, beta2, eps"),
    "negative eps": (dict(eps=-1e-8), "lr, beta1, beta2, eps"),
    "beta1 without m": (dict(beta1=0.9), r"m: got None, want \[33, 5\], the first moment, for beta1 = 0.9"),
    "m of another shape": (dict(m=torch.zeros(33, 4)), "m: got shape"),
    "m of another dtype": (dict(m=torch.zeros(33, 5, dtype=torch.float64)), "m: got torch.float64"),
    "m apart": (dict(m=strided(SOUND.state.v)), "m: got strides"),
    "a step before the last one": (dict(step=3), "step: got 3"),
    "grad_scale of two elements": (dict(grad_scale=torch.ones(2)), "grad_scale: got shape"),
    "skip of two elements": (dict(skip=torch.zeros(2, dtype=torch.bool)), "skip: got shape"),
}


def kwargs_of(change: dict) -> dict:
    W, v, last_step = SOUND.state.clone().tensors()
    return dict(W=W, v=v, last_step=last_step) | ADAM | change


@pytest.mark.parametrize("case", STATE_KINDS)
@pytest.mark.parametrize("op", ["weight_step", "row_step"])
def test_bad_state_is_a_value_error_that_names_it(op, case):
    change, message = STATE_KINDS[case]
    kwargs = kwargs_of(change)
    gradient = SOUND.gradient() if op == "weight_step" else randn(33, 5)
    with use_backend("reference"), raises_and_changes_nothing(message, list(kwargs.values()), gradient):
        getattr(ops, op)(kwargs.pop("W"), kwargs.pop("v"), kwargs.pop("last_step"), gradient, **kwargs)


GRADIENT = SOUND.gradient()
BAD_GRADIENTS = {
    "no source": (replace(GRADIENT, values=[], A=[]), {}, "values, A: got 0 and 0"),
    "values too short": (replace(GRADIENT, values=[GRADIENT.values[0][:-1]]), {}, r"values\[0\]: got shape"),
    "A of another width": (replace(GRADIENT, A=[GRADIENT.A[0][:, :4]]), {}, r"A\[0\]: got shape"),
    "A of one dimension": (replace(GRADIENT, A=[torch.zeros(9)]), {}, r"A\[0\]: got shape"),
    "A and values of another dtype": (
        replace(GRADIENT, values=[GRADIENT.values[0].double()], A=[GRADIENT.A[0].double()]), {}, r"got torch.float64"),
    "self-coefficient too short": (replace(GRADIENT, self_coefficient=torch.zeros(32)), {}, "self_coefficient: got shape"),
    "integer self-coefficient": (
        replace(GRADIENT, self_coefficient=torch.zeros(33, dtype=torch.int64)), {}, "self_coefficient: got torch.int64"),
    "negative first feature": (GRADIENT, dict(first_feature=-1), "first_feature: got -1"),
    "a range past F": (GRADIENT, dict(first_feature=1), "first_feature: got 1 with 33 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_gradient_is_a_value_error_that_names_it(case):
    gradient, change, message = BAD_GRADIENTS[case]
    state = SOUND.state.clone()
    with use_backend("reference"), raises_and_changes_nothing(message, state, gradient):
        ops.weight_step(*state.tensors(), gradient, **ADAM, **change)


@pytest.mark.parametrize("name, csc", corrupt_transposed(GRADIENT.csc))
def test_corrupt_entries_are_a_value_error(name, csc):
    state = SOUND.state.clone()
    with use_backend("reference"), raises_and_changes_nothing("colptr|rows|perm", state, csc):
        ops.weight_step(*state.tensors(), replace(GRADIENT, csc=csc), **ADAM)


@pytest.mark.parametrize("grad", [torch.zeros(33, 4), torch.zeros(32, 5), torch.zeros(33, 5, dtype=torch.float64)])
def test_bad_dense_gradient_is_a_value_error(grad):
    state = SOUND.state.clone()
    with raises_and_changes_nothing("grad: got", state, grad):
        ops.row_step(*state.tensors(), grad, **ADAM)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    csc = GRADIENT.csc
    entries = (csc.colptr, csc.rows, csc.perm, GRADIENT.values, GRADIENT.A, randn(33), 0)
    for m, beta1 in ((None, 0.0), (randn(33, 5), 0.9)):
        scalars = (STEP, 0.1, beta1, 0.99, 1e-8, True, torch.tensor(0.5), torch.tensor(False), None, None)
        with use_backend(backend):
            opcheck(torch.ops.sae_fast.weight_step.default, (*SOUND.state.clone().tensors(), m, *entries, *scalars))
            opcheck(torch.ops.sae_fast.row_step.default, (*SOUND.state.clone().tensors(), m, randn(33, 5), *scalars))
