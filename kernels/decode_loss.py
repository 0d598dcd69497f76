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
from sae_fast.kernels._penalty import estimate, of_entries, of_row
from sae_fast.kernels.decode import gather, weighted
from sae_fast.kernels.sampled_dots import row_sums, sum_over_slices
from sae_fast.penalty import LINEAR, Penalty


class StepOutputs(NamedTuple):
    """The gradients of each entry that a training step needs, written in the same pass.  Given: the layer and u [C]; its
    penalty, of coefficient 0-d; l0 [B] int32, or 0-d of the batch, for a penalty on it.
    Written: delta [C], the gradient of u; entries [C, 4] = delta and the gradients of bias and of the activation's
    parameters (0 for those that it lacks); decoder [C] = 2 m / N, the weights of the residuals in W_dec's gradient; along
    [C], an entry's part of ⟨that gradient, row⟩, with the second residual's where that has a part in the gradient; norms
    [C], if there are any, a Pull's."""

    layer: Layer
    u: Tensor
    penalty: Penalty
    coefficient: Tensor
    delta: Tensor
    entries: Tensor
    decoder: Tensor
    along: Tensor
    auxiliary: bool
    l0: Tensor | None = None
    norms: Tensor | None = None


class Ends(NamedTuple):
    """The prefixes of features: their ends [G] int64, ascending, the last F, and what each one's square costs [G]."""

    ends: Tensor
    costs: Tensor


@triton.jit
def _add_entries(
    r, r_aux, indices_ptr, values_ptr, W_ptr, begin, end, columns, d, stride_v, V: tl.constexpr, ENTRIES: tl.constexpr
):
    """The sums of both value sets [COLUMNS] and the entries begin .. end of a row."""
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        W = gather(indices_ptr, W_ptr, at, end, columns, d)
        r += weighted(values_ptr, at, end, W)
        if V == 2:
            r_aux += weighted(values_ptr + stride_v, at, end, W)
    return r, r_aux


@triton.jit
def _dot_entries(
    r, r_aux, indices_ptr, W_ptr, partials_ptr, begin, end, columns, d, stride_p, V: tl.constexpr, ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the dots of the entries begin .. end of a row with both residuals [COLUMNS]."""
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        W = gather(indices_ptr, W_ptr, at, end, columns, d)
        tl.store(partials_ptr + at, row_sums(W * r[None, :], ENTRIES, COLUMNS), mask=at < end)
        if V == 2:
            tl.store(partials_ptr + stride_p + at, row_sums(W * r_aux[None, :], ENTRIES, COLUMNS), mask=at < end)


@triton.jit
def _constant(b_dec_ptr, target_ptr, columns, inside):
    """[COLUMNS]: b_dec − the target."""
    constant = tl.load(b_dec_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return constant - tl.load(target_ptr + columns, mask=inside, other=0.0).to(tl.float32)


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
    r, r_aux = _add_entries(r, r_aux, indices_ptr, values_ptr, W_ptr, begin, end, columns, d, stride_v, V, ENTRIES)
    constant = _constant(b_dec_ptr, target_ptr + b * d, columns, inside)
    r += constant
    tl.store(residuals_ptr + b * d + columns, r, mask=inside)
    squares_ptr += (b * slices + s) * 2
    tl.store(squares_ptr + tl.arange(0, 1), row_sums((r * r)[None, :], 1, COLUMNS))
    if V == 2:
        r_aux += constant
        tl.store(residuals_ptr + (rows + b) * d + columns, r_aux, mask=inside)
        tl.store(squares_ptr + 1 + tl.arange(0, 1), row_sums((r_aux * r_aux)[None, :], 1, COLUMNS))
    partials_ptr += s * stride_s
    _dot_entries(r, r_aux, indices_ptr, W_ptr, partials_ptr, begin, end, columns, d, stride_p, V, ENTRIES, COLUMNS)


@triton.jit
def _border(indices_ptr, begin, end, bound):
    """The first of a row's entries begin .. end, whose features ascend, that is not below ``bound``."""
    below = begin
    for j in range(begin, end, 128):
        at = j + tl.arange(0, 128)
        feature = tl.load(indices_ptr + at, mask=at < end, other=2**31 - 1)
        below += tl.sum((feature < bound).to(tl.int32), axis=0)
    return below


@triton.jit
def _prefix_residuals(
    begin_ptr, end_ptr, indices_ptr, values_ptr, W_ptr, b_dec_ptr, target_ptr, residuals_ptr, partials_ptr, squares_ptr,
    ends_ptr, costs_ptr, slices, d, groups, stride_v, stride_r, stride_g, stride_p, stride_s,
    V: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The entries once in their order, for the residual of each prefix; then backwards by groups, with the sum R of the
    # residuals of all prefixes that a group is in.
    b, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    constant = _constant(b_dec_ptr, target_ptr + b * d, columns, inside)
    residuals_ptr += b * d + columns
    partials_ptr += s * stride_s
    r = tl.zeros((COLUMNS,), tl.float32)
    r_aux, square, square_aux = r, tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    first = begin
    for g in range(groups):
        last = _border(indices_ptr, first, end, tl.load(ends_ptr + g))
        r, r_aux = _add_entries(r, r_aux, indices_ptr, values_ptr, W_ptr, first, last, columns, d, stride_v, V, ENTRIES)
        cost, whole = tl.load(costs_ptr + g).to(tl.float32), r + constant
        tl.store(residuals_ptr, whole, mask=inside)
        square += cost * row_sums(tl.where(inside, whole * whole, 0.0)[None, :], 1, COLUMNS)
        if V == 2:
            whole = r_aux + constant
            tl.store(residuals_ptr + stride_r, whole, mask=inside)
            square_aux += cost * row_sums(tl.where(inside, whole * whole, 0.0)[None, :], 1, COLUMNS)
        first = last
        residuals_ptr += stride_g
    squares_ptr += (b * slices + s) * 2 + tl.arange(0, 1)
    tl.store(squares_ptr, square)
    if V == 2:
        tl.store(squares_ptr + 1, square_aux)
    tl.debug_barrier()  # what is read again may have been written by another thread
    r = tl.zeros((COLUMNS,), tl.float32)
    r_aux, last = r, end
    for k in range(groups):
        g = groups - 1 - k
        first = begin
        if g > 0:
            first = _border(indices_ptr, begin, last, tl.load(ends_ptr + g - 1))
        residuals_ptr -= stride_g
        cost = tl.load(costs_ptr + g).to(tl.float32)
        r += cost * tl.load(residuals_ptr, mask=inside, other=0.0).to(tl.float32)
        tl.store(residuals_ptr, r, mask=inside)
        if V == 2:
            r_aux += cost * tl.load(residuals_ptr + stride_r, mask=inside, other=0.0).to(tl.float32)
            tl.store(residuals_ptr + stride_r, r_aux, mask=inside)
        _dot_entries(r, r_aux, indices_ptr, W_ptr, partials_ptr, first, last, columns, d, stride_p, V, ENTRIES, COLUMNS)
        last = first


@triton.jit
def _finish(
    begin_ptr, end_ptr, indices_ptr, values_ptr, cost_ptr, partials_ptr, squares_ptr, losses_ptr, grads_ptr,
    u_ptr, bias_ptr, first_ptr, second_ptr, coefficient_ptr, l0_ptr, delta_ptr, entries_ptr, decoder_ptr, along_ptr,
    norms_ptr, two, one, number, bandwidth, slices, stride_v, stride_g, stride_p, stride_s,
    V: tl.constexpr, KIND: tl.constexpr, AUXILIARY: tl.constexpr, PENALTY: tl.constexpr, WINDOW: tl.constexpr,
    ZEROS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    c = 1.0 if coefficient_ptr is None else tl.load(coefficient_ptr).to(tl.float32)
    penalty, slope = of_row(PENALTY, values_ptr + (V - 1) * stride_v, begin, end, l0_ptr, b, c, number, ENTRIES)
    slope = (slope * one).to(tl.float32)
    sparsity = tl.zeros((ENTRIES,), tl.float32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        chosen = at < end
        feature = tl.load(indices_ptr + at, mask=chosen, other=0)
        norm = 1.0 if cost_ptr is None else tl.load(cost_ptr + feature, mask=chosen, other=0.0).to(tl.float32)
        magnitude = tl.load(values_ptr + at, mask=chosen, other=0.0).to(tl.float32)
        g_mag = two * sum_over_slices(partials_ptr + at, stride_s, slices, chosen)
        along, last, g = magnitude * g_mag, magnitude, g_mag
        if V == 2:
            if not ZEROS:
                g_mag = tl.where(magnitude == 0, 0.0, g_mag)
            last = tl.load(values_ptr + stride_v + at, mask=chosen, other=0.0).to(tl.float32)
            g = two * sum_over_slices(partials_ptr + stride_p + at, stride_s, slices, chosen)
            if AUXILIARY:
                along += last * g
        own, g, of_norm = of_entries(PENALTY, ZEROS, last, g, slope, c, norm, one, number)
        sparsity += own
        if V == 1:
            g_mag = g
        if grads_ptr is not None:
            tl.store(grads_ptr + at, g_mag, mask=chosen)
            if V == 2:
                tl.store(grads_ptr + stride_g + at, g, mask=chosen)
        if norms_ptr is not None:
            tl.store(norms_ptr + at, of_norm, mask=chosen)
        if delta_ptr is not None:
            u = tl.load(u_ptr + at, mask=chosen, other=0.0).to(tl.float32)
            if WINDOW == 0:
                delta, bias, first, second = pullback_of(KIND, u, g_mag, g, first_ptr, second_ptr, feature, chosen)
            else:
                pi = u + tl.load(bias_ptr + feature, mask=chosen, other=0.0)
                threshold = tl.load(first_ptr + feature, mask=chosen, other=0.0)
                delta, first = estimate(WINDOW, PENALTY, pi, threshold, g, slope, bandwidth)
                bias, second = delta, tl.zeros_like(delta)
            four = tl.join(tl.join(delta, first), tl.join(bias, second))
            tl.store(delta_ptr + at, delta, mask=chosen)
            tl.store(decoder_ptr + at, two * magnitude, mask=chosen)
            tl.store(along_ptr + at, along, mask=chosen)
            at_four = at[:, None] * 4 + tl.arange(0, 4)[None, :]
            tl.store(entries_ptr + at_four, tl.reshape(four, (ENTRIES, 4)), mask=chosen[:, None])
    penalty += row_sums(sparsity[None, :], 1, ENTRIES)
    _losses(losses_ptr + b * 3, squares_ptr + b * slices * 2, penalty, slices, V)


@triton.jit
def _losses(losses_ptr, squares_ptr, penalty, slices, V: tl.constexpr):
    """An example's: from the squares of its slices, and its penalty."""
    one, always = tl.arange(0, 1), tl.full((1,), True, tl.int1)
    tl.store(losses_ptr + one, sum_over_slices(squares_ptr + one, 2, slices, always))
    tl.store(losses_ptr + 1 + one, penalty.to(tl.float32))
    auxiliary = sum_over_slices(squares_ptr + 1 + one, 2, slices, always) if V == 2 else tl.zeros((1,), tl.float32)
    tl.store(losses_ptr + 2 + one, auxiliary)


class Outputs(NamedTuple):
    """Written by :func:`decode_loss`: residuals [V, B, d], of prefixes R [V, G, B, d], grads [V, C], and in float32 losses
    [B, 3], whose sum over rows is to be divided by the normaliser."""

    residuals: Tensor
    grads: Tensor
    losses: Tensor

    @classmethod
    def of(cls, values: Tensor, target: Tensor, prefixes: Ends | None = None) -> Outputs:
        """Memory for them, for a code's values [V, C]; the target may be in 16 bits."""
        V, (B, d) = values.shape[0], target.shape
        losses = torch.empty(B, 3, dtype=torch.float32, device=target.device)
        groups = () if prefixes is None else prefixes.ends.shape
        return cls(values.new_empty(V, *groups, B, d), torch.empty_like(values), losses)


def decode_loss(
    code: tuple[Tensor, Tensor, Tensor, Tensor], W: Tensor, b_dec: Tensor, target: Tensor, cost: Tensor | None,
    normaliser: float, out: Outputs, step: StepOutputs | None = None, zeros: bool = False, prefixes: Ends | None = None,
) -> None:  # fmt: skip
    """As ops.decode_loss.  ``code``: begin, end, indices and values [V, C].  ``cost`` [F]: the sparsity weight; in a step
    divided by the coefficient, and None for 1."""
    c, cuda = config("decode_loss"), native.takes("decode_loss") and prefixes is None  # of which there is one in Triton
    (residuals, grads, losses), (_, _, indices, values) = out, code
    (V, *_, rows, d), capacity = residuals.shape, indices.shape[0]
    slices = cdiv(d, native.module.residual_columns if cuda else c["columns"])
    sizes = (V, slices, capacity), (rows, slices, 2)
    partials, squares = (torch.empty(size, dtype=torch.float32, device=W.device) for size in sizes)
    penalty = Penalty(LINEAR) if step is None else step.penalty
    given, written, kind, auxiliary = _of_step(step)
    if cuda:
        native.call("residuals", W.dtype, target.dtype, V, *code, W, b_dec, target, residuals, partials, squares, rows, d,
                   slices, capacity)  # fmt: skip
        native.call("finish", W.dtype, V, kind, auxiliary, zeros, penalty.native, penalty.window, *code, cost, partials,
                   squares, losses, grads, *given, *written, rows, slices, capacity, float(normaliser), penalty.number,
                   penalty.bandwidth)  # fmt: skip
        return
    arguments = *code, W, b_dec, target, residuals, partials, squares
    tile = {"V": V, "ENTRIES": c["entries"], "COLUMNS": c["columns"]}
    tile["num_warps"] = max(1, c["columns"] // 256)  # a dot within a warp: no barrier
    if prefixes is None:
        strides = values.stride(0), *partials.stride()[:2]
        launch(_residuals, (rows, slices), *arguments, rows, slices, d, *strides, **tile)
    else:
        strides = values.stride(0), *residuals.stride()[:2], *partials.stride()[:2]
        groups = prefixes.ends.shape[0]
        launch(_prefix_residuals, (rows, slices), *arguments, *prefixes, slices, d, groups, *strides, **tile)
    launch(
        _finish, (rows,), *code, cost, partials, squares, losses, grads,
        *given, *written, 2.0 / normaliser, 1.0 / normaliser, penalty.number, penalty.bandwidth, slices, values.stride(0),
        grads.stride(0), *partials.stride()[:2], V=V, KIND=kind, AUXILIARY=auxiliary, PENALTY=penalty.native,
        WINDOW=penalty.window, ZEROS=zeros, ENTRIES=c["finish"], num_warps=1,
    )  # fmt: skip


def _of_step(step: StepOutputs | None) -> tuple[tuple, tuple, int, bool]:
    """(what finish is given, what it is to write, the activation's number, whether the second residual counts)."""
    if step is None:
        return 6 * (None,), 5 * (None,), 0, False
    layer = step.layer
    given = step.u, layer.bias, *layer.vector_slots(), step.coefficient, step.l0
    written = step.delta, step.entries, step.decoder, step.along, step.norms
    return given, written, layer.activation.native, step.auxiliary
