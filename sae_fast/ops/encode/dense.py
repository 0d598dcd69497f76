"""encode by torch's product, row chunk by row chunk: the reference, and a GPU's way where most entries are candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.ops import crossovers

Found = tuple[Tensor, Tensor, Tensor, Tensor]  # indptr, indices, u and values


def dense_code(x: Tensor, layer: Layer, support: str = "threshold", k: int = 0, chunked: bool = False) -> Found:
    """The code of x [B, d].  ``chunked``: in chunks of rows, as ``topk`` always is; ``batch_topk`` never can be."""
    if not chunked and support != "topk":
        return _whole(x, layer, support, k)
    chunks = list(crossovers.chunks(x.shape[0], layer.W.shape[0], x.device.type)) or [(0, 0)]
    return join([_whole(x[first:last], layer, support, k) for first, last in chunks])


def join(parts: list[Found]) -> Found:
    """One code of those of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    indptrs, indices, u, values = zip(*parts, strict=True)
    counts = torch.cat([p.diff() for p in indptrs])
    indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr, torch.cat(indices), torch.cat(u), torch.cat(values, dim=1)


def _whole(x: Tensor, layer: Layer, support: str, k: int) -> Found:
    u = x @ layer.W.T
    pi = u + layer.bias
    if support == "threshold":
        member = ~(pi <= (0 if layer.cut is None else layer.cut))  # keeps a NaN
    else:
        member = _largest_of(pi, k) if support == "topk" else _largest_of(pi.reshape(1, -1), k * x.shape[0]).view_as(pi)
    indptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    indptr[1:] = member.sum(1).cumsum(0)
    values = layer.activation.values(u, pi, layer.vectors)
    return indptr, member.nonzero()[:, 1].int(), u[member], values[:, member]


def _largest_of(pi: Tensor, k: int) -> Tensor:
    """The k largest positive entries of each row, a NaN before all others, the first of equal ones."""
    if pi.numel() == 0:
        return torch.zeros_like(pi, dtype=torch.bool)
    last = torch.relu(pi).topk(k, dim=1).values[:, -1:]
    nan = pi.isnan()
    above = (pi > last) | (nan & ~last.isnan())
    equal = (pi == last) | (nan & last.isnan())
    left = k - above.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > left).any()):
        equal &= equal.cumsum(1, dtype=torch.int32) <= left
    return (above | equal) & ~(pi <= 0)
