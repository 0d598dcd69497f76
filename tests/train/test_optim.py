"""RowAdam against torch.optim.Adam, to which projection and renormalisation are added by hand."""

from __future__ import annotations

import copy
import io
import math
from functools import cache

import pytest
import torch
from helpers import assert_close_2x, assert_same_bits, dense, randn, same_bits, tensors_in
from torch import Tensor

import sae_fast as sf
from sae_fast import RowAdam, RowGradient, SparseCode, ops
from sae_fast.ops import crossovers

F, D, B = 11, 5, 6
PLAIN, MOMENTUM = (0.0, 0.999), (0.9, 0.999)
both = pytest.mark.parametrize("betas", [PLAIN, MOMENTUM], ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def one_thread_and_the_lazy_route(monkeypatch):
    """Threads would only wait for each other; and problems this small are dense, unless ``route`` says otherwise."""
    torch.set_num_threads(1)
    for op in crossovers.CROSSOVER:
        monkeypatch.setitem(crossovers.CROSSOVER, op, float("inf"))


# ---- Problems and the reference -------------------------------------------------------------------------------------


def is_active(feature: int, step: int) -> bool:
    """Every kind of idleness: always, never, until late, after early, short bursts, long gaps."""
    return {
        0: True,
        1: False,
        2: step >= 600,
        3: step < 40,
        4: step % 97 == 0,
        5: step % 2 == 0,
        6: step in (0, 999),
        7: step % 300 < 5,
    }.get(feature, step * 7919 % (feature + 1) != 0)


@cache
def row_gradients(step: int, dtype: torch.dtype, features: int = F, sources: int = 1, all_active: bool = False):
    """(RowGradient of a weight [F, D], RowGradient of a vector [F], and both densely, by a plain product)."""
    g = torch.Generator().manual_seed(step)
    member = torch.rand(B, features, generator=g) < 0.4
    for i in range(features):
        member[:, i] &= all_active or is_active(i, step)
        member[step % B, i] |= all_active or is_active(i, step)
    nnz = int(member.sum())
    indptr = torch.zeros(B + 1, dtype=torch.int64)
    indptr[1:] = member.sum(1).cumsum(0)
    values = [torch.randn(nnz, generator=g).to(dtype) for _ in range(sources)]
    A = [torch.randn(B, D, generator=g).to(dtype) for _ in range(sources)]
    indices = member.nonzero()[:, 1].int()
    code = SparseCode(member.shape, indptr, indices, torch.zeros(nnz, dtype=dtype), torch.stack(values))
    csc = ops.transpose(code)
    weight, vector = RowGradient(csc, values, A), RowGradient(csc, values[:1], [torch.ones(B, 1, dtype=dtype)])
    dense_weight = sum(dense(code, v).T @ a for v, a in zip(values, A, strict=True))
    return weight, vector, dense_weight, dense(code, values[0]).sum(0)


def normalise(W: Tensor) -> Tensor:
    return W / W.norm(dim=1, keepdim=True)


class PlainAdam:
    """torch.optim.Adam; with ``unit_rows``, the gradient's part along each row is removed and the row renormalised."""

    def __init__(self, start: Tensor, unit_rows: bool = False, **settings):
        self.p, self.unit_rows = torch.nn.Parameter(start.clone()), unit_rows
        if unit_rows:
            self.p.data = normalise(self.p.data)
        self.adam = torch.optim.Adam([self.p], **settings)

    @torch.no_grad()
    def step(self, gradient: Tensor, grad_scale: float = 1.0) -> None:
        gradient = gradient * grad_scale
        if self.unit_rows:
            direction = normalise(self.p)
            gradient = gradient - (gradient * direction).sum(1, keepdim=True) * direction
        self.p.grad = gradient
        self.adam.step()
        if self.unit_rows:
            self.p.data = normalise(self.p.data)

    @property
    def v(self) -> Tensor:
        return self.adam.state[self.p]["exp_avg_sq"]

    @property
    def m(self) -> Tensor:
        return self.adam.state[self.p]["exp_avg"]


def start(dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    return randn(*(shape or (F, D)), seed=seed).to(dtype)


def parameter(*args, **kwargs) -> torch.nn.Parameter:
    return torch.nn.Parameter(start(*args, **kwargs))


def snapshot(optimizer: RowAdam) -> list[Tensor]:
    """Every bit that an optimizer and its parameters hold."""
    out = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            out.append(p.detach().clone())
            for key, value in sorted(optimizer.state.get(p, {}).items()):
                out += [torch.tensor([ord(c) for c in key]), torch.as_tensor(value).clone()]
    return out


def float64_tolerance(got: Tensor, want: Tensor, name: str = "") -> None:
    error = (got.detach() - want.detach()).abs().max()
    assert error <= 1e-9, f"{name}: {error:.2e}"


# ---- Equal to torch -------------------------------------------------------------------------------------------------


class Pair:
    """A weight [F, D] and a vector [F] under RowAdam in one dtype, and under PlainAdam in that dtype and in float64."""

    def __init__(self, dtype: torch.dtype, unit_rows: bool, **settings):
        self.dtype, shapes = dtype, {"W": (F, D), "b": (F,)}
        starts = {name: start(torch.float32, *shape) for name, shape in shapes.items()}
        self.ours = {name: torch.nn.Parameter(t.to(dtype)) for name, t in starts.items()}
        self.optimizer = RowAdam(
            [{"params": [self.ours["W"]], "unit_rows": unit_rows}, {"params": [self.ours["b"]]}], **settings
        )
        unit = {"W": unit_rows, "b": False}
        self.own = {name: PlainAdam(t.to(dtype), unit[name], **settings) for name, t in starts.items()}
        self.exact = {name: PlainAdam(t.double(), unit[name], **settings) for name, t in starts.items()}

    def step(self, step: int) -> None:
        weight, vector, G, g = row_gradients(step, self.dtype)
        self.optimizer.step(rows={self.ours["W"]: weight, self.ours["b"]: vector})
        self.own["W"].step(G)
        self.own["b"].step(g)
        if self.dtype != torch.float64:
            _, _, G, g = row_gradients(step, torch.float64)
            self.exact["W"].step(G)
            self.exact["b"].step(g)

    def state(self, name: str, key: str) -> Tensor:
        return self.optimizer.state[self.ours[name]][key]


@pytest.mark.slow(but=2)
@both
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
def test_a_thousand_steps_with_idle_features_are_adams_to_1e_minus_9_in_float64(unit_rows, betas):
    pair = Pair(torch.float64, unit_rows, lr=3e-3, betas=betas, eps=1e-8)
    for step in range(1000):
        pair.step(step)
    for name in ("W", "b"):
        float64_tolerance(pair.ours[name], pair.own[name].p, name)
    idle = {PLAIN: [1000, 0, 1000, 40, 971, 999, 1000], MOMENTUM: [1000, 0, *5 * [1000]]}
    assert pair.state("W", "last_step").tolist()[:7] == idle[betas], "only what never had a gradient has no momentum"
    raw = pair.state("W", "exp_avg_sq").clone()
    pair.optimizer.catch_up()
    lazy = not torch.equal(raw, pair.state("W", "exp_avg_sq"))
    assert lazy == (betas == PLAIN), "where rows that are idle have no momentum"
    for name in ("W", "b"):
        torch.testing.assert_close(pair.state(name, "exp_avg_sq"), pair.own[name].v, rtol=1e-9, atol=1e-12)
        if betas == MOMENTUM:
            torch.testing.assert_close(pair.state(name, "exp_avg"), pair.own[name].m, rtol=1e-9, atol=1e-12)


@pytest.mark.slow(but=2)
@both
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
def test_a_thousand_steps_of_the_engine_with_idle_features_are_adams_within_twice_torchs_own_error(unit_rows, betas, route):
    pair = Pair(torch.float32, unit_rows, lr=3e-3, betas=betas, eps=1e-8)
    never = pair.ours["W"][1].detach().clone()
    for step in range(1000):
        pair.step(step)
    for name in ("W", "b"):
        assert_close_2x(pair.ours[name], pair.own[name].p, pair.exact[name].p.detach(), name)
    if unit_rows:
        torch.testing.assert_close(pair.ours["W"].norm(dim=1), torch.ones(F))
    else:
        assert same_bits(pair.ours["W"][1].detach(), never), "a feature that never fires does not move by a bit"
    last = pair.state("W", "last_step").tolist()[:7]
    if betas == PLAIN:
        assert last == [1000, 0, 1000, 40, 971, 999, 1000], "on either route"
    else:
        assert 40 + 700 < last.pop(3) < 40 + 900, "0.9 to that power is below every normal number: it rests"
        assert last == [1000, 0, *4 * [1000]]
    pair.optimizer.catch_up()
    for name in ("W", "b"):
        assert_close_2x(pair.state(name, "exp_avg_sq"), pair.own[name].v, pair.exact[name].v, f"v of {name}")
        if betas == MOMENTUM:
            assert_close_2x(pair.state(name, "exp_avg"), pair.own[name].m, pair.exact[name].m, f"m of {name}")


@pytest.mark.parametrize("betas, eps", [((0.5, 0.9), 1e-3), ((0.0, 0.99), 0.0), ((0.9, 0.99), 0.0)], ids=str)
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
def test_any_betas_and_an_eps_of_0_are_adams(betas, eps, unit_rows):
    settings = dict(lr=3e-3, betas=betas, eps=eps)
    all_active = eps == 0  # a zero second moment is 0/0 without eps, in torch's Adam too
    first = start(torch.float32)
    own, exact = PlainAdam(first, unit_rows, **settings), PlainAdam(first.double(), unit_rows, **settings)
    ours, wide = torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.double())
    optimizers = [RowAdam([p], unit_rows=unit_rows, **settings) for p in (ours, wide)]
    for step in range(200):
        weight, _, G, _ = row_gradients(step, torch.float32, all_active=all_active)
        optimizers[0].step(rows={ours: weight})
        own.step(G)
        weight, _, G, _ = row_gradients(step, torch.float64, all_active=all_active)
        optimizers[1].step(rows={wide: weight})
        exact.step(G)
    float64_tolerance(wide, exact.p)
    assert_close_2x(ours, own.p, exact.p.detach())


@both
@dtypes
def test_at_an_eps_of_0_a_row_that_never_had_a_gradient_is_nan_as_torchs(dtype, betas):
    p, own = parameter(dtype), PlainAdam(start(dtype), betas=betas, eps=0.0)
    optimizer = RowAdam([p], betas=betas, eps=0.0)
    for step in range(1, 4):
        weight, _, G, _ = row_gradients(step, dtype)
        optimizer.step(rows={p: weight})
        own.step(G)
    assert bool(p[1].isnan().all()) and torch.equal(p.isnan(), own.p.isnan())


@both
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
def test_dense_gradients_row_gradients_and_a_mix_of_them_agree(betas, unit_rows):
    settings = dict(lr=3e-3, betas=betas)
    exact = PlainAdam(start(torch.float64), unit_rows, **settings)
    by_rows, by_grad, by_tensor, mixed = (parameter(torch.float64) for _ in range(4))
    optimizer = RowAdam([by_rows, by_grad, by_tensor, mixed], unit_rows=unit_rows, **settings)
    for step in range(120):
        weight, _, G, _ = row_gradients(step, torch.float64)
        rows = {by_rows: weight, by_tensor: G}
        by_grad.grad, mixed.grad = G, None
        if step % 3 == 0:
            rows[mixed] = weight
        else:
            mixed.grad = G.t().contiguous().t()  # strided like a transposed view
        optimizer.step(rows=rows)
        exact.step(G)
    for name, p in (("rows", by_rows), (".grad", by_grad), ("tensor", by_tensor), ("mixed", mixed)):
        float64_tolerance(p, exact.p, name)


@dtypes
def test_several_sources_and_the_gradient_along_the_weight_itself_are_summed(dtype):
    p, exact = parameter(dtype), PlainAdam(start(torch.float64), lr=1e-2, betas=(0.0, 0.99))
    optimizer = RowAdam([p], lr=1e-2, betas=(0.0, 0.99))
    for step in range(40):
        weight, _, _, _ = row_gradients(step, dtype, sources=2)
        _, _, G, _ = row_gradients(step, torch.float64, sources=2)
        coefficient = randn(F, seed=step).abs() * (G != 0).any(1)  # of a feature without entries it is 0
        optimizer.step(rows={p: RowGradient(weight.csc, weight.values, weight.A, coefficient.to(dtype))})
        exact.step(G + coefficient.double()[:, None] * exact.p.detach())
    torch.testing.assert_close(p.double(), exact.p, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-5)


@both
def test_the_learning_rate_may_change_between_steps(betas):
    p, exact = parameter(torch.float64), PlainAdam(start(torch.float64), True, betas=betas)
    optimizer = RowAdam([p], betas=betas, unit_rows=True)
    for step in range(60):
        weight, _, G, _ = row_gradients(step, torch.float64)
        lr = 0.0 if step % 10 == 9 else 1e-2 / (1 + step)
        optimizer.param_groups[0]["lr"] = exact.adam.param_groups[0]["lr"] = lr
        optimizer.step(rows={p: weight})
        exact.step(G)
    float64_tolerance(p, exact.p)


def test_a_schedulers_learning_rate_reaches_the_step():
    p, exact = parameter(torch.float64), PlainAdam(start(torch.float64), lr=1e-2, betas=(0.0, 0.999))
    optimizer = RowAdam([p], lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 7, gamma=0.5) for o in (optimizer, exact.adam)]
    for step in range(30):
        weight, _, G, _ = row_gradients(step, torch.float64)
        optimizer.step(rows={p: weight})
        exact.step(G)
        for scheduler in schedulers:
            scheduler.step()
    float64_tolerance(p, exact.p)


