"""Edges between SAEs: against autograd through both, and the jumps that secants count."""

from __future__ import annotations

import pytest
import torch
from problems.analysis_models import Chain, identity, random_ends, random_sae

import sae_fast as sf
from sae_fast.analysis import edges


@pytest.fixture
def model():
    return Chain()


@pytest.fixture
def saes():
    return random_sae("gated", 10, 40, 3), random_sae("gated", 8, 32, 4)


def between(model, rows):
    """The model from the site a to the site c."""
    return model.c(torch.tanh(rows) * 2)


def dense_edges(model, up, down, clean, patch, alphas, weights=None):
    """[F_down, R, F_up]: the mean gradient of each downstream feature's weighted sum over rows, times the change."""
    with torch.no_grad():
        x, x_patch = (model.a(each).flatten(0, 1) for each in (clean, patch))
        f, f_patch = up.encode(x), up.encode(x_patch)
        rest = x - up.decode(f)
    out = torch.zeros(down.d_sae, *f.shape).double()
    for alpha in alphas:
        point = (f + alpha * (f_patch - f)).requires_grad_()
        far = down.encode(between(model, up.decode(point) + rest))
        sums = (far if weights is None else far * weights).sum(0)
        for i in range(down.d_sae):
            out[i] += torch.autograd.grad(sums[i], point, retain_graph=True)[0] / len(alphas)
    return out * (f_patch - f)


@pytest.mark.parametrize(("method", "steps", "alphas"), [("atp", 1, [0.0]), ("ig", 3, [1 / 6, 1 / 2, 5 / 6])])
def test_edges_are_vector_jacobian_products(model, saes, method, steps, alphas):
    (up, down), (clean, patch) = saes, random_ends()
    got = edges(model, ("a", up), ("c", down), clean, patch, method=method, steps=steps)
    wanted = dense_edges(model, up, down, clean, patch, alphas)
    for k, feature in enumerate(got.downstream.tolist()):
        torch.testing.assert_close(got.support.to_dense(got.effects[k]), wanted[feature], rtol=1e-10, atol=1e-13)
    others = sorted(set(range(32)) - set(got.downstream.tolist()))
    assert not wanted[others].any() or method == "ig"


def test_with_a_metric_they_are_weighted_by_its_gradient(model, saes):
    (up, down), (clean, patch) = saes, random_ends()
    got = edges(model, ("a", up), ("c", down), clean, patch, metric=identity, features=[1, 5, 9])
    with torch.no_grad():
        z = between(model, model.a(clean))
    leaf = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(model.tail(leaf).sum(), leaf)
    wanted = dense_edges(model, up, down, clean, patch, [0.0], (g.flatten(0, 1) @ down.W_dec.T).detach())
    for k, feature in enumerate([1, 5, 9]):
        torch.testing.assert_close(got.support.to_dense(got.effects[k]), wanted[feature], rtol=1e-10, atol=1e-13)


def test_secants_add_up_to_the_exact_change_and_slopes_do_not(model, saes):
    (up, down), (clean, patch) = saes, random_ends()
    error = {}
    for method in ("ig", "jump_corrected_ig"):
        for steps in (20, 200):
            e = edges(model, ("a", up), ("c", down), clean, patch, method=method, steps=steps)
            error[method, steps] = float((e.effects.sum(1) - e.exact).abs().max() / e.exact.abs().max())
    assert error["ig", 200] > 0.1
    assert error["jump_corrected_ig", 20] < 0.02
    assert error["jump_corrected_ig", 200] < error["jump_corrected_ig", 20] / 50, "the midpoint rule is of second order"


def test_exact_is_the_change_of_the_downstream_activations(model, saes):
    (up, down), (clean, patch) = saes, random_ends()
    where = torch.tensor([True, True, False, True])
    e = edges(model, ("a", up), ("c", down), clean, patch, features=[0, 7, 21], where=where)
    with torch.no_grad():
        x, x_patch = model.a(clean), model.a(patch)
        moved = x.clone()
        moved[:, where] += up(x_patch[:, where]) - up(x[:, where])
        f, f_moved = (down.encode(between(model, each)[:, where]).flatten(0, 1).sum(0) for each in (x, moved))
    torch.testing.assert_close(e.exact, (f_moved - f)[[0, 7, 21]])
    assert e.effects.shape == (3, e.support.nnz) and e.support.shape == (9, 40)


