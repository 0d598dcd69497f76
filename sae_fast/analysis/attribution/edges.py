"""Edges between SAEs: what each feature of an upstream SAE does to features of a downstream one.

An edge is a vector–Jacobian product that is sparse at both ends (Marks et al. 2024, arXiv 2403.19647): a downstream
feature sends one row of W_enc per position back through the model, and what arrives upstream is dotted with W_dec on the
entries that differ between the clean and the patched run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_fast import ops
from sae_fast.analysis.attribution import _path
from sae_fast.analysis.attribution._path import Downstream
from sae_fast.analysis.splicing import check_features, check_sae, check_width
from sae_fast.code import SparseCode
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.grouped import GroupedSAE

METHODS = ("atp", "ig", "jump_corrected_ig")


@dataclass(frozen=True)
class Edges:
    """Effects of upstream entries on downstream features, summed over the downstream positions.

    downstream [K]     int64: the features at the far end
    support            SparseCode [R, F_up] of the upstream entries that differ; values [2, nnz]: clean and patched
    effects [K, nnz]   of each upstream entry on each downstream feature, times its weight
    exact [K]          the whole change of each downstream feature, weighted, from clean to patch: what a row of a complete
                       method adds up to
    """

    downstream: Tensor
    support: SparseCode
    effects: Tensor
    exact: Tensor

    def by_feature(self) -> Tensor:
        """Sparse COO [K, F_up], coalesced: summed over the upstream rows."""
        columns = self.support.indices.long().repeat(len(self.effects))
        rows = torch.arange(len(self.effects), device=columns.device).repeat_interleave(self.support.nnz)
        shape = (len(self.effects), self.support.d_sae)
        return torch.sparse_coo_tensor(
            torch.stack([rows, columns]), self.effects.flatten(), shape, check_invariants=True
        ).coalesce()

    def top(self, k: int = 10) -> list[tuple[int, int, float]]:
        """(upstream feature, downstream feature, effect) of the k largest in absolute value, the largest first."""
        summed = self.by_feature()
        order = summed.values().abs().argsort(descending=True, stable=True)[:k]
        down, up = summed.indices()[:, order]
        return list(zip(up.tolist(), self.downstream[down].tolist(), summed.values()[order].tolist(), strict=True))


def edges(
    model: nn.Module,
    upstream: tuple[str | nn.Module, SparseAutoencoder],
    downstream: tuple[str | nn.Module, SparseAutoencoder],
    clean: Any,
    patch: Any = None,
    *,
    metric: Callable[..., Tensor] | None = None,
    features: Iterable[int] | None = None,
    method: str = "atp",
    steps: int = 10,
    rule: str = "midpoint",
    where: Tensor | None = None,
    progress: bool = False,
) -> Edges:
    """Effects of moving upstream features from their activations on ``clean`` to those on ``patch`` (0 if None), the
    upstream error kept, on downstream features that are encoded anew.

    upstream, downstream   (site, sae); downstream comes later in the model
    metric     as in `attribution.patch`: a downstream entry is weighted by the metric's gradient there on the clean run, so
               effects are in units of the metric; None: by 1, so they are changes of activations
    features   downstream features; by default all that fire on clean or patch
    method     "atp": the gradient on the clean run.  "ig": its mean at ``steps`` points, by ``rule``.  Both see slopes.
               "jump_corrected_ig" takes, over each of ``steps`` pieces of the path, the downstream feature's secant in the
               place of its slope, so that a gate that opens in a piece counts: right as steps grow, by the midpoint
               rule soon; with few steps a piece over which the feature's input turns back can be far off
    where      as in `splice`, at both sites

    ValueError as from `attribution.patch`, and if downstream does not depend on upstream.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, want one of {METHODS}")
    for name, pair in (("upstream", upstream), ("downstream", downstream)):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"{name}: got {pair!r}, want (site, sae)")
        check_sae(pair[1], "find edges")
    (up, sae_up), (down, sae_down) = upstream, downstream
    if isinstance(sae_down, GroupedSAE) and method == "jump_corrected_ig":
        raise ValueError(
            f'method: got "{method}" for a {type(sae_down).__name__}, want an SAE whose features open by themselves'
        )
    alphas = [0.0] if method == "atp" else _path.points(steps, rule)
    near, far = sites.find(model, up), sites.find(model, down)
    sae_up.settle()
    sae_down.settle()
    with torch.no_grad(), sites.without_weight_gradients(model, sae_up, sae_down), sae_up.frozen(), sae_down.frozen():
        a = Downstream(model, near, clean, _nothing, where)
        b = Downstream(model, far, clean, metric or _nothing, where)
        check_width(sae_up, a.x)
        check_width(sae_down, b.x)
        end = None if patch is None else a.rows_on(patch)
        support = _path.union(sae_up.encode_sparse(a.rows), None if end is None else sae_up.encode_sparse(end))
        f, f_end = support.values[:2].to(sae_up.W_dec.dtype)
        change = _path.decoded(support, sae_up, (f_end - f)[None])[0]
        segment = _Segment(model, near, far, clean, a, b, change)

        last = segment.far_rows(1.0)
        codes = [sae_down.encode_sparse(rows) for rows in (b.rows, last)]
        chosen = _chosen(features, codes)
        weights = sae_down.W_dec.new_ones(len(b.rows), len(chosen))
        if metric is not None:
            weights = b.gradient(b.rows[None])[0].to(sae_down.W_dec.dtype) @ sae_down.W_dec[chosen].T
        dense = [_columns(code, chosen) for code in codes]
        exact = (weights * (dense[1] - dense[0])).double().sum(0)

        mean = a.rows.new_zeros(len(chosen), *a.rows.shape, dtype=sae_up.W_dec.dtype)
        slopes: Iterable[Tensor | None] = [None] * len(alphas)
        if method == "jump_corrected_ig":
            slopes = segment.secants(len(alphas), sae_down, chosen)
        for alpha, slope in zip(tqdm(alphas, "points", disable=not progress, leave=False), slopes, strict=True):
            segment.pull_back(mean, alpha, sae_down, chosen, weights, slope)
        effects = torch.stack([
            ops.sampled_dots(support, (g / len(alphas)).to(sae_up.W_dec.dtype), sae_up.W_dec) * (f_end - f) for g in mean
        ]) if len(chosen) else f.new_zeros(0, support.nnz)  # fmt: skip
    return Edges(chosen, support.with_values(support.values[:2]), effects, exact)


