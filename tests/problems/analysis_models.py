"""Small models and SAEs, in float64, on which attribution can be checked against autograd and by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sae_fast as sf

KINDS = {"gated": sf.GatedSAE, "relu": sf.ReluSAE, "jumprelu": sf.JumpReluSAE}


class Chain(nn.Module):
    """[N, T, 6] → a [N, T, 10] → c [N, T, 8] → one number an example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(6, 10), nn.Linear(10, 8)
        self.tail = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.c(torch.tanh(self.a(x)) * 2)).sum((1, 2))


def random_sae(kind: str, d: int, features: int, seed: int = 0):
    """With biases below 0 and, where there are gates, thresholds above it."""
    sae = KINDS[kind](d, features, dtype=torch.float64, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bias, theta, r_mag, b_dec = torch.rand(4, max(d, features), generator=random).double().unbind()
        bias, theta, r_mag, b_dec = bias[:features], theta[:features], r_mag[:features], b_dec[:d]
        sae.b_dec.copy_(b_dec - 0.5)
        sae.get_parameter(sae.per_feature[0]).copy_(-0.5 * bias)
        if kind == "gated":
            sae.r_mag.copy_(r_mag - 0.5)
            sae.b_mag.copy_(theta + sae.r_mag.exp() * sae.b_gate)
        if kind == "jumprelu":
            sae.threshold.copy_(theta)
    return sae


def step_sae():
    """One gated feature of one dimension: f = u where u > 1, else 0."""
    sae = sf.GatedSAE(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for name, value in {"W_enc": 1, "W_dec": 1, "b_gate": -1}.items():
            sae.get_parameter(name).fill_(value)
    return sae


def random_ends(examples: int = 3, tokens: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(2, examples, tokens, 6, generator=torch.Generator().manual_seed(seed)).double().unbind()


def identity(output: Tensor) -> Tensor:
    return output
