"""Gated: Rajamanoharan et al. 2024 (arXiv 2404.16014)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sae_fast.activations.activation import Activation, Pulled, Vectors


class Gated(Activation):
    """Magnitudes 1[π_gate > 0] ReLU(π_mag) and gates ReLU(π_gate): π_gate = u + b_gate, π_mag = exp(r_mag) u + b_mag.

    The vectors are exp(r_mag) and b_mag.
    """

    name, native, value_sets = "gated", 0, 2
    bias, scaled_by_norm = "b_gate", ("b_mag",)
    parameters = trained = ("r_mag", "b_mag")

    def vectors(self, parameters: Mapping[str, Tensor]) -> Vectors:
        return torch.exp(parameters["r_mag"]), parameters["b_mag"]

    def calibrate(self, bias: Tensor, parameters: Mapping[str, Tensor]) -> None:
        parameters["b_mag"].copy_(bias)

    def values(self, u: Tensor, pi: Tensor, vectors: Vectors) -> Tensor:
        scale, b_mag = vectors
        return torch.stack([(pi > 0) * torch.relu(scale * u + b_mag), torch.relu(pi)])

    def pullback(self, u: Tensor, grads: Sequence[Tensor], indices: Tensor, vectors: Vectors) -> Pulled:
        """MATH.md §2: δ = g_gate + exp(r_mag) g_mag; r_mag's is exp(r_mag) g_mag u."""
        g_mag, g_gate = grads
        scaled = g_mag * vectors[0][indices]
        return g_gate + scaled, g_gate, scaled * u, g_mag

    def magnitude(self, u: Tensor, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        scale, b_mag = vectors
        return scale * u + b_mag, scale, u + bias > 0

    def jump(self, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
        scale, b_mag = vectors
        return -bias, torch.relu(scale * -bias + b_mag)
