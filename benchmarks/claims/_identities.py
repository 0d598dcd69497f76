"""The identities of MATH.md §2 and §3 about the Gated SAE's loss, in float64 against autograd of sae_fast.reference.

A point is a batch x [B, d] and the parameters W_enc, W_dec [F, d], b_gate, b_mag, r_mag [F], b_dec [d], and W_mag [F, d] of
the untied encoder.  No entry of it is within 1e-3 of a kink of π_gate or π_mag, so that differences are derivatives.  Every
check returns numbers; deviations are relative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_fast import reference

L1 = 0.7  # λ
KINK, STEP = 1e-3, 1e-5
ENCODER = ("W_enc", "b_gate", "b_mag", "r_mag")
ALL = (*ENCODER, "W_dec", "b_dec")
Params = dict[str, Tensor]

# ---- Points, losses and their gradients -----------------------------------------------------------------------------


def random_point(seed: int, d: int = 8, n_features: int = 24, rows: int = 48) -> tuple[Tensor, Params]:
    """(x, parameters), float64, away from kinks; about a third of all gates open."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.double, generator=random)  # noqa: E731
    vectors = {name: 0.3 * normal(n_features) for name in ("b_gate", "b_mag", "r_mag")}
    p = {"W_enc": normal(n_features, d) / 3, **vectors, "W_dec": F.normalize(normal(n_features, d), dim=1)}
    p |= {"b_dec": 0.3 * normal(d)}
    W_mag, x = normal(n_features, d) / 3, normal(16 * rows, d)
    code = code_of(x, p)
    pre = torch.cat([code.pi_gate, code.pi_mag, (x - p["b_dec"]) @ W_mag.T + p["b_mag"]], dim=1)
    return x[(pre.abs() > KINK).all(1)][:rows], p | {"W_mag": W_mag}


def code_of(x: Tensor, p: Params, tied: bool = True) -> reference.GatedCode:
    """The encoder's; untied, π_mag = x_c W_magᵀ + b_mag."""
    code = reference.gated_encode(x, *(p[name] for name in ENCODER), p["b_dec"])
    if tied:
        return code
    pi_mag = reference.pre_activation(x, p["W_mag"], p["b_dec"]) + p["b_mag"]
    return code._replace(f=code.gate * torch.relu(pi_mag), pi_mag=pi_mag)


def reconstruction(x: Tensor, p: Params, tied: bool = True) -> Tensor:
    """L_recon(f̃) = ‖x − x̂(f̃)‖², the mean over the batch."""
    return (x - reference.decode(code_of(x, p, tied).f, p["W_dec"], p["b_dec"])).pow(2).sum(-1).mean()


def baseline(x: Tensor, p: Params) -> Tensor:
    """The baseline SAE's loss on ReLU(π_gate): its error and λ‖ReLU(π_gate)‖₁."""
    return reference.relu_loss(x, p["W_enc"], p["b_gate"], p["W_dec"], p["b_dec"], L1).total


def equation_8(x: Tensor, p: Params, stopped: Params | None = None) -> Tensor:
    """Equation (8) in one line a term; x̂_aux by the decoder of ``stopped``, or without a stop-gradient by that of p."""
    gates, aux = torch.relu(code_of(x, p).pi_gate), stopped or p
    auxiliary = (x - reference.decode(gates, aux["W_dec"], aux["b_dec"])).pow(2).sum(-1).mean()
    return reconstruction(x, p) + L1 * gates.sum(-1).mean() + auxiliary


def autograd(loss: Callable[[Params], Tensor], p: Params) -> Params:
    """d loss / d each parameter by torch; zeros of what the loss does not depend on."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in p.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def numerical(loss: Callable[[Params], Tensor], p: Params, names: Iterable[str] = ALL) -> Params:
    """The same by central differences, one coordinate at a time."""
    grads = {name: torch.zeros_like(p[name]) for name in names}
    for name, grad in grads.items():
        moved = p | {name: p[name].clone()}
        for i in range(grad.numel()):
            value, sides = p[name].flatten()[i], []
            for side in (STEP, -STEP):
                moved[name].view(-1)[i] = value + side
                sides.append(loss(moved))
            moved[name].view(-1)[i] = value
            grad.view(-1)[i] = (sides[0] - sides[1]) / (2 * STEP)
    return grads


def deviation(got: Params, want: Params, names: Iterable[str] = ALL) -> float:
    """The largest difference over the largest entry wanted, of each parameter; the largest of these."""
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in names)


# ---- The identities -------------------------------------------------------------------------------------------------


def one_support(x: Tensor, p: Params) -> Params:
    """The gradients of equation (8) from the entries of S = {π_gate > 0} alone.  MATH.md §2.

    An entry e is an example b and a feature i; u, g_mag, g_gate, δ are vectors over entries, in which the entries of
    S \\ S' (gate open, magnitude 0) have g_mag = 0 and stay.
    """
    code = code_of(x, p)
    b, i = (code.pi_gate > 0).nonzero(as_tuple=True)
    u, pi_gate, f, scale = code.u[b, i], code.pi_gate[b, i], code.f[b, i], p["r_mag"].exp()[i]
    rows = p["W_dec"][i]
    r = (p["b_dec"] - x).index_add(0, b, f[:, None] * rows) * (2 / len(x))  # 2 ÷ B times the errors
    r_aux = (p["b_dec"] - x).index_add(0, b, pi_gate[:, None] * rows) * (2 / len(x))
    g_mag = (r[b] * rows).sum(1) * (f > 0)
    g_gate = (r_aux[b] * rows).sum(1) + L1 / len(x)
    delta = g_gate + scale * g_mag

    def sums(values: Tensor) -> Tensor:  # over the entries of each feature
        return values.new_zeros(len(p["W_dec"]), *values.shape[1:]).index_add(0, i, values)

    return {
        "b_mag": sums(g_mag), "b_gate": sums(g_gate), "r_mag": sums(g_mag * scale * u),
        "W_enc": sums(delta[:, None] * (x - p["b_dec"])[b]), "W_dec": sums(f[:, None] * r[b]),
        "b_dec": r.sum(0) - sums(delta) @ p["W_enc"],
    }  # fmt: skip


def closed_forms(x: Tensor, p: Params) -> dict[str, float]:
    """MATH.md §2 against autograd, and autograd against central differences; the share of S \\ S' in S."""
    truth = autograd(lambda q: reference.gated_loss(x, *(q[name] for name in ALL), L1).total, p)
    code = code_of(x, p)
    return {
        "deviation": deviation(one_support(x, p), truth),
        "numerical": deviation(truth, numerical(lambda q: equation_8(x, q, stopped=p), p)),
        "gate_only": 1 - float((code.f > 0).sum() / code.gate.sum()),
    }


