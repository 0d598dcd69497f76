"""The same training step in eager PyTorch, written as well as eager PyTorch allows: what speed-ups are measured against.

One encoder product, autograd only where it costs nothing extra, a fused Adam.  Nobody trains with this; it is the dense
reference of the benchmark and of the demo's closing table, and its losses are those of the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_fast.nn import GatedSAE


def gated_loss_dense(x: Tensor, W_enc, b_gate, b_mag, r_mag, W_dec, b_dec, l1_coefficient: float) -> Tensor:
    """The total of equation (8), ``paper`` dialect, from dense [B, F] tensors."""
    # b_dec enters through the bias: (x − b_dec) W_encᵀ would cost a product more in the backward pass.
    u = F.linear(x, W_enc, -(W_enc @ b_dec))
    pi_gate = u + b_gate
    gates = torch.relu(pi_gate)
    f = torch.where(pi_gate > 0, torch.relu(torch.exp(r_mag) * u + b_mag), 0.0)
    reconstruction = (torch.addmm(b_dec, f, W_dec) - x).pow(2).sum()
    auxiliary = (torch.addmm(b_dec.detach(), gates, W_dec.detach()) - x).pow(2).sum()
    return (reconstruction + l1_coefficient * gates.sum() + auxiliary) / x.shape[0]


class EagerTrainer:
    """Trains a GatedSAE like Trainer with the same arguments, densely.  ``compile=True`` compiles the loss."""

    def __init__(
        self,
        sae: GatedSAE,
        lr: float,
        l1_coefficient: float,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        compile: bool = False,
    ):
        self.sae, self.l1_coefficient = sae, l1_coefficient
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, eps=eps, fused=True)
        self.loss = torch.compile(gated_loss_dense) if compile else gated_loss_dense

    def step(self, x: Tensor) -> float:
        """One step on x [B, d]; returns the total loss before it."""
        sae = self.sae
        self.optimizer.zero_grad()
        loss = self.loss(x, sae.W_enc, sae.b_gate, sae.b_mag, sae.r_mag, sae.W_dec, sae.b_dec, self.l1_coefficient)
        loss.backward()
        with torch.no_grad():
            direction = F.normalize(sae.W_dec, dim=1)
            grad = sae.W_dec.grad
            assert grad is not None
            grad.sub_((grad * direction).sum(1, keepdim=True) * direction)
            self.optimizer.step()
            sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
        return float(loss.detach())
