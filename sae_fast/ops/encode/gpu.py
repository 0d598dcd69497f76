"""encode on a GPU: the rows' blocks one after another, each by the way that its candidates ask for.

screen    float16 product with a proven bound, its candidates decided by float32 dots (precision "exact"; with "bf16" the
          product alone decides)
product   torch's product decides, row chunk by row chunk: precision "fp32" and "tf32", and blocks so dense that gathering
          rows of W for each candidate would take longer
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Shadow
from sae_fast.ops import crossovers

WIDEST = 2**15  # columns for which the float32 sums of squares are as exact as the bound assumes
MASK = 2**31  # entries of a block of rows: a bit each, 256 MiB


def rejects(x: Tensor) -> str | None:
    if x.shape[1] > WIDEST:
        return f"rows of {x.shape[1]} are wider than {WIDEST}, up to which the bound is proven"
    return None


def find(
    tensors: list[Tensor], activation: str, precision: str, shadow: Shadow | None, by_product: Callable
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indptr, indices, u and values of (x, W, bias, scale, b_mag, threshold, cut).  ``by_product`` is encode's dense body,
    which takes the same."""
    from sae_fast.kernels.compact import pack
    from sae_fast.kernels.encode import Layer, candidates, members
    from sae_fast.kernels.round import rounded

    x, W, *vectors = tensors
    bias, scale, b_mag, threshold, cut = vectors

    def product(rows: Tensor):
        parts = [
            by_product(rows[a:b], W, *vectors, activation)
            for a, b in crossovers.chunks(rows.shape[0], W.shape[0], W.device.type)
        ] or [by_product(rows, W, *vectors, activation)]  # no rows
        return join(parts)

    if precision in ("fp32", "tf32") or x.shape[0] == 0:
        with _tf32(precision == "tf32"):
            return product(x)
    exact = precision == "exact"
    layer = Layer(W, *(shadow or Shadow(*rounded(W))), bias, activation, scale, b_mag, threshold, cut)
    parts, step = [], max(1, MASK // W.shape[0])
    for first in range(0, x.shape[0], step):
        rows = x[first : first + step]
        screened = candidates(rows, layer, exact)
        total = int(screened.end[-1])
        if crossovers.gpu_rejects(total, rows.shape[0], W.shape[0]):
            with _tf32(False):
                parts.append(product(rows))
            continue
        flag = torch.zeros((), dtype=torch.int32, device=x.device)
        parts.append(pack(*members(rows, layer, screened, total, flag, exact)))
    return join(parts)


def join(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One code of those of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    indptrs, indices, u, values = zip(*parts, strict=True)
    counts = torch.cat([p.diff() for p in indptrs])
    indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr, torch.cat(indices), torch.cat(u), torch.cat(values, dim=1)


@contextmanager
def _tf32(allowed: bool):
    """Whether CUDA's products of float32 may round their operands."""
    matmul: Any = torch.backends.cuda.matmul
    name, value = "allow_tf32", allowed  # type: tuple[str, str | bool]
    try:
        before = matmul.allow_tf32
    except RuntimeError:  # the program has used the newer name, after which the older one raises
        name, value = "fp32_precision", "tf32" if allowed else "ieee"
        before = matmul.fp32_precision
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)
