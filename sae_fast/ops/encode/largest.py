"""The C++ engine's way to ``topk`` and ``batch_topk``: the routes and tiles of cpu.py, and a floor that rises.

Once k entries of a row (or k · B of the batch) are known to be above some floor, what a tile bounds below it cannot be
chosen: the rest of the rows costs a comparison an entry.  A guess is such a floor from the start, and what it misses is
made up for.  docs/screen.md, "Against a floor".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.ops.encode import cpu
from sae_fast.ops.encode.bound import Bound
from sae_fast.ops.native import _C, threads

# k ÷ F above which every entry is dotted.  An estimate: on two AVX2 cores a dot by itself took 9 times as long as in a
# block, and a bfloat16 product is taken to need a third of the time of a float32 one.
DENSE_ABOVE = 0.05
ROOM = 512  # entries a row, at least, that gather before a floor is sought
RAISE = 0  # bfloat16 steps by which the floor is lifted: a test puts 1 there


def _bounded(largest, bound: Bound, rows: Tensor, bias: Tensor) -> Any:
    """Gives a block of rows to a Largest, tile by tile; returns the engine's Layer."""
    layer = _C.Layer(x=rows, W=bound.W, d=rows.shape[1], bias=bias, cut=None)
    tiles = cpu.tiles(rows.shape[0], bound.W.shape[0], torch.float32)
    for first, last, tile, margins in bound.tiles(rows, tiles):
        largest.add_bounded_tile(
            layer=layer, tile=tile, bias=bound.open[first:last], margins=margins.float(), width=last - first, first=first,
            dense_above=1.0, threads=threads(),
        )  # fmt: skip
    return layer


def largest_support(
    x: Tensor, layer: Layer, k: int, whole: bool, precision: str, guess: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices and u of the k largest positive x·w + bias of each row of x [B, d]; if ``whole``, of the k · B
    largest of all.  Ties go to the lower row and then feature; a NaN counts as the largest."""
    way = cpu.route(precision, x.shape[0], layer.shadow)
    if way in ("screen", "bound") and k > DENSE_ABOVE * layer.W.shape[0]:
        way = "dots"
    layer = cpu.for_all_blocks(way, x, layer)._replace(cut=None)
    if way not in ("screen", "bound", "dots"):  # what a guess missed is found by dots, which do not decide there
        guess = None
    bound = Bound(layer.W, layer.bias, None, layer.shadow) if way == "bound" else None
    largest = _C.Largest(rows=x.shape[0], k=k, whole=whole, room=max(4 * k, ROOM), lift=RAISE)
    for first in range(0, x.shape[0], cpu.ROWS):
        rows = x[first : first + cpu.ROWS]
        for given in (guess, None):
            part = None if given is None else given[first : first + cpu.ROWS]
            largest.begin(first=first, n=rows.shape[0], guess=part)
            if bound is not None:
                native = _bounded(largest, bound, rows, layer.bias)
            else:
                native = cpu.fill(largest, way, rows, layer, test="floor")
            if largest.settle(layer=native, threads=threads()):
                break
    nnz = largest.select(threads=threads())
    if nnz < 0:
        return largest_support(x, layer, k, whole, precision)
    indptr = torch.empty(x.shape[0] + 1, dtype=torch.int64)
    indices, u = torch.empty(nnz, dtype=torch.int32), x.new_empty(nnz)
    largest.finish(indptr=indptr, indices=indices, u=u, threads=threads())
    return indptr, indices, u
