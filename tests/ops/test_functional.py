"""sae_fast.functional: every loss and every gradient against plain PyTorch autograd."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from helpers import (
    FEW_SHAPES,
    Judge,
    Problem,
    assert_repeats,
    at_entries,
    both,
    decoded,
    dense,
    grid,
    judge,
    make_inputs,
    randn,
    random_code,
)
from torch import Tensor

from sae_fast import functional, ops, reference, use_backend
from sae_fast.activations import named
from sae_fast.code import SparseCode
from sae_fast.gradients import feature_sums
from sae_fast.objectives import Gated
from sae_fast.ops import crossovers

SHAPES = [*FEW_SHAPES, (1, 769, 31), (3, 1, 100), (257, 63, 1), (257, 63, 33)]
NAMES = ["x", "W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec", "target"]
TOTAL = (1.0, 1.0, 1.0)


def gated(loss, p: Problem, target: Tensor | None, dialect: str, terms) -> Tensor:
    out = loss(p.x, p.W_enc, p.b_gate, p.b_mag, p.r_mag, p.W_dec, p.b_dec, 0.7, dialect, target)
    if terms == TOTAL:
        return out.total
    return terms[0] * out.reconstruction + terms[1] * out.sparsity + terms[2] * out.auxiliary


def relu(loss, p: Problem, target: Tensor | None, dialect: str, terms) -> Tensor:
    out = loss(p.x, p.W_enc, p.b_gate, p.W_dec, p.b_dec, 0.7, dialect, target)
    return out.total if terms == TOTAL else terms[0] * out.reconstruction + terms[1] * out.sparsity


LOSSES = {
    "gated": (gated, functional.gated_loss, reference.gated_loss),
    "relu": (relu, functional.relu_loss, reference.relu_loss),
}


def gradients(which: str, body: int, p: Problem, target: Tensor | None, dtype, dialect, terms) -> dict[str, Tensor]:
    """The loss and its gradient with respect to everything."""
    run, leaves = LOSSES[which][0], p.leaves(dtype)
    target = None if target is None else target.to(dtype, copy=True).requires_grad_()
    loss = run(LOSSES[which][body], leaves, target, dialect, terms)
    loss.backward()
    tensors = dict(zip(NAMES, [*leaves.tensors(), target], strict=True))
    return {"loss": loss.detach()} | {n: t.grad for n, t in tensors.items() if t is not None and t.grad is not None}


@cache
def trials_of(which: str, shape, dialect: str, terms, transcoder: bool) -> list:
    """(problem, target, torch's gradients, float64's)."""
    B, d, F = shape
    trials = []
    for seed in range(16 if B * d * F < 10**6 else 2):
        p = make_inputs(B, d, F, density=0.15, seed=seed)
        target = randn(B, d, seed=seed + 50) if transcoder else None
        results = [gradients(which, 2, p, target, dtype, dialect, terms) for dtype in (torch.float32, torch.float64)]
        trials.append((p, target, *results))
    return trials


def judge_gradients(which: str, shape, dialect: str, terms=TOTAL, transcoder: bool = False) -> None:
    result, (B, d, F) = Judge(), shape
    for p, target, torchs, exact in trials_of(which, shape, dialect, terms, transcoder):
        ours = gradients(which, 1, p, target, torch.float32, dialect, terms)
        assert ours.keys() == exact.keys() and len(ours) >= 6
        for name in ours:
            if name != "loss" or B * d * F < 10**6:  # two numbers are a matter of luck; test_decode_loss.py has the losses
                result.add(name, ours[name], torchs[name], exact[name])
    result.verdict()


@pytest.mark.parametrize("dialect", reference.DIALECTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("which", LOSSES)
def test_loss_and_every_gradient_on_either_route(which, shape, dialect, route):
    judge_gradients(which, shape, dialect)


@pytest.mark.parametrize("dialect", reference.DIALECTS)
@pytest.mark.parametrize("which", LOSSES)
def test_loss_and_every_gradient_on_every_instruction_set(which, dialect, isa):
    judge_gradients(which, (257, 63, 33), dialect)


@pytest.mark.parametrize("dialect", reference.DIALECTS)
@pytest.mark.parametrize("terms", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, -3.0)])
def test_each_term_has_a_gradient_of_its_own(terms, dialect, route):
    judge_gradients("gated", (257, 63, 33), dialect, terms)


@pytest.mark.parametrize("terms", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_each_term_of_the_relu_loss_has_a_gradient_of_its_own(terms):
    judge_gradients("relu", (257, 63, 33), "saelens", terms)


@pytest.mark.parametrize("dialect", reference.DIALECTS)
@pytest.mark.parametrize("which", LOSSES)
def test_a_target_gets_the_gradient_that_x_then_lacks(which, dialect, route):
    judge_gradients(which, (57, 63, 33), dialect, transcoder=True)


@pytest.mark.parametrize("which", LOSSES)
def test_reference_bodies_have_the_same_gradients(which):
    with use_backend("reference"):
        judge_gradients(which, (57, 63, 33), "saelens")


@pytest.mark.parametrize("name", NAMES)
def test_any_one_gradient_alone(name, route):
    """Each input by itself requires a gradient: the backward pass makes only that one, and it is the same."""
    p, target = make_inputs(57, 63, 33), randn(57, 63, seed=50)
    everything = gradients("gated", 1, p, target, torch.float32, "saelens", TOTAL)[name]
    tensors = dict(zip(NAMES, [*(t.clone() for t in p.tensors()), target.clone()], strict=True))
    tensors[name].requires_grad_()
    target = tensors.pop("target")
    gated(functional.gated_loss, Problem(**tensors), target, "saelens", TOTAL).backward()
    alone = (tensors | {"target": target})[name].grad
    assert torch.equal(alone, everything)


def test_ties_at_zero_carry_no_gradient():
    """π_gate exactly 0 is not a member, and a magnitude of exactly 0 has no slope: as torch's relu has it."""
    x, W_enc = grid(57, 8, step=0.25, reach=4, seed=1), grid(33, 8, step=0.5, reach=2, seed=2)
    u = x @ W_enc.T
    p = Problem(x, W_enc, -u[3], -u[5], torch.zeros(33), randn(33, 8, seed=3), torch.zeros(8))
    pi = u - u[3]
    assert (pi == 0).any(0).all() and ((pi > 0) & (u - u[5] == 0)).any()
    result = Judge()
    ours, torchs, exact = (
        gradients("gated", body, p, None, dtype, "paper", TOTAL)
        for body, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.float64))
    )
    for name in exact:
        result.add(name, ours[name], torchs[name], exact[name])
    result.verdict()


