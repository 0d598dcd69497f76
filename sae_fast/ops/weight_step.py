"""weight_step: outer ∘ projection ∘ Adam ∘ renormalisation in one visit of each weight row that moves; and row_step, the
same from a gradient that is already dense.

Body ``cpu``: a thread owns a feature; above the crossover density feature chunks are multiplied densely, then stepped.
``cuda`` (not of row_step), ``triton``: a block or a program owns a slice of a row, or all of a unit row.
``reference``: dense, plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Adam, RowGradient, Rows, Shadow
from sae_fast.ops import checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.encode.shadow import refresh_shadow
from sae_fast.ops.native import _C, threads


def weight_step(
    W: Tensor,
    v: Tensor,
    last_step: Tensor,
    gradient: RowGradient,
    *,
    m: Tensor | None = None,
    step: int,
    lr: float,
    beta1: float = 0.0,
    beta2: float,
    eps: float,
    unit_rows: bool = False,
    first_feature: int = 0,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    shadow: Shadow | None = None,
) -> None:
    """One exact lazy Adam step, in place, on the rows of W [n, d] whose features (``first_feature`` .. + n) have entries,
    and on those that have momentum.

    v [n, d] is the raw second moment as of ``last_step`` [n] int64, m [n, d] the first as of the step before; ``step``
    counts from 1.  m may be left out at β1 = 0, where it would be the last gradient.  A row without entries has a zero
    gradient, hence, if its m is 0, a zero step; only its v would decay, and that is made up for when it is next touched:
    v ← β2^Δt v.  ``unit_rows``: the gradient's component along the row is removed before, the row renormalised after.
    ``grad_scale`` (0-d, for clipping) multiplies the gradient; ``skip`` (0-d bool) makes the call a no-op.  ``shadow``, of
    ``ops.make_shadow(W)``, is brought up to date with the rows that change.
    """
    torch.ops.sae_fast.weight_step(
        W, v, last_step, m, *gradient.parts(), first_feature, step, lr, beta1, beta2, eps, unit_rows, grad_scale, skip,
        *_parts(shadow),
    )  # fmt: skip


def row_step(
    W: Tensor,
    v: Tensor,
    last_step: Tensor,
    grad: Tensor,
    *,
    m: Tensor | None = None,
    step: int,
    lr: float,
    beta1: float = 0.0,
    beta2: float,
    eps: float,
    unit_rows: bool = False,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    shadow: Shadow | None = None,
) -> None:
    """The step of :func:`weight_step` from a dense gradient [n, d]; every row counts as touched."""
    torch.ops.sae_fast.row_step(
        W, v, last_step, m, grad, step, lr, beta1, beta2, eps, unit_rows, grad_scale, skip, *_parts(shadow)
    )


def _parts(shadow: Shadow | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if shadow is None else (shadow.rows, shadow.norms)


# No defaults: torch 2.11 counts up the version of every mutated argument, and fails over one that a call left out.
@torch.library.custom_op(
    "sae_fast::weight_step",
    mutates_args=("W", "v", "last_step", "m", "shadow_rows", "shadow_norms"),
    schema="(Tensor(a!) W, Tensor(b!) v, Tensor(c!) last_step, Tensor(d!)? m, Tensor colptr, Tensor rows, Tensor perm,"
    " Tensor[] values, Tensor[] A, Tensor? self_coefficient, int first_feature, int step, float lr, float beta1,"
    " float beta2, float eps, bool unit_rows, Tensor? grad_scale, Tensor? skip, Tensor(e!)? shadow_rows,"
    " Tensor(f!)? shadow_norms) -> ()",
)
def _weight_step(
    W, v, last_step, m, colptr, rows, perm, values, A, self_coefficient, first_feature, step, lr, beta1, beta2, eps,
    unit_rows, grad_scale, skip, shadow_rows, shadow_norms,
):  # fmt: skip
    checks.row_gradient(W, colptr, rows, perm, values, A, self_coefficient, first_feature)
    state = Rows(W, v, last_step, checks.shadow(W, shadow_rows, shadow_norms), m)
    adam = Adam(step, lr, beta2, eps, unit_rows, grad_scale, skip, beta1)
    checks.adam_state(state, adam)
    gradient = RowGradient.of(colptr, rows, perm, values, A, self_coefficient)
    dense = crossovers.gpu_rejects(*gradient.sizes())
    body = pick(
        "weight_step",
        {"cpu": _cpu, "cuda": _gpu, "triton": _gpu, "reference": _reference},
        {
            "cpu": cpu_rejects(W, last_step, colptr, rows, perm),
            "cuda": _gpu_rejects(state, colptr, rows, perm) or cuda_rejects("weight_step") or dense,
            "triton": _gpu_rejects(state, colptr, rows, perm) or dense,
        },
    )
    body(state, gradient, adam, first_feature)


@_weight_step.register_fake
def _(*args):
    return None


@torch.library.custom_op(
    "sae_fast::row_step",
    mutates_args=("W", "v", "last_step", "m", "shadow_rows", "shadow_norms"),
    schema="(Tensor(a!) W, Tensor(b!) v, Tensor(c!) last_step, Tensor(d!)? m, Tensor grad, int step, float lr,"
    " float beta1, float beta2, float eps, bool unit_rows, Tensor? grad_scale, Tensor? skip, Tensor(e!)? shadow_rows,"
    " Tensor(f!)? shadow_norms) -> ()",
)
def _row_step(
    W, v, last_step, m, grad, step, lr, beta1, beta2, eps, unit_rows, grad_scale, skip, shadow_rows, shadow_norms
):  # fmt: skip
    checks.shape("W", W, "n", "d")
    checks.shape("grad", grad, *W.shape)
    checks.floating("grad", grad, W, "W")
    state = Rows(W, v, last_step, checks.shadow(W, shadow_rows, shadow_norms), m)
    adam = Adam(step, lr, beta2, eps, unit_rows, grad_scale, skip, beta1)
    checks.adam_state(state, adam)
    rejections = {"cpu": cpu_rejects(W, last_step), "triton": _gpu_rejects(state)}
    body = pick("row_step", {"cpu": _cpu_rows, "triton": _triton_rows, "reference": _reference_rows}, rejections)
    body(state, grad.contiguous(), adam)


@_row_step.register_fake
def _(*args):
    return None


def _gpu_rejects(state: Rows, *indices: Tensor) -> str | None:
    if state.W.dtype != torch.float32:
        return f"W is {state.W.dtype}; the kernels step float32 weights"
    return triton_rejects(state.W, state.last_step, *indices, *(state.shadow or ()))


def _cpu(state: Rows, gradient: RowGradient, adam: Adam, first_feature: int) -> None:
    if adam.skips:
        return
    adam, (n, d) = adam._replace(skip=None), state.W.shape
    if crossovers.is_dense("weight_step", *gradient.sizes()):
        colptr = gradient.csc.colptr.contiguous()
        for first, last in crossovers.chunks(n, gradient.A[0].shape[0] + d):
            at = slice(first, last)
            grad = dense_gradient(state.W[at], gradient.of_rows(at), first_feature + first)
            _cpu_rows(state.at(at), grad, adam, colptr[first_feature + first : first_feature + last + 1])
        return
    gradient = gradient.contiguous()
    _C.weight_step(
        code=gradient.csc.parts(), sources=(gradient.values, gradient.A), d=d, first=first_feature, n=n,
        self_coefficient=gradient.self_coefficient, grad_scale=_scale(adam), adam=_constants(adam), W=state.W, m=state.m,
        v=state.v, last_step=state.last_step, shadow=state.shadow, threads=threads(),
    )  # fmt: skip


def _cpu_rows(state: Rows, grad: Tensor, adam: Adam, colptr: Tensor | None = None) -> None:
    """With colptr [n + 1], rows without entries have no gradient."""
    if adam.skips:
        return
    n, d = state.W.shape
    _C.row_step(
        G=grad, colptr=colptr, d=d, n=n, grad_scale=_scale(adam), adam=_constants(adam), W=state.W, m=state.m,
        v=state.v, last_step=state.last_step, shadow=state.shadow, threads=threads(),
    )  # fmt: skip


def _constants(adam: Adam) -> Any:
    return _C.Adam(
        lr=adam.lr, beta1=adam.beta1, beta2=adam.beta2, eps=adam.eps, step=adam.step, project=adam.unit_rows,
        renormalise=adam.unit_rows,
    )  # fmt: skip


def _scale(adam: Adam) -> float:
    return 1.0 if adam.grad_scale is None else float(adam.grad_scale)


def _gpu(state: Rows, gradient: RowGradient, adam: Adam, first_feature: int) -> None:
    from sae_fast.kernels.weight_step import update_of, weight_step

    followed = state._replace(shadow=None) if adam.unit_rows else state
    weight_step(followed, gradient.contiguous(), update_of(adam, state.W.device), first_feature)
    if followed is not state and state.shadow is not None:
        refresh_shadow(state.W, state.shadow)


def _triton_rows(state: Rows, grad: Tensor, adam: Adam) -> None:
    from sae_fast.kernels.weight_step import row_step, update_of

    followed = state._replace(shadow=None) if adam.unit_rows else state
    row_step(followed, grad, update_of(adam, state.W.device))
    if followed is not state and state.shadow is not None:
        refresh_shadow(state.W, state.shadow)


def dense_gradient(W: Tensor, gradient: RowGradient | Tensor, first_feature: int = 0) -> Tensor:
    """The gradient of W [n, d] or [n], whose rows are the features first_feature .. + n, in its shape; a Tensor is it."""
    if isinstance(gradient, Tensor):
        return gradient
    *arguments, own = gradient.parts()
    grad = torch.ops.sae_fast.outer(*arguments, None, first_feature, W.shape[0]).reshape(W.shape)
    return grad if own is None else grad.add_(own[:, None] * W)


def project_rows(grad: Tensor, W: Tensor) -> Tensor:
    """grad without its component along each row of W."""
    direction = torch.nn.functional.normalize(W, dim=1)
    return grad - (grad * direction).sum(1, keepdim=True) * direction


def _reference(state: Rows, gradient: RowGradient, adam: Adam, first_feature: int) -> None:
    if adam.skips:
        return
    grad = dense_gradient(state.W, gradient, first_feature)
    touched = gradient.csc.colptr[first_feature : first_feature + state.W.shape[0] + 1].diff() > 0
    moving = touched if state.m is None else touched | (state.m != 0).any(1)
    at = moving.nonzero()[:, 0]
    rows = state._replace(shadow=None).at(at)
    _reference_rows(rows, grad[at].masked_fill_(~touched[at, None], 0), adam._replace(skip=None))
    for whole, part in zip(state, rows, strict=True):
        if isinstance(whole, Tensor) and isinstance(part, Tensor):
            whole[at] = part
    if state.shadow is not None:
        refresh_shadow(state.W, state.shadow)


def _reference_rows(state: Rows, grad: Tensor, adam: Adam) -> None:
    if adam.skips:
        return
    (W, v, last_step, shadow, m), (step, lr, beta2, eps, unit_rows, grad_scale, _, beta1) = state, adam
    if grad_scale is not None:
        grad = grad * grad_scale
    if unit_rows:
        grad = project_rows(grad, W)
    v.mul_((beta2 ** (step - last_step).double()).to(v.dtype)[:, None]).addcmul_(grad, grad, value=1 - beta2)
    last_step.fill_(step)
    first = grad if m is None else m.lerp_(grad, 1 - beta1)
    W.addcdiv_(first, (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps), value=-lr / (1 - beta1**step))
    if unit_rows:
        W.copy_(torch.nn.functional.normalize(W, dim=1))
    if shadow is not None:
        refresh_shadow(W, shadow)
