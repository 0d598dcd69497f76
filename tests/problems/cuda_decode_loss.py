"""Codes for the CUDA kernels of decode_loss."""

from __future__ import annotations

import torch
from helpers import code_of
from torch import Tensor

from problems.decode_loss import inputs
from problems.triton_rows import Gapped, code_to, run_gapped

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
B, D, F = 5, 129, 200  # an empty row, and one with all features: three stagings of 96; a slice with a single column
# Storage of the weights and of the target.
STORAGE = [(t, t) for t in DTYPES] + [(torch.float32, x) for x in DTYPES[1:]]


def problem(V: int, seed: int = 0, storage=STORAGE[0], shape=(B, D, F)):
    """code, and W, b_dec, target, weight, in their storage.  Of the code's rows one is empty and one has all features."""
    rows, d, features = shape
    _, W, b_dec, target, weight = inputs(rows, d, features, V, seed)
    g = torch.Generator().manual_seed(seed)
    member = torch.rand(rows, features, generator=g) < 0.05
    member[:1, 0], member[1:2], member[2:3] = True, False, True
    kind, kind_of_target = storage
    code = code_to(code_of(member, V, g), kind, "cpu")
    return code, [W.to(kind), b_dec.to(kind), target.to(kind_of_target), weight.to(kind)]


def run(code, arguments: list[Tensor], normaliser: float = 1.7, **step):
    """(residuals, losses_rows, grads, and a step's) of the kernels, in buffers with gaps, which stay as they are."""
    return run_gapped(Gapped(code, arguments[0].dtype), *arguments, normaliser, **step)