def test_sums_over_rows_and_the_largest(model, saes):
    (up, down), (clean, patch) = saes, random_ends()
    e = edges(model, ("a", up), ("c", down), clean, patch, features=[1, 5])
    dense = torch.stack([e.support.to_dense(each).sum(0) for each in e.effects])
    torch.testing.assert_close(e.by_feature().to_dense(), dense)
    u, d, effect = e.top(1)[0]
    k = [1, 5].index(d)
    assert abs(effect) == pytest.approx(float(dense.abs().max())) and effect == pytest.approx(float(dense[k, u]))


def test_the_zero_baseline(model, saes):
    (up, down), (clean, _) = saes, random_ends()
    e = edges(model, ("a", up), ("c", down), clean, method="jump_corrected_ig", steps=200)
    with torch.no_grad():
        x = model.a(clean)
        gone = x - (up(x) - up.b_dec)
        f, f_gone = (down.encode(between(model, each)).flatten(0, 1).sum(0) for each in (x, gone))
    torch.testing.assert_close(e.exact, (f_gone - f)[e.downstream])
    torch.testing.assert_close(e.effects.sum(1), e.exact, rtol=1e-2, atol=1e-3)


def test_in_half_precision_many_steps_do_not_round_away(model, saes):
    (up, down), (clean, patch) = saes, random_ends()
    up, down, model = up.float(), down.float(), model.float()
    wanted = edges(model, ("a", up), ("c", down), clean.float(), patch.float(), method="ig", steps=600, features=range(6))
    model = model.bfloat16()
    got = edges(
        model, ("a", up), ("c", down), clean.bfloat16(), patch.bfloat16(), method="ig", steps=600, features=range(6)
    )
    assert got.effects.dtype == torch.float32
    assert float(got.effects.abs().sum() / wanted.effects.abs().sum()) == pytest.approx(1, abs=0.1)


def test_what_comes_after_the_upstream_site_may_write_in_place(saes):
    class Written(Chain):
        def forward(self, x):
            return self.tail(self.c(self.a(x).tanh_() * 2)).sum((1, 2))

    (up, down), (clean, patch) = saes, random_ends()
    for method in ("atp", "jump_corrected_ig"):
        plain, written = (
            edges(net, ("a", up), ("c", down), clean, patch, method=method, features=[1, 5]) for net in (Chain(), Written())
        )
        assert torch.equal(plain.effects, written.effects)


def test_what_does_not_fit(model, saes):
    (up, down), (clean, patch) = saes, random_ends()
    with pytest.raises(ValueError, match="method: got 'exact'"):
        edges(model, ("a", up), ("c", down), clean, patch, method="exact")
    with pytest.raises(ValueError, match=r"steps: got 0"):
        edges(model, ("a", up), ("c", down), clean, patch, method="ig", steps=0)
    with pytest.raises(ValueError, match="features: got 32"):
        edges(model, ("a", up), ("c", down), clean, patch, features=[32])
    with pytest.raises(ValueError, match="features: got 5 twice"):
        edges(model, ("a", up), ("c", down), clean, patch, features=[5, 5])
    with pytest.raises(ValueError, match="want the same shapes"):
        edges(model, ("a", up), ("c", down), clean, patch[:2])
    with pytest.raises(ValueError, match="downstream: 'a' does not depend on 'c'"):
        edges(model, ("c", down), ("a", up), clean, patch)
    with pytest.raises(ValueError, match=r"upstream: got 'a', want \(site, sae\)"):
        edges(model, "a", ("c", down), clean, patch)
    with pytest.raises(ValueError, match="sae: its d_in is 8, want 10"):
        edges(model, ("a", down), ("c", down), clean, patch)
    with pytest.raises(ValueError, match="near names"):
        edges(model, ("a", up), ("cc", down), clean, patch)
    with pytest.raises(ValueError, match="for a TopKSAE"):
        edges(model, ("a", up), ("c", sf.TopKSAE(8, 32, 4)), clean, patch, method="jump_corrected_ig")
