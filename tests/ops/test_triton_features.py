"""The Triton kernels that go feature by feature: transpose, outer, weight_step, row_step, grad_sqnorm; without a GPU, in
Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_bits, code_of, randn, same_bits
from problems.weight_step import ADAM, State

from sae_fast import ops, use_backend
from sae_fast.code import RowGradient, Rows, Shadow

pytest.importorskip("triton")

from problems.gapped import Gapped
from problems.triton_features import (
    DEVICE,
    D,
    F,
    a_step,
    arguments,
    csc_of,
    gradient_of,
    judge_state,
    stepped,
    there,
)

from sae_fast.kernels import _config
from sae_fast.kernels import round as round_kernels
from sae_fast.kernels import weight_step as step_kernels

# The interpreter's bfloat16 arithmetic is wrong.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SMALL = {
    "transpose": {"entries": 4, "features": 4, "chunks": 2, "warps": 1},
    "outer": {"entries": 2, "columns": 8, "run": 5},
    "weight_step": {"entries": 2, "columns": 8},
}


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if "shipped_tiles" not in request.fixturenames:
        for generation in _config.SHIPPED.values():
            for op, values in SMALL.items():
                monkeypatch.setitem(generation, op, values)


@pytest.fixture
def shipped_tiles():
    """The test keeps the configuration that ships."""


@pytest.fixture(autouse=True)
def triton_bodies():
    with use_backend("triton"):
        yield


def with_unit_rows(*cases: tuple[int, int]) -> list[tuple[int, int, bool]]:
    """Each (_, d) without and with them; a unit row of one column never moves."""
    return [(*case, unit_rows) for case in cases for unit_rows in (False, True) if case[1] > 1 or not unit_rows]


# ---- weight_step -----------------------------------------------------------------------------------------------------


@pytest.mark.slow(but=4)
@pytest.mark.parametrize("S, d, unit_rows", with_unit_rows((1, D), (2, D), (3, D), (1, 1), (2, 4)))
def test_weight_step_is_as_near_to_float64_as_torchs(S, d, unit_rows):
    step = a_step(S, d, unit_rows, own=True)
    after = stepped(step, unit_rows, grad_scale=there(torch.tensor(0.7)))
    judge_state(after, step, unit_rows, 0.7)
    idle = ~step.touched()
    assert idle.sum() >= 2
    assert_same_bits([t[idle] for t in after.tensors()], [t[idle] for t in step.state.tensors()])


@pytest.mark.parametrize("unit_rows", [False, True])
def test_weight_step_with_the_tiles_that_ship(shipped_tiles, unit_rows):
    step = a_step(2, 769, unit_rows, rows=9, features=6)
    judge_state(stepped(step, unit_rows), step, unit_rows)


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.9999])
def test_weight_step_at_any_beta2(beta2):
    adam = ADAM | dict(beta2=beta2, eps=1.0)
    step = a_step()
    judge_state(stepped(step, False, adam), step, False, adam=adam)


def test_a_step_after_the_last_decays_by_exactly_beta2():
    step = a_step()
    still = replace(step, values=step.values * 0)
    still = replace(still, state=replace(step.state, last_step=torch.full((F,), ADAM["step"] - 1)))
    after, touched = stepped(still, False), step.touched()
    assert_same_bits(after.W, step.state.W)
    assert_same_bits(after.v[touched], step.state.v[touched] * torch.tensor(ADAM["beta2"], dtype=torch.float32))


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("first", [0, 8, 21])
def test_ranges_of_features_step_as_the_whole(first):
    step = a_step(2, own=True)
    whole, parts, gradient = stepped(step, False), State(*there(*step.state.tensors())), gradient_of(step)
    for a, b in ((0, first), (first, F)):
        own = replace(gradient, self_coefficient=gradient.self_coefficient[a:b])
        ops.weight_step(*(t[a:b] for t in parts.tensors()), own, first_feature=a, **ADAM)
    assert_same_bits(whole.tensors(), [t.cpu() for t in parts.tensors()])


@pytest.mark.slow(but=1)
@pytest.mark.parametrize("skip", [torch.tensor(True), torch.tensor(4, dtype=torch.int32)], ids=["bool", "int32"])
@pytest.mark.parametrize("S", [1, 3])
def test_skip_is_read_on_the_device(skip, S):
    step = a_step(S)
    assert_same_bits(stepped(step, False, skip=there(skip)), step.state)
    taken = stepped(step, False)
    assert_same_bits(stepped(step, False, skip=there(torch.zeros_like(skip))), taken)
    assert not same_bits(taken.W, step.state.W)


@pytest.mark.slow
def test_weight_step_does_not_depend_on_gaps_or_capacity():
    step = a_step(2, unit=True)
    gapped = Gapped(replace(step.code, values=step.values), torch.float32)
    roomy = gapped.transposed()
    for unit_rows in (False, True):
        state, adam = State(*there(*step.state.tensors())), step_kernels.new_adam(DEVICE)
        step_kernels.set_adam(adam, **ADAM)
        gradient = RowGradient(roomy, list(gapped.values), there(list(step.A)))
        step_kernels.weight_step(Rows(*state.tensors()), gradient, step_kernels.Update(adam, unit_rows))
        assert_same_bits(stepped(step, unit_rows).tensors(), [t.cpu() for t in state.tensors()])


def test_what_set_adam_leaves_on_the_device():
    adam = step_kernels.new_adam(DEVICE)
    for beta2 in (0.999, 0.0):
        step_kernels.set_adam(adam, step=3, lr=0.1, beta2=beta2, eps=1e-8)
        want = torch.tensor([0.1, 1e-8, beta2, 1 - beta2, (1 - beta2**3) ** -0.5], dtype=torch.float64)
        assert torch.equal(adam.constants[:5].cpu(), want.float()) and int(adam.step) == 3
        rate = adam.constants[5:7].double().sum()
        assert abs(2 ** float(1000 * rate) - beta2**1000) <= 1e-12


def test_what_the_kernels_cannot_step_says_why():
    W = there(torch.zeros(F, D, dtype=torch.float16))
    with pytest.raises(ValueError, match="float32 weights"):
        ops.row_step(W, W.clone(), there(torch.zeros(F, dtype=torch.int64)), W.clone(), **ADAM)
    step = a_step()
    state, adam = there(*step.state.tensors()), step_kernels.new_adam(DEVICE)
    shadow = Shadow(*round_kernels.rounded(state[0]))
    with pytest.raises(NotImplementedError, match="unit_rows"):
        step_kernels.row_step(Rows(*state, shadow), state[0], step_kernels.Update(adam, True))


# ---- row_step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features, d, unit_rows", with_unit_rows((1100, 1), (300, 3), (5, D), (3, 769)))
def test_row_step_takes_the_step_of_a_dense_gradient(features, d, unit_rows, shipped_tiles):
    step = a_step(1, d, unit_rows, rows=4, features=features)
    member = torch.ones(1, features, dtype=torch.bool)
    code = code_of(member, 1, torch.Generator().manual_seed(0))
    A = randn(1, 1, d, seed=5)
    step = replace(step, code=code, values=torch.randint(1, 4, (1, features)).float(), A=A)  # exact but for one product
    state = State(*there(*step.state.tensors()))
    arguments = dict(unit_rows=unit_rows, grad_scale=there(torch.tensor(0.5)), **ADAM)
    grad = there(step.dense_gradient(torch.float32))
    ops.row_step(*state.tensors(), grad, skip=there(torch.tensor(True)), **arguments)
    assert_same_bits(state.W.cpu(), step.state.W)
    ops.row_step(*state.tensors(), grad, skip=there(torch.tensor(False)), **arguments)
    judge_state(State(*(t.cpu() for t in state.tensors())), step, unit_rows, 0.5)


def test_row_step_with_offsets_leaves_rows_without_entries_alone():
    step = a_step()
    state, adam = State(*there(*step.state.tensors())), step_kernels.new_adam(DEVICE)
    step_kernels.set_adam(adam, **ADAM)
    grad = there(step.dense_gradient(torch.float32))
    step_kernels.row_step(Rows(*state.tensors()), grad, step_kernels.Update(adam), colptr=csc_of(step.code).colptr)
    judge_state(State(*(t.cpu() for t in state.tensors())), step, False)


# ---- Shadows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["weight_step", "row_step"])
def test_a_shadow_follows_the_rows_that_change(whole):
    d, features = 1100, 6  # three runs of 512 columns; K = 1152
    step = a_step(1, d, rows=9, features=features)
    state, adam = State(*there(*step.state.tensors())), step_kernels.new_adam(DEVICE)
    shadow = Shadow(*round_kernels.rounded(state.W))
    before = [t.clone() for t in shadow]
    step_kernels.set_adam(adam, **ADAM)
    csc, values, A = arguments(step, torch.float32)
    if whole:
        grad = there(step.dense_gradient(torch.float32))
        step_kernels.row_step(Rows(*state.tensors(), shadow), grad, step_kernels.Update(adam), colptr=csc.colptr)
    else:
        gradient = RowGradient(csc, values, A)
        step_kernels.weight_step(Rows(*state.tensors(), shadow), gradient, step_kernels.Update(adam))
    judge_state(State(*(t.cpu() for t in state.tensors())), step, False)

    scaled = state.W * shadow.norms[:, :1]
    rows = torch.nn.functional.pad(scaled.half(), (0, shadow.rows.shape[1] - d))
    assert_same_bits(shadow.rows, rows)
    assert_same_bits(shadow.norms[:, 0], before[1][:, 0])
    lost = scaled - rows[:, :d]
    for s in range(3):
        at = slice(512 * s, 512 * s + 512)
        for column, part in ((1, scaled), (2, lost)):
            want = part[:, at].double().square().sum(1)
            torch.testing.assert_close(shadow.norms[:, column + 2 * s].double(), want, rtol=1e-5, atol=0)
    idle = there(~step.touched())
    assert_same_bits([t[idle] for t in shadow], [t[idle] for t in before])
    assert not same_bits(shadow.norms, before[1])


def test_a_shadow_of_unit_rows_is_made_anew():
    step = a_step(unit=True)
    for op, gradient in ((ops.weight_step, gradient_of(step)), (ops.row_step, there(step.dense_gradient(torch.float32)))):
        state = State(*there(*step.state.tensors()))
        shadow = ops.make_shadow(state.W)
        op(*state.tensors(), gradient, unit_rows=True, shadow=shadow, **ADAM)
        assert not same_bits(state.W.cpu(), step.state.W)
        assert_same_bits(list(shadow), list(ops.make_shadow(state.W)))
