"""L0: JumpReLU's objective, by straight-through estimators (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.activations.activation import Activation
from sae_fast.code import Layer, SparseCode
from sae_fast.objectives.objective import Objective, Pull, penalised
from sae_fast.penalty import OF_F, PI, QUADRATIC, STEP, TANH, TARGET, TO_INPUT, Penalty

FORMS = {"step": STEP, "target": TARGET, "quadratic": QUADRATIC, "tanh": TANH}
WINDOWS = ("pi", "f")


class _Near(NamedTuple):
    """The entries of a code that may lie in a window, and all that do not fire: where ``at`` [m] they are, their features,
    rows and thresholds, whether they fire and whether they lie inside; l0 [B] float64, of the whole code."""

    at: Tensor
    features: Tensor
    rows: Tensor
    threshold: Tensor
    fires: Tensor
    inside: Tensor
    l0: Tensor


@dataclass(frozen=True)
class L0(Objective):
    """‖x − x̂‖² and a penalty on L0, whose step has the slope of a window of width ε, ``bandwidth``, around the
    threshold: K(z) = 1[|z| < ½] at z = (π − θ)/ε.  c is the coefficient, l0 an example's number of active ones.

    ``form``: "step" c E[l0]; "target" c (E[l0]/t − 1)², t the ``target`` (dictionary_learning's, and the default with a
    target); "quadratic" c E[2 (l0 − t)²/t] (SAELens'); "tanh" c E Σ tanh(tanh_scale f_i ‖d_i‖) (SAELens', of Anthropic).
    ``ste_to_input``: the window's slope reaches π too.  ``window`` "f": the penalty's window is that of f, so of an
    inactive entry K(−θ/ε), as dictionary_learning has it.  ``positive``: thresholds below 0 go back to 0 after a step.
    MATH.md §9.
    """

    coefficient: float | Tensor = 1.0
    target: float | None = None
    bandwidth: float = 1e-3
    form: str | None = None
    tanh_scale: float = 4.0
    ste_to_input: bool = False
    window: str = "pi"
    positive: bool = True

    activations = ("jumprelu",)
    projects_first = zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        form = ("step" if self.target is None else "target") if self.form is None else self.form
        object.__setattr__(self, "form", form)
        for name, value, among in (("form", form, FORMS), ("window", self.window, WINDOWS)):
            if value not in among:
                raise ValueError(f"{name}: got {value!r}, want one of {tuple(among)}")
        for name in ("bandwidth", "tanh_scale", *(["target"] if self.target is not None else [])):
            object.__setattr__(self, name, arguments.number(name, getattr(self, name), arguments.positive, "a number > 0"))
        if form in ("target", "quadratic") and self.target is None:
            raise ValueError(f"target: got None with form {form!r}, want a number > 0")
        if self.window == "f" and self.ste_to_input:
            raise ValueError("ste_to_input: got True with window 'f', want window 'pi'")

    @property
    def linear(self) -> bool:
        return False

    @property
    def costs_norm(self) -> bool:
        return self.form == "tanh"

    @property
    def penalty(self) -> Penalty:
        assert self.form is not None
        number = self.tanh_scale if self.form == "tanh" else self.target or 0.0
        window = OF_F if self.window == "f" else TO_INPUT if self.ste_to_input else PI
        return Penalty(FORMS[self.form], number, window, self.bandwidth)

    @property
    def target_l0(self) -> float | None:
        return self.target

    def trained(self, activation: Activation) -> tuple[str, ...]:
        return activation.parameters

    def reach(self, layer: Layer) -> Tensor:
        threshold = layer.vectors[0]
        return threshold - self._margin(threshold)

    def slack(self, layer: Layer) -> float:
        threshold = layer.vectors[0]
        slack = float((threshold.clamp(min=0) - self.reach(layer)).amax())  # the support is cut at 0, f is not
        if not isfinite(slack):
            raise ValueError(f"threshold: got {threshold[~threshold.isfinite()].tolist()[:3]} …, want finite ones")
        return slack

    def code(self, code: SparseCode, layer: Layer) -> SparseCode:
        if bool((layer.vectors[0] >= 0).all()):
            return code
        pi = code.u + layer.bias.index_select(0, code.indices)
        return code.with_values(torch.where(pi > layer.vectors[0].index_select(0, code.indices), pi, 0)[None])

    def by_example(self, code: SparseCode, layer: Layer) -> tuple[Objective, Tensor | float]:
        if self.form != "target":
            return self, 0.0
        assert self.target is not None
        mean = self._near(code, layer).l0.mean()
        off = mean / self.target - 1
        one, slope = copy(self), self.slope(mean)
        object.__setattr__(one, "form", "step")
        object.__setattr__(one, "coefficient", slope)
        return one, self.coefficient * off.square() - slope * mean

    def pull(self, code: SparseCode, layer: Layer, W_dec: Tensor, losses: Tensor, grads: Tensor, n: int) -> Pull:
        if self.form == "target":
            one, rest = self.by_example(code, layer)
            pull = one.pull(code, layer, W_dec, losses.double(), grads, n)
            return pull._replace(losses=penalised(losses, pull.losses[1] + rest))
        near, g, constants, of_norms = self._near(code, layer), grads[0], {}, None
        if self.form == "tanh":
            norms = W_dec.norm(dim=1).index_select(0, code.indices)
            squashed = torch.tanh(self.tanh_scale * code.magnitudes * norms)
            penalty = code.row_sums(squashed).sum(dtype=torch.float64) / n * self.coefficient
            slope = 1 - squashed.square()
            g = g + slope * (norms * (self.tanh_scale * self.coefficient / n))
            of_norms = slope * (self.tanh_scale * code.magnitudes)
        of_near = g[near.at]
        estimate = near.inside * of_near * (near.threshold / self.bandwidth)
        if self.form != "tanh":
            penalty, slopes = self._penalty(near.l0, n)
            of_step, slope = near.inside, slopes if slopes.dim() == 0 else slopes[near.rows]
            if self.window == "f":  # inactive entries: the feature's constant, of all n, less what the active ones have
                constant = slopes * (code.batch / n) if slopes.dim() == 0 else slopes.sum() / n
                constants["threshold"], always = self.at_rest(layer.vectors[0], constant)
                of_step = (near.inside & near.fires).to(g.dtype) - (near.fires & always[near.features]).to(g.dtype)
            estimate = estimate + of_step * (slope / (n * self.bandwidth)).to(g.dtype)
        delta = g.index_copy(0, near.at, torch.where(near.fires, of_near, 0) + (estimate if self.ste_to_input else 0))
        of_threshold = torch.zeros_like(g).index_copy_(0, near.at, -estimate)
        return Pull(penalised(losses, penalty), (delta, delta, of_threshold), constants, of_norms)

    def at_rest(self, threshold: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """([F], the thresholds' gradient through examples in which a feature does not fire, of window "f"; whether there
        is one), from the mean ``slope`` of the penalty in an entry's step."""
        always = self._window(threshold / self.bandwidth)
        return torch.where(always, (-slope / self.bandwidth).to(threshold.dtype), 0), always

    def constants(self, layer: Layer, l0: Tensor) -> dict[str, Tensor]:
        if self.window != "f" or self.form == "tanh":
            return {}
        return {"threshold": self.at_rest(layer.vectors[0], self.slope(l0))[0]}

    def slope(self, l0: Tensor) -> Tensor:
        """n times the penalty's slope in an entry's step, of l0, an example's or for "target" the batch's mean: 0-d where
        it is the same for all."""
        c, t = self.coefficient, self.target
        if self.form == "step":
            return c * l0.new_ones(())
        assert t is not None
        return (2 * c / t) * (l0 / t - 1) if self.form == "target" else (4 * c / t) * (l0 - t)

    def _penalty(self, l0: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """(the penalty, its :meth:`slope`), in float64."""
        if self.form == "step":
            return self.coefficient * l0.sum() / n, self.slope(l0)
        assert self.target is not None
        return self.coefficient * (2 / self.target) * (l0 - self.target).square().sum() / n, self.slope(l0)

    def _near(self, code: SparseCode, layer: Layer) -> _Near:
        threshold, f = layer.vectors[0], code.magnitudes
        reach = float((threshold + self._margin(threshold)).amax())
        near = (f < reach) | (f == 0)
        below = torch.zeros_like(threshold, dtype=torch.bool)
        if self.window == "f":  # what does not fire is 0, and so above a threshold below that
            below = threshold < 0
            apart = below | self._window(threshold / self.bandwidth)
            near = near | apart.index_select(0, code.indices) if bool(apart.any()) else near
        at = near.nonzero()[:, 0]
        features, rows = code.indices[at].long(), torch.searchsorted(code.indptr, at, right=True) - 1
        pi, theta = code.u[at] + layer.bias[features], threshold[features]
        fires, inside = pi > theta, self._window((pi - theta) / self.bandwidth)
        uncounted = torch.bincount(rows[~fires | below[features]], minlength=code.batch)
        l0 = (code.indptr.diff() - uncounted + below.sum()).double()
        return _Near(at, features, rows, theta, fires, inside, l0)

    def _margin(self, threshold: Tensor) -> Tensor:
        """Half a window, and what rounding may add to it."""
        return self.bandwidth / 2 * (1 + 2**-10) + 2**-20 * threshold.abs()

    @staticmethod
    def _window(z: Tensor) -> Tensor:
        return (z > -0.5) & (z < 0.5)
