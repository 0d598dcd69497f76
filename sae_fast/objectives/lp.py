"""Lp: the penalty λ Σ aᵖ that L1's is annealed to (Karvonen et al. 2024, arXiv 2408.00113)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.code import Layer, SparseCode
from sae_fast.objectives.objective import Objective, Pull, penalised
from sae_fast.penalty import LINEAR, POWER, ROOTED, Penalty


@dataclass(frozen=True)
class Lp(Objective):
    """The part that Gated and L1 share: λ Σ_i a_iᵖ of the last value set a, λ the coefficient; with ``rooted``
    λ (Σ_i a_iᵖ)^(1/p), the norm itself.  p = 1 is L1, whose weights decode_loss has."""

    p: float = field(default=1.0, kw_only=True)
    rooted: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "p", arguments.number("p", self.p, lambda p: 0 < p <= 1, "0 < p ≤ 1"))
        if self.p != 1 and self.costs_norm:
            raise ValueError(f"p: got {self.p} with a penalty on decoder norms, want 1")

    @property
    def linear(self) -> bool:
        return self.p == 1

    @property
    def penalty(self) -> Penalty:
        return Penalty(LINEAR) if self.p == 1 else Penalty(ROOTED if self.rooted else POWER, self.p)

    def sparsity_weight(self, W_dec: Tensor) -> Tensor:
        if self.p != 1:
            return W_dec.new_zeros(W_dec.shape[0])
        norms = self.norms(W_dec)
        return self.coefficient * (W_dec.new_ones(W_dec.shape[0]) if norms is None else norms)

    def pull(self, code: SparseCode, layer: Layer, W_dec: Tensor, losses: Tensor, grads: Tensor, n: int) -> Pull:
        if self.p != 1:
            a, p = code.values[-1], self.p
            by_row = code.row_sums(a.pow(p))
            slopes = torch.where(a > 0, p * a.pow(p - 1), 0)
            if self.rooted:
                slopes = slopes * (by_row.pow(1 / p - 1) / p)[code.row_ids()]
                by_row = by_row.pow(1 / p)
            losses = penalised(losses, by_row.sum(dtype=torch.float64) * self.coefficient / n)
            grads = torch.cat([grads[:-1], (grads[-1] + slopes * (self.coefficient / n))[None]])
        return super().pull(code, layer, W_dec, losses, grads, n)
