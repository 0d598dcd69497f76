"""decode: a program sums one slice of columns of one example's decoder rows, for up to two value sets and one group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch


@triton.jit
def gather(indices_ptr, W_ptr, at, end, columns, d):
    """[ENTRIES, COLUMNS] in float32: W's rows at the entries ``at``; 0 from ``end`` on."""
    chosen = at < end
    feature = tl.load(indices_ptr + at, mask=chosen, other=0).to(tl.int64)
    mask = chosen[:, None] & (columns < d)[None, :]
    return tl.load(W_ptr + feature[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def weighted(values_ptr, at, end, W):
    """[COLUMNS]: the sum of the rows of a block W, weighted by the values at its entries."""
    value = tl.load(values_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    return tl.sum(value[:, None] * W, axis=0)


@triton.jit
def _decode(
    begin_ptr, end_ptr, indices_ptr, values_ptr, W_ptr, bounds_ptr, out_ptr, rows, d, stride_v, stride_out,
    V: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Slices are the slow axis of the grid: while one is worked on, its part of W stays in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = tl.program_id(2).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    if bounds_ptr is not None:  # features ascend in a row, so those of a group are a run of it
        first, last = tl.load(bounds_ptr + g), tl.load(bounds_ptr + g + 1)
        below_first, below_last = begin, begin
        for j in range(begin, end, 128):
            at = j + tl.arange(0, 128)
            feature = tl.load(indices_ptr + at, mask=at < end, other=2**31 - 1)
            below_first += tl.sum((feature < first).to(tl.int32), axis=0)
            below_last += tl.sum((feature < last).to(tl.int32), axis=0)
        begin, end = below_first, below_last
    total = tl.zeros((COLUMNS,), tl.float32)
    second = tl.zeros((COLUMNS,), tl.float32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        W = gather(indices_ptr, W_ptr, at, end, columns, d)
        total += weighted(values_ptr, at, end, W)
        if V == 2:
            second += weighted(values_ptr + stride_v, at, end, W)
    out_ptr += (g * rows + b) * d + columns
    tl.store(out_ptr, total, mask=columns < d)
    if V == 2:
        tl.store(out_ptr + stride_out, second, mask=columns < d)


def warps(columns: int, W: Tensor) -> int:
    """As many as read a slice of a row in one go, 16 bytes a lane: then a thread holds its columns of every row, and sums
    over rows stay in registers."""
    return max(1, columns * W.element_size() // 512)


def decode(
    begin: Tensor, end: Tensor, indices: Tensor, values: Tensor, W: Tensor, bounds: Tensor | None, out: Tensor
) -> None:
    """out [V, G, B, d] = sums of values [V, C] · W rows, by the feature ranges of bounds [G + 1] int64, or of all features
    (G = 1).  Pairs of value sets share one read of W."""
    c = config("decode")
    V, groups, rows, d = out.shape
    for v in range(0, V, 2):
        launch(
            _decode, (rows, cdiv(d, c["columns"]), groups), begin, end, indices, values[v:], W, bounds, out[v:], rows, d,
            values.stride(0), out.stride(0), V=min(V - v, 2), ENTRIES=c["entries"], COLUMNS=c["columns"],
            num_warps=warps(c["columns"], W),
        )  # fmt: skip
