"""weight_step: a gradient row, its projection, Adam and renormalisation in one visit of a weight row.

A program takes a slice of 512 columns of one row.  Unit rows need two sums over the row: a program takes all of it; or,
where ⟨gradient, row⟩ is known by entry, wide rows go by slices too, and :func:`_normalise` divides them by their norms.
Before it :func:`_advance` has said whether the row moves and how far its second moment has decayed, and noted the visit.
"""

from __future__ import annotations

from math import log2
from struct import pack, unpack
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import Adam, RowGradient, Rows, Shadow
from sae_fast.kernels import native
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.outer import Runs, gradient_row, outer, partials, project, runs_for, sources, walk
from sae_fast.kernels.round import SLICE


class Constants(NamedTuple):
    """The constants of a step, on the device: a captured graph is replayed with whatever :func:`set_adam` last wrote."""

    constants: Tensor  # float32 [9]: lr / (1 − β1^step), eps, β2, 1 − β2, 1 / √(1 − β2^step), log2 β2 in two, β1, 1 − β1
    step: Tensor  # int64, 0-d


def new_adam(device: torch.device | str) -> Constants:
    return Constants(torch.zeros(9, dtype=torch.float32, device=device), torch.zeros((), dtype=torch.int64, device=device))


@triton.jit(do_not_specialize=["step"])
def _set_adam(constants_ptr, step_ptr, size, eps, beta2, fresh, correction, rate, rate_low, beta1, of_gradient, step):
    tl.store(constants_ptr, size)
    tl.store(constants_ptr + 1, eps)
    tl.store(constants_ptr + 2, beta2)
    tl.store(constants_ptr + 3, fresh)
    tl.store(constants_ptr + 4, correction)
    tl.store(constants_ptr + 5, rate)
    tl.store(constants_ptr + 6, rate_low)
    tl.store(constants_ptr + 7, beta1)
    tl.store(constants_ptr + 8, of_gradient)
    tl.store(step_ptr, step)


