"""TopKSAE (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

from sae_fast.nn.grouped import GroupedSAE


class TopKSAE(GroupedSAE):
    """f = the k largest entries of ReLU(π), π = (x − b_dec) W_encᵀ + b_enc; of equal ones, the first.

    Fewer than k where fewer are positive.  A feature of a group that is off keeps its entry in the code, at value 0.
    """

    def _encoder(self) -> dict[str, Any]:
        return {**super()._encoder(), "support": "topk", "k": self.k}
