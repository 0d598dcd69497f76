"""largest: of a code with gaps, the k largest pre-activations of each row, or the k · B largest of the batch.

A π > 0 is taken by its bits as an integer, which are in its order; a NaN is the largest, and 0, which gaps hold too, is
never chosen.  The k-th largest of a row is found bit by bit, by counting; that of a batch in three digits of 11, 10 and 10
bits, each by a histogram, whose counts are integers: the order in which they are added changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.kernels._activation import gate_of, magnitude_of
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels.compact import Gapped
from sae_fast.kernels.flag import overflow, short

BINS = 2**11  # of a digit


class Largest(NamedTuple):
    """The entries that are kept: the k largest π > 0 of each row, or, if ``whole``, the k · B largest of the batch; of
    equal ones those of lower rows, and in a row of lower features.  ``floor`` [B] float32: that of the candidates, if
    they had one."""

    k: int
    whole: bool = False
    floor: Tensor | None = None


@triton.jit
def _key(pi):
    """int32 in the order of pi, 0 where pi is not above 0."""
    key = tl.where(pi > 0, pi.to(tl.int32, bitcast=True), 0)
    return tl.where(pi != pi, 0x7FFFFFFF, key)


@triton.jit
def _keys(pi_ptr, at, end):
    return _key(tl.load(pi_ptr + at, mask=at < end, other=0.0))


@triton.jit
def _bin(counts_ptr, k, BINS: tl.constexpr):
    """The bin of the k-th largest of what is counted, or the first; how many are in larger ones."""
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins)
    chosen = tl.maximum(tl.sum((tl.cumsum(counts, 0, reverse=True) >= k).to(tl.int32)) - 1, 0)
    return chosen, tl.sum(tl.where(bins > chosen, counts, 0))


@triton.jit
def _prefix(counts_ptr, k, DIGIT: tl.constexpr, BINS: tl.constexpr):
    """The first DIGIT digits of the k-th largest, and its place among those that share them."""
    found = 0
    for digit in tl.static_range(DIGIT):
        chosen, above = _bin(counts_ptr + digit * BINS, k, BINS)
        k -= above
        found = (found << (11 if digit == 0 else 10)) | chosen
    return found, k


@triton.jit
def _histogram(pi_ptr, counts_ptr, capacity, k, DIGIT: tl.constexpr, BINS: tl.constexpr, ENTRIES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    key = _keys(pi_ptr, at, capacity)
    if DIGIT == 0:
        digit = key >> 20
    else:
        found, k = _prefix(counts_ptr, k, DIGIT, BINS)
        shift: tl.constexpr = 20 - 10 * (DIGIT - 1)
        digit = tl.where(key >> shift == found, (key >> (shift - 10)) & 1023, 1024)  # a bin that nobody reads
    counts = tl.histogram(digit, BINS)
    bins = tl.arange(0, BINS)
    if DIGIT > 0:
        counts = tl.where(bins < 1024, counts, 0)
    tl.atomic_add(counts_ptr + DIGIT * BINS + bins, counts, mask=counts > 0)


@triton.jit
def _ties(pi_ptr, counts_ptr, last_ptr, ties_ptr, capacity, k, BINS: tl.constexpr, ENTRIES: tl.constexpr):
    n = tl.program_id(0)
    last, left = _prefix(counts_ptr, k, 3, BINS)
    if n == 0:
        tl.store(last_ptr, last)
        tl.store(last_ptr + 1, left)
        tl.store(last_ptr + 2, tl.load(counts_ptr + 2 * BINS + (last & 1023)))
    at = n.to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    tl.store(ties_ptr + n, tl.sum((_keys(pi_ptr, at, capacity) == last).to(tl.int32)))


@triton.jit
def _ties_before(pi_ptr, ties_ptr, begin, last, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """The number of entries like the last before ``begin``; ties [·] are those of runs of ENTRIES."""
    total = tl.zeros((BLOCK,), tl.int32)
    runs = begin // ENTRIES
    for j in range(0, runs, BLOCK):
        at = j + tl.arange(0, BLOCK)
        total += tl.load(ties_ptr + at, mask=at < runs, other=0)
    for j in range(runs * ENTRIES, begin, BLOCK):
        total += (_keys(pi_ptr, j + tl.arange(0, BLOCK), begin) == last).to(tl.int32)
    return tl.sum(total)


@triton.jit
def _above(start, pi_ptr, begin, end, key, BLOCK: tl.constexpr):
    """The number of entries begin .. end whose key is above this one; ``start``: the first block's keys."""
    total = (start > key).to(tl.int32)
    for j in range(begin + BLOCK, end, BLOCK):
        total += (_keys(pi_ptr, j + tl.arange(0, BLOCK), end) > key).to(tl.int32)
    return tl.sum(total)


