"""Codes and targets for decode_loss, and the losses in plain PyTorch."""

from __future__ import annotations

import torch
from helpers import Judge, at_entries, decoded, randn, random_code


def plain(code, normaliser: float):
    """The contract of decode_loss with dense matrices: (losses, residual, residual_aux, grads)."""

    def formula(values, W_dec, b_dec, target, weight):
        residuals = decoded(code, values, W_dec) + b_dec - target
        squares = residuals.pow(2).sum((1, 2))
        weight = weight[code.indices.long()]
        penalty = torch.zeros_like(values)
        penalty[-1] = weight
        grads = (at_entries(code, 2 * residuals @ W_dec.T) + penalty) / normaliser * (values > 0)
        gated = values.shape[0] == 2
        auxiliary = squares[1] if gated else torch.zeros_like(squares[0])
        losses = torch.stack([squares[0], (values[-1] * weight).sum(), auxiliary]) / normaliser
        return losses, residuals[0], residuals[1] if gated else residuals[0, :0], grads

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
