"""TopK: of the SAEs that keep the largest (Gao et al. 2024, arXiv 2406.04093; BatchTopK: Bussmann et al., 2412.06410)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.objectives.objective import Objective


@dataclass(frozen=True)
class TopK(Objective):
    """‖x − x̂‖² alone: the support is what holds L0 down.

    A threshold for inference follows the smallest activation that each batch keeps: τ ← β τ + (1 − β) · smallest, in steps
    after ``threshold_start``, the first of which sets it.
    """

    coefficient: float | Tensor = field(default=0.0, init=False, repr=False)
    threshold_beta: float = 0.999
    threshold_start: int = 1000

    activations = ("relu",)
    projects_first = of_largest = True

    def __post_init__(self) -> None:
        super().__post_init__()
        beta = arguments.number("threshold_beta", self.threshold_beta, lambda beta: 0 <= beta < 1, "0 ≤ β < 1")
        start = arguments.whole("threshold_start", self.threshold_start, 0, wanted="a whole number of steps ≥ 0")
        object.__setattr__(self, "threshold_beta", beta)
        object.__setattr__(self, "threshold_start", start)

    def next_threshold(self, threshold: Tensor, magnitudes: Tensor, step: int | Tensor) -> Tensor:
        """0-d: what a threshold, negative while it is not set, is after a step, 0-d too, on a code of these magnitudes [n].
        Waits for no device."""
        kept = torch.where(magnitudes > 0, magnitudes, inf)
        smallest = torch.cat([kept, kept.new_full((1,), inf)]).amin()
        smallest = torch.where(smallest < inf, smallest, 0).to(threshold.dtype)
        moved = self.threshold_beta * threshold + (1 - self.threshold_beta) * smallest
        moved = torch.where(threshold < 0, smallest, moved)
        if isinstance(step, Tensor):
            return torch.where(step > self.threshold_start, moved, threshold)
        return moved if step > self.threshold_start else threshold
