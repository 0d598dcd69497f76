"""The two ways from a clean code to a patched one, and what features do on them: R1 and R3 of MATH.md §5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sae_fast import ops
from sae_fast.analysis.attribution import _path
from sae_fast.analysis.attribution._path import Downstream
from sae_fast.analysis.splicing import check_features
from sae_fast.code import SparseCode
from sae_fast.nn import SparseAutoencoder


class Walk:
    """The site's rows from ``start`` to ``end`` [R, d], on the entries ``support`` that differ, with activations f and
    f_patched [nnz] at the two ends."""

    def __init__(
        self,
        m: Downstream,
        sae: SparseAutoencoder,
        patched: Tensor | None,
        features: Iterable[int] | None,
        error: str,
        progress: bool,
    ):
        self.m, self.sae, self.progress = m, sae, progress
        moving = None
        if features is not None:
            moving = torch.zeros(sae.d_sae, dtype=torch.bool, device=m.x.device)
            moving[check_features(features, sae.d_sae)] = True
        with sae.frozen():
            clean = sae.encode_sparse(m.rows)
            self.support = _path.union(clean, None if patched is None else sae.encode_sparse(patched), moving)
        self.f, self.f_patched = self.support.values[:2]
        self.W_dec = sae.W_dec.detach()
        self.start = m.rows.to(self.W_dec.dtype) if error == "keep" else sae.decode(clean)
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

    def dots(self, g: Tensor) -> Tensor:
        """[r, nnz]: ∂m/∂f on the support, from gradients g [r, R, d] with respect to rows."""
        stacked = SparseCode.cat([self.support] * len(g))
        return ops.sampled_dots(stacked, g.flatten(0, 1).to(self.W_dec.dtype), self.W_dec).view(len(g), -1)

    def integrated(self, alphas: Sequence[float]) -> Tensor:
        """[nnz]: the mean over points of the gradient, times the change."""
        raise NotImplementedError

    def single_effects(self) -> Tensor:
        """[nnz]: the metric with one entry patched, less the metric."""
        row, out = self.support.row_ids(), torch.empty_like(self.f)
        everything = torch.arange(len(out), device=row.device)
        for first, last, example, entries in self._pieces(everything, 1, "patches"):
            whole = self.start[first:last].repeat(len(entries), 1, 1)
            change = (self.f_patched - self.f)[entries, None] * self.W_dec[self.support.indices[entries].long()]
            whole[torch.arange(len(entries), device=row.device), row[entries] - first] += change
            clean = self.metrics[0] if example is None else self.metrics[0][example]
            out[entries] = (self._measured(whole, example) - clean).to(out.dtype)
        return out

    def _measured(self, whole: Tensor, example: int | None) -> Tensor:
        """[n]: the metric of rows [n, R′, d] of one example; of all, where examples have no metrics of their own."""
        if example is None:
            return torch.stack([self.m.values(each[None])[0] for each in whole])
        return self.m.values(whole, torch.full((len(whole),), example, device=whole.device))

    def _pieces(self, entries: Tensor, runs: int, what: str) -> Iterator[tuple[int, int, int | None, Tensor]]:
        """``entries``, ascending, in pieces that share a pass of the model: (first and last row of their example, which it
        is, the entries), ``runs`` runs of the model each.  Example None: of all rows."""
        m, row = self.m, self.support.row_ids()
        share = max(1, m.examples_per_pass // runs) if m.by_example else 1
        groups = m.example[row[entries]] if m.by_example else torch.zeros_like(row[entries])
        counts = torch.bincount(m.example, minlength=m.batch)
        ends = counts.cumsum(0).tolist()
        with tqdm(total=len(entries), desc=what, disable=not self.progress, dynamic_ncols=True, leave=False) as bar:
            for group, some in enumerate(entries.split(torch.bincount(groups, minlength=1).tolist())):
                first, last = (ends[group] - int(counts[group]), ends[group]) if m.by_example else (0, len(self.start))
                for piece in some.split(share) if len(some) else ():
                    yield first, last, group if m.by_example else None, piece
                    bar.update(len(piece))

    def _points(self, alphas: Sequence[float]) -> Iterator[tuple[int, Tensor]]:
        """(the number of the first, the points) of each pass."""
        with tqdm(total=len(alphas), desc="points", disable=not self.progress, dynamic_ncols=True, leave=False) as bar:
            for first in range(0, len(alphas), self.m.share):
                some = self.f.new_tensor(alphas[first : first + self.m.share])
                yield first, some
                bar.update(len(some))


class FeatureWalk(Walk):
    """R1: the features run straight, so the rows do, and one product turns the mean gradient of them into effects."""

    def integrated(self, alphas: Sequence[float]) -> Tensor:
        mean = torch.zeros_like(self.start)
        for _, alpha in self._points(alphas):
            g = self.m.gradient(torch.lerp(self.start, self.end, alpha[:, None, None]))
            mean += g.to(mean.dtype).sum(0)
        return self.dots(mean[None] / len(alphas))[0] * (self.f_patched - self.f)


class InputWalk(Walk):
    """R3: what comes to the SAE runs straight; u does too, and a feature opens or closes where it crosses the threshold."""

    def __init__(self, m: Downstream, sae: SparseAutoencoder, patched: Tensor, *rest):
        super().__init__(m, sae, patched, *rest)
        W_enc = sae.W_enc.detach()
        ends = []
        for known, rows in zip(self.support.values[2:], (m.rows, patched), strict=True):
            # u of an entry that a code has is that code's; of one that it has not, it is dotted here.
            x = sae.centred(rows.to(W_enc.dtype)).detach()
            ends.append(torch.where(known.isnan(), ops.sampled_dots(self.support, x, W_enc), known))
        self.u, self.du = ends[0], ends[1] - ends[0]
        self.opens_at, height = _path.jumps(sae, self.support.indices)
        before, after = self.u > self.opens_at, ends[1] > self.opens_at
        self.crossing = ((before != after) & (height > 0)).nonzero()[:, 0]  # entries whose gate opens or closes with a jump
        self.at = (self.opens_at - self.u)[self.crossing] / self.du[self.crossing]  # where
        self.height = height[self.crossing] * self.du[self.crossing].sign()  # and by how much

    def integrated(self, alphas: Sequence[float]) -> Tensor:
        return self._weighed(alphas)[0]

    def integrated_and_jumps(self, alphas: Sequence[float], jumps: str) -> tuple[Tensor, Tensor]:
        """(as `integrated`, [nnz] what each gate that opens or closes on the way adds to the metric there)."""
        slopes, linear = self._weighed(alphas, linear=jumps == "linear")
        return slopes, linear if jumps == "linear" else self._exact_jumps()

    def _along(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(f, ∂f/∂α as autodiff sees it) [r, nnz] at points alpha [r]."""
        f, slope = _path.value_and_slope(self.sae, self.u + alpha[:, None] * self.du, self.support.indices)
        return f, slope * self.du

    def _weighed(self, alphas: Sequence[float], linear: bool = False) -> tuple[Tensor, Tensor]:
        """Sums over points of ∂m/∂f, [nnz] each: times the mean slope; and times its height for each jump that is nearest
        to the point."""
        total, at_jumps = torch.zeros(2, *self.u.shape, dtype=self.u.dtype, device=self.u.device)
        nearest = (self.at[:, None] - self.u.new_tensor(alphas)).abs().argmin(1) if linear else None
        for first, alpha in self._points(alphas):
            f, slope = self._along(alpha)
            gradient = self.dots(self.m.gradient(self.rows_of(f)))
            total += (gradient * slope).sum(0) / len(alphas)
            if nearest is not None:
                here = (nearest >= first) & (nearest < first + len(alpha))
                entries = self.crossing[here]
                at_jumps[entries] = gradient[nearest[here] - first, entries] * self.height[here]
        return total, at_jumps

    def _exact_jumps(self) -> Tensor:
        """m just after less m just before each jump.  Of jumps of one example at one point the earlier entry's is first."""
        out = torch.zeros_like(self.u)
        order = torch.empty_like(self.crossing)
        order[self.at.argsort(stable=True)] = torch.arange(len(order), device=order.device)
        for first, last, example, entries in self._pieces(self.crossing, 2, "jumps"):
            part, offset = _path.between(self.support, first, last)
            of_part = slice(offset, offset + part.nnz)
            here = (self.crossing >= offset) & (self.crossing < offset + part.nnz)
            others, ranks = self.crossing[here], order[here]
            mine = torch.searchsorted(self.crossing, entries)
            u = self.u[of_part] + self.at[mine][:, None] * self.du[of_part]
            open_ = u > self.opens_at[of_part]
            # Of gates that open or close, those that have: the others are as before.
            open_[:, others - offset] = (ranks < order[mine][:, None]) == (self.du[others] > 0)
            values = _path.value_and_slope(self.sae, u, part.indices, open_)[0].repeat_interleave(2, 0)
            k = torch.arange(len(entries), device=entries.device)
            before, after = (-self.height[mine]).relu(), self.height[mine].relu()
            values[2 * k, entries - offset], values[2 * k + 1, entries - offset] = before, after
            whole = self.base[first:last] + _path.decoded(part, self.sae, values)
            measured = self._measured(whole, example)
            out[entries] = (measured[1::2] - measured[::2]).to(out.dtype)
        return out
