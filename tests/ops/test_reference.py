"""The reference against MATH.md §1–§3: the oracle of the other tests has tests of its own, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import Problem, make_inputs, randn
from torch import Tensor

from sae_fast import reference

LAMBDA = 0.7
GATED = ["x", "W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"]


def problem(B: int = 41, d: int = 7, F: int = 19, density: float = 0.4, seed: int = 0) -> Problem:
    return make_inputs(B, d, F, density=density, seed=seed).to(torch.float64)


def assert_identity(a: Tensor, b: Tensor) -> None:
    """Equal in the reals: the rest is float64's rounding, 2¹² of its units at most.  A false identity is off by O(1)."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    assert (a - b).norm() <= 2.0**-40 * max(float(a.norm()), float(b.norm())) or (a == b).all()


def differ(a: Tensor, b: Tensor) -> bool:
    """Not equal by far more than rounding."""
    return bool((a - b).norm() > 2.0**-10 * b.norm())


def loss_of(p: Problem, dialect: str = "paper", target: Tensor | None = None) -> reference.Loss:
    return reference.gated_loss(p.x, p.W_enc, p.b_gate, p.b_mag, p.r_mag, p.W_dec, p.b_dec, LAMBDA, dialect, target)


def gradients(p: Problem, function) -> dict[str, Tensor]:
    """The gradient of a scalar function of a Problem with respect to each of its tensors."""
    leaves = p.leaves()
    grads = torch.autograd.grad(function(leaves), leaves.tensors(), allow_unused=True)
    pairs = zip(GATED, leaves.tensors(), grads, strict=True)
    return {name: torch.zeros_like(t) if g is None else g for name, t, g in pairs}


# ---- §1: the definitions --------------------------------------------------------------------------------------------


def test_gated_encode_is_the_definition_entry_by_entry():
    p = problem(5, 3, 4)
    code = reference.gated_encode(*p.gated())
    for b in range(5):
        for i in range(4):
            u = sum((p.x[b, k] - p.b_dec[k]) * p.W_enc[i, k] for k in range(3))
            gate = 1.0 if u + p.b_gate[i] > 0 else 0.0
            magnitude = max(0.0, float(torch.exp(p.r_mag[i]) * u + p.b_mag[i]))
            assert_identity(code.u[b, i], u)
            assert code.gate[b, i] == gate
            assert_identity(code.f[b, i], torch.tensor(gate * magnitude, dtype=torch.float64))


def test_the_heaviside_step_is_strict():
    p = problem()
    tied = replace(p, b_gate=-reference.pre_activation(p.x, p.W_enc, p.b_dec)[3])
    code = reference.gated_encode(*tied.gated())
    assert not code.pi_gate[3].any() and not code.gate[3].any() and not code.f[3].any()


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_leading_dimensions_pass_through(leading):
    p = problem()
    x = randn(*leading, 7, dtype=torch.float64)
    code = reference.gated_encode(x, *p.gated()[1:])
    assert all(part.shape == (*leading, 19) for part in code)
    assert reference.decode(code.f, p.W_dec, p.b_dec).shape == (*leading, 7)


@pytest.mark.parametrize("dialect", reference.DIALECTS)
def test_gated_loss_is_equation_8(dialect):
    p = problem()
    code = reference.gated_encode(*p.gated())
    gates = code.pi_gate.clamp(min=0)
    weight = p.W_dec.norm(dim=1) if dialect == "saelens" else 1.0
    loss = loss_of(p, dialect)
    assert_identity(loss.reconstruction, ((code.f @ p.W_dec + p.b_dec - p.x) ** 2).sum() / 41)
    assert_identity(loss.sparsity, LAMBDA * (gates * weight).sum() / 41)
    assert_identity(loss.auxiliary, ((gates @ p.W_dec + p.b_dec - p.x) ** 2).sum() / 41)
    assert_identity(loss.total, loss.reconstruction + loss.sparsity + loss.auxiliary)


def test_a_target_replaces_x_in_the_errors_only():
    p, target = problem(), randn(41, 7, dtype=torch.float64)
    assert_identity(loss_of(p, target=p.x).total, loss_of(p).total)
    loss = loss_of(p, target=target)
    code = reference.gated_encode(*p.gated())
    assert_identity(loss.reconstruction, ((code.f @ p.W_dec + p.b_dec - target) ** 2).sum() / 41)
    assert_identity(loss.sparsity, loss_of(p).sparsity)


