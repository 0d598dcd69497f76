"""Perturbations of what a model computes at a site: searched for on a sphere, in a ball, or among an SAE's decoder rows.

MATH.md §7.  The sphere is that of "Mechanistically eliciting latent behaviors" (MELBO, A. Mack and A. Turner 2024), the
ball that of the inner loop of latent adversarial training (LAT, S. Casper et al. 2024, arXiv 2403.05030).  Nothing is
trained on what is found: it is there to elicit behaviour that ordinary inputs do not show.

A search runs the model in eval mode and leaves it as it was: no hook stays, no parameter gets a gradient, and what was in
training mode is in it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    off,
    positive,
    tangent,
    unit,
    untouched,
    whole,
)  # fmt: skip
from sae_fast.analysis.perturbation._decoder_rows import OfRows, nearest_rows, rows
from sae_fast.analysis.splicing import Edit, as_features, check_features, check_where
from sae_fast.code import SparseCode
from sae_fast.data import sites

__all__ = ["Change", "Directions", "InBall", "OfRows", "adding", "ball", "clamp", "nearest_rows", "rows", "sphere"]


@dataclass(frozen=True)
class Directions:
    """theta [K, d], of norm R each and orthogonal to each other; objective [K] of each; history [K, steps], the best so far
    at each evaluation of the start that won."""

    theta: Tensor
    objective: Tensor
    history: Tensor


@dataclass(frozen=True)
class InBall:
    """delta [N, *, d], a perturbation for each example; objective [N] with it; history [N, steps], the best so far."""

    delta: Tensor
    objective: Tensor
    history: Tensor


def sphere(
    model: nn.Module,
    source: str | nn.Module | sites.Site,
    inputs: Any,
    objective: Change | Loss,
    *,
    radius: float,
    directions: int = 1,
    steps: int = 50,
    lr: float = 0.5,
    starts: int = 1,
    seed: int = 0,
    orthogonal_to: Tensor | None = None,
    where: Tensor | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Directions:
    """Vectors θ with ‖θ‖₂ = R that, added at ``source`` at every position of every example, make the objective largest:
    one after the other, each orthogonal to those before it (MELBO).

    inputs          of the model: a tensor, a dict of keyword arguments or a tuple; tensors with N rows have one an example
    objective       ``Change(target, p, q)``, or a loss: a function of the model's output, or of (output, examples [n]),
                    that gives one number an example, [n]; it is their mean that grows
    directions, starts   how many θ; of how many random beginnings each is the best
    steps, lr       evaluations a start, a forward and a backward pass each; the length of the first step ÷ R.  A step is
                    θ ← R · unit(θ + lr R ĝ), ĝ the unit gradient in the tangent plane and off the earlier θ; one that does
                    not go up is taken back, and lr halved
    orthogonal_to   [k, d]: other vectors to stay orthogonal to
    where           bool, broadcastable to the source's positions: θ is added there alone
    chunk           examples a pass, by default of 4 096 positions; the result does not depend on it, memory does.  Change
                    keeps Z(0) of all examples

    ValueError for sites that do not exist or lie the wrong way round, more directions than dimensions, an objective that is
    not one number an example, that the source does not reach, or whose value or gradient is not finite.
    """
    radius, lr = positive("radius", radius), positive("lr", lr)
    directions, steps, starts = whole("directions", directions), whole("steps", steps), whole("starts", starts)
    with untouched(model):
        perturbed = Perturbed(model, source, inputs, objective, where, chunk)
        basis = _basis(orthogonal_to, directions, perturbed)
        random = torch.Generator().manual_seed(seed)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with bar_of("directions", directions * starts * steps, progress) as bar:
            for _ in range(directions):
                ends = []
                for _ in range(starts):
                    drawn = torch.randn(1, perturbed.shape[-1], generator=random, dtype=torch.float64)
                    begin = radius * unit(off(drawn.to(perturbed.like), basis))

                    def step(theta: Tensor, slope: Tensor, rate: Tensor, basis: Tensor = basis) -> Tensor:
                        push = unit(off(tangent(slope, theta), basis))
                        moved = theta + radius * rate[:, None].to(theta.dtype) * push
                        return radius * unit(off(moved, basis))

                    ends.append(climb(perturbed.value_and_slope, step, begin, steps, lr, bar))
                found.append(highest(ends))
                basis = torch.cat([basis, unit(found[-1][0])])
    theta, values, history = zip(*found, strict=True)
    return Directions(torch.cat(theta), torch.cat(values), torch.cat(history, 1).T)


def ball(
    model: nn.Module,
    source: str | nn.Module | sites.Site,
    inputs: Any,
    objective: Change | Loss,
    *,
    epsilon: float,
    steps: int = 20,
    lr: float = 0.5,
    seed: int = 0,
    where: Tensor | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> InBall:
    """For each example a δ [*, d] of its own with ‖δ‖₂ ≤ ε, the norm over the chosen positions and the hidden axis
    together, that makes its objective largest: the inner loop of LAT, projected gradient ascent.

    A step is δ ← P(δ + lr ε ĝ), ĝ the example's unit gradient and P the projection onto the ball; it begins at random with
    norm ε/2.  Each example keeps its own lr and its best δ, so what it gets does not depend on the others.  The rest is as
    in `sphere`.
    """
    epsilon, lr, steps = positive("epsilon", epsilon), positive("lr", lr), whole("steps", steps)
    with untouched(model):
        perturbed = Perturbed(model, source, inputs, objective, where, chunk)
        dims = tuple(range(1, len(perturbed.shape) + 1))
        drawn = torch.randn(
            perturbed.n, *perturbed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        drawn = drawn.to(perturbed.like)
        if perturbed.mask is not None:
            drawn *= perturbed.mask[..., None].to(drawn.device)
        begin = epsilon / 2 * unit(drawn, dims)

        def step(delta: Tensor, slope: Tensor, rate: Tensor) -> Tensor:
            moved = delta + epsilon * rate.reshape(-1, *[1] * len(perturbed.shape)).to(delta.dtype) * unit(slope, dims)
            norm = torch.linalg.vector_norm(moved, dim=dims, keepdim=True)
            return torch.where(norm > epsilon, moved * (epsilon / norm), moved)

        found = []
        with bar_of("ball", len(perturbed.pieces) * steps, progress) as bar:
            for index, piece in enumerate(perturbed.pieces):
                found.append(climb(partial(perturbed.values_and_slopes, index), step, begin[piece], steps, lr, bar))
        perturbed.check_reached()
    delta, values, history = zip(*found, strict=True)
    return InBall(torch.cat(delta), torch.cat(values), torch.cat(history, 1).T)


def clamp(features: Iterable[int], value: float | None = None, multiple: float | None = None) -> Edit:
    """An edit for `splice` that sets each of these features to ``value`` everywhere, also where it does not fire, or
    to ``multiple`` times what it is.  With error="keep" or "recompute" all else of the activations stays."""
    chosen = as_features(features)
    if (value is None) == (multiple is None):
        raise ValueError(f"value: got {value!r} with multiple={multiple!r}, want one of the two")
    given = value if value is not None else multiple
    if not isinstance(given, (int, float)) or not math.isfinite(given):
        raise ValueError(f"{'multiple' if value is None else 'value'}: got {given!r}, want a finite number")

    def edit(code: SparseCode) -> SparseCode:
        clamped = torch.tensor(sorted(check_features(chosen, code.d_sae)), device=code.indices.device)
        hit = torch.isin(code.indices.long(), clamped)
        if multiple is not None:
            return code.with_values(torch.where(hit, code.values * multiple, code.values))
        return _with_entries(code, ~hit, clamped, float(given))

    return edit


@contextmanager
def adding(
    model: nn.Module, site: str | nn.Module | sites.Site, vector: Tensor, where: Tensor | None = None
) -> Iterator[None]:
    """In the block, ``vector`` ([d], or anything that broadcasts to the site's [..., d]) is added to what comes through
    the site, at the positions that ``where`` takes."""

    def add(x: Tensor) -> Tensor:
        mask = check_where(where, x)
        moved = x + vector.to(x)
        if moved.shape != x.shape:
            raise ValueError(f"vector: got shape {tuple(vector.shape)}, want one that broadcasts to {tuple(x.shape)}")
        return moved if mask is None else torch.where(mask[..., None], moved, x)

    with sites.changed(sites.find(model, site), add):
        yield


def _with_entries(code: SparseCode, kept: Tensor, features: Tensor, value: float) -> SparseCode:
    """The entries of a code that are kept, and one of ``value`` in every row for each feature; u of these is nan."""
    width = code.d_sae
    begins = torch.arange(code.batch, device=features.device)[:, None] * width
    keys = torch.cat([(code.row_ids() * width + code.indices.long())[kept], (begins + features).flatten()])
    new = len(keys) - int(kept.sum())
    keys, order = keys.sort()
    values = torch.cat([code.values[:, kept], code.values.new_full((len(code.values), new), value)], 1)[:, order]
    u = torch.cat([code.u[kept], code.u.new_full((new,), torch.nan)])[order]
    indptr = torch.searchsorted(keys, torch.arange(code.batch + 1, device=keys.device) * width)
    return SparseCode(code.shape, indptr, (keys % width).int(), u, values)


def _basis(orthogonal_to: Tensor | None, directions: int, perturbed: Perturbed) -> Tensor:
    """[r, d]: an orthonormal basis of what new directions are to be orthogonal to."""
    d = perturbed.shape[-1]
    basis = perturbed.like.new_zeros(0, d)
    if orthogonal_to is not None:
        given = torch.as_tensor(orthogonal_to)
        if given.dim() not in (1, 2) or given.shape[-1] != d or not given.isfinite().all():
            raise ValueError(f"orthogonal_to: got shape {tuple(given.shape)}, want finite [k, {d}]")
        for vector in unit(given.reshape(-1, d).to(perturbed.like)):
            left = off(off(vector[None], basis), basis)
            if left.norm() > 1e-4:  # else it is in the span of the others
                basis = torch.cat([basis, unit(left)])
    if len(basis) + directions > d:
        got = f"{directions} besides {len(basis)} to be orthogonal to" if len(basis) else directions
        raise ValueError(f"directions: got {got}, want at most {d} in all, the dimensions of the source")
    return basis
