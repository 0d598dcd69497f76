"""The algebra of a step, once: from a code and its target to the losses and the gradient of every parameter.

MATH.md §2 and §8.  The host's step, the GPU's and the drop-ins for other packages differ in the kernels that they bring;
autograd's backward passes share the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.code import Layer, RowGradient, SparseCode, Transposed
from sae_fast.ops import checks
from sae_fast.ops.autograd import function
from sae_fast.reference import DIALECTS

# ---- The objective ---------------------------------------------------------------------------------------------------


class Objective(NamedTuple):
    """The loss: its sparsity coefficient λ, a number or 0-d, and the dialect (MATH.md §1).

    ``paper``: x̂_aux is stopped.  ``saelens``: it is not, and feature i's activation costs λ‖d_i‖.
    """

    l1: float | Tensor
    dialect: str = "paper"

    @property
    def stops_auxiliary(self) -> bool:
        return self.dialect == "paper"

    @property
    def costs_norm(self) -> bool:
        return self.dialect == "saelens"

    def sparsity_weight(self, W_dec: Tensor) -> Tensor:
        """[F]: what each feature's activation costs."""
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect: got {self.dialect!r}, want one of {DIALECTS}")
        return self.l1 * (W_dec.norm(dim=1) if self.costs_norm else W_dec.new_ones(W_dec.shape[0]))

    def norm_cost(self, W_dec: Tensor, values: Tensor, n: int) -> Tensor:
        """[F], times W_dec: the gradient of Σ λ/n · values_i ‖d_i‖ with respect to W_dec; values [F]: sums of a code's."""
        norm = W_dec.norm(dim=1)
        return torch.where(norm > 0, values * (self.l1 / n) / norm, 0)  # at 0 the subgradient that autograd takes


# ---- Sums by feature -------------------------------------------------------------------------------------------------


def no_second(gradients_of: str) -> Callable[..., None]:
    """The backward of what has no second derivative here: wrong numbers would be the alternative."""

    def raises(*_: Any) -> None:
        raise NotImplementedError(f"the gradients of {gradients_of} cannot be differentiated a second time")

    return raises


def _run_outer(colptr, rows, perm, first, n, sources, *tensors):
    values, A = tensors[:sources], tensors[sources:]
    return torch.ops.sae_fast.outer(colptr, rows, perm, list(values), list(A), None, first, n)


_Outer = function("outer", _run_outer, lambda *_: None, no_second("sae_fast's weights and biases (sae_fast::outer)"))


def outer(csc: Any, values: Sequence[Tensor], A: Sequence[Tensor], first: int, n: int) -> Tensor:
    """ops.outer of the features first .. + n, where a backward pass may be recorded to be differentiated itself."""
    if torch.compiler.is_compiling():
        return torch.ops.sae_fast.outer(csc.colptr, csc.rows, csc.perm, list(values), list(A), None, first, n)
    return _Outer.apply(csc.colptr, csc.rows, csc.perm, first, n, len(values), *values, *A)


def feature_sums(csc: Any, values: Tensor, rows: int) -> Tensor:
    """[F]: the sum of values [nnz] over each feature's entries in a Transposed code of so many rows, in ascending row
    order: bitwise repeatable."""
    return outer(csc, [values], [values.new_ones(rows, 1)], 0, csc.colptr.shape[0] - 1)[:, 0]


def column_sums(csc: Transposed, columns: Tensor) -> Tensor:
    """[n, F]: feature_sums of columns [nnz, n] in one pass: outer with an entry in the place of an example."""
    ones, at = columns.new_ones(columns.shape[0]), csc.perm.int()
    return outer(replace(csc, rows=at), [ones], [columns], 0, csc.colptr.shape[0] - 1).T.contiguous()


