"""Codes with gaps and room to spare, where a GPU's kernels run."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import SparseCode, Transposed
from sae_fast.kernels import transpose as transpose_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in tensors)


class Gapped:
    """The entries of a code in buffers that are longer than it and have gaps between rows."""

    def __init__(self, code: SparseCode, dtype: torch.dtype):
        self.code = code
        gaps = torch.arange(1, code.batch + 2) % 4
        rows = torch.repeat_interleave(torch.arange(code.batch), code.indptr.diff())
        self.at = torch.arange(code.nnz) + gaps.cumsum(0)[rows]
        self.capacity = code.nnz + int(gaps.sum()) + 40
        begin = code.indptr[:-1] + gaps.cumsum(0)[:-1]
        self.indices = torch.full((self.capacity,), 2**30, dtype=torch.int32)  # no row of any W
        self.indices[self.at] = code.indices
        self.begin, self.end, self.indices = on_device(begin, begin + code.indptr.diff(), self.indices)
        self.values = self.spread(code.values.to(dtype))

    def spread(self, t: Tensor) -> Tensor:
        """[..., nnz] in a buffer [..., C] otherwise full of NaN."""
        out = torch.full((*t.shape[:-1], self.capacity), float("nan"), dtype=t.dtype)
        out[..., self.at] = t
        return out.to(DEVICE)

    def blank(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A buffer [..., C] that a kernel is to write at the entries only."""
        return torch.full((*shape, self.capacity), -7.0, dtype=dtype, device=DEVICE)

    def packed(self, t: Tensor) -> Tensor:
        """The entries of a buffer that was blank; what is between them must be as it was."""
        t = t.cpu()
        between = torch.ones(self.capacity, dtype=torch.bool)
        between[self.at] = False
        assert bool((t[..., between] == -7).all()), "written between rows"
        return t[..., self.at]

    def transposed(self) -> Transposed:
        """By feature, in as much room, where nothing is written past the entries."""
        csc = Transposed(*on_device(
            torch.empty(self.code.d_sae + 1, dtype=torch.int64), torch.full((self.capacity,), -7, dtype=torch.int32),
            torch.full((self.capacity,), -7),
        ))  # fmt: skip
        transpose_kernels.transpose(self.begin, self.end, self.indices, csc)
        assert bool((csc.rows[self.code.nnz :] == -7).all() and (csc.perm[self.code.nnz :] == -7).all())
        return csc