@pytest.mark.parametrize("dialect", reference.DIALECTS)
def test_relu_loss_is_its_definition(dialect):
    p = problem()
    f = torch.relu((p.x - p.b_dec) @ p.W_enc.T + p.b_gate)
    weight = p.W_dec.norm(dim=1) if dialect == "saelens" else 1.0
    loss = reference.relu_loss(p.x, p.W_enc, p.b_gate, p.W_dec, p.b_dec, LAMBDA, dialect)
    assert_identity(loss.reconstruction, ((f @ p.W_dec + p.b_dec - p.x) ** 2).sum() / 41)
    assert_identity(loss.sparsity, LAMBDA * (f * weight).sum() / 41)
    assert loss.auxiliary == 0


# ---- §1: the JumpReLU form ------------------------------------------------------------------------------------------


def test_a_gated_sae_is_a_jumprelu_sae():
    p = problem()
    W_enc, b_enc, threshold = reference.gated_to_jumprelu(p.W_enc, p.b_gate, p.b_mag, p.r_mag)
    assert_identity(threshold, p.b_mag - torch.exp(p.r_mag) * p.b_gate)
    assert (threshold > 0).any() and (threshold < 0).any()
    f = reference.gated_encode(*p.gated()).f
    assert_identity(reference.jumprelu_encode(p.x, W_enc, b_enc, threshold, p.b_dec), f)


def test_a_feature_with_a_threshold_of_at_most_zero_is_a_plain_relu():
    p = problem()
    W_enc, b_enc, threshold = reference.gated_to_jumprelu(p.W_enc, p.b_gate, p.b_mag, p.r_mag)
    plain = reference.relu_encode(p.x, W_enc, b_enc, p.b_dec)
    f = reference.gated_encode(*p.gated()).f
    assert_identity(f[:, threshold <= 0], plain[:, threshold <= 0])
    assert differ(f[:, threshold > 0], plain[:, threshold > 0])


def test_and_a_jumprelu_sae_is_a_gated_sae():
    """Back: r = 0, b_mag = b_enc, b_gate = b_enc − θ, for θ ≥ 0."""
    p = problem()
    threshold = randn(19, dtype=torch.float64).abs()
    f = reference.jumprelu_encode(p.x, p.W_enc, p.b_gate, threshold, p.b_dec)
    gated = reference.gated_encode(p.x, p.W_enc, p.b_gate - threshold, p.b_gate, torch.zeros_like(p.r_mag), p.b_dec)
    assert_identity(gated.f, f)


# ---- §2: one support ------------------------------------------------------------------------------------------------


def test_the_supports():
    p = problem()
    code = reference.gated_encode(*p.gated())
    S = code.pi_gate > 0
    assert torch.equal(torch.relu(code.pi_gate) > 0, S)
    assert torch.equal(code.f > 0, S & (code.pi_mag > 0))
    assert (S & (code.pi_mag <= 0)).any()
    _, _, threshold = reference.gated_to_jumprelu(p.W_enc, p.b_gate, p.b_mag, p.r_mag)
    up = threshold >= 0
    assert torch.equal((code.f > 0)[:, up], S[:, up]) and up.any()


@pytest.mark.parametrize("dialect", reference.DIALECTS)
def test_the_sparse_formulas_are_the_gradients(dialect):
    p = problem()
    B = 41
    code = reference.gated_encode(*p.gated())
    gates, x_c, scale = torch.relu(code.pi_gate), p.x_c, torch.exp(p.r_mag)
    S, S_ = code.pi_gate > 0, code.f > 0
    norms = p.W_dec.norm(dim=1)
    weight = LAMBDA * (norms if dialect == "saelens" else torch.ones_like(norms))
    r = code.f @ p.W_dec + p.b_dec - p.x
    r_aux = gates @ p.W_dec + p.b_dec - p.x
    g_mag = 2 * (r @ p.W_dec.T) * S_ / B
    g_gate = (2 * (r_aux @ p.W_dec.T) + weight) * S / B
    delta = g_gate + scale * g_mag
    expected = {
        "b_mag": g_mag.sum(0),
        "b_gate": g_gate.sum(0),
        "r_mag": (g_mag * scale * code.u).sum(0),
        "W_enc": delta.T @ x_c,
        "W_dec": 2 * code.f.T @ r / B,
        "b_dec": 2 * r.sum(0) / B - delta.sum(0) @ p.W_enc,
        "x": -2 * (r + r_aux) / B + delta @ p.W_enc,
    }
    if dialect == "saelens":
        expected["W_dec"] += 2 * gates.T @ r_aux / B + LAMBDA * (gates.sum(0) / norms)[:, None] * p.W_dec / B
        expected["b_dec"] += 2 * r_aux.sum(0) / B
    actual = gradients(p, lambda p: loss_of(p, dialect).total)
    for name, gradient in expected.items():
        assert_identity(actual[name], gradient)


