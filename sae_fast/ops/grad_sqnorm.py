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
from sae_fast.ops.native import _C, threads
from sae_fast.ops.weight_step import dense_gradient, project_rows


def grad_sqnorm(gradient: RowGradient, W: Tensor, *, first_feature: int = 0, project: bool = False) -> Tensor:
    """‖grad‖² of the rows of W [n, d], which are the features ``first_feature`` .. + n; with ``project``, after removing
    each row's component along W's row.  Returns a 0-d tensor in float64."""
    return torch.ops.sae_fast.grad_sqnorm(W, *gradient.parts(), first_feature, project)


@torch.library.custom_op(
    "sae_fast::grad_sqnorm",
    mutates_args=(),
    schema="(Tensor W, Tensor colptr, Tensor rows, Tensor perm, Tensor[] values, Tensor[] A,"
    " Tensor? self_coefficient, int first_feature, bool project) -> Tensor",
)
def _grad_sqnorm(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    checks.row_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature)
    gradient = RowGradient.of(colptr, rows, perm, values, A, self_coefficient)
    rejections = {
        "cpu": cpu_rejects(W, colptr, rows, perm),
        "triton": triton_rejects(W, colptr, rows, perm) or crossovers.gpu_rejects(*gradient.sizes()),
    }
    body = pick("grad_sqnorm", {"cpu": _cpu, "triton": _triton, "reference": _reference}, rejections)
    return body(W, gradient, first_feature, project)


@_grad_sqnorm.register_fake
def _(W, colptr, rows, perm, values, A, self_coefficient, first_feature, project):
    return W.new_empty((), dtype=torch.float64)


def _cpu(W: Tensor, gradient: RowGradient, first_feature: int, project: bool) -> Tensor:
    W, (n, d) = W.contiguous(), W.shape
    if crossovers.is_dense("weight_step", *gradient.sizes()):
        total = torch.zeros((), dtype=torch.float64)
        for first, last in crossovers.chunks(n, gradient.A[0].shape[0] + d):
            at = slice(first, last)
            total += _reference(W[at], gradient.of_rows(at), first_feature + first, project)
        return total
    gradient, out = gradient.contiguous(), torch.empty(n, dtype=torch.float64)
    _C.grad_sqnorm(
        code=gradient.csc.parts(), sources=(gradient.values, gradient.A), d=d, first=first_feature, n=n, W=W,
        self_coefficient=gradient.self_coefficient, project=project, out=out, threads=threads(),
    )  # fmt: skip
    return out.sum()


def _triton(W: Tensor, gradient: RowGradient, first_feature: int, project: bool) -> Tensor:
    from sae_fast.kernels import grad_sqnorm as kernels

    if len(gradient.values) > 2:
        return _reference(W, gradient, first_feature, project)
    out = torch.empty(W.shape[0], kernels.slices(W.shape[1], project), dtype=torch.float64, device=W.device)
    kernels.grad_sqnorm(gradient.contiguous(), W.contiguous(), project, out, first_feature)
    return out.sum()


def _reference(W: Tensor, gradient: RowGradient, first_feature: int, project: bool) -> Tensor:
    grad = dense_gradient(W, gradient, first_feature)
    if project:
        grad = project_rows(grad, W)
    return grad.double().pow(2).sum()
