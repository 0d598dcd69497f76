"""screen: the encoder's product in 16 bits, of which only a bit an entry is kept.

A feature's bit in a row's mask says that it could be active: that the product, the bias and the bound of the error do not
stay at or below 0.  The [B, F] pre-activations never reach memory.  docs/screen.md derives the bound; it and the bias are
a product of their own, of few columns (round.bound_terms), onto the same accumulators.

Two kernels give the same mask: one of plain pointers for every GPU since Ampere, and a persistent one that lets Hopper's
copy engine fetch the tiles.  The library's product in chunks, each scanned for its signs, gives it too: what they have to
beat, and what the configuration can ship in their place.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels._mask import parts, store_bits
from sae_fast.kernels.round import COLUMNS, TERMS


@triton.jit
def _place(tile, B, F, ROWS: tl.constexpr, FEATURES: tl.constexpr, GROUP: tl.constexpr):
    """Row and feature tile number: GROUP tiles of rows share the weights that are in the L2 cache."""
    per_group = GROUP * tl.cdiv(F, FEATURES)
    first = tile // per_group * GROUP
    size = tl.minimum(tl.cdiv(B, ROWS) - first, GROUP)
    return first + tile % per_group % size, tile % per_group // size


@triton.jit
def _terms(terms_ptr, at, n, COLUMNS: tl.constexpr):
    """Rows ``at`` of [n, COLUMNS]; those past the last are the last."""
    at = tl.minimum(at, n - 1).to(tl.int64)
    return tl.load(terms_ptr + at[:, None] * COLUMNS + tl.arange(0, COLUMNS))


@triton.jit
def _screen(
    x_ptr, w_ptr, row_terms_ptr, feature_terms_ptr, mask_ptr, B, F, K, stride,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    m, n = _place(tl.program_id(0), B, F, ROWS, FEATURES, GROUP)
    rows, features = m * ROWS + tl.arange(0, ROWS), n * FEATURES + tl.arange(0, FEATURES)
    of_rows, of_features = _terms(row_terms_ptr, rows, B, COLUMNS), _terms(feature_terms_ptr, features, F, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x = x_ptr + tl.minimum(rows, B - 1).to(tl.int64)[:, None] * K + depth[None, :]
    w = w_ptr + tl.minimum(features, F - 1).to(tl.int64)[None, :] * K + depth[:, None]
    acc = tl.zeros((ROWS, FEATURES), tl.float32)
    for _ in range(0, K, DEPTH):
        acc = tl.dot(tl.load(x), tl.load(w), acc)
        x += DEPTH
        w += DEPTH
    acc = tl.dot(of_rows, of_features.T, acc)
    store_bits(mask_ptr, acc, rows, B, stride, n, ROWS, FEATURES)


@triton.jit
def _screen_persistent(
    x_ptr, w_ptr, row_terms_ptr, feature_terms_ptr, mask_ptr, B, F, K, stride, programs,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    x = tl.make_tensor_descriptor(x_ptr, [B, K], [K, 1], [ROWS, DEPTH])
    w = tl.make_tensor_descriptor(w_ptr, [F, K], [K, 1], [FEATURES, DEPTH])
    tiles = tl.cdiv(B, ROWS) * tl.cdiv(F, FEATURES)
    for tile in tl.range(tl.program_id(0), tiles, programs):
        m, n = _place(tile, B, F, ROWS, FEATURES, GROUP)
        rows, features = m * ROWS + tl.arange(0, ROWS), n * FEATURES + tl.arange(0, FEATURES)
        of_rows, of_features = _terms(row_terms_ptr, rows, B, COLUMNS), _terms(feature_terms_ptr, features, F, COLUMNS)
        acc = tl.zeros((ROWS, FEATURES), tl.float32)
        for k in range(0, K, DEPTH):
            acc = tl.dot(x.load([m * ROWS, k]), w.load([n * FEATURES, k]).T, acc)
        acc = tl.dot(of_rows, of_features.T, acc)
        store_bits(mask_ptr, acc, rows, B, stride, n, ROWS, FEATURES)


def screen(
    x: Tensor, w: Tensor, row_terms: Tensor, feature_terms: Tensor, mask: Tensor, persistent: bool | None = None
) -> None:
    """mask [B, words(F)] int32 from x [B, K] and w [F, K] (float16 or bfloat16, of round.round_rows) and the terms
    [B, COLUMNS] and [F, COLUMNS]."""
    B, K = x.shape
    c = config("screen" if K <= 1024 else "screen_wide")
    if c["library"] and persistent is None:
        return screen_by_library(x, w, row_terms, feature_terms, mask)
    features = w.shape[0]
    tiles = cdiv(B, c["rows"]) * cdiv(features, c["features"])
    options = dict(
        ROWS=c["rows"], FEATURES=c["features"], DEPTH=c["depth"], GROUP=c["group"], COLUMNS=COLUMNS,
        num_warps=c["warps"], num_stages=c["stages"],
    )  # fmt: skip
    out = parts(mask, c["features"])
    arguments = (x, w, row_terms, feature_terms, out, B, features, K, out.shape[1])
    if c["persistent"] if persistent is None else persistent:
        triton.set_allocator(_scratch)
        programs = min(tiles, _multiprocessors(x.device))
        launch(_screen_persistent, (programs,), *arguments, programs, **options)
    else:
        launch(_screen, (tiles,), *arguments, **options)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the copy engine's descriptors, which the kernel writes itself."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def _scan(
    product_ptr, row_terms_ptr, feature_terms_ptr, mask_ptr, first_row, B, F, stride,
    FEATURES: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    b, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    features = n * FEATURES + tl.arange(0, FEATURES)
    rows = first_row + b + tl.zeros((1,), tl.int64)
    v = tl.load(product_ptr + b * F + features, mask=features < F, other=0.0)[None, :]
    at_features = feature_terms_ptr + tl.minimum(features, F - 1) * COLUMNS
    for c in tl.static_range(TERMS):
        of_rows = tl.load(row_terms_ptr + rows * COLUMNS + c).to(tl.float32)
        v += of_rows[:, None] * tl.load(at_features + c).to(tl.float32)[None, :]
    store_bits(mask_ptr, v, rows, B, stride, n, 1, FEATURES)


def scan(product: Tensor, first_row: int, row_terms: Tensor, feature_terms: Tensor, mask: Tensor) -> None:
    """The same mask for the rows first_row .. of a product [rows, F] float32 that is in memory."""
    rows, features = product.shape
    launch(
        _scan, (rows, cdiv(features, 1024)), product, row_terms, feature_terms, mask, first_row, row_terms.shape[0],
        features, mask.shape[1], FEATURES=1024, COLUMNS=COLUMNS, TERMS=TERMS, num_warps=4,
    )  # fmt: skip


CHUNK = 2**26  # entries of the product that the chunked variant holds: 256 MiB


def screen_by_library(x: Tensor, w: Tensor, row_terms: Tensor, feature_terms: Tensor, mask: Tensor) -> None:
    """screen by torch's product, chunk by chunk, and a scan of each: what the fused kernels have to beat."""
    B, features = x.shape[0], w.shape[0]
    step = max(1, min(B, CHUNK // features))
    for first in range(0, B, step):
        rows = x[first : first + step]
        # float32 out of 16-bit operands: only CUDA's product can
        product = torch.mm(rows, w.T, out_dtype=torch.float32) if x.is_cuda else rows.float() @ w.T.float()
        scan(product, first, row_terms, feature_terms, mask)
