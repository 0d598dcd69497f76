"""decode_loss: first a program takes one slice of columns of one example: residuals, then their dots with the decoder rows,
which are still in the cache; then a program sums an example's partial dots and finishes its losses and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.kernels import native
from sae_fast.kernels._activation import pullback_of
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.decode import gather, weighted
from sae_fast.kernels.sampled_dots import row_sums, sum_over_slices


class StepOutputs(NamedTuple):
    """The gradients of each entry that a training step needs, written in the same pass.  Given: the layer and u [C].
    Written: delta [C], the gradient of u; entries [C, 4] = delta and the gradients of bias and of the activation's
    parameters (0 for those that it lacks); decoder [C] = 2 m / N, the weights of the residuals in W_dec's gradient; along
    [C], an entry's part of ⟨that gradient, row⟩, with the second residual's where that has a part in the gradient."""

    layer: Layer
    u: Tensor
    delta: Tensor
    entries: Tensor
    decoder: Tensor
    along: Tensor
    auxiliary: bool


@triton.jit
def _residuals(
    begin_ptr, end_ptr, indices_ptr, values_ptr, W_ptr, b_dec_ptr, target_ptr, residuals_ptr, partials_ptr, squares_ptr,
    rows, slices, d, stride_v, stride_p, stride_s, V: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Slices are the slow axis of the grid: while one is worked on, its part of W stays in the L2 cache.
    b = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    r = tl.zeros((COLUMNS,), tl.float32)
    r_aux = tl.zeros((COLUMNS,), tl.float32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        W = gather(indices_ptr, W_ptr, at, end, columns, d)
        r += weighted(values_ptr, at, end, W)
        if V == 2:
            r_aux += weighted(values_ptr + stride_v, at, end, W)
    constant = tl.load(b_dec_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    constant -= tl.load(target_ptr + b * d + columns, mask=inside, other=0.0).to(tl.float32)
    r += constant
    tl.store(residuals_ptr + b * d + columns, r, mask=inside)
    squares_ptr += (b * slices + s) * 2
    tl.store(squares_ptr + tl.arange(0, 1), row_sums((r * r)[None, :], 1, COLUMNS))
    if V == 2:
        r_aux += constant
        tl.store(residuals_ptr + (rows + b) * d + columns, r_aux, mask=inside)
        tl.store(squares_ptr + 1 + tl.arange(0, 1), row_sums((r_aux * r_aux)[None, :], 1, COLUMNS))
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        W = gather(indices_ptr, W_ptr, at, end, columns, d)
        tl.store(partials_ptr + s * stride_s + at, row_sums(W * r[None, :], ENTRIES, COLUMNS), mask=at < end)
        if V == 2:
            dots = row_sums(W * r_aux[None, :], ENTRIES, COLUMNS)
            tl.store(partials_ptr + stride_p + s * stride_s + at, dots, mask=at < end)


@triton.jit
def _finish(
    begin_ptr, end_ptr, indices_ptr, values_ptr, weight_ptr, partials_ptr, squares_ptr, losses_ptr, grads_ptr,
    u_ptr, first_ptr, second_ptr, delta_ptr, entries_ptr, decoder_ptr, along_ptr, two, one,
    slices, stride_v, stride_g, stride_p, stride_s,
    V: tl.constexpr, KIND: tl.constexpr, AUXILIARY: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    sparsity = tl.zeros((ENTRIES,), tl.float32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        chosen = at < end
        feature = tl.load(indices_ptr + at, mask=chosen, other=0)
        weight = tl.load(weight_ptr + feature, mask=chosen, other=0.0).to(tl.float32)
        magnitude = tl.load(values_ptr + at, mask=chosen, other=0.0).to(tl.float32)
        g_mag = two * sum_over_slices(partials_ptr + at, stride_s, slices, chosen)
        along = magnitude * g_mag
        if V == 2:
            gate = tl.load(values_ptr + stride_v + at, mask=chosen, other=0.0).to(tl.float32)
            g_mag = tl.where(magnitude == 0, 0.0, g_mag)
            g_gate = two * sum_over_slices(partials_ptr + stride_p + at, stride_s, slices, chosen)
            if AUXILIARY:
                along += gate * g_gate
            g_gate = tl.where(gate == 0, 0.0, g_gate + one * weight)
            sparsity += weight * gate
            tl.store(grads_ptr + stride_g + at, g_gate, mask=chosen)
        else:
            g_mag = tl.where(magnitude == 0, 0.0, g_mag + one * weight)
            g_gate = g_mag
            sparsity += weight * magnitude
        tl.store(grads_ptr + at, g_mag, mask=chosen)
        if delta_ptr is not None:
            u = tl.load(u_ptr + at, mask=chosen, other=0.0).to(tl.float32)
            delta, bias, first, second = pullback_of(KIND, u, g_mag, g_gate, first_ptr, second_ptr, feature, chosen)
            four = tl.join(tl.join(delta, first), tl.join(bias, second))
            tl.store(delta_ptr + at, delta, mask=chosen)
            tl.store(decoder_ptr + at, two * magnitude, mask=chosen)
            tl.store(along_ptr + at, along, mask=chosen)
            at_four = at[:, None] * 4 + tl.arange(0, 4)[None, :]
            tl.store(entries_ptr + at_four, tl.reshape(four, (ENTRIES, 4)), mask=chosen[:, None])
    losses_ptr += b * 3 + tl.arange(0, 1)
    squares_ptr += b * slices * 2 + tl.arange(0, 1)
    always = tl.full((1,), True, tl.int1)
    tl.store(losses_ptr, sum_over_slices(squares_ptr, 2, slices, always))
    tl.store(losses_ptr + 1, row_sums(sparsity[None, :], 1, ENTRIES))
    tl.store(losses_ptr + 2, sum_over_slices(squares_ptr + 1, 2, slices, always) if V == 2 else tl.zeros((1,), tl.float32))


class Outputs(NamedTuple):
    """Written by :func:`decode_loss`: residuals [V, B, d], grads [V, C], and in float32 losses [B, 3], whose sum over rows
    is to be divided by the normaliser."""

    residuals: Tensor
    grads: Tensor
    losses: Tensor

    @classmethod
    def of(cls, values: Tensor, target: Tensor) -> Outputs:
        """Memory for them, for a code's values [V, C]; the target may be in 16 bits."""
        V, (B, d) = values.shape[0], target.shape
        losses = torch.empty(B, 3, dtype=torch.float32, device=target.device)
        return cls(values.new_empty(V, B, d), torch.empty_like(values), losses)


