"""Prefixes: reconstruction from the first features alone, too (Matryoshka; Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, inf, isclose

import numpy as np
import torch
from torch import Tensor

from sae_fast import arguments


@dataclass(frozen=True)
class Prefixes:
    """Σ_g c_g ‖x − x̂_g‖² in the place of ‖x − x̂‖², x̂_g from the features of the first g of G groups.

    Groups are runs of features, of ``group_sizes``, which add up to F, or of ``fractions`` of F, which add up to 1 (all
    but the last rounded down).  ``weights``: the c_g, by default 1/G each.  ``random`` = n > 0: instead of groups n
    prefixes, all of F and n − 1 shorter ones, drawn anew in each step, which alone says which with ``seed``, with a
    density ∝ 1/√length.
    """

    group_sizes: tuple[int, ...] | None = None
    fractions: tuple[float, ...] | None = None
    weights: tuple[float, ...] | None = None
    random: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("group_sizes", arguments.counts, "positive ints"),
            ("fractions", arguments.positive, "positive numbers that add up to 1"),
            ("weights", lambda c: 0 <= c < inf, "numbers ≥ 0, one a prefix, the last > 0"),
        ):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, arguments.numbers(name, value, fits, wanted))
        for name in ("random", "seed"):
            object.__setattr__(self, name, arguments.whole(name, getattr(self, name), 0, wanted="an int ≥ 0"))
        ways = [name for name in ("group_sizes", "fractions", "random") if getattr(self, name)]
        if len(ways) != 1:
            raise ValueError(f"group_sizes, fractions, random: got {ways or 'none'}, want one of them")
        fractions = self.fractions
        if fractions is not None and not isclose(sum(fractions), 1, abs_tol=1e-6):
            raise ValueError(f"fractions: got {fractions}, want positive numbers that add up to 1")
        groups = len(self.group_sizes or self.fractions or ()) or self.random
        weights = self.weights
        if weights is not None and not (len(weights) == groups and weights[-1] > 0):
            raise ValueError(f"weights: got {weights}, want {groups} numbers ≥ 0, the last > 0")

    def sizes(self, features: int) -> tuple[int, ...]:
        """The sizes of groups that are not random; ``ValueError`` where they do not add up to F."""
        if self.group_sizes is not None:
            if sum(self.group_sizes) != features:
                raise ValueError(f"group_sizes: got a sum of {sum(self.group_sizes)}, want d_sae = {features}")
            return self.group_sizes
        if self.fractions is None:
            raise ValueError(f"prefixes: got {self.random} random ones, which a step draws, want .drawn(F, step)")
        sizes = [int(fraction * features) for fraction in self.fractions[:-1]]
        sizes.append(features - sum(sizes))
        if min(sizes) < 1:
            raise ValueError(f"fractions: got {self.fractions} of {features} features, want at least one in each group")
        return tuple(sizes)

    def ends(self, features: int) -> tuple[int, ...]:
        """The ends of the prefixes, ascending, the last F."""
        return tuple(accumulate(self.sizes(features)))

    def drawn(self, features: int, step: int) -> Prefixes:
        """Those of a step, with groups of their own if they are random."""
        if not self.random:
            return self
        if self.random > features:
            raise ValueError(f"random: got {self.random} prefixes of {features} features, want at most as many")
        draw, ends = np.random.default_rng((self.seed, step)), {features}
        while len(ends) < self.random:
            ends.add(max(1, ceil(features * draw.random() ** 2)))
        return Prefixes(tuple(b - a for a, b in pairwise([0, *sorted(ends)])), weights=self.weights)

    def costs(self, like: Tensor) -> Tensor:
        """[G]: the c_g."""
        groups = len(self.group_sizes or self.fractions or ()) or self.random
        return torch.tensor(self.weights or [1 / groups] * groups, dtype=like.dtype, device=like.device)
