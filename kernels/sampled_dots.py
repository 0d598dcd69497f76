"""sampled_dots: a program takes the dots of one example with the rows of its features, and the loop that verifies too."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._config import config
from sae_fast.kernels._launch import launch


@triton.jit
def row_sums(tile, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """[ENTRIES]: the sums of a tile's rows by a tree of pairs, so that they do not hang on the layout that the compiler
    chooses, which follows the pointers' alignment.  Eight neighbours first, which may share a thread; lanes come last."""
    for k in tl.static_range(16):
        if COLUMNS >> k > 1:
            if k < 3:
                tile = tl.sum(tl.reshape(tile, (ENTRIES, COLUMNS >> (k + 1), 2)), axis=2)
            else:
                tile = tl.sum(tl.reshape(tile, (ENTRIES, 2, COLUMNS >> (k + 1))), axis=1)
    return tl.reshape(tile, (ENTRIES,))


@triton.jit
def gathered_dots(x_ptr, W_ptr, feature, chosen, d, stride_w, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """[ENTRIES] in float32: x [d] · W[feature] where chosen, else 0."""
    rows = W_ptr + feature.to(tl.int64)[:, None] * stride_w
    total = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    for k in range(0, d, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        inside = columns < d
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        W = tl.load(rows + columns[None, :], mask=chosen[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += x[None, :] * W
    return row_sums(total, ENTRIES, COLUMNS)


@triton.jit
def _sampled_dots(begin_ptr, end_ptr, indices_ptr, A_ptr, W_ptr, out_ptr, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        chosen = at < end
        feature = tl.load(indices_ptr + at, mask=chosen, other=0)
        tl.store(out_ptr + at, gathered_dots(A_ptr + b * d, W_ptr, feature, chosen, d, d, ENTRIES, COLUMNS), mask=chosen)


def sampled_dots(begin: Tensor, end: Tensor, indices: Tensor, A: Tensor, W: Tensor, out: Tensor) -> None:
    """out[j] = A[b] · W[indices[j]] for the entries j of every row b of A [B, d]; out [C]."""
    c = config("sampled_dots")
    rows, d = A.shape
    launch(
        _sampled_dots, (rows,), begin, end, indices, A, W, out, d,
        ENTRIES=c["entries"], COLUMNS=c["columns"], num_warps=c["warps"],
    )  # fmt: skip
