"""sae_fast.metrics against MATH.md §4 and against the definitions written out once more with numpy."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_fast import metrics
from sae_fast.metrics import Metrics

D_SAE = 7
EXACT = dict(rel=1e-12, abs=1e-12)


def batch(tokens=50, d=6, seed=0, mean=0.3, noise=0.4):
    """x, an imperfect shrunken x̂ and a sparse dense code, all float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=generator, dtype=torch.float64) + mean
    x_hat = 0.8 * x + noise * torch.randn(tokens, d, generator=generator, dtype=torch.float64)
    f = torch.randn(tokens, D_SAE, generator=generator, dtype=torch.float64).sub(0.8).relu()
    f[:, 3] = 0
    return x, x_hat, f


def sparse(f, spurious=True):
    """The SparseCode of a dense f; with `spurious`, it also stores one entry of magnitude 0 per row."""
    stored = f != 0
    if spurious:
        stored[:, 3] = True
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), stored.sum(1).cumsum(0)])
    return SimpleNamespace(
        indptr=indptr,
        indices=stored.nonzero()[:, 1].to(torch.int32),
        magnitudes=f[stored],
        shape=tuple(f.shape),
    )


def of(x, x_hat, f):
    accumulator = Metrics(D_SAE)
    accumulator.update(x, x_hat, f)
    return accumulator


def assert_same(a: Metrics, b: Metrics):
    got, wanted = a.compute(), b.compute()
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name] == pytest.approx(wanted[name], rel=1e-10, abs=1e-12), name
    assert torch.equal(a.density(), b.density())


def test_the_identities_between_the_four_biases():
    x, x_hat, _ = batch()
    a, b = (x_hat**2).sum(1).mean().item(), (x**2).sum(1).mean().item()
    c, d = (x * x_hat).sum(1).mean().item(), ((x - x_hat) ** 2).sum(1).mean().item()
    gamma, c1 = metrics.relative_reconstruction_bias(x, x_hat), metrics.projection_bias(x, x_hat)
    s, legacy = metrics.optimal_rescale(x, x_hat), metrics.legacy_bias(x, x_hat)
    rho2 = c * c / (a * b)
    assert 2 * c == pytest.approx(a + b - d, **EXACT)
    assert gamma == pytest.approx(a / c, **EXACT)
    assert gamma * s == pytest.approx(1, **EXACT)
    assert c1 * s == pytest.approx(rho2, **EXACT)
    assert c1 == pytest.approx(rho2 * gamma, **EXACT)
    assert c1 * gamma != pytest.approx(1, rel=1e-3)  # reciprocal only for a perfect correlation
    assert legacy == pytest.approx(math.sqrt(a / (b - d)), **EXACT)
    assert legacy == pytest.approx(math.sqrt(gamma / (2 - gamma)), **EXACT)


def test_each_bias_is_the_minimum_it_claims_to_be():
    x, x_hat, _ = batch()

    def best(objective, at):
        here = objective(at)
        return here < objective(at * (1 + 1e-4)) and here < objective(at * (1 - 1e-4))

    assert best(lambda c: (x_hat / c - x).square().sum(), metrics.relative_reconstruction_bias(x, x_hat))
    assert best(lambda c: (x_hat - c * x).square().sum(), metrics.projection_bias(x, x_hat))
    assert best(lambda s: (s * x_hat - x).square().sum(), metrics.optimal_rescale(x, x_hat))


def test_gamma_of_one_still_projects_below_one():
    x, x_hat, _ = batch()
    x_hat = x_hat / metrics.relative_reconstruction_bias(x, x_hat)
    unexplained = ((x - x_hat) ** 2).sum() / (x**2).sum()
    assert metrics.relative_reconstruction_bias(x, x_hat) == pytest.approx(1, **EXACT)
    assert metrics.projection_bias(x, x_hat) == pytest.approx(1 - unexplained.item(), **EXACT)


def test_halved_reconstruction():
    x = torch.ones(1, 1)
    got = metrics.Metrics(1)
    got.update(x, x / 2, x)
    got = got.compute()
    assert got["relative_reconstruction_bias"] == 0.5
    assert got["projection_bias"] == 0.5
    assert got["optimal_rescale"] == 2
    assert got["legacy_bias"] == pytest.approx(1 / math.sqrt(3), **EXACT)


