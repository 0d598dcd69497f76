"""16-bit copies of rows for the screening product, with what is needed to bound their error (docs/screen.md).

float16 keeps 11 bits of a value where bfloat16 keeps 8, at the same rate of the tensor cores; a power of two for each row
brings it into range.  A row's ``norms``, float32 [1 + 2·S]: that scale, then for each slice of 512 columns the squared
norms of the scaled row and of what rounding took from it.

The bias and the bound are a product too, of COLUMNS more columns, bfloat16 for its range: bound_terms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._config import config
from sae_fast.kernels._launch import INTERPRETED, cdiv, launch
from sae_fast.kernels.flag import not_finite, stale

SLICE = 512  # columns whose sums of squares are kept together: weight_step refreshes a slice of a row at a time
DEPTH = 64  # K is a multiple of it, so that no product masks its inner dimension
COLUMNS = 16  # of the bound's product, the least that tensor cores take
TERMS = 7  # columns of them that are not 0
BOUND = torch.float32 if INTERPRETED else torch.bfloat16  # of the same values: the interpreter multiplies no bfloat16


def padded(d: int) -> int:
    """K, the width of a 16-bit copy of rows of d."""
    return cdiv(d, DEPTH) * DEPTH


def norm_columns(d: int) -> int:
    return 1 + 2 * cdiv(d, SLICE)


@triton.jit
def _round(
    A_ptr, shift_ptr, centred_ptr, out_ptr, norms_ptr, flag_ptr, d, K, norm_columns,
    HAS_SHIFT: tl.constexpr, HAS_CENTRED: tl.constexpr, HAS_FLAG: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    largest = 0.0
    for first in range(0, d, SLICE):
        at = first + tl.arange(0, SLICE)
        a = tl.load(A_ptr + i * d + at, mask=at < d, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            a -= tl.load(shift_ptr + at, mask=at < d, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(a)))
    # 2^(12 - exponent of the largest), so that weights may grow eightfold before the scale has to change.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    scale = ((139 - tl.maximum(exponent, -100)) << 23).to(tl.float32, bitcast=True)
    tl.store(norms_ptr + i * norm_columns, scale)
    finite = True
    for first in range(0, K, SLICE):
        at = first + tl.arange(0, SLICE)
        a = tl.load(A_ptr + i * d + at, mask=at < d, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            a -= tl.load(shift_ptr + at, mask=at < d, other=0.0).to(tl.float32)
        if HAS_CENTRED:
            stored = a.to(centred_ptr.dtype.element_ty)
            tl.store(centred_ptr + i * d + at, stored, mask=at < d)
            a = stored.to(tl.float32)  # what verification will read
        a *= scale
        rounded = a.to(tl.float16)
        tl.store(out_ptr + i * K + at, rounded, mask=at < K)
        lost = a - rounded.to(tl.float32)
        square = tl.sum(a * a)
        finite = finite & (square < float("inf"))  # false for a NaN
        if first < d:
            slot = norms_ptr + i * norm_columns + 1 + 2 * (first // SLICE)
            tl.store(slot, square)
            tl.store(slot + 1, tl.sum(lost * lost))
    if HAS_FLAG:
        tl.atomic_or(flag_ptr, not_finite, mask=finite == 0)


def round_rows(
    A: Tensor, out: Tensor, norms: Tensor, shift: Tensor | None = None, centred: Tensor | None = None,
    flag: Tensor | None = None,
) -> None:  # fmt: skip
    """out [n, K] float16 and norms [n, 1 + 2·S] of the rows A [n, d], or of A − shift [d], which goes to ``centred``
    [n, d].  A row that is not finite (or too large to be squared) sets NOT_FINITE in ``flag`` (int32)."""
    launch(
        _round, (A.shape[0],), A, shift, centred, out, norms, flag, A.shape[1], out.shape[1], norms.shape[1],
        HAS_SHIFT=shift is not None, HAS_CENTRED=centred is not None, HAS_FLAG=flag is not None, SLICE=SLICE,
        num_warps=config("round")["warps"],
    )  # fmt: skip


def rounded(A: Tensor) -> tuple[Tensor, Tensor]:
    """The output of :func:`round_rows`, in fresh memory: also a Shadow of a weight."""
    n, d = A.shape
    out = torch.empty(n, padded(d), dtype=torch.float16, device=A.device)
    norms = torch.empty(n, norm_columns(d), dtype=torch.float32, device=A.device)
    round_rows(A, out, norms)
    return out, norms


@triton.jit
def _row_differs(A_ptr, rows_ptr, norms_ptr, i, d, K, norm_columns, SLICE: tl.constexpr):
    """Elements of row i of A that are not, at its scale, what ``rows`` holds."""
    scale = tl.load(norms_ptr + i * norm_columns)
    differs = 0
    for first in range(0, d, SLICE):
        at = first + tl.arange(0, SLICE)
        a = tl.load(A_ptr + i * d + at, mask=at < d, other=0.0).to(tl.float32) * scale
        kept = tl.load(rows_ptr + i * K + at, mask=at < d, other=0.0)
        differs += tl.sum((a.to(tl.float16).to(tl.int16, bitcast=True) != kept.to(tl.int16, bitcast=True)).to(tl.int32))
    return differs


@triton.jit
def _compare(A_ptr, rows_ptr, norms_ptr, flag_ptr, flag_stride, d, K, norm_columns, SLICE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    differs = _row_differs(A_ptr, rows_ptr, norms_ptr, i, d, K, norm_columns, SLICE)
    tl.atomic_or(flag_ptr + i * flag_stride, stale, mask=differs > 0)


def compare_rows(A: Tensor, rows: Tensor, norms: Tensor, flags: Tensor) -> None:
    """Sets STALE in ``flags`` [n] int32 of each row of A [n, d] that is not, at its scale, what ``rows`` [n, K] holds."""
    launch(
        _compare, (A.shape[0],), A, rows, norms, flags, 1, A.shape[1], rows.shape[1], norms.shape[1],
        SLICE=SLICE, num_warps=config("round")["warps"],
    )  # fmt: skip


@triton.jit
def _watch(
    W_ptr, rows_ptr, norms_ptr, step_ptr, flag_ptr, n, d, K, norm_columns, turns, SLICE: tl.constexpr, LINE: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64)
    index = tl.load(step_ptr) - 1
    row = n * (index % 16) // 16 + p
    differs = 0
    if row < n * (index % 16 + 1) // 16:
        differs += _row_differs(W_ptr, rows_ptr, norms_ptr, row, d, K, norm_columns, SLICE)
    i, at = p * LINE + tl.arange(0, LINE), LINE * (index % turns) + tl.arange(0, LINE)
    inside = (i < n)[:, None] & (at < d)[None, :]
    a = tl.load(W_ptr + i[:, None] * d + at[None, :], mask=inside, other=0.0)
    a *= tl.load(norms_ptr + i * norm_columns, mask=i < n, other=0.0)[:, None]
    kept = tl.load(rows_ptr + i[:, None] * K + at[None, :], mask=inside, other=0.0)
    of_line = (a.to(tl.float16).to(tl.int16, bitcast=True) != kept.to(tl.int16, bitcast=True)).to(tl.int32)
    tl.atomic_or(flag_ptr, stale, mask=differs + tl.sum(tl.sum(of_line, axis=1), axis=0) > 0)


def watch(W: Tensor, rows: Tensor, norms: Tensor, step: Tensor, flag: Tensor) -> None:
    """Sets STALE in ``flag`` (int32) if W [n, d] is found to be no longer what its 16-bit copy was made from: in a
    sixteenth of the rows, and in 16 columns of all, others in each ``step`` (int64, 0-d, counted from 1)."""
    (n, d), line = W.shape, 16
    launch(
        _watch, (cdiv(n, line),), W, rows, norms, step, flag, n, d, rows.shape[1], norms.shape[1], cdiv(d, line),
        SLICE=SLICE, LINE=line, num_warps=config("round")["warps"],
    )  # fmt: skip


@triton.jit
def _norm(norms_ptr, i, inside, norm_columns, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(FIRST, norm_columns, 2):
        total += tl.load(norms_ptr + i * norm_columns + s, mask=inside, other=0.0)
    return tl.sqrt(total) * (1 + 2**-9)  # above the true norm for up to 2^15 columns, whose sum rounds by less


@triton.jit
def _truncated(v):
    """float32 to the bfloat16 next to it on the side of 0, as float32."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _above(v):
    """float32 ≥ 0 rounded up to bfloat16, as float32; what is not finite is ∞."""
    up = (v.to(tl.int32, bitcast=True) + 65535).to(tl.float32, bitcast=True)
    return tl.where(v < float("inf"), _truncated(up), float("inf"))


