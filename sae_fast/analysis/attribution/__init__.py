"""attribution.patch: what each SAE feature does to a metric, when activations move from a clean run's to a patched run's.

Sparse Feature Circuits (Marks et al. 2024, arXiv 2403.19647) for the methods, MATH.md §5 for the regimes.  Everything lives
on supp(clean) ∪ supp(patch): the path is decoded from its entries, gradients are taken with respect to the d dimensions of
the site, and one sampled product with W_dec turns them into effects.  No [tokens, F] matrix exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sae_fast.analysis.attribution import _path
from sae_fast.analysis.attribution._path import Downstream
from sae_fast.analysis.attribution._walks import FeatureWalk, InputWalk, Walk
from sae_fast.analysis.splicing import check_sae, check_width
from sae_fast.code import SparseCode
from sae_fast.data import sites
from sae_fast.nn import SparseAutoencoder
from sae_fast.nn.grouped import GroupedSAE

METHODS = ("exact", "atp", "ig", "jump_corrected_ig")
VARY = ("features", "input")


@dataclass(frozen=True)
class Effects:
    """The effect of each entry on the metric, and of all of them together.

    support           SparseCode [R, F] of the entries that differ; values [2, nnz]: clean and patched activation
    effects [nnz]     of each entry, in units of the metric, going from clean to patch
    example [R]       int64: the example that each row of the support is of
    position [R]      int64: which of the example's positions it is
    clean, patched    [N] or [], as the metric gives it: at either end of the path; ``total`` is the difference, summed
    n_examples        N
    jumps [nnz]       what jump_corrected_ig found at gates that open or close, included in ``effects``; else None
    """

    support: SparseCode
    effects: Tensor
    example: Tensor
    position: Tensor
    clean: Tensor
    patched: Tensor
    n_examples: int
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
        out = self.effects.new_zeros(self.n_examples, dtype=torch.float64)
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
    features: Iterable[int] | None = None,
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
            of the points that ig takes: exact where the metric is linear in that feature, and no other changes its slope
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
    check_sae(sae, "attribute to its features")
    place = sites.find(model, site)
    sae.settle()
    with torch.no_grad():
        m = Downstream(model, place, clean, metric, where)
        check_width(sae, m.x)
        patched = None if patch is None else m.rows_on(patch)
        if patched is None and vary == "input":
            raise ValueError('patch: got None with vary="input", want inputs to go to: only features can go to 0')
        walk: Walk
        if vary == "features":
            walk = FeatureWalk(m, sae, patched, features, error, progress)
        else:
            assert patched is not None
            walk = InputWalk(m, sae, patched, features, error, progress)
        first, last = walk.metrics
        if error == "keep":
            _check_same(m.clean, first, last)
        corrections = None
        if method == "exact":
            effects = walk.single_effects()
        elif isinstance(walk, InputWalk) and method == "jump_corrected_ig":
            effects, corrections = walk.integrated_and_jumps(alphas, jumps)
            effects = effects + corrections
        else:
            effects = walk.integrated(alphas)
    support = walk.support.with_values(walk.support.values[:2])
    return Effects(support, effects, m.example, m.position, first, last, m.batch, corrections)


def _check_same(clean: Tensor, again: Tensor, patched: Tensor) -> None:
    """ValueError unless the model says the same twice."""
    scale = max(float(clean.abs().max()), float(patched.abs().max()))
    if float((clean - again).abs().max()) > 1e-3 * scale:
        got = f"a metric of {clean.flatten()[:3].tolist()} and then of {again.flatten()[:3].tolist()} on the same inputs"
        raise ValueError(f"model: got {got}, want a model that draws no lots (model.eval()?)")
