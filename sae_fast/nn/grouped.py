"""GroupedSAE: what TopK and BatchTopK SAEs share: k, and Matryoshka groups (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast import ops
from sae_fast.code import SparseCode
from sae_fast.nn.base import SparseAutoencoder
from sae_fast.ops._dispatch import without_autocast


class GroupedSAE(SparseAutoencoder):
    """An SAE that keeps about k features an example, for inference.  Parameters W_enc [F, d], b_enc [F], W_dec [F, d] (unit
    rows at the start), b_dec [d].

    ``group_sizes`` cuts the features into runs, one after the other, of which any first few are an SAE of their own.
    """

    activation = "relu"
    per_feature = ("b_enc",)
    b_enc: nn.Parameter

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = None,
        precision: str = "exact",
        apply_b_dec_to_input: bool = True,
        group_sizes: Sequence[int] | None = None,
    ):
        """``k`` features an example, 1 ≤ k ≤ d_sae; ``group_sizes`` are positive and add up to d_sae.  The rest as in
        SparseAutoencoder."""
        super().__init__(d_in, d_sae, dtype, device, seed, precision, apply_b_dec_to_input)
        if not _is_int(k) or not 1 <= k <= d_sae:
            raise ValueError(f"k: got {k!r}, want an int with 1 ≤ k ≤ d_sae = {d_sae}")
        if group_sizes is not None and (
            not group_sizes or not all(_is_int(n) and n > 0 for n in group_sizes) or sum(group_sizes) != d_sae
        ):
            raise ValueError(f"group_sizes: got {group_sizes!r}, want positive ints whose sum is d_sae = {d_sae}")
        self.k = k
        self.group_sizes = None if group_sizes is None else tuple(group_sizes)
        self._bounds = [0, *accumulate(self.group_sizes or (d_sae,))]
        self._active = len(self._bounds) - 1

    def options(self) -> dict[str, Any]:
        groups = {} if self.group_sizes is None else {"group_sizes": list(self.group_sizes)}
        return {**super().options(), "k": self.k, **groups}

    @property
    def active_groups(self) -> int:
        """Of G groups, by default all.  The features of the others are off: they take part in the selection, and are then
        set to 0 (as in dictionary_learning), so that an example may have fewer than k."""
        return self._active

    @active_groups.setter
    def active_groups(self, value: int) -> None:
        groups = len(self._bounds) - 1
        if not _is_int(value) or not 1 <= value <= groups:
            raise ValueError(f"active_groups: got {value!r}, want an int from 1 to the number of groups, {groups}")
        self._active = value

    def decode_prefixes(self, f: Tensor | SparseCode) -> Tensor:
        """[G, ..., d_in]: x̂ from the first 1 .. G groups of a dense f [..., F] or a SparseCode; G = 1 without groups."""
        self.settle()
        bounds, b_dec = self._bounds, self.b_dec
        self.check_code(f)
        if isinstance(f, SparseCode):
            parts = ops.decode(f, self.W_dec, groups=bounds).reshape(-1, *f.shape[:-1], self.d_in)
        else:
            f = f.to(self.W_dec.dtype)
            with without_autocast():
                parts = torch.stack([f[..., a:b] @ self.W_dec[a:b] for a, b in pairwise(bounds)])
        return parts.cumsum(0) + b_dec

    def _code(self, x_c: Tensor, shadow: ops.Shadow | None = None, **choice: Any) -> SparseCode:
        code = super()._code(x_c, shadow, **choice)
        if self._active == len(self._bounds) - 1:
            return code
        return code.with_values(torch.where(code.indices < self._bounds[self._active], code.values, 0))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
