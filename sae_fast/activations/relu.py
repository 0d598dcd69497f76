"""ReLU: of the baseline, and of the TopK family, whose support alone differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_fast.activations.activation import Activation, Pulled, Vectors


class ReLU(Activation):
    """f = ReLU(π), π = u + b_enc."""

    name, native, bias = "relu", 1, "b_enc"

    def values(self, u: Tensor, pi: Tensor, vectors: Vectors) -> Tensor:
        return torch.relu(pi)[None]

    def pullback(self, u: Tensor, grads: Sequence[Tensor], indices: Tensor, vectors: Vectors) -> Pulled:
        return grads[0], grads[0]

    def magnitude(self, u: Tensor, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        pi = u + bias
        return pi, torch.ones_like(u), pi > 0

    def jump(self, bias: Tensor, vectors: Vectors) -> tuple[Tensor, Tensor]:
        return -bias, torch.zeros_like(bias)
