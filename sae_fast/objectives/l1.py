"""L1: the baseline's objective (Bricken et al. 2023), and that of April 2024 (Conerly et al.)."""

from __future__ import annotations

from dataclasses import dataclass

from sae_fast.objectives.lp import Lp


@dataclass(frozen=True)
class L1(Lp):
    """‖x − x̂‖² + λ‖f‖₁, λ the coefficient, decoder rows unit; with ``decoder_norms`` λ Σ_i f_i ‖d_i‖ instead, and
    rows of any norm."""

    decoder_norms: bool = False

    activations = ("relu",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit_rows", self.unit_rows and not self.decoder_norms)
        super().__post_init__()

    @property
    def costs_norm(self) -> bool:
        return self.decoder_norms
