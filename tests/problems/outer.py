"""Codes with a long feature, sources of a gradient by feature, and the gradient in plain PyTorch."""

from __future__ import annotations

from functools import cache

import torch
from helpers import code_of, dense, randn

from problems.bodies import Body
from sae_fast import ops, use_backend
from sae_fast.code import SparseCode, Transposed

WIDTHS = [1, 3, 4, 63, 100, 128, 512, 769, 2304]  # that CUDA's kernels walk in other ways


@cache
def long_code(B: int, F: int, S: int = 1, seed: int = 0) -> SparseCode:
    """Feature 0 fires in every row but two, which have no entries; feature 3 and the last, of more than four, never do."""
    g = torch.Generator().manual_seed(1000 * seed + B + 17 * F)
    member = torch.rand(B, F, generator=g) < (0.12 if F < 100 else 0.02)
    member[2:3] = member[:, 0] = True
    if F > 4:
        member[:, [3, F - 1]] = False
    if B > 2:
        member[[1, B - 1]] = False
    return code_of(member, S, g)


def shapes(body: Body, S: int = 1) -> list[tuple[int, int, int]]:
    """(B, d, F) that a contract of S sources is held to: of runs of five entries feature 0 has eight, the last ragged."""
    if not body.of_gpu or body.route == "shipped":
        return body.shapes if S == 1 else body.few_shapes
    if body.backend == "cuda":
        return [(42, d, 21) if d <= 128 else (9, d, 6) for d in WIDTHS]
    return [(42, 20, 21), (42, 1 if S == 1 else 4, 21)]


def size(body: Body, B: int, d: int, F: int) -> tuple[int, int, int]:
    """These, or for a GPU's kernels such that feature 0 has two runs."""
    if body.route == "shipped":
        return body.shapes[-1]
    return (12, 20, 9) if body.of_gpu else (B, d, F)


def sources(B: int, d: int, F: int, S: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple:
    """code, values [S, nnz], A [S, B, d]."""
    code = long_code(B, F, S, seed)
    return code, (code.values - 0.3).to(dtype), randn(S, B, d, seed=seed, dtype=dtype)


def csc_of(code: SparseCode) -> Transposed:
    """Its entries by feature, whatever backend is forced."""
    with use_backend("reference"):
        return ops.transpose(code)


def plain(code: SparseCode):
    """Σ_s f_sᵀ A_s with dense matrices; values [S, nnz] and A [S, B, d]."""
    return lambda values, A: (dense(code, values).mT @ A).sum(0)