def test_a_change_of_beta2_midway_catches_up_with_the_old_one_first():
    p, exact = parameter(torch.float64), PlainAdam(start(torch.float64), lr=1e-2, betas=(0.0, 0.999))
    optimizer = RowAdam([p], lr=1e-2, betas=(0.0, 0.999))
    for step in range(120):
        if step in (50, 90):
            betas = (0.0, 0.9 if step == 50 else 0.99)
            optimizer.param_groups[0]["betas"] = exact.adam.param_groups[0]["betas"] = betas
        weight, _, G, _ = row_gradients(step, torch.float64)
        optimizer.step(rows={p: weight})
        exact.step(G)
    float64_tolerance(p, exact.p)
    optimizer.catch_up()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], exact.v, rtol=1e-9, atol=1e-12)


def test_an_eps_of_0_midway_finds_the_second_moment_up_to_date():
    p, exact = parameter(torch.float64), PlainAdam(start(torch.float64), lr=1e-2, betas=(0.0, 0.9), eps=1e-8)
    optimizer = RowAdam([p], lr=1e-2, betas=(0.0, 0.9), eps=1e-8)
    for step in range(60):
        # From step 30 on eps is 0 for ours.  Feature 1 has no gradient until then: 0/0 would be torch's answer.
        dense_now = step >= 30
        weight, _, G, _ = row_gradients(step, torch.float64, all_active=dense_now or step == 0)
        optimizer.param_groups[0]["eps"] = exact.adam.param_groups[0]["eps"] = 0.0 if dense_now else 1e-8
        optimizer.step(rows={p: weight})
        exact.step(G)
    float64_tolerance(p, exact.p)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], exact.v, rtol=1e-9, atol=1e-12)


