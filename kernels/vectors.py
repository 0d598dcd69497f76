"""The part of a step with one number a feature: sums over its entries, the check that all is finite, the step of vectors.

The check comes before anything changes: what it finds sets the flag, which the launches after it read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import RowGradient, Rows, Transposed
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.flag import not_finite_loss
from sae_fast.kernels.weight_step import Update, adam_change, decay_after, note_visit

VECTORS, WEIGHTS = 4, 2  # that a launch takes


@triton.jit
def _sums(colptr_ptr, perm_ptr, columns_ptr, also_ptr, out_ptr, F, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr):
    f = tl.program_id(0).to(tl.int64)
    end, k = tl.load(colptr_ptr + f + 1), tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS, ENTRIES), tl.float32)
    more = tl.zeros((ENTRIES,), tl.float32)
    for j in range(tl.load(colptr_ptr + f), end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        entry = tl.load(perm_ptr + at, mask=at < end, other=0)
        total += tl.load(columns_ptr + entry[None, :] * COLUMNS + k[:, None], mask=(at < end)[None, :], other=0.0)
        if also_ptr is not None:
            more += tl.load(also_ptr + entry, mask=at < end, other=0.0)
    tl.store(out_ptr + k * F + f, tl.sum(total, axis=1))
    if also_ptr is not None:
        tl.store(out_ptr + COLUMNS * F + f, tl.sum(more, axis=0))


def sums(csc: Transposed, columns: Tensor, also: Tensor | None = None) -> Tensor:
    """[n, F], the sums over each feature's entries of columns [C, n], n a power of two; or with ``also`` [C] [n + 1, F].
    128 lanes take every 128th entry each, in ascending order; then a tree adds up the lanes."""
    (_, n), F = columns.shape, csc.colptr.shape[0] - 1
    out = columns.new_empty(n + (also is not None), F)
    launch(_sums, (F,), csc.colptr, csc.perm, columns, also, out, F, COLUMNS=n, ENTRIES=128, num_warps=1)
    return out


# ---- Before anything changes ------------------------------------------------------------------------------------------


@triton.jit
def _longest(norms_ptr, out_ptr, rows, norm_columns, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    longest = tl.zeros((BLOCK,), tl.float32)
    s = tl.arange(0, SLICES)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        at, inside = norms_ptr + row * norm_columns, row < rows
        mask = inside[:, None] & (1 + 2 * s < norm_columns)[None, :]
        squares = tl.sum(tl.load(at[:, None] + 1 + 2 * s[None, :], mask=mask, other=0.0), axis=1)
        length = tl.sqrt_rn(squares) / tl.load(at, mask=inside, other=1.0)
        longest = tl.maximum(longest, tl.where(length < float("inf"), length, float("inf")))  # a maximum drops NaN
    tl.store(out_ptr, tl.max(longest, axis=0))


@triton.jit
def _sound(a_ptr, n, factor, BLOCK: tl.constexpr):
    """1 if each element of this program's times the factor is a finite float32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < n, other=0.0).to(tl.float64)
    return tl.min((tl.abs(a) * factor < 3.4028235677973366e38).to(tl.int32), axis=0)  # 0 of a NaN


