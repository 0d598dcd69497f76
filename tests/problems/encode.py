"""Layers and rows for encode, and its codes in plain PyTorch."""

from __future__ import annotations

import torch
from helpers import Judge, assert_is_code, dense, grid

from sae_fast import reference

ACTIVATIONS = ["gated", "relu", "jumprelu"]


def arguments(p, activation: str) -> dict:
    """The arguments of encode for a Problem; the threshold of its JumpReLU form serves jumprelu."""
    if activation == "gated":
        return dict(x=p.x_c, W_enc=p.W_enc, bias=p.b_gate, r_mag=p.r_mag, b_mag=p.b_mag, activation="gated")
    if activation == "relu":
        return dict(x=p.x_c, W_enc=p.W_enc, bias=p.b_gate, activation="relu")
    W_enc, b_enc, threshold = reference.gated_to_jumprelu(p.W_enc, p.b_gate, p.b_mag, p.r_mag)
    return dict(x=p.x_c, W_enc=W_enc, bias=b_enc, threshold=threshold, activation="jumprelu")


def plain(x, W_enc, bias, activation, r_mag=None, b_mag=None, threshold=None, slack=0.0):
    """(member, u, values), dense, from the formulas in encode's contract."""
    u = x @ W_enc.T
    pi = u + bias
    cut = threshold.clamp(min=0) if activation == "jumprelu" else torch.zeros_like(bias)
    if activation == "gated":
        values = [(pi > 0) * torch.relu(torch.exp(r_mag) * u + b_mag), torch.relu(pi)]
    elif activation == "relu":
        values = [torch.relu(pi)]
    else:
        values = [(pi > threshold) * torch.relu(pi)]
    return pi > cut - slack, u, torch.stack(values)


def double(kwargs: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def judge(code, kwargs, trials: Judge | None = None) -> None:
    """Support equal to float64's; u and the values on it by the 2× rule, here or over all ``trials``."""
    assert_is_code(code)
    arrays = {k: v for k, v in kwargs.items() if k not in ("support", "k")}
    member, u64, values64 = plain(**double(arrays))
    _, u32, values32 = plain(**arrays)
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member), "the support is not float64's"
    every = trials or Judge()
    every.add("u", dense(code, code.u), u32 * member, u64 * member)
    every.add("values", dense(code, code.values), values32 * member, values64 * member)
    if trials is None:
        every.verdict()


def exact_problem(B: int, d: int, F: int, activation: str, seed: int = 0) -> dict:
    """A problem on a grid, whose pre-activations float32 computes exactly, with ties at exactly 0 in every feature."""
    x, W_enc = grid(B, d, step=0.25, reach=4, seed=seed), grid(F, d, step=0.5, reach=2, seed=seed + 1)
    u = x @ W_enc.T
    g = torch.Generator().manual_seed(seed + 2)

    def ties() -> torch.Tensor:  # minus one of the feature's own pre-activations
        return -u.gather(0, torch.randint(B, (1, F), generator=g))[0] if B else torch.zeros(F)

    kwargs = dict(x=x, W_enc=W_enc, bias=ties(), activation=activation)
    if activation == "gated":
        kwargs |= dict(r_mag=torch.zeros(F), b_mag=ties())
    if activation == "jumprelu":
        kwargs["threshold"] = ties() + kwargs["bias"]
        kwargs["threshold"] *= -1  # θ = u_b − u_b': positive and negative
    return kwargs


def assert_exact(code, kwargs) -> None:
    """Equal to float64, to the last bit of u and of every value."""
    assert_is_code(code)
    member, u, values = plain(**double(kwargs))
    assert torch.equal(dense(code, torch.ones(code.nnz)) > 0, member), "the support is not float64's"
    assert torch.equal(dense(code, code.u).double(), u * member)
    assert torch.equal(dense(code, code.values).double(), values * member)
