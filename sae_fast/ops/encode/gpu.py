"""encode on a GPU: the rows' blocks one after another, each by the way that its candidates ask for.

screen    float16 product with a proven bound, its candidates decided by float32 dots (precision "exact"; with "bf16" the
          product alone decides)
product   torch's product decides, row chunk by row chunk: precision "fp32" and "tf32", and blocks so dense that gathering
          rows of W for each candidate would take longer
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Layer, Shadow
from sae_fast.ops import crossovers
from sae_fast.ops.encode import dense

WIDEST = 2**15  # columns for which the float32 sums of squares are as exact as the bound assumes
MASK = 2**31  # entries of a block of rows: a bit each, 256 MiB


def rejects(x: Tensor) -> str | None:
    if x.shape[1] > WIDEST:
        return f"rows of {x.shape[1]} are wider than {WIDEST}, up to which the bound is proven"
    return None


def screened_code(x: Tensor, layer: Layer, precision: str) -> dense.Found:
    """The code of x [B, d], whose support is by threshold."""
    from sae_fast.kernels.compact import pack
    from sae_fast.kernels.encode import candidates, members
    from sae_fast.kernels.round import rounded

    if precision in ("fp32", "tf32") or x.shape[0] == 0:
        with _tf32(precision == "tf32"):
            return dense.dense_code(x, layer, chunked=True)
    exact, W = precision == "exact", layer.W
    layer = layer._replace(shadow=layer.shadow or Shadow(*rounded(W)))
    parts, step = [], max(1, MASK // W.shape[0])
    for first in range(0, x.shape[0], step):
        rows = x[first : first + step]
        screened = candidates(rows, layer, exact)
        total = int(screened.end[-1])
        if crossovers.gpu_rejects(total, rows.shape[0], W.shape[0]):
            with _tf32(False):
                parts.append(dense.dense_code(rows, layer, chunked=True))
            continue
        flag = torch.zeros((), dtype=torch.int32, device=x.device)
        parts.append(pack(*members(rows, layer, screened, total, flag, exact)))
    return dense.join(parts)


@contextmanager
def _tf32(allowed: bool):
    """True if CUDA's products of float32 may round their operands."""
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
