"""Measures of how good a reconstruction is, and how sparse its code.

Each metric is a function of a few sums over tokens. `Metrics` keeps those sums: in float64, mergeable over
batches and ranks in any order. The functions below it are the same numbers for one batch.

With A = E‖x̂‖², B = E‖x‖², C = E[x̂·x] and D = E‖x − x̂‖² the four measures of shrinkage are

    relative_reconstruction_bias   γ  = A/C          argmin_c E‖x̂/c − x‖²   (arXiv 2404.16014, as published)
    projection_bias                c₁ = C/B          argmin_c E‖x̂ − c x‖²   (the critique's correction)
    optimal_rescale                s  = C/A = 1/γ    argmin_s E‖s x̂ − x‖²
    legacy_bias                    √(A/(B − D))      the first version of the paper

Only γ and s are reciprocal: c₁ = ρ²γ with ρ² = C²/(AB). A collapsed SAE (x̂ = mean) has γ ≈ 1 too, so γ
means nothing without L0 and FVU beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Sums = dict[str, Tensor]

# What `Metrics` keeps. Every entry adds up over batches, except a mean and the scatter around it.
SCALARS = ("tokens", "x_hat_x_hat", "x_x", "x_hat_x", "error_error", "cosine", "scatter", "error_scatter")
PER_DIMENSION = ("mean", "error_mean")
PER_FEATURE = ("fires",)
MOMENTS = (("mean", "scatter"), ("error_mean", "error_scatter"))


class Metrics:
    """Streaming metrics of an SAE with `d_sae` features.

    >>> metrics = Metrics(d_sae=2)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> metrics.update(x, 0.5 * x, code=x)
    >>> metrics.compute()["relative_reconstruction_bias"]
    0.5

    One pass, or any split of the tokens into batches merged in any order, gives the same numbers up to
    rounding in float64.
    """

    def __init__(self, d_sae: int):
        if not isinstance(d_sae, int) or isinstance(d_sae, bool) or d_sae < 1:
            raise ValueError(f"d_sae: got {d_sae!r}, want the number of features, an integer >= 1")
        self.d_sae = d_sae
        self._sums: Sums = {}

    def update(self, x: Tensor, x_hat: Tensor, code: Any) -> None:
        """Add a batch: x and x_hat [..., d] of any float dtype; `code` a SparseCode or dense activations
        [..., d_sae].

        An entry of `code` counts as firing where it is not zero. Raises ValueError on a wrong shape or
        dtype, or on a value that is not finite.
        """
        sums = _reconstruction_sums(x, x_hat)
        sums["fires"] = _count_firing(code, int(sums["tokens"]), self.d_sae).to(sums["mean"].device)
        self._add(sums)

    def merge(self, other: Metrics) -> Metrics:
        """Add what another rank or shard has seen; returns self."""
        if other.d_sae != self.d_sae:
            raise ValueError(f"other: got metrics of {other.d_sae} features, want {self.d_sae}")
        self._add(other._sums)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, as tensors on the CPU; empty before the first batch."""
        return {name: value.detach().cpu().clone() for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums by those of a `state_dict()`. Raises ValueError if it is not one for `d_sae`
        features.
        """
        wanted = set(SCALARS + PER_DIMENSION + PER_FEATURE)
        if state and set(state) != wanted:
            raise ValueError(f"state: got the entries {sorted(state)}, want {sorted(wanted)}")
        if state and state["fires"].shape != (self.d_sae,):
            raise ValueError(f"state: got counts of {len(state['fires'])} features, want {self.d_sae}")
        self._sums = {name: value.detach().clone() for name, value in state.items()}

    def density(self) -> Tensor:
        """[d_sae] float64: the fraction of tokens on which each feature fires."""
        return self._seen()["fires"].double() / self._sums["tokens"]

    def compute(self) -> dict[str, float]:
        """Every metric over the tokens seen, by name. A ratio whose denominator is zero is nan.

        tokens; l0, the mean number of firing features per token; fvu; explained_variance; mse = E‖x − x̂‖²,
        summed over dimensions; cosine; the four measures of shrinkage; dead_fraction, of features that
        never fired. Raises ValueError before the first batch.
        """
        sums = self._seen()
        density = self.density()
        return {
            "tokens": int(sums["tokens"]),
            "l0": float(density.sum()),
            **_reconstruction_metrics(sums),
            "dead_fraction": float((density == 0).double().mean()),
        }

    def _add(self, sums: Sums) -> None:
        if sums:
            self._sums = _combine(self._sums, sums) if self._sums else {k: v.clone() for k, v in sums.items()}

    def _seen(self) -> Sums:
        if not self._sums:
            raise ValueError("metrics: no tokens seen yet; call update(x, x_hat, code) first")
        return self._sums


def relative_reconstruction_bias(x: Tensor, x_hat: Tensor) -> float:
    """γ = E‖x̂‖² / E[x̂·x], the paper's published measure of shrinkage; below 1, x̂ is too small. x, x_hat
    [..., d].
    """
    return _of_batch("relative_reconstruction_bias", x, x_hat)


def projection_bias(x: Tensor, x_hat: Tensor) -> float:
    """c₁ = E[x̂·x] / E‖x‖², the multiple of x that x̂ is nearest to; below 1 for any imperfect SAE with γ =
    1.
    """
    return _of_batch("projection_bias", x, x_hat)


def optimal_rescale(x: Tensor, x_hat: Tensor) -> float:
    """s = E[x̂·x] / E‖x̂‖² = 1/γ, the factor by which to multiply x̂ to bring it nearest to x."""
    return _of_batch("optimal_rescale", x, x_hat)


def legacy_bias(x: Tensor, x_hat: Tensor) -> float:
    """√(E‖x̂‖² / (E‖x‖² − E‖x − x̂‖²)) = √(γ/(2 − γ)), from the paper's first version; nan where γ > 2 or γ
    < 0.
    """
    return _of_batch("legacy_bias", x, x_hat)


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Σ‖x − x̂‖² / Σ‖x − x̄‖², the fraction of variance unexplained; 1 for the best constant x̂, nan if x
    is constant.
    """
    return _of_batch("fvu", x, x_hat)


def explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """1 − Σ‖e − ē‖² / Σ‖x − x̄‖² with e = x − x̂: equals 1 − FVU plus what a constant correction of x̂
    would gain.

    This is dictionary_learning's `frac_variance_explained` and scikit-learn's `explained_variance_score`.
    """
    return _of_batch("explained_variance", x, x_hat)


def cosine(x: Tensor, x_hat: Tensor) -> float:
    """The mean over tokens of cos(x, x̂); a token where either is zero counts as 0."""
    return _of_batch("cosine", x, x_hat)


def feature_density(code: Any) -> Tensor:
    """[F] float64: the fraction of tokens on which each feature fires. `code`: a SparseCode or dense [...,
    F].
    """
    tokens, features = _tokens_and_features(code)
    return _count_firing(code, tokens, features).double() / tokens


def l0(code: Any) -> float:
    """The mean number of firing features per token. `code`: a SparseCode or dense [..., F]."""
    return float(feature_density(code).sum())


def dead_fraction(code: Any) -> float:
    """The fraction of features that fire on none of these tokens. `code`: a SparseCode or dense [..., F]."""
    return float((feature_density(code) == 0).double().mean())


def loss_recovered(ce_clean: float, ce_spliced: float, ce_zero: float) -> float:
    """1 − (CE(spliced) − CE(clean)) / (CE(zero) − CE(clean)), in nats or bits, as long as all three are the
    same.

    1: splicing x̂ in for x costs the model nothing; 0: as much as replacing x by zero. Raises ValueError if
    zeroing x changes nothing, since there is then no loss to recover.
    """
    ce_clean, ce_spliced, ce_zero = float(ce_clean), float(ce_spliced), float(ce_zero)
    if ce_zero == ce_clean:
        raise ValueError(f"ce_zero: got {ce_zero}, equal to ce_clean, want the loss of a model that x matters to")
    return 1 - (ce_spliced - ce_clean) / (ce_zero - ce_clean)


def _of_batch(name: str, x: Tensor, x_hat: Tensor) -> float:
    return _reconstruction_metrics(_reconstruction_sums(x, x_hat))[name]


def _reconstruction_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    a, b, c, d = (sums[name] for name in ("x_hat_x_hat", "x_x", "x_hat_x", "error_error"))
    return {
        "fvu": _ratio(d, sums["scatter"]),
        "explained_variance": 1 - _ratio(sums["error_scatter"], sums["scatter"]),
        "mse": _ratio(d, sums["tokens"]),
        "cosine": _ratio(sums["cosine"], sums["tokens"]),
        "relative_reconstruction_bias": _ratio(a, c),
        "projection_bias": _ratio(c, b),
        "optimal_rescale": _ratio(c, a),
        "legacy_bias": _root(_ratio(a, 2 * c - a)),  # B − D = 2C − A, without the cancellation of a large mean
    }


def _reconstruction_sums(x: Tensor, x_hat: Tensor) -> Sums:
    """The sums of one batch, in float64."""
    x, x_hat = _rows("x", x), _rows("x_hat", x_hat)
    if x.shape != x_hat.shape:
        raise ValueError(f"x_hat: got {list(x_hat.shape)} as rows, want the shape of x, {list(x.shape)}")
    error = x - x_hat
    products = {
        "x_hat_x_hat": x_hat * x_hat,
        "x_x": x * x,
        "x_hat_x": x_hat * x,
        "error_error": error * error,
    }
    per_token = {name: product.sum(dim=1) for name, product in products.items()}
    norms = (per_token["x_x"].sqrt() * per_token["x_hat_x_hat"].sqrt()).clamp_min(torch.finfo(torch.float64).tiny)
    mean, error_mean = x.mean(dim=0), error.mean(dim=0)
    return {
        "tokens": torch.tensor(len(x), device=x.device),
        **{name: value.sum() for name, value in per_token.items()},
        "cosine": (per_token["x_hat_x"] / norms).sum(),
        "mean": mean,
        "scatter": (x - mean).square().sum(),
        "error_mean": error_mean,
        "error_scatter": (error - error_mean).square().sum(),
    }


def _combine(a: Sums, b: Sums) -> Sums:
    """The sums over the tokens of both; the scatter as in Chan, Golub and LeVeque 1979, without large
    squares.
    """
    b = {name: value.to(a[name].device) for name, value in b.items()}
    if a["mean"].shape != b["mean"].shape:
        raise ValueError(f"x: got width {len(b['mean'])}, want {len(a['mean'])}, that of the tokens seen before")
    both = {name: a[name] + b[name] for name in a}
    share = b["tokens"].double() / both["tokens"]
    for mean, scatter in MOMENTS:
        apart = b[mean] - a[mean]
        both[mean] = a[mean] + apart * share
        both[scatter] = both[scatter] + apart.square().sum() * a["tokens"] * share
    return both


def _rows(name: str, value: Tensor) -> Tensor:
    """[tokens, d] in float64, checked."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, want a floating-point tensor of shape [..., d]")
    if value.dim() == 0 or value.numel() == 0:
        raise ValueError(f"{name}: got shape {list(value.shape)}, want [..., d] with at least one token")
    rows = value.detach().reshape(-1, value.shape[-1]).double()
    if not rows.isfinite().all():
        index = (~value.isfinite()).nonzero()[0].tolist()
        got = f"{value[tuple(index)].item()} at {index} of shape {list(value.shape)}"
        raise ValueError(f"{name}: got {got}, want finite values")
    return rows


def _is_sparse_code(code: Any) -> bool:
    return all(hasattr(code, name) for name in ("indptr", "indices", "magnitudes", "shape"))


def _tokens_and_features(code: Any) -> tuple[int, int]:
    if not _is_sparse_code(code) and not isinstance(code, Tensor):
        raise ValueError(f"code: got {type(code).__name__}, want a SparseCode or dense activations [..., F]")
    if len(code.shape) < 1 or math.prod(code.shape) == 0:
        raise ValueError(f"code: got shape {list(code.shape)}, want [..., F] with at least one token")
    return math.prod(code.shape[:-1]), code.shape[-1]


def _count_firing(code: Any, tokens: int, features: int) -> Tensor:
    """[features] int64: on how many of the tokens each feature is not zero."""
    if _tokens_and_features(code) != (tokens, features):
        raise ValueError(f"code: got shape {list(code.shape)}, want {tokens} tokens in all and {features} features")
    if _is_sparse_code(code):
        return torch.bincount(code.indices[code.magnitudes != 0], minlength=features)
    return (code.detach().reshape(tokens, features) != 0).sum(dim=0)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator.double() / denominator.double()) if denominator != 0 else math.nan


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan
