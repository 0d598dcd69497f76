"""decode: a program sums one slice of columns of one example's decoder rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch


@triton.jit
def _decode(
    begin_ptr, end_ptr, indices_ptr, values_ptr, W_ptr, bounds_ptr, out_ptr, rows, d, stride_v, groups,
    V: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Slices are the slow axis of the grid: while one is worked on, its part of W stays in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = tl.program_id(2).to(tl.int64)
    inside = columns < d
    first, last = tl.load(bounds_ptr + g), tl.load(bounds_ptr + g + 1)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    for v in tl.static_range(V):
        total = tl.zeros((COLUMNS,), tl.float32)
        for j in range(begin, end, ENTRIES):
            at = j + tl.arange(0, ENTRIES)
            feature = tl.load(indices_ptr + at, mask=at < end, other=-1)
            chosen = (feature >= first) & (feature < last)
            value = tl.load(values_ptr + v * stride_v + at, mask=chosen, other=0.0).to(tl.float32)
            W = tl.load(
                W_ptr + feature.to(tl.int64)[:, None] * d + columns[None, :],
                mask=chosen[:, None] & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            total += tl.sum(value[:, None] * W, axis=0)
        tl.store(out_ptr + ((v * groups + g) * rows + b) * d + columns, total, mask=inside)


def decode(begin: Tensor, end: Tensor, indices: Tensor, values: Tensor, W: Tensor, bounds: Tensor, out: Tensor) -> None:
    """out [V, G, B, d] = sums of values [V, C] · W rows, by the feature ranges of bounds [G + 1] int64."""
    c = config("decode")
    V, groups, rows, d = out.shape
    launch(
        _decode, (rows, cdiv(d, c["columns"]), groups), begin, end, indices, values, W, bounds, out, rows, d,
        values.stride(0), groups, V=V, ENTRIES=c["entries"], COLUMNS=c["columns"], num_warps=c["warps"],
    )  # fmt: skip
