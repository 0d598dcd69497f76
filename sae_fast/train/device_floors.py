"""Floors for the candidates of SAEs that keep the largest entries: a little below what the last batches kept.

Where a floor hides an entry that is among the largest, the step says so by SHORT, and is repeated above floors that
cannot fail.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from sae_fast import nn
from sae_fast.kernels.compact import Gapped

MARGIN, LEAST_MARGIN = 0.9, 0.6  # of the least that has been kept, at first and at last
FORGETS = 1.01  # the least of before, in each step


class Floors:
    """``least`` (0-d, on the device): what the smallest entry kept reaches, in units of its row's ‖x_c‖ where each row
    keeps its own largest; 0 while it is not known."""

    def __init__(self, sae: nn.GroupedSAE):
        self.whole, self.k = sae.support == "batch_topk", sae.k
        self.least = torch.zeros((), dtype=torch.float32, device=sae.W_enc.device)
        self.margin = MARGIN

    def scale(self, x_c: Tensor) -> Tensor:
        """[B] float32: what a row's smallest entry goes with."""
        return self.least.new_ones(x_c.shape[0]) if self.whole else x_c.float().norm(dim=1)

    def follow(self, code: Gapped, x_c: Tensor, flag: Tensor) -> None:
        """Moves ``least`` on after a step on ``code``, the code of x_c [B, d], if ``flag`` is not set."""
        now, before = self._reached(code, self.scale(x_c)), self.least
        moved = torch.where(before > 0, torch.minimum(now, before * FORGETS), torch.where(now < inf, now, 0))
        self.least.copy_(torch.where(flag == 0, moved, before))

    def lower(self) -> None:
        """For the steps after one whose largest a floor had hidden."""
        self.margin = max(LEAST_MARGIN, 0.95 * self.margin)

    def _reached(self, code: Gapped, scale: Tensor) -> Tensor:
        """The smallest of rows that keep k, ∞ without any."""
        magnitudes, rows = code.values[0], code.begin.shape[0]
        kept = magnitudes > 0
        if self.whole:
            full = kept.sum() >= self.k * rows
            return torch.where(full, torch.where(kept, magnitudes, inf).amin(), inf)
        at = code.begin[:, None] + torch.arange(self.k, device=scale.device)
        full = code.end - code.begin >= self.k
        least = magnitudes[at.clamp(max=magnitudes.shape[0] - 1)].amin(dim=1)
        return torch.where(full & (scale > 0), least / scale, inf).amin()
