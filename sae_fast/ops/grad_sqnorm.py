"""grad_sqnorm: the squared norm of a weight gradient that is never stored: a first pass for gradient clipping.

Body ``cpu``: a thread owns a feature; above the crossover density feature chunks are multiplied densely.
Body ``triton``: a program owns a slice of a feature's row, or all of it to project.
Body ``reference``: from the dense gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import RowGradient
from sae_fast.ops import checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, contiguous, threads
from sae_fast.ops.weight_step import dense_gradient, project_rows


def grad_sqnorm(gradient: RowGradient, W: Tensor, *, first_feature: int = 0, project: bool = False) -> Tensor:
    """‖grad‖² of the rows of W [n, d], which are the features ``first_feature`` .. + n; with ``project``, after removing
    each row's component along W's row.  Returns a 0-d tensor in float64."""
    csc = gradient.csc
    return torch.ops.sae_fast.grad_sqnorm(
        W,
        csc.colptr,
        csc.rows,
        csc.perm,
        gradient.values,
        gradient.A,
        gradient.self_coefficient,
        first_feature,
        project,
    )


@torch.library.custom_op(
    "sae_fast::grad_sqnorm",
    mutates_args=(),
    schema="(Tensor W, Tensor colptr, Tensor rows, Tensor perm, Tensor[] values, Tensor[] A,"
    " Tensor? self_coefficient, int first_feature, bool project) -> Tensor",
)
def _grad_sqnorm(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    checks.row_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature)
    rejections = {
        "cpu": cpu_rejects(W, colptr, rows, perm),
        "triton": triton_rejects(W, colptr, rows, perm)
        or crossovers.gpu_rejects(rows.shape[0], A[0].shape[0], colptr.shape[0] - 1),
    }
    body = pick("grad_sqnorm", {"cpu": _cpu, "triton": _triton, "reference": _reference}, rejections)
    return body(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project)


@_grad_sqnorm.register_fake
def _(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    return W.new_empty((), dtype=torch.float64)


def _cpu(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    W = W.contiguous()
    if crossovers.is_dense("outer", rows.shape[0], A[0].shape[0], colptr.shape[0] - 1):
        total = torch.zeros((), dtype=torch.float64)
        for first, last in crossovers.chunks(W.shape[0], A[0].shape[0] + W.shape[1]):
            coefficient = None if self_coefficient is None else self_coefficient[first:last]
            total += _reference(W[first:last], colptr, rows, perm, values, A, coefficient, first_feature + first, project)
        return total
    values, A = [v.contiguous() for v in values], [a.contiguous() for a in A]
    colptr, rows, perm = colptr.contiguous(), rows.contiguous(), perm.contiguous()
    out = torch.empty(W.shape[0], dtype=torch.float64)
    self_coefficient = None if self_coefficient is None else self_coefficient.contiguous()
    _C.grad_sqnorm(
        code=(colptr, rows, perm), sources=(values, A), d=W.shape[1], first=first_feature, n=W.shape[0], W=W,
        self_coefficient=self_coefficient, project=project, out=out, threads=threads(),
    )  # fmt: skip
    return out.sum()


def _triton(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    from sae_fast.kernels import grad_sqnorm as kernels

    if len(values) > 2:
        return _reference(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project)
    csc, values, A = contiguous(colptr, rows, perm), contiguous(*values), contiguous(*A)
    own = None if self_coefficient is None else self_coefficient.contiguous()
    out = torch.empty(W.shape[0], kernels.slices(W.shape[1], project), dtype=torch.float64, device=W.device)
    kernels.grad_sqnorm(*csc, values, A, own, first_feature, W.contiguous(), project, out)
    return out.sum()


def _reference(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    grad = dense_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature, W.shape[0])
    if project:
        grad = project_rows(grad, W)
    return grad.double().pow(2).sum()
