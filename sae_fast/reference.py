"""Sparse autoencoders in plain PyTorch, in the symbols of the papers: the oracle of every test.

Gated SAE: Rajamanoharan et al. 2024a, "Improving Dictionary Learning with Gated Sparse Autoencoders" (arXiv
2404.16014).  JumpReLU: Rajamanoharan et al. 2024b (arXiv 2407.14435).  Nothing here is fast and nothing is fused; every
function runs in the dtype of its arguments, on any device, and is differentiable.

Shapes: x [B, d] (any leading dimensions), W_enc and W_dec [F, d] (one feature a row), biases and r_mag [F], b_dec [d].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DIALECTS = ("paper", "saelens")


class Loss(NamedTuple):
    """The terms of a loss: 0-d tensors, sums over d and F, means over the batch."""

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor


class GatedCode(NamedTuple):
    """The results of a Gated SAE's encoder, dense, [..., F] each."""

    f: Tensor  # f̃ = gate ⊙ ReLU(π_mag): the features
    gate: Tensor  # 1[π_gate > 0]
    pi_gate: Tensor
    pi_mag: Tensor
    u: Tensor  # x_c W_encᵀ


def pre_activation(x: Tensor, W_enc: Tensor, b_dec: Tensor, apply_b_dec_to_input: bool = True) -> Tensor:
    """u = (x − b_dec) W_encᵀ, [..., F]; of x itself without ``apply_b_dec_to_input``, as some packages' SAEs take it."""
    return (x - b_dec if apply_b_dec_to_input else x) @ W_enc.T


def decode(f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x̂ = f W_dec + b_dec, [..., d]."""
    return f @ W_dec + b_dec


# ---- Gated SAE ------------------------------------------------------------------------------------------------------


def gated_encode(
    x: Tensor, W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor, b_dec: Tensor, apply_b_dec_to_input: bool = True
) -> GatedCode:
    """The Gated encoder with tied weights (2404.16014, equations 3–5).  The Heaviside step is strict."""
    u = pre_activation(x, W_enc, b_dec, apply_b_dec_to_input)
    pi_gate = u + b_gate
    pi_mag = torch.exp(r_mag) * u + b_mag
    gate = (pi_gate > 0).to(u.dtype)
    return GatedCode(gate * torch.relu(pi_mag), gate, pi_gate, pi_mag, u)


def gated_loss(
    x: Tensor,
    W_enc: Tensor,
    b_gate: Tensor,
    b_mag: Tensor,
    r_mag: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_coefficient: float,
    dialect: str = "paper",
    target: Tensor | None = None,
    apply_b_dec_to_input: bool = True,
) -> Loss:
    """Equation (8): ‖x − x̂‖² + λ‖ReLU(π_gate)‖₁ + ‖x − x̂_aux‖².

    ``paper``: x̂_aux = ReLU(π_gate) sg(W_dec) + sg(b_dec).  ``saelens``: the sparsity of feature i is weighted by ‖d_i‖
    and x̂_aux is not stopped.  λ here is d · λ of the paper, which divides the squared error by d.  ``target`` replaces
    x in both errors (transcoders).  MATH.md §1.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect: got {dialect!r}, want one of {DIALECTS}")
    target = x if target is None else target
    code = gated_encode(x, W_enc, b_gate, b_mag, r_mag, b_dec, apply_b_dec_to_input)
    gates = torch.relu(code.pi_gate)
    x_hat = decode(code.f, W_dec, b_dec)
    if dialect == "paper":
        x_hat_aux = decode(gates, W_dec.detach(), b_dec.detach())
        weight = torch.ones_like(b_gate)
    else:
        x_hat_aux = decode(gates, W_dec, b_dec)
        weight = W_dec.norm(dim=1)
    reconstruction = (target - x_hat).pow(2).sum(-1).mean()
    sparsity = l1_coefficient * (gates * weight).sum(-1).mean()
    auxiliary = (target - x_hat_aux).pow(2).sum(-1).mean()
    return Loss(reconstruction + sparsity + auxiliary, reconstruction, sparsity, auxiliary)


# ---- Baseline ReLU SAE ----------------------------------------------------------------------------------------------


def relu_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, apply_b_dec_to_input: bool = True) -> Tensor:
    """f = ReLU((x − b_dec) W_encᵀ + b_enc)."""
    return torch.relu(pre_activation(x, W_enc, b_dec, apply_b_dec_to_input) + b_enc)


def relu_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_coefficient: float,
    dialect: str = "paper",
    target: Tensor | None = None,
    apply_b_dec_to_input: bool = True,
) -> Loss:
    """‖x − x̂‖² + λ‖f‖₁; in the ``saelens`` dialect f_i is weighted by ‖d_i‖.  The auxiliary term is 0."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect: got {dialect!r}, want one of {DIALECTS}")
    target = x if target is None else target
    f = relu_encode(x, W_enc, b_enc, b_dec, apply_b_dec_to_input)
    weight = torch.ones_like(b_enc) if dialect == "paper" else W_dec.norm(dim=1)
    reconstruction = (target - decode(f, W_dec, b_dec)).pow(2).sum(-1).mean()
    sparsity = l1_coefficient * (f * weight).sum(-1).mean()
    return Loss(reconstruction + sparsity, reconstruction, sparsity, torch.zeros_like(reconstruction))


# ---- JumpReLU form --------------------------------------------------------------------------------------------------


def jumprelu_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor, apply_b_dec_to_input: bool = True
) -> Tensor:
    """f = 1[π > θ] ⊙ ReLU(π), π = (x − b_dec) W_encᵀ + b_enc (2407.14435, equation 3)."""
    pi = pre_activation(x, W_enc, b_dec, apply_b_dec_to_input) + b_enc
    return (pi > threshold).to(pi.dtype) * torch.relu(pi)


def gated_to_jumprelu(W_enc: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc', b_enc', θ) of the JumpReLU SAE that computes the same f̃ (2404.16014, Appendix E; MATH.md §1).

    Exact in the reals; exp(r_mag) · W_enc rounds, so an entry within rounding of its threshold may flip.
    """
    scale = torch.exp(r_mag)
    return scale[:, None] * W_enc, b_mag.clone(), b_mag - scale * b_gate


