"""decode_loss: decode ∘ loss ∘ sampled_dots, fused, of one reconstruction or of Matryoshka prefixes.

Body ``cpu``: one visit of each example; above the crossover density dense row chunks.  ``triton``, ``cuda``: one visit of
each slice of an example; prefixes have a kernel in Triton alone.
``reference``: dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast.code import SparseCode, Transposed, row_ids
from sae_fast.ops import autograd, checks, crossovers
from sae_fast.ops.dispatch import cpu_rejects, cuda_rejects, pick, triton_rejects
from sae_fast.ops.native import _C, threads


class DecodeLoss(NamedTuple):
    """losses [3]: reconstruction, sparsity, auxiliary.  residual [B, d]: r = x̂ − target; residual_aux: x̂_aux − target, or
    [0, d] without gates.  grads [V, nnz]: the gradient of the losses' sum with respect to the code's values.

    With prefixes residual is [G, B, d], the sums R_j = Σ_{g ≥ j} c_g r_g that gradients are made of (``prefix_rows``), and
    so is residual_aux, or [0, B, d]."""

    losses: Tensor
    residual: Tensor
    residual_aux: Tensor
    grads: Tensor


def decode_loss(
    code: SparseCode,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    sparsity_weight: Tensor,
    normaliser: float,
    stop_auxiliary: bool = True,
    *,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Tensor | None = None,
    zeros: bool = False,
) -> DecodeLoss:
    """The losses of equation (8) on a code, and what their gradients need (MATH.md §2, and §8 for prefixes).

    With N = ``normaliser`` (the batch size, for means) and the code's magnitudes m and gates g:
      x̂ = m W_dec + b_dec,  reconstruction = ‖x̂ − target‖² / N
      two value sets:  sparsity = Σ weight_i g_i / N,  x̂_aux = g W_dec + b_dec,  auxiliary = ‖x̂_aux − target‖² / N,
                       grads = (2 r·d_i / N where m ≠ 0,  (2 r_aux·d_i + weight_i) / N where g ≠ 0)
      one value set:   sparsity = Σ weight_i m_i / N,  auxiliary = 0,  grads = ((2 r·d_i + weight_i) / N where m ≠ 0)
    W_dec [F, d_out], b_dec [d_out], target [B, d_out] (x, or a transcoder's output), sparsity_weight [F] (λ, or λ‖d_i‖).

    ``prefixes``, the ends e_1 < … < e_G = F of nested dictionaries, put Σ_g c_g ‖x̂_g − target‖² in the place of a square,
    x̂_g of the features below e_g alone; ``prefix_weights`` [G] are the c_g ≥ 0, by default 1, constants to autograd.
    The r of a feature from e_{j−1} on and below e_j is then R_j.

    An entry whose value is 0 gets gradient 0, that of the ReLU behind it; with ``zeros`` it gets 2 r·d_i / N, which a
    straight-through window needs, and still no penalty.
    ``losses`` is differentiable with respect to the values, W_dec, b_dec, target and sparsity_weight; ``stop_auxiliary``
    keeps the auxiliary term's gradient from W_dec and b_dec.  The other outputs are constants to autograd.
    """
    checks.shape("W_dec", W_dec, code.d_sae, "d_out")
    return DecodeLoss(
        *autograd.call(
            "decode_loss",
            code.indptr,
            code.indices,
            code.values,
            W_dec,
            b_dec,
            target,
            sparsity_weight,
            float(normaliser),
            stop_auxiliary,
            None if prefixes is None else list(prefixes),
            prefix_weights,
            zeros,
        )
    )


def prefix_rows(csc: Transposed, prefixes: Sequence[int] | Tensor, batch: int) -> Transposed:
    """The entries by feature with rows of R.flatten(0, 1) [G·B, d] in the place of examples: with it outer and weight_step
    sum, in one pass, each feature's entries times the residuals of its own group."""
    if not isinstance(prefixes, Tensor):
        prefixes = torch.tensor(prefixes, dtype=torch.int64, device=csc.colptr.device)
    starts = csc.colptr[prefixes[:-1]]
    at = torch.arange(csc.rows.shape[0], device=starts.device)
    return replace(csc, rows=csc.rows + batch * torch.bucketize(at, starts, right=True, out_int32=True))


class _Given(NamedTuple):
    """The op's arguments."""

    indptr: Tensor
    indices: Tensor
    values: Tensor
    W_dec: Tensor
    b_dec: Tensor
    target: Tensor
    sparsity_weight: Tensor
    normaliser: float
    stop_auxiliary: bool
    prefixes: list[int] | None
    prefix_weights: Tensor | None
    zeros: bool

    def contiguous(self) -> _Given:
        return _Given._make(t.contiguous() if isinstance(t, Tensor) else t for t in self)

    def bounds(self) -> list[int]:
        """[G + 1]: the ends of the groups of features, from 0; without prefixes there is one group."""
        return [0, *(self.prefixes or [self.W_dec.shape[0]])]

    def groups(self) -> list[tuple[int, int]]:
        return list(pairwise(self.bounds()))

    def residual_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of residual and residual_aux."""
        shape = (*([] if self.prefixes is None else [len(self.prefixes)]), *self.target.shape)
        return [shape, shape if self.values.shape[0] == 2 else (0, *shape[1:])]


# The normaliser is a Scalar: a float would tie a compiled graph to one batch size.
@torch.library.custom_op(
    "sae_fast::decode_loss",
    mutates_args=(),
    schema="(Tensor indptr, Tensor indices, Tensor values, Tensor W_dec, Tensor b_dec, Tensor target,"
    " Tensor sparsity_weight, Scalar normaliser, bool stop_auxiliary, int[]? prefixes, Tensor? prefix_weights, bool zeros)"
    " -> (Tensor losses, Tensor residual, Tensor residual_aux, Tensor grads)",
)
def _decode_loss(*arguments):
    p = _Given(*arguments)
    checks.shape("W_dec", p.W_dec, "F", "d_out")
    checks.csr(p.indptr, p.indices, p.W_dec.shape[0])
    features, d = p.W_dec.shape
    checks.shape("values", p.values, "V", p.indices.shape[0])
    if p.values.shape[0] not in (1, 2):
        raise ValueError(f"values: got {p.values.shape[0]} value sets, want 1 (magnitudes) or 2 (magnitudes, gates)")
    checks.shape("b_dec", p.b_dec, d)
    checks.shape("target", p.target, p.indptr.shape[0] - 1, d)
    checks.shape("sparsity_weight", p.sparsity_weight, features)
    for name in ("values", "b_dec", "target", "sparsity_weight"):
        checks.floating(name, getattr(p, name), p.W_dec, "W_dec")
    if not p.normaliser > 0:
        raise ValueError(f"normaliser: got {p.normaliser}, want a positive number such as the batch size")
    _check_prefixes(p.prefixes, p.prefix_weights, p.W_dec)
    inputs = (p.W_dec, p.indptr, p.indices)
    dense = crossovers.gpu_rejects(p.indices.shape[0], p.target.shape[0], features)
    body = pick(
        "decode_loss",
        {"cpu": _cpu, "cuda": _gpu, "triton": _gpu, "reference": _reference},
        {
            "cpu": cpu_rejects(*inputs),
            "cuda": "it has no kernel of prefixes" if p.prefixes else cuda_rejects("decode_loss", *inputs) or dense,
            "triton": triton_rejects(*inputs) or dense,
        },
    )
    return body(p)


def _check_prefixes(prefixes: Sequence[int] | None, weights: Tensor | None, W_dec: Tensor) -> None:
    if prefixes is None:
        if weights is not None:
            raise ValueError(f"prefix_weights: got {tuple(weights.shape)} without prefixes, want None")
        return
    ends = [0, *prefixes]
    if ends[-1] != W_dec.shape[0] or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"prefixes: got {ends[1:]}, want ends that ascend from at least 1 to F = {W_dec.shape[0]}")
    if weights is None:
        return
    checks.shape("prefix_weights", weights, len(prefixes))
    checks.floating("prefix_weights", weights, W_dec, "W_dec")
    if weights.device.type == "cpu" and not bool((weights >= 0).all()):
        raise ValueError(f"prefix_weights: got {weights.tolist()}, want numbers that are not negative")


@_decode_loss.register_fake
def _(*arguments):
    p = _Given(*arguments)
    residuals = [p.target.new_empty(shape) for shape in p.residual_shapes()]
    return p.target.new_empty(3), *residuals, torch.empty_like(p.values, memory_format=torch.contiguous_format)


def _cpu(p: _Given):
    p = p.contiguous()
    (rows, d), nnz, V = p.target.shape, p.indices.shape[0], p.values.shape[0]
    if crossovers.is_dense("decode_loss", nnz, rows, p.W_dec.shape[0]):
        return _cpu_dense(p)
    residual, residual_aux = (p.target.new_empty(shape) for shape in p.residual_shapes())
    losses, grads = p.target.new_empty(rows, 3), torch.empty_like(p.values)
    # torch gives an empty tensor the address 0, which would read as "no gates"
    values = p.values if nnz else p.values.new_empty(V, 1)
    gates = values[1] if V == 2 else None
    _C.decode_loss(
        code=(p.indptr, p.indices), nnz=nnz, magnitudes=values[0], gates=gates, W=p.W_dec, b_dec=p.b_dec, target=p.target,
        sparsity_weight=p.sparsity_weight, normaliser=p.normaliser, d=d, bounds=p.bounds(),
        prefix_weights=p.prefix_weights, zeros=p.zeros, residual=residual, residual_aux=residual_aux, losses=losses,
        grads=grads, threads=threads(),
    )  # fmt: skip
    return losses.sum(0, dtype=torch.float64).div_(p.normaliser).float(), residual, residual_aux, grads


def _cpu_dense(p: _Given):
    (rows, features), groups = (p.target.shape[0], p.W_dec.shape[0]), p.groups()
    chunks = list(crossovers.chunks(rows, features))
    residuals = p.target.new_empty(p.values.shape[0], len(groups), *p.target.shape)
    for first, last in chunks:
        block, base = p.target.new_empty(last - first, features), p.b_dec - p.target[first:last]
        for v, values in enumerate(p.values):
            crossovers.scatter(p.indptr, p.indices, None, first, last, values, block)
            sums = base if len(groups) == 1 else torch.zeros_like(base)
            for g, (a, b) in enumerate(groups):
                sums = torch.addmm(sums, block[:, a:b], p.W_dec[a:b], out=residuals[v, g, first:last])
            if len(groups) > 1:  # last, for what rounds in a prefix is in all longer ones
                residuals[v, :, first:last] += base

    def dots(reaching):
        out = torch.empty_like(p.values)
        for first, last in chunks:
            block = p.target.new_empty(last - first, features)
            for of_set, to in zip(reaching, out, strict=True):
                for R, (a, b) in zip(of_set, groups, strict=True):
                    torch.mm(R[first:last], p.W_dec[a:b].T, out=block[:, a:b])
                crossovers.gather(p.indptr, p.indices, first, last, block, to)
        return out

    return _finish(p, residuals, dots)


def _gpu(p: _Given):
    from sae_fast.kernels import decode_loss as kernel

    p, prefixes = p.contiguous(), None
    if p.prefixes is not None:
        ends = torch.tensor(p.prefixes, device=p.indices.device)
        prefixes = kernel.Ends(ends, p.W_dec.new_ones(len(p.prefixes)) if p.prefix_weights is None else p.prefix_weights)
    code, out = (p.indptr[:-1], p.indptr[1:], p.indices, p.values), kernel.Outputs.of(p.values, p.target, prefixes)
    kernel.decode_loss(
        code, p.W_dec, p.b_dec, p.target, p.sparsity_weight, p.normaliser, out, zeros=p.zeros, prefixes=prefixes
    )
    losses = out.losses.sum(0, dtype=torch.float64).div_(p.normaliser).to(p.target.dtype)
    return losses, *_split(out.residuals if prefixes else out.residuals[:, None], p.prefixes), out.grads


def _reference(p: _Given):
    f = torch.stack([crossovers.to_dense(p.indptr, p.indices, v, p.W_dec.shape[0]) for v in p.values])
    sums = torch.stack([f[..., a:b] @ p.W_dec[a:b] for a, b in p.groups()], dim=1)

    def dots(reaching):
        parts = [R @ p.W_dec[a:b].T for R, (a, b) in zip(reaching.unbind(1), p.groups(), strict=True)]
        return torch.cat(parts, dim=-1)[:, row_ids(p.indptr, p.indices.shape[0]), p.indices.long()]

    return _finish(p, _prefixes(p, sums), dots)


def _prefixes(p: _Given, sums: Tensor) -> Tensor:
    """The residuals [V, G, B, d] of prefixes from the sums of each group alone, which are written over."""
    for g in range(1, sums.shape[1]):
        sums[:, g] += sums[:, g - 1]
    return sums + p.b_dec - p.target


def _finish(p: _Given, residuals: Tensor, dots: Callable[[Tensor], Tensor]):
    """The op's results, from the residuals [V, G, B, d] of each prefix alone, which are written over, and R·d_i [V, nnz]
    as a function of their sums R [V, G, B, d]."""
    squares = residuals.pow(2).sum((2, 3), dtype=torch.float64)
    if p.prefix_weights is not None:
        squares = squares * p.prefix_weights
        residuals *= p.prefix_weights[:, None, None]
    for g in reversed(range(residuals.shape[1] - 1)):
        residuals[:, g] += residuals[:, g + 1]
    weight, off = p.sparsity_weight[p.indices.long()], p.values == 0
    grads = dots(residuals) * (2 / p.normaliser)
    grads[-1] += torch.where(off[-1], 0, weight / p.normaliser)
    if not p.zeros:
        grads = torch.where(off, 0, grads)
    reconstruction, auxiliary = (*squares.sum(1), squares.new_zeros(()))[:2]
    sparsity = (weight * p.values[-1]).sum(dtype=torch.float64)
    losses = (torch.stack([reconstruction, sparsity, auxiliary]) / p.normaliser).to(p.target.dtype)
    return losses, *_split(residuals.to(p.target.dtype), p.prefixes), grads


def _split(residuals: Tensor, prefixes: list[int] | None) -> tuple[Tensor, Tensor]:
    """The residuals [V, G, B, d] in tensors of their own, as an op must return them."""
    residuals = residuals[:, 0] if prefixes is None else residuals
    residual_aux = residuals[1].clone() if residuals.shape[0] == 2 else residuals.new_empty(0, *residuals.shape[2:])
    return residuals[0].clone(), residual_aux
