"""sampled_dots, in verification too: a program takes one slice of columns of one example and its dots with the same slice
of the rows of its features; then the slices are summed, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.decode import gather


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
def sum_over_slices(ptr, stride, slices, mask):
    """In float64: they are few, and one chain of float32 sums would round more than a product's many."""
    total = tl.zeros(mask.shape, tl.float64)
    for _ in range(slices):
        total += tl.load(ptr, mask=mask, other=0.0).to(tl.float64)
        ptr += stride
    return total.to(tl.float32)


@triton.jit
def _partial_dots(
    begin_ptr, end_ptr, indices_ptr, A_ptr, W_ptr, out_ptr, d, capacity, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
):
    # Slices are the slow axis of the grid: while one is worked on, its part of W stays in the L2 cache.
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    if end > capacity:
        end = begin
    a = tl.load(A_ptr + b * d + columns, mask=columns < d, other=0.0).to(tl.float32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        W = gather(indices_ptr, W_ptr, at, end, columns, d)
        tl.store(out_ptr + s * capacity + at, row_sums(W * a[None, :], ENTRIES, COLUMNS), mask=at < end)


@triton.jit
def _sum_dots(begin_ptr, end_ptr, partials_ptr, out_ptr, slices, capacity, ENTRIES: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    if end > capacity:
        end = begin
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        tl.store(out_ptr + at, sum_over_slices(partials_ptr + at, capacity, slices, at < end), mask=at < end)


def partial_dots(begin: Tensor, end: Tensor, indices: Tensor, A: Tensor, W: Tensor) -> Tensor:
    """[slices, C] float32: of the entries j of every row b of A [B, d], the parts of A[b] · W[indices[j]] by slices of
    columns.  A row that would end past C has none."""
    c, (rows, d), capacity = config("sampled_dots"), A.shape, indices.shape[0]
    slices = cdiv(d, c["columns"])
    partials = torch.empty(slices, capacity, dtype=torch.float32, device=A.device)
    launch(
        _partial_dots, (rows, slices), begin, end, indices, A, W, partials, d, capacity,
        ENTRIES=c["entries"], COLUMNS=c["columns"],
        num_warps=max(1, c["columns"] // 256),  # a dot within a warp: no barrier
    )  # fmt: skip
    return partials


def sampled_dots(begin: Tensor, end: Tensor, indices: Tensor, A: Tensor, W: Tensor, out: Tensor) -> None:
    """out[j] = A[b] · W[indices[j]] for the entries j of every row b of A [B, d]; out [C]."""
    partials = partial_dots(begin, end, indices, A, W)
    launch(
        _sum_dots, (A.shape[0],), begin, end, partials, out, *partials.shape,
        ENTRIES=config("sampled_dots")["finish"], num_warps=1,
    )  # fmt: skip
