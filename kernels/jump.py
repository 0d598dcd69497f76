"""jump: the values of a code that L0's loss is of, and how many fire on an example: a program takes an example."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_fast.code import Layer
from sae_fast.kernels._config import config
from sae_fast.kernels._launch import launch
from sae_fast.kernels.compact import Gapped


@triton.jit
def _jump(
    begin_ptr, end_ptr, indices_ptr, u_ptr, values_ptr, bias_ptr, threshold_ptr, below_ptr, l0_ptr, ENTRIES: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begin_ptr + b), tl.load(end_ptr + b)
    total = tl.zeros((ENTRIES,), tl.int32)
    for j in range(begin, end, ENTRIES):
        at = j + tl.arange(0, ENTRIES)
        inside = at < end
        i = tl.load(indices_ptr + at, mask=inside, other=0)
        pi = tl.load(u_ptr + at, mask=inside, other=0.0) + tl.load(bias_ptr + i, mask=inside, other=0.0)
        threshold = tl.load(threshold_ptr + i, mask=inside, other=0.0)
        fires = pi > threshold
        tl.store(values_ptr + at, tl.where(fires, pi, 0.0), mask=inside)
        if below_ptr is not None:
            fires = fires & (threshold >= 0)  # the others are counted once for all
        total += (fires & inside).to(tl.int32)
    l0 = tl.sum(total, axis=0)
    if below_ptr is not None:
        l0 += tl.load(below_ptr).to(tl.int32)
    tl.store(l0_ptr + b, l0)


def jump(code: Gapped, layer: Layer, of_f: bool) -> Tensor:
    """l0 [B] int32 of a code, whose values become π where it exceeds the threshold, also where both are negative, and 0.
    With ``of_f`` a feature whose threshold is negative counts on every example, as L0's window "f" has it."""
    threshold, l0 = layer.vectors[0], torch.empty(code.begin.shape, dtype=torch.int32, device=code.u.device)
    below = (threshold < 0).sum() if of_f else None
    launch(
        _jump, (code.begin.shape[0],), *code, layer.bias, threshold, below, l0, ENTRIES=config("decode_loss")["finish"],
        num_warps=1,
    )  # fmt: skip
    return l0
