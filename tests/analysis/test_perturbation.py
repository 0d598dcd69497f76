"""Perturbations: optima in closed form, constraints, gradients, counted passes, and a model that is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from problems.analysis_models import Chain, random_ends, random_sae
from torch import Tensor, nn

from sae_fast.analysis import ablate, splice
from sae_fast.analysis.passes import count_passes
from sae_fast.analysis.perturbation import Change, adding, ball, clamp, nearest_rows, rows, sphere
from sae_fast.analysis.perturbation._ascent import Perturbed, untouched
from sae_fast.data import sites


def linear(d_in: int, d_out: int, seed: int = 0) -> nn.Sequential:
    """x → site "0" → W x."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Identity(), nn.Linear(d_in, d_out), nn.Identity()).double()


class Positions(nn.Module):
    """[N, T, 4] → site → each position bent and mixed with those before it → last: causal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.site, self.bend, self.last = nn.Identity(), nn.Linear(4, 4), nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.bend(self.site(x))))
        return self.last(x.cumsum(1))


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frozen_tail(output: Tensor) -> Tensor:
    return output.flatten(1).sum(1)


def test_directions_of_a_linear_map_are_its_singular_vectors_in_order():
    model, x = linear(5, 7), inputs(6, 5)
    _, values, vectors = torch.linalg.svd(model[1].weight.detach())
    found = sphere(model, "0", x, Change("1"), radius=3.0, directions=5, steps=150, starts=2)
    torch.testing.assert_close(found.objective, 3 * 6**0.5 * values, rtol=1e-9, atol=0)
    torch.testing.assert_close((found.theta @ vectors.T / 3).abs(), torch.eye(5).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.theta @ found.theta.T, 9 * torch.eye(5).double(), rtol=1e-12, atol=1e-12)
    assert (found.history.diff(dim=1) >= 0).all() and found.history.shape == (5, 150)


@pytest.mark.parametrize("p, q", [(1.0, 1.0), (2.0, 1.0), (3.0, 2.0), (4.0, 4.0), (0.5, 2.0)])
def test_p_and_q_in_two_dimensions_against_brute_force(p, q):
    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.site, self.out = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.sin(self.site(x) * torch.tensor([1.0, 0.4]).double()) @ weight)

    weight, x, radius = inputs(2, 3, seed=3), inputs(4, 3, 2), 1.3
    model = Bent()
    angles = torch.arange(0, 2 * math.pi, 1e-3).double()
    around = radius * torch.stack([angles.cos(), angles.sin()], 1)
    moved = model(x + around[:, None, None, :]) - model(x)  # [angles, N, T, 3]
    wanted = moved.norm(dim=-1).pow(p).sum((1, 2)).pow(1 / q)
    found = sphere(model, "site", x, Change("out", p=p, q=q), radius=radius, steps=40, starts=8)
    assert float(found.objective) == pytest.approx(float(wanted.max()), rel=1e-5)
    assert float((found.theta - around[wanted.argmax()]).norm()) < 0.02


@pytest.mark.parametrize("objective", [Change("tail.1", p=3, q=2), Change("c", p=1, q=3), frozen_tail])
def test_gradients_are_those_of_finite_differences(objective):
    model, (x, _) = Chain(), random_ends()
    if callable(objective):
        objective = lambda output, examples: output.square() * (1 + examples)  # noqa: E731
    with untouched(model):
        f = Perturbed(model, "a", x, objective, None, 2)
        theta, h = inputs(1, 10), 1e-6
        _, slope = f.value_and_slope(theta)
        steps = h * torch.eye(10).double()
        numeric = [(f.value_and_slope(theta + e)[0] - f.value_and_slope(theta - e)[0]) / (2 * h) for e in steps]
        torch.testing.assert_close(slope[0], torch.cat(numeric), rtol=1e-6, atol=1e-8)
        delta = inputs(2, 4, 10, seed=4)
        _, slopes = f.values_and_slopes(0, delta)
        direction = inputs(2, 4, 10, seed=5)
        ends = [f.values_and_slopes(0, delta + sign * h * direction)[0] for sign in (1, -1)]
        torch.testing.assert_close((slopes * direction).sum((1, 2)), (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_a_loss_is_raised_on_the_sphere_in_mean_and_by_example_in_the_ball():
    model, x, w = linear(5, 3), inputs(6, 5), None
    w = model[1].weight.detach()[0]
    found = sphere(model, "0", x, lambda output: output[:, 0], radius=2.0, steps=200)
    torch.testing.assert_close(found.theta[0], 2 * w / w.norm(), rtol=1e-5, atol=1e-5)
    signs = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 1.0]).double()
    found = ball(model, "0", x, lambda output, examples: output[:, 0] * signs[examples], epsilon=0.7, steps=60)
    torch.testing.assert_close(found.delta, 0.7 * signs.sign()[:, None] * w / w.norm(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.objective, (model(x)[:, 0] * signs).detach() + 0.7 * signs.abs() * w.norm())


def test_the_ball_is_over_chosen_positions_and_the_hidden_axis_and_what_is_inside_stays_inside():
    model, x = Positions().eval(), inputs(5, 3, 4)
    where = torch.tensor([True, False, True])
    found = ball(model, "site", x, Change("last"), epsilon=0.4, steps=30, where=where)
    norms = found.delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((5,), 0.4).double())
    assert not found.delta[:, 1].any() and found.delta[:, [0, 2]].any()
    peak = 0.3 * torch.ones(5, 3, 4).double() / 12**0.5  # an optimum of norm 0.3, inside
    output = lambda _, examples: -(model.seen - x[examples] - peak[examples]).square().sum((1, 2))  # noqa: E731
    model.last.register_forward_hook(lambda *_: None)
    with sites.changed(sites.find(model, "bend:input"), lambda z: setattr(model, "seen", z) or z):
        found = ball(model, "site", x, output, epsilon=1.0, steps=200, lr=0.2)
    torch.testing.assert_close(found.delta, peak, rtol=0, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_the_chunk_changes_nothing(chunk):
    model, x = Positions().eval(), inputs(5, 3, 4)
    sae = random_sae("gated", 4, 12)
    for where in (None, torch.tensor([[True, False, True]]), inputs(5, 3, seed=8) > -1.5):
        common = {"where": where, "steps": 6, "seed": 2}
        for objective in (Change("last", p=3, q=2), lambda o, e: o.sum((1, 2)) * (1 + e)):
            whole, parts = (
                (
                    sphere(model, "site", x, objective, radius=1.0, directions=2, chunk=size, **common).theta,
                    ball(model, "site", x, objective, epsilon=1.0, chunk=size, **common).delta,
                    rows(model, "site", x, objective, sae, radius=1.0, s=2, chunk=size, **common).theta,
                )
                for size in (None, chunk)
            )
            for a, b in zip(whole, parts, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_positions_of_the_target_can_be_chosen():
    model, x = Positions().eval(), inputs(4, 3, 4)
    first, last = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    got = ball(model, "site", x, Change("last", where=first), epsilon=1.0, steps=5).delta
    assert not got.eq(0).all() and Change("last", where=first).where is first
    with pytest.raises(ValueError, match="0 everywhere"):  # causal: what is added last does not reach what comes first
        sphere(model, "site", x, Change("last", where=first), radius=1.0, where=last)


def test_new_directions_are_orthogonal_to_given_ones():
    model, x = linear(5, 7), inputs(3, 5)
    given = torch.stack([inputs(5, seed=6), 2 * inputs(5, seed=6), inputs(5, seed=7)])  # of rank 2
    found = sphere(model, "0", x, Change("1"), radius=2.0, directions=3, steps=20, orthogonal_to=given)
    assert float((found.theta @ given.T).abs().max()) < 1e-10
    with pytest.raises(ValueError, match="directions: got 4 besides 2"):
        sphere(model, "0", x, Change("1"), radius=2.0, directions=4, orthogonal_to=given)


def test_the_best_of_several_starts_is_kept():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    heights, x = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.zeros(1, 4).double()

    def loss(output: Tensor) -> Tensor:  # a local optimum on each axis
        return (heights * output**8).sum(1)

    single = [float(sphere(model, "0", x, loss, radius=1.0, seed=seed).objective) for seed in range(8)]
    assert {round(value) for value in single} > {4}
    assert float(sphere(model, "0", x, loss, radius=1.0, starts=8).objective) == pytest.approx(4)


@pytest.mark.parametrize("s", [1, 2])
def test_few_decoder_rows_against_all_pairs_of_them(s):
    model, x, sae = linear(6, 8), inputs(3, 6), random_sae("gated", 6, 9)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 9)[:, None])  # rows that are not of unit norm
    found = rows(model, "0", x, Change("1"), sae, radius=2.0, s=s, steps=60, starts=12)
    W, best = sae.W_dec.detach(), 0.0
    angles = torch.linspace(0, math.pi / 2, 400).double()
    mixes = torch.stack([angles.cos(), angles.sin()], 1)
    for i in range(9):
        for j in range(9):
            theta = nn.functional.normalize(mixes @ W[[i, j]] if s == 2 else W[[i]], dim=1) * 2
            best = max(best, float((theta @ model[1].weight.detach().T).norm(dim=1).max()) * 3**0.5)
    assert float(found.objective) == pytest.approx(best, rel=1e-4)
    assert len(found.features) <= s and (found.weights > 0).all() and float(found.theta.norm()) == pytest.approx(2)
    torch.testing.assert_close(found.theta, found.weights @ W[found.features])


def test_decoder_rows_can_be_chosen_imitate_a_direction_and_be_ranked():
    model, x, sae = linear(6, 8), inputs(3, 6), random_sae("relu", 6, 9)
    found = rows(model, "0", x, Change("1"), sae, radius=2.0, s=2, features=[1, 4, 6])
    assert set(found.features.tolist()) <= {1, 4, 6}
    W = sae.W_dec.detach()
    cosines = nn.functional.normalize(W) @ W[7] / W[7].norm()
    ranked = nearest_rows(sae, 3 * W[7], 4)
    assert ranked[0][0] == 7 and ranked[0][1] == pytest.approx(1)
    assert [i for i, _ in ranked] == cosines.argsort(descending=True)[:4].tolist()
    once = rows(model, "0", x, Change("1"), sae, radius=2.0, s=1, steps=1, like=W[7])
    assert once.features.tolist() == [7]


@pytest.mark.parametrize("error", ["keep", "recompute"])
def test_clamps_move_the_activations_by_decoder_rows_alone(error):
    model, (x, _), sae = Chain(), random_ends(), random_sae("gated", 8, 32)
    z, _ = sites.read(model, sites.find(model, "c"), x)
    f = sae.encode(z).detach()
    with torch.no_grad(), splice(model, "c", sae, error, edit=clamp([3, 20], value=2.5)):
        got = model(x)
    wanted = f.clone()
    wanted[..., [3, 20]] = 2.5
    torch.testing.assert_close(got, model.tail(z + (wanted - f) @ sae.W_dec).sum((1, 2)))
    with torch.no_grad(), splice(model, "c", sae, error, edit=clamp([3, 20], multiple=-2)) as spliced:
        got = model(x)
    wanted = f.clone()
    wanted[..., [3, 20]] *= -2
    torch.testing.assert_close(got, model.tail(z + (wanted - f) @ sae.W_dec).sum((1, 2)))
    zeros = [edit(spliced.code).to_dense() for edit in (clamp([3, 20], value=0), ablate([3, 20]))]
    torch.testing.assert_close(*zeros)
    code = clamp([20, 3], value=1)(spliced.code)
    assert (code.l0() >= 2).all() and all(code.indices[a:b].diff().gt(0).all() for a, b in code.indptr.unfold(0, 2, 1))


def test_adding_is_what_a_search_does():
    model, x = Positions().eval(), inputs(4, 3, 4)
    where = torch.tensor([True, True, False])
    found = sphere(model, "site", x, lambda o: o.sum((1, 2)), radius=1.0, where=where, steps=4)
    with adding(model, "site", found.theta[0], where):
        torch.testing.assert_close(model(x).sum((1, 2)).mean(), found.objective[0])
    with pytest.raises(ValueError, match="vector: got shape"), adding(model, "site", torch.zeros(2, 4, 3, 4)):
        model(x)


def test_passes_are_counted_as_they_happen():
    model, x = linear(5, 7), inputs(6, 5)
    with count_passes(model) as passes:
        sphere(model, "0", x, Change("1"), radius=1.0, directions=2, starts=3, steps=4, chunk=2)
    # Three chunks: Z(0) once each, the shape once, then 2 × 3 × 4 evaluations, forward and backward.
    assert (passes.forward, passes.backward) == (3 + 1 + 72, 72)
    assert (passes.forward_examples, passes.backward_examples) == (6 + 2 + 144, 144)
    assert passes.total == 148 and passes.examples == 296
    with count_passes(model) as passes:
        y = model(x.requires_grad_())
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        (model(x[:2]) + model(x[2:4])).sum().backward()
        with torch.no_grad():
            model(x)
    assert (passes.forward, passes.backward) == (4, 4)
    assert (passes.forward_examples, passes.backward_examples) == (6 + 2 + 2 + 6, 6 + 6 + 2 + 2)
    model(x)
    assert passes.forward == 4 and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_runs_by_itself_after_a_pass_counts_as_none():
    model, x = linear(5, 7), inputs(6, 5)
    for whole in (lambda: model(x), lambda: sites.run_until(model, sites.find(model, "1"), x)):  # also one left early
        with count_passes(model) as passes:
            whole()
            for _ in range(2):
                model[1](x).sum().backward()
        assert (passes.forward, passes.backward) == (1, 0)
    with count_passes(model) as passes:
        whole().sum().backward()
    assert (passes.forward, passes.backward) == (1, 1)


def test_the_model_is_left_as_it_was_also_after_an_error():
    model, x = Positions(), inputs(4, 3, 4)
    model.bend.eval()
    with pytest.raises(ZeroDivisionError):
        sphere(model, "site", x, lambda o: 1 / 0, radius=1.0)
    for search in (sphere, ball):
        first, again = (
            search(model, "site", x, Change("last"), steps=3, **{"radius" if search is sphere else "epsilon": 1.0})
            for _ in range(2)
        )
        torch.testing.assert_close(first.objective, again.objective)  # its dropout is off
    assert model.training and model.drop.training and not model.bend.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_searches_repeat_and_leave_torchs_generator_alone():
    model, x = Positions().eval(), inputs(4, 3, 4)
    state = torch.random.get_rng_state()
    a, b, other = (sphere(model, "site", x, Change("last"), radius=1.0, steps=3, seed=s).theta for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_works_in_float32_and_where_no_gradients_are_recorded():
    model, x = Positions().float().eval(), inputs(4, 3, 4).float()
    with torch.no_grad():
        found = sphere(model, "site", x, Change("last"), radius=1.0, steps=20)
    assert found.theta.dtype == torch.float32 and found.objective.dtype == torch.float64
    assert found.history[0, -1] > found.history[0, 0]


MODEL = Positions().eval()


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"source": "sight"}, "near names: site"),
        ({"objective": Change("lost")}, "near names: last"),
        ({"source": "last", "objective": Change("bend")}, "'bend' is reached before the source, 'last'"),
        ({"objective": Change("site")}, "the source itself"),
        ({"objective": "last"}, "objective: got str, want a Change"),
        ({"radius": 0}, "radius: got 0, want a number above 0"),
        ({"radius": -1.0}, "radius: got -1.0"),
        ({"radius": math.nan}, "radius: got nan"),
        ({"directions": 5}, "directions: got 5, want at most 4"),
        ({"directions": 0}, "directions: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"starts": 1.5}, "starts: got 1.5"),
        ({"chunk": -2}, "chunk: got -2"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"orthogonal_to": torch.zeros(2, 3)}, r"orthogonal_to: got shape \(2, 3\), want finite \[k, 4\]"),
        ({"objective": lambda o: o.sum()}, r"objective: got shape \(\), want one number an example, \[2\]"),
        ({"objective": lambda o: o}, r"objective: got shape \(2, 3, 4\)"),
        ({"objective": lambda o: 3.0}, "objective: got float"),
        ({"objective": lambda o: (o.sum((1, 2)) * 0).log()}, "not finite at a perturbation of norm 1"),
        ({"objective": lambda o: o.detach().sum((1, 2))}, "has no gradient at the source"),
        ({"objective": lambda o: o.sum((1, 2)) * 0}, "0 everywhere, want something that the source reaches"),
        ({"where": torch.zeros(3, dtype=torch.bool)}, "where: got a mask that takes no position"),
        ({"where": torch.ones(2, 2, dtype=torch.bool)}, r"where: got shape \(2, 2\)"),
        ({"inputs": torch.zeros(())}, "inputs: got no tensor with examples"),
    ],
)
def test_what_is_wrong_is_said(bad, said):
    given = {"source": "site", "inputs": inputs(2, 3, 4), "objective": Change("last"), "radius": 1.0} | bad
    with pytest.raises(ValueError, match=said):
        sphere(MODEL, given.pop("source"), given.pop("inputs"), given.pop("objective"), **given)


def test_what_is_wrong_with_the_others_is_said():
    x, sae = inputs(2, 3, 4), random_sae("gated", 4, 12)
    for name, bad in (("p", {"p": 0}), ("q", {"q": -1}), ("p", {"p": "2"})):
        with pytest.raises(ValueError, match=f"{name}: got"):
            Change("last", **bad)
    with pytest.raises(ValueError, match="epsilon: got 0"):
        ball(MODEL, "site", x, Change("last"), epsilon=0)
    with pytest.raises(ValueError, match="0 everywhere"):
        ball(MODEL, "site", x, lambda o: o.sum((1, 2)) * 0, epsilon=1.0)
    for bad, said in (
        ({"s": 0}, "s: got 0, want an integer"),
        ({"features": [12]}, "features: got 12, want 0 to 11"),
        ({"features": []}, "features: got none"),
        ({"like": torch.zeros(4)}, "want a finite direction"),
        ({"radius": 0.0}, "radius: got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            rows(MODEL, "site", x, Change("last"), sae, **{"radius": 1.0} | bad)
    with pytest.raises(ValueError, match="decoder's rows have 5 dimensions, want 4"):
        rows(MODEL, "site", x, Change("last"), random_sae("gated", 5, 12), radius=1.0)
    with pytest.raises(ValueError, match="sae: got a Linear"):
        rows(MODEL, "site", x, Change("last"), nn.Linear(4, 4), radius=1.0)
    with pytest.raises(ValueError, match=r"theta: got \(3,\)"):
        nearest_rows(sae, torch.ones(3))
    for bad in ({}, {"value": 1.0, "multiple": 2.0}):
        with pytest.raises(ValueError, match="want one of the two"):
            clamp([1], **bad)
    with pytest.raises(ValueError, match="value: got inf, want a finite number"):
        clamp([1], value=math.inf)
    code = sae.encode_sparse(inputs(3, 4))
    with pytest.raises(ValueError, match="features: got 12"):
        clamp([12], value=1.0)(code)
