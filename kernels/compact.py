"""compact and verify: from a mask to the entries of a code.

count → compact adds up the counts before each row, lists its candidates in ascending order and zeroes all values →
verify computes u of each by a float32 dot in a fixed order, drops those that are not members and writes u and the
activation's values.  What verify leaves is a code with gaps: row b's entries start where its candidates started.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.kernels import native
from sae_fast.kernels._activation import gate_of, magnitude_of
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import cdiv, launch
from sae_fast.kernels._mask import load_words
from sae_fast.kernels.flag import overflow
from sae_fast.kernels.sampled_dots import partial_dots, sum_over_slices


class Gapped(NamedTuple):
    """A code with gaps: row b owns the entries begin[b] .. end[b] of indices [C], u [C] and values [V, C].  The values in a
    gap are 0."""

    begin: Tensor
    end: Tensor
    indices: Tensor
    u: Tensor
    values: Tensor


@triton.jit
def popcount(word):
    """Bits set in int32 words."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


class Counted(NamedTuple):
    """Bits of a mask: of each row [B], and of each run of RUN rows, int64."""

    rows: Tensor
    runs: Tensor


RUN = 8  # rows that a program counts
RUNS = 512  # whose counts are added up at once
ZEROS = 512  # values that are zeroed at once


@triton.jit
def _count(mask_ptr, rows_ptr, runs_ptr, B, F, stride, RUN: tl.constexpr, WORDS: tl.constexpr):
    n = tl.program_id(0)
    of_run = tl.zeros((WORDS,), tl.int32)
    words_ptr = mask_ptr + n.to(tl.int64) * RUN * stride
    for b in range(n * RUN, tl.minimum((n + 1) * RUN, B)):
        of_row = tl.zeros((WORDS,), tl.int32)
        for first in range(0, F, 32 * WORDS):
            of_row += popcount(load_words(words_ptr, first // 32 + tl.arange(0, WORDS), F))
        words_ptr += stride
        tl.store(rows_ptr + b, tl.sum(of_row).to(tl.int64))
        of_run += of_row
    tl.store(runs_ptr + n, tl.sum(of_run).to(tl.int64))


def count(mask: Tensor, features: int) -> Counted:
    """The bits set in mask [B, words]."""
    c, B = config("compact"), mask.shape[0]
    counted = Counted(*(torch.empty(n, dtype=torch.int64, device=mask.device) for n in (B, cdiv(B, RUN))))
    mask = mask.view(torch.uint8)
    launch(
        _count, counted.runs.shape, mask, *counted, B, features, mask.shape[1], RUN=RUN, WORDS=c["words"],
        num_warps=c["warps"],
    )  # fmt: skip
    return counted


@triton.jit
def _sum(ptr, begin, end, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int64)
    for j in range(begin, end, BLOCK):
        at = j + tl.arange(0, BLOCK)
        total += tl.load(ptr + at, mask=at < end, other=0)
    return tl.sum(total)


@triton.jit
def _compact(
    mask_ptr, rows_ptr, runs_ptr, begin_ptr, end_ptr, candidates_ptr, values_ptr, flag_ptr, F, stride, capacity,
    V: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, WORDS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    b = n.to(tl.int64)
    share = tl.cdiv(capacity, tl.num_programs(0))
    for j in range(0, share, ZEROS):
        at = j + tl.arange(0, ZEROS)
        inside = (at < share) & (b * share + at < capacity)
        for v in tl.static_range(V):
            tl.store(values_ptr + v * capacity + b * share + at, 0.0, mask=inside)
    begin = _sum(runs_ptr, 0, n // RUN, RUNS) + _sum(rows_ptr, n // RUN * RUN, n, RUN)
    end = begin + tl.load(rows_ptr + b)
    tl.store(begin_ptr + b, begin)
    tl.store(end_ptr + b, end)
    if end > capacity:
        tl.atomic_or(flag_ptr, overflow)
    else:
        for first in range(0, F, 32 * WORDS):
            at = first // 32 + tl.arange(0, WORDS)
            word = load_words(mask_ptr + b * stride, at, F)
            size = popcount(word)
            slot = begin + tl.cumsum(size, 0) - size
            # Peels the lowest bit of all words at once: as many rounds as the fullest word has bits.
            for _ in range(tl.max(size, 0)):
                lowest = word & -word
                tl.store(candidates_ptr + slot, at * 32 + popcount(lowest - 1), mask=word != 0)
                slot += (word != 0).to(tl.int64)
                word = word ^ lowest
            begin += tl.sum(size, 0)


def compact(
    mask: Tensor, features: int, counted: Counted, begin: Tensor, end: Tensor, candidates: Tensor, values: Tensor,
    flag: Tensor,
) -> None:  # fmt: skip
    """candidates [C] int32, one row's after another's, ascending in each: row b's at begin[b] .. end[b], which are filled
    too.  A row that would end past C is left out and sets OVERFLOW in ``flag`` (int32).  ``values`` [V, C] become 0."""
    c = config("compact")
    mask = mask.view(torch.uint8)
    launch(
        _compact, (mask.shape[0],), mask, *counted, begin, end, candidates, values, flag, features, mask.shape[1],
        candidates.shape[0], V=values.shape[0], RUN=RUN, RUNS=RUNS, WORDS=c["words"], ZEROS=ZEROS, num_warps=c["warps"],
    )  # fmt: skip


@triton.jit
def _verify(
    partials_ptr, x_norms_ptr, W_norms_ptr, bias_ptr, cut_ptr, first_ptr, second_ptr,
    begin_ptr, end_ptr, candidates_ptr, indices_ptr, u_ptr, values_ptr, end_out_ptr,
    slices, x_norm_columns, W_norm_columns, capacity,
    KIND: tl.constexpr, V: tl.constexpr, EXACT: tl.constexpr, HAS_CUT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    if end > capacity:
        end = begin
    members = begin
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        member = at < end
        i = tl.load(candidates_ptr + at, mask=member, other=0)
        u = sum_over_slices(partials_ptr + at, capacity, slices, member)
        if not EXACT:  # of the scaled 16-bit copies
            u /= tl.load(x_norms_ptr + b * x_norm_columns)
            u /= tl.load(W_norms_ptr + i.to(tl.int64) * W_norm_columns, mask=member, other=1.0)
        pi = u + tl.load(bias_ptr + i, mask=member, other=0.0).to(tl.float32)
        if EXACT:
            if HAS_CUT:
                member = member & ((pi <= tl.load(cut_ptr + i, mask=member, other=0.0).to(tl.float32)) == 0)
            else:
                member = member & ((pi <= 0) == 0)
        slot = members + tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(values_ptr + slot, magnitude_of(KIND, u, pi, first_ptr, second_ptr, i, member), mask=member)
        if V == 2:
            tl.store(values_ptr + capacity + slot, gate_of(pi), mask=member)
        tl.store(indices_ptr + slot, i, mask=member)
        tl.store(u_ptr + slot, u, mask=member)
        members += tl.sum(member.to(tl.int32), 0)
    tl.store(end_out_ptr + b, members)


def verify(x: Tensor, layer: Layer, end: Tensor, candidates: Tensor, code: Gapped, norms: Tensor | None = None) -> None:
    """Fills ``code`` with the members among the candidates of rows x [B, d], those with not (x·w + bias <= cut): row b's
    candidates are at code.begin[b] .. end[b].  With ``norms`` (of round_rows) x is its 16-bit copy, W's is the layer's
    shadow's, and every candidate stays."""
    (rows, d), capacity = x.shape, candidates.shape[0]
    W, W_norms, columns = layer.W, None, (0, 0)
    if norms is not None:
        assert layer.shadow is not None
        W, W_norms = layer.shadow
        columns = norms.shape[1], W_norms.shape[1]
    entries = code.begin, end, candidates, code.indices, code.u, code.values, code.end
    if native.takes("verify") and code.u.dtype == layer.bias.dtype:
        native.call("verify", W.dtype, code.u.dtype, layer.activation.native, x, W, norms, W_norms, layer.bias, layer.cut,
                   *layer.vector_slots(), *entries, rows, d, *columns, capacity)  # fmt: skip
        return
    partials = partial_dots(code.begin, end, candidates, x, W)
    launch(
        _verify, (rows,), partials, norms, W_norms, layer.bias, layer.cut, *layer.vector_slots(), *entries,
        partials.shape[0], *columns, capacity, KIND=layer.activation.native, V=layer.activation.value_sets,
        EXACT=norms is None, HAS_CUT=layer.cut is not None, ENTRIES=config("sampled_dots")["finish"], num_warps=1,
    )  # fmt: skip


@triton.jit
def _pack(
    begin_ptr, end_ptr, indptr_ptr, indices_ptr, u_ptr, values_ptr, out_indices_ptr, out_u_ptr, out_values_ptr, capacity,
    nnz, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end, to = tl.load(begin_ptr + b), tl.load(end_ptr + b), tl.load(indptr_ptr + b)
    for j in range(begin, end, BLOCK):
        at = j + tl.arange(0, BLOCK)
        slot = to + at - begin
        inside = at < end
        tl.store(out_indices_ptr + slot, tl.load(indices_ptr + at, mask=inside), mask=inside)
        tl.store(out_u_ptr + slot, tl.load(u_ptr + at, mask=inside), mask=inside)
        for v in tl.static_range(V):
            value = tl.load(values_ptr + v * capacity + at, mask=inside)
            tl.store(out_values_ptr + v * nnz + slot, value, mask=inside)


def pack(begin: Tensor, end: Tensor, indices: Tensor, u: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(indptr, indices, u, values) of a code with gaps, without them.  Waits for the device, to learn how many they are."""
    B, V = begin.shape[0], values.shape[0]
    indptr = torch.zeros(B + 1, dtype=torch.int64, device=begin.device)
    torch.cumsum(end - begin, 0, out=indptr[1:])
    nnz = int(indptr[-1])
    if nnz == indices.shape[0]:
        return indptr, indices, u, values
    packed = indices.new_empty(nnz), u.new_empty(nnz), values.new_empty(V, nnz)
    launch(
        _pack, (B,), begin, end, indptr, indices, u, values, *packed, indices.shape[0], nnz, V=V, BLOCK=128, num_warps=1,
    )  # fmt: skip
    return (indptr, *packed)