# ---- §3: what the loss's terms do -----------------------------------------------------------------------------------


def untied_reconstruction(p: Problem, W_mag: Tensor) -> Tensor:
    gate = ((p.x_c @ p.W_enc.T + p.b_gate) > 0).double()
    f = gate * torch.relu(p.x_c @ W_mag.T + p.b_mag)
    return (p.x - f @ p.W_dec - p.b_dec).pow(2).sum(-1).mean()


def test_3a_reconstruction_does_not_reach_the_gate_bias_nor_untied_gate_weights():
    p = problem()
    tied = gradients(p, lambda p: loss_of(p).reconstruction)
    assert not tied["b_gate"].any() and tied["W_enc"].any()
    W_mag = torch.exp(p.r_mag)[:, None] * p.W_enc
    untied = gradients(p, lambda p: untied_reconstruction(p, W_mag))
    assert not untied["b_gate"].any() and not untied["W_enc"].any() and untied["b_mag"].any()


def test_3b_perspective_1_a_baseline_sae_plus_a_reconstruction_is_equation_8_unstopped():
    p = problem()

    def perspective(p: Problem) -> Tensor:
        baseline = reference.relu_loss(p.x, p.W_enc, p.b_gate, p.W_dec, p.b_dec, LAMBDA)
        return baseline.total + loss_of(p).reconstruction

    def unstopped(p: Problem) -> Tensor:
        gates = torch.relu(reference.gated_encode(*p.gated()).pi_gate)
        loss = loss_of(p)
        return loss.reconstruction + loss.sparsity + (p.x - reference.decode(gates, p.W_dec, p.b_dec)).pow(2).sum(-1).mean()

    assert_identity(perspective(p), loss_of(p).total)
    a, b, stopped = gradients(p, perspective), gradients(p, unstopped), gradients(p, lambda p: loss_of(p).total)
    for name in GATED:
        assert_identity(a[name], b[name])
    assert differ(a["W_dec"], stopped["W_dec"]) and differ(a["b_dec"], stopped["b_dec"])


def perspective_2(penalty):
    """[‖x − x̂(ReLU π_gate)‖² + λ‖ReLU π_gate‖₁] + [‖x − x̂(f̃)‖² + λ‖penalty‖₁]."""

    def loss(p: Problem) -> Tensor:
        code = reference.gated_encode(*p.gated())
        baseline = reference.relu_loss(p.x, p.W_enc, p.b_gate, p.W_dec, p.b_dec, LAMBDA).total
        return baseline + loss_of(p).reconstruction + LAMBDA * penalty(code).sum(-1).mean()

    return loss


def test_3c_perspective_2_differs_in_the_decoder_alone_and_by_a_known_term():
    p = problem()
    ours, theirs = gradients(p, lambda p: loss_of(p).total), gradients(p, perspective_2(lambda code: code.gate))
    for name in ("W_enc", "b_gate", "r_mag", "b_mag"):
        assert_identity(theirs[name], ours[name])
    gates = torch.relu(reference.gated_encode(*p.gated()).pi_gate)
    r_aux = reference.decode(gates, p.W_dec, p.b_dec) - p.x
    assert_identity(theirs["W_dec"] - ours["W_dec"], 2 * gates.T @ r_aux / 41)
    assert_identity(theirs["b_dec"] - ours["b_dec"], 2 * r_aux.sum(0) / 41)


def test_3c_column_projection_does_not_remove_the_difference():
    p = problem()
    gates = torch.relu(reference.gated_encode(*p.gated()).pi_gate)
    extra = 2 * gates.T @ (reference.decode(gates, p.W_dec, p.b_dec) - p.x) / 41
    direction = p.W_dec / p.W_dec.norm(dim=1, keepdim=True)
    projected = extra - (extra * direction).sum(1, keepdim=True) * direction
    assert projected.norm() > 2.0**-4 * extra.norm()


def test_3c_negative_control_with_the_l1_norm_of_the_features_it_is_false():
    p = problem()
    ours, theirs = gradients(p, lambda p: loss_of(p).total), gradients(p, perspective_2(lambda code: code.f))
    for name in ("W_enc", "r_mag", "b_mag"):
        assert differ(theirs[name], ours[name])


def test_3d_without_the_auxiliary_term_every_gate_bias_is_pushed_down():
    p = problem()
    grads = gradients(p, lambda p: loss_of(p).reconstruction + loss_of(p).sparsity)
    assert_identity(grads["b_gate"], LAMBDA * reference.gated_encode(*p.gated()).gate.mean(0))


