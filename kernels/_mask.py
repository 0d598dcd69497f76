"""The screen's mask: a bit an entry, in words of 32 that are in the order of the tensor cores' accumulators.

Bit 2j + e of word 4q + w of a row is that of feature 128q + 8j + 2w + e (j < 16, w < 4, e < 2).  A thread has all of a
word's entries, so that the product's epilogue exchanges nothing; who reads the mask brings them into ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.kernels._launch import cdiv


def words(features: int) -> int:
    """int32 words of a row's mask; those past the last feature's hold nothing that is read."""
    return cdiv(features, 256) * 8


def places(features: Tensor) -> tuple[Tensor, Tensor]:
    """The word of each feature and its bit there."""
    return features // 128 * 4 + features % 8 // 2, features % 128 // 8 * 2 + features % 2


def parts(mask: Tensor, tile: int) -> Tensor:
    """The mask in parts of words: those that a tile of so many features has whole."""
    return mask.view({32: torch.int8, 64: torch.int16, 128: torch.int32}[min(tile, 128)])


@triton.jit
def store_bits(parts_ptr, v, rows, B, stride, n, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Sets a bit for each value of v [ROWS, FEATURES], of tile n of features, that is not ≤ 0, so that a NaN has one."""
    PAIRS: tl.constexpr = 16 if FEATURES > 128 else FEATURES // 8
    WORDS: tl.constexpr = FEATURES // (2 * PAIRS)
    SHARE: tl.constexpr = 16 // PAIRS  # tiles that share a word
    bit = 1 << (2 * tl.arange(0, PAIRS)[:, None, None] + tl.arange(0, 2))
    values = tl.reshape(v, (ROWS, WORDS // 4, PAIRS, 4, 2))
    bits = tl.reshape(tl.sum(tl.sum(tl.where(values <= 0, 0, bit), 4), 2), (ROWS, WORDS))
    part = (n // SHARE * WORDS + tl.arange(0, WORDS)) * SHARE + n % SHARE
    tl.store(
        parts_ptr + rows.to(tl.int64)[:, None] * stride + part[None, :], bits.to(parts_ptr.dtype.element_ty),
        mask=(rows < B)[:, None] & (part < stride)[None, :],
    )  # fmt: skip


@triton.jit
def load_words(bytes_ptr, n, F):
    """Words n of a row's mask in ascending order: bit k is that of feature 32n + k, and 0 past the last feature."""
    word = tl.zeros_like(n)
    for w in tl.static_range(4):
        byte = tl.load(bytes_ptr + n // 4 * 16 + 4 * w + n % 4, mask=n * 32 < F, other=0)
        word |= byte.to(tl.int32) << 8 * w
    # The 4 × 4 pairs of bits are transposed: from (w, j) to (j, w).
    swapped = (word ^ word >> 6) & 0x00CC00CC
    word ^= swapped ^ swapped << 6
    swapped = (word ^ word >> 12) & 0x0000F0F0
    word ^= swapped ^ swapped << 12
    left = F - n * 32
    return word & tl.where(left >= 32, -1, (1 << tl.maximum(tl.minimum(left, 31), 0)) - 1)
