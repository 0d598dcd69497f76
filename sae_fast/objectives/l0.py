"""L0: JumpReLU's objective, by straight-through estimators (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from sae_fast import arguments
from sae_fast.activations.activation import Activation
from sae_fast.code import Layer, SparseCode
from sae_fast.objectives.objective import Objective, Pull, penalised

FORMS = ("step", "target", "quadratic", "tanh")
WINDOWS = ("pi", "f")


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
                raise ValueError(f"{name}: got {value!r}, want one of {among}")
        for name in ("bandwidth", "tanh_scale", *(["target"] if self.target is not None else [])):
            object.__setattr__(self, name, arguments.number(name, getattr(self, name), arguments.positive, "a number > 0"))
        if form in ("target", "quadratic") and self.target is None:
            raise ValueError(f"target: got None with form {form!r}, want a number > 0")
        if self.window == "f" and self.ste_to_input:
            raise ValueError("ste_to_input: got True with window 'f', want window 'pi'")

    @property
    def plain(self) -> bool:
        return False

    @property
    def costs_norm(self) -> bool:
        return self.form == "tanh"

    @property
    def target_l0(self) -> float | None:
        return self.target

    def trained(self, activation: Activation) -> tuple[str, ...]:
        return activation.parameters

    def slack(self, layer: Layer) -> float:
        threshold = layer.vectors[0]
        below = float(-threshold.amin().clamp(max=0))  # the support is cut at 0, f is not
        slack = self.bandwidth / 2 * (1 + 2**-10) + 2**-20 * float(threshold.abs().amax()) + below
        if not isfinite(slack):
            raise ValueError(f"threshold: got {threshold[~threshold.isfinite()].tolist()[:3]} …, want finite ones")
        return slack

    def code(self, code: SparseCode, layer: Layer) -> SparseCode:
        pi, threshold = self._at(code, layer)
        return code.with_values(torch.where(pi > threshold, pi, 0)[None])

    def pull(self, code: SparseCode, layer: Layer, W_dec: Tensor, losses: Tensor, grads: Tensor, n: int) -> Pull:
        pi, threshold = self._at(code, layer)
        fires, inside = pi > threshold, self._window((pi - threshold) / self.bandwidth)
        g, constants, of_norms = grads[0], {}, None
        if self.form == "tanh":
            norms = W_dec.norm(dim=1)[code.indices]
            squashed = torch.tanh(self.tanh_scale * code.magnitudes * norms)
            penalty = code.row_sums(squashed).mean(dtype=torch.float64) * self.coefficient
            slope = 1 - squashed.square()
            g = g + slope * (norms * (self.tanh_scale * self.coefficient / n))
            of_norms = slope * (self.tanh_scale * code.magnitudes)
            estimate = inside * g * (threshold / self.bandwidth)
        else:
            penalty, slopes = self._penalty(fires, code, layer.vectors[0])
            of_step = inside
            if self.window == "f":  # inactive entries: the feature's constant, of all n, less what the active ones have
                of_step = (inside & fires).to(g.dtype) - (fires & self._window(threshold / self.bandwidth)).to(g.dtype)
                constant = (-slopes.mean() / self.bandwidth).to(g.dtype)
                constants["threshold"] = torch.where(self._window(layer.vectors[0] / self.bandwidth), constant, 0)
            slope = slopes if slopes.dim() == 0 else slopes[code.row_ids()]
            estimate = inside * g * (threshold / self.bandwidth) + of_step * (slope / (n * self.bandwidth)).to(g.dtype)
        delta = torch.where(fires, g, 0)
        if self.ste_to_input:
            delta = delta + estimate
        return Pull(penalised(losses, penalty), (delta, delta, -estimate), constants, of_norms)

    def _penalty(self, fires: Tensor, code: SparseCode, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """(the penalty, n times its slope in an entry's step: 0-d, or [n] by example), in float64."""
        l0, c, t = code.row_sums(fires.double()), self.coefficient, self.target
        if self.window == "f":  # what does not fire is 0, and so above a threshold below that
            below = threshold < 0
            l0 = code.row_sums((fires & ~below[code.indices]).double()) + below.sum()
        if self.form == "step":
            return c * l0.mean(), c * l0.new_ones(())
        assert t is not None
        off = l0.mean() / t - 1 if self.form == "target" else l0 - t
        if self.form == "target":
            return c * off.square(), (2 * c / t) * off
        return c * (2 / t) * off.square().mean(), (4 * c / t) * off

    @staticmethod
    def _at(code: SparseCode, layer: Layer) -> tuple[Tensor, Tensor]:
        """π and the threshold, [nnz]."""
        return code.u + layer.bias[code.indices], layer.vectors[0][code.indices]

    @staticmethod
    def _window(z: Tensor) -> Tensor:
        return (z > -0.5) & (z < 0.5)
