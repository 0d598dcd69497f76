"""decode_loss: decode ∘ loss ∘ sampled_dots, fused.

Body ``cpu``: one visit of each example; above the crossover density dense row chunks.  ``triton``: one visit of each slice
of an example.  ``reference``: dense.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast.code import SparseCode, row_ids
from sae_fast.ops import autograd, checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, contiguous, threads


class DecodeLoss(NamedTuple):
    """losses [3]: reconstruction, sparsity, auxiliary.  residual [B, d]: r = x̂ − target; residual_aux: x̂_aux − target, or
    [0, d] without gates.  grads [V, nnz]: the gradient of the losses' sum with respect to the code's values."""

    losses: Tensor
    residual: Tensor
    residual_aux: Tensor
    grads: Tensor


def decode_loss(
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    sparsity_weight: Tensor,
    normaliser: float,
    stop_auxiliary: bool = True,
) -> DecodeLoss:
    """The losses of equation (8) on a code, and what their gradients need (MATH.md §2).

    With N = ``normaliser`` (the batch size, for means) and the code's magnitudes m and gates g:
      x̂ = m W_dec + b_dec,  reconstruction = ‖x̂ − target‖² / N
      two value sets:  sparsity = Σ weight_i g_i / N,  x̂_aux = g W_dec + b_dec,  auxiliary = ‖x̂_aux − target‖² / N,
                       grads = (2 r·d_i / N where m ≠ 0,  (2 r_aux·d_i + weight_i) / N where g ≠ 0)
      one value set:   sparsity = Σ weight_i m_i / N,  auxiliary = 0,  grads = ((2 r·d_i + weight_i) / N where m ≠ 0)
    W_dec [F, d_out], b_dec [d_out], target [B, d_out] (x, or a transcoder's output), sparsity_weight [F] (λ, or λ‖d_i‖).
    An entry whose value is 0 gets gradient 0, that of the ReLU behind it; a straight-through window takes decode and
    sampled_dots instead.
    ``losses`` is differentiable with respect to the values, W_dec, b_dec, target and sparsity_weight; ``stop_auxiliary``
    keeps the auxiliary term's gradient from W_dec and b_dec.  The other outputs are constants to autograd.
    """
    checks.shape("W_dec", W_dec, code.d_sae, "d_out")
    return DecodeLoss(
        *autograd.call(
            "decode_loss",
            code.indptr,
            code.indices,
            code.values,
            W_dec,
            b_dec,
            target,
            sparsity_weight,
            float(normaliser),
            stop_auxiliary,
        )
    )


# The normaliser is a Scalar: a float would tie a compiled graph to one batch size.
@torch.library.custom_op(
    "sae_fast::decode_loss",
    mutates_args=(),
    schema="(Tensor indptr, Tensor indices, Tensor values, Tensor W_dec, Tensor b_dec, Tensor target,"
    " Tensor sparsity_weight, Scalar normaliser, bool stop_auxiliary)"
    " -> (Tensor losses, Tensor residual, Tensor residual_aux, Tensor grads)",
)
def _decode_loss(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser, stop_auxiliary):
    checks.shape("W_dec", W_dec, "F", "d_out")
    checks.csr(indptr, indices, W_dec.shape[0])
    features, d = W_dec.shape
    checks.shape("values", values, "V", indices.shape[0])
    if values.shape[0] not in (1, 2):
        raise ValueError(f"values: got {values.shape[0]} value sets, want 1 (magnitudes) or 2 (magnitudes, gates)")
    checks.shape("b_dec", b_dec, d)
    checks.shape("target", target, indptr.shape[0] - 1, d)
    checks.shape("sparsity_weight", sparsity_weight, features)
    tensors = {"values": values, "b_dec": b_dec, "target": target, "sparsity_weight": sparsity_weight}
    for name, tensor in tensors.items():
        checks.floating(name, tensor, W_dec, "W_dec")
    if not normaliser > 0:
        raise ValueError(f"normaliser: got {normaliser}, want a positive number such as the batch size")
    inputs = (W_dec, indptr, indices)
    dense = crossovers.gpu_rejects(indices.shape[0], target.shape[0], features)
    body = pick(
        "decode_loss",
        {"cpu": _cpu, "cuda": _gpu, "triton": _gpu, "reference": _reference},
        {
            "cpu": cpu_rejects(*inputs),
            "cuda": cuda_rejects("decode_loss", *inputs) or dense,
            "triton": triton_rejects(*inputs) or dense,
        },
    )
    return body(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser)


@_decode_loss.register_fake
def _(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser, stop_auxiliary):
    rows = target.shape[0] if values.shape[0] == 2 else 0
    return (
        target.new_empty(3),
        torch.empty_like(target, memory_format=torch.contiguous_format),
        target.new_empty(rows, target.shape[1]),
        torch.empty_like(values, memory_format=torch.contiguous_format),
    )


def _cpu(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser):
    indptr, indices, values, W_dec, b_dec, target, sparsity_weight = contiguous(
        indptr, indices, values, W_dec, b_dec, target, sparsity_weight
    )
    (rows, d), nnz, V = target.shape, indices.shape[0], values.shape[0]
    if crossovers.is_dense("decode_loss", nnz, rows, W_dec.shape[0]):
        return _cpu_dense(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser)
    residual, residual_aux = target.new_empty(rows, d), target.new_empty(rows if V == 2 else 0, d)
    losses, grads = target.new_empty(rows, 3), torch.empty_like(values)
    if nnz == 0:  # torch gives an empty tensor the address 0, which would read as "no gates"
        values = values.new_empty(V, 1)
    gates = values[1] if V == 2 else None
    _C.decode_loss(
        code=(indptr, indices), nnz=nnz, magnitudes=values[0], gates=gates, W=W_dec, b_dec=b_dec, target=target,
        sparsity_weight=sparsity_weight, normaliser=normaliser, d=d, residual=residual, residual_aux=residual_aux,
        losses=losses, grads=grads, threads=threads(),
    )  # fmt: skip
    return losses.sum(0, dtype=torch.float64).div_(normaliser).float(), residual, residual_aux, grads


def _cpu_dense(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser):
    rows, features = target.shape[0], W_dec.shape[0]
    residuals = target.new_empty(values.shape[0], *target.shape)
    grads = torch.empty_like(values)
    for first, last in crossovers.chunks(rows, features):
        block = target.new_empty(last - first, features)
        for v, (residual, grad) in enumerate(zip(residuals, grads, strict=True)):
            crossovers.scatter(indptr, indices, None, first, last, values[v], block)
            torch.addmm(b_dec - target[first:last], block, W_dec, out=residual[first:last])
            torch.mm(residual[first:last], W_dec.T, out=block)
            crossovers.gather(indptr, indices, first, last, block, grad)
    return _finish(indices, values, residuals, grads, sparsity_weight, normaliser)


def _gpu(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser):
    from sae_fast.kernels import decode_loss as kernel

    indptr, indices, values, W_dec, b_dec, target, sparsity_weight = contiguous(
        indptr, indices, values, W_dec, b_dec, target, sparsity_weight
    )
    code, out = (indptr[:-1], indptr[1:], indices, values), kernel.Outputs.of(values, target)
    kernel.decode_loss(code, W_dec, b_dec, target, sparsity_weight, normaliser, out)
    losses = out.losses.sum(0, dtype=torch.float64).div_(normaliser).to(target.dtype)
    return losses, *_split(out.residuals), out.grads


def _reference(indptr, indices, values, W_dec, b_dec, target, sparsity_weight, normaliser):
    f = torch.stack([crossovers.to_dense(indptr, indices, v, W_dec.shape[0]) for v in values])
    residuals = f @ W_dec + b_dec - target
    rows = row_ids(indptr, indices.shape[0])
    grads = (residuals @ W_dec.T)[:, rows, indices.long()]
    return _finish(indices, values, residuals, grads, sparsity_weight, normaliser)


def _finish(indices, values, residuals, grads, sparsity_weight, normaliser):
    """The losses, and the value gradients from the dots r·d_i."""
    weight = sparsity_weight[indices.long()]
    grads = grads * (2 / normaliser)
    grads[-1] += weight / normaliser
    grads = torch.where(values != 0, grads, 0)
    squares = residuals.pow(2).sum((1, 2), dtype=torch.float64)
    auxiliary = squares[1] if values.shape[0] == 2 else squares.new_zeros(())
    sparsity = (weight * values[-1]).sum(dtype=torch.float64)
    losses = (torch.stack([squares[0], sparsity, auxiliary]) / normaliser).to(residuals.dtype)
    return losses, *_split(residuals), grads


def _split(residuals):
    """The residuals [V, B, d] in tensors of their own, as an op must return them."""
    residual_aux = residuals[1].clone() if residuals.shape[0] == 2 else residuals.new_empty(0, residuals.shape[2])
    return residuals[0].clone(), residual_aux
