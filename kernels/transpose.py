"""transpose: the entries of a code by feature, without a sort.

A bit for each (row, feature) in words of 32 rows: the bits before a row's own say how many entries of the same feature come
before it, so that every entry knows its place and the order is that of the rows.  In CUDA C++ the bits stay on the chip;
counts of 256 rows go to memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import Transposed
from sae_fast.kernels import native
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.compact import popcount
from sae_fast.kernels.offsets import offsets
from sae_fast.kernels.outer import Runs


@triton.jit
def _bit_of(b):
    return tl.full((1,), 1, tl.uint32) << (b % 32).to(tl.uint32)


@triton.jit
def _mark(begin_ptr, end_ptr, indices_ptr, marks_ptr, features, ENTRIES: tl.constexpr):
    b = tl.program_id(0)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    bit = _bit_of(b).to(tl.int32, bitcast=True) + tl.zeros((ENTRIES,), tl.int32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        feature = tl.load(indices_ptr + at, mask=at < end, other=0)
        # Atomic, as 32 rows share a word; which comes first does not matter.
        tl.atomic_or(marks_ptr + (b // 32).to(tl.int64) * features + feature, bit, mask=at < end, sem="relaxed")


@triton.jit
def _scan(marks_ptr, bases_ptr, colptr_ptr, chunks, features, CHUNKS: tl.constexpr, FEATURES: tl.constexpr):
    f = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((FEATURES,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        at = chunk.to(tl.int64)[:, None] * features + f[None, :]
        inside = (chunk < chunks)[:, None] & (f < features)[None, :]
        count = popcount(tl.load(marks_ptr + at, mask=inside, other=0).to(tl.uint32, bitcast=True))
        tl.store(bases_ptr + at, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(colptr_ptr + 1 + f, total.to(tl.int64), mask=f < features)


@triton.jit
def _place(
    begin_ptr, end_ptr, indices_ptr, marks_ptr, bases_ptr, colptr_ptr, rows_ptr, perm_ptr, features, ENTRIES: tl.constexpr
):
    b = tl.program_id(0)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    before = _bit_of(b) - 1
    row = b + tl.zeros((ENTRIES,), tl.int32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        live = at < end
        feature = tl.load(indices_ptr + at, mask=live, other=0)
        word = (b // 32).to(tl.int64) * features + feature
        mark = tl.load(marks_ptr + word, mask=live, other=0).to(tl.uint32, bitcast=True)
        base = tl.load(colptr_ptr + feature, mask=live, other=0) + tl.load(bases_ptr + word, mask=live, other=0)
        to = base + popcount(mark & before)
        tl.store(rows_ptr + to, row, mask=live)
        tl.store(perm_ptr + to, at, mask=live)


def transpose(begin: Tensor, end: Tensor, indices: Tensor, csc: Transposed, split: Runs | None = None) -> None:
    """Fills csc with a code's indices [C], row b's at begin[b] .. end[b]: all of colptr [F + 1], and the first colptr[F] of
    rows and perm [C], which are positions in indices; and the runs of its long features, if memory is given for them."""
    (colptr, rows, perm), c, cuda = csc.parts(), config("transpose"), native.takes("transpose")
    B, features = begin.shape[0], colptr.shape[0] - 1
    first, owner = (None, None) if split is None else split
    run = config("outer")["run"]
    chunks = cdiv(B, native.module.counted_rows if cuda else 32)
    marks = torch.empty(chunks, features, dtype=torch.int32, device=indices.device)  # the CUDA kernel's counts
    if cuda:
        code, sizes = (begin, end, indices, marks, colptr), (B, features, chunks)
        native.call("transpose_count", *code, *sizes)
        offsets(colptr, first, owner, run, counts=True)
        native.call("transpose_place", *code, rows, perm, *sizes)
        return
    bases = torch.empty_like(marks)
    by_row = {"ENTRIES": c["entries"], "num_warps": c["warps"]}
    marks.zero_()
    launch(_mark, (B,), begin, end, indices, marks, features, **by_row)
    launch(
        _scan, (cdiv(features, c["features"]),), marks, bases, colptr, chunks, features,
        CHUNKS=c["chunks"], FEATURES=c["features"], num_warps=c["warps"],
    )  # fmt: skip
    offsets(colptr, first, owner, run, counts=True)
    launch(_place, (B,), begin, end, indices, marks, bases, colptr, rows, perm, features, **by_row)