def decode_loss(
    code: tuple[Tensor, Tensor, Tensor, Tensor], W: Tensor, b_dec: Tensor, target: Tensor, sparsity_weight: Tensor,
    normaliser: float, out: Outputs, step: StepOutputs | None = None,
) -> None:  # fmt: skip
    """As ops.decode_loss.  ``code``: begin, end, indices and values [V, C]."""
    c, cuda = config("decode_loss"), native.takes("decode_loss")
    (residuals, grads, losses), (_, _, indices, values) = out, code
    (V, rows, d), capacity = residuals.shape, indices.shape[0]
    slices = cdiv(d, native.module.residual_columns if cuda else c["columns"])
    sizes = (V, slices, capacity), (rows, slices, 2)
    partials, squares = (torch.empty(size, dtype=torch.float32, device=W.device) for size in sizes)
    vectors, kind = ((None, None), 0) if step is None else (step.layer.vector_slots(), step.layer.activation.native)
    u, *written, auxiliary = (*5 * [None], False) if step is None else step[1:]
    if cuda:
        native.call("residuals", W.dtype, target.dtype, V, *code, W, b_dec, target, residuals, partials, squares, rows, d,
                   slices, capacity)  # fmt: skip
        native.call("finish", W.dtype, V, kind, auxiliary, *code, sparsity_weight, partials, squares, losses, grads,
                   u, vectors[0], *written, rows, slices, capacity, float(normaliser))  # fmt: skip
        return
    launch(
        _residuals, (rows, slices), *code, W, b_dec, target, residuals, partials, squares, rows,
        slices, d, values.stride(0), *partials.stride()[:2], V=V, ENTRIES=c["entries"], COLUMNS=c["columns"],
        num_warps=max(1, c["columns"] // 256),  # a dot within a warp: no barrier
    )  # fmt: skip
    launch(
        _finish, (rows,), *code, sparsity_weight, partials, squares, losses, grads,
        u, *vectors, *written, 2.0 / normaliser, 1.0 / normaliser, slices, values.stride(0), grads.stride(0),
        *partials.stride()[:2], V=V, KIND=kind, AUXILIARY=auxiliary, ENTRIES=c["finish"],
        num_warps=1,
    )  # fmt: skip
