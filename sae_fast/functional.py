"""Gradients of the ops, and the losses as differentiable functions of x and of every parameter.

Each backward pass is made of the ops themselves, so it stays sparse and runs on the bodies that hold when it runs.
Formulas: MATH.md §2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import activations
from sae_fast.code import RowGradient, SparseCode, Transposed
from sae_fast.gradients import feature_sums, no_second, outer
from sae_fast.objectives import Objective, of_dialect
from sae_fast.ops.autograd import call, differentiable, function
from sae_fast.ops.decode_loss import decode_loss, prefix_rows
from sae_fast.ops.encode import encode
from sae_fast.ops.weight_step import dense_gradient
from sae_fast.reference import Loss

_ops = torch.ops.sae_fast


def gated_loss(
    x: Tensor,
    W_enc: Tensor,
    b_gate: Tensor,
    b_mag: Tensor,
    r_mag: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_coefficient: float,
    dialect: str = "paper",
    target: Tensor | None = None,
    precision: str = "exact",
    apply_b_dec_to_input: bool = True,
) -> Loss:
    """Equation (8), as :func:`sae_fast.reference.gated_loss`, on the engine.  x [B, d]; ``target`` [B, d] replaces x in
    the errors.  ``precision`` as in ops.encode.  Differentiable with respect to x, target and every parameter."""
    x_c = x - b_dec if apply_b_dec_to_input else x
    objective = of_dialect("gated", l1_coefficient, dialect)
    code = encode(x_c, W_enc, b_gate, activation="gated", r_mag=r_mag, b_mag=b_mag, precision=precision)
    return _loss(code, W_dec, b_dec, x if target is None else target, objective)


def relu_loss(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_coefficient: float,
    dialect: str = "paper",
    target: Tensor | None = None,
    precision: str = "exact",
    apply_b_dec_to_input: bool = True,
) -> Loss:
    """‖x − x̂‖² + λ‖f‖₁, as :func:`sae_fast.reference.relu_loss`, on the engine."""
    objective = of_dialect("relu", l1_coefficient, dialect)
    code = encode(x - b_dec if apply_b_dec_to_input else x, W_enc, b_enc, activation="relu", precision=precision)
    return _loss(code, W_dec, b_dec, x if target is None else target, objective)


def _loss(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, objective: Objective) -> Loss:
    weight, stop = objective.sparsity_weight(W_dec), objective.stops_auxiliary
    losses = decode_loss(code, W_dec, b_dec, target, weight, target.shape[0], stop_auxiliary=stop).losses
    return Loss(losses.sum(), *losses.unbind())


class TakenAlong(NamedTuple):
    """The gradient of a parameter, taken along with a loss: that of the weight [F, d] or vector ``of``, on which it was
    taken; the parameter is that, or, if ``flipped``, its transpose."""

    parameter: Tensor
    gradient: RowGradient | Tensor
    of: Tensor
    flipped: bool = False


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, taken: Sequence[TakenAlong], *parameters: Tensor) -> Tensor:
        ctx.taken = taken
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # torch's error, if one was changed since
        found: list[Tensor | None] = []
        for needed, (_, gradient, of, flipped) in zip(ctx.needs_input_grad[2:], ctx.taken, strict=True):
            dense = dense_gradient(of, gradient) * grad if needed else None
            found.append(dense.T if dense is not None and flipped else dense)
        return None, None, *found


def with_gradients(loss: Tensor, taken: Sequence[TakenAlong]) -> Tensor:
    """A loss, 0-d, whose gradients were taken along; what is dense of them is made in the backward pass."""
    return _WithGradients.apply(loss, taken, *(t.parameter for t in taken))


# ---- encode ---------------------------------------------------------------------------------------------------------


def _encode_setup(ctx, inputs, output):
    x, W_enc, _, first, second, ctx.activation, *_ = inputs
    ctx.save_for_backward(x, W_enc, first, second, *output)


def _encode_backward(ctx, _indptr, _indices, grad_u, grad_values):
    x, W_enc, first, second, indptr, indices, u, values = ctx.saved_tensors
    activation = activations.named(ctx.activation)
    vectors = activation.vectors(dict(zip(activation.parameters, (first, second), strict=False)))
    grads = torch.where(values != 0, grad_values, 0)
    delta, *entries = activation.pullback(u, list(grads), indices.long(), vectors)
    delta = delta + grad_u
    need_x, need_W, *need_parameters = ctx.needs_input_grad[:5]
    csc = None
    if need_W or any(need_parameters):
        csc = Transposed(*_ops.transpose(indptr, indices, W_enc.shape[0]))
    entries += [None] * (len(need_parameters) - len(entries))
    sums = [
        feature_sums(csc, entry, x.shape[0]) if needed and entry is not None else None
        for needed, entry in zip(need_parameters, entries, strict=True)
    ]
    grad_x = call("decode", indptr, indices, delta[None], W_enc, None)[0] if need_x else None
    grad_W = outer(csc, [delta], [x], 0, W_enc.shape[0]) if need_W else None
    return grad_x, grad_W, *sums, *[None] * 8


differentiable("encode", _encode_setup, _encode_backward)


# ---- decode ---------------------------------------------------------------------------------------------------------


def _decode_setup(ctx, inputs, output):
    *tensors, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _decode_backward(ctx, grad):
    indptr, indices, values, W_dec = ctx.saved_tensors
    bounds = [0, W_dec.shape[0]] if ctx.groups is None else ctx.groups
    grad = grad.unsqueeze(1) if ctx.groups is None else grad
    ranges = list(pairwise(bounds))
    grad_values = grad_W = None
    if ctx.needs_input_grad[2]:
        sets = []
        for per_group in grad:
            dots = torch.zeros_like(values[0])
            for (first, last), g in zip(ranges, per_group, strict=True):
                inside = (indices >= first) & (indices < last)
                dots = torch.where(inside, call("sampled_dots", indptr, indices, g, W_dec), dots)
            sets.append(dots)
        grad_values = torch.stack(sets)
    if ctx.needs_input_grad[3]:
        csc = Transposed(*_ops.transpose(indptr, indices, W_dec.shape[0]))
        parts = [W_dec.new_zeros(bounds[0], W_dec.shape[1])]
        for g, (first, last) in enumerate(ranges):
            parts.append(outer(csc, list(values), [s[g] for s in grad], first, last - first))
        parts.append(W_dec.new_zeros(W_dec.shape[0] - bounds[-1], W_dec.shape[1]))
        grad_W = torch.cat(parts)
    return None, None, grad_values, grad_W, None


differentiable("decode", _decode_setup, _decode_backward)


# ---- sampled_dots ---------------------------------------------------------------------------------------------------


def _sampled_dots_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _sampled_dots_backward(ctx, grad):
    indptr, indices, A, W = ctx.saved_tensors
    grad_A = grad_W = None
    if ctx.needs_input_grad[2]:
        grad_A = call("decode", indptr, indices, grad[None], W, None)[0]
    if ctx.needs_input_grad[3]:
        csc = Transposed(*_ops.transpose(indptr, indices, W.shape[0]))
        grad_W = outer(csc, [grad], [A], 0, W.shape[0])
    return None, None, grad_A, grad_W


differentiable("sampled_dots", _sampled_dots_setup, _sampled_dots_backward)


# ---- decode_loss ----------------------------------------------------------------------------------------------------

_LastGradient = function(
    "decode_loss", lambda gradient, *_: gradient.clone(), lambda *_: None, no_second("a loss (sae_fast::decode_loss)")
)


def _decode_loss_setup(ctx, inputs, output):
    indptr, indices, values, W_dec, b_dec, target, weight, ctx.normaliser, ctx.stop_auxiliary, ctx.prefixes, *_ = inputs
    target = target if ctx.needs_input_grad[5] else None
    _, residual, residual_aux, grads = output
    ctx.mark_non_differentiable(residual, residual_aux, grads)
    ctx.save_for_backward(indptr, indices, values, W_dec, b_dec, target, weight, residual, residual_aux, grads)


def _decode_loss_backward(ctx, grad_losses, *_constants):
    indptr, indices, values, W_dec, b_dec, target, weight, residual, residual_aux, grads = ctx.saved_tensors
    rec, sparse, aux = grad_losses.unbind()
    gated, n = values.shape[0] == 2, ctx.normaliser
    need_values, need_W, need_b, need_target, need_weight = ctx.needs_input_grad[2:7]
    grad_values = grad_W = grad_b = grad_target = grad_weight = csc = by_group = None
    if ctx.prefixes is None:
        residual, residual_aux = residual[None], residual_aux[None]  # [G, B, d]
    batch = residual.shape[1]
    if need_W or need_weight:
        csc = by_group = Transposed(*_ops.transpose(indptr, indices, W_dec.shape[0]))
        if ctx.prefixes is not None:
            by_group = prefix_rows(csc, ctx.prefixes, batch)
    if need_values:
        # The forward's grads are those of the plain sum; a caller may weight the three losses differently.
        per_set = torch.stack([rec, aux]) if gated else rec[None]
        penalty = weight[indices.long()] / n * (values[-1] != 0)
        grad_values = grads * per_set[:, None]
        grad_values[-1] += (sparse - per_set[-1]) * penalty
    through_aux = gated and not ctx.stop_auxiliary
    if need_W:
        entries, rows = [values[0] * (2 / n * rec)], [residual.flatten(0, 1)]
        if through_aux:
            entries, rows = [*entries, values[1] * (2 / n * aux)], [*rows, residual_aux.flatten(0, 1)]
        grad_W = outer(by_group, entries, rows, 0, W_dec.shape[0])
    if need_b:
        grad_b = residual[0].sum(0) * (2 / n * rec)
        if through_aux:
            grad_b = grad_b + residual_aux[0].sum(0) * (2 / n * aux)
    if need_target:
        grad_target = residual[0] * (-2 / n * rec)
        if gated:
            grad_target = grad_target - residual_aux[0] * (2 / n * aux)
    if need_weight:
        grad_weight = feature_sums(csc, values[-1] * (sparse / n), batch)
    gradients = [grad_values, grad_W, grad_b, grad_target, grad_weight]
    if torch.is_grad_enabled():  # the graph of this pass would lack what the constants depend on
        on = [t for t in (values, W_dec, b_dec, target, weight) if t is not None]
        gradients = [g if g is None else _LastGradient.apply(g, *on) for g in gradients]
    return None, None, *gradients, *[None] * 5


differentiable("decode_loss", _decode_loss_setup, _decode_loss_backward)


__all__ = ["gated_loss", "relu_loss"]