@both
def test_grad_scale_multiplies_every_gradient(betas):
    settings = dict(lr=1e-2, betas=betas, eps=0.1)  # a large eps: otherwise Adam hides a constant factor
    exact = [PlainAdam(start(torch.float64), True, **settings) for _ in range(2)]
    by_rows, by_grad = parameter(torch.float64), parameter(torch.float64)
    optimizer = RowAdam([by_rows, by_grad], unit_rows=True, **settings)
    for step in range(50):
        weight, _, G, _ = row_gradients(step, torch.float64)
        scale = 0.1 + 0.5 * (step % 4)
        by_grad.grad = G
        optimizer.step(rows={by_rows: weight}, grad_scale=torch.tensor(scale, dtype=torch.float64))
        exact[0].step(G, scale)
        exact[1].step(G)
    for p in (by_rows, by_grad):
        float64_tolerance(p, exact[0].p)
        assert (p - exact[1].p).abs().max() > 1e-3


def test_a_skipped_step_changes_nothing_and_does_not_count():
    p, twin = parameter(torch.float32), parameter(torch.float32)
    optimizer, other = RowAdam([p], lr=1e-2, unit_rows=True), RowAdam([twin], lr=1e-2, unit_rows=True)
    optimizer.step(rows={p: row_gradients(99, torch.float32)[0]}, skip=torch.tensor(True))
    assert same_bits(p.detach(), start(torch.float32)) and not optimizer.state.get(p)
    for step in range(10):
        weight = row_gradients(step, torch.float32)[0]
        optimizer.step(rows={p: weight}, skip=torch.tensor(False))
        other.step(rows={twin: weight})
        before = snapshot(optimizer)
        optimizer.step(rows={p: row_gradients(step + 50, torch.float32)[0]}, skip=torch.tensor(True))
        assert_same_bits(before, snapshot(optimizer))
    assert_same_bits(snapshot(optimizer), snapshot(other))


