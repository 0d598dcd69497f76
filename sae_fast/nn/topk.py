"""TopKSAE (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sae_fast.code import SparseCode
from sae_fast.nn.grouped import GroupedSAE

SUPPORTS = {"positive": "topk", "any": "topk_any", "abs": "topk_abs"}  # of ops.encode


class TopKSAE(GroupedSAE):
    """f = the k largest entries of ReLU(π), π = (x − b_dec) W_encᵀ + b_enc; of equal ones, the first.

    Fewer than k where fewer are positive.  A feature of a group that is off keeps its entry in the code, at value 0.
    ``largest="any"``: f = the k largest entries of π, negative ones too, as circuit-tracer's.  ``largest="abs"``: the
    entries of π with the k largest |π| (AbsTopK).  These two don't train yet.
    """

    support = "topk"

    def __init__(self, *args: Any, largest: str = "positive", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if largest not in SUPPORTS:
            raise ValueError(f"largest: got {largest!r}, want one of {', '.join(SUPPORTS)}")
        self.largest, self.support = largest, SUPPORTS[largest]

    def options(self) -> dict[str, Any]:
        return {**super().options(), **({} if self.largest == "positive" else {"largest": self.largest})}

    def _more(self) -> list[str]:
        return [*super()._more(), *([] if self.largest == "positive" else [f"largest = {self.largest!r}"])]

    def _encoder(self, guess: Tensor | None = None) -> dict[str, Any]:  # type: ignore[override]
        return {**super()._encoder(), "support": self.support, "k": self.k, "guess": guess}

    def _scale(self, x_c: Tensor) -> Tensor:
        return x_c.norm(dim=1)

    def _reached(self, code: SparseCode, scale: Tensor) -> float:
        least = code.magnitudes.view(-1, self.k).amin(dim=1) / scale
        return float(least.kthvalue(1 + code.batch // 100).values)