def test_a_collapsed_sae_has_no_bias_to_show():
    x, _, f = batch(tokens=4000, mean=2.0)
    collapsed = of(x, x.mean(0).expand_as(x), torch.zeros_like(f)).compute()
    assert collapsed["relative_reconstruction_bias"] == pytest.approx(1, **EXACT)
    assert collapsed["fvu"] == pytest.approx(1, **EXACT)
    assert (collapsed["l0"], collapsed["dead_fraction"]) == (0, 1)


def test_the_rest_against_numpy():
    x, x_hat, f = batch()
    got = of(x, x_hat, f).compute()
    x, x_hat, f = x.numpy(), x_hat.numpy(), f.numpy()
    error = x - x_hat
    cosines = (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
    wanted = {
        "tokens": 50,
        "l0": np.count_nonzero(f, axis=1).mean(),
        "fvu": (error**2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "explained_variance": 1 - error.var(axis=0).sum() / x.var(axis=0).sum(),
        "mse": (error**2).sum(1).mean(),
        "cosine": cosines.mean(),
        "dead_fraction": 1 / D_SAE,
    }
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, **EXACT)


def test_the_functions_agree_with_the_accumulator():
    x, x_hat, f = batch()
    accumulator = of(x, x_hat, f)
    computed = accumulator.compute()
    for name in ("relative_reconstruction_bias", "projection_bias", "optimal_rescale", "legacy_bias", "fvu"):
        assert getattr(metrics, name)(x, x_hat) == computed[name], name
    assert metrics.explained_variance(x, x_hat) == computed["explained_variance"]
    assert metrics.cosine(x, x_hat) == computed["cosine"]
    assert metrics.l0(f) == pytest.approx(computed["l0"], **EXACT)
    assert metrics.dead_fraction(f) == pytest.approx(computed["dead_fraction"], **EXACT)
    assert torch.equal(metrics.feature_density(f), accumulator.density())
    assert torch.equal(accumulator.density(), (f != 0).double().mean(0))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 49), max_size=5), order=st.randoms(use_true_random=False))
def test_any_split_merged_in_any_order_is_one_pass(cuts, order):
    x, x_hat, f = batch()
    edges = [0, *sorted(set(cuts)), 50]
    parts = [of(x[i:j], x_hat[i:j], f[i:j]) for i, j in itertools.pairwise(edges)]
    order.shuffle(parts)
    merged = Metrics(D_SAE)
    for part in parts:
        merged.merge(part)
    assert_same(merged, of(x, x_hat, f))


def test_updates_in_turn_are_one_pass():
    x, x_hat, f = batch()
    streamed = Metrics(D_SAE)
    for i in range(0, 50, 7):
        streamed.update(x[i : i + 7], x_hat[i : i + 7], f[i : i + 7])
    assert_same(streamed, of(x, x_hat, f))


def test_merging_changes_only_the_one_merged_into():
    x, x_hat, f = batch()
    a, b = of(x[:20], x_hat[:20], f[:20]), of(x[20:], x_hat[20:], f[20:])
    before = b.compute()
    Metrics(D_SAE).merge(b).merge(a)
    assert b.compute() == before


def test_a_large_mean_costs_no_precision():
    x, x_hat, f = batch(tokens=4000)
    plain = of(x, x_hat, f).compute()
    # float64 values: at a mean of 1e4, float32 cannot even hold x to the precision asked for here.
    moved = Metrics(D_SAE)
    for i in range(0, 4000, 37):
        moved.update(x[i : i + 37] + 1e4, x_hat[i : i + 37] + 1e4, f[i : i + 37])
    moved = moved.compute()
    for name in ("fvu", "explained_variance", "mse"):
        assert moved[name] == pytest.approx(plain[name], rel=1e-9), name


def test_float32_input_with_a_large_mean():
    x = (torch.randn(5000, 4, generator=torch.Generator().manual_seed(1)) + 1e4).float()
    x_hat = x + 0.5 * torch.randn(5000, 4, generator=torch.Generator().manual_seed(2))
    wanted = (x.double() - x_hat.double()).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert metrics.fvu(x, x_hat) == pytest.approx(wanted.item(), **EXACT)
    assert metrics.fvu(x, x_hat) == pytest.approx(0.25, rel=0.05)


