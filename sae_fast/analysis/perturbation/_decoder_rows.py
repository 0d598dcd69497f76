"""Perturbations made of few decoder rows of an SAE: found by ascent, or read off a direction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.analysis.perturbation._ascent import (
    Change,
    Loss,
    Perturbed,
    bar_of,
    climb,
    highest,
    positive,
    tangent,
    unit,
    untouched,
    whole,
)
from sae_fast.analysis.splicing import check_features, check_sae
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder


@dataclass(frozen=True)
class OfRows:
    """theta [d] = Σ_j weights_j W_dec[features_j], of norm R; features [≤ s] int64 and weights [≤ s], the largest first;
    objective []; history [steps]."""

    theta: Tensor
    features: Tensor
    weights: Tensor
    objective: Tensor
    history: Tensor


def rows(
    model: nn.Module,
    source: str | nn.Module | sites.Site,
    inputs: Any,
    objective: Change | Loss,
    sae: SparseAutoencoder,
    *,
    radius: float,
    s: int = 3,
    steps: int = 50,
    lr: float = 2.0,
    starts: int = 1,
    seed: int = 0,
    like: Tensor | None = None,
    features: Iterable[int] | None = None,
    where: Tensor | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> OfRows:
    """A θ = a W_dec with a ≥ 0, ‖a‖₀ ≤ s and ‖θ‖₂ = R that makes the objective largest, of few decoder rows of an SAE of
    ``source``: projected ascent with hard thresholding.

    With rows u_j of unit norm, a step is a ← T_s(a + lr ‖a‖ ĝ): ĝ_j = ⟨u_j, gradient in the tangent plane⟩, the largest
    scaled to 1, and T_s keeps the s largest entries that are positive and rescales θ to R.  It begins with s rows at
    random, or with T_s of ⟨u_j, like⟩, where ``like`` [d] is a direction to be imitated.  features: only these rows may be
    taken.  The rest is as in `sphere`.
    """
    radius, lr = positive("radius", radius), positive("lr", lr)
    s, steps, starts = whole("s", s), whole("steps", steps), whole("starts", starts)
    check_sae(sae)
    sae.settle()
    with untouched(model):
        perturbed = Perturbed(model, source, inputs, objective, where, chunk)
        if perturbed.shape[-1] != sae.W_dec.shape[1]:
            got = f"its decoder's rows have {sae.W_dec.shape[1]} dimensions"
            raise ValueError(f"sae: {got}, want {perturbed.shape[-1]}, those of the source")
        W_dec = sae.W_dec.detach().to(perturbed.like)
        units, norms = unit(W_dec), torch.linalg.vector_norm(W_dec, dim=1)
        off = torch.full((sae.d_sae,), features is not None, device=W_dec.device)
        if features is not None:
            off[check_features(features, sae.d_sae)] = False
        off |= norms == 0
        if off.all():
            raise ValueError("features: got none whose decoder row is not 0, want at least one")
        few = _Few(units, off, s, radius)

        def evaluate(a: Tensor) -> tuple[Tensor, Tensor]:
            theta = a @ units
            values, slope = perturbed.value_and_slope(theta)
            return values, tangent(slope, theta) @ units.T

        random, ends = torch.Generator().manual_seed(seed), []
        with bar_of("rows", starts * steps, progress) as bar:
            for _ in range(starts):
                if like is None:
                    begin = torch.rand(1, sae.d_sae, generator=random, dtype=torch.float64).to(W_dec)
                else:
                    begin = _as_theta(like, W_dec) @ units.T
                a = few.nearest(begin)
                if not a.any():
                    raise ValueError("like: got a direction that no decoder row points along, want one that some do")
                ends.append(climb(evaluate, few.step, a, steps, lr, bar))
    a, values, history = highest(ends)
    chosen = a[0].argsort(descending=True, stable=True)[: int((a > 0).sum())]
    return OfRows((a @ units)[0], chosen, a[0, chosen] / norms[chosen], values[0], history[:, 0])


@dataclass(frozen=True)
class _Few:
    """Weights a [m, F] ≥ 0 of unit rows: at most ``s`` that are not 0, none where ``off``, and ‖a units‖₂ = radius."""

    units: Tensor
    off: Tensor
    s: int
    radius: float

    def nearest(self, a: Tensor) -> Tensor:
        """T_s: the s largest entries that are positive, scaled."""
        a = torch.where(self.off, 0, a).clamp(min=0)
        if self.s < a.shape[1]:
            largest = a.topk(self.s, dim=1)
            a = torch.zeros_like(a).scatter(1, largest.indices, largest.values)
        return a * (self.radius / torch.linalg.vector_norm(a @ self.units, dim=1, keepdim=True).clamp(min=1e-30))

    def step(self, a: Tensor, slope: Tensor, rate: Tensor) -> Tensor:
        """Along the gradient, the largest of which is scaled to ‖a‖; a itself where nothing would be left."""
        slope = torch.where(self.off, 0, slope)
        push = slope / slope.abs().amax(1, keepdim=True).clamp(min=1e-30)
        moved = self.nearest(a + rate[:, None].to(a.dtype) * torch.linalg.vector_norm(a, dim=1, keepdim=True) * push)
        return torch.where(moved.any(1, keepdim=True), moved, a)


def nearest_rows(sae: SparseAutoencoder, theta: Tensor, k: int = 10) -> list[tuple[int, float]]:
    """(feature, cosine of its decoder row with theta [d]) of the k largest, the largest first."""
    check_sae(sae)
    sae.settle()
    W_dec = sae.W_dec.detach().double()
    cosines = unit(W_dec) @ unit(_as_theta(theta, W_dec))[0]
    order = cosines.argsort(descending=True, stable=True)[: whole("k", k)].tolist()
    return [(i, float(cosines[i])) for i in order]


def _as_theta(theta: Tensor, W_dec: Tensor) -> Tensor:
    """[1, d], or ValueError."""
    if not isinstance(theta, Tensor) or theta.shape != W_dec.shape[1:] or not theta.isfinite().all() or not theta.any():
        got = tuple(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
        raise ValueError(f"theta: got {got}, want a finite direction [{W_dec.shape[1]}], not 0")
    return theta.detach().to(W_dec)[None]