def test_the_groups_have_settings_of_their_own():
    shapes = ((F, D), (F, D), (F,))
    settings = [
        dict(lr=1e-2, betas=(0.0, 0.999), eps=1e-8, unit_rows=True),
        dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-4, unit_rows=False),
        dict(lr=5e-2, betas=(0.0, 0.9), eps=1e-6, unit_rows=False),
    ]
    parameters = [parameter(torch.float64, *shape) for shape in shapes]
    optimizer = RowAdam([{"params": [p], **s} for p, s in zip(parameters, settings, strict=True)])
    exact = [PlainAdam(p.detach(), **s) for p, s in zip(parameters, settings, strict=True)]
    for step in range(60):
        weight, vector, G, g = row_gradients(step, torch.float64)
        optimizer.step(rows=dict(zip(parameters, (weight, weight, vector), strict=True)))
        for plain, gradient in zip(exact, (G, G, g), strict=True):
            plain.step(gradient)
    for p, plain in zip(parameters, exact, strict=True):
        float64_tolerance(p, plain.p)


@both
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (2, 1, 3, 2)], ids=str)
def test_a_dense_gradient_of_any_shape_steps_like_torch(betas, shape):
    def random(seed: int) -> Tensor:
        return randn(math.prod(shape), seed=seed, dtype=torch.float64).reshape(shape)

    p = torch.nn.Parameter(random(100))
    exact = PlainAdam(p.detach(), lr=1e-2, betas=betas)
    optimizer = RowAdam([p], lr=1e-2, betas=betas)
    for step in range(10):
        gradient = random(step)
        if step % 2 and len(shape) > 1:  # the same values in the memory order of a transposed tensor
            gradient = gradient.transpose(0, -1).contiguous().transpose(0, -1)
        p.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
        exact.step(gradient)
    float64_tolerance(p, exact.p)


