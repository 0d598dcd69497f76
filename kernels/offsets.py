"""offsets: one program goes over all features: where their entries begin, and where the runs of long ones do."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._launch import launch


@triton.jit
def _offsets(colptr_ptr, first_ptr, owner_ptr, features, M, RUN: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    entries, runs = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for f in range(0, features, BLOCK):
        f += tl.arange(0, BLOCK)
        inside = f < features
        count = tl.load(colptr_ptr + 1 + f, mask=inside, other=0)
        if COUNTS:
            tl.store(colptr_ptr + 1 + f, entries + tl.cumsum(count, 0), mask=inside)
            entries += tl.sum(count, axis=0)
        else:
            count -= tl.load(colptr_ptr + f, mask=inside, other=0)
        if first_ptr is not None:
            own = tl.where(count > RUN, (count + (RUN - 1)) // RUN, 0)
            to = runs + tl.cumsum(own, 0) - own
            tl.store(first_ptr + f, to, mask=inside)
            for k in range(tl.max(own, axis=0)):
                tl.store(owner_ptr + to + k, f.to(tl.int64), mask=k < own)
            runs += tl.sum(own, axis=0)
    if COUNTS:
        tl.store(colptr_ptr, tl.full((), 0, tl.int64))
    if first_ptr is not None:
        tl.store(first_ptr + features, runs)
        for p in range(runs, M, BLOCK):
            at = p + tl.arange(0, BLOCK)
            tl.store(owner_ptr + at, tl.zeros((BLOCK,), tl.int64) + features, mask=at < M)


def offsets(
    colptr: Tensor, first: Tensor | None = None, owner: Tensor | None = None, run: int = 1, counts: bool = False
) -> None:
    """The runs of up to ``run`` entries of features that have colptr[i] .. colptr[i + 1], colptr [F + 1] int64: outer's
    first [F + 1] and owner [M], if they are given.  ``counts``: colptr[1:] holds how many each has, and becomes offsets."""
    M = 0 if owner is None else owner.shape[0]
    launch(_offsets, (1,), colptr, first, owner, colptr.shape[0] - 1, M, RUN=run, COUNTS=counts, BLOCK=2048, num_warps=8)
