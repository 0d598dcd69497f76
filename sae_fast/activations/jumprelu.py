"""JumpReLU: Rajamanoharan et al. 2024 (arXiv 2407.14435)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sae_fast.activations.activation import Activation, Pulled, Vectors


class JumpReLU(Activation):
    """f = 1[π > θ] ReLU(π), π = u + b_enc, θ the threshold, which has no gradient here."""

    name, native, bias = "jumprelu", 2, "b_enc"
    parameters = scaled_by_norm = ("threshold",)

    def cut(self, vectors: Vectors) -> Tensor:
        return vectors[0].clamp(min=0)

    def calibrate(self, bias: Tensor, parameters: Mapping[str, Tensor]) -> None:
        bias += parameters["threshold"].clamp(min=0)

    def values(self, u: Tensor, pi: Tensor, vectors: Vectors) -> Tensor:
        return ((pi > vectors[0]) * torch.relu(pi))[None]

    def pullback(self, u: Tensor, grads: Sequence[Tensor], indices: Tensor, vectors: Vectors) -> Pulled:
        return grads[0], grads[0], None

    def magnitude(self, u: Tensor, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        pi = u + bias
        return pi, torch.ones_like(u), pi > vectors[0]

    def jump(self, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
        return vectors[0] - bias, torch.relu(vectors[0])
