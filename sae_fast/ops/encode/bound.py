"""torch's fp32 product as the bound, where there is no bfloat16 product: close enough that hardly any entry that
is no member needs an exact dot.  docs/screen.md, "Without a bfloat16 product"."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sae_fast.code import Shadow

ROWS = 48  # below, reading W once is all there is to it
LEAST = 2.0**-40  # a smaller norm is taken for this
MARGIN = 1.0  # times what a product may be off by: a test puts less there


def unavailable() -> str | None:
    """The reason why torch's fp32 product is no bound, or None."""
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the program has used the newer names, after which the older one raises
        return "torch's matmul precision was set by its newer names"
    return None if highest else "torch's matmul precision is not 'highest'"


class Bound:
    """The error that a product with the rows of W [F, d] can have.  ``open`` [F]: bias, or NaN for a feature that has no
    bound, which passes any test."""

    def __init__(self, W: Tensor, bias: Tensor, cut: Tensor | None, shadow: Shadow | None):
        self.W = W
        norms = _norms(W) if shadow is None else shadow.norms[:, 0].clamp(min=LEAST)
        sizes = bias.abs() if cut is None else bias.abs() + cut.abs()
        sound = (norms <= 2.0**40) & (sizes <= 2.0**100)
        self.norms, self.sizes = (torch.where(sound, t.double(), 0) for t in (norms, sizes))
        self.open = torch.where(sound, bias, torch.nan)

    def tiles(self, rows: Tensor, tiles: Iterator[tuple[int, int, Tensor]]) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Fills ``tiles`` (first, last, memory) with the product of rows [n, d]; adds the margins [n] float64 of each."""
        d = rows.shape[1]
        norms = _norms(rows)
        norms = torch.where(norms <= 2.0**40, norms, torch.nan)
        gamma = (d + 8) * 2.0**-23
        for first, last, tile in tiles:
            torch.mm(rows, self.W[first:last].T, out=tile)
            sums, size = norms * self.norms[first:last].max(), self.sizes[first:last].max()
            yield first, last, tile, MARGIN * (2.1 * gamma * sums + 2.0**-20 * (sums + size)) * (1 + 2.0**-16) + 2.0**-100


def _norms(A: Tensor) -> Tensor:
    """[n] float64, no less than the rows' norms.  Summed in float32, whose squares vanish below ``LEAST``."""
    return torch.linalg.vector_norm(A, dim=1).double().clamp(min=LEAST) * (1 + A.shape[1] * 2.0**-22)