@triton.jit
def _terms_of(
    block, norms_ptr, bias_ptr, cut_ptr, floor_ptr, out_ptr, n, norm_columns, gamma,
    FEATURES: tl.constexpr, HAS_CUT: tl.constexpr, HAS_FLOOR: tl.constexpr, MARGINS: tl.constexpr, LOST: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    scale = tl.load(norms_ptr + i * norm_columns, mask=inside, other=1.0)
    norm = _norm(norms_ptr, i, inside, norm_columns, 1, BLOCK)
    lost = _norm(norms_ptr, i, inside, norm_columns, 2, BLOCK)
    rounded = norm + lost
    true_norm = norm / scale
    # Outside this range products may vanish; every entry of such a row or feature is a candidate.
    usual = (true_norm >= 2.0**-40) & (true_norm <= 2.0**40) & (lost < float("inf"))
    # At the scale of larger weights squares may have vanished: a norm of 0 is that of zeros at the scale of zeros only.
    zeros = (norm == 0) & (scale == 2.0**112)
    usual = (usual & (norm >= 2.0**-40)) | zeros
    scale = tl.where(zeros, 1.0, scale)  # which meets biases and floors alone: far from the ends of the range
    if not LOST:
        lost = tl.zeros_like(lost)
    if FEATURES:
        bias = tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
        if HAS_CUT:
            bias -= tl.load(cut_ptr + i, mask=inside, other=0.0).to(tl.float32)
        high = bias * scale
        if MARGINS:
            # What is above 0 stays so; -inf, of a feature that is switched off, stays that.
            high = tl.where(usual, tl.where(bias > 0, tl.maximum(high, 2.0**-80), high), float("inf"))
        middle = tl.where(tl.abs(high) < float("inf"), high - _truncated(high), 0.0)
        low = middle - _truncated(middle)
        first, second = rounded, lost
        floor, rest = -scale, -scale
    else:
        high, middle, low = scale, scale, scale
        first, second = tl.where(usual, lost + gamma * rounded, float("inf")), rounded
        floor = tl.zeros_like(scale)
        if HAS_FLOOR:
            floor = tl.load(floor_ptr + i, mask=inside, other=0.0) * scale
            # A little less, for what its sum with the bias may lose; a NaN is none.
            floor = tl.where(floor >= 2.0**-20, tl.minimum(floor, 2.0**64) * (1 - 2.0**-16), 0.0)
        rest = floor - _truncated(floor)
    column = tl.arange(0, COLUMNS)[None, :]
    out = tl.where(column == 0, _truncated(high)[:, None], tl.where(column == 1, _truncated(middle)[:, None], 0.0))
    out = tl.where(column == 2, low[:, None], out)
    if MARGINS:
        out = tl.where(column == 3, _above(first)[:, None], tl.where(column == 4, _above(second)[:, None], out))
    out = tl.where(column == 5, _truncated(floor)[:, None], tl.where(column == 6, _truncated(rest)[:, None], out))
    tl.store(out_ptr + i[:, None] * COLUMNS + column, out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _terms(
    x_norms_ptr, W_norms_ptr, bias_ptr, cut_ptr, floor_ptr, of_rows_ptr, of_features_ptr, B, F, norm_columns, gamma,
    HAS_CUT: tl.constexpr, HAS_FLOOR: tl.constexpr, MARGINS: tl.constexpr, LOST: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    n, blocks = tl.program_id(0), tl.cdiv(B, BLOCK)
    if n < blocks:
        _terms_of(
            n, x_norms_ptr, bias_ptr, cut_ptr, floor_ptr, of_rows_ptr, B, norm_columns, gamma,
            False, HAS_CUT, HAS_FLOOR, MARGINS, LOST, BLOCK, COLUMNS,
        )  # fmt: skip
    else:
        _terms_of(
            n - blocks, W_norms_ptr, bias_ptr, cut_ptr, floor_ptr, of_features_ptr, F, norm_columns, gamma,
            True, HAS_CUT, HAS_FLOOR, MARGINS, LOST, BLOCK, COLUMNS,
        )  # fmt: skip


def accumulation(K: int) -> float:
    """The most that summing can lose, by the product of K terms and by the dot that decides (Γ of docs/screen.md)."""
    return (K + K // 32 + 80) * 2.0**-23


def bound_terms(
    x_norms: Tensor, W_norms: Tensor, bias: Tensor, cut: Tensor | None, K: int, margins: bool = True, lost: bool = True,
    floor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(of the rows [B, COLUMNS], of the features [F, COLUMNS]), BOUND: factors of bias less ``cut`` [F], three times, of
    the features' norms, of what rounding took from the features, and of each row's ``floor`` [B] float32, twice: what π
    has to reach, where that is above 0.  The two in the middle are 0 without ``margins``, and of the operands as they are
    rounded without ``lost``."""
    B, F, block = x_norms.shape[0], W_norms.shape[0], 256
    of_rows, of_features = (x_norms.new_empty(n, COLUMNS, dtype=BOUND) for n in (B, F))
    launch(
        _terms, (cdiv(B, block) + cdiv(F, block),), x_norms, W_norms, bias, cut, floor, of_rows, of_features, B, F,
        x_norms.shape[1], accumulation(K), HAS_CUT=cut is not None, HAS_FLOOR=floor is not None, MARGINS=margins, LOST=lost,
        BLOCK=block, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return of_rows, of_features