def weighted_rows(weights: Tensor, W: Tensor) -> Tensor:
    """weights [F] @ W [F, d], by blocks: it stands for a sum over examples, whose rounding averages out where one long
    dot product's would not."""
    n = W.shape[0] // 16 * 16
    blocks = torch.bmm(weights[:n].view(16, 1, n // 16), W[:n].view(16, n // 16, W.shape[1]))
    return blocks.sum((0, 1)) + weights[n:] @ W[n:]


# ---- A step ----------------------------------------------------------------------------------------------------------


class Entries(NamedTuple):
    """Losses and gradients on the entries of a code.  losses [3]; residuals: a [B, d_out] for each value set; delta
    [nnz], the gradient of u; columns [nnz, 2 + P or more]: delta and the gradients of the bias and the activation's
    parameters;
    decoder [nnz]: the magnitudes times 2/B, the weights of the residuals in W_dec's gradient."""

    losses: Tensor
    residuals: tuple[Tensor, ...]
    delta: Tensor
    columns: Tensor
    decoder: Tensor


class Kernels(Protocol):
    """The kernels that a step is made of."""

    def entries(self, code: Any, layer: Layer, decoder: Decoder, target: Tensor, weight: Tensor) -> Entries: ...

    def transpose(self, code: Any) -> Transposed: ...

    def sums(self, csc: Transposed, columns: Tensor, also: Tensor | None, rows: int) -> list[Tensor]:
        """[F] each: the sums over a feature's entries of columns [nnz, n] and of ``also`` [nnz], of a batch of ``rows``."""


class Decoder(NamedTuple):
    """W_dec [F, d_out] and b_dec [d_out]; ``centred``: whether the encoder is given x − b_dec."""

    W: Tensor
    b: Tensor
    centred: bool = True


class StepGradients(NamedTuple):
    """losses [3], residual [B, d_out] = x̂ − target, and the gradient of each parameter by name."""

    losses: Tensor
    residual: Tensor
    by_name: dict[str, RowGradient | Tensor]


class HostKernels:
    """The ops, on whatever body they run.  ``in_one_pass`` saves a pass over the code, and rounds
    otherwise where the code is nearly dense."""

    def __init__(self, in_one_pass: bool = False):
        self.in_one_pass = in_one_pass

    def entries(self, code: SparseCode, layer: Layer, decoder: Decoder, target: Tensor, weight: Tensor) -> Entries:
        n = target.shape[0]
        out = ops.decode_loss(code, decoder.W, decoder.b, target, weight, n)
        pulled = layer.activation.pullback(code.u, list(out.grads), code.indices, layer.vectors)
        delta = pulled[0]
        assert delta is not None
        columns = torch.stack([torch.zeros_like(delta) if p is None else p for p in pulled], dim=1)
        residuals = (out.residual, out.residual_aux)[: code.values.shape[0]]
        return Entries(out.losses, residuals, delta, columns, code.magnitudes * (2 / n))

    def transpose(self, code: SparseCode) -> Transposed:
        return ops.transpose(code)

    def sums(self, csc: Transposed, columns: Tensor, also: Tensor | None, rows: int) -> list[Tensor]:
        if also is None:
            return [*column_sums(csc, columns)]
        if self.in_one_pass:
            return [*column_sums(csc, torch.cat([columns, also[:, None]], dim=1))]
        return [*column_sums(csc, columns), feature_sums(csc, also, rows)]


def of_step(
    code: Any, x_c: Tensor, target: Tensor, layer: Layer, decoder: Decoder, objective: Objective,
    kernels: Kernels | None = None,
) -> StepGradients:  # fmt: skip
    """The step of a sparse ``code`` of the rows x_c [B, d] that the encoder was given: no gradient of a weight is dense."""
    n, weight, kernels = target.shape[0], objective.sparsity_weight(decoder.W), kernels or HostKernels()
    entries = kernels.entries(code, layer, decoder, target, weight)
    csc = kernels.transpose(code)
    delta, *sums = kernels.sums(csc, entries.columns, code.values[-1] if objective.costs_norm else None, n)
    own = objective.norm_cost(decoder.W, sums.pop(), n) if objective.costs_norm else None
    values, residuals = [entries.decoder], entries.residuals
    if objective.stops_auxiliary:
        residuals = residuals[:1]
    elif len(residuals) == 2:
        values.append(code.values[1] * (2 / n))
    through_decoder = torch.stack([r.sum(0) for r in residuals]).sum(0) * (2 / n)
    gradients: dict[str, RowGradient | Tensor] = {
        "W_enc": RowGradient(csc, [entries.delta], [x_c]),
        **_of_parameters(layer, sums),
        "W_dec": RowGradient(csc, values, list(residuals), own),
        "b_dec": _b_dec(through_decoder, delta, layer, decoder),
    }
    return StepGradients(entries.losses, entries.residuals[0], gradients)


def of_dense_step(
    code: SparseCode, x_c: Tensor, target: Tensor, layer: Layer, decoder: Decoder, objective: Objective
) -> StepGradients:
    """The same for a code so dense that its gradients are."""
    weight = objective.sparsity_weight(decoder.W)
    out = ops.dense_gradients(code, x_c, target, layer, decoder.W, decoder.b, weight, objective.stops_auxiliary)
    if objective.costs_norm:
        out.W_dec.addcmul_(objective.norm_cost(decoder.W, out.values, target.shape[0])[:, None], decoder.W)
    gradients: dict[str, RowGradient | Tensor] = {
        "W_enc": out.W_enc,
        **_of_parameters(layer, out.parameters),
        "W_dec": out.W_dec,
        "b_dec": _b_dec(out.residual, out.delta, layer, decoder),
    }
    return StepGradients(out.losses, out.errors, gradients)


def _of_parameters(layer: Layer, sums: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradients of the bias and of the activation's parameters, from the sums of all of its slots."""
    activation = layer.activation
    by_name = dict(zip((activation.bias, *activation.parameters), sums, strict=False))
    return {name: by_name[name] for name in (activation.bias, *activation.trained)}


def _b_dec(through_decoder: Tensor, delta: Tensor, layer: Layer, decoder: Decoder) -> Tensor:
    """[d_out], from what comes through the decoder and δ's sums [F]: x − b_dec is where the rest comes through."""
    return through_decoder - weighted_rows(delta, layer.W) if decoder.centred else through_decoder


# ---- Of all gradients together ---------------------------------------------------------------------------------------


def finite(
    losses: Tensor, gradients: Mapping[str, RowGradient | Tensor], bound: Callable[[str, RowGradient], Tensor]
) -> dict[str, Tensor]:
    """The parts of a step by what to call them, each finite if and only if all that it stands for is.  ``bound`` gives
    that of a weight's RowGradient."""
    parts = dict(zip(("reconstruction", "sparsity", "auxiliary"), losses, strict=True))
    for name, gradient in gradients.items():
        parts[f"gradient of {name}"] = gradient if isinstance(gradient, Tensor) else bound(name, gradient)
    return parts


@torch.no_grad()
def largest(W: Tensor, gradient: RowGradient) -> Tensor:
    """A bound of the gradient's elements, or, where it nears overflow, its squared norm."""
    if gradient.csc.rows.shape[0] == 0:
        return torch.zeros(())
    pairs = zip(gradient.values, gradient.A, strict=True)
    bound = torch.stack([checks.largest(v).double() * checks.largest(a) * a.shape[0] for v, a in pairs]).sum()
    if gradient.self_coefficient is not None:
        bound = bound + checks.largest(gradient.self_coefficient).double() * checks.largest(W)
    if float(bound) < torch.finfo(W.dtype).max:
        return bound
    return ops.grad_sqnorm(gradient, W)


@torch.no_grad()
def clip(
    limit: float | None, gradients: Mapping[str, RowGradient | Tensor], sqnorm: Callable[[str, RowGradient], Tensor]
) -> Tensor | None:
    """0-d factor that brings the global norm of the gradients to ``limit``, or None.  ``sqnorm`` gives the squared norm of
    a weight's RowGradient."""
    if limit is None:
        return None
    squares = (g.double().pow(2).sum() if isinstance(g, Tensor) else sqnorm(name, g) for name, g in gradients.items())
    return (limit / (sum(squares, torch.zeros((), dtype=torch.float64)).sqrt() + 1e-6)).clamp(max=1.0)
