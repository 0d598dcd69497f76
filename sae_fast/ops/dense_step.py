"""The gradients of a step whose code is dense, as it is with the peers' initialisation: half of all gates open.

Row chunk by row chunk six products of dense matrices (the encoder's made seven), and between them the pointwise part: one
pass of the C++ engine over the entries, or plain PyTorch on a GPU.  The numbers of decode_loss, transpose and outer to
rounding, without a gradient or a permutation per entry.  They repeat bit for bit at one number of threads; across numbers
the BLAS rounds differently.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast.code import Layer, SparseCode, row_ids
from sae_fast.ops import crossovers
from sae_fast.ops.dispatch import cpu_rejects, may_run, triton_rejects
from sae_fast.ops.native import _C, threads

PARTS = 16  # runs of rows by which a chunk's sums are taken: fixed, so that they repeat


def dense_step_pays(code: SparseCode, W: Tensor) -> bool:
    """True if the engine takes this way for a code with the weight W [F, d]."""
    if triton_rejects(W) is None:
        return crossovers.gpu_rejects(code.nnz, code.batch, code.d_sae) is not None
    return cpu_rejects(W) is None and may_run("cpu") and crossovers.is_dense("step", code.nnz, code.batch, code.d_sae)


class DenseGradients(NamedTuple):
    """losses [3] as in DecodeLoss.  Gradients: W_enc, W_dec [F, d]; parameters, [F] each: the bias and those of the
    activation; delta [F], the sum of u's; residual [d], the decoder's part of b_dec's.  values [F]: sums of the values that
    are penalised.  errors [B, d]: x̂ − target."""

    losses: Tensor
    W_enc: Tensor
    W_dec: Tensor
    parameters: tuple[Tensor, ...]
    delta: Tensor
    values: Tensor
    residual: Tensor
    errors: Tensor


def dense_gradients(
    code: SparseCode, x_c: Tensor, target: Tensor, layer: Layer, W_dec: Tensor, b_dec: Tensor, sparsity_weight: Tensor,
    stop_auxiliary: bool,
) -> DenseGradients:  # fmt: skip
    """The losses and gradients of a layer's ``code`` of the rows x_c [B, d]; the rest as ops.decode_loss takes it."""
    body = _by_engine if cpu_rejects(x_c, W_dec) is None else _by_torch
    return body(code, x_c, target, layer, W_dec, b_dec, sparsity_weight, stop_auxiliary)


def _by_engine(code, x_c, target, layer, W_dec, b_dec, sparsity_weight, stop_auxiliary):
    (n, d), features = x_c.shape, W_dec.shape[0]
    two = layer.activation.value_sets == 2
    vector = layer.vectors[0].contiguous() if layer.vectors else None
    dW_enc, dW_dec = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    sums = W_dec.new_zeros(PARTS, 5, features)
    squares = W_dec.new_zeros(2, dtype=torch.float64)
    residual_sum, errors = W_dec.new_zeros(d), W_dec.new_empty(n, d)
    for first, last in crossovers.chunks(n, 2 * features):
        rows = slice(first, last)
        offset = b_dec - target[rows]
        blocks: list[Tensor] = []
        for v, values in enumerate(code.values):
            block = W_dec.new_empty(last - first, features)
            crossovers.scatter(code.indptr, code.indices, None, first, last, values, block)
            r = torch.addmm(offset, block, W_dec)
            if v == 0:
                errors[rows] = r
            squares[v] += r.double().pow(2).sum()
            if v == 0 or not stop_auxiliary:
                dW_dec.addmm_(block.T, r, alpha=2 / n)
                residual_sum += r.sum(0) * (2 / n)
            blocks.append(torch.mm(r, W_dec.T, out=block))
        u_gradients = blocks[0]
        _C.value_gradients(
            kind=layer.activation.native, code=(code.indptr[first : last + 1], code.indices), nnz=code.nnz, u=code.u,
            values=code.values, first=vector, sparsity_weight=sparsity_weight, normaliser=float(n), features=features,
            parts=PARTS, dots=u_gradients, dots_aux=blocks[1] if two else None, sums=sums, threads=threads(),
        )  # fmt: skip
        dW_enc.addmm_(u_gradients.T, x_c[rows])
    return _finish(n, squares, sparsity_weight, sums.sum(0), dW_enc, dW_dec, residual_sum, errors)


def _by_torch(code, x_c, target, layer, W_dec, b_dec, sparsity_weight, stop_auxiliary):
    (n, d), features = x_c.shape, W_dec.shape[0]
    dW_enc, dW_dec = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    sums = W_dec.new_zeros(5, features)
    squares = W_dec.new_zeros(2, dtype=torch.float64)
    residual_sum, errors = W_dec.new_zeros(d), W_dec.new_empty(n, d)
    for first, last in crossovers.chunks(n, 2 * features, W_dec.device.type):
        rows = slice(first, last)
        begin, end = code.indptr[[first, last]].tolist()
        indptr, i = code.indptr[first : last + 1] - begin, code.indices[begin:end].long()
        at = row_ids(indptr, end - begin) * features + i
        block = W_dec.new_empty(last - first, features)

        def spread(entries, block=block, at=at):
            block.zero_().view(-1)[at] = entries
            return block

        weight = sparsity_weight[i] / n
        values, grads = code.values[:, begin:end], []
        for v, value in enumerate(values):
            r = torch.addmm(b_dec - target[rows], spread(value), W_dec)
            if v == 0:
                errors[rows] = r
            squares[v] += r.double().pow(2).sum()
            if v == 0 or not stop_auxiliary:
                dW_dec.addmm_(block.T, r, alpha=2 / n)
                residual_sum += r.sum(0) * (2 / n)
            grads.append(torch.mm(r, W_dec.T, out=block).view(-1)[at] * (2 / n))
        grads[-1] = grads[-1] + weight
        grads = [torch.where(value != 0, g, 0) for value, g in zip(values, grads, strict=True)]
        delta, *pulled = layer.activation.pullback(code.u[begin:end], grads, i, layer.vectors)
        # Sums by columns of a dense matrix: additions of entries onto features would come in any order on a GPU.
        for total, entry in zip(sums, (*pulled, *[None] * (3 - len(pulled)), delta, values[-1]), strict=True):
            if entry is not None:
                total += spread(entry).sum(0)
        dW_enc.addmm_(spread(delta).T, x_c[rows])
    return _finish(n, squares, sparsity_weight, sums, dW_enc, dW_dec, residual_sum, errors)


def _finish(n, squares, sparsity_weight, sums, dW_enc, dW_dec, residual_sum, errors):
    *parameters, delta, values = sums
    sparsity = (values.double() * sparsity_weight).sum()
    losses = torch.stack([squares[0], sparsity, squares[1]]) / n
    return DenseGradients(losses.to(dW_dec.dtype), dW_enc, dW_dec, tuple(parameters), delta, values, residual_sum, errors)
