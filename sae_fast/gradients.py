"""The algebra of a step, once: from a code and its target to the losses and the gradient of every parameter.

MATH.md §2 and §8.  The host's step, the GPU's and the drop-ins for other packages differ in the kernels that they bring;
autograd's backward passes share the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_fast import ops
from sae_fast.code import Decoder, Layer, RowGradient, SparseCode, Transposed
from sae_fast.objectives import Objective, Pull, Revived
from sae_fast.ops import checks
from sae_fast.ops.autograd import function
from sae_fast.ops.decode_loss import prefix_rows

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
    """Losses and gradients on the entries of a code.  losses [3]; residuals [B, d_out] of each value set, or [G · B, d_out]
    of prefixes, the suffix sums R of MATH.md §8; error [B, d_out] = x̂ − target; delta [nnz], the gradient of u; columns
    [nnz, 2 + P or more]: delta and the gradients of the bias and the activation's parameters; decoder [nnz]: the magnitudes
    times 2/B, the weights of the residuals in W_dec's gradient; constants and norms: a Pull's; along
    [nnz], where the kernels have it: RowGradient's for W_dec; ends: those of the prefixes, if there are any."""

    losses: Tensor
    residuals: tuple[Tensor, ...]
    error: Tensor
    delta: Tensor
    columns: Tensor
    decoder: Tensor
    constants: Mapping[str, Tensor] = MappingProxyType({})
    norms: Tensor | None = None
    along: Tensor | None = None
    ends: Sequence[int] | Tensor | None = None


class Kernels(Protocol):
    """The kernels that a step is made of."""

    def entries(self, code: Any, layer: Layer, decoder: Decoder, target: Tensor, objective: Objective) -> Entries: ...

    def transpose(self, code: Any) -> Transposed: ...

    def sums(self, csc: Transposed, columns: Tensor, also: Tensor | None, rows: int) -> list[Tensor]:
        """[F] each: the sums over a feature's entries of columns [nnz, n] and of ``also`` [nnz], of a batch of ``rows``."""


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

    def entries(self, code: SparseCode, layer: Layer, decoder: Decoder, target: Tensor, objective: Objective) -> Entries:
        n, prefixes = target.shape[0], objective.prefixes
        weight, costs = objective.sparsity_weight(decoder.W), None if prefixes is None else prefixes.costs(decoder.W)
        ends = None if prefixes is None else prefixes.ends(code.d_sae)
        out = ops.decode_loss(
            code, decoder.W, decoder.b, target, weight, n, prefixes=ends, prefix_weights=costs, zeros=objective.zeros
        )
        losses, pulled, constants, norms = objective.pull(code, layer, decoder.W, out.losses, out.grads, n)
        delta = pulled[0]
        assert delta is not None
        columns = torch.stack([torch.zeros_like(delta) if p is None else p for p in pulled], dim=1)
        error = out.residual if costs is None else out.residual[-1] / costs[-1]
        residuals = tuple(r.reshape(-1, r.shape[-1]) for r in (out.residual, out.residual_aux)[: code.values.shape[0]])
        return Entries(losses, residuals, error, delta, columns, code.magnitudes * (2 / n), constants, norms, ends=ends)

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
    kernels: Kernels | None = None, revived: Callable[[Tensor], Revived | None] | None = None,
) -> StepGradients:  # fmt: skip
    """The step of a sparse ``code`` of the rows x_c [B, d] that the encoder was given: no gradient of a weight is dense.
    ``revived`` gives what dead features make of an error x − x̂."""
    n, kernels = target.shape[0], kernels or HostKernels()
    entries = kernels.entries(code, layer, decoder, target, objective)
    values = [entries.decoder]
    residuals = entries.residuals
    if objective.stops_auxiliary:
        residuals = residuals[:1]
    elif len(residuals) == 2:
        values.append(code.values[1] * (2 / n))
    also = entries.norms
    through_decoder = torch.stack([r[:n].sum(0) for r in residuals]).sum(0) * (2 / n)
    alive = None if revived is None else revived(-entries.error)
    if alive is not None:
        code, entries = _joined(code, entries, alive)
        x_c, room = torch.cat([x_c, alive.W_enc]), (0, alive.ids.shape[0])
        values = [entries.decoder, *(torch.nn.functional.pad(v, room) for v in values[1:])]
        residuals = entries.residuals[: len(residuals)]
        also = None if also is None else torch.nn.functional.pad(also, room)
    csc = kernels.transpose(code)
    delta, *sums = kernels.sums(csc, entries.columns, also, x_c.shape[0])
    own = None if also is None else objective.norm_cost(decoder.W, sums.pop(), n)
    of_decoder = csc
    if entries.ends is not None:
        rows = prefix_rows(csc, entries.ends, n).rows
        of_decoder = replace(csc, rows=torch.where(csc.rows < n, rows, csc.rows + n * (len(entries.ends) - 1)))
    gradients: dict[str, RowGradient | Tensor] = {
        "W_enc": RowGradient(csc, [entries.delta], [x_c]),
        **_of_parameters(layer, objective, sums, entries.constants),
        "W_dec": RowGradient(of_decoder, values, list(residuals), own, entries.along),
        "b_dec": _b_dec(through_decoder, delta, layer, decoder),
    }
    return StepGradients(entries.losses, entries.error, gradients)


