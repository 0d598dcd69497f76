"""The screening product: every feature that could be active, at the price of a bfloat16 product.

Both operands carry their own error bound in extra columns (csrc/cpu/screen.cpp), so that the product is an upper bound of
π − cut and the screen is its sign.  docs/screen.md derives the bound.
"""

from __future__ import annotations

from functools import cache, cached_property

import torch
from torch import Tensor

from sae_fast.code import Shadow
from sae_fast.ops.native import _C, threads

MARGINS = 7  # columns for the bias and the error bound
OUTLIERS = 16  # columns, at most, that enter as high and low parts
OPEN = {"sign": 1.0, "floor": float("nan")}  # the bound of rows and features out of range: passes the test
EXCESS = 2.0  # a bound is at most this many margins above the true value; a test lowers it, to show the need
FAR_MORE = 16.0  # times the median column's residual energy makes an outlier
PARTS = 16  # runs of rows over which column residuals are summed: fixed, so that the choice of outliers is
TERMS = torch.ones(7, dtype=torch.float64)  # factors of the bound's terms (Screen::Term): a test removes one at a time


def unavailable() -> str | None:
    """The reason why there is no screening product here, or None."""
    if not _C.has_bf16_product():
        return "this processor has no bfloat16 product"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN, whose bfloat16 product sums in float32, is missing or switched off"
    return _sums_in_bf16()


@cache
def _sums_in_bf16() -> str | None:
    # Sums of 1 and 2^-8 that any rounding to bfloat16 on the way would lose.
    ones = torch.full((64, 1024), 2.0**-4, dtype=torch.bfloat16)
    ones[:, 0] = 1
    if not bool((product(ones, ones, ones.new_empty(64, 64)) == 1 + 1023 / 256).all()):
        return "this torch's bfloat16 product does not sum in float32"
    return None


def product(rows: Tensor, operand: Tensor, out: Tensor) -> Tensor:
    """rows operandᵀ into ``out``, all bfloat16, summed in float32."""
    return torch.mm(rows, operand.T, out=out)


class Operands:
    """The two operands of the screening product of x [B, d] and a layer; ``margins=False`` leaves the bound out.  Without
    a shadow W is rounded run by run.  ``test``: what is asked of the product, its "sign" or if it is above a "floor"."""

    def __init__(
        self, x: Tensor, W: Tensor, shadow: Shadow | None, bias: Tensor, cut: Tensor | None, margins: bool = True,
        test: str = "sign",
    ):  # fmt: skip
        d = x.shape[1]
        self.W, self.shadow, self.bias, self.cut, self.margins, self.test = W, shadow, bias, cut, margins, test
        self.rows, norms = round_rows(x, _to_32(d + MARGINS + OUTLIERS))
        self.outliers = outlier_columns(x, self.rows) if margins else torch.empty(0, dtype=torch.int64)
        m, K = self.outliers.shape[0], self.rows.shape[1]
        gamma = (K + 8) * 2.0**-23
        terms = TERMS if margins else None
        self.screen = _C.Screen(d=d, K=K, outliers=self.outliers, m=m, gamma=gamma, terms=terms, open=_bits(OPEN[test]))
        self._tail = slice(d + m + 3, d + m + MARGINS)
        _C.screen_x(screen=self.screen, x=x, n=x.shape[0], norms=norms, rows=self.rows, threads=threads())

    @cached_property
    def _margins(self) -> Tensor:
        """[4, B]: the factors of x in the margins."""
        return self.rows[:, self._tail].T.float().contiguous()

    def weights(self, first: int, last: int, out: Tensor) -> Tensor:
        """Rows [last − first, K] of W's operand, in the memory of ``out``."""
        W = self.W[first:last]
        out = out[: last - first]
        if self.shadow is None:
            rows, norms = None, round_rows(W, out.shape[1], out)[1]
        else:
            rows, norms = (part[first:last] for part in self.shadow)
        cut = None if self.cut is None else self.cut[first:last]
        _C.screen_w(
            screen=self.screen, rounded=rows, W=W, n=last - first, norms=norms, bias=self.bias[first:last], cut=cut,
            rows=out, threads=threads(),
        )  # fmt: skip
        return out

    def excess(self, operand: Tensor) -> Tensor:
        """[rows] float32: by how much the product can exceed π in any feature of ``operand``, which weights() gave; NaN in
        a row out of range."""
        factors = operand[:, self._tail].float().nan_to_num(nan=0.0).amax(0)  # NaN: a feature out of range has no bound
        return (self._margins * (factors * (EXCESS * (1 + 2.0**-16)))[:, None]).sum(0)


def outlier_columns(x: Tensor, rounded: Tensor) -> Tensor:
    """int64, ascending: the columns from which rounding took far more than from the median one.

    One norm over all columns is useless where a few dimensions are a hundred times larger than the rest (massive
    activations); these get a bound of their own."""
    n, d = x.shape
    sums = x.new_empty(PARTS, d)
    _C.column_residuals(A=x, rounded=rounded, n=n, d=d, K=rounded.shape[1], parts=PARTS, out=sums, threads=threads())
    energy = sums.sum(0)
    top = energy.topk(min(OUTLIERS, d))
    return top.indices[top.values > FAR_MORE * energy.median()].sort().values


def round_rows(A: Tensor, K: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of A [n, d] float32 as bfloat16 [n, K], zeros in the columns past d, and their norms, as a Shadow has them; the
    rows in the memory of ``out``, if given."""
    n, d = A.shape
    rows, norms = A.new_empty(n, K, dtype=torch.bfloat16) if out is None else out, A.new_empty(n, 2, dtype=torch.float64)
    _C.round_rows(A=A, n=n, d=d, K=K, out=rows, norms=norms, threads=threads())
    return rows, norms


def _bits(value: float) -> int:
    """The 16 bits of a value as bfloat16."""
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))


def _to_32(width: int) -> int:
    return -(-width // 32) * 32
