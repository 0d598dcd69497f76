"""weight_step: outer ∘ projection ∘ Adam (β1 = 0) ∘ renormalisation in one visit of each touched weight row; and row_step,
the same from a gradient that is already dense.

Body ``cpu``: a thread owns a feature; above the crossover density feature chunks are multiplied densely, then stepped.
``cuda`` (not of row_step), ``triton``: a block or a program owns a slice of a row, or all of a unit row.  ``reference``:
dense, plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_fast.code import RowGradient, Shadow
from sae_fast.ops import checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.encode.shadow import refresh_shadow
from sae_fast.ops.native import _C, contiguous, threads


def weight_step(
    W: Tensor,
    v: Tensor,
    last_step: Tensor,
    gradient: RowGradient,
    *,
    step: int,
    lr: float,
    beta2: float,
    eps: float,
    unit_rows: bool = False,
    first_feature: int = 0,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    shadow: Shadow | None = None,
) -> None:
    """One exact lazy Adam step, in place, on the rows of W [n, d] whose features (``first_feature`` .. + n) have entries.

    v [n, d] is the raw second moment as of ``last_step`` [n] int64; ``step`` counts from 1.  A row without entries has a
    zero gradient, hence a zero step at β1 = 0; only its v would decay, and that is made up for when it is next touched:
    v ← β2^Δt v.  ``unit_rows``: the gradient's component along the row is removed before, the row renormalised after.
    ``grad_scale`` (0-d, for clipping) multiplies the gradient; ``skip`` (0-d bool) makes the call a no-op.  ``shadow``, of
    ``ops.make_shadow(W)``, is brought up to date with the rows that change.
    """
    csc = gradient.csc
    torch.ops.sae_fast.weight_step(
        W, v, last_step, csc.colptr, csc.rows, csc.perm, gradient.values, gradient.A, gradient.self_coefficient,
        first_feature, step, lr, beta2, eps, unit_rows, grad_scale, skip, *_parts(shadow),
    )  # fmt: skip


def row_step(
    W: Tensor,
    v: Tensor,
    last_step: Tensor,
    grad: Tensor,
    *,
    step: int,
    lr: float,
    beta2: float,
    eps: float,
    unit_rows: bool = False,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    shadow: Shadow | None = None,
) -> None:
    """The step of :func:`weight_step` from a dense gradient [n, d]; every row counts as touched."""
    torch.ops.sae_fast.row_step(W, v, last_step, grad, step, lr, beta2, eps, unit_rows, grad_scale, skip, *_parts(shadow))


def _parts(shadow: Shadow | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if shadow is None else (shadow.rows, shadow.norms)


# No defaults: torch 2.11 counts up the version of every mutated argument, and fails over one that a call left out.
@torch.library.custom_op(
    "sae_fast::weight_step",
    mutates_args=("W", "v", "last_step", "shadow_rows", "shadow_norms"),
    schema="(Tensor(a!) W, Tensor(b!) v, Tensor(c!) last_step, Tensor colptr, Tensor rows, Tensor perm, Tensor[] values,"
    " Tensor[] A, Tensor? self_coefficient, int first_feature, int step, float lr, float beta2, float eps,"
    " bool unit_rows, Tensor? grad_scale, Tensor? skip, Tensor(d!)? shadow_rows,"
    " Tensor(e!)? shadow_norms) -> ()",
)
def _weight_step(
    W, v, last_step, colptr, rows, perm, values, A, self_coefficient, first_feature, step, lr, beta2, eps, unit_rows,
    grad_scale, skip, shadow_rows, shadow_norms,
):  # fmt: skip
    checks.row_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature)
    checks.adam_state(W, v, last_step, step, lr, beta2, eps, grad_scale, skip)
    shadow = checks.shadow(W, shadow_rows, shadow_norms)
    inputs = W, shadow, last_step, colptr, rows, perm
    dense = crossovers.gpu_rejects(rows.shape[0], A[0].shape[0], colptr.shape[0] - 1)
    body = pick(
        "weight_step",
        {"cpu": _cpu, "cuda": _gpu, "triton": _gpu, "reference": _reference},
        {
            "cpu": cpu_rejects(W, last_step, colptr, rows, perm),
            "cuda": _gpu_rejects(*inputs) or cuda_rejects("weight_step") or dense,
            "triton": _gpu_rejects(*inputs) or dense,
        },
    )
    body(W, v, last_step, colptr, rows, perm, values, A, self_coefficient, first_feature, step, lr, beta2, eps, unit_rows,
         grad_scale, skip, shadow)  # fmt: skip


@_weight_step.register_fake
def _(*args):
    return None


@torch.library.custom_op(
    "sae_fast::row_step",
    mutates_args=("W", "v", "last_step", "shadow_rows", "shadow_norms"),
    schema="(Tensor(a!) W, Tensor(b!) v, Tensor(c!) last_step, Tensor grad, int step, float lr, float beta2, float eps,"
    " bool unit_rows, Tensor? grad_scale, Tensor? skip, Tensor(d!)? shadow_rows,"
    " Tensor(e!)? shadow_norms) -> ()",
)
def _row_step(
    W,
    v,
    last_step,
    grad,
    step,
    lr,
    beta2,
    eps,
    unit_rows,
    grad_scale,
    skip,
    shadow_rows,
    shadow_norms,
):
    checks.shape("W", W, "n", "d")
    checks.shape("grad", grad, *W.shape)
    checks.floating("grad", grad, W, "W")
    checks.adam_state(W, v, last_step, step, lr, beta2, eps, grad_scale, skip)
    shadow = checks.shadow(W, shadow_rows, shadow_norms)
    rejections = {
        "cpu": cpu_rejects(W, last_step),
        "triton": _gpu_rejects(W, shadow, last_step),
    }
    body = pick("row_step", {"cpu": _cpu_rows, "triton": _triton_rows, "reference": _reference_rows}, rejections)
    body(W, v, last_step, grad.contiguous(), step, lr, beta2, eps, unit_rows, grad_scale, skip, shadow)


@_row_step.register_fake
def _(*args):
    return None


def _skips(skip: Tensor | None) -> bool:
    return skip is not None and bool(skip)


def _gpu_rejects(W, shadow, *indices) -> str | None:
    if W.dtype != torch.float32:
        return f"W is {W.dtype}; the kernels step float32 weights"
    return triton_rejects(W, *indices, *(shadow or ()))


def _cpu(W, v, last_step, colptr, rows, perm, values, A, self_coefficient, first_feature, step, lr, beta2, eps,
         unit_rows, grad_scale, skip, shadow):  # fmt: skip
    if _skips(skip):
        return
    if crossovers.is_dense("weight_step", rows.shape[0], A[0].shape[0], colptr.shape[0] - 1):
        colptr = colptr.contiguous()
        for first, last in crossovers.chunks(W.shape[0], A[0].shape[0] + W.shape[1]):
            at = slice(first, last)
            coefficient = None if self_coefficient is None else self_coefficient[at]
            grad = dense_gradient(W[at], colptr, rows, perm, values, A, coefficient, first_feature + first, last - first)
            touched = colptr[first_feature + first : first_feature + last + 1]
            part = None if shadow is None else Shadow(shadow.rows[at], shadow.norms[at])
            _cpu_rows(W[at], v[at], last_step[at], grad, step, lr, beta2, eps, unit_rows, grad_scale, None, part, touched)
        return
    values, A = [x.contiguous() for x in values], [a.contiguous() for a in A]
    colptr, rows, perm = colptr.contiguous(), rows.contiguous(), perm.contiguous()
    self_coefficient = None if self_coefficient is None else self_coefficient.contiguous()
    _C.weight_step(
        code=(colptr, rows, perm), sources=(values, A), d=W.shape[1], first=first_feature, n=W.shape[0],
        self_coefficient=self_coefficient, grad_scale=_scale(grad_scale), adam=_constants(step, lr, beta2, eps, unit_rows),
        W=W, v=v, last_step=last_step, shadow=shadow, threads=threads(),
    )  # fmt: skip


def _cpu_rows(W, v, last_step, grad, step, lr, beta2, eps, unit_rows, grad_scale, skip, shadow, colptr=None):
    """With colptr [n + 1], rows without entries are left alone."""
    if _skips(skip):
        return
    _C.row_step(
        G=grad, colptr=colptr, d=W.shape[1], n=W.shape[0], grad_scale=_scale(grad_scale),
        adam=_constants(step, lr, beta2, eps, unit_rows), W=W, v=v, last_step=last_step, shadow=shadow, threads=threads(),
    )  # fmt: skip


def _constants(step, lr, beta2, eps, unit_rows):
    return _C.Adam(lr=lr, beta2=beta2, eps=eps, step=step, project=unit_rows, renormalise=unit_rows)


def _scale(grad_scale: Tensor | None) -> float:
    return 1.0 if grad_scale is None else float(grad_scale)


def _gpu(W, v, last_step, colptr, rows, perm, values, A, self_coefficient, first_feature, step, lr, beta2, eps,
         unit_rows, grad_scale, skip, shadow):  # fmt: skip
    from sae_fast.kernels.weight_step import weight_step

    csc, values, A = contiguous(colptr, rows, perm), contiguous(*values), contiguous(*A)
    own = None if self_coefficient is None else self_coefficient.contiguous()
    adam = _adam(W, step, lr, beta2, eps)
    grad_scale, skip = _beside(W, grad_scale), _beside(W, skip)
    followed = None if unit_rows else shadow
    weight_step(W, v, last_step, *csc, values, A, own, first_feature, adam, unit_rows, grad_scale, skip, followed)
    if followed is not shadow:
        refresh_shadow(W, shadow)


def _triton_rows(W, v, last_step, grad, step, lr, beta2, eps, unit_rows, grad_scale, skip, shadow):
    from sae_fast.kernels.weight_step import row_step

    grad_scale, skip = _beside(W, grad_scale), _beside(W, skip)
    followed = None if unit_rows else shadow
    row_step(W, v, last_step, grad, _adam(W, step, lr, beta2, eps), unit_rows, grad_scale, skip, followed)
    if followed is not shadow:
        refresh_shadow(W, shadow)


def _beside(W, scalar):
    return None if scalar is None else scalar.to(W.device)


def _adam(W, step, lr, beta2, eps):
    from sae_fast.kernels.weight_step import new_adam, set_adam

    adam = new_adam(W.device)
    set_adam(adam, step, lr, beta2, eps)
    return adam


def dense_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature, n):
    """The gradient [n, d] of the features first_feature .. + n."""
    grad = torch.ops.sae_fast.outer(colptr, rows, perm, values, A, None, first_feature, n)
    return grad if self_coefficient is None else grad + self_coefficient[:, None] * W


def project_rows(grad: Tensor, W: Tensor) -> Tensor:
    """grad without its component along each row of W."""
    direction = torch.nn.functional.normalize(W, dim=1)
    return grad - (grad * direction).sum(1, keepdim=True) * direction


def _reference(W, v, last_step, colptr, rows, perm, values, A, self_coefficient, first_feature, step, lr, beta2, eps,
               unit_rows, grad_scale, skip, shadow):  # fmt: skip
    if _skips(skip):
        return
    n = W.shape[0]
    grad = dense_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature, n)
    range_ = colptr[first_feature : first_feature + n + 1]
    at = (range_[1:] > range_[:-1]).nonzero()[:, 0]
    W_at, v_at, last_at = W[at], v[at], last_step[at]
    _reference_rows(W_at, v_at, last_at, grad[at], step, lr, beta2, eps, unit_rows, grad_scale, None, None)
    W[at], v[at], last_step[at] = W_at, v_at, last_at
    if shadow is not None:
        refresh_shadow(W, shadow)


def _reference_rows(W, v, last_step, grad, step, lr, beta2, eps, unit_rows, grad_scale, skip, shadow):
    if _skips(skip):
        return
    if grad_scale is not None:
        grad = grad * grad_scale
    if unit_rows:
        grad = project_rows(grad, W)
    v.mul_((beta2 ** (step - last_step).double()).to(v.dtype)[:, None]).addcmul_(grad, grad, value=1 - beta2)
    last_step.fill_(step)
    W.addcdiv_(grad, (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps), value=-lr)
    if unit_rows:
        W.copy_(torch.nn.functional.normalize(W, dim=1))
    if shadow is not None:
        refresh_shadow(W, shadow)
