"""The C++ engine's way to ``topk`` and ``batch_topk``: the routes and tiles of _support.py, and a floor that rises.

Once k entries of a row (or k · B of the batch) are known to be above some floor, what a tile bounds below it cannot be
chosen: the rest of the rows costs a comparison an entry.  docs/screen.md, "Against a floor".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Shadow
from sae_fast.ops import _support
from sae_fast.ops._native import _C, address, threads

# k ÷ F above which every entry is dotted.  An estimate: on two AVX2 cores a dot by itself took 9 times as long as in a
# block, and a bfloat16 product is taken to need a third of the time of a float32 one.
DENSE_ABOVE = 0.05
ROOM = 512  # entries a row, at least, that gather before a floor is sought
BOUND_ROWS = 48  # below, reading W once is all there is to it
MARGIN = 1.0  # times what a float product may be off by: a test puts less there
RAISE = 0  # bfloat16 steps by which the floor is lifted: a test puts 1 there


class Bound:
    """torch's fp32 product as the bound, where there is no bfloat16 product: it is near enough to the dots that few entries
    more than the k are dotted.  docs/screen.md, "Without a bfloat16 product"."""

    def __init__(self, W: Tensor, bias: Tensor, shadow: Shadow | None):
        self.W, self.bias = W, bias
        norms = torch.linalg.vector_norm(W, dim=1, dtype=torch.float64) if shadow is None else shadow.norms[:, 0]
        self.sound = _in_range(norms) & (bias.abs() <= 2.0**100)
        self.norms, self.sizes = (torch.where(self.sound, t.double(), 0) for t in (norms, bias.abs()))
        self.open = torch.where(self.sound, bias, torch.nan)

    def fill(self, largest, rows: Tensor) -> Any:
        """Gives a block of rows to a Largest, tile by tile; returns the engine's Layer."""
        W, d = self.W, self.W.shape[1]
        layer = _C.Layer(address(rows), address(W), d, address(self.bias), 0)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        norms = torch.where(_in_range(norms), norms, torch.nan)
        gamma = (d + 8) * 2.0**-23
        for first, last, tile in _support._tiles(rows.shape[0], W.shape[0], torch.float32):
            torch.mm(rows, W[first:last].T, out=tile)
            sums, size = norms * self.norms[first:last].max(), self.sizes[first:last].max()
            margins = MARGIN * (2.1 * gamma * sums + 2.0**-20 * (sums + size)) * (1 + 2.0**-16) + 2.0**-100
            excess = (2 * margins).float()
            largest.expect(address(excess))
            largest.add_bounded_tile(
                layer, address(tile), address(self.open[first:last]), last - first, first, threads()
            )  # fmt: skip
        return layer


def _in_range(norms: Tensor) -> Tensor:
    return (norms == 0) | ((norms >= 2.0**-40) & (norms <= 2.0**40))


def find(
    x: Tensor, W: Tensor, bias: Tensor, k: int, whole: bool, precision: str, shadow: Shadow | None
) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices and u of the k largest positive x·w + bias of each row of x [B, d]; if ``whole``, of the k · B
    largest of all.  Ties go to the lower row and then feature; a NaN counts as the largest."""
    way = _support.route(precision, x.shape[0], shadow)
    if way == "screen" and k > DENSE_ABOVE * W.shape[0]:
        way = "dots"
    if way == "dots" and x.shape[0] >= BOUND_ROWS and k <= DENSE_ABOVE * W.shape[0]:
        way = "bound" if torch.get_float32_matmul_precision() == "highest" else way
    shadow = _support.for_all_blocks(way, x, W, shadow)
    bound = Bound(W, bias, shadow) if way == "bound" else None
    largest = _C.Largest(x.shape[0], k, whole, max(4 * k, ROOM), RAISE)
    for first in range(0, x.shape[0], _support.ROWS):
        rows = x[first : first + _support.ROWS]
        largest.begin(first, rows.shape[0])
        if bound is not None:
            layer = bound.fill(largest, rows)
        else:
            layer = _support.fill(largest, way, rows, W, bias, None, shadow, test="floor")
        largest.settle(layer, threads())
    nnz = largest.select(threads())
    indptr = torch.empty(x.shape[0] + 1, dtype=torch.int64)
    indices, u = torch.empty(nnz, dtype=torch.int32), torch.empty(nnz)
    largest.finish(address(indptr), address(indices), address(u), threads())
    return indptr, indices, u
