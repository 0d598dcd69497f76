"""outer: weight gradients, row by row of the weight.

Body ``cpu``: a thread owns a feature and sums its entries in order; above the crossover density it multiplies dense
feature chunks.  ``cuda``, ``triton``: a warp or a program owns a slice of a feature's row.  ``reference``: dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sae_fast.code import RowGradient, Transposed
from sae_fast.ops import checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, threads


def outer(
    csc: Transposed,
    values: Sequence[Tensor],
    A: Sequence[Tensor],
    *,
    features: Tensor | None = None,
    first_feature: int = 0,
    n_features: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rows[i] = Σ_s Σ_{entries j of feature i} values[s][j] · A[s][row of j].

    values: one [nnz] per source, in CSR order; A: one [B, d] per source.  Which features: all F; the range
    ``first_feature`` .. + ``n_features``; or the list ``features`` [n] int64 (such as the touched ones).
    With ``out`` the rows are added to it in place and it is returned.  Returns [F or n, d].
    """
    total = csc.colptr.shape[0] - 1
    n = total - first_feature if n_features is None else n_features
    arguments = (csc.colptr, csc.rows, csc.perm, list(values), list(A), features, first_feature, n)
    if out is None:
        return torch.ops.sae_fast.outer(*arguments)
    torch.ops.sae_fast.outer_(out, *arguments)
    return out


def touched(csc: Transposed) -> Tensor:
    """[n] int64: the features that have entries.  Synchronises on a GPU."""
    return (csc.colptr[1:] > csc.colptr[:-1]).nonzero()[:, 0]


_ARGUMENTS = (
    "Tensor colptr, Tensor rows, Tensor perm, Tensor[] values, Tensor[] A, Tensor? features, int first_feature,"
    " int n_features)"
)


@torch.library.custom_op("sae_fast::outer", mutates_args=(), schema=f"({_ARGUMENTS} -> Tensor")
def _outer(colptr, rows, perm, values, A, features, first_feature, n_features):
    _check(colptr, rows, perm, values, A, features, first_feature, n_features)
    n = n_features if features is None else features.shape[0]
    out = torch.zeros(n, A[0].shape[1], dtype=A[0].dtype, device=A[0].device)
    gradient = RowGradient.of(colptr, rows, perm, values, A)
    _body(gradient, features)(out, gradient, features, first_feature)
    return out


@_outer.register_fake
def _(colptr, rows, perm, values, A, features, first_feature, n_features):
    return A[0].new_empty(n_features if features is None else features.shape[0], A[0].shape[1])


@torch.library.custom_op("sae_fast::outer_", mutates_args=("out",), schema=f"(Tensor(a!) out, {_ARGUMENTS} -> ()")
def _outer_(out, colptr, rows, perm, values, A, features, first_feature, n_features):
    _check(colptr, rows, perm, values, A, features, first_feature, n_features)
    n = n_features if features is None else features.shape[0]
    checks.shape("out", out, n, A[0].shape[1])
    checks.floating("out", out, A[0], "A[0]")
    target = out if out.is_contiguous() else out.contiguous()
    gradient = RowGradient.of(colptr, rows, perm, values, A)
    _body(gradient, features)(target, gradient, features, first_feature)
    if target is not out:
        out.copy_(target)


@_outer_.register_fake
def _(out, colptr, rows, perm, values, A, features, first_feature, n_features):
    return None


def _check(colptr, rows, perm, values, A, features, first_feature, n_features) -> None:
    checks.shape("rows", rows, "nnz")
    checks.sources(values, A, rows.shape[0])
    checks.csc(colptr, rows, perm, A[0].shape[0])
    total = colptr.shape[0] - 1
    if features is not None:
        checks.shape("features", features, "n")
        checks.dtype("features", features, torch.int64)
        if features.numel() and not 0 <= int(features.min()) <= int(features.max()) < total:
            raise ValueError(f"features: got values outside 0 … {total - 1}")
    elif first_feature < 0 or n_features < 0 or first_feature + n_features > total:
        raise ValueError(f"first_feature, n_features: got {first_feature}, {n_features}, want a range within F = {total}")


def _body(gradient: RowGradient, features: Tensor | None) -> Callable:
    tensors = *gradient.values, *gradient.A, *gradient.csc.parts(), features
    dense = crossovers.gpu_rejects(*gradient.sizes())
    return pick(
        "outer",
        {"cpu": _cpu, "cuda": _gpu, "triton": _gpu, "reference": _reference},
        {
            "cpu": cpu_rejects(*tensors),
            "cuda": cuda_rejects("outer", *tensors) or dense,
            "triton": triton_rejects(*tensors) or dense,
        },
    )


def _cpu(out: Tensor, gradient: RowGradient, features: Tensor | None, first_feature: int) -> None:
    gradient = gradient.contiguous()
    csc, values, A = gradient.csc.parts(), gradient.values, gradient.A
    if features is None and crossovers.is_dense("outer", *gradient.sizes()):
        for first, last in crossovers.chunks(out.shape[0], A[0].shape[0]):
            block = out.new_empty(last - first, A[0].shape[0])
            for v, a in zip(values, A, strict=True):
                crossovers.scatter(*csc, first_feature + first, first_feature + last, v, block)
                out[first:last].addmm_(block, a)
        return
    features = None if features is None else features.contiguous()
    _C.outer(
        code=csc, sources=(values, A), examples=A[0].shape[0], d=A[0].shape[1], list=features, first=first_feature,
        n=out.shape[0], out=out, threads=threads(),
    )  # fmt: skip


def _gpu(out: Tensor, gradient: RowGradient, features: Tensor | None, first_feature: int) -> None:
    from sae_fast.kernels.outer import outer

    features = None if features is None else features.contiguous()
    # Sources are added two by two, and a 16-bit out would round in between.
    target = out if len(gradient.values) <= 2 else out.float()
    outer(gradient.contiguous(), target, features=features, first_feature=first_feature)
    if target is not out:
        out.copy_(target)


def _reference(out: Tensor, gradient: RowGradient, features: Tensor | None, first_feature: int) -> None:
    chosen = slice(first_feature, first_feature + out.shape[0]) if features is None else features
    colptr, rows, perm = gradient.csc.parts()
    for v, a in zip(gradient.values, gradient.A, strict=True):
        out += crossovers.to_dense(colptr, rows, v[perm], a.shape[0])[chosen] @ a