def adam_constants(step: int, lr: float, beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    """The values of Constants.constants, computed in double."""
    rate = log2(beta2) if beta2 > 0 else float("-inf")
    (high,) = unpack("f", pack("f", rate))
    size, correction = lr / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5
    low = rate - high if beta2 > 0 else 0.0
    return size, float(eps), float(beta2), 1.0 - beta2, correction, high, low, float(beta1), 1.0 - beta1


def set_adam(adam: Constants, step: int, lr: float, beta1: float, beta2: float, eps: float) -> None:
    """Passed by value: no copy that the host would have to wait for."""
    launch(_set_adam, (1,), *adam, *adam_constants(step, lr, beta1, beta2, eps), step, num_warps=1)


class Update(NamedTuple):
    """A step: Adam's constants, whether rows are held at unit norm, and what else is read on the device.  ``skip`` (0-d,
    bool or integer): nothing happens unless it is 0."""

    adam: Constants
    unit_rows: bool = False
    grad_scale: Tensor | None = None
    skip: Tensor | None = None


def update_of(adam: Adam, device: torch.device) -> Update:
    """The step of Adam's settings."""
    constants = new_adam(device)
    set_adam(constants, adam.step, adam.lr, adam.beta1, adam.beta2, adam.eps)
    scalars = (None if t is None else t.to(device) for t in (adam.grad_scale, adam.skip))
    return Update(constants, adam.unit_rows, *scalars)


@triton.jit
def decay_after(idle, constants_ptr):
    """β2^idle."""
    rate = tl.load(constants_ptr + 5).to(tl.float64) + tl.load(constants_ptr + 6).to(tl.float64)
    return tl.where(idle == 1, tl.load(constants_ptr + 2), tl.exp2(rate * idle.to(tl.float64)).to(tl.float32))


@triton.jit
def note_visit(last_step_ptr, decay_ptr, colptr_ptr, m_ptr, i, n, d, constants_ptr, step, COLUMNS: tl.constexpr):
    """decay [n] of the rows i: what v is to be multiplied with, or −1 for a row that rests."""
    inside = i < n
    rests = i < 0
    if colptr_ptr is not None:
        at = colptr_ptr + i
        rests = inside & (tl.load(at + 1, mask=inside, other=0) == tl.load(at, mask=inside, other=0))
    if m_ptr is not None:
        k = 0
        while (k < d) & (tl.max(rests.to(tl.int32), axis=0) > 0):
            columns = k + tl.arange(0, COLUMNS)
            moment = tl.load(m_ptr + i[:, None] * d + columns[None, :], mask=rests[:, None] & (columns < d), other=0.0)
            rests = rests & (tl.max((moment != 0).to(tl.int32), axis=1) == 0)
            k += COLUMNS
    moves = inside & ~rests
    idle = step - tl.load(last_step_ptr + i, mask=moves, other=0)
    tl.store(decay_ptr + i, tl.where(moves, decay_after(idle, constants_ptr), -1.0), mask=inside)
    tl.store(last_step_ptr + i, (i * 0 + step).to(tl.int64), mask=moves)


@triton.jit
def _advance(
    last_step_ptr, decay_ptr, colptr_ptr, m_ptr, constants_ptr, step_ptr, skip_ptr, n, d, first_feature,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if skip_ptr is not None and tl.load(skip_ptr) != 0:
        return
    if colptr_ptr is not None:
        colptr_ptr += first_feature
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    note_visit(last_step_ptr, decay_ptr, colptr_ptr, m_ptr, i, n, d, constants_ptr, tl.load(step_ptr), COLUMNS)


@triton.jit
def _along(f, colptr_ptr, perm_ptr, along_ptr, BLOCK: tl.constexpr):
    """⟨gradient, row⟩ of feature f, from its entries."""
    end = tl.load(colptr_ptr + f + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(tl.load(colptr_ptr + f), end, BLOCK):
        at = j + tl.arange(0, BLOCK)
        entry = tl.load(perm_ptr + at, mask=at < end, other=0)
        total += tl.load(along_ptr + entry, mask=at < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _lerp(m, g, constants_ptr):
    """The first moment, from the nearer end, as torch's lerp; below the normal numbers 0, or a row that rests would never
    be left alone."""
    near = tl.load(constants_ptr + 7) > 0.5
    part = tl.load(constants_ptr + tl.where(near, 8, 7))
    start = tl.where(near, m, g)
    first = start + part * (tl.where(near, g, m) - start)
    return tl.where(tl.abs(first) < 2.0**-126, 0.0, first)


@triton.jit
def adam_change(g, m_ptr, v_ptr, at, inside, decay, constants_ptr):
    """The change of the elements ``at`` by a gradient g; their moments are brought up to date."""
    size, eps = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    fresh, correction = tl.load(constants_ptr + 3), tl.load(constants_ptr + 4)
    v = decay * tl.load(v_ptr + at, mask=inside, other=0.0) + fresh * g * g
    tl.store(v_ptr + at, v, mask=inside)
    if m_ptr is not None:
        g = _lerp(tl.load(m_ptr + at, mask=inside, other=0.0), g, constants_ptr)
        tl.store(m_ptr + at, g, mask=inside)
    return tl.div_rn(size * g, tl.sqrt_rn(v) * correction + eps)


@triton.jit
def _follow(W, i, columns, live, inside, shadow_ptr, norms_ptr, K, norm_columns):
    """Rounds a slice of the rows i for their Shadow, and sums the squares of what it holds and of what rounding took."""
    scaled = W * tl.load(norms_ptr + i * norm_columns, mask=live, other=0.0)
    rounded = scaled.to(tl.float16)
    tl.store(shadow_ptr + i * K + columns, rounded, mask=inside)
    lost = scaled - rounded.to(tl.float32)
    slot = norms_ptr + i * norm_columns + 1 + 2 * tl.program_id(1)
    tl.store(slot, tl.sum(scaled * scaled, axis=1, keep_dims=True), mask=live)
    tl.store(slot + 1, tl.sum(lost * lost, axis=1, keep_dims=True), mask=live)


@triton.jit
def _step(
    W_ptr, m_ptr, v_ptr, decay_ptr, grad_ptr, colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr,
    first_ptr, partials_ptr, own_ptr, constants_ptr, scale_ptr, skip_ptr, shadow_ptr, norms_ptr, along_ptr, squares_ptr,
    n, d, first_feature, K, norm_columns,
    UNIT: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if skip_ptr is not None and tl.load(skip_ptr) != 0:
        return
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if grad_ptr is None:  # one row, from its entries
        if tl.load(decay_ptr + tl.program_id(0)) < 0:
            return
        f = first_feature + tl.program_id(0).to(tl.int64)
        g = gradient_row(
            f, colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, first_ptr, partials_ptr, d, columns,
            ENTRIES, COLUMNS,
        )[None, :]  # fmt: skip
    decay = tl.load(decay_ptr + i, mask=i < n, other=-1.0)
    live = decay >= 0
    touched = live
    if colptr_ptr is not None:
        at = colptr_ptr + first_feature + i
        touched = live & (tl.load(at + 1, mask=live, other=0) > tl.load(at, mask=live, other=0))
    element, inside = i * d + columns[None, :], live & (columns < d)[None, :]
    if grad_ptr is not None:
        g = tl.load(grad_ptr + element, mask=inside & touched, other=0.0).to(tl.float32)
    W = tl.load(W_ptr + element, mask=inside, other=0.0)
    if own_ptr is not None:
        g += tl.load(own_ptr + i, mask=touched, other=0.0).to(tl.float32) * W
    if along_ptr is not None:
        g -= _along(f, colptr_ptr, perm_ptr, along_ptr, 32 * ENTRIES) * W
    if scale_ptr is not None:
        g *= tl.load(scale_ptr).to(tl.float32)
    if UNIT:
        g = project(g, W, 1)

    W = tl.where(inside, W - adam_change(g, m_ptr, v_ptr, element, inside, decay, constants_ptr), 0.0)
    if UNIT:
        norm2 = tl.sum(W * W, axis=1, keep_dims=True)
        W *= tl.where(norm2 > 0, tl.div_rn(1.0, tl.sqrt_rn(norm2)), 1.0)
    tl.store(W_ptr + element, W, mask=inside)
    if squares_ptr is not None:
        square = tl.sum(W * W, axis=1, keep_dims=True)
        tl.store(squares_ptr + i * tl.num_programs(1) + tl.program_id(1), square, mask=live)

    if shadow_ptr is not None:
        _follow(W, i, columns[None, :], live, inside, shadow_ptr, norms_ptr, K, norm_columns)


@triton.jit
def _normalise(W_ptr, squares_ptr, decay_ptr, skip_ptr, d, slices, SLICES: tl.constexpr, COLUMNS: tl.constexpr):
    """Unit norm for rows that moved, from the squares of their slices."""
    if skip_ptr is not None and tl.load(skip_ptr) != 0:
        return
    i = tl.program_id(0).to(tl.int64)
    if tl.load(decay_ptr + i) < 0:
        return
    s, columns = tl.arange(0, SLICES), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    norm2 = tl.sum(tl.load(squares_ptr + i * slices + s, mask=s < slices, other=0.0), axis=0)
    W = tl.load(W_ptr + i * d + columns, mask=columns < d, other=0.0)
    W *= tl.where(norm2 > 0, tl.div_rn(1.0, tl.sqrt_rn(norm2)), 1.0)
    tl.store(W_ptr + i * d + columns, W, mask=columns < d)


def weight_step(
    rows: Rows, gradient: RowGradient, update: Update, first_feature: int = 0, runs: Runs | None = None,
    decay: Tensor | None = None,
) -> None:  # fmt: skip
    """A step of the float32 rows whose features ``first_feature`` .. + n have entries, and of those that have momentum.
    Their Shadow is brought up to date with the rows that change; unit rows have none.  ``decay`` [n]: of visits that are
    noted already."""
    W, n, d = rows.W, *rows.W.shape
    if len(gradient.values) > 2:
        grad = torch.empty(n, d, dtype=torch.float32, device=W.device)
        outer(gradient, grad, first_feature=first_feature, runs=runs, accumulate=False)
        walked = (gradient.csc.colptr, *6 * [None], None, None, gradient.self_coefficient)
        return _launch_step(rows, update, grad, walked, first_feature, None, decay)
    entries = sources(gradient)
    cuda = native.takes("weight_step") and _cuda_steps(rows, gradient, update.unit_rows)
    split = partials(entries, d, runs_for(gradient, runs), first_feature, first_feature + n, cuda)
    walked = (*entries, *split, gradient.self_coefficient)
    if cuda:
        return _cuda_step(rows, update, walked, first_feature, gradient.along, decay)
    _launch_step(rows, update, None, walked, first_feature, gradient.along, decay)


def row_step(rows: Rows, grad: Tensor, update: Update, colptr: Tensor | None = None) -> None:
    """The same from a dense gradient [n, d]; every row has one, or with colptr [n + 1] those that have entries."""
    _launch_step(rows, update, grad, (colptr, *9 * [None]), 0)


def _launch_step(
    rows: Rows, update: Update, grad: Tensor | None, walked: tuple, first_feature: int, along: Tensor | None = None,
    decay: Tensor | None = None,
) -> None:  # fmt: skip
    """``walked``: a gradient's sources, partial rows and coefficients, as the kernel takes them."""
    (n, d), shadow, unit_rows = rows.W.shape, rows.shadow, update.unit_rows
    _check(unit_rows, shadow)
    columns = min(triton.next_power_of_2(d), config("weight_step")["columns"] if shadow is None else SLICE)
    squares = _squares(rows.W, columns, update, along)
    if squares is not None:
        walked = *walked[:-1], None  # what the coefficient gives is along the row
    elif unit_rows:
        columns = triton.next_power_of_2(d)
    if grad is None:
        of_rows, tile = 1, walk(d, columns, config("weight_step")["entries"], rows.W)
    else:
        of_rows = max(1, 512 // columns)
        tile = {"ENTRIES": 1, "COLUMNS": columns, "num_warps": min(16, max(1, of_rows * columns // 128))}
    decay = _decay(rows, walked[0], update, first_feature) if decay is None else decay
    launch(
        _step, (cdiv(n, of_rows), cdiv(d, columns)), rows.W, rows.m, rows.v, decay, grad, *walked, update.adam.constants,
        update.grad_scale, update.skip, *(shadow or (None, None)), None if squares is None else along, squares, n, d,
        first_feature, *_widths(shadow), UNIT=unit_rows and squares is None, ROWS=of_rows, **tile,
    )  # fmt: skip
    if squares is not None:
        _divide(rows.W, squares, decay, update, columns)


def _squares(W: Tensor, columns: int, update: Update, along: Tensor | None) -> Tensor | None:
    """[n, slices] for unit rows that go by slices of so many columns, or None."""
    n, d = W.shape
    return W.new_empty(n, cdiv(d, columns)) if update.unit_rows and along is not None and d > 2 * columns else None


def _divide(W: Tensor, squares: Tensor, decay: Tensor, update: Update, columns: int) -> None:
    launch(
        _normalise, squares.shape, W, squares, decay, update.skip, W.shape[1], squares.shape[1],
        SLICES=triton.next_power_of_2(squares.shape[1]), COLUMNS=columns, num_warps=max(1, columns // 128),
    )  # fmt: skip


def _cuda_steps(rows: Rows, gradient: RowGradient, unit_rows: bool) -> bool:
    """True if the CUDA kernel takes these arguments."""
    d, moments = rows.W.shape[1], (rows.v,) if rows.m is None else (rows.v, rows.m)
    aligned = d % 4 == 0 and all(t.data_ptr() % 16 == 0 for t in (rows.W, *moments, *gradient.A))
    fits = not unit_rows or gradient.along is not None or d <= native.module.unit_columns // (1 if aligned else 2)
    return fits and {t.dtype for t in gradient.values} == {torch.float32} and len({t.dtype for t in gradient.A}) == 1


def _cuda_step(
    rows: Rows, update: Update, walked: tuple, first_feature: int, along: Tensor | None, decay: Tensor | None
) -> None:
    _check(update.unit_rows, rows.shadow)
    scale, skip = None if update.grad_scale is None else update.grad_scale.float(), update.skip
    decay = _decay(rows, walked[0], update, first_feature) if decay is None else decay
    squares = _squares(rows.W, SLICE, update, along)
    native.call(
        "weight_step", walked[4].dtype, rows.W, rows.m, rows.v, decay, *walked, update.adam.constants, scale, skip,
        0 if skip is None else skip.element_size(), *(rows.shadow or (None, None)), None if squares is None else along,
        squares, *rows.W.shape, first_feature, *_widths(rows.shadow), update.unit_rows and squares is None,
    )  # fmt: skip
    if squares is not None:
        _divide(rows.W, squares, decay, update, SLICE)


def _check(unit_rows: bool, shadow: Shadow | None) -> None:
    if unit_rows and shadow is not None:
        raise NotImplementedError(
            "shadow: got one with unit_rows, want unit_rows=False: a program refreshes one slice of a row"
        )


def _decay(rows: Rows, colptr: Tensor | None, update: Update, first_feature: int) -> Tensor:
    """[n]: what v is to be multiplied with where a row moves, whose visit is noted; −1 where it rests."""
    n, d = rows.W.shape
    decay = torch.empty(n, dtype=torch.float32, device=rows.W.device)
    columns = 1 if rows.m is None else min(64, triton.next_power_of_2(d))
    block = max(32, 256 // columns)
    launch(
        _advance, (cdiv(n, block),), rows.last_step, decay, colptr, rows.m, *update.adam, update.skip, n, d, first_feature,
        BLOCK=block, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return decay


def _widths(shadow: Shadow | None) -> tuple[int, int]:
    return (0, 0) if shadow is None else (shadow.rows.shape[1], shadow.norms.shape[1])
