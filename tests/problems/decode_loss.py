"""Codes and targets for decode_loss, and the losses in plain PyTorch."""

from __future__ import annotations

import torch
from helpers import Judge, at_entries, decoded, randn, random_code

PREFIXES = {  # by the kind: the ends of F features' prefixes
    "none": lambda F: None,
    "all": lambda F: [F],
    "fractions": lambda F: sorted({max(1, F // n) for n in (32, 16, 8, 4, 1)}),
    "single features": lambda F: sorted({1, max(1, F // 2), max(1, F - 1), F}),
    "each": lambda F: list(range(1, F + 1)),
}


def plain(code, normaliser: float, prefixes=None, prefix_weights=None, zeros: bool = False):
    """The contract of decode_loss with dense matrices: (losses, residual, residual_aux, grads)."""
    ends = prefixes or [code.d_sae]
    group = torch.bucketize(code.indices, torch.tensor(ends[:-1]), right=True)

    def formula(values, W_dec, b_dec, target, weight):
        c = torch.ones(len(ends)) if prefix_weights is None else prefix_weights
        c = c.to(values.dtype)[:, None, None]
        sums = [decoded(code, values * (code.indices < end), W_dec) for end in ends]
        residuals = torch.stack(sums, dim=1) + b_dec - target
        squares = (c * residuals.pow(2)).sum((1, 2, 3))
        reaching = (c * residuals).flip(1).cumsum(1).flip(1)
        dots = at_entries(code, 2 * reaching @ W_dec.T)[:, group, torch.arange(code.nnz)]
        weight, on = weight[code.indices.long()], values > 0
        penalty = torch.zeros_like(values)
        penalty[-1] = weight * on[-1]
        grads = (dots + penalty) / normaliser * (on | zeros)
        gated = values.shape[0] == 2
        auxiliary = squares[1] if gated else torch.zeros_like(squares[0])
        losses = torch.stack([squares[0], (values[-1] * weight).sum(), auxiliary]) / normaliser
        outer = reaching[:, 0] if prefixes is None else reaching
        return losses, outer[0], outer[1] if gated else outer[0, :0], grads

    return formula


def inputs(B: int, d: int, F: int, V: int, seed: int = 0) -> tuple:
    """code, W_dec, b_dec, target, sparsity_weight."""
    weight = randn(F, seed=seed + 3).abs()
    W_dec, b_dec, target = randn(F, d, seed=seed), randn(d, seed=seed + 1), randn(B, d, seed=seed + 2)
    return random_code(B, F, V, seed=seed), W_dec, b_dec, target, weight


def judge_one(judge: Judge, out, torchs, exact) -> None:
    """Adds each output, and each of the losses by itself."""
    for name, *results in zip(("losses", "residual", "residual_aux", "grads"), out, torchs, exact, strict=True):
        if name != "losses":
            judge.add(name, *results)
            continue
        for k, term in enumerate(("reconstruction", "sparsity", "auxiliary")):
            judge.add(term, *(losses[k] for losses in results))
