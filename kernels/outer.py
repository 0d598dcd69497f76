"""outer: a program sums one slice of columns of one feature's gradient row, over its entries in ascending order.

A feature with more than ``run`` entries is summed by runs, each by a program of its own (:func:`partials`), and the
feature's own program adds up what they found, in order: whoever sums, the sum is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import RowGradient
from sae_fast.kernels import native
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.offsets import offsets


class Runs(NamedTuple):
    """The runs of long features.  Feature i owns the runs first[i] .. first[i + 1], none if it has no more than
    one; run p is of feature owner[p], which is F past the last run."""

    first: Tensor  # [F + 1] int64
    owner: Tensor  # [M] int64

    @classmethod
    def of(cls, colptr: Tensor, capacity: int) -> Runs:
        """Memory for those of a code with at most ``capacity`` entries."""
        # More than `run` entries make fewer than 2 · entries / run runs.
        return cls(torch.empty_like(colptr), colptr.new_empty(2 * capacity // config("outer")["run"] + 1))


def runs(colptr: Tensor, capacity: int) -> Runs:
    """The runs of a code with at most ``capacity`` entries: features with more than ``run`` are cut into several."""
    found = Runs.of(colptr, capacity)
    offsets(colptr, *found, config("outer")["run"])
    return found


@triton.jit
def _add_run(
    total, begin, end, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, d, columns, ENTRIES: tl.constexpr
):
    """total [COLUMNS] plus the entries begin .. end of one source, or of two."""
    inside = (columns < d)[None, :]
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        live = at < end
        row = tl.load(rows_ptr + at, mask=live, other=0).to(tl.int64)
        entry = tl.load(perm_ptr + at, mask=live, other=0)
        element, mask = row[:, None] * d + columns[None, :], live[:, None] & inside
        value = tl.load(values_ptr + entry, mask=live, other=0.0).to(tl.float32)
        product = value[:, None] * tl.load(A_ptr + element, mask=mask, other=0.0).to(tl.float32)
        if A2_ptr is not None:
            value = tl.load(values2_ptr + entry, mask=live, other=0.0).to(tl.float32)
            product += value[:, None] * tl.load(A2_ptr + element, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(product, axis=0)
    return total


@triton.jit
def gradient_row(
    f, colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, first_ptr, partials_ptr, d, columns,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[COLUMNS]: feature f's gradient row; with first_ptr, that of a long feature from its partial rows."""
    begin, end = tl.load(colptr_ptr + f), tl.load(colptr_ptr + f + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    if first_ptr is not None:
        p, last = tl.load(first_ptr + f), tl.load(first_ptr + f + 1)
        for q in range(p, last):
            total += tl.load(partials_ptr + q * d + columns, mask=columns < d, other=0.0)
        begin = tl.where(p < last, end, begin)
    return _add_run(total, begin, end, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, d, columns, ENTRIES)


@triton.jit
def project(g, W, axis: tl.constexpr):
    """g without its component along W."""
    norm2 = tl.sum(W * W, axis=axis, keep_dims=True)
    along = tl.sum(g * W, axis=axis, keep_dims=True)
    return g - tl.where(norm2 > 0, tl.div_rn(along, norm2), 0.0) * W


@triton.jit
def _partials(
    owner_ptr, first_ptr, colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, partials_ptr,
    first_feature, last_feature, d, RUN: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    f = tl.load(owner_ptr + p)
    if (f < first_feature) | (f >= last_feature):
        return
    begin = tl.load(colptr_ptr + f) + (p - tl.load(first_ptr + f)) * RUN
    end = tl.minimum(begin + RUN, tl.load(colptr_ptr + f + 1))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    total = _add_run(total, begin, end, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, d, columns, ENTRIES)
    tl.store(partials_ptr + p * d + columns, total, mask=columns < d)


@triton.jit
def _outer(
    colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, first_ptr, partials_ptr, features_ptr, out_ptr,
    first_feature, d, ACCUMULATE: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Slices are the slow axis of the grid: while one is worked on, its part of A stays in the L2 cache.
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    f = first_feature + i
    if features_ptr is not None:
        f = tl.load(features_ptr + i)
    if ACCUMULATE and tl.load(colptr_ptr + f) == tl.load(colptr_ptr + f + 1):
        return
    total = gradient_row(
        f, colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, first_ptr, partials_ptr, d, columns,
        ENTRIES, COLUMNS,
    )  # fmt: skip
    if ACCUMULATE:
        total += tl.load(out_ptr + i * d + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(out_ptr + i * d + columns, total, mask=columns < d)


def outer(
    gradient: RowGradient, out: Tensor, *, features: Tensor | None = None, first_feature: int = 0, runs: Runs | None = None,
    accumulate: bool = True,
) -> None:  # fmt: skip
    """out [n, d] = or += Σ_s Σ_j values[s][j] · A[s][row of j] over the entries j of the features ``first_feature`` .. + n,
    or of the list ``features`` [n] int64.  Two sources are summed at a time; ``runs`` is made here if it is not given."""
    (n, d), (values, A), c = out.shape, (gradient.values, gradient.A), config("outer")
    split = runs_for(gradient, runs)
    alike = {t.dtype for t in (*values, *A)} == {A[0].dtype} and out.dtype in (A[0].dtype, torch.float32)
    cuda = alike and native.takes("outer")
    span = (0, gradient.csc.colptr.shape[0] - 1) if features is not None else (first_feature, first_feature + n)
    for s in range(0, len(values), 2):
        arguments = sources(gradient, s)
        of_runs = partials(arguments, d, split, *span, cuda)
        if cuda:
            native.call(
                "outer", A[0].dtype, out.dtype, *arguments, *of_runs, features, out, n, d, first_feature, accumulate
            )
        else:
            tile = walk(d, min(c["columns"], triton.next_power_of_2(d)), c["entries"], A[0])
            launch(
                _outer, (n, cdiv(d, tile["COLUMNS"])), *arguments, *of_runs, features, out, first_feature, d,
                ACCUMULATE=accumulate, **tile,
            )  # fmt: skip
        accumulate = True


def sources(gradient: RowGradient, first: int = 0) -> tuple:
    """The arguments by which a kernel walks the source ``first``, and the next if there is one."""
    values2, A2, *_ = (*gradient.values[first + 1 : first + 2], *gradient.A[first + 1 : first + 2], None, None)
    return *gradient.csc.parts(), gradient.values[first], gradient.A[first], values2, A2


def walk(d: int, columns: int, entries: int, A: Tensor) -> dict[str, Any]:
    """The way a program walks the rows of A: 16 bytes a thread at a time; of narrow rows, more of them."""
    warps = min(16, max(1, columns * A.element_size() // 512))
    return {"ENTRIES": max(entries, min(64, 256 // columns)), "COLUMNS": columns, "num_warps": warps}


def runs_for(gradient: RowGradient, given: Runs | None) -> Runs | None:
    """The runs to split features into; None where the batch is too small for a feature with more than one."""
    if gradient.A[0].shape[0] <= config("outer")["run"]:
        return None
    return runs(gradient.csc.colptr, gradient.csc.rows.shape[0]) if given is None else given


def partials(
    arguments: tuple, d: int, split: Runs | None, first: int, last: int, cuda: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """(first [F + 1], partial rows [M, d]) of the long features among first .. last, of the sources in ``arguments``;
    ``cuda``: by the CUDA kernel, as whoever adds them up."""
    if split is None:
        return None, None
    c = config("outer")
    M = split.owner.shape[0]
    out = torch.empty(M, d, dtype=torch.float32, device=arguments[0].device)
    if cuda:
        storage = arguments[3].dtype, arguments[4].dtype
        native.call("partials", *storage, split.owner, split.first, *arguments, out, M, d, first, last, c["run"])
        return split.first, out
    tile = walk(d, min(c["columns"], triton.next_power_of_2(d)), c["entries"], arguments[4])
    launch(
        _partials, (M, cdiv(d, tile["COLUMNS"])), split.owner, split.first, *arguments, out, first, last, d,
        RUN=c["run"], **tile,
    )  # fmt: skip
    return split.first, out
