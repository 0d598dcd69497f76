"""ReluSAE: the baseline with an L1 penalty (Bricken et al. 2023; the baseline of arXiv 2404.16014)."""

from __future__ import annotations

from torch import Tensor, nn

from sae_fast import functional
from sae_fast.nn.base import SparseAutoencoder
from sae_fast.objectives import Objective
from sae_fast.reference import Loss


class ReluSAE(SparseAutoencoder):
    """f = ReLU((x − b_dec) W_encᵀ + b_enc).  Parameters W_enc [F, d], b_enc [F], W_dec [F, d] (unit rows), b_dec [d]."""

    activation = "relu"
    per_feature = ("b_enc",)
    b_enc: nn.Parameter

    def loss(  # type: ignore[override]
        self, x: Tensor, l1_coefficient: float | Objective, dialect: str = "paper", target: Tensor | None = None,
        dead: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """‖x − x̂‖² + λ‖f‖₁ on x [..., d_in], differentiable; the auxiliary term is 0.  Arguments as GatedSAE.loss."""
        if isinstance(l1_coefficient, Objective):
            if dialect != "paper" or target is not None:
                raise ValueError("dialect, target: got one beside an objective, want neither")
            return super().loss(x, l1_coefficient, dead)
        self.check_plain("train")
        target = None if target is None else self.check_input(target, "target")
        return functional.relu_loss(
            self.check_input(x), self.W_enc, self.b_enc, self.W_dec, self.b_dec, l1_coefficient, dialect, target,
            self.precision, self.apply_b_dec_to_input,
        )  # fmt: skip
