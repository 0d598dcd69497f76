"""Layers, batches and a Trainer in plain PyTorch."""

from __future__ import annotations

import math

import torch
from helpers import randn
from torch import Tensor
from torch.nn import functional as F

import sae_fast as sf
from sae_fast import reference

D_IN, D_SAE, BATCH = 12, 70, 48
CLASSES = [sf.GatedSAE, sf.ReluSAE]
RECORD = {"step", "loss", "reconstruction", "sparsity", "auxiliary", "l0", "fvu", "lr", "l1_coefficient", "seconds"}


def batches(n: int, dtype=torch.float32, B: int = BATCH, seed: int = 0) -> list[Tensor]:
    """Sparse combinations of more directions than there are dimensions."""
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(2 * D_IN, D_IN, generator=g), dim=1)
    f = (torch.rand(n, B, 2 * D_IN, generator=g) < 0.12) * (1 + torch.rand(n, B, 2 * D_IN, generator=g))
    return list((f @ directions).to(dtype))


def make(cls=sf.GatedSAE, dtype=torch.float32, seed=0, l0=4.0):
    """A layer in the middle of things: no two parameters alike, sparse or (l0=None) half dense."""
    sae = cls(D_IN, D_SAE, seed=seed)
    with torch.no_grad():
        sae.W_enc.add_(0.05 * randn(D_SAE, D_IN, seed=1))
        sae.b_dec.copy_(0.1 * randn(D_IN, seed=2))
        if l0 is not None:
            sae.calibrate_(batches(1)[0], l0)
        if cls is sf.GatedSAE:
            sae.r_mag.copy_(0.1 * randn(D_SAE, seed=3))
            sae.b_mag.add_(0.1 * randn(D_SAE, seed=4))
    sae = sae.to(dtype)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))  # to the last bit of the dtype
    return sae


def weights_of(sae) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def everything(trainer: sf.Trainer) -> list[Tensor]:
    """Every bit of a trainer's state."""
    out = [*weights_of(trainer.sae).values(), torch.tensor(trainer.step_count)]
    for p in trainer.sae.parameters():
        state = trainer.optimizer.state.get(p, {})
        out += [torch.as_tensor(state[key]).clone() for key in sorted(state)]
    return out


class PlainTrainer:
    """Autograd on the reference loss, torch's gradient clipping, projection, torch's Adam, renormalisation."""

    def __init__(self, sae, lr, l1_coefficient, betas=(0.0, 0.999), eps=1e-8, dialect="paper", grad_clip=None, dtype=None):
        self.p = {name: t.to(dtype or t.dtype).requires_grad_() for name, t in weights_of(sae).items()}
        self.gated, self.l1, self.dialect, self.clip = isinstance(sae, sf.GatedSAE), l1_coefficient, dialect, grad_clip
        self.adam = torch.optim.Adam(self.p.values(), lr=lr, betas=betas, eps=eps)
        self.normalise()

    def normalise(self) -> None:
        if self.dialect == "paper":
            self.p["W_dec"].data = F.normalize(self.p["W_dec"].data, dim=1)

    def loss(self, x: Tensor) -> reference.Loss:
        names = (
            ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec") if self.gated else ("W_enc", "b_enc", "W_dec", "b_dec")
        )
        function = reference.gated_loss if self.gated else reference.relu_loss
        return function(x, *(self.p[name] for name in names), self.l1, self.dialect)

    def step(self, x: Tensor) -> tuple[reference.Loss, float]:
        """The losses before the step, and the gradient norm before clipping."""
        self.adam.zero_grad()
        losses = self.loss(x)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.p.values(), math.inf if self.clip is None else self.clip)
        W, grad = self.p["W_dec"], self.p["W_dec"].grad
        assert grad is not None
        if self.dialect == "paper":
            direction = F.normalize(W.detach(), dim=1)
            grad.sub_((grad * direction).sum(1, keepdim=True) * direction)
        self.adam.step()
        self.normalise()
        return reference.Loss(*(t.detach() for t in losses)), float(norm)
