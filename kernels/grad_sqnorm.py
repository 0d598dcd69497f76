"""grad_sqnorm: squared norms of gradient rows that are never stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import RowGradient
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.outer import Runs, gradient_row, partials, project, runs_for, sources, walk


@triton.jit
def _grad_sqnorm(
    colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, first_ptr, partials_ptr, W_ptr, own_ptr,
    out_ptr, first_feature, d, PROJECT: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    g = gradient_row(
        first_feature + i, colptr_ptr, rows_ptr, perm_ptr, values_ptr, A_ptr, values2_ptr, A2_ptr, first_ptr, partials_ptr,
        d, columns, ENTRIES, COLUMNS,
    )  # fmt: skip
    if PROJECT or own_ptr is not None:
        W = tl.load(W_ptr + i * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        if own_ptr is not None:
            g += tl.load(own_ptr + i).to(tl.float32) * W
        if PROJECT:
            g = project(g, W, 0)
    g = g.to(tl.float64)  # squares of floats overflow and underflow
    tl.store(out_ptr + i * tl.num_programs(1) + tl.program_id(1), tl.sum(g * g, axis=0))


def slices(d: int, projects: bool) -> int:
    """Sums that each row leaves: one for each slice of columns that a program takes."""
    return 1 if projects else cdiv(d, _columns(d, projects))


def _columns(d: int, projects: bool) -> int:
    whole = triton.next_power_of_2(d)
    return whole if projects else min(whole, config("outer")["columns"])


def grad_sqnorm(
    gradient: RowGradient, W: Tensor, projects: bool, out: Tensor, first_feature: int = 0, runs: Runs | None = None
) -> None:
    """out [n, slices(d, projects)] float64: squared norms of the gradient rows of W [n, d], to be summed; of one source or
    two.  ``projects`` removes each row's component along W's."""
    n, d = W.shape
    arguments = sources(gradient)
    split = partials(arguments, d, runs_for(gradient, runs), first_feature, first_feature + n)
    entries = config("weight_step" if projects else "outer")["entries"]
    launch(
        _grad_sqnorm, (n, out.shape[1]), *arguments, *split, W, gradient.self_coefficient, out, first_feature, d,
        PROJECT=projects, **walk(d, _columns(d, projects), entries, gradient.A[0]),
    )  # fmt: skip
