"""The path of attribution: the entries that differ between two codes, and the models run from a site on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast import activations, ops
from sae_fast.activations import Activation, Vectors
from sae_fast.analysis import batching
from sae_fast.analysis.splicing import check_where
from sae_fast.code import SparseCode
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder

RULES = ("left", "right", "midpoint")


def points(steps: int, rule: str) -> list[float]:
    """The points on [0, 1] at which a rule of ``steps`` points takes the gradient."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, want an int ≥ 1, the number of points on the path")
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, want one of {RULES}")
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[rule]
    return [(k + shift) / steps for k in range(steps)]


def union(a: SparseCode, b: SparseCode | None, features: Tensor | None = None) -> SparseCode:
    """The entries at which a or b is not 0, with values [4, nnz]: magnitudes of a and of b, then u of a and of b
    (nan where it has no such entry).  b None: zeros.  features [F] bool: only those."""
    width = a.d_sae
    keys, values = [], []
    for side, code in enumerate((a,) if b is None else (a, b)):
        fires = code.magnitudes != 0
        if features is not None:
            fires &= features[code.indices.long()]
        keys.append((code.row_ids() * width + code.indices.long())[fires])
        values.append((side, code.magnitudes.detach()[fires], code.u.detach()[fires]))
    where = torch.unique(torch.cat(keys))
    out = a.magnitudes.new_zeros(4, len(where))
    out[2:] = torch.nan
    for key, (side, magnitudes, u) in zip(keys, values, strict=True):
        at = torch.searchsorted(where, key)
        out[side, at], out[2 + side, at] = magnitudes, u
    bounds = torch.arange(a.batch + 1, device=where.device) * width
    indptr = torch.searchsorted(where, bounds)
    return SparseCode(torch.Size((a.batch, width)), indptr, (where % width).int(), out[2], out)


def between(code: SparseCode, first: int, last: int) -> tuple[SparseCode, int]:
    """(the rows first .. last of a code, the number of entries before them)."""
    begin, end = int(code.indptr[first]), int(code.indptr[last])
    shape = torch.Size((last - first, code.d_sae))
    indptr = code.indptr[first : last + 1] - begin
    return SparseCode(shape, indptr, code.indices[begin:end], code.u[begin:end], code.values[:, begin:end]), begin


