"""The unfused ops compose to everything that the fused ones do: each composition against plain PyTorch autograd."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import pytest
import torch
from helpers import Judge, Problem, dense, make_inputs, randn
from problems.ranks import of_two_ranks, with_ranks
from torch import Tensor

from sae_fast import ops, reference
from sae_fast.activations import named
from sae_fast.code import RowGradient, SparseCode
from sae_fast.gradients import feature_sums
from sae_fast.ops.decode_loss import prefix_rows

LAMBDA = 0.7
NAMES = ["W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"]
ADAM = dict(step=7, lr=0.05, beta2=0.99, eps=1e-3)
SHAPE = (57, 63, 100)


def problem() -> Problem:
    return make_inputs(*SHAPE, density=0.1)


def encode(p: Problem, x: Tensor | None = None) -> SparseCode:
    x_c = p.x_c if x is None else x - p.b_dec
    return ops.encode(x_c, p.W_enc, p.b_gate, activation="gated", r_mag=p.r_mag, b_mag=p.b_mag)


def judge(ours: dict[str, Tensor], plain) -> None:
    """Every tensor by the 2× rule; ``plain(dtype)`` gives the same dict in plain PyTorch."""
    torchs, exact, result = plain(torch.float32), plain(torch.float64), Judge()
    assert ours.keys() == exact.keys()
    for name in exact:
        result.add(name, ours[name], torchs[name], exact[name])
    result.verdict()


# ---- The gated step --------------------------------------------------------------------------------------------------


def gradients_unfused(p: Problem, code: SparseCode, x: Tensor) -> dict[str, Tensor]:
    """decode, sampled_dots, transpose and outer: MATH.md §2, line by line."""
    B = x.shape[0]
    r, r_aux = ops.decode(code, p.W_dec, code.values) + p.b_dec - x
    g_mag = ops.sampled_dots(code, 2 / B * r, p.W_dec) * (code.magnitudes > 0)
    g_gate = (ops.sampled_dots(code, 2 / B * r_aux, p.W_dec) + LAMBDA / B) * (code.gates > 0)
    scale = torch.exp(p.r_mag)[code.indices]
    delta, csc, ones = g_gate + scale * g_mag, ops.transpose(code), torch.ones(B, 1)
    vectors = {"b_gate": g_gate, "b_mag": g_mag, "r_mag": g_mag * scale * code.u}
    return {
        "W_enc": ops.outer(csc, [delta], [x - p.b_dec]),
        **{name: ops.outer(csc, [entries], [ones])[:, 0] for name, entries in vectors.items()},
        "W_dec": ops.outer(csc, [code.magnitudes * (2 / B)], [r]),
        "b_dec": 2 / B * r.sum(0) - ops.decode(code, p.W_enc, delta).sum(0),
    }


def gradients_fused(p: Problem, code: SparseCode, x: Tensor) -> dict[str, RowGradient | Tensor]:
    """decode_loss, and gradients in the form that weight_step takes."""
    B = x.shape[0]
    out = ops.decode_loss(code, p.W_dec, p.b_dec, x, torch.full((p.W_dec.shape[0],), LAMBDA), B)
    vectors = torch.exp(p.r_mag), p.b_mag
    delta, g_gate, g_r, g_mag = named("gated").pullback(code.u, out.grads, code.indices, vectors)
    csc, ones = ops.transpose(code), torch.ones(B, 1)
    return {
        "W_enc": RowGradient(csc, [delta], [x - p.b_dec]),
        **{n: RowGradient(csc, [g], [ones]) for n, g in (("b_gate", g_gate), ("b_mag", g_mag), ("r_mag", g_r))},
        "W_dec": RowGradient(csc, [code.magnitudes * (2 / B)], [out.residual]),
        "b_dec": 2 / B * out.residual.sum(0) - ops.decode(code, p.W_enc, delta).sum(0),
    }


def gradients_plain(p: Problem, dtype: torch.dtype, dialect: str = "paper") -> dict[str, Tensor]:
    leaves = p.leaves(dtype)
    parameters = [getattr(leaves, name) for name in NAMES]
    x, W_enc, b_gate, b_mag, r_mag, W_dec, b_dec = leaves.tensors()
    loss = reference.gated_loss(x, W_enc, b_gate, b_mag, r_mag, W_dec, b_dec, LAMBDA, dialect).total
    return dict(zip(NAMES, torch.autograd.grad(loss, parameters), strict=True))


def second_moments(p: Problem, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Positive, as after some steps: from v = 0, Adam with β1 = 0 turns rounding into full steps."""
    return {name: (randn(*getattr(p, name).shape, seed=k).square() + 0.1).to(dtype) for k, name in enumerate(NAMES)}


