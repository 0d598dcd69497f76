"""JumpReluSAE (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from typing import Any

from torch import nn

from sae_fast.nn.base import SparseAutoencoder


class JumpReluSAE(SparseAutoencoder):
    """f = 1[π > θ] ⊙ ReLU(π), π = (x − b_dec) W_encᵀ + b_enc.  Parameters W_enc [F, d], b_enc [F], threshold [F],
    W_dec [F, d], b_dec [d].

    ``threshold`` may be kept in another dtype, as SAELens keeps it in float32 beside bfloat16 weights; it is rounded to the
    layer's where it is used, as there."""

    activation = "jumprelu"
    per_feature = ("b_enc", "threshold")
    any_dtype = ("threshold",)
    b_enc: nn.Parameter
    threshold: nn.Parameter

    def _encoder(self, slack: float = 0.0) -> dict[str, Any]:
        return {**super()._encoder(slack), "threshold": self.threshold.to(self.W_enc.dtype)}
