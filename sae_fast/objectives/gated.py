"""Gated: equation (8) of Rajamanoharan et al. 2024 (arXiv 2404.16014)."""

from __future__ import annotations

from dataclasses import dataclass

from sae_fast.objectives.lp import Lp
from sae_fast.reference import DIALECTS


@dataclass(frozen=True)
class Gated(Lp):
    """‖x − x̂‖² + λ‖ReLU(π_gate)‖₁ + ‖x − x̂_aux‖², λ the coefficient, by ``dialect`` (MATH.md §1).

    ``paper``: x̂_aux is stopped, decoder rows are unit.  ``saelens``: it is not, and feature i's activation costs λ‖d_i‖.
    """

    dialect: str = "paper"

    activations = ("gated",)

    def __post_init__(self) -> None:
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect: got {self.dialect!r}, want one of {DIALECTS}")
        object.__setattr__(self, "unit_rows", self.unit_rows and self.stops_auxiliary)
        super().__post_init__()

    @property
    def stops_auxiliary(self) -> bool:  # type: ignore[override]
        return self.dialect == "paper"

    @property
    def costs_norm(self) -> bool:
        return self.dialect == "saelens"