def test_a_parameter_without_a_gradient_is_left_alone_and_its_steps_do_not_count():
    a, b = parameter(torch.float64), parameter(torch.float64)
    optimizer = RowAdam([a, b], lr=1e-2)
    exact = PlainAdam(b.detach(), lr=1e-2, betas=(0.0, 0.999))
    for step in range(5):
        optimizer.step(rows={a: row_gradients(step, torch.float64)[0]})
    assert same_bits(b.detach(), start(torch.float64)) and not optimizer.state.get(b)
    for step in range(5):
        weight, _, G, _ = row_gradients(step, torch.float64)
        optimizer.step(rows={b: weight})
        exact.step(G)
    float64_tolerance(b, exact.p)
    assert optimizer.state[a]["step"] == optimizer.state[b]["step"] == 5


def test_a_closure_runs_once_with_gradients_on_and_its_loss_comes_back():
    p, calls = parameter(torch.float64), []
    exact = PlainAdam(p.detach(), lr=1e-2, betas=(0.0, 0.999))
    optimizer = RowAdam([p], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (p**3).sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    wanted = float((p.detach() ** 3).sum())
    gradient = 3 * p.detach() ** 2
    with torch.no_grad():
        loss = optimizer.step(closure)
    exact.step(gradient)
    assert calls == [True] and float(loss.detach()) == wanted
    float64_tolerance(p, exact.p)
    assert optimizer.step() is None


@pytest.mark.parametrize("unit_start", [True, False])
def test_rows_that_start_at_any_norm_are_brought_to_unit_norm_even_if_they_never_fire(unit_start):
    p = torch.nn.Parameter(start(torch.float64) * 5)
    optimizer = RowAdam([p], unit_rows=True, unit_start=unit_start)
    optimizer.step(rows={p: row_gradients(3, torch.float64)[0]})
    torch.testing.assert_close(p.norm(dim=1), torch.ones(F, dtype=torch.float64))
    torch.testing.assert_close(p[1], normalise(start(torch.float64))[1])


@both
def test_the_lazy_route_of_the_engine_is_bitwise_repeatable_at_every_thread_count(betas):
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        p = parameter(torch.float32)
        optimizer = RowAdam([p], betas=betas, unit_rows=True)
        for step in range(20):
            optimizer.step(rows={p: row_gradients(step, torch.float32)[0]})
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_same_bits(results[0], other)


# ---- State ----------------------------------------------------------------------------------------------------------


def run(optimizer: RowAdam, p, steps: range, dtype=torch.float32) -> None:
    for step in steps:
        optimizer.step(rows={p: row_gradients(step, dtype)[0]})


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@dtypes
@both
def test_resuming_from_a_state_dict_is_bitwise(dtype, betas, route):
    straight = parameter(dtype)
    whole = RowAdam([straight], lr=1e-2, betas=betas, unit_rows=True)
    run(whole, straight, range(40), dtype)
    half = straight.detach().clone()
    state = through_a_file(whole.state_dict())
    if betas[0] == 0 and (route == "sparse" or dtype == torch.float64):
        assert min(whole.state[straight]["last_step"].tolist()) == 0, "the state is raw: idle rows are behind"
    run(whole, straight, range(40, 120), dtype)

    resumed = torch.nn.Parameter(half)
    other = RowAdam([resumed], lr=7.0, betas=(0.3, 0.3), eps=1.0)
    other.load_state_dict(state)
    run(other, resumed, range(40, 120), dtype)
    assert_same_bits(snapshot(whole), snapshot(other))


@dtypes
def test_the_row_counters_stay_exact_integers_beyond_what_a_float_holds(dtype):
    p = parameter(dtype)
    optimizer = RowAdam([p])
    run(optimizer, p, range(1), dtype)
    state = optimizer.state_dict()
    odd = 2**53 + 1 - torch.arange(F) * 2
    state["state"][0]["last_step"] = odd.clone()
    other = RowAdam([parameter(dtype)])
    other.load_state_dict(through_a_file(state))
    loaded = other.state[other.param_groups[0]["params"][0]]["last_step"]
    assert loaded.dtype == torch.int64 and torch.equal(loaded, odd)
    state["state"][0]["last_step"].zero_()
    assert torch.equal(loaded, odd), "a copy, not the caller's tensor"


def test_loading_the_state_of_several_groups_gives_each_parameter_its_own():
    def build():
        weights = [parameter(torch.float32), parameter(torch.float32, 4), parameter(torch.float32, F)]
        return weights, RowAdam([{"params": weights[:2], "lr": 1e-2}, {"params": weights[2:], "betas": (0.9, 0.999)}])

    weights, optimizer = build()
    rows = row_gradients(5, torch.float32)
    optimizer.step(rows={weights[0]: rows[0], weights[2]: rows[1]})  # weights[1] has no state
    copies, other = build()
    with torch.no_grad():
        for p, q in zip(weights, copies, strict=True):
            q.copy_(p)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(snapshot(optimizer), snapshot(other))
    assert "exp_avg" not in other.state[copies[0]] and "exp_avg" in other.state[copies[2]]
    assert not other.state.get(copies[1])


@both
def test_a_deep_copy_of_parameter_and_optimizer_goes_on_by_itself(betas):
    p = parameter(torch.float32)
    optimizer = RowAdam([p], lr=1e-2, betas=betas, unit_rows=True)
    run(optimizer, p, range(20))
    q, other = copy.deepcopy((p, optimizer))
    assert other.param_groups[0]["params"][0] is q
    before = snapshot(optimizer)
    run(other, q, range(20, 60))
    assert_same_bits(before, snapshot(optimizer))
    run(optimizer, p, range(20, 60))
    assert_same_bits(snapshot(optimizer), snapshot(other))


@both
def test_catching_up_is_repeatable_and_does_not_disturb_the_run(betas):
    a, b = parameter(torch.float64), parameter(torch.float64)
    plain, exported = RowAdam([a], lr=1e-2, betas=betas), RowAdam([b], lr=1e-2, betas=betas)
    for step in range(60):
        run(plain, a, range(step, step + 1), torch.float64)
        run(exported, b, range(step, step + 1), torch.float64)
        if step % 7 == 0:
            exported.catch_up()
            once = snapshot(exported)
            exported.catch_up()
            assert_same_bits(once, snapshot(exported))
            assert exported.state[b]["last_step"].tolist() == [step + 1] * F
    float64_tolerance(a, b)


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lr=-1e-3), "lr: got -0.001"),
        (dict(lr=float("nan")), "lr: got nan"),
        (dict(betas=(0.0, 1.0)), r"betas: got \(0.0, 1.0\)"),
        (dict(betas=(-0.1, 0.9)), r"betas: got \(-0.1, 0.9\)"),
        (dict(betas=(0.9,)), r"betas: got \(0.9,\)"),
        (dict(eps=-1e-8), "eps: got -1e-08"),
        (dict(eps=float("nan")), "eps: got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RowAdam([parameter(torch.float32)], **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_are_refused(dtype):
    with pytest.raises(ValueError, match=f"params: got a parameter in {dtype}, want float32 masters"):
        RowAdam([torch.nn.Parameter(torch.ones(3, 4, dtype=dtype))])
    with pytest.raises(ValueError, match=r"float32 masters"):
        sf.Trainer(sf.GatedSAE(4, 8, dtype=dtype), l1_coefficient=1.0)


def test_unit_rows_are_only_for_matrices_and_parameters_are_contiguous():
    with pytest.raises(ValueError, match=r"unit_rows: got a parameter of shape \(7,\), want \[F, d\]"):
        RowAdam([torch.nn.Parameter(torch.ones(7))], unit_rows=True)
    with pytest.raises(ValueError, match=r"params: got strides \(1, 3\), want contiguous"):
        RowAdam([torch.nn.Parameter(torch.ones(3, 4).t().contiguous().t())])


def test_a_gradient_of_the_wrong_size_is_refused_and_changes_no_weight():
    p = parameter(torch.float32)
    optimizer = RowAdam([p])
    run(optimizer, p, range(3))
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"first_feature: got 0 with 11 rows, want a range within F = 4"):
        optimizer.step(rows={p: row_gradients(0, torch.float32, features=4)[0]})
    with pytest.raises(ValueError, match=r"A\[0\]: got shape \(6, 1\), want \[B, 5\]"):
        optimizer.step(rows={p: row_gradients(0, torch.float32)[1]})
    with pytest.raises(ValueError, match=r"grad: got shape \(11, 4\), want \[11, 5\]"):
        optimizer.step(rows={p: torch.zeros(F, D - 1)})
    assert same_bits(p.detach(), before)
    assert tensors_in(snapshot(optimizer))