@pytest.mark.parametrize("shrink", [0.5, 2.0**-10])
def test_3d_the_sparsity_term_scales_away_at_constant_features(shrink):
    p = problem()
    log = torch.log(torch.tensor(shrink, dtype=torch.float64))
    small = Problem(p.x, shrink * p.W_enc, shrink * p.b_gate, p.b_mag, p.r_mag - log, p.W_dec, p.b_dec)
    assert_identity(reference.gated_encode(*small.gated()).f, reference.gated_encode(*p.gated()).f)
    assert_identity(loss_of(small).sparsity, shrink * loss_of(p).sparsity)
    assert_identity(loss_of(small).reconstruction, loss_of(p).reconstruction)


# ---- Numerical gradients ---------------------------------------------------------------------------------------------


@pytest.fixture
def smooth() -> Problem:
    """A problem whose every kink is at least 1e-3 away."""
    p = problem(5, 4, 6, density=0.5, seed=3)
    code = reference.gated_encode(*p.gated())
    assert code.pi_gate.abs().min() > 1e-3 and code.pi_mag.abs().min() > 1e-3
    assert ((code.pi_gate > 0) & (code.pi_mag < 0)).any() and (code.f > 0).any()
    return p


def test_gradcheck_in_the_saelens_dialect(smooth):
    assert torch.autograd.gradcheck(lambda *t: loss_of(Problem(*t), "saelens").total, smooth.leaves().tensors())


def test_gradcheck_in_the_paper_dialect_where_nothing_is_stopped(smooth):
    leaves = smooth.leaves().tensors()
    through_encoder, decoder = leaves[:5], [t.detach() for t in leaves[5:]]
    assert torch.autograd.gradcheck(lambda *t: loss_of(Problem(*t, *decoder)).total, through_encoder)
    unstopped = lambda *t: loss_of(Problem(*t)).reconstruction + loss_of(Problem(*t)).sparsity  # noqa: E731
    assert torch.autograd.gradcheck(unstopped, leaves)


def test_the_auxiliary_term_of_the_paper_dialect_stops_at_the_decoder(smooth):
    grads = gradients(smooth, lambda p: loss_of(p).auxiliary)
    assert not grads["W_dec"].any()
    assert_identity(grads["b_dec"], -(grads["x"].sum(0) + 2 * _aux_residual(smooth).sum(0) / 5))


def _aux_residual(p: Problem) -> Tensor:
    gates = torch.relu(reference.gated_encode(*p.gated()).pi_gate)
    return reference.decode(gates, p.W_dec, p.b_dec) - p.x


def test_gradcheck_of_the_relu_loss(smooth):
    x, W_enc, b, _, _, W_dec, b_dec = smooth.leaves().tensors()
    loss = lambda *t: reference.relu_loss(*t, LAMBDA, "saelens").total  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, W_enc, b, W_dec, b_dec))


# ---- One optimizer step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_adam_step_is_torch_optim_adam(betas):
    W = randn(9, 5, dtype=torch.float64)
    theirs = W.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.1, betas=betas, eps=1e-8)
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for step in range(1, 6):
        grad = randn(9, 5, seed=step, dtype=torch.float64)
        theirs.grad = grad.clone()
        adam.step()
        reference.adam_step(W, grad, m, v, step, 0.1, betas, 1e-8)
    assert_identity(W, theirs.detach())
    assert_identity(v, adam.state[theirs]["exp_avg_sq"])


def test_adam_step_with_unit_rows_projects_and_renormalises():
    W = torch.nn.functional.normalize(randn(9, 5, dtype=torch.float64), dim=1)
    along = 3 * W
    m, v, before = torch.zeros_like(W), torch.zeros_like(W), W.clone()
    reference.adam_step(W, along, m, v, 1, 0.1, (0.0, 0.999), 1e-3, unit_rows=True)
    assert_identity(W, before)  # nothing but rounding is left of a gradient along the row
    across = randn(9, 5, seed=1, dtype=torch.float64)
    reference.adam_step(W, across, m, v, 2, 0.1, (0.0, 0.999), 1e-3, unit_rows=True)
    assert_identity(W.norm(dim=1), torch.ones(9, dtype=torch.float64))
    assert differ(W, before)
    assert_identity((m * before).sum(1) + 1, torch.ones(9, dtype=torch.float64))


def test_reference_functions_keep_their_arguments_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        p = problem().to(dtype)
        assert reference.gated_encode(*p.gated()).f.dtype == loss_of(p).total.dtype == dtype