def _joined(code: SparseCode, entries: Entries, alive: Revived) -> tuple[SparseCode, Entries]:
    """A code's entries, and then one of weight 1 for each revived feature, whose example is the rows of its gradients."""
    n, ones = alive.ids.shape[0], torch.ones_like(alive.bias)
    indptr = torch.arange(n + 1, device=ones.device)
    rows = SparseCode(torch.Size((n, code.d_sae)), indptr, alive.ids.int(), ones, ones.expand(code.values.shape[0], n))
    columns = entries.columns.new_zeros(n, entries.columns.shape[1])
    columns[:, :2] = alive.bias[:, None]
    first, *others = entries.residuals
    return SparseCode.cat([code, rows]), entries._replace(
        losses=torch.cat([entries.losses[:2], entries.losses[2:] + alive.loss]),
        residuals=(torch.cat([first, alive.W_dec]), *(torch.cat([r, torch.zeros_like(alive.W_dec)]) for r in others)),
        delta=torch.cat([entries.delta, ones]),
        columns=torch.cat([entries.columns, columns]),
        decoder=torch.cat([entries.decoder, ones]),
    )


def of_dense_step(
    code: SparseCode, x_c: Tensor, target: Tensor, layer: Layer, decoder: Decoder, objective: Objective,
    revived: Callable[[Tensor], Revived | None] | None = None,
) -> StepGradients:  # fmt: skip
    """The same for a code so dense that its gradients are, and an objective without prefixes."""
    n, weight = target.shape[0], objective.sparsity_weight(decoder.W)
    one, rest = objective.by_example(code, layer)

    def pull(part: SparseCode, losses: Tensor, grads: Tensor) -> Pull:
        return one.pull(part, layer, decoder.W, losses, grads, n)

    out = ops.dense_gradients(
        code, x_c, target, layer, decoder.W, decoder.b, weight, objective.stops_auxiliary, objective.zeros, pull,
        objective.linear,
    )  # fmt: skip
    losses = (out.losses + out.losses.new_tensor([0.0, float(rest), 0.0])).to(decoder.W.dtype)
    if objective.costs_norm:
        out.W_dec.addcmul_(objective.norm_cost(decoder.W, out.norms, n)[:, None], decoder.W)
    alive = None if revived is None else revived(-out.errors)
    if alive is not None:
        losses = torch.cat([losses[:2], losses[2:] + alive.loss])
        for whole, rows in (
            (out.W_enc, alive.W_enc), (out.W_dec, alive.W_dec), (out.parameters[0], alive.bias), (out.delta, alive.bias),
        ):  # fmt: skip
            whole[alive.ids] += rows
    gradients: dict[str, RowGradient | Tensor] = {
        "W_enc": out.W_enc,
        **_of_parameters(layer, objective, out.parameters, out.constants),
        "W_dec": out.W_dec,
        "b_dec": _b_dec(out.residual, out.delta, layer, decoder),
    }
    return StepGradients(losses, out.errors, gradients)


def _of_parameters(
    layer: Layer, objective: Objective, sums: Sequence[Tensor], constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of the bias and of the activation's parameters, from the sums of all of its slots, and what is none."""
    activation = layer.activation
    by_name = dict(zip((activation.bias, *activation.parameters), sums, strict=False))
    for name, constant in constants.items():
        by_name[name] = by_name[name] + constant
    return {name: by_name[name] for name in (activation.bias, *objective.trained(activation))}


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
