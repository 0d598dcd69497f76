"""The C++ engine's ways to the support of a block of rows: tile by tile, so that the [B, F] pre-activations never exist.

  screen    bfloat16 product as an upper bound, what passes it decided by fixed-order fp32 dots (precision "exact")
  bound     torch's fp32 product in its place, where the processor has no bfloat16 one
  dots      the same dots for every entry: the same result, for few rows
  product   torch's fp32 product decides (precision "fp32")
  rounded   the bfloat16 product decides (precision "bf16")

A tile is up to ``ROWS`` rows by as many features as keep it in cache; it is compacted while it is still there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_fast.code import Layer, Shadow
from sae_fast.ops.dispatch import log_once
from sae_fast.ops.encode import bound as bounds
from sae_fast.ops.encode import screen
from sae_fast.ops.native import _C, threads

PRECISIONS = ("exact", "fp32", "tf32", "bf16")
ROWS = 2048
TILE, WIDEST = 2**21, 2048  # entries and features in a tile
# The committed crossovers: like those of crossovers.py from sweeps at d 768, F 24576 on two Sapphire Rapids cores.
FEW_ROWS = {"shadow": 16, "no shadow": 48}  # below, reading W once is all there is to it: dots
DENSE_ABOVE = 0.2  # candidates ÷ entries of a block of rows above which all entries are dotted


def route(precision: str, rows: int, shadow: Shadow | None) -> str:
    """The way that a batch of ``rows`` rows takes."""
    if precision in ("fp32", "tf32"):  # a processor has no TF32
        return "product"
    if rows < FEW_ROWS["no shadow" if shadow is None else "shadow"]:
        return "dots"
    reason = screen.unavailable()
    if reason is not None:
        no_bound = bounds.unavailable() if rows >= bounds.ROWS else f"fewer than {bounds.ROWS} rows"
        instead = "torch's fp32 product is the bound" if no_bound is None else f"fp32 dots of every entry: {no_bound}"
        log_once("encode", f"not screened: {reason}; {instead}")
        return "bound" if no_bound is None else "dots"
    return "screen" if precision == "exact" else "rounded"


def for_all_blocks(way: str, x: Tensor, layer: Layer) -> Layer:
    """The layer, with a shadow if one serves more than one block of rows."""
    if way in ("screen", "rounded") and layer.shadow is None and x.shape[0] > ROWS:
        return layer._replace(shadow=Shadow(*screen.round_rows(layer.W, layer.W.shape[1])))
    return layer


def threshold_support(x: Tensor, layer: Layer, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """indptr, indices and u of the entries of x [B, d] with not (x·w + bias <= cut)."""
    way = route(precision, x.shape[0], layer.shadow)
    layer = for_all_blocks(way, x, layer)
    counts, indices, u = [], [], []
    for first in range(0, x.shape[0], ROWS):
        rows = x[first : first + ROWS]
        compactor = _C.Compactor(rows=rows.shape[0], parts=threads())
        fill(compactor, way, rows, layer)
        nnz = compactor.nnz()
        indptr = torch.empty(rows.shape[0] + 1, dtype=torch.int64)
        indices.append(torch.empty(nnz, dtype=torch.int32))
        u.append(x.new_empty(nnz))
        compactor.finish(indptr=indptr, indices=indices[-1], u=u[-1], threads=threads())
        counts.append(indptr.diff())
    indptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64)
    if not counts:
        return indptr, torch.empty(0, dtype=torch.int32), x.new_empty(0)
    torch.cumsum(_cat(counts), 0, out=indptr[1:])
    return indptr, _cat(indices), _cat(u)


def fill(compactor, way: str, rows: Tensor, layer: Layer, test: str = "sign") -> Any:
    """Gives a block of rows to a Compactor or, which tests against a "floor", a Largest; returns the engine's Layer."""
    W, bias, cut = layer.W, layer.bias, layer.cut
    native = _C.Layer(x=rows, W=W, d=W.shape[1], bias=bias, cut=cut)
    if way in ("screen", "rounded"):
        operands = screen.Operands(rows, W, layer.shadow, bias, cut, margins=way == "screen", test=test)
        _screened(compactor, native, operands)
    elif way == "bound":
        _bounded(compactor, native, bounds.Bound(W, bias, cut, layer.shadow), rows)
    elif way == "dots":
        _dotted(compactor, native, rows, W)
    else:
        _multiplied(compactor, native, rows, W)
    return native


def _screened(compactor, layer, operands: screen.Operands) -> None:
    rows, K = operands.rows.shape
    features = operands.W.shape[0]
    weights = torch.empty(_width(rows, features), K, dtype=torch.bfloat16)
    for first, last, tile in tiles(rows, features, torch.bfloat16):
        operand = operands.weights(first, last, weights)
        screen.product(operands.rows, operand, tile)
        width = last - first
        if operands.margins:
            excess = operands.excess(operand) if operands.test == "floor" else None
            compactor.add_screened_tile(
                layer=layer, tile=tile, excess=excess, width=width, first=first, dense_above=DENSE_ABOVE, threads=threads()
            )
        else:
            compactor.add_rounded_tile(layer=layer, tile=tile, width=width, first=first, threads=threads())


def _bounded(compactor, layer, bound: bounds.Bound, x: Tensor) -> None:
    features = bound.W.shape[0]
    for first, last, tile, margins in bound.tiles(x, tiles(x.shape[0], features, torch.float32)):
        compactor.add_bounded_tile(
            layer=layer, tile=tile, bias=bound.open[first:last], margins=margins.float(), width=last - first, first=first,
            dense_above=DENSE_ABOVE, threads=threads(),
        )  # fmt: skip
        if compactor.nnz() > DENSE_ABOVE * last * x.shape[0]:  # a dense batch: the product spares few dots
            return _dotted(compactor, layer, x, bound.W, last)


def _dotted(compactor, layer, x: Tensor, W: Tensor, start: int = 0) -> None:
    width = _width(x.shape[0], W.shape[0])
    for first in range(start, W.shape[0], width):
        compactor.add_dense(layer=layer, width=min(width, W.shape[0] - first), first=first, threads=threads())


def _multiplied(compactor, layer, x: Tensor, W: Tensor) -> None:
    for first, last, tile in tiles(x.shape[0], W.shape[0], torch.float32):
        torch.mm(x, W[first:last].T, out=tile)
        compactor.add_tile(layer=layer, tile=tile, width=last - first, first=first, threads=threads())


def _width(rows: int, features: int) -> int:
    return min(features, WIDEST, max(256, TILE // rows))


def tiles(rows: int, features: int, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, memory for [rows, last − first]) of each run of features."""
    width = _width(rows, features)
    buffer = torch.empty(rows * width, dtype=dtype)
    for first in range(0, features, width):
        last = min(first + width, features)
        yield first, last, buffer[: rows * (last - first)].view(rows, last - first)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
