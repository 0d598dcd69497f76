"""GroupedSAE: what TopK and BatchTopK SAEs share: k, and Matryoshka groups (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast import arguments, ops
from sae_fast.code import SparseCode
from sae_fast.nn.base import SparseAutoencoder
from sae_fast.nn.normalize import Normalize
from sae_fast.objectives import Objective
from sae_fast.ops.dispatch import without_autocast

NEARLY = 0.97  # of what the last batch's entries reached, this one's do


class GroupedSAE(SparseAutoencoder):
    """An SAE that keeps about k features an example.  Parameters W_enc [F, d], b_enc [F], W_dec [F, d] (unit
    rows at the start), b_dec [d].

    ``group_sizes`` cuts the features into runs, one after the other, of which any first few are an SAE of their own.
    """

    activation, of_largest = "relu", True
    per_feature = ("b_enc",)
    _in_training: Mapping[str, Any] = MappingProxyType({})  # what _encoder is given then
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
        apply_b_dec_to_input: bool | None = None,
        group_sizes: Sequence[int] | None = None,
        active_groups: int | None = None,
        d_out: int | None = None,
        skip: bool = False,
        normalize: Normalize | Mapping[str, Any] | None = None,
    ):
        """``k`` features an example, 1 ≤ k ≤ d_sae; ``group_sizes`` are positive and add up to d_sae, of which the first
        ``active_groups`` are on.  The rest as in SparseAutoencoder."""
        super().__init__(d_in, d_sae, dtype, device, seed, precision, apply_b_dec_to_input, d_out, skip, normalize)
        self.k = self._checked_k(k)
        self.group_sizes = None if group_sizes is None else arguments.sizes("group_sizes", group_sizes, self.d_sae)
        self._reach = 0.0  # see _train_code
        self._bounds = [0, *accumulate(self.group_sizes or (self.d_sae,))]
        self.active_groups = len(self._bounds) - 1 if active_groups is None else active_groups

    def _checked_k(self, k: Any) -> Any:
        return arguments.whole("k", k, 1, self.d_sae, f"an int with 1 ≤ k ≤ d_sae = {self.d_sae}")

    def options(self) -> dict[str, Any]:
        groups: dict[str, Any] = {} if self.group_sizes is None else {"group_sizes": list(self.group_sizes)}
        if not self.all_active:
            groups["active_groups"] = self.active_groups
        return {**super().options(), "k": self.k, **groups}

    def check_objective(self, objective: Objective) -> None:
        super().check_objective(objective)
        prefixes = objective.prefixes
        if prefixes is None or self.group_sizes is None:
            return
        sizes = None if prefixes.random else prefixes.sizes(self.d_sae)
        if sizes == self.group_sizes and not self.all_active:
            groups = len(self.group_sizes)
            raise ValueError(f"sae: got active_groups = {self.active_groups}, want all {groups} groups to train")
        if sizes != (*self.group_sizes[: self._active - 1], self.d_sae - self._bounds[self._active - 1]):
            got = "random prefixes" if sizes is None else f"prefixes of groups {sizes}"
            raise ValueError(f"objective: got {got}, want the SAE's own groups, {self.group_sizes}")

    @property
    def active_features(self) -> int:
        """The number of features in groups that are on: the first ones."""
        return self._bounds[self._active]

    @property
    def all_active(self) -> bool:
        return self._active == len(self._bounds) - 1

    @property
    def active_groups(self) -> int:
        """The number of groups in use, by default all.  The features of the others are off: they take part in the
        selection, and are then set to 0 (as in dictionary_learning), so that an example may have fewer than k."""
        return self._active

    @active_groups.setter
    def active_groups(self, value: int) -> None:
        groups = len(self._bounds) - 1
        wanted = f"an int from 1 to the number of groups, {groups}"
        self._active = arguments.whole("active_groups", value, 1, groups, wanted)

    def decode_prefixes(self, f: Tensor | SparseCode, x: Tensor | None = None) -> Tensor:
        """[G, ..., d_out]: x̂ from the first 1 .. G groups of a dense f [..., F] or a SparseCode; G = 1 without groups.
        Arguments as :meth:`decode`."""
        self.settle()
        bounds, b_dec = self._bounds, self.b_dec
        self.check_code(f)
        if isinstance(f, SparseCode):
            parts = ops.decode(f, self.W_dec, groups=bounds).reshape(-1, *f.shape[:-1], self.d_out)
        else:
            f = f.to(self.W_dec.dtype)
            with without_autocast():
                parts = torch.stack([f[..., a:b] @ self.W_dec[a:b] for a, b in pairwise(bounds)])
        return self._whole(parts.cumsum(0) + b_dec, f, x)

    def _train_code(self, x_c: Tensor, shadow: ops.Shadow | None, slack: float) -> SparseCode:
        """The code that a step is taken on.  What the last batch's smallest entries reached, in units of ``_scale``, is the
        guess for this one's: it saves time, and no result hangs on it."""
        on_engine, scale = x_c.device.type == "cpu", self._scale(x_c)
        code = self._code(
            x_c, shadow, **self._in_training, guess=self._reach * scale if self._reach > 0 and on_engine else None
        )
        full = on_engine and 0 < code.nnz == int(self.k * code.batch)
        self._reach = NEARLY * self._reached(code, scale) if full else 0.0
        return code

    def _scale(self, x_c: Tensor) -> Tensor:
        """[B]: what the smallest entry kept of a row goes with."""
        raise NotImplementedError

    def _reached(self, code: SparseCode, scale: Tensor) -> float:
        """The part of their scale that nearly all of the smallest entries kept of a full code reach."""
        raise NotImplementedError

    def _code(self, x_c: Tensor, shadow: ops.Shadow | None = None, **choice: Any) -> SparseCode:
        code = super()._code(x_c, shadow, **choice)
        if self.all_active:
            return code
        return code.with_values(torch.where(code.indices < self.active_features, code.values, 0))
