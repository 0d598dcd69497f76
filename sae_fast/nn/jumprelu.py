"""JumpReluSAE, for inference (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from torch import nn

from sae_fast.nn.base import SparseAutoencoder


class JumpReluSAE(SparseAutoencoder):
    """f = 1[π > θ] ⊙ ReLU(π), π = (x − b_dec) W_encᵀ + b_enc.  Parameters W_enc [F, d], b_enc [F], threshold [F],
    W_dec [F, d], b_dec [d]."""

    activation = "jumprelu"
    per_feature = ("b_enc", "threshold")
    b_enc: nn.Parameter
    threshold: nn.Parameter