def test_a_gate_open_at_magnitude_zero_has_auxiliary_and_sparsity_gradient_only():
    """S \\ S′: with every magnitude at 0, W_enc learns from the gates alone, and r_mag and b_mag from nothing."""
    p = make_inputs(57, 63, 33)
    closed = Problem(
        *(torch.full_like(t, -1e3) if name == "b_mag" else t for name, t in zip(NAMES, p.tensors(), strict=False))
    )
    grads = gradients("gated", 1, closed, None, torch.float32, "paper", TOTAL)
    assert not grads["r_mag"].any() and not grads["b_mag"].any() and not grads["W_dec"].any()
    assert (grads["b_gate"] != 0).sum() > 10
    exact = gradients("gated", 2, closed, None, torch.float64, "paper", TOTAL)
    torchs = gradients("gated", 2, closed, None, torch.float32, "paper", TOTAL)
    result = Judge()
    for name in ("W_enc", "b_gate", "x", "b_dec"):
        result.add(name, grads[name], torchs[name], exact[name])
    result.verdict()


def test_backward_repeats_bit_for_bit_at_every_thread_count(monkeypatch):
    """In the sparse route; the grid makes torch's own product, the encoder's, the same for every thread count."""
    for op in crossovers.CROSSOVER:
        monkeypatch.setitem(crossovers.CROSSOVER, op, 2.0)
    g = {"x": grid(57, 8, step=0.25, reach=4, seed=1), "W_enc": grid(500, 8, step=0.5, reach=2, seed=2)}
    p = Problem(**g, b_gate=randn(500) - 2, b_mag=randn(500, seed=1), r_mag=randn(500, seed=2) / 9, W_dec=randn(500, 8),
                b_dec=torch.zeros(8))  # fmt: skip

    def run():
        grads = gradients("gated", 1, p, None, torch.float32, "saelens", TOTAL)
        return [grads[name] for name in ("loss", "W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec", "x")]

    assert_repeats(run)