def step_ours(p: Problem, grads: dict[str, RowGradient | Tensor]) -> dict[str, Tensor]:
    """The parameters after weight_step (of a RowGradient) or row_step (of a dense gradient)."""
    after, moments = {}, second_moments(p)
    for name in NAMES:
        W, v, grad = getattr(p, name).clone(), moments[name], grads[name]
        rows = (W.reshape(-1, W.shape[-1] if W.dim() == 2 else 1), v.reshape(-1, W.shape[-1] if W.dim() == 2 else 1))
        last_step, unit = torch.full((rows[0].shape[0],), ADAM["step"] - 1), name == "W_dec"
        if isinstance(grad, RowGradient):
            ops.weight_step(*rows, last_step, grad, unit_rows=unit, **ADAM)
        else:
            ops.row_step(*rows, last_step, grad.reshape(rows[0].shape), unit_rows=unit, **ADAM)
        after[name] = W
    return after


def step_plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    after, grads, moments = {}, gradients_plain(p, dtype), second_moments(p, dtype)
    for name in NAMES:
        W = getattr(p, name).to(dtype, copy=True)
        unit = name == "W_dec"
        reference.adam_step(W, grads[name], torch.zeros_like(W), moments[name], ADAM["step"], ADAM["lr"],
                            (0.0, ADAM["beta2"]), ADAM["eps"], unit)  # fmt: skip
        after[name] = W
    return after


def test_unfused_gradients_of_the_gated_step(route):
    p = problem()
    judge(gradients_unfused(p, encode(p), p.x), lambda dtype: gradients_plain(p, dtype))


@pytest.mark.parametrize("gradients", [gradients_unfused, gradients_fused])
def test_the_gated_step(gradients, route, isa):
    p = problem()
    judge(step_ours(p, gradients(p, encode(p), p.x)), lambda dtype: step_plain(p, dtype))


@pytest.mark.parametrize("gradients", [gradients_unfused, gradients_fused])
def test_micro_batches_of_the_gated_step_accumulate(gradients, route):
    """Three micro-batches: their codes by SparseCode.cat, their residuals by stacking rows."""
    p = problem()
    code = SparseCode.cat([encode(p, x) for x in p.x.split([20, 30, 7])])
    judge(step_ours(p, gradients(p, code, p.x)), lambda dtype: step_plain(p, dtype))


def test_accumulated_outer_products_are_the_batchs_gradient(route):
    """The other way: one dense accumulator, to which each micro-batch adds."""
    p = problem()
    totals = {"W_enc": torch.zeros_like(p.W_enc), "W_dec": torch.zeros_like(p.W_dec)}
    for x in p.x.split([20, 30, 7]):
        grads = gradients_fused(p, encode(p, x), x)
        share = x.shape[0] / SHAPE[0]  # each is normalised by its own size
        for name, out in totals.items():
            g = grads[name]
            ops.outer(g.csc, [v * share for v in g.values], g.A, out=out)
    judge(totals, lambda dtype: {name: gradients_plain(p, dtype)[name] for name in totals})


def test_a_clipped_step(route):
    """grad_sqnorm over all parameters, then weight_step with the scale: torch.nn.utils.clip_grad_norm_."""
    p = problem()
    grads = gradients_fused(p, encode(p), p.x)
    total = grads["b_dec"].double().pow(2).sum()
    for name in NAMES[:-1]:
        total = total + ops.grad_sqnorm(grads[name], getattr(p, name).reshape(100, -1))
    scale = (0.1 / total.sqrt()).float()
    assert scale < 0.5
    W, v, last_step = p.W_enc.clone(), second_moments(p)["W_enc"], torch.full((100,), 6)
    ops.weight_step(W, v, last_step, grads["W_enc"], grad_scale=scale, **ADAM)

    def plain(dtype):
        grads, after = gradients_plain(p, dtype), p.W_enc.to(dtype, copy=True)
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        m, v = torch.zeros_like(after), second_moments(p, dtype)["W_enc"]
        reference.adam_step(after, grads["W_enc"] * (0.1 / norm), m, v, 7, ADAM["lr"], (0.0, ADAM["beta2"]), ADAM["eps"])
        return {"W_enc": after}

    judge({"W_enc": W}, plain)


