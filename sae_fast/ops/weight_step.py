"""weight_step: outer ∘ projection ∘ Adam (β1 = 0) ∘ renormalisation in one visit of each touched weight row; and row_step,
the same from a gradient that is already dense.

Body ``cpu``: a thread owns a feature; above the crossover density feature chunks are multiplied densely, then stepped.
``cuda`` (not of row_step), ``triton``: a block or a program owns a slice of a row, or all of a unit row.  ``reference``:
dense, plain PyTorch.
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
    torch.ops.sae_fast.weight_step(
        W, v, last_step, *gradient.parts(), first_feature, step, lr, beta2, eps, unit_rows, grad_scale, skip,
        *_parts(shadow),
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
    state = Rows(W, v, last_step, checks.shadow(W, shadow_rows, shadow_norms))
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
    body(state, gradient, Adam(step, lr, beta2, eps, unit_rows, grad_scale, skip), first_feature)


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
    W, v, last_step, grad, step, lr, beta2, eps, unit_rows, grad_scale, skip, shadow_rows, shadow_norms
):  # fmt: skip
    checks.shape("W", W, "n", "d")
    checks.shape("grad", grad, *W.shape)
    checks.floating("grad", grad, W, "W")
    checks.adam_state(W, v, last_step, step, lr, beta2, eps, grad_scale, skip)
    state = Rows(W, v, last_step, checks.shadow(W, shadow_rows, shadow_norms))
    rejections = {"cpu": cpu_rejects(W, last_step), "triton": _gpu_rejects(state)}
    body = pick("row_step", {"cpu": _cpu_rows, "triton": _triton_rows, "reference": _reference_rows}, rejections)
    body(state, grad.contiguous(), Adam(step, lr, beta2, eps, unit_rows, grad_scale, skip))


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
        self_coefficient=gradient.self_coefficient, grad_scale=_scale(adam), adam=_constants(adam), W=state.W, v=state.v,
        last_step=state.last_step, shadow=state.shadow, threads=threads(),
    )  # fmt: skip


def _cpu_rows(state: Rows, grad: Tensor, adam: Adam, colptr: Tensor | None = None) -> None:
    """With colptr [n + 1], rows without entries are left alone."""
    if adam.skips:
        return
    n, d = state.W.shape
    _C.row_step(
        G=grad, colptr=colptr, d=d, n=n, grad_scale=_scale(adam), adam=_constants(adam), W=state.W, v=state.v,
        last_step=state.last_step, shadow=state.shadow, threads=threads(),
    )  # fmt: skip


def _constants(adam: Adam) -> Any:
    return _C.Adam(
        lr=adam.lr, beta2=adam.beta2, eps=adam.eps, step=adam.step, project=adam.unit_rows, renormalise=adam.unit_rows
    )


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


def dense_gradient(W: Tensor, gradient: RowGradient, first_feature: int) -> Tensor:
    """The gradient [n, d] of the rows of W, which are the features first_feature .. + n."""
    *arguments, own = gradient.parts()
    grad = torch.ops.sae_fast.outer(*arguments, None, first_feature, W.shape[0])
    return grad if own is None else grad + own[:, None] * W


def project_rows(grad: Tensor, W: Tensor) -> Tensor:
    """grad without its component along each row of W."""
    direction = torch.nn.functional.normalize(W, dim=1)
    return grad - (grad * direction).sum(1, keepdim=True) * direction


def _reference(state: Rows, gradient: RowGradient, adam: Adam, first_feature: int) -> None:
    if adam.skips:
        return
    grad = dense_gradient(state.W, gradient, first_feature)
    entries = gradient.csc.colptr[first_feature : first_feature + state.W.shape[0] + 1].diff()
    at = entries.nonzero()[:, 0]
    touched = Rows(state.W[at], state.v[at], state.last_step[at])
    _reference_rows(touched, grad[at], adam._replace(skip=None))
    for whole, part in zip(state[:3], touched[:3], strict=True):
        whole[at] = part
    if state.shadow is not None:
        refresh_shadow(state.W, state.shadow)


def _reference_rows(state: Rows, grad: Tensor, adam: Adam) -> None:
    if adam.skips:
        return
    (W, v, last_step, shadow), (step, lr, beta2, eps, unit_rows, grad_scale, _) = state, adam
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