def test_a_mean_over_no_examples_is_a_value_error():
    """Torch's own is a silent NaN."""
    p = make_inputs(3, 63, 33)
    with pytest.raises(ValueError, match="normaliser: got 0"):
        gated(functional.gated_loss, replace(p, x=p.x[:0]), None, "paper", TOTAL)


def test_an_unknown_dialect_is_a_value_error():
    p = make_inputs(3, 63, 33)
    for body in (functional.gated_loss, reference.gated_loss):
        with pytest.raises(ValueError, match="dialect: got 'sae'"):
            gated(body, p, None, "sae", TOTAL)
    for body in (functional.relu_loss, reference.relu_loss):
        with pytest.raises(ValueError, match="dialect: got 'sae'"):
            relu(body, p, None, "sae", TOTAL)


# ---- Gradients of single ops, from an outside loss -------------------------------------------------------------------


def numbers(seed: int, *shape: int, like: Tensor) -> Tensor:
    return randn(*shape, seed=seed).to(like.dtype)


def compare(ours, plain, *inputs: Tensor) -> None:
    """The gradients of two scalar functions with respect to every input, by the 2× rule."""

    def grads(function, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves)

    result = Judge()
    triples = zip(grads(ours, torch.float32), grads(plain, torch.float32), grads(plain, torch.float64), strict=True)
    for k, triple in enumerate(triples):
        result.add(f"gradient {k}", *triple)
    result.verdict()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ["gated", "relu", "jumprelu"])
def test_encode_is_differentiable_in_its_values_and_in_u(activation, backend):
    p = make_inputs(57, 63, 100, density=0.15)
    threshold = randn(100).abs() * 0.3
    extra = {"gated": lambda r, b: dict(r_mag=r, b_mag=b), "relu": lambda r, b: {},
             "jumprelu": lambda r, b: dict(threshold=threshold.to(r.dtype))}[activation]  # fmt: skip

    def encoded(x, W, bias, r, b):
        return ops.encode(x, W, bias, activation=activation, **extra(r, b))

    support = encoded(p.x_c, p.W_enc, p.b_gate, p.r_mag, p.b_mag)
    V, nnz = support.values.shape

    def ours(*inputs):
        code = encoded(*inputs)
        head = (code.values * numbers(1, V, nnz, like=inputs[0])).sum() + (code.u * numbers(2, nnz, like=inputs[0])).sum()
        return head + 0 * (inputs[3].sum() + inputs[4].sum())

    def plain(x, W, bias, r, b):
        u = x @ W.T
        pi = u + bias
        if activation == "gated":
            values = torch.stack([(pi > 0) * torch.relu(torch.exp(r) * u + b), torch.relu(pi)])
        else:
            keep = pi > 0 if activation == "relu" else pi > threshold.to(pi.dtype)
            values = (keep * torch.relu(pi))[None]
        values, u = at_entries(support, values), at_entries(support, u)
        head = (values * numbers(1, V, nnz, like=x)).sum() + (u * numbers(2, nnz, like=x)).sum()
        return head + 0 * (r.sum() + b.sum())

    with use_backend(backend):
        compare(ours, plain, p.x_c, p.W_enc, p.b_gate, p.r_mag, p.b_mag)


@pytest.mark.parametrize("support", ["topk", "batch_topk"])
def test_topk_supports_pass_gradients_to_the_chosen(support):
    p = make_inputs(57, 63, 33, density=0.3)
    chosen = ops.encode(p.x_c, p.W_enc, p.b_gate, activation="relu", support=support, k=3)

    def ours(x, W, bias):
        values = ops.encode(x, W, bias, activation="relu", support=support, k=3).values
        return (values * numbers(1, 1, chosen.nnz, like=x)).sum()

    def plain(x, W, bias):
        return (at_entries(chosen, torch.relu(x @ W.T + bias)) * numbers(1, chosen.nnz, like=x)).sum()

    compare(ours, plain, p.x_c, p.W_enc, p.b_gate)