@triton.jit
def _check(
    encoder_ptr, decoder_ptr, decoder2_ptr, own_ptr, vector0_ptr, vector1_ptr, vector2_ptr, vector3_ptr, losses_ptr,
    longest_ptr, flag_ptr, C, F, n0, n1, n2, n3, rows, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    first, second, third = tl.load(losses_ptr), tl.load(losses_ptr + 1), tl.load(losses_ptr + 2)
    residual = tl.sqrt(tl.maximum(first, third).to(tl.float64) * rows)  # no row is longer
    sound = tl.min((tl.abs(first) + tl.abs(second) + tl.abs(third) < 3.4028235677973366e38).to(tl.int32)[None], axis=0)
    if which == 0:
        sound &= _sound(encoder_ptr, C, tl.load(longest_ptr).to(tl.float64) * rows, BLOCK)
    if which == 1:
        sound &= _sound(decoder_ptr, C, residual * rows, BLOCK)
    if decoder2_ptr is not None and which == 2:
        sound &= _sound(decoder2_ptr, C, residual * rows, BLOCK)
    if own_ptr is not None and which == 3:
        sound &= _sound(own_ptr, F, 1.0, BLOCK)
    if vector0_ptr is not None and which == 4:
        sound &= _sound(vector0_ptr, n0, 1.0, BLOCK)
    if vector1_ptr is not None and which == 5:
        sound &= _sound(vector1_ptr, n1, 1.0, BLOCK)
    if vector2_ptr is not None and which == 6:
        sound &= _sound(vector2_ptr, n2, 1.0, BLOCK)
    if vector3_ptr is not None and which == 7:
        sound &= _sound(vector3_ptr, n3, 1.0, BLOCK)
    tl.atomic_or(flag_ptr, not_finite_loss, mask=sound == 0)


def check_finite(losses: Tensor, norms: Tensor, by_name: Mapping[str, RowGradient | Tensor], flag: Tensor) -> None:
    """Sets NOT_FINITE_LOSS in ``flag`` (int32) unless losses [3] and the gradients by name are finite: of up to four
    vectors each element, of W_enc and W_dec a bound.  No element of a weight's gradient is larger than the batch times the
    largest value times the longest row: norms [B, 1 + 2·S] are those of the encoder's (round.py), and the losses are means
    of the decoder's."""
    encoder, decoder = (g for g in by_name.values() if isinstance(g, RowGradient))
    vectors = [g for g in by_name.values() if isinstance(g, Tensor)]
    longest = torch.empty((), dtype=torch.float32, device=flag.device)
    (rows, columns), C = norms.shape, encoder.csc.rows.shape[0]
    slices = triton.next_power_of_2(columns // 2)
    launch(_longest, (1,), norms, longest, rows, columns, SLICES=slices, BLOCK=max(1, 1024 // slices), num_warps=8)
    own, (first, second, *_) = decoder.self_coefficient, (*decoder.values, None)
    given = [*vectors, *(VECTORS - len(vectors)) * [None]]
    sizes = [0 if v is None else v.shape[0] for v in given]
    F = encoder.csc.colptr.shape[0] - 1
    launch(
        _check, (cdiv(max(C, F, *sizes), 1024), 4 + VECTORS), encoder.values[0], first, second, own, *given, losses,
        longest, flag, C, F, *sizes, float(rows), BLOCK=1024, num_warps=4,
    )  # fmt: skip


# ---- The step --------------------------------------------------------------------------------------------------------


@triton.jit
def _vector(W_ptr, m_ptr, v_ptr, last_step_ptr, grad_ptr, n, i, constants_ptr, step, scale_ptr):
    inside = i < n
    g = tl.load(grad_ptr + i, mask=inside, other=0.0)
    if scale_ptr is not None:
        g *= tl.load(scale_ptr).to(tl.float32)
    decay = decay_after(step - tl.load(last_step_ptr + i, mask=inside, other=0), constants_ptr)
    change = adam_change(g, m_ptr, v_ptr, i, inside, decay, constants_ptr)
    tl.store(W_ptr + i, tl.load(W_ptr + i, mask=inside, other=0.0) - change, mask=inside)
    tl.store(last_step_ptr + i, (i * 0 + step).to(tl.int64), mask=inside)


@triton.jit
def _advance_all(
    W0, m0, v0, last0, g0, n0, W1, m1, v1, last1, g1, n1, W2, m2, v2, last2, g2, n2, W3, m3, v3, last3, g3, n3,
    last4, decay4, m4, d4, colptr4, n4, last5, decay5, m5, d5, colptr5, n5,
    constants_ptr, step_ptr, scale_ptr, skip_ptr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if skip_ptr is not None and tl.load(skip_ptr) != 0:
        return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which, step = tl.program_id(1), tl.load(step_ptr)
    if W0 is not None and which == 0:
        _vector(W0, m0, v0, last0, g0, n0, i, constants_ptr, step, scale_ptr)
    if W1 is not None and which == 1:
        _vector(W1, m1, v1, last1, g1, n1, i, constants_ptr, step, scale_ptr)
    if W2 is not None and which == 2:
        _vector(W2, m2, v2, last2, g2, n2, i, constants_ptr, step, scale_ptr)
    if W3 is not None and which == 3:
        _vector(W3, m3, v3, last3, g3, n3, i, constants_ptr, step, scale_ptr)
    if last4 is not None and which == 4:
        note_visit(last4, decay4, colptr4, m4, i, n4, d4, constants_ptr, step, COLUMNS)
    if last5 is not None and which == 5:
        note_visit(last5, decay5, colptr5, m5, i, n5, d5, constants_ptr, step, COLUMNS)


def step_vectors(vectors: list[tuple[Rows, Tensor]], weights: list[tuple[Rows, Tensor]], update: Update) -> list[Tensor]:
    """Steps up to four vectors [n], each with its gradient, all of whose elements move; and notes the visits of up to two
    weights [F, d], each with its entries' colptr [F + 1], whose decays [F] are returned: what weight_step takes."""
    if not vectors and not weights:
        return []
    decays = [torch.empty_like(rows.last_step, dtype=torch.float32) for rows, _ in weights]
    with_m = [rows.W.shape[1] for rows, _ in weights if rows.m is not None]
    columns = min(64, triton.next_power_of_2(max([1, *with_m])))
    block = max(32, 256 // columns)
    given: list[tuple] = [(r.W, r.m, r.v, r.last_step, g, g.shape[0]) for r, g in vectors]
    given += (VECTORS - len(vectors)) * [(*5 * [None], 0)]
    visits: list[tuple] = [
        (r.last_step, decay, r.m, r.W.shape[1], colptr, r.W.shape[0])
        for (r, colptr), decay in zip(weights, decays, strict=True)
    ]
    visits += (WEIGHTS - len(weights)) * [(None, None, None, 0, None, 0)]
    longest = max([rows.W.shape[0] for rows, _ in (*vectors, *weights)])
    launch(
        _advance_all, (cdiv(longest, block), VECTORS + WEIGHTS), *(a for it in (*given, *visits) for a in it),
        *update.adam, update.grad_scale, update.skip, BLOCK=block, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return decays