class _Segment:
    """The model between two sites, as a function of how far the upstream features have moved."""

    def __init__(
        self, model: nn.Module, near: sites.Site, far: sites.Site, inputs: Any, a: Downstream, b: Downstream, change: Tensor
    ):
        self.model, self.near, self.far, self.inputs, self.a, self.b, self.change = model, near, far, inputs, a, b, change

    def far_rows(self, alpha: float) -> Tensor:
        """[R, d_down] without a graph."""
        return self._run(self.a.rows + alpha * self.change)

    def secants(self, pieces: int, sae: SparseAutoencoder, chosen: Tensor) -> Iterator[Tensor]:
        """[R, K] of each piece of the path in turn: what the chosen features change over what their u does."""
        ends = (_pre_and_values(sae, self.far_rows(k / pieces), chosen) for k in range(pieces + 1))
        for (u, f), (u_next, f_next) in itertools.pairwise(ends):
            yield torch.where(u_next != u, (f_next - f) / (u_next - u), 0)

    def pull_back(
        self,
        into: Tensor,
        alpha: float,
        sae: SparseAutoencoder,
        chosen: Tensor,
        weights: Tensor,
        slope: Tensor | None,
    ) -> None:
        """Adds to ``into`` [K, R, d_up] the gradient of each chosen feature's weighted sum with respect to the upstream
        rows; with ``slope`` [R, K] for the slopes that the features have there."""
        W_enc = sae.W_enc.detach()[chosen]
        with torch.enable_grad():
            leaf = (self.a.rows + alpha * self.change).detach().requires_grad_()
            far = self._run(leaf)
            if not far.requires_grad:
                raise ValueError(f"downstream: {self.far.name!r} does not depend on {self.near.name!r}")
        if slope is None:
            slope = _slopes(sae, sae.encode_sparse(far.detach()), chosen)
        cotangents = (weights * slope).T  # [K, R], each times a row of W_enc
        for k in cotangents.any(1).nonzero()[:, 0].tolist():
            rows = (cotangents[k][:, None] * W_enc[k]).to(far.dtype)
            (g,) = torch.autograd.grad(far, leaf, rows, retain_graph=True, allow_unused=True)
            if g is None:
                raise ValueError(f"downstream: {self.far.name!r} does not depend on {self.near.name!r}")
            into[k] += g

    def _run(self, rows: Tensor) -> Tensor:
        x = self.a.with_rows(rows)
        with sites.changed(self.near, lambda _: x):
            far = sites.run_until(self.model, self.far, self.inputs)
        return self.b.rows_of(far)


def _chosen(features: Iterable[int] | None, codes: list[SparseCode]) -> Tensor:
    """[K] int64: the features asked for, or all that fire in one of the codes."""
    if features is None:
        return torch.unique(torch.cat([code.indices[code.magnitudes != 0] for code in codes])).long()
    return torch.tensor(check_features(features, codes[0].d_sae), device=codes[0].indices.device)


def _columns(code: SparseCode, chosen: Tensor, values: Tensor | None = None) -> Tensor:
    """[R, K]: a code's values at the chosen features."""
    place = torch.full((code.d_sae,), -1, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    column = place[code.indices.long()]
    kept = column >= 0
    values = code.magnitudes if values is None else values
    out = values.new_zeros(code.batch, len(chosen))
    out[code.row_ids()[kept], column[kept]] = values[kept]
    return out


def _slopes(sae: SparseAutoencoder, code: SparseCode, chosen: Tensor) -> Tensor:
    """[R, K]: ∂f/∂u as autodiff sees it."""
    slope = _path.slope_where_open(sae, code.u, code.indices)
    return _columns(code, chosen, torch.where(code.magnitudes != 0, slope, 0))


def _pre_and_values(sae: SparseAutoencoder, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(u, f) [R, K] of the chosen features."""
    u = sae.centred(rows.to(sae.W_enc.dtype)) @ sae.W_enc[chosen].T
    return u, _path.value_and_slope(sae, u, chosen)[0]


def _nothing(_: Any) -> Tensor:
    return torch.zeros(())