@pytest.mark.parametrize("groups", [None, [0, 40, 100], [10, 10, 30, 90]])
@pytest.mark.parametrize("V", [1, 3])
def test_decode_is_differentiable_in_values_and_weights(V, groups, route):
    code, W = random_code(57, 100, V), randn(100, 63)
    bounds = groups or [0, 100]
    head = (V, len(bounds) - 1, 57, 63)

    def ours(values, W):
        return (ops.decode(code, W, values, groups=groups).reshape(head) * numbers(1, *head, like=W)).sum()

    def plain(values, W):
        f = dense(code, values)
        out = torch.stack([f[..., a:b] @ W[a:b] for a, b in pairwise(bounds)], dim=1)
        return (out * numbers(1, *head, like=W)).sum()

    compare(ours, plain, code.values, W)


def test_sampled_dots_is_differentiable_in_rows_and_weights(route):
    code, A, W = random_code(57, 100), randn(57, 63), randn(100, 63, seed=1)
    ours = lambda A, W: (ops.sampled_dots(code, A, W) * numbers(1, code.nnz, like=A)).sum()  # noqa: E731
    plain = lambda A, W: (at_entries(code, A @ W.T) * numbers(1, code.nnz, like=A)).sum()  # noqa: E731
    compare(ours, plain, A, W)


@pytest.mark.parametrize(
    "prefixes, zeros", [([100], False), (None, True), ([1, 10, 40, 100], False), ([30, 99, 100], True)]
)
@pytest.mark.parametrize("V, stop_auxiliary", [(1, True), (2, True), (2, False)])
def test_decode_loss_is_differentiable_in_everything(V, stop_auxiliary, prefixes, zeros, route):
    """Also in sparsity_weight; each of the three losses with its own factor; the other outputs are constants."""
    code, ends = random_code(57, 100, V), prefixes or [100]
    inputs = (code.values, randn(100, 63), randn(63, seed=1), randn(57, 63, seed=2), randn(100, seed=3).abs())
    c = None if prefixes is None else randn(len(ends), seed=4).abs()

    def ours(values, W, b, target, weight):
        options = dict(prefixes=prefixes, prefix_weights=c if c is None else c.to(W.dtype), zeros=zeros)
        out = ops.decode_loss(code.with_values(values), W, b, target, weight, 13.0, stop_auxiliary, **options)
        assert not out.residual.requires_grad or out.residual.grad_fn is not None
        return (out.losses * numbers(1, 3, like=W)).sum()

    def plain(values, W, b, target, weight):
        factors, positive = numbers(1, 3, like=W), torch.relu(dense(code, values))
        f = dense(code, values) if zeros else positive

        def squares(f, W, b):
            each = [(f[:, :end] @ W[:end] + b - target).pow(2).sum() for end in ends]
            return (torch.stack(each) * (1 if c is None else c.to(W.dtype))).sum()

        loss = factors[0] * squares(f[0], W, b) + factors[1] * (positive[-1] * weight).sum()
        if V == 2:
            loss = loss + factors[2] * squares(f[1], *((W.detach(), b.detach()) if stop_auxiliary else (W, b)))
        return loss / 13.0

    compare(ours, plain, *inputs)


def test_feature_sums_adds_up_each_features_entries():
    code = random_code(57, 100)
    sums = feature_sums(ops.transpose(code), code.magnitudes, 57)
    judge(sums, lambda values: dense(code, values).sum(0), code.magnitudes)


def test_sparsity_weight_is_lambda_or_lambda_times_the_rows_norm():
    W = randn(33, 63)
    assert torch.equal(Gated(0.7, "paper").sparsity_weight(W), torch.full((33,), 0.7))
    judge(Gated(0.7, "saelens").sparsity_weight(W), lambda W: 0.7 * W.norm(dim=1), W)