# ---- A transcoder ----------------------------------------------------------------------------------------------------


def transcoder_plain(p: Problem, W_out: Tensor, b_out: Tensor, target: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A gated encoder whose decoder writes to another space; W_out and b_out are stopped in the auxiliary term."""
    q = p.leaves(dtype)
    W_out, b_out = (t.to(dtype, copy=True).requires_grad_() for t in (W_out, b_out))
    target = target.to(dtype)
    code = reference.gated_encode(*q.gated())
    gates = torch.relu(code.pi_gate)
    loss = (code.f @ W_out + b_out - target).pow(2).sum(-1).mean() + LAMBDA * gates.sum(-1).mean()
    loss = loss + (gates @ W_out.detach() + b_out.detach() - target).pow(2).sum(-1).mean()
    names = ["W_enc", "b_gate", "b_mag", "r_mag", "b_dec"]
    grads = torch.autograd.grad(loss, [*(getattr(q, n) for n in names), W_out, b_out])
    residual = (code.f @ W_out + b_out - target).detach()
    return {"residual": residual} | dict(zip([*names, "W_out", "b_out"], grads, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_transcoder_to_a_space_of_another_width(fused, route):
    p, (B, _, F) = problem(), SHAPE
    W_out, b_out, target = randn(F, 31, seed=1), randn(31, seed=2), randn(B, 31, seed=3)
    code = encode(p)
    scale, csc = torch.exp(p.r_mag)[code.indices], ops.transpose(code)
    if fused:
        out = ops.decode_loss(code, W_out, b_out, target, torch.full((F,), LAMBDA), B)
        r, (g_mag, g_gate) = out.residual, out.grads
    else:
        r, r_aux = ops.decode(code, W_out, code.values) + b_out - target
        g_mag = 2 / B * ops.sampled_dots(code, r, W_out) * (code.magnitudes > 0)
        g_gate = (2 / B * ops.sampled_dots(code, r_aux, W_out) + LAMBDA / B) * (code.gates > 0)
    delta = g_gate + scale * g_mag
    ours = {"residual": r, "W_enc": ops.outer(csc, [delta], [p.x_c])}
    for name, entries in (("b_gate", g_gate), ("b_mag", g_mag), ("r_mag", g_mag * scale * code.u)):
        ours[name] = feature_sums(csc, entries, B)
    ours["b_dec"] = -ops.decode(code, p.W_enc, delta).sum(0)
    ours["W_out"] = ops.outer(csc, [code.magnitudes * (2 / B)], [r])
    ours["b_out"] = 2 / B * r.sum(0)
    judge(ours, lambda dtype: transcoder_plain(p, W_out, b_out, target, dtype))


# ---- The gradient to x from an outside loss --------------------------------------------------------------------------


def outside_loss(x_hat: Tensor) -> Tensor:
    """A classifier that reads the reconstruction."""
    head = randn(63, 10, seed=4).to(x_hat.dtype)
    return torch.nn.functional.cross_entropy(x_hat @ head, torch.arange(x_hat.shape[0]) % 10)


def outside_plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = p.leaves(dtype)
    x_hat = reference.decode(reference.gated_encode(*leaves.gated()).f, leaves.W_dec, leaves.b_dec)
    return {"x": torch.autograd.grad(outside_loss(x_hat), leaves.x)[0]}


def test_the_gradient_to_x_from_an_outside_loss_by_hand(route):
    p = problem()
    code = encode(p)
    x_hat = (ops.decode(code, p.W_dec) + p.b_dec).requires_grad_()
    (grad,) = torch.autograd.grad(outside_loss(x_hat), x_hat)
    g_mag = ops.sampled_dots(code, grad, p.W_dec) * (code.magnitudes > 0)
    delta = g_mag * torch.exp(p.r_mag)[code.indices]
    judge({"x": ops.decode(code, p.W_enc, delta)}, lambda dtype: outside_plain(p, dtype))


def test_the_gradient_to_x_from_an_outside_loss_by_autograd(route):
    p = problem()
    x = p.x.clone().requires_grad_()
    x_hat = ops.decode(encode(p, x), p.W_dec) + p.b_dec
    judge({"x": torch.autograd.grad(outside_loss(x_hat), x)[0]}, lambda dtype: outside_plain(p, dtype))


# ---- A feature-parallel step on two ranks ----------------------------------------------------------------------------


def feature_parallel_rank(rank: int, log: TextIO) -> dict[str, Tensor]:
    """Each rank owns half of the features.  The partial x̂ are summed between decode and loss; nothing else crosses."""
    whole, own = problem(), slice(0, 41) if rank == 0 else slice(41, 100)
    mine = [t if name in ("x", "b_dec") else t[own] for name, t in zip(["x", *NAMES], whole.tensors(), strict=True)]
    p, B = Problem(*mine), SHAPE[0]
    code = encode(p)
    x_hats = ops.decode(code, p.W_dec, code.values)
    print("has its share of x̂", file=log)
    torch.distributed.all_reduce(x_hats)
    r, r_aux = x_hats + p.b_dec - p.x
    g_mag = ops.sampled_dots(code, 2 / B * r, p.W_dec) * (code.magnitudes > 0)
    g_gate = (ops.sampled_dots(code, 2 / B * r_aux, p.W_dec) + LAMBDA / B) * (code.gates > 0)
    scale = torch.exp(p.r_mag)[code.indices]
    delta, csc, ones = g_gate + scale * g_mag, ops.transpose(code), torch.ones(B, 1)
    through_encoder = ops.decode(code, p.W_enc, delta).sum(0)
    print("has its gradients", file=log)
    torch.distributed.all_reduce(through_encoder)
    grads = {
        "W_enc": RowGradient(csc, [delta], [p.x_c]),
        "b_gate": RowGradient(csc, [g_gate], [ones]),
        "b_mag": RowGradient(csc, [g_mag], [ones]),
        "r_mag": RowGradient(csc, [g_mag * scale * code.u], [ones]),
        "W_dec": RowGradient(csc, [code.magnitudes * (2 / B)], [r]),
    }
    moments = second_moments(whole)
    after = {"b_dec": 2 / B * r.sum(0) - through_encoder}
    for name, grad in grads.items():
        W, v = getattr(p, name).clone(), moments[name][own].clone()
        rows, last_step = (W.reshape(len(W), -1), v.reshape(len(v), -1)), torch.full((len(W),), ADAM["step"] - 1)
        ops.weight_step(*rows, last_step, grad, unit_rows=name == "W_dec", **ADAM)
        after[name] = W
    return after


@pytest.mark.slow
@with_ranks
def test_a_feature_parallel_step_on_two_ranks(tmp_path: Path):
    halves = of_two_ranks(feature_parallel_rank, tmp_path)
    assert torch.equal(halves[0]["b_dec"], halves[1]["b_dec"])
    p = problem()
    ours = {name: torch.cat([half[name] for half in halves]) for name in NAMES if name != "b_dec"}
    ours["b_dec gradient"] = halves[0]["b_dec"]

    def plain(dtype):
        after = step_plain(p, dtype)
        del after["b_dec"]
        return after | {"b_dec gradient": gradients_plain(p, dtype)["b_dec"]}

    judge(ours, plain)


# ---- A JumpReLU straight-through step --------------------------------------------------------------------------------

WIDTH = 0.25  # ε of 2407.14435, the width of the kernel


class Step(torch.autograd.Function):
    """H(π − θ), with the pseudo-derivative −K((π − θ)/ε)/ε in θ, K the rectangle (2407.14435, equation 11)."""

    @staticmethod
    def forward(ctx, pi, threshold):
        ctx.save_for_backward(pi, threshold)
        return (pi > threshold).to(pi.dtype)

    @staticmethod
    def backward(ctx, grad):
        pi, threshold = ctx.saved_tensors
        window = ((pi - threshold).abs() < WIDTH / 2).to(pi.dtype)
        return None, (-window / WIDTH * grad).sum(0)


class JumpReLU(torch.autograd.Function):
    """π H(π − θ), with the pseudo-derivative −(θ/ε) K((π − θ)/ε) in θ (equation 12)."""

    @staticmethod
    def forward(ctx, pi, threshold):
        ctx.save_for_backward(pi, threshold)
        return pi * (pi > threshold)

    @staticmethod
    def backward(ctx, grad):
        pi, threshold = ctx.saved_tensors
        window = ((pi - threshold).abs() < WIDTH / 2).to(pi.dtype)
        return grad * (pi > threshold), (-threshold / WIDTH * window * grad).sum(0)


def jumprelu_plain(p: Problem, threshold: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    q, threshold = p.leaves(dtype), threshold.to(dtype, copy=True).requires_grad_()
    pi = q.x_c @ q.W_enc.T + q.b_mag
    residual = JumpReLU.apply(pi, threshold) @ q.W_dec + q.b_dec - q.x
    loss = residual.pow(2).sum(-1).mean() + LAMBDA * Step.apply(pi, threshold).sum(-1).mean()
    names = ["W_enc", "b_mag", "W_dec", "b_dec"]
    grads = torch.autograd.grad(loss, [*(getattr(q, n) for n in names), threshold])
    return {"residual": residual.detach()} | dict(zip([*names, "threshold"], grads, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_jumprelu_straight_through_step(fused, route):
    """The window below the threshold comes from encode's slack; entries in it decode to nothing."""
    p, B = problem(), SHAPE[0]
    threshold = 0.5 + randn(100, seed=5).abs()
    pi = p.x_c.double() @ p.W_enc.double().T + p.b_mag
    for edge in (0, WIDTH / 2, -WIDTH / 2):
        assert (pi - threshold - edge).abs().min() > 1e-5, "no entry is within rounding of an edge"
    code = ops.encode(p.x_c, p.W_enc, p.b_mag, activation="jumprelu", threshold=threshold, slack=WIDTH / 2)
    theta = threshold[code.indices]
    distance = code.u + p.b_mag[code.indices] - theta
    window, fires = distance.abs() < WIDTH / 2, distance > 0
    assert (window & fires).any() and (window & ~fires).any() and (fires & ~window).any()
    assert not code.magnitudes[~fires].any()
    if fused:
        _, r, _, (dots,) = ops.decode_loss(code, p.W_dec, p.b_dec, p.x, torch.zeros(100), B, zeros=True)
    else:
        r = ops.decode(code, p.W_dec) + p.b_dec - p.x
        dots = ops.sampled_dots(code, 2 / B * r, p.W_dec)
    delta, csc = dots * fires, ops.transpose(code)
    ours = {
        "residual": r,
        "W_enc": ops.outer(csc, [delta], [p.x_c]),
        "b_mag": feature_sums(csc, delta, B),
        "W_dec": ops.outer(csc, [code.magnitudes * (2 / B)], [r]),
        "b_dec": 2 / B * r.sum(0) - ops.decode(code, p.W_enc, delta).sum(0),
        "threshold": feature_sums(csc, -(theta * dots + LAMBDA / B) / WIDTH * window, B),
    }
    judge(ours, lambda dtype: jumprelu_plain(p, threshold, dtype))


# ---- Matryoshka prefixes ---------------------------------------------------------------------------------------------

PREFIXES = (0, 10, 40, 100)


def matryoshka_plain(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """Σ over prefixes of ‖x − x̂_prefix‖², of a ReLU SAE."""
    q = p.leaves(dtype)
    f = torch.relu(q.x_c @ q.W_enc.T + q.b_gate)
    residuals = torch.stack([f[:, :end] @ q.W_dec[:end] + q.b_dec - q.x for end in PREFIXES[1:]])
    loss = residuals.pow(2).sum(-1).mean(-1).sum()
    names = ["W_enc", "b_gate", "W_dec", "b_dec"]
    grads = torch.autograd.grad(loss, [getattr(q, n) for n in names])
    return {"residuals": residuals.detach()} | dict(zip(names, grads, strict=True))


def test_matryoshka_prefixes_by_hand(route):
    """A prefix is a cumulative sum over groups; the gradient of group g is that of all prefixes from g on."""
    p, B = problem(), SHAPE[0]
    code = ops.encode(p.x_c, p.W_enc, p.b_gate, activation="relu")
    residuals = ops.decode(code, p.W_dec, groups=PREFIXES).cumsum(0) + p.b_dec - p.x
    reaching = residuals.flip(0).cumsum(0).flip(0)
    csc, dots, W_dec = ops.transpose(code), torch.zeros(code.nnz), []
    for rows, first, last in zip(reaching, PREFIXES, PREFIXES[1:], strict=False):
        inside = (code.indices >= first) & (code.indices < last)
        dots = torch.where(inside, ops.sampled_dots(code, 2 / B * rows, p.W_dec), dots)
        W_dec.append(ops.outer(csc, [code.magnitudes * (2 / B)], [rows], first_feature=first, n_features=last - first))
    ours = {
        "residuals": residuals,
        "W_enc": ops.outer(csc, [dots], [p.x_c]),
        "b_gate": feature_sums(csc, dots, B),
        "W_dec": torch.cat(W_dec),
        "b_dec": 2 / B * residuals.sum((0, 1)) - ops.decode(code, p.W_enc, dots).sum(0),
    }
    judge(ours, lambda dtype: matryoshka_plain(p, dtype))


def test_matryoshka_prefixes_fused(route):
    """decode_loss has what reaches each group; one outer sums every feature's entries times its own group's."""
    p, (B, _, F) = problem(), SHAPE
    code = ops.encode(p.x_c, p.W_enc, p.b_gate, activation="relu")
    out = ops.decode_loss(code, p.W_dec, p.b_dec, p.x, torch.zeros(F), B, prefixes=PREFIXES[1:])
    csc, (dots,) = ops.transpose(code), out.grads
    ours = {
        "W_enc": ops.outer(csc, [dots], [p.x_c]),
        "b_gate": feature_sums(csc, dots, B),
        "W_dec": ops.outer(prefix_rows(csc, PREFIXES[1:], B), [code.magnitudes * (2 / B)], [out.residual.flatten(0, 1)]),
        "b_dec": 2 / B * out.residual[0].sum(0) - ops.decode(code, p.W_enc, dots).sum(0),
    }
    judge(ours, lambda dtype: {name: matryoshka_plain(p, dtype)[name] for name in ours})


def test_matryoshka_prefixes_by_autograd(route):
    p = problem().leaves()
    code = ops.encode(p.x - p.b_dec, p.W_enc, p.b_gate, activation="relu")
    residuals = ops.decode(code, p.W_dec, groups=PREFIXES).cumsum(0) + p.b_dec - p.x
    loss = residuals.pow(2).sum(-1).mean(-1).sum()
    names = ["W_enc", "b_gate", "W_dec", "b_dec"]
    grads = torch.autograd.grad(loss, [getattr(p, n) for n in names])
    ours = {"residuals": residuals.detach()} | dict(zip(names, grads, strict=True))
    judge(ours, lambda dtype: matryoshka_plain(problem(), dtype))


def test_several_saes_side_by_side_on_one_x(route):
    """Groups that are SAEs of their own: one encode and one decode serve both."""
    p = problem()
    code = ops.encode(p.x_c, p.W_enc, p.b_gate, activation="relu")
    x_hats = ops.decode(code, p.W_dec, groups=(0, 60, 100))

    def plain(dtype):
        q = p.to(dtype)
        f = dense(code, torch.ones(code.nnz, dtype=dtype)) * (q.x_c @ q.W_enc.T + q.b_gate)
        return {"x_hats": torch.stack([f[:, :60] @ q.W_dec[:60], f[:, 60:] @ q.W_dec[60:]])}

    judge({"x_hats": x_hats}, plain)


def test_the_entries_by_feature_are_shared_by_every_gradient():
    """One transpose serves all parameters: perm reads any value set."""
    p = problem()
    code = encode(p)
    csc = ops.transpose(code)
    features = torch.repeat_interleave(torch.arange(100), csc.colptr.diff())
    assert torch.equal(code.values[:, csc.perm], dense(code, code.values)[:, csc.rows.long(), features])
