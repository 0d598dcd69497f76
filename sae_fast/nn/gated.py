"""GatedSAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sae_fast import functional, reference
from sae_fast.nn.base import SparseAutoencoder
from sae_fast.nn.jumprelu import JumpReluSAE
from sae_fast.objectives import Objective
from sae_fast.reference import Loss


class GatedSAE(SparseAutoencoder):
    """f̃ = 1[π_gate > 0] ⊙ ReLU(π_mag), π_gate = u + b_gate, π_mag = exp(r_mag) ⊙ u + b_mag, u = (x − b_dec) W_encᵀ.

    Parameters W_enc [F, d], b_gate [F], b_mag [F], r_mag [F], W_dec [F, d] (unit rows), b_dec [d].
    """

    activation = "gated"
    per_feature = ("b_gate", "b_mag", "r_mag")
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def loss(  # type: ignore[override]
        self, x: Tensor, l1_coefficient: float | Objective, dialect: str = "paper", target: Tensor | None = None,
        dead: Tensor | None = None,
    ) -> Loss:  # fmt: skip
        """Equation (8) on x [..., d_in]: .total .reconstruction .sparsity .auxiliary, differentiable, means over the
        examples.  ``dialect``: "paper" or "saelens" (MATH.md §1); ``target`` replaces x in the errors.  An
        Objective in λ's place, and ``dead``: as SparseAutoencoder.loss."""
        if isinstance(l1_coefficient, Objective):
            if dialect != "paper" or target is not None:
                raise ValueError("dialect, target: got one beside an objective, want neither")
            return super().loss(x, l1_coefficient, dead)
        self.check_plain("train")
        target = None if target is None else self.check_input(target, "target")
        return functional.gated_loss(
            self.check_input(x), self.W_enc, self.b_gate, self.b_mag, self.r_mag, self.W_dec, self.b_dec,
            l1_coefficient, dialect, target, self.precision, self.apply_b_dec_to_input,
        )  # fmt: skip

    @torch.no_grad()
    def to_jumprelu(self, apply_b_dec_to_input: bool | None = None) -> JumpReluSAE:
        """The JumpReLU SAE that computes the same function (θ = max(0, b_mag − exp(r_mag) b_gate)).

        Exact in the reals; exp(r_mag) · W_enc rounds, so an entry within rounding of its threshold may flip.
        ``apply_b_dec_to_input``: that of the result, by default this SAE's; what it changes goes into b_enc.
        """
        centred = self.apply_b_dec_to_input if apply_b_dec_to_input is None else apply_b_dec_to_input
        W_enc, b_enc, threshold = reference.gated_to_jumprelu(self.W_enc, self.b_gate, self.b_mag, self.r_mag)
        if centred != self.apply_b_dec_to_input:  # W (x − b_dec) + b_enc = W x + (b_enc − W b_dec)
            shift = (W_enc.double() @ self.b_dec.double()).to(b_enc.dtype)
            b_enc = b_enc + shift if centred else b_enc - shift
        kept = {name: t for name, t in self.state_dict().items() if name in ("W_dec", "b_dec", "W_skip")}
        values = dict(W_enc=W_enc, b_enc=b_enc, threshold=threshold.clamp(min=0), **kept)
        options = {**self.options(), "apply_b_dec_to_input": centred, "precision": self.precision}
        sae = JumpReluSAE.of_state("sae", self.d_in, self.d_sae, W_enc.dtype, values, **options)
        sae.metadata = copy.deepcopy(self.metadata)
        return sae