def test_value_gradients_go_through_the_activation():
    """The chain rule of the gated activation on entries, as autograd has it."""
    u, scale = randn(200), randn(200, seed=1).exp()
    bias, b_mag, grads = randn(200, seed=2), randn(200, seed=3), randn(2, 200, seed=4)

    def plain(u, bias, log_scale, b_mag, grads):
        leaves = [t.detach().requires_grad_() for t in (u, bias, log_scale, b_mag)]
        u, bias, log_scale, b_mag = leaves
        pi = u + bias
        values = torch.stack([(pi > 0) * torch.relu(torch.exp(log_scale) * u + b_mag), torch.relu(pi)])
        return torch.stack(torch.autograd.grad((values * grads).sum(), leaves))

    values = torch.stack([(u + bias > 0) * torch.relu(scale * u + b_mag), torch.relu(u + bias)])
    pulled = named("gated").pullback(u, torch.where(values != 0, grads, 0), torch.arange(200), (scale, b_mag))
    judge(torch.stack(pulled), plain, u, bias, scale.log(), b_mag, grads)


def test_gradients_of_concatenated_codes_are_those_of_the_whole_batch():
    """Gradient accumulation: SparseCode.cat plus the stacked residual rows."""
    code, W, b = random_code(57, 100), randn(100, 63), torch.zeros(63)
    target, weight = randn(57, 63, seed=2), torch.ones(100)
    whole = ops.decode_loss(code, W, b, target, weight, 57)
    a, z = int(code.indptr[20]), int(code.indptr[57])
    head = SparseCode(torch.Size((20, 100)), code.indptr[:21], code.indices[:a], code.u[:a], code.values[:, :a])
    tail = SparseCode(torch.Size((37, 100)), code.indptr[20:] - a, code.indices[a:z], code.u[a:z], code.values[:, a:z])
    outs = [ops.decode_loss(part, W, b, t, weight, 57) for part, t in ((head, target[:20]), (tail, target[20:]))]
    joined, residual = SparseCode.cat([head, tail]), torch.cat([out.residual for out in outs])
    grads = torch.cat([out.grads for out in outs], dim=1)
    assert torch.equal(grads, whole.grads) and torch.equal(residual, whole.residual)
    rows = ops.outer(ops.transpose(joined), [joined.magnitudes * (2 / 57)], [residual])

    def plain(values, W):
        r = decoded(code, values, W)[0] - target.to(W.dtype)
        return dense(code, values)[0].T @ r * (2 / 57)

    result = Judge()
    result.add("dW_dec", rows, *both(plain, code.values, W))
    result.verdict()


# ---- Numerical gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", LOSSES)
def test_gradcheck_of_the_saelens_losses_in_float64(which):
    """Every kink is ≥ 1e-3 away, so the numerical derivative is the derivative."""
    p = make_inputs(5, 4, 6, density=0.5, seed=3).to(torch.float64)
    code = reference.gated_encode(*p.gated())
    assert code.pi_gate.abs().min() > 1e-3 and code.pi_mag.abs().min() > 1e-3

    def total(*tensors):
        return LOSSES[which][0](LOSSES[which][1], Problem(*tensors[:-1]), tensors[-1], "saelens", TOTAL)

    target = randn(5, 4, seed=9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(total, (*p.leaves().tensors(), target))


def test_routes_were_both_taken(monkeypatch):
    """The fixture ``route`` does switch: the dense route calls scatter, the sparse one does not."""
    calls = []
    for op in ("decode", "decode_loss", "outer"):
        monkeypatch.setitem(crossovers.CROSSOVER, op, -1.0)
    scatter = crossovers.scatter
    monkeypatch.setattr(crossovers, "scatter", lambda *a: calls.append(1) or scatter(*a))
    gradients("gated", 1, make_inputs(3, 63, 33), None, torch.float32, "paper", TOTAL)
    dense_calls = len(calls)
    for op in ("decode", "decode_loss", "outer"):
        monkeypatch.setitem(crossovers.CROSSOVER, op, 2.0)
    gradients("gated", 1, make_inputs(3, 63, 33), None, torch.float32, "paper", TOTAL)
    assert dense_calls > 0 and len(calls) == dense_calls
