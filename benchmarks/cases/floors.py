"""Floors: parts of the work alone, for scale.  They are what a step or an encoder cannot be much faster than."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Case, Run, Shape
from sae_fast import GatedSAE


def bare_product(sae: GatedSAE) -> Run:
    """The encoder's product, as one writes it."""
    W_enc = sae.W_enc.detach()
    return lambda x: x @ W_enc.T


def bare_product_out(sae: GatedSAE) -> Run:
    """The same into memory that is there already: no page of the result is new to the process."""
    W_enc, out = sae.W_enc.detach(), torch.empty(0)
    return lambda x: torch.mm(x, W_enc.T, out=out.resize_(x.shape[0], W_enc.shape[0]))


def bf16_product(sae: GatedSAE) -> Run:
    """The same in bf16, of weights that were converted before."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError("this processor has no fast bf16 product")
    W_enc, out = sae.W_enc.detach().bfloat16(), torch.empty(0, dtype=torch.bfloat16)
    return lambda x: torch.mm(x.bfloat16(), W_enc.T, out=out.resize_(x.shape[0], W_enc.shape[0]))


def step_bytes(shape: Shape, touched: int) -> int:
    """The bytes that a step with lazy Adam must move at least, when each is read once and written once:

      x                                   read                 4 · B · d
      W_enc in bf16, for the product      read                 2 · F · d
      the same, of the touched rows       written              2 · touched · d
      W_enc, W_dec and their two v, fp32  read and written    32 · touched · d

    The code, the residuals and what is of size F are taken to stay in cache, and so is W_dec between decoder and update.
    """
    return 4 * shape.B * shape.d + 2 * shape.F * shape.d + (2 + 32) * touched * shape.d


def step_floor(sae: GatedSAE) -> Run:
    """The bf16 product, then a copy that moves as many bytes as the step must: the product's time plus
    bytes ÷ copy bandwidth.  The touched rows are counted on the first batch, outside the timing (all are alike)."""
    product = bf16_product(sae)
    buffers: list[Tensor] = []

    def run(x: Tensor) -> None:
        if not buffers:
            with torch.no_grad():
                touched = sae.encode_sparse(x).indices.unique().numel()
            moved = step_bytes(Shape(x.shape[0], sae.d_in, sae.d_sae, 0), touched)
            buffers.extend(torch.ones(moved // 8) for _ in range(2))  # half is read, half is written, in fp32
        product(x)
        buffers[1].copy_(buffers[0])

    return run


def add_products(case: Case) -> None:
    """Registers the three products as floors of a case."""
    case.provider("bare_product", floor=True)(bare_product)
    case.provider("bare_product_out", floor=True)(bare_product_out)
    case.provider("bf16_product", floor=True, optional=True)(bf16_product)
