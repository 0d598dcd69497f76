"""transpose: the entries of a code ordered by feature.

Body ``cpu``: counting by parts of rows, in parallel.  ``cuda``, ``triton``: counting by bits.
``reference``: a stable sort.
"""

from __future__ import annotations

import torch

from sae_fast.code import SparseCode, Transposed, row_ids
from sae_fast.ops import checks
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, contiguous, threads


def transpose(code: SparseCode) -> Transposed:
    """CSR → CSC.  Rows ascend within a feature, whatever the thread count."""
    return Transposed(*torch.ops.sae_fast.transpose(code.indptr, code.indices, code.d_sae))


@torch.library.custom_op(
    "sae_fast::transpose",
    mutates_args=(),
    schema="(Tensor indptr, Tensor indices, int features) -> (Tensor colptr, Tensor rows, Tensor perm)",
)
def _transpose(indptr, indices, features):
    if features < 1:
        raise ValueError(f"features: got {features}, want at least 1")
    checks.csr(indptr, indices, features)
    rejects = cpu_rejects()
    if rejects is None and indptr.device.type != "cpu":
        rejects = f"the code is on {indptr.device}"
    body = pick(
        "transpose", {"cpu": _cpu, "cuda": _gpu, "triton": _gpu, "reference": _reference},
        {
            "cpu": rejects,
            "cuda": cuda_rejects("transpose", indptr, indices),
            "triton": triton_rejects(indptr, indices),
        },
    )  # fmt: skip
    return body(indptr, indices, features)


@_transpose.register_fake
def _(indptr, indices, features):
    return indptr.new_empty(features + 1), torch.empty_like(indices), indptr.new_empty(indices.shape[0])


def _cpu(indptr, indices, features):
    indptr, indices = contiguous(indptr, indices)
    nnz = indices.shape[0]
    colptr = torch.empty(features + 1, dtype=torch.int64)
    rows, perm = torch.empty(nnz, dtype=torch.int32), torch.empty(nnz, dtype=torch.int64)
    _C.transpose(code=(indptr, indices), features=features, colptr=colptr, rows=rows, perm=perm, threads=threads())
    return colptr, rows, perm


def _gpu(indptr, indices, features):
    from sae_fast.kernels import transpose as kernels

    indptr, indices = contiguous(indptr, indices)
    csc = Transposed.empty(features, indices)
    kernels.transpose(indptr[:-1], indptr[1:], indices, csc)
    return csc.parts()


def _reference(indptr, indices, features):
    rows = row_ids(indptr, indices.shape[0])
    perm = torch.argsort(indices, stable=True)
    counts = torch.bincount(indices.long(), minlength=features)
    colptr = torch.zeros(features + 1, dtype=torch.int64, device=indices.device)
    colptr[1:] = counts.cumsum(0)
    return colptr, rows[perm].int(), perm
