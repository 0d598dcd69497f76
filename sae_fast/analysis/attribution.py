"""attribution.patch: what each SAE feature does to a metric, when activations move from a clean run's to a patched run's.

Sparse Feature Circuits (Marks et al. 2024, arXiv 2403.19647) for the methods, MATH.md §5 for the regimes.  Everything lives
on supp(clean) ∪ supp(patch): the path is decoded from its entries, gradients are taken with respect to the d dimensions of
the site, and one sampled product with W_dec turns them into effects.  No [tokens, F] matrix exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sae_fast import ops
from sae_fast.analysis import _path, sites
from sae_fast.analysis._path import Downstream
from sae_fast.code import SparseCode
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.grouped import GroupedSAE

METHODS = ("exact", "atp", "ig", "jump_corrected_ig")
VARY = ("features", "input")


@dataclass(frozen=True)
class Effects:
    """The effect of each entry on the metric, and of all of them together.

    support           SparseCode [R, F] of the entries that differ; values [2, nnz]: clean and patched activation
    effects [nnz]     of each entry, in units of the metric, going from clean to patch
    example [R]       int64: the example that each row belongs to
    clean, patched    [N] or [], as the metric gives it: at either end of the path; ``total`` is the difference, summed
    jumps [nnz]       what jump_corrected_ig found at gates that open or close, included in ``effects``; else None
    """

    support: SparseCode
    effects: Tensor
    example: Tensor
    clean: Tensor
    patched: Tensor
    jumps: Tensor | None = None

    @property
    def total(self) -> float:
        """The exact effect of the whole patch: m(patch) − m(clean).  Effects of a complete method add up to it."""
        return float((self.patched - self.clean).double().sum())

    def by_feature(self) -> Tensor:
        """[F]: summed over rows, in float64."""
        out = self.effects.new_zeros(self.support.d_sae, dtype=torch.float64)
        return out.index_add_(0, self.support.indices.long(), self.effects.double())

    def by_example(self) -> Tensor:
        """[N]: summed over features and positions, in float64."""
        out = self.effects.new_zeros(int(self.example.max()) + 1, dtype=torch.float64)
        return out.index_add_(0, self.example[self.support.row_ids()], self.effects.double())

    def top(self, k: int = 10) -> list[tuple[int, float]]:
        """(feature, effect summed over rows) of the k largest in absolute value, the largest first."""
        effects = self.by_feature()
        order = effects.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(i, float(effects[i])) for i in order if effects[i] != 0]

    def to_dense(self) -> Tensor:
        """[R, F]."""
        return self.support.to_dense(self.effects)


def patch(
    model: nn.Module,
    site: str | nn.Module,
    sae: SparseAutoencoder,
    clean: Any,
    patch: Any = None,
    *,
    metric: Callable[..., Tensor],
    method: str = "ig",
    steps: int = 10,
    rule: str = "midpoint",
    vary: str | None = None,
    error: str = "keep",
    jumps: str = "exact",
    where: Tensor | None = None,
    features: Sequence[int] | None = None,
    progress: bool = False,
) -> Effects:
    """Effects of moving the features at ``site`` from their activations a on ``clean`` to a′ on ``patch``.

    clean, patch      inputs of the model: a tensor, a dict of keyword arguments or a tuple, of the same shapes; patch None:
                      a′ = 0.  All else in the model stays as on ``clean``.  Tensors with N rows are taken to have one an
                      example: points of the path that share a pass repeat them
    metric(output)    [N], one number an example, or one number in all; with [N] many points of the path share a pass, and
                      the batch may come in pieces: metric(output, examples) is told of which examples, [n] int64
    method  "exact"   m(a with this one entry patched) − m(a): a forward pass an entry
            "atp"     ∇m(a)·(a′ − a): one backward pass
            "ig"      the mean of ∇m at ``steps`` points of the path by the ``rule`` "left", "right" or "midpoint",
                      times (a′ − a)
            "jump_corrected_ig"   ig where gates open and close on the way, plus the jumps it cannot see
    vary    "features"   the code runs straight from a to a′; nothing is encoded anew, so nothing jumps (regime R1)
            "input"      what comes to the SAE runs straight from clean to patch and is encoded anew at each point (R3): ig
                         sees only the slopes, and misses the jumps by the same amount for any number of steps
                         by default "features", and "input" for jump_corrected_ig
    error   "keep": x̂ + ε of the clean run; "drop": x̂ alone
    jumps   "exact": two forward passes a gate that opens or closes; "linear": height times the gradient at the nearest
            point of the path, no passes: exact where the metric is linear in that feature over its jump
    where   as in `splice`: bool, broadcastable to the site's positions
    features   only these move

    Returns Effects on supp(a) ∪ supp(a′).  ValueError for a site that does not exist (with the near names), shapes that
    differ between clean and patch, steps < 1, a metric without a gradient.
    """
    for name, value, wanted in (
        ("method", method, METHODS), ("vary", vary or "features", VARY), ("error", error, ("keep", "drop")),
        ("jumps", jumps, ("exact", "linear")),
    ):  # fmt: skip
        if value not in wanted:
            raise ValueError(f"{name}: got {value!r}, want one of {wanted}")
    vary = vary or ("input" if method == "jump_corrected_ig" else "features")
    if method == "jump_corrected_ig" and vary == "features":
        raise ValueError(
            'vary: got "features" with method="jump_corrected_ig", want "input": features that move do not jump'
        )
    if vary == "input" and isinstance(sae, GroupedSAE):
        raise ValueError(f'vary: got "input" for a {type(sae).__name__}, want an SAE whose features open by themselves')
    alphas = _path.points(steps, rule) if method != "atp" else [0.0]
    place = sites.find(model, site)
    sae.settle()
    with torch.no_grad():
        m = Downstream(model, place, clean, metric, where)
        patched = None if patch is None else m.rows_on(patch)
        if patched is None and vary == "input":
            raise ValueError('patch: got None with vary="input", want inputs to go to: only features can go to 0')
        walk = (_FeatureWalk if vary == "features" else _InputWalk)(m, sae, patched, features, error, progress)
        first, last = walk.metrics
        corrections = None
        if method == "exact":
            effects = walk.single_effects()
        else:
            effects = walk.integrated(alphas)
            if method == "jump_corrected_ig":
                assert isinstance(walk, _InputWalk)
                corrections = walk.jump_effects(jumps, alphas)
                effects = effects + corrections
    support = walk.support.with_values(walk.support.values[:2])
    return Effects(support, effects, m.example, first, last, corrections)


class _Walk:
    """A path of the site's rows from clean to patch, and what its features do on it."""

    def __init__(
        self,
        m: Downstream,
        sae: SparseAutoencoder,
        patched: Tensor | None,
        features: Sequence[int] | None,
        error: str,
        progress: bool,
    ):
        self.m, self.sae, self.patched, self.progress = m, sae, patched, progress
        moving = None
        if features is not None:
            moving = torch.zeros(sae.d_sae, dtype=torch.bool, device=m.x.device)
            moving[_path.check_features(features, sae)] = True
        with sae.frozen():
            clean = sae.encode_sparse(m.rows)
            self.support = _path.union(clean, None if patched is None else sae.encode_sparse(patched), moving)
        self.f, self.f_patched = self.support.values[:2]
        self.W_dec = sae.W_dec.detach()
        self.start = m.rows.to(self.W_dec.dtype) if error == "keep" else sae.decode(clean)  # [R, d]
        self.end = self.start + _path.decoded(self.support, sae, (self.f_patched - self.f)[None])[0]

    @cached_property
    def metrics(self) -> tuple[Tensor, Tensor]:
        """The metric at either end, [N] or []."""
        return self.m.values(self.start[None])[0], self.m.values(self.end[None])[0]

    @cached_property
    def base(self) -> Tensor:
        """[R, d]: what rows have besides the support's part: the error, b_dec, features that do not move."""
        return self.start - _path.decoded(self.support, self.sae, self.f[None])[0]

    def rows_of(self, f: Tensor) -> Tensor:
        """[r, R, d] of activations f [r, nnz] on the support."""
        return self.base + _path.decoded(self.support, self.sae, f)

    def dots(self, g: Tensor, f: Tensor) -> Tensor:
        """[r, nnz]: ∂m/∂f on the support, from gradients g [r, R, d] with respect to rows."""
        tiled = _path.tiled(self.support, len(g), f)
        return ops.sampled_dots(tiled, g.reshape(-1, g.shape[-1]).to(f.dtype), self.W_dec).view(len(g), -1)

    def integrated(self, alphas: Sequence[float]) -> Tensor:
        raise NotImplementedError

    def single_effects(self) -> Tensor:
        """[nnz]: the metric with one entry patched, less the metric.

        Examples that have metrics of their own, and as many rows each, share passes: of each only the patched one runs."""
        m, row, out = self.m, self.support.row_ids(), torch.empty_like(self.f)
        clean = self.metrics[0]
        counts = torch.bincount(m.example, minlength=m.batch)
        alike = m.by_example and bool((counts == counts[0]).all())
        share = max(1, _path.TOKENS_PER_PASS // int(counts[0])) if alike else 1
        for chunk in self._chunks(range(len(out)), share, "patches"):
            entries = torch.tensor(chunk, device=row.device)
            rows, example = row[entries], m.example[row[entries]]
            change = (self.f_patched - self.f)[entries, None] * self.W_dec[self.support.indices[entries].long()]
            if alike:
                whole = self.start.reshape(m.batch, int(counts[0]), -1)[example]
                whole[torch.arange(len(entries), device=row.device), rows - example * counts[0]] += change
                value = m.values(whole, example)
            else:
                whole = self.start.clone()
                whole[rows] += change
                value = m.values(whole[None])[0]
                value = value[example] if m.by_example else value
            out[entries] = (value - (clean[example] if m.by_example else clean)).to(out.dtype)
        return out

    def _chunks(self, items: Sequence[Any], size: int, what: str) -> Iterator[list[Any]]:
        bar = tqdm(total=len(items), desc=what, disable=not self.progress, dynamic_ncols=True, leave=False)
        iterator = iter(items)
        with bar:
            while chunk := list(islice(iterator, size)):
                yield chunk
                bar.update(len(chunk))


class _FeatureWalk(_Walk):
    """R1: the features run straight, so the rows do, and one product turns the mean gradient of them into effects."""

    def integrated(self, alphas: Sequence[float]) -> Tensor:
        mean = torch.zeros_like(self.start)
        for chunk in self._chunks(alphas, self.m.share, "points"):
            alpha = self.start.new_tensor(chunk)[:, None, None]
            _, g = self.m.gradient(torch.lerp(self.start, self.end, alpha))
            mean += g.sum(0).to(mean.dtype)
        return self.dots(mean[None] / len(alphas), self.f[None])[0] * (self.f_patched - self.f)


class _InputWalk(_Walk):
    """R3: what comes to the SAE runs straight; u does too, and a feature opens or closes where it crosses the threshold."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        sae, indices = self.sae, self.support.indices
        W_enc = sae.W_enc.detach()
        # u of an entry that a code has is that code's; of one that it has not, it is dotted here.
        assert self.patched is not None
        self.u, self.du = (
            torch.where(
                known.isnan(), ops.sampled_dots(self.support, sae.centred(rows.to(W_enc.dtype)).detach(), W_enc), known
            )
            for known, rows in zip(self.support.values[2:], (self.m.rows, self.patched), strict=True)
        )
        self.du = self.du - self.u
        self.opens_at, self.height = _path.jumps(sae, indices)

    def along(self, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """(f, ∂f/∂α as autodiff sees it) [r, nnz] at points alphas [r]."""
        f, slope = _path.pre_and_slope(self.sae, self.u + alphas[:, None] * self.du, self.support.indices)
        return f, slope * self.du

    def integrated(self, alphas: Sequence[float]) -> Tensor:
        return self._weighed(alphas, lambda chunk: self.along(self.u.new_tensor(chunk))[1] / len(alphas))

    def _weighed(self, alphas: Sequence[float], weights: Callable[[list[float]], Tensor]) -> Tensor:
        """Σ over points of ∂m/∂f · weight, [nnz]."""
        total = torch.zeros_like(self.u)
        for chunk in self._chunks(alphas, self.m.share, "points"):
            f, _ = self.along(self.u.new_tensor(chunk))
            _, g = self.m.gradient(self.rows_of(f))
            total += (self.dots(g, f) * weights(chunk)).sum(0)
        return total

    def crossings(self) -> tuple[Tensor, Tensor]:
        """(entries [n] whose gate opens or closes with a jump, where on the path [n])."""
        before, after = self.u > self.opens_at, self.u + self.du > self.opens_at
        entries = ((before != after) & (self.height > 0)).nonzero()[:, 0]
        return entries, (self.opens_at - self.u)[entries] / self.du[entries]

    def jump_effects(self, jumps: str, alphas: Sequence[float]) -> Tensor:
        """[nnz]: what each gate that opens or closes on the way adds to the metric there."""
        entries, at = self.crossings()
        heights = torch.zeros_like(self.u)
        heights[entries] = self.height[entries] * self.du[entries].sign()
        if jumps == "linear":
            grid = self.u.new_tensor(alphas)
            nearest = torch.full_like(self.u, -1).long()
            nearest[entries] = (at[:, None] - grid).abs().argmin(1) if len(entries) else nearest[entries]
            position = {alpha: k for k, alpha in enumerate(alphas)}

            def weights(chunk: list[float]) -> Tensor:
                k = torch.tensor([position[alpha] for alpha in chunk], device=nearest.device)
                return torch.where(nearest == k[:, None], heights, 0)

            return self._weighed(alphas, weights)
        return self._exact_jumps(entries, at, heights)

    def _exact_jumps(self, entries: Tensor, at: Tensor, heights: Tensor) -> Tensor:
        m, out = self.m, torch.zeros_like(self.u)
        row = self.support.row_ids()[entries]
        groups = m.example[row] if m.by_example else torch.zeros_like(row)
        counts = torch.bincount(groups, minlength=1).tolist()
        bar = tqdm(total=len(entries), desc="jumps", disable=not self.progress, dynamic_ncols=True, leave=False)
        with bar:
            for group, jumping in enumerate(entries.split(counts)):
                rows = (
                    (m.example == group).nonzero()[:, 0]
                    if m.by_example
                    else torch.arange(len(self.start), device=row.device)
                )
                if len(jumping) == 0:
                    continue
                first, last = int(rows[0]), int(rows[-1]) + 1
                part, offset = _path.between(self.support, first, last)
                share = max(1, _path.TOKENS_PER_PASS // (2 * len(rows))) if m.by_example else 1
                for some in jumping.split(share):
                    alpha = at[torch.searchsorted(entries, some)]
                    values = self.along(alpha)[0][:, offset : offset + part.nnz].repeat_interleave(2, 0)
                    k = torch.arange(len(some), device=row.device)
                    values[2 * k, some - offset], values[2 * k + 1, some - offset] = 0, self.height[some]
                    whole = self.base[first:last] + _path.decoded(part, self.sae, values)
                    if m.by_example:
                        measured = m.values(whole, rows.new_full((len(whole),), group))
                    else:
                        measured = torch.stack([m.values(each[None])[0] for each in whole])
                    out[some] = ((measured[1::2] - measured[::2]) * heights[some].sign()).to(out.dtype)
                    bar.update(len(some))
        return out
