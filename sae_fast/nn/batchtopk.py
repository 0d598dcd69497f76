"""BatchTopKSAE (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.code import SparseCode
from sae_fast.nn.grouped import GroupedSAE


class BatchTopKSAE(GroupedSAE):
    """π = (x − b_dec) W_encᵀ + b_enc, and f by one of two rules.

    With a threshold ≥ 0, which training estimates: f = 1[π > threshold] ⊙ ReLU(π), whatever else is in the batch.  Without:
    the k · B largest entries of ReLU(π) of all B examples of x together; of equal ones, the first.  k need not be whole:
    k · B is rounded down.

    The buffer ``threshold`` is a float32 scalar, −1 while it is not set; ``sae.threshold.fill_(value)`` sets it.  It stays
    float32 when the layer is moved to another dtype, and is rounded to the layer's where it is used.  A compiled layer
    keeps the rule that it was compiled with.
    """

    support = "batch_topk"
    threshold: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("threshold", torch.tensor(-1.0, dtype=torch.float32, device=self.W_enc.device))

    def _checked_k(self, k: Any) -> int | float:
        return arguments.average("k", k, self.d_sae, f"a number with 0 < k ≤ d_sae = {self.d_sae}")

    def encode_sparse(self, x: Tensor, use_threshold: bool | None = None) -> SparseCode:
        """The sparse code of x [..., d_in].  Its values are differentiable.  ``use_threshold``: by the threshold, or the
        largest of the batch; by default by the threshold if it is set."""
        return self._encoded(x, use_threshold=use_threshold)

    def encode(self, x: Tensor, use_threshold: bool | None = None) -> Tensor:
        """The dense code [..., F]; arguments as :meth:`encode_sparse`."""
        return self.encode_sparse(x, use_threshold).to_dense()

    _in_training = MappingProxyType({"use_threshold": False})

    def _scale(self, x_c: Tensor) -> Tensor:
        return x_c.new_ones(x_c.shape[0])

    def _reached(self, code: SparseCode, scale: Tensor) -> float:
        return float(code.magnitudes.amin())

    def has_threshold(self) -> bool:
        """True if a threshold is set.  Synchronises on a GPU."""
        return bool(self.threshold >= 0)

    # A trace cannot ask for a tensor's value.  This is torch.compiler.assume_constant_result, but for its heavy imports.
    has_threshold._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _encoder(self, use_threshold: bool | None = None, guess: Tensor | None = None) -> dict[str, Any]:  # type: ignore[override]
        if use_threshold is None:
            use_threshold = self.has_threshold()
        elif use_threshold and not self.has_threshold():
            raise ValueError("use_threshold: got True, want a threshold ≥ 0 first (sae.threshold.fill_(value))")
        if not use_threshold:
            return {**super()._encoder(), "support": self.support, "k": self.k, "guess": guess}
        return {"activation": "jumprelu", "threshold": self.threshold.to(self.W_enc.dtype).expand(self.d_sae)}

    def _apply(self, fn: Callable, recurse: bool = True) -> BatchTopKSAE:
        before = self.threshold
        super()._apply(fn, recurse)
        after = self.threshold
        self.threshold = after.float() if before.is_meta else before.to(after.device)  # never through a narrower dtype
        return self