# ---- JumpReLU, trained by straight-through estimators ---------------------------------------------------------------


class _StepEstimate(torch.autograd.Function):
    """1[π > θ] times π (``of_pi``) or 1.  Its slope in θ is −K((π − θ)/ε)/ε times θ or 1 (2407.14435, equations 11 and 12),
    and with ``to_pi`` the opposite is added to the slope in π."""

    @staticmethod
    def forward(ctx, pi, threshold, bandwidth, of_pi, to_pi):
        ctx.save_for_backward(pi, threshold)
        ctx.options = bandwidth, of_pi, to_pi
        return torch.where(pi > threshold, pi if of_pi else torch.ones_like(pi), 0)

    @staticmethod
    def backward(ctx, grad):
        (pi, threshold), (bandwidth, of_pi, to_pi) = ctx.saved_tensors, ctx.options
        inside = ((pi - threshold) / bandwidth).abs() < 0.5
        estimate = torch.where(inside, grad * (threshold if of_pi else 1) / bandwidth, 0)
        through = torch.where(pi > threshold, grad, 0) if of_pi else torch.zeros_like(grad)
        return through + estimate if to_pi else through, -estimate.sum(0), None, None, None


def jump(pi: Tensor, threshold: Tensor, bandwidth: float, to_pi: bool = False) -> Tensor:
    """f = π 1[π > θ] of π [B, F] and θ [F], with its pseudo-derivative in θ."""
    return _StepEstimate.apply(pi, threshold, bandwidth, True, to_pi)


def step(pi: Tensor, threshold: Tensor, bandwidth: float, to_pi: bool = False) -> Tensor:
    """1[π > θ], with its pseudo-derivative in θ: the sum over a row is its L0."""
    return _StepEstimate.apply(pi, threshold, bandwidth, False, to_pi)


# ---- TopK, prefixes, dead features ----------------------------------------------------------------------------------


def topk_encode(pi: Tensor, k: int, whole: bool = False) -> Tensor:
    """The k largest ReLU(π) of each row of π [B, F]; if ``whole``, the k · B largest of all.  Of equal ones, the first."""
    flat = torch.relu(pi).reshape(1 if whole else pi.shape[0], -1)
    order = flat.detach().sort(dim=1, descending=True, stable=True).indices[:, : k * pi.shape[0] if whole else k]
    return torch.zeros_like(flat).scatter(1, order, flat.gather(1, order)).reshape(pi.shape)


def prefix_reconstruction(
    target: Tensor, f: Tensor, W_dec: Tensor, b_dec: Tensor, ends: Sequence[int], weights: Sequence[float] | Tensor
) -> Tensor:
    """Σ_g c_g E‖target − x̂_g‖² of the first e_g features each (Matryoshka).  MATH.md §8."""
    terms = [(target - decode(f[:, :end], W_dec[:end], b_dec)).pow(2).sum(-1).mean() for end in ends]
    return sum((c * term for c, term in zip(weights, terms, strict=True)), torch.zeros_like(terms[0]))


def auxk_loss(pi: Tensor, error: Tensor, W_dec: Tensor, dead: Tensor, k: int, coefficient: float = 1 / 32) -> Tensor:
    """α E‖e − ê‖² / E‖e − ē‖², ê of the k largest ReLU(π) of the features ``dead`` [F] bool; e the error x − x̂, stopped.
    Gao et al. 2024 (arXiv 2406.04093), appendix A.2.  MATH.md §10."""
    error = error.detach()
    z = topk_encode(torch.where(dead, pi, -torch.inf), min(k, int(dead.sum())))
    spread = (error - error.mean(0)).pow(2).sum(-1).mean()
    loss = (error - z @ W_dec).pow(2).sum(-1).mean()
    return coefficient * loss / spread if spread > 0 else 0 * loss


# ---- One optimizer step ---------------------------------------------------------------------------------------------


def adam_step(
    W: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    unit_rows: bool = False,
) -> None:
    """Adam in place on W, m and v; ``step`` counts from 1.

    With ``unit_rows`` the gradient's component along each (normalised) row is removed first, and the rows are brought
    back to unit norm after: the constrained Adam of the paper's Appendix and of dictionary_learning.
    """
    if unit_rows:
        direction = W / W.norm(dim=1, keepdim=True)
        grad = grad - (grad * direction).sum(1, keepdim=True) * direction
    beta1, beta2 = betas
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    W.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    if unit_rows:
        W.div_(W.norm(dim=1, keepdim=True))
