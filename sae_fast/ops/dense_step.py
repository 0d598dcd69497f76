"""The gradients of a step whose code is dense, as it is with the peers' initialisation: half of all gates open.

Row chunk by row chunk six products of dense matrices of a Gated SAE (the encoder's made seven), four of any other, and
between them the pointwise part: one pass of the C++ engine over the entries; or plain PyTorch, on a GPU and for what the
engine has no such pass of.  The numbers of decode_loss, transpose and outer to rounding, without a permutation per entry.
They repeat bit for bit at one number of threads; across numbers they differ by rounding, as the BLAS splits the sum over
features of x̂ among its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_fast.code import Layer, SparseCode
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
    """losses [3] float64, else as in DecodeLoss.  Gradients: W_enc, W_dec [F, d]; parameters, [F] each: the bias and those
    of the activation; delta [F], the sum of u's; residual [d], the decoder's part of b_dec's.  norms [F]: sums of what the
    norms of rows cost.  errors [B, d]: x̂ − target.  constants [F] by parameter, of pulls."""

    losses: Tensor
    W_enc: Tensor
    W_dec: Tensor
    parameters: tuple[Tensor, ...]
    delta: Tensor
    norms: Tensor
    residual: Tensor
    errors: Tensor
    constants: Mapping[str, Tensor] = MappingProxyType({})


def dense_gradients(
    code: SparseCode, x_c: Tensor, target: Tensor, layer: Layer, W_dec: Tensor, b_dec: Tensor, sparsity_weight: Tensor,
    stop_auxiliary: bool, zeros: bool, pull: Callable[[SparseCode, Tensor, Tensor], Any], linear: bool,
) -> DenseGradients:  # fmt: skip
    """The losses and gradients of a layer's ``code`` of the rows x_c [B, d]; the rest as ops.decode_loss takes it.

    ``pull``(code, losses, grads) of some rows: (losses [3], the gradients of u, the bias and each parameter, constants,
    norms or None), an objective's from what decode_loss gives.  ``linear``: they are the activation's pullback.
    """
    problem = code, x_c, target, layer, W_dec, b_dec, sparsity_weight, stop_auxiliary
    return _by_engine(*problem) if linear and _native(x_c, W_dec) else _by_entries(*problem, zeros, pull)


def _native(*tensors: Tensor) -> bool:
    return cpu_rejects(*tensors) is None


def _square(r: Tensor) -> Tensor:
    """‖r‖², 0-d float64, by rows: the same for any number of threads."""
    return r.double().pow(2).sum(1).sum()


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
            squares[v] += _square(r)
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


def _by_entries(code, x_c, target, layer, W_dec, b_dec, sparsity_weight, stop_auxiliary, zeros, pull):
    (n, d), features = x_c.shape, W_dec.shape[0]
    dW_enc, dW_dec = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    sums, losses = W_dec.new_zeros(3 + len(layer.activation.parameters), features), W_dec.new_zeros(3, dtype=torch.float64)
    residual_sum, errors = W_dec.new_zeros(d), W_dec.new_empty(n, d)
    constants: dict[str, Tensor] = {}
    costs = bool(sparsity_weight.any())
    for first, last in crossovers.chunks(n, 2 * features, W_dec.device.type):
        rows, part = slice(first, last), _Chunk(code.of_rows(first, last))
        values, grads = part.code.values, torch.empty_like(part.code.values)
        of_part = torch.zeros_like(losses)
        for v, value in enumerate(values):
            r = torch.addmm(b_dec - target[rows], part.spread(value), W_dec)
            if v == 0:
                errors[rows] = r
            of_part[2 * v] = _square(r) / n
            if v == 0 or not stop_auxiliary:
                dW_dec.addmm_(part.block.T, r, alpha=2 / n)
                residual_sum += r.sum(0) * (2 / n)
            part.gather(torch.mm(r, W_dec.T, out=part.block), grads[v])
        grads *= 2 / n
        if costs:
            weight = sparsity_weight[part.code.indices] / n
            of_part[1] = (weight * values[-1]).sum(dtype=torch.float64)
            grads[-1] += weight
        if not zeros:
            grads[values == 0] = 0
        of_part, (delta, *pulled), of_rows, norms = pull(part.code, of_part, grads)
        losses += of_part
        for name, constant in of_rows.items():
            constants[name] = constants.get(name, 0) + constant
        # Sums by columns of a dense matrix: additions of entries onto features would come in any order on a GPU.
        columns = list(zip(sums, (*pulled, delta, norms), strict=True))
        for total, entry in columns:
            if entry is not None and entry is not delta:
                total += part.spread(entry).sum(0)
        of_delta = part.spread(delta).sum(0)
        for total, entry in columns:
            if entry is delta:
                total += of_delta
        dW_enc.addmm_(part.block.T, x_c[rows])
    *parameters, delta, norms = sums
    return DenseGradients(losses, dW_enc, dW_dec, tuple(parameters), delta, norms, residual_sum, errors, constants)


class _Chunk:
    """The code of some rows, and memory for a dense matrix of them, by the engine or, on a GPU, by torch."""

    def __init__(self, code: SparseCode):
        self.code, self.native = code, _native(code.u)
        self.block = code.u.new_empty(code.batch, code.d_sae)
        self.at = None if self.native else code.row_ids() * code.d_sae + code.indices

    def spread(self, entries: Tensor) -> Tensor:
        """``block``, with the entries [nnz] in their places and zeros elsewhere."""
        code = self.code
        if self.native:
            return crossovers.scatter(code.indptr, code.indices, None, 0, code.batch, entries.contiguous(), self.block)
        self.block.zero_().view(-1)[self.at] = entries
        return self.block

    def gather(self, dense: Tensor, out: Tensor) -> None:
        """The entries' places of a dense matrix, into out [nnz]."""
        if self.native:
            crossovers.gather(self.code.indptr, self.code.indices, 0, self.code.batch, dense, out)
        else:
            out.copy_(dense.view(-1)[self.at])


def _finish(n, squares, sparsity_weight, sums, dW_enc, dW_dec, residual_sum, errors):
    *parameters, delta, values = sums
    sparsity = (values.double() * sparsity_weight).sum()
    losses = torch.stack([squares[0], sparsity, squares[1]]) / n
    return DenseGradients(losses, dW_enc, dW_dec, tuple(parameters), delta, values, residual_sum, errors)
