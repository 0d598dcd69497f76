"""Rows for the CUDA kernels of verify."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import randn
from torch import Tensor

from problems.triton_encode import moved, on
from sae_fast.code import Layer, Shadow, SparseCode
from sae_fast.kernels import compact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF, GUARD = float("nan"), float("inf"), -7


@dataclass
class Verified:
    begin: Tensor
    end: Tensor
    indices: Tensor
    u: Tensor
    values: Tensor

    def code(self, features: int) -> SparseCode:
        """Packed, on the CPU; garbage in a gap must be as it was."""
        inside = torch.zeros(self.indices.shape[0], dtype=torch.bool)
        for first, last in zip(self.begin.tolist(), self.end.tolist(), strict=True):
            inside[first:last] = True
        for tensor in (self.indices, self.u, *self.values):
            assert bool((tensor[~inside] == GUARD).all()), "written into a gap"
        counts = self.end - self.begin
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return SparseCode(
            torch.Size((len(counts), features)), indptr, self.indices[inside], self.u[inside], self.values[:, inside]
        )


def verified(kwargs: dict, listed: Tensor, *, norms: tuple | None = None, gap: int = 3, lost: int = 0) -> Verified:
    """Candidates listed [B, F], in buffers with gaps between the rows; the vectors' dtype is that of the outputs."""
    k, B, kind, counts = moved(kwargs), len(listed), kwargs["activation"], listed.sum(1)
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), (counts + gap).cumsum(0)[:-1]]) + gap
    end, C = begin + counts, int(counts.sum()) + gap * (B + 1) - lost
    candidates = torch.full((C + lost,), 2**30, dtype=torch.int32)
    for b in range(B):
        candidates[begin[b] : end[b]] = listed[b].nonzero()[:, 0].int()
    layer = Layer.of(k["W_enc"], k["bias"], kind, k, k.get("slack", 0.0))
    indices, end_out = torch.full((C,), GUARD, dtype=torch.int32, device=DEVICE), torch.full_like(end, GUARD, device=DEVICE)
    u, values = (torch.full((n, C), GUARD, dtype=k["bias"].dtype, device=DEVICE) for n in (1, 2 if kind == "gated" else 1))
    if norms is not None:
        layer, norms = layer._replace(shadow=Shadow(k["W_enc"], norms[1])), norms[0]
    code = compact.Gapped(on(begin), end_out, indices, u[0], values)
    compact.verify(k["x"], layer, on(end), on(candidates[:C]), code, norms)
    return Verified(begin, *(t.cpu() for t in (end_out, indices, u[0], values)))


def rows_like(B: int, F: int, seed: int = 0) -> Tensor:
    """[B, F]: candidates of every number: none in row 1, all in row 2, else some."""
    listed = torch.rand(B, F, generator=torch.Generator().manual_seed(seed)) < 0.2
    listed[1], listed[2] = False, True
    return listed


def problem(d: int, activation: str, dtype: torch.dtype, B: int = 5, F: int = 150) -> dict:
    """Random rows, stored as dtype."""
    kwargs = dict(x=randn(B, d), W_enc=randn(F, d, seed=1) / d**0.5, bias=randn(F, seed=2) - 0.3, activation=activation)
    if activation == "gated":
        kwargs |= dict(r_mag=0.2 * randn(F, seed=3), b_mag=randn(F, seed=4))
    if activation == "jumprelu":
        kwargs["threshold"] = randn(F, seed=5)
    return {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