def reconstruction_alone(x: Tensor, p: Params) -> dict[str, float]:
    """The largest entries of ∂L_recon/∂b_gate and ∂L_recon/∂W_enc, tied and untied, by autograd and by differences."""
    found = {}
    for tied in (True, False):
        for how in (autograd, numerical):
            grads = how(lambda q, tied=tied: reconstruction(x, q, tied), p)
            for name in ("b_gate", "W_enc"):
                found[f"{name}, {'tied' if tied else 'untied'}, {how.__name__}"] = float(grads[name].abs().max())
    return found


def perspective_1(x: Tensor, p: Params) -> dict[str, float]:
    """Baseline loss on ReLU(π_gate) + L_recon(f̃), against equation (8) without and with its stop-gradient."""
    ours = lambda q: baseline(x, q) + reconstruction(x, q)  # noqa: E731
    value, want = float(ours(p)), float(equation_8(x, p))
    grads, plain = autograd(ours, p), autograd(lambda q: equation_8(x, q), p)
    stopped = autograd(lambda q: equation_8(x, q, stopped=p), p)
    return {
        "deviation": max(abs(value - want) / want, deviation(grads, plain)),
        "control": deviation(grads, stopped, ("W_dec", "b_dec")),
    }


def perspective_2(x: Tensor, p: Params) -> dict[str, float]:
    """[baseline loss on ReLU(π_gate)] + [‖x − x̂(f̃)‖² + λ‖gate‖₁], its gradients against equation (8)'s; and with ‖f̃‖₁."""
    eight = autograd(lambda q: equation_8(x, q, stopped=p), p)
    gate = autograd(lambda q: baseline(x, q) + reconstruction(x, q) + L1 * code_of(x, q).gate.sum(-1).mean(), p)
    f = autograd(lambda q: baseline(x, q) + reconstruction(x, q) + L1 * code_of(x, q).f.sum(-1).mean(), p)
    gates = torch.relu(code_of(x, p).pi_gate)
    r_aux = (reference.decode(gates, p["W_dec"], p["b_dec"]) - x) * (2 / len(x))
    difference = {"W_dec": gates.T @ r_aux, "b_dec": r_aux.sum(0)}
    got = {name: gate[name] - eight[name] for name in difference}
    along = (difference["W_dec"] * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
    return {
        "deviation": max(deviation(gate, eight, ENCODER), deviation(got, difference, ("W_dec", "b_dec"))),
        "left": float((difference["W_dec"] - along).norm() / difference["W_dec"].norm()),
        "control": deviation(f, eight, ENCODER),
    }


def rescaling(x: Tensor, p: Params, epsilon: float = 0.01) -> dict[str, float]:
    """(W_enc, b_gate, r_mag) → (εW_enc, εb_gate, r_mag − ln ε): how far f̃ moves, and the sparsity term from ε times."""
    small = p | {"W_enc": epsilon * p["W_enc"], "b_gate": epsilon * p["b_gate"], "r_mag": p["r_mag"] - math.log(epsilon)}
    before, after = code_of(x, p), code_of(x, small)
    ratio = float(torch.relu(after.pi_gate).sum() / torch.relu(before.pi_gate).sum())
    f = float((after.f - before.f).abs().max() / before.f.max())
    return {"deviation": max(f, abs(ratio / epsilon - 1))}


def only_closing(x: Tensor, p: Params) -> dict[str, float]:
    """Without the auxiliary term ∂L/∂b_gate = λ P(π_gate > 0), tied and untied."""
    want = {"b_gate": L1 * (code_of(x, p).pi_gate > 0).double().mean(0)}
    sparsity = lambda q: L1 * torch.relu(code_of(x, q).pi_gate).sum(-1).mean()  # noqa: E731
    grads = [autograd(lambda q, tied=tied: reconstruction(x, q, tied) + sparsity(q), p) for tied in (True, False)]
    return {"deviation": max(deviation(grad, want, ("b_gate",)) for grad in grads)}