@triton.jit
def _select(
    begin_ptr, end_ptr, indices_ptr, u_ptr, pi_ptr, bias_ptr, first_ptr, second_ptr, floor_ptr, last_ptr, ties_ptr,
    out_end_ptr, out_indices_ptr, out_u_ptr, out_values_ptr, flag_ptr, k, capacity,
    WHOLE: tl.constexpr, HAS_FLOOR: tl.constexpr, KIND: tl.constexpr, V: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    if WHOLE:
        last, left = tl.load(last_ptr), tl.load(last_ptr + 1)
        if left < tl.load(last_ptr + 2):  # of equal ones not all are chosen
            left -= _ties_before(pi_ptr, ties_ptr, begin, last, ENTRIES, BLOCK)
    else:
        start, last = _keys(pi_ptr, begin + tl.arange(0, BLOCK), end), 0
        for bit in range(31):
            least = last | (1 << (30 - bit))
            last = tl.where(_above(start, pi_ptr, begin, end, least - 1, BLOCK) >= k, least, last)
        left = k - _above(start, pi_ptr, begin, end, last, BLOCK)
    if HAS_FLOOR:
        floor = tl.load(floor_ptr + b)
        if last < tl.where(floor > 0, _key(floor), 0):
            end = begin
            tl.atomic_or(flag_ptr, short, mask=(tl.load(flag_ptr) & overflow) == 0)
    kept = begin
    for j in range(begin, end, BLOCK):
        at = j + tl.arange(0, BLOCK)
        key = _keys(pi_ptr, at, end)
        equal = (key == last) & (key > 0)
        chosen = (key > last) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        left -= tl.sum(equal.to(tl.int32))
        slot = kept + tl.cumsum(chosen.to(tl.int32), 0) - 1
        i = tl.load(indices_ptr + at, mask=chosen, other=0)
        u = tl.load(u_ptr + at, mask=chosen, other=0.0)
        pi = u + tl.load(bias_ptr + i, mask=chosen, other=0.0).to(tl.float32)
        tl.store(out_values_ptr + slot, magnitude_of(KIND, u, pi, first_ptr, second_ptr, i, chosen), mask=chosen)
        if V == 2:
            tl.store(out_values_ptr + capacity + slot, gate_of(pi), mask=chosen)
        tl.store(out_indices_ptr + slot, i, mask=chosen)
        tl.store(out_u_ptr + slot, u, mask=chosen)
        kept += tl.sum(chosen.to(tl.int32), 0)
    tl.store(out_end_ptr + b, kept)


def largest(found: Gapped, layer: Layer, which: Largest, flag: Tensor) -> Gapped:
    """The code of the largest entries of ``found``, whose u is float32 and whose one value set is ReLU(π).

    Where the floor hides some of them, as fewer than k (k · B) entries reach it, the row stays empty and SHORT is set in
    ``flag``, unless OVERFLOW is, of which it may be the consequence."""
    c, capacity, (B,), device = config("largest"), found.u.shape[0], found.begin.shape, found.u.device
    k, last, ties = which.k, None, None
    if which.whole:
        runs = max(1, cdiv(capacity, c["counted"]))
        k, counts = k * B, torch.zeros(3, BINS, dtype=torch.int32, device=device)
        last, ties = counts.new_empty(3), counts.new_empty(runs)
        sizes = dict(BINS=BINS, ENTRIES=c["counted"], num_warps=c["warps"])
        for digit in range(3):
            launch(_histogram, (runs,), found.values, counts, capacity, k, DIGIT=digit, **sizes)
        launch(_ties, (runs,), found.values, counts, last, ties, capacity, k, **sizes)
    dtype, kind = layer.bias.dtype, layer.activation
    out = Gapped(
        found.begin, torch.empty_like(found.end), torch.empty_like(found.indices), torch.empty_like(found.u, dtype=dtype),
        torch.zeros(kind.value_sets, capacity, dtype=dtype, device=device),
    )  # fmt: skip
    launch(
        _select, (B,), found.begin, found.end, found.indices, found.u, found.values, layer.bias, *layer.vector_slots(),
        which.floor, last, ties, *out[1:], flag, k, capacity, WHOLE=which.whole, HAS_FLOOR=which.floor is not None,
        KIND=kind.native, V=kind.value_sets, ENTRIES=c["counted"], BLOCK=c["block"], num_warps=1,
    )  # fmt: skip
    return out
