"""The C++ engine's way to ``topk`` and its relatives: the routes and tiles of cpu.py, and a floor that rises.

Once k entries of a row (or k · B of the batch) are known to be above some floor, what a tile bounds below it cannot be
chosen: the rest of the rows costs a comparison an entry.  A guess is such a floor from the start, and what it misses is
made up for.  docs/screen.md, "Against a floor".
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.ops import crossovers
from sae_fast.ops.encode import cpu
from sae_fast.ops.encode.bound import Bound
from sae_fast.ops.encode.dense import Choice
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
    x: Tensor, layer: Layer, choice: Choice, precision: str, guess: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices and u of the entries of x [B, d] that are chosen."""
    found = _largest(x, layer, choice, precision, guess)
    if choice.support != "topk_any":
        return found
    short = found[0].diff() < choice.k
    return _completed(x, layer, choice, precision, short, *found) if bool(short.any()) else found


def _completed(
    x: Tensor, layer: Layer, choice: Choice, precision: str, short: Tensor, indptr: Tensor, indices: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, where of the rows [B] that are ``short``, with fewer than k positive pre-activations, all are looked at."""
    rows = x[short]
    members, us = [], []
    for first, last in crossovers.chunks(rows.shape[0], layer.W.shape[0]):
        block = rows[first:last]
        if precision in ("exact", "bf16"):
            of_block = x.new_empty(block.shape[0], layer.W.shape[0])
            _C.dot_block(
                x=block, rows=block.shape[0], W=layer.W, features=layer.W.shape[0], d=layer.W.shape[1], out=of_block
            )
        else:
            of_block = block @ layer.W.T
        member = choice.of(of_block + layer.bias)
        members.append(member.nonzero()[:, 1].int())
        us.append(of_block[member])
    counts = torch.where(short, int(choice.k), indptr.diff())
    of_short, kept = torch.repeat_interleave(short, counts), ~torch.repeat_interleave(short, indptr.diff())
    done = indices.new_empty(int(counts.sum())), u.new_empty(int(counts.sum()))
    for out, old, new in zip(done, (indices, u), (members, us), strict=True):
        out[~of_short], out[of_short] = old[kept], torch.cat(new)
    return torch.cat([indptr[:1], counts.cumsum(0)]), *done


def _largest(
    x: Tensor, layer: Layer, choice: Choice, precision: str, guess: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    k = ceil(choice.k)
    way = cpu.route(precision, x.shape[0], layer.shadow)
    if way in ("screen", "bound") and k > DENSE_ABOVE * layer.W.shape[0]:
        way = "dots"
    layer = cpu.for_all_blocks(way, x, layer)._replace(cut=None)
    if way not in ("screen", "bound", "dots"):  # what a guess missed is found by dots, which do not decide there
        guess = None
    bound = Bound(layer.W, layer.bias, None, layer.shadow) if way == "bound" else None
    budget = choice.of_batch(x.shape[0]) if choice.whole else -1
    room, signs = max(4 * k, ROOM), choice.support == "topk_abs"
    largest = _C.Largest(rows=x.shape[0], k=k, budget=budget, signs=signs, room=room, lift=RAISE)
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
        return _largest(x, layer, choice, precision, None)
    indptr = torch.empty(x.shape[0] + 1, dtype=torch.int64)
    indices, u = torch.empty(nnz, dtype=torch.int32), x.new_empty(nnz)
    largest.finish(indptr=indptr, indices=indices, u=u, threads=threads())
    return indptr, indices, u
