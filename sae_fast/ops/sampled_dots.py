"""sampled_dots: A Wᵀ at the entries of a code only, the gradient with respect to values.

Body ``cpu``: gathered dots; above the crossover density dense row chunks.  ``triton``: gathered dots.
``reference``: dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import SparseCode, row_ids
from sae_fast.ops import autograd, checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, contiguous, threads


def sampled_dots(code: SparseCode, A: Tensor, W: Tensor) -> Tensor:
    """out[j] = A[row of j] · W[indices[j]], [nnz], with A [B, d] and W [F, d].  Differentiable in A and W."""
    checks.shape("W", W, code.d_sae, "d")
    return autograd.call("sampled_dots", code.indptr, code.indices, A, W)


@torch.library.custom_op(
    "sae_fast::sampled_dots",
    mutates_args=(),
    schema="(Tensor indptr, Tensor indices, Tensor A, Tensor W) -> Tensor",
)
def _sampled_dots(indptr, indices, A, W):
    checks.shape("W", W, "F", "d")
    checks.csr(indptr, indices, W.shape[0])
    checks.shape("A", A, indptr.shape[0] - 1, W.shape[1])
    checks.floating("A", A, W, "W")
    tensors = (A, W, indptr, indices)
    body = pick(
        "sampled_dots",
        {"cpu": _cpu, "triton": _triton, "reference": _reference},
        {
            "cpu": cpu_rejects(*tensors),
            "triton": triton_rejects(*tensors) or crossovers.gpu_rejects(indices.shape[0], A.shape[0], W.shape[0]),
        },
    )
    return body(indptr, indices, A, W)


@_sampled_dots.register_fake
def _(indptr, indices, A, W):
    return A.new_empty(indices.shape[0])


def _cpu(indptr, indices, A, W):
    indptr, indices, A, W = contiguous(indptr, indices, A, W)
    (rows, d), features = A.shape, W.shape[0]
    out = A.new_empty(indices.shape[0])
    if crossovers.is_dense("sampled_dots", indices.shape[0], rows, features):
        for first, last in crossovers.chunks(rows, features):
            crossovers.gather(indptr, indices, first, last, A[first:last] @ W.T, out)
        return out
    _C.sampled_dots(code=(indptr, indices), A=A, W=W, features=features, d=d, out=out, threads=threads())
    return out


def _triton(indptr, indices, A, W):
    from sae_fast.kernels import sampled_dots as kernel

    indptr, indices, A, W = contiguous(indptr, indices, A, W)
    out = A.new_empty(indices.shape[0])
    kernel.sampled_dots(indptr[:-1], indptr[1:], indices, A, W, out)
    return out


def _reference(indptr, indices, A, W):
    return (A @ W.T)[row_ids(indptr, indices.shape[0]), indices.long()]
