"""What the cases work on: activations in superposition, and a Gated SAE that is sparse on them.

Speed here depends on the support, and the support on the data: on white noise every feature and every example is
like every other.  Real activations are sums of few features out of many, some common and most rare, with strengths over a
decade, about a mean that is larger than any of them; so are these.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sae_fast import GatedSAE


@dataclass(frozen=True)
class Shape:
    """B examples of width d, F features, of which l0 are active on a mean example."""

    B: int
    d: int
    F: int
    l0: float

    @property
    def dense(self) -> Shape:
        """This shape in the dense phase: half of all features active, as they are under the peers' zero biases."""
        return replace(self, l0=self.F / 2)

    def __str__(self) -> str:
        return f"B={self.B} d={self.d} F={self.F} L0={self.l0:g}"


N_BATCHES = 8
DIRECTIONS = 0.06  # active in an example, for each of its dimensions: 46 of 768
FULL = Shape(B=2048, d=768, F=24576, l0=46)
SMALL = Shape(B=1024, d=384, F=6144, l0=46)
QUICK = Shape(B=256, d=64, F=1024, l0=16)


class Superposition:
    """Examples [n, d]: a mean, plus about ``active`` of ``features`` unit directions, plus a little noise.

    How often a direction is active is log-normal over directions (a common one 10 to 100 times as often as a rare one), and
    so is its strength over examples.
    """

    def __init__(self, d: int, features: int, active: float, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.directions = F.normalize(self._normal(features, d), dim=1)
        self.frequencies = (1.5 * self._normal(features)).exp()
        self.mean = 3 * F.normalize(self._normal(d), dim=0)
        self.active = active

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def batch(self, n: int) -> Tensor:
        counts = torch.poisson(torch.full((n,), float(self.active)), generator=self.random).long()
        total = int(counts.sum())
        which = torch.multinomial(self.frequencies, max(total, 1), replacement=True, generator=self.random)[:total]
        strengths = (0.5 * self._normal(total)).exp()
        sums = F.embedding_bag(which, self.directions, counts.cumsum(0) - counts, mode="sum", per_sample_weights=strengths)
        return sums + self.mean + 0.02 * self._normal(n, self.directions.shape[1])


@dataclass(frozen=True, eq=False)
class World:
    """Batches of one shape, and a Gated SAE of which ``shape.l0`` features fire on them."""

    shape: Shape
    batches: list[Tensor]
    sae: GatedSAE

    def new_sae(self) -> GatedSAE:
        """A copy of the SAE, for one provider to train."""
        return copy.deepcopy(self.sae)

    def head(self, rows: int, batches: int) -> World:
        """The same SAE with fewer and shorter batches, for the check."""
        shape = replace(self.shape, B=min(rows, self.shape.B))
        return World(shape, [x[:rows] for x in self.batches[:batches]], self.sae)


@lru_cache(maxsize=1)
def world(shape: Shape, n_batches: int = N_BATCHES, seed: int = 0) -> World:
    """The world of a shape.  The last one is kept: the cases share it.

    How many directions an example is made of depends on d alone, so that shapes that differ in l0 see the same data.
    The SAE's dictionary is random (unit rows, W_enc = W_dec), its b_dec the mean of the data, and its gates are
    calibrated: every feature fires on l0 / F of the examples.  So nearly every row of the weights is touched in every
    step, which is more than a trained SAE's rare features would ask of the engine.
    """
    source = Superposition(shape.d, shape.F, max(4, DIRECTIONS * shape.d), seed)
    sae = GatedSAE(shape.d, shape.F, seed=seed)
    sae.metadata["l0"] = shape.l0  # the k of other kinds
    n = round(min(4096, max(512, 64 * shape.F / shape.l0)))  # examples to calibrate on: a feature fires on 64 of them
    sample, fresh = source.batch(n), source.batch(n)
    with torch.no_grad():
        sae.b_dec.copy_(sample.mean(0))
        sae.calibrate_(sample, shape.l0)
        # Thresholds taken from a sample's few largest values let more pass on fresh data: correct for it once.
        sae.calibrate_(sample, shape.l0**2 / mean_l0(sae, fresh))
        sae.r_mag.uniform_(-0.1, 0.1, generator=source.random)  # so that magnitudes and gates differ, on one support
        sae.b_mag.copy_(sae.r_mag.exp() * sae.b_gate)
    return World(shape, [source.batch(shape.B) for _ in range(n_batches)], sae)


def mean_l0(sae: GatedSAE, x: Tensor) -> float:
    """Mean number of features that fire on an example of x."""
    with torch.no_grad():
        return float(sae.encode_sparse(x).l0().double().mean())
