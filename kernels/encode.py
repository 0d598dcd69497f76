"""encode: rounding, screening, compaction and verification in order, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import activations
from sae_fast.code import Layer
from sae_fast.kernels import compact
from sae_fast.kernels._mask import words
from sae_fast.kernels.compact import Counted, Gapped
from sae_fast.kernels.largest import Largest, largest
from sae_fast.kernels.round import bound_terms, norm_columns, padded, round_rows
from sae_fast.kernels.screen import screen


class Screened(NamedTuple):
    """mask [B, words] and how many bits are set in it; begin and end [B], which :func:`members` fills: row b's candidates
    take begin[b] .. end[b]; x's 16-bit copy and its norms."""

    mask: Tensor
    counted: Counted
    begin: Tensor
    end: Tensor
    x: Tensor
    norms: Tensor

    def total(self) -> int:
        """The number of candidates.  Waits for the device."""
        return int(self.counted.runs.sum())


def candidates(
    x: Tensor, layer: Layer, exact: bool, shift: Tensor | None = None, centred: Tensor | None = None,
    flag: Tensor | None = None, floor: Tensor | None = None,
) -> Screened:  # fmt: skip
    """The screen of rows x [B, d], or of x − shift [d], which goes to ``centred``; without the bound if not ``exact``.
    ``floor`` [B] float32: no entry whose π reaches its row's is missed, of u as :func:`members` will give it; a floor that
    is not above 0 leaves all above 0."""
    (B, d), features, device, shadow = x.shape, layer.W.shape[0], x.device, layer.shadow
    assert shadow is not None
    K = padded(d)
    x16 = torch.empty(B, K, dtype=torch.float16, device=device)
    norms = torch.empty(B, norm_columns(d), dtype=torch.float32, device=device)
    round_rows(x, x16, norms, shift, centred, flag)
    terms = bound_terms(norms, shadow.norms, layer.bias, layer.cut, K, exact or floor is not None, exact, floor)
    mask = torch.empty(B, words(features), dtype=torch.int32, device=device)
    screen(x16, shadow.rows, *terms, mask)
    counted = compact.count(mask, features)
    return Screened(mask, counted, *(torch.empty_like(counted.rows) for _ in range(2)), x16, norms)


def members(
    x: Tensor, layer: Layer, screened: Screened, capacity: int, flag: Tensor, exact: bool, which: Largest | None = None
) -> Gapped:  # fmt: skip
    """The code of centred rows x [B, d]; with ``which`` of the largest members alone.  Rows whose candidates do not fit set
    OVERFLOW in ``flag`` and stay empty; rows whose floor hid some of the largest set SHORT and stay empty."""
    device, dtype, kind = x.device, x.dtype, layer.activation
    of_members = layer
    if which is not None:  # π itself is what the choice is made by
        dtype, kind = torch.float32, activations.named("relu")
        of_members = layer._replace(activation=kind, vectors=(), cut=None)
    found, indices = (torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(2))
    u, values = (torch.empty(*shape, capacity, dtype=dtype, device=device) for shape in ((), (kind.value_sets,)))
    compact.compact(screened.mask, layer.W.shape[0], *screened[1:4], found, values, flag)
    code = Gapped(screened.begin, torch.empty_like(screened.end), indices, u, values)
    if exact:
        compact.verify(x, of_members, screened.end, found, code)
    else:
        compact.verify(screened.x, of_members, screened.end, found, code, screened.norms)
    return code if which is None else largest(code, layer, which, flag)
