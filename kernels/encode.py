"""encode: rounding, screening, compaction and verification in order, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast.kernels import compact
from sae_fast.kernels.round import feature_terms, norm_columns, padded, round_rows, row_terms
from sae_fast.kernels.screen import screen, words

ACTIVATIONS = {"gated": compact.GATED, "relu": compact.RELU, "jumprelu": compact.JUMPRELU}


class Layer(NamedTuple):
    """An encoder.  W [F, d]; the rest [F]; ``scale`` is exp(r_mag), ``cut`` what π has to exceed, None for 0; rows and
    norms are W's Shadow."""

    W: Tensor
    rows: Tensor
    norms: Tensor
    bias: Tensor
    activation: str
    scale: Tensor | None = None
    b_mag: Tensor | None = None
    threshold: Tensor | None = None
    cut: Tensor | None = None


class Screened(NamedTuple):
    """mask [B, words]; row b's candidates are to take begin[b] .. end[b]; x's 16-bit copy and its norms."""

    mask: Tensor
    begin: Tensor
    end: Tensor
    x: Tensor
    norms: Tensor


class Gapped(NamedTuple):
    """A code with gaps: row b owns the entries begin[b] .. end[b] of indices [C], u [C] and values [V, C].  The values in a
    gap are 0."""

    begin: Tensor
    end: Tensor
    indices: Tensor
    u: Tensor
    values: Tensor


def candidates(
    x: Tensor, layer: Layer, exact: bool, shift: Tensor | None = None, centred: Tensor | None = None,
    flag: Tensor | None = None,
) -> Screened:  # fmt: skip
    """The screen of rows x [B, d], or of x − shift [d], which goes to ``centred``; without the bound if not ``exact``."""
    (B, d), features, device = x.shape, layer.W.shape[0], x.device
    K = padded(d)
    x16 = torch.empty(B, K, dtype=torch.float16, device=device)
    norms = torch.empty(B, norm_columns(d), dtype=torch.float32, device=device)
    round_rows(x, x16, norms, shift, centred, flag)
    of_rows, of_features = norms.new_empty(3, B), norms.new_empty(3, features)
    row_terms(norms, K, of_rows)
    feature_terms(layer.norms, layer.bias, layer.cut, K, of_features, margins=exact)
    mask = torch.empty(B, words(features), dtype=torch.int32, device=device)
    screen(x16, layer.rows, of_rows, of_features, mask, margins=exact)
    counts = torch.empty(B, dtype=torch.int64, device=device)
    compact.count(mask, features, counts)
    end = counts.cumsum(0)
    return Screened(mask, end - counts, end, x16, norms)


def members(x: Tensor, layer: Layer, screened: Screened, capacity: int, flag: Tensor, exact: bool) -> Gapped:
    """The code of centred rows x [B, d].  Rows whose candidates do not fit set bit 0 of ``flag`` and stay empty."""
    device = x.device
    found = torch.empty(capacity, dtype=torch.int32, device=device)
    compact.compact(screened.mask, layer.W.shape[0], screened.begin, screened.end, found, flag)
    indices, u = torch.empty_like(found), torch.empty(capacity, dtype=x.dtype, device=device)
    values = torch.zeros(2 if layer.activation == "gated" else 1, capacity, dtype=x.dtype, device=device)
    end = torch.empty_like(screened.end)
    left, right, norms = (x, layer.W, None) if exact else (screened.x, layer.rows, (screened.norms, layer.norms))
    compact.verify(
        left, right, layer.bias, layer.cut, ACTIVATIONS[layer.activation], layer.scale, layer.b_mag, layer.threshold,
        screened.begin, screened.end, found, indices, u, values, end, norms,
    )  # fmt: skip
    return Gapped(screened.begin, end, indices, u, values)
