"""The squared norm of a gradient in plain PyTorch."""

from __future__ import annotations

import torch
from helpers import dense, randn

from problems.outer import sources


def problem(B: int, d: int, F: int, S: int = 1, own: bool = False, seed: int = 0):
    """(code, values [S, nnz], A [S, B, d], W [F, d], self_coefficient [F] or None)."""
    return *sources(B, d, F, S, seed), randn(F, d, seed=seed + 1), randn(F, seed=seed + 2) if own else None


def rows_of_gradient(code, values, A, W, own, project: bool, dtype: torch.dtype) -> torch.Tensor:
    """The gradient [F, d] with dense matrices."""
    values, A, W = values.to(dtype), A.to(dtype), W.to(dtype)
    grad = (dense(code, values).mT @ A).sum(0)
    if own is not None:
        grad = grad + own.to(dtype)[:, None] * W
    if project:
        direction = W / W.norm(dim=1, keepdim=True)
        grad = grad - (grad * direction).sum(1, keepdim=True) * direction
    return grad


def plain(*args) -> torch.Tensor:
    return rows_of_gradient(*args).pow(2).sum()


CODE, VALUES, ROWS, W, OWN = problem(9, 5, 33, own=True)
