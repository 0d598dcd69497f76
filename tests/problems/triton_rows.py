"""Codes with gaps, where Triton's kernels run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from problems.gapped import DEVICE, Gapped, on_device
from sae_fast import ops
from sae_fast.activations import named
from sae_fast.code import Layer, SparseCode
from sae_fast.kernels import decode_loss as decode_loss_kernel
from sae_fast.penalty import LINEAR, Penalty


def code_to(code: SparseCode, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> SparseCode:
    parts = {name: getattr(code, name).to(device) for name in ("indptr", "indices")}
    return replace(code, **parts, u=code.u.to(device, dtype), values=code.values.to(device, dtype))


def host(result):
    return type(result)(*(t.cpu() for t in result)) if isinstance(result, tuple) else result.cpu()


def run_losses(code: SparseCode, *arguments: Tensor, normaliser: float) -> ops.DecodeLoss:
    return host(ops.decode_loss(code_to(code, arguments[0].dtype), *on_device(*arguments), normaliser))


def run_gapped(gapped: Gapped, W, b_dec, target, weight, normaliser, u=None, scale=None, step: bool = False):
    """(residuals, losses_rows, grads, delta, entries, decoder, along) of the kernels on buffers with gaps."""
    V, (rows, d), dtype = gapped.values.shape[0], target.shape, W.dtype
    residuals = torch.empty(V, rows, d, device=DEVICE, dtype=dtype)
    losses = torch.empty(rows, 3, device=DEVICE)
    grads, (delta, decoder, along) = gapped.blank(V, dtype=dtype), (gapped.blank(dtype=dtype) for _ in range(3))
    entries = torch.full((gapped.capacity, 4), -7.0, dtype=dtype, device=DEVICE)
    outputs = None
    if step:
        kind = named("relu" if V == 1 else "gated")
        layer = Layer(W, b_dec, kind, () if V == 1 else (scale.to(DEVICE), scale.to(DEVICE)))
        given = gapped.spread(u), Penalty(LINEAR), torch.ones((), device=DEVICE)
        outputs = decode_loss_kernel.StepOutputs(layer, *given, delta, entries, decoder, along, V == 2)
    code, out = (
        (gapped.begin, gapped.end, gapped.indices, gapped.values),
        decode_loss_kernel.Outputs(residuals, grads, losses),
    )
    decode_loss_kernel.decode_loss(code, *on_device(W, b_dec, target, weight), normaliser, out, outputs)
    between = [gapped.packed(t) for t in (grads, *((delta, entries.T, decoder, along) if step else ()))]
    return residuals.cpu(), losses.cpu(), *between