# ---- Groups, momentum, frozen and foreign parameters -----------------------------------------------------------------


@pytest.mark.parametrize(
    "group, message",
    [
        (dict(lr=-1.0), "lr: got -1.0"),
        (dict(betas=(0.0, 1.0)), "betas: got"),
        (dict(eps=-1.0), "eps: got"),
        (dict(params=[torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float16))]), "params: got a parameter in"),
        (dict(params=[torch.nn.Parameter(torch.ones(3))], unit_rows=True), r"unit_rows: got a parameter of shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["at first", "added"])
def test_a_groups_own_settings_are_checked_whenever_it_comes(group, message, later):
    group, p = {"params": [parameter(torch.float32)], **group}, parameter(torch.float32)
    optimizer = RowAdam([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group) if later else RowAdam([{"params": [p]}, group])
    assert [g["params"] for g in optimizer.param_groups] == [[p]]


def test_a_group_added_midway_is_a_new_adam_and_goes_through_state_dicts():
    a, b = parameter(torch.float64), parameter(torch.float64)
    optimizer, exact = (
        RowAdam([a], lr=1e-2),
        [PlainAdam(start(torch.float64), u, lr=1e-2, betas=(0.0, 0.999)) for u in (0, 1)],
    )
    for step in range(30):
        weight, _, G, _ = row_gradients(step, torch.float64)
        if step == 10:
            optimizer.add_param_group({"params": [b], "unit_rows": True})
        if step == 20:
            saved = through_a_file(optimizer.state_dict())
            optimizer = RowAdam([{"params": [a]}, {"params": [b]}])
            optimizer.load_state_dict(saved)
        optimizer.step(rows={a: weight} if step < 10 else {a: weight, b: weight})
        exact[0].step(G)
        if step >= 10:
            exact[1].step(G)
    float64_tolerance(a, exact[0].p)
    float64_tolerance(b, exact[1].p)


def test_momentum_after_a_start_without_is_refused_as_the_last_gradient_is_not_kept():
    """In torch's Adam exp_avg is the last gradient while β1 is 0."""
    p, q = parameter(torch.float64), parameter(torch.float64)
    optimizer = RowAdam([q, p], lr=1e-2)
    optimizer.add_param_group({"params": [unused := parameter(torch.float64)]})
    run(optimizer, p, range(3), torch.float64)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.999)
    before = snapshot(optimizer)
    rows = row_gradients(3, torch.float64)[0]
    with pytest.raises(ValueError, match=r"^betas: got β1 = 0\.9 after 3 steps from a start at β1 = 0, whose last"):
        optimizer.step(rows={q: rows, p: rows, unused: rows})
    assert_same_bits(before, snapshot(optimizer))
    optimizer.step(rows={unused: rows})  # which has no step at β1 = 0


@dtypes
@pytest.mark.parametrize("given", ["rows", "grad"])
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free rows", "unit rows"])
def test_beta1_changes_midway_to_0_and_back_as_in_adam_and_through_a_state_dict(unit_rows, given, dtype, route):
    settings = dict(lr=1e-2, betas=MOMENTUM, eps=1e-3)
    own, exact = (PlainAdam(start(torch.float32).to(t), unit_rows, **settings) for t in (dtype, torch.float64))
    optimizer = RowAdam([p := parameter(dtype)], unit_rows=unit_rows, **settings)
    for step in range(60):
        beta1 = (0.9, 0.5, 0.0, 0.8, 0.0, 0.95)[step // 10]
        if step in (25, 35):
            state = through_a_file(optimizer.state_dict())
            optimizer = RowAdam([p], unit_rows=unit_rows, **settings)
            optimizer.load_state_dict(state)
        for o in (optimizer, own.adam, exact.adam):
            o.param_groups[0]["betas"] = (beta1, 0.999)
        (weight, _, G, _), (_, _, wide, _) = (row_gradients(step, t) for t in (dtype, torch.float64))
        optimizer.step(rows={p: weight if given == "rows" else G})
        own.step(G)
        exact.step(wide)
    if dtype == torch.float64:
        float64_tolerance(p, exact.p)
        float64_tolerance(optimizer.state[p]["exp_avg"], exact.m)
    else:
        assert_close_2x(p, own.p, exact.p.detach())
        assert_close_2x(optimizer.state[p]["exp_avg"], own.m, exact.m)


def test_the_state_of_earlier_versions_goes_on_as_torchs_adam():
    """They visited every row in every step with momentum."""
    p, exact = parameter(torch.float64), PlainAdam(start(torch.float64), True, lr=1e-2, betas=MOMENTUM)
    for step in range(20):
        exact.step(row_gradients(step, torch.float64)[2])
    optimizer = RowAdam([p], lr=1e-2, betas=MOMENTUM, unit_rows=True)
    moments = dict(step=20, beta2=0.999, exp_avg=exact.m.clone(), exp_avg_sq=exact.v.clone())
    state = optimizer.state_dict() | {"state": {0: moments | dict(last_step=torch.full((F,), 20))}}
    optimizer.load_state_dict(through_a_file(state))
    with torch.no_grad():
        p.copy_(exact.p)
    for step in range(20, 60):
        weight, _, G, _ = row_gradients(step, torch.float64)
        optimizer.step(rows={p: weight})
        exact.step(G)
    float64_tolerance(p, exact.p)
    assert optimizer.state[p]["last_step"].tolist()[:3] == [60, 20, 20], "whose exp_avg is 0"


@both
def test_a_frozen_parameter_keeps_its_bits_whatever_gradient_is_at_hand_and_goes_on_as_if_nothing_had_been(betas):
    p, twin = torch.nn.Parameter(start(torch.float32) * 5), torch.nn.Parameter(start(torch.float32) * 5)
    optimizer, other = (RowAdam([t], lr=1e-2, betas=betas, unit_rows=True) for t in (p, twin))
    for step in range(30):
        frozen = step < 5 or 10 <= step < 20
        p.requires_grad_(not frozen)
        before = snapshot(optimizer)
        weight = row_gradients(step, torch.float32)[0]
        p.grad = torch.ones_like(p)
        optimizer.step(rows={p: weight} if step % 2 else {})
        if frozen:
            optimizer.prepare()
            assert_same_bits(before, snapshot(optimizer))
        else:
            other.step(rows={twin: weight if step % 2 else torch.ones_like(p)})
    assert_same_bits(snapshot(optimizer), snapshot(other))


def test_a_parameter_that_the_optimizer_does_not_hold_is_refused_and_nothing_changes():
    p, other = parameter(torch.float32), parameter(torch.float32)
    optimizer = RowAdam([p])
    run(optimizer, p, range(2))
    before, weight = snapshot(optimizer), row_gradients(0, torch.float32)[0]
    with pytest.raises(ValueError, match=r"^rows: got a parameter of shape \(11, 5\) that the optimizer does not hold"):
        optimizer.step(rows={p: weight, other: weight})
    with pytest.raises(ValueError, match=r"^shadows: got a parameter of shape"):
        optimizer.step(rows={p: weight}, shadows={other: ops.make_shadow(other)})
    assert_same_bits(before, snapshot(optimizer))


def test_the_state_of_another_optimizer_is_refused_by_what_it_lacks():
    p = parameter(torch.float32)
    adam = torch.optim.Adam([p])
    p.grad = torch.ones_like(p)
    adam.step()
    with pytest.raises(ValueError, match=r"^state_dict: state of parameter 0: \['beta2', 'last_step'\] missing"):
        RowAdam([p]).load_state_dict(adam.state_dict())
