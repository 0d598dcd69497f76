"""fired: features that fire in a batch have not been silent."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._launch import cdiv, launch


@triton.jit
def _fired(indices_ptr, magnitudes_ptr, since_ptr, entries, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fires = tl.load(magnitudes_ptr + at, mask=at < entries, other=0.0) > 0
    feature = tl.load(indices_ptr + at, mask=fires, other=0)
    tl.store(since_ptr + feature, tl.zeros((BLOCK,), tl.int64), mask=fires)


def fired(indices: Tensor, magnitudes: Tensor, since: Tensor) -> None:
    """since [F] int64 = 0 where an entry has a magnitude [C] above 0."""
    entries = indices.shape[0]
    launch(_fired, (cdiv(entries, 1024),), indices, magnitudes, since, entries, BLOCK=1024, num_warps=4)
