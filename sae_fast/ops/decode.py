"""decode: sums of decoder rows.

Body ``cpu``: gathers rows; above the crossover density it fills dense row chunks and multiplies.  ``triton``: gathers
rows.  ``reference``: dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sae_fast.code import SparseCode
from sae_fast.ops import autograd, checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, contiguous, threads


def decode(code: SparseCode, W_dec: Tensor, values: Tensor | None = None, groups: Sequence[int] | None = None) -> Tensor:
    """out[v, g, b] = Σ values[v, j] · W_dec[indices[j]] over the entries j of row b in feature group g.  No bias.

    W_dec [F, d_out]; values [V, nnz] or [nnz], by default the magnitudes.  ``groups`` are G + 1 ascending feature
    bounds, such as (0, 64, 256): G disjoint ranges, each decoded by itself (Matryoshka prefixes are a cumulative sum
    over them).
    Returns [V, G, B, d_out]; without ``groups`` [V, B, d_out]; without V when values is [nnz] or not given.
    Differentiable with respect to values and W_dec.
    """
    checks.shape("W_dec", W_dec, code.d_sae, "d_out")
    values = code.magnitudes if values is None else values
    sets = values if values.dim() == 2 else values[None]
    out = autograd.call("decode", code.indptr, code.indices, sets, W_dec, groups)
    return out if values.dim() == 2 else out[0]


@torch.library.custom_op(
    "sae_fast::decode",
    mutates_args=(),
    schema="(Tensor indptr, Tensor indices, Tensor values, Tensor W_dec, int[]? groups) -> Tensor",
)
def _decode(indptr, indices, values, W_dec, groups):
    checks.shape("W_dec", W_dec, "F", "d_out")
    checks.csr(indptr, indices, W_dec.shape[0])
    checks.shape("values", values, "V", indices.shape[0])
    checks.floating("values", values, W_dec, "W_dec")
    bounds = _bounds(groups, W_dec.shape[0])
    tensors = (values, W_dec, indptr, indices)
    body = pick(
        "decode",
        {"cpu": _cpu, "triton": _triton, "reference": _reference},
        {
            "cpu": cpu_rejects(*tensors),
            "triton": triton_rejects(*tensors)
            or crossovers.gpu_rejects(indices.shape[0], indptr.shape[0] - 1, W_dec.shape[0]),
        },
    )
    out = body(indptr, indices, values, W_dec, bounds)
    return out if groups is not None else out.squeeze(1)


@_decode.register_fake
def _(indptr, indices, values, W_dec, groups):
    middle = [] if groups is None else [len(groups) - 1]
    return W_dec.new_empty([values.shape[0], *middle, indptr.shape[0] - 1, W_dec.shape[1]])


def _bounds(groups: Sequence[int] | None, features: int) -> list[int]:
    bounds = [0, features] if groups is None else list(groups)
    if len(bounds) < 2 or bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > features:
        raise ValueError(f"groups: got {bounds}, want at least two ascending bounds within 0 and F = {features}")
    return bounds


def _cpu(indptr, indices, values, W_dec, bounds):
    indptr, indices, values, W_dec = contiguous(indptr, indices, values, W_dec)
    rows, (features, d) = indptr.shape[0] - 1, W_dec.shape
    out = W_dec.new_empty(values.shape[0], len(bounds) - 1, rows, d)
    if crossovers.is_dense("decode", indices.shape[0], rows, features):
        for first, last in crossovers.chunks(rows, features):
            block = W_dec.new_empty(last - first, features)
            for v in range(values.shape[0]):
                crossovers.scatter(indptr, indices, None, first, last, values[v], block)
                for g, (lo, hi) in enumerate(pairwise(bounds)):
                    torch.mm(block[:, lo:hi], W_dec[lo:hi], out=out[v, g, first:last])
        return out
    _C.decode(
        code=(indptr, indices), nnz=indices.shape[0], values=values, V=values.shape[0], W=W_dec, d=d, bounds=bounds,
        out=out, threads=threads(),
    )  # fmt: skip
    return out


def _triton(indptr, indices, values, W_dec, bounds):
    from sae_fast.kernels import decode as kernel

    indptr, indices, values, W_dec = contiguous(indptr, indices, values, W_dec)
    features, d = W_dec.shape
    out = W_dec.new_empty(values.shape[0], len(bounds) - 1, indptr.shape[0] - 1, d)
    limits = None if bounds == [0, features] else torch.tensor(bounds, device=W_dec.device)
    kernel.decode(indptr[:-1], indptr[1:], indices, values, W_dec, limits, out)
    return out


def _reference(indptr, indices, values, W_dec, bounds):
    f = torch.stack([crossovers.to_dense(indptr, indices, v, W_dec.shape[0]) for v in values])
    return torch.stack([f[..., a:b] @ W_dec[a:b] for a, b in pairwise(bounds)], dim=1)