def test_a_sparse_code_counts_only_what_fires():
    x, x_hat, f = batch()
    assert_same(of(x, x_hat, sparse(f)), of(x, x_hat, f))
    assert metrics.l0(sparse(f)) == metrics.l0(f) == pytest.approx((f != 0).sum(1).double().mean().item(), **EXACT)
    assert metrics.dead_fraction(sparse(f)) == 1 / D_SAE


def test_leading_dimensions_strides_and_half_precision():
    x, x_hat, f = batch(tokens=48)
    shaped = of(x.view(4, 12, -1), x_hat.view(12, 4, -1).reshape(4, 12, -1), f.view(4, 12, -1))
    assert_same(shaped, of(x, x_hat, f))
    strided = of(x.t().contiguous().t(), x_hat.t().contiguous().t(), f)
    assert_same(strided, of(x, x_hat, f))
    half = metrics.fvu(x.bfloat16(), x_hat.bfloat16())
    assert half == metrics.fvu(x.bfloat16().double(), x_hat.bfloat16().double())


def test_state_survives_a_round_trip():
    x, x_hat, f = batch()
    first = of(x[:20], x_hat[:20], f[:20])
    restored = Metrics(D_SAE)
    restored.load_state_dict(first.state_dict())
    assert restored.compute() == first.compute()
    restored.update(x[20:], x_hat[20:], f[20:])
    assert_same(restored, of(x, x_hat, f))
    assert first.compute()["tokens"] == 20  # the state was a copy
    restored.load_state_dict(Metrics(D_SAE).state_dict())
    assert restored.state_dict() == {}


def test_loss_recovered():
    assert metrics.loss_recovered(ce_clean=3.0, ce_spliced=3.0, ce_zero=10.0) == 1
    assert metrics.loss_recovered(3.0, 10.0, 10.0) == 0
    assert metrics.loss_recovered(3.0, 4.75, 10.0) == pytest.approx(0.75, **EXACT)
    with pytest.raises(ValueError, match="ce_zero"):
        metrics.loss_recovered(3.0, 4.0, 3.0)


def test_degenerate_ratios_are_nan():
    x = torch.ones(5, 2)
    assert math.isnan(metrics.fvu(x, 0.5 * x))
    assert math.isnan(metrics.relative_reconstruction_bias(x, 0 * x))
    assert metrics.projection_bias(x, 0 * x) == 0
    assert metrics.cosine(x, 0 * x) == 0
    assert math.isnan(metrics.legacy_bias(x, 3 * x))  # γ = 3 > 2


def bad_calls():
    x, x_hat, f = batch()
    late_nan = x.clone()
    late_nan[4, 2] = math.nan
    yield "x_hat", lambda: of(x, x_hat[:, :-1], f), r"\[50, 5\].*\[50, 6\]"
    yield "integers", lambda: of(x.long(), x_hat, f), "x: got torch.int64"
    yield "no tensor", lambda: of(x.numpy(), x_hat, f), "x: got ndarray"
    yield "no tokens", lambda: of(x[:0], x_hat[:0], f[:0]), r"x: got shape \[0, 6\]"
    yield "nan", lambda: of(late_nan, x_hat, f), r"x: got nan at \[4, 2\]"
    yield "infinite", lambda: metrics.fvu(x, x_hat / 0), "x_hat: got -?inf at"
    yield (
        "features",
        lambda: of(x, x_hat, f[:, :-1]),
        r"code: got shape \[50, 6\].*50 tokens in all and 7 features",
    )
    yield "tokens", lambda: of(x, x_hat, sparse(f[:-1])), r"code: got shape \[49, 7\]"
    yield "no code", lambda: of(x, x_hat, [1]), "code: got list"
    yield "d_sae", lambda: Metrics(0), "d_sae: got 0"
    yield "nothing yet", lambda: Metrics(3).compute(), "no tokens seen"
    yield "merge", lambda: of(x, x_hat, f).merge(Metrics(3)), "other: got metrics of 3 features, want 7"
    yield "width", lambda: of(x, x_hat, f).update(x[:, :2], x_hat[:, :2], f), "x: got width 2, want 6"
    yield (
        "state",
        lambda: Metrics(3).load_state_dict(of(x, x_hat, f).state_dict()),
        "state: got counts of 7 features",
    )
    yield "entries", lambda: Metrics(3).load_state_dict({"a": x}), "state: got the entries"


@pytest.mark.parametrize("call, message", [pytest.param(c, m, id=n) for n, c, m in bad_calls()])
def test_bad_input_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