@dataclass
class Downstream:
    """The model from a site on, as a function of what comes through it, with everything else as it is for ``inputs``.

    x [N, ..., d]: what comes through on ``inputs``; rows [R, d]: of it, the positions that ``where`` takes.  ``metric``
    gives [N], a number an example, or one number of them all; if it takes a second argument, that is which examples
    of the batch the output is of, [n] int64.
    """

    model: nn.Module
    site: sites.Site
    inputs: Any
    metric: Callable[..., Tensor]
    where: Tensor | None

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise ValueError(f"metric: got {self.metric!r}, want a function of the model's output")
        batching.check_repeatable(self.model)
        self.x, output = sites.read(self.model, self.site, self.inputs)
        self._told = batching.takes_examples(self.metric)
        if self.x.dim() < 2:
            raise ValueError(f"site: {self.site.name!r} gives shape {tuple(self.x.shape)}, want [N, ..., d]")
        self.mask = check_where(self.where, self.x)
        self.clean = self._measured(output, torch.arange(self.batch, device=self.x.device)).detach()  # [N] or []
        self.rows = self.rows_of(self.x)
        examples = torch.arange(self.batch, device=self.x.device)
        places = torch.arange(self.x[0, ..., 0].numel(), device=self.x.device).reshape(1, *self.x.shape[1:-1], 1)
        self.example = self.rows_of(examples.reshape(-1, *[1] * (self.x.dim() - 1)).expand(*self.x.shape[:-1], 1))[:, 0]
        self.position = self.rows_of(places.expand(*self.x.shape[:-1], 1))[:, 0]
        if len(self.rows) == 0:
            raise ValueError("where: got a mask that takes no position")

    def rows_on(self, patch: Any) -> Tensor:
        """[R, d]: what comes through the site on other inputs.  ValueError unless they are of the same shapes."""
        x, _ = sites.read(self.model, self.site, patch)
        if x.shape != self.x.shape:
            got = f"clean gives {tuple(self.x.shape)} at {self.site.name!r} and patch {tuple(x.shape)}"
            raise ValueError(f"patch: {got}, want the same shapes: as many examples, of as many tokens")
        return self.rows_of(x)

    def rows_of(self, x: Tensor) -> Tensor:
        """[R, d], of x [N, ..., d]."""
        return x.reshape(-1, x.shape[-1]) if self.mask is None else x[self.mask]

    def with_rows(self, rows: Tensor) -> Tensor:
        """[N, ..., d]: x with other rows [R, d], in the graph of these; a copy, for the model may write to it in place."""
        if self.mask is None:
            return rows.to(self.x.dtype).reshape(self.x.shape).clone()
        x = self.x.clone()
        x[self.mask] = rows.to(x.dtype)
        return x

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def by_example(self) -> bool:
        """True where examples have numbers of their own, so that any number of them can share a pass."""
        return self.clean.dim() == 1

    @cached_property
    def examples_per_pass(self) -> int:
        """The number of examples that share a pass: of TOKENS_PER_PASS positions, in the inputs or at the site."""
        positions = max(self.x[0, ..., 0].numel(), sites.positions(self.inputs, self.batch))
        return max(1, batching.TOKENS_PER_PASS // positions)

    @property
    def share(self) -> int:
        """The number of copies of the batch that share a pass."""
        return max(1, self.examples_per_pass // self.batch) if self.by_example else 1

    def values(self, rows: Tensor, examples: Tensor | None = None) -> Tensor:
        """The metric where the site gives ``rows`` instead, no gradients.

        rows [r, R, d] → [r, N] (or [r]); with ``examples`` [n], rows [n, R′, d] are those of single examples, which need
        by_example and the same number of rows each → [n].
        """
        with torch.no_grad():
            return self._run(rows, examples)

    def gradient(self, rows: Tensor) -> Tensor:
        """[r, R, d]: the metric's gradient with respect to rows [r, R, d]."""
        with torch.enable_grad(), sites.without_weight_gradients(self.model):
            leaf = rows.detach().requires_grad_()
            measured = self._run(leaf, None)
            if not measured.requires_grad:
                what = "the model's output, or the metric of it, carries no gradient back to the site"
                raise ValueError(
                    f"metric: {what} {self.site.name!r}: is it detached, rounded, or computed without gradients?"
                )
            (gradient,) = torch.autograd.grad(measured.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise ValueError(f"metric: it does not depend on the site {self.site.name!r}")
        return gradient

    def _run(self, rows: Tensor, examples: Tensor | None) -> Tensor:
        copies = rows.shape[0]
        taken = torch.arange(self.batch, device=rows.device).repeat(copies) if examples is None else examples
        if examples is None and copies == 1:  # the batch as it came
            replaced, inputs = self.with_rows(rows[0]), self.inputs
        else:
            inputs = sites.repeated(self.inputs, taken, self.batch)
            flat = rows.reshape(-1, rows.shape[-1]).to(self.x.dtype)
            if self.mask is None:
                replaced = flat.reshape(len(taken), *self.x.shape[1:]).clone()
            else:
                replaced = self.x[taken]
                replaced[self.mask[taken]] = flat

        def put(x: Tensor) -> Tensor:
            if x.shape != replaced.shape:
                got, want = tuple(x.shape), tuple(replaced.shape)
                raise ValueError(f"site: {self.site.name!r} gives {got} for {len(taken)} examples at once, want {want}")
            return replaced

        with sites.changed(self.site, put):
            output = sites.run(self.model, inputs)
        measured = self._measured(output, taken)
        return measured.reshape(copies, *self.clean.shape) if examples is None else measured

    def _measured(self, output: Any, examples: Tensor) -> Tensor:
        measured, n = self.metric(output, examples) if self._told else self.metric(output), len(examples)
        if not isinstance(measured, Tensor) or not measured.is_floating_point() or measured.shape not in ((), (n,)):
            got = f"{measured.dtype} {tuple(measured.shape)}" if isinstance(measured, Tensor) else type(measured).__name__
            repeats = ""
            if n != self.batch:
                repeats = (
                    f"; the batch of {self.batch} is repeated for points that share a pass: a metric with data of its own "
                    "takes (output, examples), and indexes that data with examples [n]"
                )
            want = f"a floating-point tensor [N], one number for each of {n} examples, or []"
            raise ValueError(f"metric: got {got}, want {want}{repeats}")
        if not measured.isfinite().all():
            raise ValueError(f"metric: got {measured.detach().flatten().tolist()[:4]}, want finite values")
        return measured


def value_and_slope(
    sae: SparseAutoencoder, u: Tensor, indices: Tensor, open_: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(f, ∂f/∂u as autodiff sees it) of entries with u [..., nnz] of the features ``indices`` [nnz] (MATH.md §1).
    ``open_``: whether their gates are open, where that is not what u says."""
    activation, bias, vectors = _at(sae, indices)
    return activation.slope(u, bias, vectors, open_)


def slope_where_open(sae: SparseAutoencoder, u: Tensor, indices: Tensor) -> Tensor:
    """∂f/∂u [..., nnz] of entries that fire."""
    activation, bias, vectors = _at(sae, indices)
    return activation.magnitude(u, bias, vectors)[1]


def jumps(sae: SparseAutoencoder, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(u at which a feature's gate opens, the value to which it jumps there) of the features ``indices`` [nnz]."""
    activation, bias, vectors = _at(sae, indices)
    return activation.jump(bias, vectors)


def _at(sae: SparseAutoencoder, indices: Tensor) -> tuple[Activation, Tensor, Vectors]:
    """The activation of an SAE, with its bias and vectors at the features ``indices`` [nnz]."""
    activation = activations.named(sae.activation)
    names = activation.bias, *activation.parameters
    at = {name: sae.get_parameter(name).detach()[indices.long()] for name in names}
    return activation, at[activation.bias], activation.vectors(at)


def decoded(code: SparseCode, sae: SparseAutoencoder, values: Tensor) -> Tensor:
    """values [r, nnz] through the decoder, without b_dec: [r, R, d]."""
    return ops.decode(code, sae.W_dec.detach(), values)
