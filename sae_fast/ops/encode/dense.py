"""encode by torch's product, row chunk by row chunk: the reference, and a GPU's way where most entries are candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.ops import crossovers

Found = tuple[Tensor, Tensor, Tensor, Tensor]  # indptr, indices, u and values


class Choice(NamedTuple):
    """A choice among pre-activations π, by a name of ops.encode's supports: the largest; of equal ones, the first."""

    support: str
    k: float

    @property
    def whole(self) -> bool:
        """True if they are the largest of the batch, not of each row."""
        return self.support == "batch_topk"

    @property
    def signed(self) -> bool:
        """True if negative ones have a part, and values are π."""
        return self.support in ("topk_any", "topk_abs")

    def of_batch(self, rows: int) -> int:
        """The number of entries that a batch has at most."""
        return int(self.k * rows)

    def of(self, pi: Tensor) -> Tensor:
        """bool [B, F]: those that are kept of pi [B, F], a NaN before all others."""
        size = pi.abs() if self.support == "topk_abs" else pi
        positive = self.support != "topk_any"
        if self.whole:
            return _largest_of(size.reshape(1, -1), self.of_batch(pi.shape[0]), positive).view_as(pi)
        return _largest_of(size, int(self.k), positive)


def dense_code(x: Tensor, layer: Layer, choice: Choice | None = None, chunked: bool = False) -> Found:
    """The code of x [B, d], by threshold or of the largest.  ``chunked``: in chunks of rows, as those of the largest of
    each row always are; of the whole batch it never can be."""
    if not chunked and (choice is None or choice.whole):
        return _whole(x, layer, choice)
    chunks = list(crossovers.chunks(x.shape[0], layer.W.shape[0], x.device.type)) or [(0, 0)]
    return join([_whole(x[first:last], layer, choice) for first, last in chunks])


def join(parts: list[Found]) -> Found:
    """One code of those of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    indptrs, indices, u, values = zip(*parts, strict=True)
    counts = torch.cat([p.diff() for p in indptrs])
    indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr, torch.cat(indices), torch.cat(u), torch.cat(values, dim=1)


def _whole(x: Tensor, layer: Layer, choice: Choice | None) -> Found:
    u = x @ layer.W.T
    pi = u + layer.bias
    if choice is None:
        member = ~(pi <= (0 if layer.cut is None else layer.cut))  # keeps a NaN
    else:
        member = choice.of(pi)
    indptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    indptr[1:] = member.sum(1).cumsum(0)
    values = pi[None] if choice is not None and choice.signed else layer.activation.values(u, pi, layer.vectors)
    return indptr, member.nonzero()[:, 1].int(), u[member], values[:, member]


def _largest_of(pi: Tensor, k: int, positive: bool) -> Tensor:
    """The k largest entries of each row, as far as they are ``positive`` if that is asked, a NaN before all others, the
    first of equal ones."""
    if pi.numel() == 0 or k == 0:
        return torch.zeros_like(pi, dtype=torch.bool)
    last = (torch.relu(pi) if positive else pi).topk(k, dim=1).values[:, -1:]
    nan = pi.isnan()
    above = (pi > last) | (nan & ~last.isnan())
    equal = (pi == last) | (nan & last.isnan())
    left = k - above.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > left).any()):
        equal &= equal.cumsum(1, dtype=torch.int32) <= left
    return (above | equal) & ~(pi <= 0) if positive else above | equal
